"""Train a boundary predictor: segments with marked style spans in, a folder with a stock token classifier out.

Any base model that ``AutoModelForTokenClassification`` loads will do (paper, section 2.2: Qwen3-0.6B-Base); training
is ``transformers.Trainer``'s. The folder states in its ``config.json`` all that a reader of the labels must know.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tessy_hf.boundary.predictor import BoundaryPredictor, LabelShift
from tessy_hf.boundary_training.metrics import UNJUDGED, Evaluation, Reading, evaluate, evaluate_readings
from tessy_hf.boundary_training.segments import (
    UNKNOWN,
    Segment,
    read_segments,
    span_starts,
    split_by_problem,
    token_kinds,
)
from tessy_hf.boundary_training.warm_up import WarmUp, warm_up
from tessy_hf.errors import BoundaryError, SettingsError
from tessy_hf.hub.boundary_models import render_card
from tessy_hf.vocabulary import Vocabulary, words

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

LABELS = {0: "capability", 1: "style"}
IGNORED = -100
"""The label of a token on which nothing is learnt."""

Rows = str | Path | Iterable[Mapping[str, Any] | Segment]


class TrainingSettings(BaseModel):
    """How a predictor is trained. The defaults are for a base model of the paper's size and a GPU."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    base: str | WarmUp = "Qwen/Qwen3-0.6B-Base"
    """The model to start from: a Hub id or folder; or a small one to make first, see
    :class:`tessy_hf.boundary_training.warm_up.WarmUp`."""
    base_revision: str | None = None
    """Branch, tag or commit of the base model."""
    model_options: dict[str, Any] = Field(default_factory=dict)
    """Entries of the base model's config to change, for instance ``{"classifier_dropout": 0.2}``."""
    label_shift: LabelShift = 0
    """0: the label of a token is about it (the paper's text). 1: about the next one (the released checkpoints)."""
    window: int = Field(default=200, ge=2)
    """Tokens of thinking that are read at most. Longer segments are cut into pieces for training."""
    author: Literal["teacher", "student", "any"] = "any"
    """Whose text the predictor is for; written into the config, for people."""
    epochs: float = Field(default=3.0, gt=0)
    """Most passes over the training segments."""
    batch_size: int = Field(default=32, ge=1)
    """Segments a step."""
    learning_rate: float = Field(default=2e-5, gt=0)
    """Peak learning rate; it rises over the first tenth of the steps and falls along a cosine."""
    weight_decay: float = Field(default=0.01, ge=0)
    """AdamW's weight decay."""
    style_weight: float | Literal["balanced"] = 1.0
    """How much more a style token counts than a capability token; ``balanced`` makes both kinds count the same."""
    tune_bias: bool = True
    """Whether the classifier's bias is moved, after training, to where the character F1 of the validation segments is
    highest. It makes up for weighted classes, and leaves the model a stock one."""
    aligned_copies: int = Field(default=1, ge=0)
    """How often a training segment comes again, beginning at one of its span starts: there a predictor is asked once
    authors take turns, and random cuts hardly teach it."""
    validation_share: float = Field(default=0.1, gt=0, lt=1)
    """Share of the problems that decides when to stop."""
    test_share: float = Field(default=0.1, ge=0, lt=1)
    """Share of the problems that is only measured on, at the end; with 0 the validation segments are reported."""
    patience: int = Field(default=2, ge=1)
    """Epochs without a better character F1 after which training stops. The best epoch is kept."""
    seed: int = 0
    """Of the split, the order, the aligned copies and new weights."""
    save_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the saved weights."""

    @classmethod
    def check(cls, **given: Any) -> TrainingSettings:
        """Check settings given by name.

        Raises:
            SettingsError: A name is unknown or a value is out of range.
        """
        try:
            return cls(**given)
        except ValidationError as error:
            fault = max(error.errors(), key=lambda e: len(e["loc"]))
            where = ".".join(map(str, fault["loc"]))
            raise SettingsError(
                f"The training setting {where}={fault['input']!r} cannot be used: {fault['msg'].lower()}. "
                f"Known settings: {', '.join(cls.model_fields)}."
            ) from error


class Trained(NamedTuple):
    """What :func:`train_boundary` made.

    Attributes:
        folder: The model, its tokenizer and ``report.json``.
        evaluation: Of the test segments, or of the validation segments where ``test_share`` is 0.
    """

    folder: Path
    evaluation: Evaluation


def train_boundary(
    data: Rows,
    out: str | Path,
    *,
    extra: Rows | None = None,
    validation: Rows | None = None,
    test: Rows | None = None,
    texts: Iterable[str] | None = None,
    **settings: Any,
) -> Trained:
    """Train a predictor.

    Args:
        data: Segments: a JSONL file, a ``datasets.Dataset`` or any rows with ``text``, ``style_spans`` and
            ``problem_id`` (:meth:`tessy_hf.boundary_training.segments.Segment.from_row`).
        out: The folder to write. A run that was stopped goes on from its last epoch.
        extra: More training segments, for instance pseudo-labelled ones, with a ``weight`` each. Those on problems of
            validation or test are left out.
        validation: Segments that decide when to stop; by default a share of the problems of ``data``.
        test: Segments for the final figures; by default a share of the problems of ``data``.
        texts: Plain thinking to make the base model from, where ``base`` is a :class:`WarmUp`.
        **settings: See :class:`TrainingSettings`.

    Raises:
        SettingsError: A setting is unknown or out of range.
        DatasetError: The segments cannot be read or split.
        BoundaryError: The base model cannot be loaded, or ``accelerate`` is missing.
    """
    chosen = TrainingSettings.check(**settings)
    begun, folder = time.monotonic(), Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    parts = _split(data, extra, validation, test, chosen)
    base = _base(chosen, texts, folder)
    network, tokenizer = _load_base(base, chosen)
    vocabulary = Vocabulary(tokenizer, base)
    pieces = {name: [p for s in part for p in cut(s, vocabulary, chosen.window)] for name, part in parts.items()}
    history = _fit(network, vocabulary, [*pieces["train"], *pieces["extra"]], pieces["validation"], chosen, folder)
    if chosen.tune_bias:
        _tune_bias(network, vocabulary, pieces["validation"], chosen)
    _save(network, tokenizer, chosen, folder)
    predictor = BoundaryPredictor.from_pretrained(str(folder))
    figures = {name: evaluate(predictor, parts[name]) for name in ("validation", "test") if parts[name]}
    predictor.close()
    figures = {name: found.model_copy(update={"model": folder.name}) for name, found in figures.items()}
    described = chosen.model_dump(mode="json")
    if isinstance(chosen.base, str) and Path(chosen.base).is_dir():
        described["base"] = Path(chosen.base).name  # where it lies on this machine is nobody's business
    report = {
        "settings": described,
        "segments": {name: len(part) for name, part in parts.items()},
        "problems": {name: len({segment.problem for segment in part}) for name, part in parts.items()},
        "parameters": network.num_parameters(),
        "epochs": history,
        "seconds": round(time.monotonic() - begun),
        "versions": {package: version(package) for package in ("torch", "transformers", "tokenizers")},
        **{name: found.model_dump(mode="json") for name, found in figures.items()},
    }
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    render_card(folder).save(folder / "README.md")
    return Trained(folder, figures.get("test") or figures["validation"])


def read_recipe(path: Path) -> dict[str, Any]:
    """Read training settings from a YAML file, with ``data``, ``extra`` and ``texts`` beside them.

    Raises:
        SettingsError: The file cannot be read, or is not a mapping.
    """
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingsError(f"The recipe {str(path)!r} cannot be read: {error}. A YAML file is expected.") from error
    if not isinstance(given, dict):
        raise SettingsError(f"The recipe {str(path)!r} holds {given!r}. Training settings by name are expected.")
    return given


# --- data


def _split(
    data: Rows, extra: Rows | None, validation: Rows | None, test: Rows | None, settings: TrainingSettings
) -> dict[str, list[Segment]]:
    train = read_segments(data)
    kept = [] if test is None else read_segments(test)
    if test is None and settings.test_share:
        train, kept = split_by_problem(train, settings.test_share, settings.seed)
    if validation is None:
        train, stopping = split_by_problem(train, settings.validation_share, settings.seed + 1)
    else:
        stopping = read_segments(validation)
    held_out = {segment.problem for segment in (*kept, *stopping)} - {""}
    more = [] if extra is None else [s for s in read_segments(extra) if s.problem not in held_out]
    return {"train": train, "extra": more, "validation": stopping, "test": kept}


def cut(segment: Segment, vocabulary: Vocabulary, window: int) -> list[Segment]:
    """Cut a segment into pieces of whole words with at most ``window`` tokens each, or one word where it has more."""
    pieces: list[Segment] = []
    start = 0
    while True:
        rest = segment.part(start) if start else segment
        offsets, ends = vocabulary.encode(rest.text).offsets, [end for _, end in words(rest.text)]
        if len(offsets) <= window or len(ends) <= 1:
            return [*pieces, rest] if ends else pieces
        last = offsets[window][0]  # a character may have several tokens
        end = max((end for end in ends if end <= last), default=ends[0])
        pieces.append(rest.part(0, end))
        start += end


def _aligned(segments: Sequence[Segment], copies: int, seed: int) -> list[Segment]:
    """Return pieces of the segments that begin at span starts."""
    drawn = []
    for segment in segments:
        starts = span_starts(segment)
        random = Random(f"{seed} {segment.key} {segment.text}")
        drawn += [segment.part(start) for start in random.sample(starts, min(copies, len(starts)))]
    return drawn


class Example(NamedTuple):
    """One segment as the network sees it.

    Attributes:
        ids: Token ids.
        labels: One for each id: 1 for style, 0 for capability, :data:`IGNORED`.
        weight: How much it counts.
    """

    ids: list[int]
    labels: list[int]
    weight: float


def encode(segment: Segment, vocabulary: Vocabulary, label_shift: int) -> Example:
    """Turn a segment's character spans into token labels of one convention."""
    encoding = vocabulary.encode(segment.text)
    kinds = [IGNORED if kind == UNKNOWN else int(kind) for kind in token_kinds(segment, encoding.offsets)]
    labels = kinds[label_shift:] + [IGNORED] * min(label_shift, len(kinds))
    return Example(encoding.ids, labels, segment.weight)


