"""Rows train with TRL as they are; the recipe's options and its loss by author do what they say."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
import trl
import yaml
from datasets import Dataset, load_dataset
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer
from trl.chat_template_utils import get_training_chat_template

from tessy_hf import demo, push_to_hub
from tessy_hf.errors import DatasetError, SettingsError, TemplateError
from tessy_hf.rows.columns import assistant_text
from tests.hub_server import HubServer, clients_of
from tests.rows.test_columns import HARMONY, as_row, trajectory
from tests.worlds import R1, make_tokenizer

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
ROWS = ROOT / "dataset_cards" / "miniature" / "data" / "train-00000.parquet"
QUICK = {"use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no", "seed": 0, "disable_tqdm": True}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def recipe():
    """The modules of recipes/sft, imported as a script in that folder imports them."""
    folder = str(ROOT / "recipes" / "sft")
    sys.path.insert(0, folder)
    yield importlib.import_module("train"), importlib.import_module("author_weights")
    sys.path.remove(folder)
    del sys.modules["train"], sys.modules["author_weights"]


@pytest.fixture(scope="module")
def rows():
    return load_dataset("parquet", data_files=str(ROWS), split="train")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(str(demo.STUDENT))


def losses(trainer):
    return [step["loss"] for step in trainer.state.log_history if "loss" in step]


@pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")  # of the client's upload
def test_a_release_loaded_by_tag_trains_with_plain_trl(tmp_path, monkeypatch):
    prompts = demo.prompts(24, seed=5)
    assert "prompt" in prompts.column_names  # which TRL would take for another format
    with demo.transform(journal=None) as transform:
        rows = prompts.map(transform, batched=True, features=transform.features(prompts))
    with HubServer(tmp_path / "storage") as hub, clients_of(hub, tmp_path / "home", monkeypatch):
        push_to_hub(rows, "ada/rows", "1.0.0", say=lambda _: None)
        released = load_dataset("ada/rows", revision="v1.0.0", split="train")
    args = SFTConfig(
        str(tmp_path / "out"), assistant_only_loss=True, max_length=None, num_train_epochs=4, learning_rate=1e-3,
        logging_steps=1, **QUICK,
    )  # fmt: skip
    trainer = SFTTrainer(str(demo.STUDENT), train_dataset=released, args=args)
    (trained,) = trainer.train_dataset.select([0])
    wrote = [token for token in trained["labels"] if token != -100]
    assert trainer.processing_class.decode(wrote) == released[0]["messages"][-1]["content"] + "<|im_end|>"
    trainer.train()
    assert len(losses(trainer)) == 12 and losses(trainer)[-1] < 0.9 * losses(trainer)[0]


def options(tmp_path, **changes):
    given = {
        "data": ROWS,
        "model_name_or_path": demo.STUDENT,
        "output_dir": tmp_path / "out",
        "max_steps": 2,
        **changes,
    }
    given = {"per_device_train_batch_size": 4, "dtype": "float32", "assistant_only_loss": True, **QUICK, **given}
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


@pytest.mark.parametrize("name", ["paper", "lora", "miniature"])
def test_every_recipe_is_of_known_options_and_runs_on_the_miniature_student(recipe, tmp_path, name):
    train, _ = recipe
    path = ROOT / "recipes" / "sft" / f"{name}.yaml"
    told = yaml.safe_load(path.read_text())
    small = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "gradient_checkpointing": False}
    trainer = train.main(["--config", str(path), *options(tmp_path, **small, max_steps=1)])
    assert trainer.args.learning_rate == told["learning_rate"] and trainer.args.num_train_epochs == 9
    assert trainer.args.assistant_only_loss and trainer.args.max_length == told["max_length"]
    adapter = (tmp_path / "out" / "adapter_model.safetensors").exists()
    assert adapter == (name == "lora") and adapter != (tmp_path / "out" / "model.safetensors").exists()
    if adapter:
        (lora,) = trainer.model.peft_config.values()
        assert (lora.r, lora.lora_alpha) == (8, 16)


def test_the_paper_recipes_have_its_batch_of_128():
    told = {name: yaml.safe_load((ROOT / "recipes/sft" / f"{name}.yaml").read_text()) for name in ("paper", "lora")}
    batch = {
        name: one["per_device_train_batch_size"] * one["gradient_accumulation_steps"] for name, one in told.items()
    }
    assert batch == {"paper": 128 // 8, "lora": 128}


def test_a_system_prompt_isolates_the_rows(recipe, tmp_path, tokenizer):
    train, _ = recipe
    trainer = train.main(options(tmp_path, system_prompt="okay so"))
    text = tokenizer.decode(trainer.train_dataset[0]["input_ids"])
    assert text.startswith("<|im_start|>system\nokay so<|im_end|>\n<|im_start|>user\n")
    row = as_row(trajectory(), "harmony", HARMONY)
    row["messages"] = [{"role": "system", "content": "old", "thinking": None}, *row["messages"]]
    (isolated,) = train.complete(Dataset.from_list([row]), "new")
    assert [turn["role"] for turn in isolated["messages"]] == ["system", "user", "assistant"]
    assert isolated["messages"][0]["content"] == "new"


def test_only_complete_rows_are_trained_on(recipe, rows):
    train, _ = recipe
    reasons = ["length", "stop"] * 5
    some = rows.select(range(10)).remove_columns("finish_reason").add_column("finish_reason", reasons)
    assert train.complete(some)["id"] == some["id"][1::2]
    with pytest.raises(DatasetError, match="No row ended with 'stop'"):
        train.complete(some.select([0, 2]))


def test_a_template_that_drops_the_thinking_is_refused(recipe):
    train, _ = recipe
    tokenizer = make_tokenizer("r1")
    row = as_row(trajectory(), "r1")
    marked = R1.replace("{% else %}<", "{% else %}{% generation %}<")
    marked = marked.replace("sentence｜>{% endif", "sentence｜>{% endgeneration %}{% endif")
    assert "{% generation %}" in marked and "{% endgeneration %}" in marked
    try:
        tokenizer.chat_template = marked
        with pytest.raises(TemplateError, match="drops the thinking"):
            train.training_template(tokenizer, row)
    finally:
        tokenizer.chat_template = R1


# --- weights by author


def test_each_token_has_the_weight_of_the_span_it_ends_in(recipe, rows, tokenizer):
    _, ours = recipe
    weights = ours.Weights(style=0.25, capability=2.0, answer=0.5)
    for row in rows.select(range(20)):
        tokens = ours.tokenize(row, tokenizer=tokenizer, template=None, weights=weights, max_length=None)
        columns = (tokens[name] for name in ("input_ids", "labels", "loss_weights"))
        trained = [(token, weight) for token, label, weight in zip(*columns, strict=True) if label != -100]
        assert tokenizer.decode([token for token, _ in trained]) == assistant_text(row) + "<|im_end|>"
        marks = tokenizer("<think>\n</think>\n\n")["input_ids"]  # in the spans beside them, but not in their counts
        for *kind, weight in (("student", "thinking", 0.25), ("teacher", "thinking", 2.0), ("student", "answer", 0.5)):
            counted = sum(span["tokens"] for span in row["spans"] if [span["author"], span["part"]] == kind)
            own = [token for token, given in trained if given == weight and token not in marks]
            assert len(own) == counted + (kind[1] == "answer"), (kind, row["id"])  # with the end of the turn


def reference_loss(model, batch):
    """Cross-entropy by hand, token by token."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.log_softmax(-1)
    total = count = 0.0
    for line in range(len(logits)):
        for at in range(1, logits.shape[1]):
            label = int(batch["labels"][line, at])
            if label != -100:
                total = total - logits[line, at - 1, label] * batch["loss_weights"][line, at]
                count += 1
    return total / count


