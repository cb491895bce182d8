"""Measure a boundary predictor on segments whose style spans are marked.

A predictor and segments go in, an :class:`Evaluation` comes out. What is measured is what the method acts on: the
label of a token, the characters it covers, the words it turns into runs of one kind, and where the first such run
ends. Accuracy alone would say little, for about 85% of the characters are capability.

Definitions, all free of the predictor's vocabulary where they do not name tokens:

* Whitespace is nobody's, so no token of whitespace alone is judged. Characters are all that stand in the segment,
  exactly as marked; a predicted span reaches from the first to the last letter of a run of style, with the whitespace
  within it. What lies between two marked spans that touch is not marked, so it counts as an error that no predictor of
  tokens can avoid; beside the character F1 stands the one without whitespace, which is free of it.
* A word is style if it overlaps a marked span; it is *predicted* to be style if the token that holds its first letter
  is, for that is how the method judges it (:meth:`tessy_hf.method.alternation.Row.boundary`).
* A span is a longest run of words of one kind; a predicted style span is right if it begins and ends at the same words
  as a marked one.
* The first boundary is the first word that is not of the kind the segment begins with: what the predictor of the
  author whose kind that is has to find. Where there is none it lies after the last word.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from tessy_hf.boundary.predictor import BoundaryPredictor, LabelShift, window_start
from tessy_hf.boundary_training.segments import UNKNOWN, Mask, Segment, token_kinds, word_kinds
from tessy_hf.vocabulary import words

Probabilities = NDArray[np.float64]

BINS = 10
FURTHEST = 10
"""Boundary errors of more words than this are counted as this many."""

UNJUDGED = np.nan
"""The probability of a token that nothing is said about: the first one, for predictors that look ahead."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What a predictor says of a text.

    Attributes:
        offsets: ``(start, end)`` characters of each token.
        style: How probable it is that each token is style; :data:`UNJUDGED` where nothing is said.
    """

    offsets: list[tuple[int, int]]
    style: Probabilities

    def words(self, text: str, own_kind: bool) -> list[bool]:
        """Return whether each word is read as style; ``own_kind`` is what holds where nothing is said."""
        ends = np.array([end for _, end in self.offsets])
        kinds = []
        for start, end in words(text):
            letter = end - len(text[start:end].lstrip())
            share = self.style[min(int(np.searchsorted(ends, letter, side="right")), len(ends) - 1)]
            kinds.append(own_kind if np.isnan(share) else bool(share > 0.5))
        return kinds


class Score(BaseModel):
    """Precision, recall and their harmonic mean; 0 where there is nothing to divide by."""

    precision: float
    recall: float
    f1: float

    @classmethod
    def of(cls, right: float, predicted: float, marked: float) -> Score:
        """Make a score of how many were right, predicted and marked."""
        return cls(
            precision=_share(right, predicted), recall=_share(right, marked), f1=_share(2 * right, predicted + marked)
        )


class BoundaryErrors(BaseModel):
    """How far the predicted first boundary lies from the marked one."""

    exact: float
    """Share of segments in which it is right."""
    within_1: float
    within_3: float
    distribution: dict[int, int]
    """How many segments have which error, below 0 where it is too early; errors beyond 10 count as 10."""


class Bin(BaseModel):
    """Tokens whose probability of style lies in one tenth of the range."""

    tokens: int
    mean_probability: float
    style: float
    """Share of them that is marked as style."""


class Figures(BaseModel):
    """All figures of some segments."""

    segments: int
    tokens: int
    style_share: float
    """Share of the characters that is marked as style."""
    token_accuracy: float
    token_style: Score
    char: Score
    char_f1_without_whitespace: float
    char_f1_interval: tuple[float, float]
    """95% interval of the character F1, drawing problems again (bootstrap)."""
    span: Score
    boundary_words: BoundaryErrors
    boundary_tokens: BoundaryErrors
    calibration: list[Bin]
    calibration_error: float
    """Mean distance of probability and share over the tenths, weighted by tokens (expected calibration error)."""


class Evaluation(BaseModel):
    """What :func:`evaluate` found. The first figures are those most asked for."""

    model_config = ConfigDict(frozen=True)

    char_f1: float
    char_f1_by_family: dict[str, float]
    char_f1_without_whitespace: float
    span_f1: float
    boundary_within_1_word: float
    model: str
    revision: str | None
    label_shift: LabelShift
    window: int
    causal: bool
    """Whether a label depends on the text before it alone. If not, the figures here are what it says of finished
    text; while a row is written it sees less."""
    overall: Figures
    by_family: dict[str, Figures]
    by_source_model: dict[str, Figures]
    by_author: dict[str, Figures]
    """Segments that begin with style, as the student's text does, and with capability, as the teacher's does."""


@dataclass(frozen=True, slots=True)
class _Counts:
    """One segment's counts, from which all figures are summed up."""

    segment: Segment
    length: int
    chars: tuple[int, int, int]
    letters: tuple[int, int, int]
    spans: tuple[int, int, int]
    word_error: int
    token_error: int
    begins_with_style: bool
    kinds: NDArray[np.int8]
    style: Probabilities