def _collate(examples: Sequence[Example], style_weight: float) -> dict[str, Any]:
    """Pad examples to one batch; each token comes with its weight in the loss, 0 where nothing is learnt."""
    import torch

    longest = max(len(example.ids) for example in examples)
    ids, labels = np.zeros((len(examples), longest), dtype=np.int64), np.full((len(examples), longest), IGNORED)
    weights, mask = np.zeros((len(examples), longest), dtype=np.float32), np.zeros((len(examples), longest), np.int64)
    for row, example in enumerate(examples):
        length = len(example.ids)
        ids[row, :length], labels[row, :length], mask[row, :length] = example.ids, example.labels, 1
        weights[row] = example.weight * np.select([labels[row] == 1, labels[row] == 0], [style_weight, 1.0], 0.0)
    arrays = {"input_ids": ids, "attention_mask": mask, "labels": labels, "token_weights": weights}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def _style_weight(examples: Sequence[Example], asked: float | Literal["balanced"]) -> float:
    if asked != "balanced":
        return asked
    labels = np.concatenate([example.labels for example in examples])
    return float((labels == 0).sum() / max(1, (labels == 1).sum()))


# --- model


def _base(settings: TrainingSettings, texts: Iterable[str] | None, folder: Path) -> str:
    if isinstance(settings.base, str):
        return settings.base
    if texts is None:
        raise SettingsError(
            "The base model is to be made first, but there are no texts to make it from. Pass texts=[...] with plain "
            "thinking, or base='Qwen/Qwen3-0.6B-Base' or another model."
        )
    return str(warm_up(texts, folder / "base", settings.base))


