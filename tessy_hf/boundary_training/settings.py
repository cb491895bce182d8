"""Settings of annotation and of training: keyword arguments or YAML values go in, checked settings come out."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from tessy_hf.boundary.predictor import LabelShift
from tessy_hf.settings import Checked

FEWEST_WORDS = 10
"""The shortest segment, in words; shorter traces are skipped."""


class AnnotationSettings(Checked):
    """How segments are drawn from traces, and how the annotator is asked."""

    words: int = Field(default=60, ge=FEWEST_WORDS)
    """Words in a segment."""
    per_trace: int = Field(default=1, ge=1)
    """The most segments of one trace."""
    aligned_share: float = Field(default=0.5, ge=0, le=1)
    """Share of the segments that begin at a span start. For these the annotator is shown half a segment more, and the
    segment is cut to begin at one of the spans that it marks."""
    seed: int = 0
    """Seed of the draw and of sampling."""
    limit: int | None = Field(default=None, ge=1)
    """The most segments altogether. A rerun may change it."""
    votes: int = Field(default=1, ge=1)
    """How often each segment is marked; with several votes, what most of them mark counts."""
    temperature: float | None = Field(default=None, ge=0)
    """The annotator's sampling temperature; by default 0, and 0.7 where there are several votes."""
    max_thinking_tokens: int = Field(default=4096, ge=1)
    """Thinking budget of an annotator that thinks."""
    max_answer_tokens: int = Field(default=1024, ge=1)
    """Budget of its answer."""
    prompt: str = "rules"
    """The instruction: ``rules`` (the paper's task with rules for the hard cases), ``paper`` (the task alone), or a
    Jinja file in which ``text`` is the segment."""
    rows_in_flight: int = Field(default=64, ge=1)
    """Segments asked about at the same time. A rerun may change it."""

    @property
    def sampled_at(self) -> float:
        """The temperature that is asked for."""
        return self.temperature if self.temperature is not None else 0.7 if self.votes > 1 else 0.0


class TrainingSettings(Checked):
    """How a predictor is trained. The defaults suit a base model of the paper's size on a GPU."""

    base: str = "Qwen/Qwen3-0.6B-Base"
    """The model to start from: a Hub id or folder. ``recipes/boundary/small/base.py`` trains a small one."""
    base_revision: str | None = None
    """Branch, tag or commit of the base model."""
    model_options: dict[str, Any] = Field(default_factory=dict)
    """Entries of the base model's config to change, for instance ``{"classifier_dropout": 0.2}``."""
    label_shift: LabelShift = 0
    """0: a token's label is about that token (the paper's text). 1: about the next one (the released checkpoints)."""
    lookahead: int = Field(default=0, ge=0)
    """Words beyond a word to read before it is judged: better boundaries, at the cost of generating so many words more
    at each hand-over. Not with ``label_shift=1``."""
    window: int = Field(default=200, ge=2)
    """The most tokens of thinking to read. Longer segments are cut into pieces for training."""
    author: Literal["teacher", "student", "any"] = "any"
    """Whose text the predictor is for; stated in the model's config for people to read."""
    epochs: float = Field(default=3.0, gt=0)
    """The most passes over the training segments."""
    batch_size: int = Field(default=32, ge=1)
    """Segments per step."""
    learning_rate: float = Field(default=2e-5, gt=0)
    """Peak learning rate: linear warm-up over the first tenth of the steps, then cosine decay."""
    weight_decay: float = Field(default=0.01, ge=0)
    """AdamW's weight decay."""
    style_weight: float | Literal["balanced"] = 1.0
    """Weight of a style token in the loss relative to a capability token; ``balanced`` gives both kinds the same total
    weight."""
    tune_bias: bool = True
    """Whether the classifier's bias is set, after training, to the value with the highest character F1 on the
    validation segments. It makes up for rare or weighted classes, and the model stays a stock one."""
    aligned_copies: int = Field(default=1, ge=0)
    """Copies of each training segment that begin at one of its span starts. A turn begins at such a place, and random
    cuts rarely do."""
    validation_share: float = Field(default=0.1, gt=0, lt=1)
    """Share of the problems used for early stopping."""
    test_share: float = Field(default=0.1, ge=0, lt=1)
    """Share of the problems for the final figures only; with 0 those of the validation segments are reported."""
    patience: int = Field(default=2, ge=1)
    """Epochs without a better character F1 before training stops. The best epoch is kept."""
    seed: int = 0
    """Seed of the split, the order, the aligned copies and new weights."""
    save_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the saved weights."""
