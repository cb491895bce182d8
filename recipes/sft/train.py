"""Fine-tune a student on tessy rows with TRL: the paper's setting, LoRA, an own system prompt, weights by author.

    accelerate launch recipes/sft/train.py --config recipes/sft/paper.yaml --data me/tessy-code@v1.0.0

Each option of ``trl.SFTConfig`` and ``trl.ModelConfig`` is an option here, in the YAML file and on the command line.
"""

from dataclasses import dataclass, field, fields

from author_weights import AuthorWeightedCollator, AuthorWeightedTrainer, Weights, weigh
from transformers import AutoTokenizer
from trl import ModelConfig, SFTConfig, SFTTrainer, TrlParser, get_peft_config
from trl.chat_template_utils import get_training_chat_template

from tessy_hf.errors import DatasetError, SettingsError, TemplateError
from tessy_hf.rows.loading import load_finished
from tessy_hf.text.thinking_format import THINK_TAGS, detect
from tessy_hf.text.vocabulary import Vocabulary


@dataclass
class Data:
    """What to train on."""

    data: str = field(metadata={"help": "Rows, ours or others': .parquet, .jsonl, a folder, or user/name@v1.0.0."})
    split: str = field(default="train", metadata={"help": "Which split of them."})
    system_prompt: str | None = field(
        default=None, metadata={"help": "Set this system prompt in all rows; say it again when the model is used."}
    )


@dataclass
class AuthorWeights:
    """Loss weights by author, an experiment; all 1 is plain TRL."""

    style_weight: float = field(default=1.0, metadata={"help": "Of the student's spans of the thinking."})
    capability_weight: float = field(default=1.0, metadata={"help": "Of the teacher's spans of the thinking."})
    answer_weight: float = field(default=1.0, metadata={"help": "Of the answer."})


def main(arguments=None):
    """Train, and write the model or adapter."""
    parser = TrlParser((Data, AuthorWeights, SFTConfig, ModelConfig))
    data, weights, config, model = parser.parse_args_and_config(arguments)
    tokenizer = AutoTokenizer.from_pretrained(model.model_name_or_path, revision=model.model_revision)
    own = detect(Vocabulary(tokenizer, model.model_name_or_path))
    loaded = load_finished(data.data, data.split, thinking_format=own if own.thinks else THINK_TAGS)
    rows = complete(loaded, data.system_prompt)
    template = training_template(tokenizer, rows[0])
    if weights == AuthorWeights():
        kind, rows, collator = SFTTrainer, rows.select_columns("messages"), None
    else:
        kind, (rows, collator) = AuthorWeightedTrainer, weighted(rows, tokenizer, template, weights, config)
    if config.model_init_kwargs is None:
        config.model_init_kwargs = {"revision": model.model_revision, "dtype": model.dtype}
    trainer = kind(
        model.model_name_or_path,
        args=config,
        train_dataset=rows,
        processing_class=tokenizer,
        data_collator=collator,
        peft_config=get_peft_config(model),
    )
    trainer.train()
    trainer.save_model()
    return trainer


def complete(rows, system_prompt=None):
    """Return the rows that ended by themselves, under a system prompt of their own if one is given."""
    if "finish_reason" in rows.column_names:
        rows = rows.filter(lambda reason: reason == "stop", input_columns="finish_reason")
    if not len(rows):
        raise DatasetError("No row ended with 'stop'. Complete rows are needed to train on; look at `finish_reason`.")
    if system_prompt is None:
        return rows

    def isolate(row):
        system = {**dict.fromkeys(row["messages"][0]), "role": "system", "content": system_prompt}
        return {"messages": [system, *(turn for turn in row["messages"] if turn["role"] != "system")]}

    return rows.map(isolate)


def training_template(tokenizer, row):
    """Return the template that TRL will train with, having seen that it keeps the thinking.

    Raises:
        TemplateError: It drops thinking or answer: the student would learn to answer without thinking.
    """
    template = get_training_chat_template(tokenizer) or tokenizer.chat_template
    text = tokenizer.apply_chat_template(row["messages"], tokenize=False, chat_template=template)
    for part in ("thinking", "answer"):
        if (row.get(part) or "").strip() not in text:
            raise TemplateError(
                f"The training template of {tokenizer.name_or_path!r} drops the {part} of a row; it rendered "
                f"{text[-120:]!r}. Give the tokenizer a chat template that keeps the assistant's whole content."
            )
    return template


def weighted(rows, tokenizer, template, given, config):
    """Return tokens with weights, and what batches them."""
    if config.packing or config.padding_free:
        raise SettingsError("Weights by author go with padded batches only. Set packing and padding_free to false.")
    weights = Weights(*(getattr(given, named.name) for named in fields(given)))
    tokens, scale = weigh(rows, tokenizer, template, weights, config.max_length)
    config.remove_unused_columns = False  # the weights are a column that the model does not know
    config.assistant_only_loss = False  # the labels tell already
    pad_token = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return tokens, AuthorWeightedCollator(pad_token, pad_to_multiple_of=config.pad_to_multiple_of, scale=scale)


if __name__ == "__main__":
    main()