def _load_base(base: str, settings: TrainingSettings) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    import torch
    from transformers import AutoConfig, AutoModelForTokenClassification, AutoTokenizer, set_seed

    set_seed(settings.seed)
    stated = {"label_shift": settings.label_shift, "window": settings.window, "author": settings.author}
    labels = {"num_labels": 2, "id2label": LABELS, "label2id": {name: i for i, name in LABELS.items()}}
    try:
        config = AutoConfig.from_pretrained(base, revision=settings.base_revision, **labels)
        tokenizer = AutoTokenizer.from_pretrained(base, revision=settings.base_revision)
        for name, value in {**settings.model_options, **stated}.items():
            setattr(config, name, value)
        network = AutoModelForTokenClassification.from_pretrained(
            base, revision=settings.base_revision, config=config, dtype=torch.float32, use_safetensors=True
        )
    except (OSError, ValueError) as error:
        raise BoundaryError(
            f"The base model {base!r} could not be loaded: {error} A Hub id or folder of a model with safetensors and "
            "a tokenizer is expected, for instance base='Qwen/Qwen3-0.6B-Base'."
        ) from error
    return network, tokenizer


def _fit(
    network: PreTrainedModel,
    vocabulary: Vocabulary,
    train: Sequence[Segment],
    validation: Sequence[Segment],
    settings: TrainingSettings,
    folder: Path,
) -> list[dict[str, Any]]:
    """Train until the validation segments get no better; leave the best weights in the network.

    Returns:
        What was measured after each epoch.
    """
    import torch

    try:
        import accelerate  # noqa: F401
        from transformers import EarlyStoppingCallback, PrinterCallback, Trainer, TrainingArguments
        from transformers.trainer_utils import get_last_checkpoint
    except ImportError as error:
        raise BoundaryError('Training needs accelerate. Run: pip install "tessy-hf[train]"') from error

    class WeightedTrainer(Trainer):  # type: ignore[misc]
        """Each token's loss counts with its own weight."""

        def compute_loss(
            self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **_: Any
        ) -> tuple[Any, Any] | Any:
            outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
            labels, weights = inputs["labels"], inputs["token_weights"]
            losses = torch.nn.functional.cross_entropy(
                outputs.logits.float().transpose(1, 2), labels, ignore_index=IGNORED, reduction="none"
            )
            loss = (losses * weights).sum() / weights.sum().clamp(min=1e-6)
            return (loss, outputs) if return_outputs else loss

    aligned = _aligned(train, settings.aligned_copies, settings.seed)
    examples = [encode(segment, vocabulary, settings.label_shift) for segment in (*train, *aligned)]
    judged = [encode(segment, vocabulary, settings.label_shift) for segment in validation]
    style_weight = _style_weight(examples, settings.style_weight)
    steps = -(-len(examples) // settings.batch_size) * settings.epochs
    checkpoints = folder / "checkpoints" / _fingerprint(settings, examples)
    cuda = torch.cuda.is_available()
    trainer = WeightedTrainer(
        model=network,
        args=TrainingArguments(
            output_dir=str(checkpoints),
            num_train_epochs=settings.epochs,
            per_device_train_batch_size=settings.batch_size,
            per_device_eval_batch_size=settings.batch_size,
            learning_rate=settings.learning_rate,
            weight_decay=settings.weight_decay,
            lr_scheduler_type="cosine",
            warmup_steps=int(steps / 10),
            eval_strategy="epoch",
            save_strategy="epoch",
            save_total_limit=2,
            load_best_model_at_end=True,
            metric_for_best_model="char_f1",
            greater_is_better=True,
            logging_strategy="epoch",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            label_names=["labels"],
            bf16=cuda and torch.cuda.is_bf16_supported(),
            dataloader_pin_memory=cuda,
            seed=settings.seed,
        ),
        data_collator=lambda batch: _collate(batch, style_weight),
        train_dataset=examples,
        eval_dataset=judged,
        compute_metrics=lambda predicted: _measure(predicted.predictions, judged, validation, vocabulary, settings),
        callbacks=[EarlyStoppingCallback(settings.patience)],
    )
    trainer.remove_callback(PrinterCallback)  # prints to stdout
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None)
    shutil.rmtree(folder / "checkpoints")
    kept = ("epoch", "eval_loss", "eval_char_f1", "eval_span_f1", "eval_boundary_within_1_word")
    return [{name: step[name] for name in kept} for step in trainer.state.log_history if "eval_char_f1" in step]