def evaluate(predictor: BoundaryPredictor, segments: Sequence[Segment]) -> Evaluation:
    """Measure a predictor.

    Args:
        predictor: Loaded on first use, with its label convention known or stated.
        segments: At least one.

    Raises:
        BoundaryError: The predictor cannot be loaded or read.
    """
    readings = read(predictor, [segment.text for segment in segments])
    evaluation = evaluate_readings(readings, segments)
    return evaluation.model_copy(
        update={
            "model": predictor.model,
            "revision": predictor.revision,
            "label_shift": predictor.label_shift,
            "window": predictor.window,
            "causal": is_causal(predictor, segments[0].text),
        }
    )


def evaluate_readings(readings: Sequence[Reading], segments: Sequence[Segment]) -> Evaluation:
    """Measure what was read, whatever read it."""
    counts = [_count(reading, segment) for reading, segment in zip(readings, segments, strict=True)]
    overall = _figures(counts)
    by_family = _by(counts, lambda count: count.segment.family)
    authors = {True: "student", False: "teacher"}
    return Evaluation(
        char_f1=overall.char.f1,
        char_f1_by_family={family: figures.char.f1 for family, figures in by_family.items()},
        char_f1_without_whitespace=overall.char_f1_without_whitespace,
        span_f1=overall.span.f1,
        boundary_within_1_word=overall.boundary_words.within_1,
        model="",
        revision=None,
        label_shift=0,
        window=0,
        causal=True,
        overall=overall,
        by_family=by_family,
        by_source_model=_by(counts, lambda count: count.segment.source_model),
        by_author=_by(counts, lambda count: authors[count.begins_with_style]),
    )


# --- reading


def read(predictor: BoundaryPredictor, texts: Sequence[str], batch_size: int = 32) -> list[Reading]:
    """Let a predictor read texts the way the method does: each token from the window that belongs to its position."""
    encodings = [predictor.vocabulary.encode(text) for text in texts]
    asked = [
        (text, start, positions[-1] + 1, positions)
        for text, encoding in enumerate(encodings)
        for start, group in groupby(range(len(encoding.ids)), lambda p: window_start(p, predictor.window))
        if (positions := list(group))
    ]
    asked.sort(key=lambda window: window[1] - window[2])  # longest first: batches of like length
    said = [np.full(len(encoding.ids), UNJUDGED) for encoding in encodings]
    for begin in range(0, len(asked), batch_size):
        batch = asked[begin : begin + batch_size]
        windows = [encodings[text].ids[start:stop] for text, start, stop, _ in batch]
        answers = predictor.probabilities(windows)
        for (text, start, _, positions), answer in zip(batch, answers, strict=True):
            said[text][positions] = [answer[p - start] for p in positions]
    ahead = predictor.label_shift
    return [
        Reading(encoding.offsets, np.concatenate(([UNJUDGED] * ahead, style[: len(style) - ahead])))
        for encoding, style in zip(encodings, said, strict=True)
    ]


def is_causal(predictor: BoundaryPredictor, text: str) -> bool:
    """Return whether what is said of the first half of a text stays the same when the second half is another."""
    ids = predictor.vocabulary.encode(text).ids[: predictor.window]
    half = (len(ids) + 1) // 2
    windows = ids, [*ids[:half], *ids[:half][: len(ids) - half]]
    said, of_another = (predictor.probabilities([window])[0][:half] for window in windows)
    return bool(np.allclose(said, of_another, rtol=0, atol=1e-5))


# --- counting


def _count(reading: Reading, segment: Segment) -> _Counts:
    kinds = token_kinds(segment, reading.offsets)
    judged = (kinds != UNKNOWN) & ~np.isnan(reading.style)
    said = judged & (np.nan_to_num(reading.style) > 0.5)
    predicted = np.zeros(len(segment.text), dtype=bool)
    for (start, end), style in zip(reading.offsets, said, strict=True):
        predicted[start:end] |= style
    heard = [start for (start, _), share in zip(reading.offsets, reading.style, strict=True) if not np.isnan(share)]
    begin = min(heard, default=len(segment.text))  # nothing is said of what stands before
    written = segment.written()
    predicted, marked, written = _joined(predicted, written)[begin:], segment.style()[begin:], written[begin:]
    marked_words = word_kinds(segment)
    own_kind = bool(marked_words) and marked_words[0]
    read_words = reading.words(segment.text, own_kind)
    tokens = np.flatnonzero(kinds != UNKNOWN)
    read_tokens = [own_kind if np.isnan(reading.style[t]) else bool(said[t]) for t in tokens]
    return _Counts(
        segment=segment,
        length=len(marked),
        chars=_char_counts(predicted, marked),
        letters=_char_counts(predicted & written, marked & written),
        spans=_span_counts(read_words, marked_words),
        word_error=_first(read_words, own_kind) - _first(marked_words, own_kind),
        token_error=_first(read_tokens, own_kind) - _first([bool(k) for k in kinds[tokens]], own_kind),
        begins_with_style=own_kind,
        kinds=kinds[judged],
        style=reading.style[judged],
    )