@pytest.fixture
def weighted_trainer(recipe, tmp_path):
    train, _ = recipe

    def make(**weights):
        return train.main(options(tmp_path, max_steps=1, **weights))

    return make


def test_the_loss_is_the_weighted_cross_entropy(weighted_trainer, recipe, rows, tokenizer):
    trainer = weighted_trainer(style_weight=0.7, capability_weight=3, answer_weight=0.5)
    assert type(trainer).__name__ == "AuthorWeightedTrainer"
    batch = trainer.data_collator([trainer.train_dataset[at] for at in range(3)])
    expected = reference_loss(trainer.model, batch)
    expected.backward()
    gradients = [parameter.grad.clone() for parameter in trainer.model.parameters()]
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, {**batch})
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    for parameter, gradient in zip(trainer.model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-5)
    every = trainer.data_collator(list(trainer.train_dataset))
    assert float(every["loss_weights"][every["labels"] != -100].mean()) == pytest.approx(1, abs=1e-4)


def test_equal_weights_train_as_trl_does(recipe, tmp_path, rows):
    train, ours = recipe
    plain = train.main(options(tmp_path, logging_steps=1))
    steps = {"max_steps": 2, "per_device_train_batch_size": 4, "logging_steps": 1}
    config = SFTConfig(str(tmp_path / "out"), max_length=None, **steps, **QUICK)
    tokens, collator = train.weighted(rows, plain.processing_class, None, train.AuthorWeights(), config)
    same = ours.AuthorWeightedTrainer(str(demo.STUDENT), args=config, train_dataset=tokens, data_collator=collator)
    same.train()
    assert losses(same) == pytest.approx(losses(plain), rel=1e-4) and collator.scale == 1