def _fingerprint(settings: TrainingSettings, examples: Sequence[Example]) -> str:
    """Return a hash of what decides the weights, so that only the same training is taken up again."""
    digest = hashlib.sha256(settings.model_dump_json().encode())
    for example in examples:
        digest.update(repr(example).encode())
    return digest.hexdigest()[:12]


def _readings(
    logits: Any, examples: Sequence[Example], segments: Sequence[Segment], vocabulary: Vocabulary, label_shift: int
) -> list[Reading]:
    """Turn padded logits of shape ``(segments, tokens, 2)`` into readings."""
    ahead = [UNJUDGED] * label_shift
    readings = []
    for row, example, segment in zip(logits, examples, segments, strict=True):
        scores = np.asarray(row, dtype=np.float64)[: len(example.ids) - label_shift]
        style = 1 / (1 + np.exp(scores[:, 0] - scores[:, 1]))
        readings.append(Reading(vocabulary.encode(segment.text).offsets, np.concatenate((ahead, style))))
    return readings


def _measure(
    logits: Any,
    examples: Sequence[Example],
    segments: Sequence[Segment],
    vocabulary: Vocabulary,
    settings: TrainingSettings,
) -> dict[str, float]:
    found = evaluate_readings(_readings(logits, examples, segments, vocabulary, settings.label_shift), segments)
    figures = {name: getattr(found, name) for name in ("char_f1", "span_f1", "boundary_within_1_word")}
    log.info("validation: %s", figures)
    return figures