def _joined(predicted: Mask, written: Mask) -> Mask:
    """Return predicted characters, with the whitespace between two of them and without that around them."""
    joined = predicted & written
    letters = np.flatnonzero(written)
    for one, following in zip(letters, letters[1:], strict=False):
        if joined[one] and joined[following]:
            joined[one:following] = True
    return joined


def _char_counts(predicted: Mask, marked: Mask) -> tuple[int, int, int]:
    return int((predicted & marked).sum()), int(predicted.sum()), int(marked.sum())


def _first(kinds: Sequence[bool], own_kind: bool) -> int:
    """Return the index of the first that is not of the author's own kind, or how many there are."""
    return next((i for i, kind in enumerate(kinds) if kind != own_kind), len(kinds))


def _span_counts(predicted: Sequence[bool], marked: Sequence[bool]) -> tuple[int, int, int]:
    found, true = _runs(predicted), _runs(marked)
    return len(found & true), len(found), len(true)


def _runs(kinds: Sequence[bool]) -> set[tuple[int, int]]:
    """Return the first and last word of each longest run of style."""
    runs = (list(group) for style, group in groupby(range(len(kinds)), lambda i: kinds[i]) if style)
    return {(run[0], run[-1]) for run in runs}


# --- summing up


def _by(counts: Sequence[_Counts], key: Callable[[_Counts], str]) -> dict[str, Figures]:
    groups = sorted({key(count) for count in counts} - {""})
    return {group: _figures([count for count in counts if key(count) == group]) for group in groups}


def _figures(counts: Sequence[_Counts]) -> Figures:
    kinds, style = np.concatenate([c.kinds for c in counts]), np.concatenate([c.style for c in counts])
    said = style > 0.5
    chars = np.array([count.chars for count in counts])
    bins, error = _calibration(kinds, style)
    return Figures(
        segments=len(counts),
        tokens=len(kinds),
        style_share=_share(chars[:, 2].sum(), sum(count.length for count in counts)),
        token_accuracy=_share((said == kinds).sum(), len(kinds)),
        token_style=Score.of((said & (kinds == 1)).sum(), said.sum(), (kinds == 1).sum()),
        char=Score.of(*chars.sum(axis=0)),
        char_f1_without_whitespace=Score.of(*np.array([count.letters for count in counts]).sum(axis=0)).f1,
        char_f1_interval=_interval(chars, [count.segment.problem or count.segment.key for count in counts]),
        span=Score.of(*np.array([count.spans for count in counts]).sum(axis=0)),
        boundary_words=_boundary([count.word_error for count in counts]),
        boundary_tokens=_boundary([count.token_error for count in counts]),
        calibration=bins,
        calibration_error=error,
    )


def _boundary(errors: Iterable[int]) -> BoundaryErrors:
    signed = np.array(list(errors))
    values, numbers = np.unique(np.clip(signed, -FURTHEST, FURTHEST), return_counts=True)
    within = [float((abs(signed) <= most).mean()) for most in (0, 1, 3)]
    return BoundaryErrors(
        exact=within[0],
        within_1=within[1],
        within_3=within[2],
        distribution={int(v): int(n) for v, n in zip(values, numbers, strict=True)},
    )


def _calibration(kinds: NDArray[np.int8], style: Probabilities) -> tuple[list[Bin], float]:
    tenth = np.minimum((style * BINS).astype(int), BINS - 1)
    bins = []
    for i in range(BINS):
        inside = tenth == i
        if inside.any():
            bins.append(
                Bin(
                    tokens=int(inside.sum()),
                    mean_probability=float(style[inside].mean()),
                    style=float(kinds[inside].mean()),
                )
            )
    return bins, sum(b.tokens * abs(b.mean_probability - b.style) for b in bins) / max(1, len(kinds))


def _interval(chars: NDArray[Any], problems: Sequence[str], draws: int = 1000) -> tuple[float, float]:
    """Return the 95% interval of the character F1 when problems, not segments, are drawn again."""
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


def plot(evaluation: Evaluation, path: Path) -> None:
    """Draw calibration and boundary errors into an image file.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('Plots need matplotlib. Run: pip install "tessy-hf[report]"') from error
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
