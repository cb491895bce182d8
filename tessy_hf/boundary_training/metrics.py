"""Evaluate a boundary predictor: a predictor and marked segments go in, an :class:`Evaluation` comes out.

Measured is what the method acts on: labels of tokens, the characters they cover, words, and the first boundary.
Accuracy alone says little, because about 85% of the characters are capability.

Definitions, independent of the predictor's tokenizer unless they name tokens:

* Tokens of whitespace alone are not judged. Characters are all characters of the segment as they are marked; a
  predicted span reaches from the first to the last letter of a run of style, including the whitespace inside. The gap
  between two marked spans that touch is not marked, an error that no predictor of tokens can avoid; the character F1
  without whitespace is free of it.
* A word is style if it overlaps a marked span. It is *predicted* to be style if the token with its first letter is, as
  the method judges words.
* A span is a longest run of words of one kind. A predicted style span is correct if it begins and ends at the same
  words as a marked one.
* The first boundary is the first word of the other kind than the segment begins with, which is what an author's
  predictor has to find. Without such a word it lies after the last word.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby, takewhile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from tessy_hf.boundary.predictor import BoundaryPredictor, LabelShift
from tessy_hf.boundary_training import weaknesses
from tessy_hf.boundary_training.readings import Probabilities, Reading, is_causal, read
from tessy_hf.boundary_training.segments import UNKNOWN, Mask, Segment, token_kinds, word_kinds
from tessy_hf.errors import BoundaryError

BINS = 10
FURTHEST = 10
"""Larger boundary errors, in words, are counted as this."""


class Score(BaseModel):
    """Precision, recall and F1; 0 where undefined."""

    precision: float
    recall: float
    f1: float

    @classmethod
    def of(cls, right: float, predicted: float, marked: float) -> Score:
        """Compute a score from the numbers of correct, predicted and marked items."""
        return cls(
            precision=_share(right, predicted), recall=_share(right, marked), f1=_share(2 * right, predicted + marked)
        )


class BoundaryErrors(BaseModel):
    """Distance of the predicted first boundary from the marked one."""

    exact: float
    """Share of segments with an exact boundary."""
    within_1: float
    within_3: float
    distribution: dict[int, int]
    """Segments by error; negative is too early. Errors beyond 10 count as 10."""


class Bin(BaseModel):
    """Tokens whose probability of style lies in one tenth of [0, 1]."""

    tokens: int
    mean_probability: float
    style: float
    """Share of these tokens that is marked as style."""


class Figures(BaseModel):
    """All figures of a set of segments."""

    segments: int
    tokens: int
    style_share: float
    """Share of the characters that is marked as style."""
    token_accuracy: float
    token_style: Score
    char: Score
    char_f1_without_whitespace: float
    char_f1_interval: tuple[float, float]
    """95% bootstrap interval of the character F1, resampling problems."""
    span: Score
    boundary_words: BoundaryErrors
    boundary_tokens: BoundaryErrors
    calibration: list[Bin]
    calibration_error: float
    """Expected calibration error over ten bins, weighted by tokens."""


class Evaluation(BaseModel):
    """The result of :func:`evaluate`, headline figures first."""

    model_config = ConfigDict(frozen=True)

    char_f1: float
    char_f1_by_family: dict[str, float]
    char_f1_without_whitespace: float
    span_f1: float
    boundary_within_1_word: float
    char_f1_by_domain: dict[str, float] = {}
    model: str = ""
    revision: str | None = None
    label_shift: LabelShift = 0
    lookahead: int = 0
    window: int = 0
    causal: bool = True
    """Whether a label depends only on the text before it. If not, these figures hold for finished text; while a row is
    written the predictor sees less."""
    overall: Figures
    by_family: dict[str, Figures]
    by_source_model: dict[str, Figures]
    by_domain: dict[str, Figures] = {}
    by_kind: dict[str, Score] = {}
    """Characters of style by the kind of phrase: recall of the marked spans, precision of the predicted ones."""
    by_author: dict[str, Figures]
    """``student``: segments that begin with style, as the student's turns do; ``teacher``: those with capability."""


class _Counts(NamedTuple):
    """One segment's counts, which all figures are summed from."""

    segment: Segment
    begins_with_style: bool
    length: int
    """Characters that are judged."""
    scores: dict[str, tuple[int, int, int]]
    """Correct, predicted and marked style, by what is counted."""
    predicted: Mask
    """Characters that are read as style."""
    errors: dict[str, int]
    """Distance of the first boundary from the marked one, by what is counted."""
    kinds: NDArray[np.int8]
    style: Probabilities
    """The marked kind of each token that is judged, and its probability of style."""