def _tune_bias(
    network: PreTrainedModel, vocabulary: Vocabulary, validation: Sequence[Segment], settings: TrainingSettings
) -> None:
    """Move the classifier's bias to where the character F1 of the validation segments is highest."""
    import torch

    heads = [layer for layer in network.modules() if isinstance(layer, torch.nn.Linear) and layer.out_features == 2]
    if not heads or heads[-1].bias is None:
        log.warning("The classifier of %s has no bias to tune.", type(network).__name__)
        return
    examples = [encode(segment, vocabulary, settings.label_shift) for segment in validation]
    network.eval()
    logits = []
    for begin in range(0, len(examples), settings.batch_size):
        batch = _collate(examples[begin : begin + settings.batch_size], 1.0)
        with torch.inference_mode():
            inputs = {name: batch[name].to(network.device) for name in ("input_ids", "attention_mask")}
            logits += list(network(**inputs).logits.float().cpu().numpy())
    readings = _readings(logits, examples, validation, vocabulary, settings.label_shift)
    bias = best_bias(readings, validation)
    with torch.no_grad():
        heads[-1].bias.add_(torch.tensor([-bias / 2, bias / 2], device=network.device))


def best_bias(readings: Sequence[Reading], segments: Sequence[Segment]) -> float:
    """Return what to add to the log-odds of style for the highest character F1, whitespace left out.

    F1 is smoothed over neighbouring values first, so that the choice hangs less on single tokens.
    """
    odds, written, marked = [], [], []  # type: tuple[list[Any], list[Any], list[Any]]
    for reading, segment in zip(readings, segments, strict=True):
        starts, ends = np.array(reading.offsets).T
        judged = ~np.isnan(reading.style)
        share = np.clip(reading.style[judged], 1e-9, 1 - 1e-9)
        odds.append(np.log(share / (1 - share)))
        for counts, mask in ((written, segment.written()), (marked, segment.written() & segment.style())):
            before = np.concatenate(([0], np.cumsum(mask)))
            counts.append((before[ends] - before[starts])[judged])
    score, size, right = map(np.concatenate, (odds, written, marked))
    gains = np.linspace(-3, 3, 61)
    found = [2 * right[score > -g].sum() / max(1, size[score > -g].sum() + right.sum()) for g in gains]
    smooth = np.convolve(np.pad(found, 2, mode="edge"), np.ones(5) / 5, mode="valid")
    return float(gains[int(np.argmax(smooth))])


def _save(
    network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: TrainingSettings, folder: Path
) -> None:
    import torch

    network.cpu().to(getattr(torch, settings.save_dtype))
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
