"""Fit a token classifier to marked segments: a base model goes in, trained weights come out.

Training is ``transformers.Trainer``'s, with a weight for each token. Knows nothing of files but its checkpoints.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tessy_hf.boundary_training.examples import IGNORED, Example, aligned_copies, collate, encode, weight_of_style
from tessy_hf.boundary_training.metrics import evaluate_readings
from tessy_hf.boundary_training.readings import Reading, attribute
from tessy_hf.boundary_training.segments import Segment
from tessy_hf.boundary_training.settings import TrainingSettings
from tessy_hf.errors import BoundaryError
from tessy_hf.text.vocabulary import Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

LABELS = {0: "capability", 1: "style"}

CHECKPOINTS = "boundary-checkpoints"
"""A folder of our own within the output, for it is deleted: `checkpoints` may be another training's."""


def load_base(settings: TrainingSettings) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a base model with a new head for two labels, and its tokenizer.

    Raises:
        BoundaryError: It cannot be loaded.
    """
    import torch
    from transformers import AutoConfig, AutoModelForTokenClassification, AutoTokenizer, set_seed

    set_seed(settings.seed)
    base, revision = settings.base, settings.base_revision
    stated = settings.model_dump(include={"label_shift", "lookahead", "window", "author"})
    labels = {"num_labels": 2, "id2label": LABELS, "label2id": {name: i for i, name in LABELS.items()}}
    try:
        config = AutoConfig.from_pretrained(base, revision=revision, **labels)
        tokenizer = AutoTokenizer.from_pretrained(base, revision=revision)
        if settings.lookahead:
            config.eos_token_id = tokenizer.eos_token_id
        for name, value in {**settings.model_options, **stated}.items():
            setattr(config, name, value)
        network = AutoModelForTokenClassification.from_pretrained(
            base, revision=revision, config=config, dtype=torch.float32, use_safetensors=True
        )
    except (OSError, ValueError) as error:
        raise BoundaryError(
            f"The base model {base!r} could not be loaded: {error} Expected is a Hub id or folder with a model in "
            "safetensors and a tokenizer, for instance base='Qwen/Qwen3-0.6B-Base'."
        ) from error
    return network, tokenizer


class _Validation(NamedTuple):
    """The segments that decide when training stops, and how they are read."""

    segments: Sequence[Segment]
    examples: Sequence[Example]
    vocabulary: Vocabulary
    label_shift: int
    lookahead: int

    def readings(self, logits: Any) -> list[Reading]:
        """Turn padded logits of shape (segments, tokens, 2) into readings."""
        readings = []
        for row, example, segment in zip(logits, self.examples, self.segments, strict=True):
            scores = np.asarray(row, dtype=np.float64)[: len(example.ids)]
            style = 1 / (1 + np.exp(scores[:, 0] - scores[:, 1]))
            encoding = self.vocabulary.encode(segment.text)
            readings.append(attribute(segment.text, encoding, style, self.label_shift, self.lookahead))
        return readings

    def measure(self, predicted: Any) -> dict[str, float]:
        """Return the figures that are shown, and that the best epoch is chosen by."""
        found = evaluate_readings(self.readings(predicted.predictions), self.segments)
        figures = {name: getattr(found, name) for name in ("char_f1", "span_f1", "boundary_within_1_word")}
        log.info("validation: %s", figures)
        return figures


def fit(
    network: PreTrainedModel,
    vocabulary: Vocabulary,
    train: Sequence[Segment],
    validation: Sequence[Segment],
    settings: TrainingSettings,
    folder: Path,
) -> list[dict[str, Any]]:
    """Train until the validation segments stop improving; the network ends with the weights of the best epoch.

    With ``tune_bias`` the classifier's bias is then set to the value with the highest character F1 on these segments.

    Returns:
        The validation figures after each epoch.
    """
    import torch

    try:
        import accelerate  # noqa: F401
        from transformers import EarlyStoppingCallback, PrinterCallback, Trainer
        from transformers.trainer_utils import get_last_checkpoint
    except ImportError as error:
        raise BoundaryError('Training needs accelerate. Run: pip install "tessy-hf[train]"') from error

    class WeightedTrainer(Trainer):  # type: ignore[misc]
        """Weights the loss of each token."""

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

    aligned = aligned_copies(train, settings.aligned_copies, settings.seed)
    convention = settings.label_shift, settings.lookahead
    end_id = network.config.eos_token_id if settings.lookahead else 0
    examples = [encode(segment, vocabulary, *convention, end_id) for segment in (*train, *aligned)]
    judged = [encode(segment, vocabulary, *convention, end_id) for segment in validation]
    held_out = _Validation(validation, judged, vocabulary, *convention)
    style_weight = weight_of_style(examples, settings.style_weight)
    checkpoints = folder / CHECKPOINTS / _fingerprint(settings, examples)
    trainer = WeightedTrainer(
        model=network,
        args=_arguments(settings, len(examples), checkpoints),
        data_collator=lambda batch: collate(batch, style_weight),
        train_dataset=examples,
        eval_dataset=judged,
        compute_metrics=held_out.measure,
        callbacks=[EarlyStoppingCallback(settings.patience)],
    )
    trainer.remove_callback(PrinterCallback)  # prints to stdout
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None)
    shutil.rmtree(folder / CHECKPOINTS)
    if settings.tune_bias:
        _tune_bias(network, held_out.readings(trainer.predict(judged).predictions), validation)
    kept = ("epoch", "eval_loss", "eval_char_f1", "eval_span_f1", "eval_boundary_within_1_word")
    return [{name: step[name] for name in kept} for step in trainer.state.log_history if "eval_char_f1" in step]


def _arguments(settings: TrainingSettings, examples: int, checkpoints: Path) -> Any:
    """Return the ``TrainingArguments`` of a run over so many examples."""
    import torch
    from transformers import TrainingArguments

    steps = -(-examples // settings.batch_size) * settings.epochs
    cuda = torch.cuda.is_available()
    return TrainingArguments(
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
    )


def _fingerprint(settings: TrainingSettings, examples: Sequence[Example]) -> str:
    """Return a hash of everything that decides the weights, so that only the same training is resumed."""
    digest = hashlib.sha256(settings.model_dump_json().encode())
    for example in examples:
        digest.update(repr(example).encode())
    return digest.hexdigest()[:12]


def _tune_bias(network: PreTrainedModel, readings: Sequence[Reading], validation: Sequence[Segment]) -> None:
    import torch

    heads = [layer for layer in network.modules() if isinstance(layer, torch.nn.Linear) and layer.out_features == 2]
    if not heads or heads[-1].bias is None:
        log.warning("The classifier of %s has no bias to tune.", type(network).__name__)
        return
    bias = best_bias(readings, validation)
    with torch.no_grad():
        heads[-1].bias.add_(torch.tensor([-bias / 2, bias / 2], device=network.device))


def best_bias(readings: Sequence[Reading], segments: Sequence[Segment]) -> float:
    """Return the offset to the log-odds of style that gives the highest character F1, whitespace left out.

    F1 is smoothed over neighboring offsets first, so that the choice depends less on single tokens.
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


def save(
    network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: TrainingSettings, folder: Path
) -> None:
    """Write weights, config and tokenizer."""
    import torch

    network.cpu().to(getattr(torch, settings.save_dtype))
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