def evaluate(predictor: BoundaryPredictor, segments: Sequence[Segment]) -> Evaluation:
    """Evaluate a predictor.

    Args:
        predictor: The predictor, which is loaded on first use.
        segments: At least one segment.

    Raises:
        BoundaryError: The predictor cannot be loaded or read.
    """
    readings = read(predictor, [segment.text for segment in segments])
    return evaluate_readings(
        readings,
        segments,
        model=predictor.model,
        revision=predictor.revision,
        label_shift=predictor.label_shift,
        lookahead=predictor.lookahead,
        window=predictor.window,
        causal=is_causal(predictor, segments[0].text),
    )


def evaluate_readings(readings: Sequence[Reading], segments: Sequence[Segment], **predictor: Any) -> Evaluation:
    """Evaluate readings, whatever predictor they come from; ``predictor`` says what is known about it."""
    counts = [_count(reading, segment) for reading, segment in zip(readings, segments, strict=True)]
    overall = _figures(counts)
    by_family = _by(counts, lambda count: count.segment.family)
    by_domain = _by(counts, lambda count: count.segment.domain)
    return Evaluation(
        char_f1=overall.char.f1,
        char_f1_by_family={family: figures.char.f1 for family, figures in by_family.items()},
        char_f1_without_whitespace=overall.char_f1_without_whitespace,
        span_f1=overall.span.f1,
        boundary_within_1_word=overall.boundary_words.within_1,
        char_f1_by_domain={domain: figures.char.f1 for domain, figures in by_domain.items()},
        by_domain=by_domain,
        by_kind=_by_kind(counts),
        overall=overall,
        by_family=by_family,
        by_source_model=_by(counts, lambda count: count.segment.source_model),
        by_author=_by(counts, lambda count: "student" if count.begins_with_style else "teacher"),
        **predictor,
    )


# --- counting


def _count(reading: Reading, segment: Segment) -> _Counts:
    kinds, heard = token_kinds(segment, reading.offsets), ~np.isnan(reading.style)
    judged = (kinds != UNKNOWN) & heard
    said = judged & (np.nan_to_num(reading.style) > 0.5)
    predicted, written = np.zeros(len(segment.text), dtype=bool), segment.written()
    for (start, end), style in zip(reading.offsets, said, strict=True):
        predicted[start:end] |= style
    predicted, marked = _joined(predicted, written), segment.style()
    whole = predicted
    starts = (start for (start, _), one in zip(reading.offsets, heard, strict=True) if one)
    begin = min(starts, default=len(segment.text))  # characters before it are not judged
    predicted, marked, written = predicted[begin:], marked[begin:], written[begin:]
    marked_words = word_kinds(segment)
    own_kind = bool(marked_words) and marked_words[0]
    read_words = reading.words(segment.text, own_kind)
    tokens = np.flatnonzero(kinds != UNKNOWN)
    read_tokens = np.where(heard, said, own_kind)[tokens]
    return _Counts(
        segment=segment,
        begins_with_style=own_kind,
        length=len(marked),
        scores={
            "characters": _char_counts(predicted, marked),
            "letters": _char_counts(predicted & written, marked & written),
            "spans": _span_counts(read_words, marked_words),
        },
        predicted=whole,
        errors={
            "words": _first(read_words, own_kind) - _first(marked_words, own_kind),
            "tokens": _first(read_tokens, own_kind) - _first(kinds[tokens], own_kind),
        },
        kinds=kinds[judged],
        style=reading.style[judged],
    )


def _joined(predicted: Mask, written: Mask) -> Mask:
    """Return predicted characters, including whitespace between two of them but not around them."""
    joined = predicted & written
    letters = np.flatnonzero(written)
    for one, following in zip(letters, letters[1:], strict=False):
        if joined[one] and joined[following]:
            joined[one:following] = True
    return joined


def _char_counts(predicted: Mask, marked: Mask) -> tuple[int, int, int]:
    return int((predicted & marked).sum()), int(predicted.sum()), int(marked.sum())


def _first(kinds: Iterable[bool], own_kind: bool) -> int:
    """Return the number of items before the first one of the other kind."""
    return sum(1 for _ in takewhile(lambda kind: kind == own_kind, kinds))


def _span_counts(predicted: Sequence[bool], marked: Sequence[bool]) -> tuple[int, int, int]:
    found, true = _runs(predicted), _runs(marked)
    return len(found & true), len(found), len(true)


def _runs(kinds: Sequence[bool]) -> set[tuple[int, int]]:
    """Return the first and last index of each longest run of style."""
    runs = (list(group) for style, group in groupby(range(len(kinds)), lambda i: kinds[i]) if style)
    return {(run[0], run[-1]) for run in runs}


# --- summing up


def _by(counts: Sequence[_Counts], key: Callable[[_Counts], str]) -> dict[str, Figures]:
    groups = sorted({key(count) for count in counts} - {""})
    return {group: _figures([count for count in counts if key(count) == group]) for group in groups}