def test_rows_are_cut_with_their_weights(recipe, rows, tokenizer):
    _, ours = recipe
    tokens, _ = ours.weigh(rows.select(range(3)), tokenizer, None, ours.Weights(style=2), max_length=30)
    assert {len(row[name]) for row in tokens for name in tokens.column_names} == {30}


@pytest.mark.parametrize("kind", ["qwen3", "gptoss", "deepseek_r1_distill"])
def test_spans_are_found_in_what_trls_own_templates_render(recipe, kind):
    """TRL swaps these templates in for the families that students are of."""
    _, ours = recipe
    world = {"qwen3": "qwen", "gptoss": "harmony", "deepseek_r1_distill": "r1"}[kind]
    template = (Path(trl.__file__).parent / "chat_templates" / f"{kind}_training.jinja").read_text()
    row = as_row(trajectory(), world, HARMONY) if kind == "gptoss" else as_row(trajectory(), world)
    text = make_tokenizer(world).apply_chat_template(row["messages"], tokenize=False, chat_template=template)
    start, ends = ours.locate(row, text)
    whole = assistant_text(row)
    cut = [text[begin:end].strip() for begin, end in zip([start, *ends[:-1]], ends, strict=True)]
    assert cut == [whole[span["start"] : span["end"]].strip() for span in row["spans"]]


def test_what_cannot_be_weighed_is_told(recipe, tmp_path, rows, tokenizer):
    train, ours = recipe
    for weights in ((-1, 1, 1), (0, 0, 0), (1, float("nan"), 1)):
        with pytest.raises(SettingsError, match="Numbers of at least 0"):
            ours.Weights(*weights)
    with pytest.raises(SettingsError, match="padded batches only"):
        train.main(options(tmp_path, style_weight=2, packing=True))
    with pytest.raises(DatasetError, match="no spans"):
        ours.locate({**rows[0], "spans": []}, "")
    with pytest.raises(TemplateError, match="changes the assistant's text"):
        ours.locate(rows[0], rows[0]["messages"][-1]["content"].replace("okay", "well"))
    with pytest.raises(SettingsError, match="No token of 1 rows has a weight"):
        ours.weigh(rows.select([0]), tokenizer, None, ours.Weights(answer=1, style=0, capability=0), max_length=30)


def test_trl_is_asked_for_its_own_training_template(recipe, tokenizer, rows):
    train, _ = recipe
    assert get_training_chat_template(tokenizer) is None
    assert train.training_template(tokenizer, rows[0]) == tokenizer.chat_template