def _by_kind(counts: Sequence[_Counts]) -> dict[str, Score]:
    """Score each kind of phrase. Its marked and its predicted spans differ, so F1 is the mean of the two shares."""
    found = weaknesses.by_kind([count.segment for count in counts], [count.predicted for count in counts])
    shares = {kind: (_share(right, said), _share(hit, marked)) for kind, (hit, marked, right, said) in found.items()}
    return {kind: Score(precision=p, recall=r, f1=_share(2 * p * r, p + r)) for kind, (p, r) in shares.items()}


def _figures(counts: Sequence[_Counts]) -> Figures:
    kinds, style = np.concatenate([c.kinds for c in counts]), np.concatenate([c.style for c in counts])
    said = style > 0.5
    chars, letters, spans = (np.array([c.scores[of] for c in counts]) for of in ("characters", "letters", "spans"))
    bins = _calibration(kinds, style)
    return Figures(
        segments=len(counts),
        tokens=len(kinds),
        style_share=_share(chars[:, 2].sum(), sum(count.length for count in counts)),
        token_accuracy=_share((said == kinds).sum(), len(kinds)),
        token_style=Score.of((said & (kinds == 1)).sum(), said.sum(), (kinds == 1).sum()),
        char=Score.of(*chars.sum(axis=0)),
        char_f1_without_whitespace=Score.of(*letters.sum(axis=0)).f1,
        char_f1_interval=_interval(chars, [count.segment.problem or count.segment.key for count in counts]),
        span=Score.of(*spans.sum(axis=0)),
        boundary_words=_boundary([count.errors["words"] for count in counts]),
        boundary_tokens=_boundary([count.errors["tokens"] for count in counts]),
        calibration=bins,
        calibration_error=_share(sum(b.tokens * abs(b.mean_probability - b.style) for b in bins), len(kinds)),
    )


def _boundary(errors: Sequence[int]) -> BoundaryErrors:
    exact, within_1, within_3 = (float((np.abs(errors) <= most).mean()) for most in (0, 1, 3))
    counted = Counter(np.clip(errors, -FURTHEST, FURTHEST).tolist())
    return BoundaryErrors(
        exact=exact, within_1=within_1, within_3=within_3, distribution=dict(sorted(counted.items()))
    )


def _calibration(kinds: NDArray[np.int8], style: Probabilities) -> list[Bin]:
    tenth = np.minimum((style * BINS).astype(int), BINS - 1)
    return [
        Bin(tokens=inside.sum(), mean_probability=style[inside].mean(), style=kinds[inside].mean())
        for inside in (tenth == i for i in range(BINS))
        if inside.any()
    ]


def _interval(chars: NDArray[Any], problems: Sequence[str], draws: int = 1000) -> tuple[float, float]:
    """Return the 95% bootstrap interval of the character F1, resampling problems."""
    _, group = np.unique(np.array(problems), return_inverse=True)
    totals = np.zeros((group.max() + 1, 3))
    np.add.at(totals, group, chars)
    drawn = np.random.default_rng(0).integers(0, len(totals), (draws, len(totals)))
    right, predicted, marked = totals[drawn].sum(axis=1).T
    f1 = 2 * right / np.maximum(1, predicted + marked)
    low, high = np.quantile(f1, (0.025, 0.975))
    return float(low), float(high)


def _share(part: float, whole: float) -> float:
    return float(part) / float(whole) if whole else 0.0


# --- showing


def write_worst(predictor: BoundaryPredictor, segments: Sequence[Segment], path: Path) -> None:
    """Write the worst segments as an HTML page, for local use: it quotes them."""
    readings = read(predictor, [segment.text for segment in segments])
    predicted = [_count(*one).predicted for one in zip(readings, segments, strict=True)]
    path.write_text(weaknesses.worst_page(segments, predicted), encoding="utf-8")


def plot(evaluation: Evaluation, path: Path) -> None:
    """Draw calibration and boundary errors to an image file.

    Raises:
        BoundaryError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise BoundaryError('Plots need matplotlib. Run: pip install "tessy-hf[report]"') from error
    figures = evaluation.overall
    figure = Figure(figsize=(9, 4), layout="constrained")
    reliability, errors = figure.subplots(1, 2)
    reliability.plot([0, 1], [0, 1], color="0.7", linewidth=1)
    reliability.plot([b.mean_probability for b in figures.calibration], [b.style for b in figures.calibration], "o-")
    reliability.set(
        xlabel="predicted probability of style",
        ylabel="share marked as style",
        title=f"Calibration (error {figures.calibration_error:.3f})",
    )
    distribution = figures.boundary_words.distribution
    errors.bar(list(distribution), list(distribution.values()))
    errors.set(
        xlabel="words too late (below 0: too early)",
        ylabel="segments",
        title=f"First boundary ({figures.boundary_words.within_1:.0%} within 1 word)",
    )
    figure.savefig(path, dpi=120)
