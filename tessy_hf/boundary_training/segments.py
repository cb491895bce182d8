"""Segments of thinking with marked style spans, the data that predictors are trained and evaluated on.

Rows of a dataset go in; checked :class:`Segment` objects come out, and the kind of each character, word and token.
Knows nothing of models.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tessy_hf.errors import DatasetError
from tessy_hf.text.vocabulary import words

UNKNOWN = -1
"""The kind of a token of whitespace alone. It belongs to no author and is left out of training and evaluation."""

Mask = NDArray[np.bool_]
Kinds = NDArray[np.int8]


class Format(NamedTuple):
    """Where annotated segments keep the text, the style spans, and in a span what it quotes."""

    name: str
    text: str
    spans: str
    quote: str


FORMATS = (
    Format("tessy-hf", "text", "style_spans", "text"),
    Format("the TESSY authors", "think_text", "pred_result", "span"),
)
"""The formats of annotations that are read."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of thinking and its style spans.

    Attributes:
        text: The text.
        spans: ``(start, end)`` character offsets of the style spans, in order, without overlap.
        problem: The problem that it is about; segments of one problem are never split between training and validation.
        family: The family of the model that wrote it, for figures by family.
        source_model: The model that wrote it, for figures by model.
        weight: Its weight in training.
        key: Its name in errors.
        domain: What it is about, such as code or math, for figures by domain.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    problem: str = ""
    family: str = ""
    source_model: str = ""
    weight: float = 1.0
    key: str = ""
    domain: str = ""

    @classmethod
    def from_row(cls, row: Mapping[str, Any], number: int = 0) -> Segment:
        """Read a row in one of :data:`FORMATS`, its spans ``{"start", "end"}`` with or without what they quote.

        Optional columns: ``problem_id``, ``family``, ``source_model``, ``domain``, ``weight`` and ``id``.

        Raises:
            DatasetError: A column is missing, or spans are out of order or outside the text.
        """
        key = str(row.get("id") or row.get("id_ddm") or f"number {number}")
        form = next((one for one in FORMATS if row.get(one.text) is not None and row.get(one.spans) is not None), None)
        if form is None or not isinstance(row[form.text], str):
            known = " or ".join(f"`{one.text}` and `{one.spans}` ({one.name})" for one in FORMATS)
            raise DatasetError(
                f"Segment {key!r} has the columns {', '.join(map(str, row))}. Expected are {known}: a string, and a "
                "list of {start, end}; rename the columns."
            )
        text: str = row[form.text]
        spans = tuple((int(span["start"]), int(span["end"])) for span in row[form.spans])
        for (start, end), marked, before in zip(spans, row[form.spans], (0, *(e for _, e in spans)), strict=False):
            said = marked.get(form.quote)
            if not before <= start < end <= len(text) or (said is not None and said != text[start:end]):
                raise DatasetError(
                    f"Segment {key!r}: the style span {start}-{end} ({said!r}) does not fit its text of {len(text)} "
                    f"characters, which has {text[start:end]!r} there; the span before ends at {before}. Expected are "
                    "character offsets, in order, without overlap. Fix or drop the row."
                )
        weight = 1.0 if row.get("weight") is None else float(row["weight"])
        problem = str(row.get("problem_id") or row.get("id_ddm") or "")  # their segments are of one trace each
        family, source_model, domain = (str(row.get(name) or "") for name in ("family", "source_model", "domain"))
        return cls(text, spans, problem, family, source_model, weight, key, domain)

    def style(self) -> Mask:
        """Return, for each character, whether it is style."""
        mask = np.zeros(len(self.text), dtype=bool)
        for start, end in self.spans:
            mask[start:end] = True
        return mask

    def written(self) -> Mask:
        """Return, for each character, whether it is not whitespace."""
        return np.fromiter((not c.isspace() for c in self.text), dtype=bool, count=len(self.text))

    def part(self, start: int, end: int | None = None) -> Segment:
        """Return the part of the segment between two character offsets."""
        end = len(self.text) if end is None else end
        inside = ((max(a, start) - start, min(b, end) - start) for a, b in self.spans)
        spans = tuple((a, b) for a, b in inside if a < b)
        return replace(self, text=self.text[start:end], spans=spans, key=f"{self.key}[{start}:{end}]")

    def marked(self) -> list[dict[str, Any]]:
        """Return the style spans as rows of a dataset: offsets, and the text for people to read."""
        return [{"start": start, "end": end, "text": self.text[start:end]} for start, end in self.spans]


def read_segments(source: str | Path | Iterable[Mapping[str, Any] | Segment]) -> list[Segment]:
    """Read segments from a JSONL file, or from rows such as those of a ``datasets.Dataset``.

    Raises:
        DatasetError: There are no segments, the file cannot be read, or a row is not a segment.
    """
    rows = _lines(Path(source)) if isinstance(source, (str, Path)) else source
    segments = [row if isinstance(row, Segment) else Segment.from_row(row, n) for n, row in enumerate(rows)]
    if not segments:
        raise DatasetError("There are no segments. Expected is at least one row with its style spans.")
    return segments


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    except (OSError, ValueError) as error:
        raise DatasetError(
            f"The segments {str(path)!r} cannot be read: {error}. Expected is a file with one JSON object per line."
        ) from error


def split_by_problem(segments: Sequence[Segment], share: float, seed: int = 0) -> tuple[list[Segment], list[Segment]]:
    """Split into training and validation so that no problem is in both.

    Args:
        segments: The segments.
        share: Share of the problems that go to validation.
        seed: Seed of the draw; equal seeds and problems give equal splits.

    Raises:
        DatasetError: A segment has no problem, or there are fewer than two problems.
    """
    nameless = next((segment for segment in segments if not segment.problem), None)
    if nameless is not None:
        raise DatasetError(
            f"Segment {nameless.key!r} has no `problem_id`, so the split cannot keep problems apart. Add the column, "
            "or pass the validation segments yourself."
        )
    problems = sorted({segment.problem for segment in segments})
    if len(problems) < 2:
        raise DatasetError(
            f"All segments are about the problem {problems[0]!r}. At least two problems are needed for a split by "
            "problem; pass the validation segments yourself."
        )
    Random(seed).shuffle(problems)
    chosen = set(problems[: min(len(problems) - 1, max(1, round(share * len(problems))))])
    return (
        [segment for segment in segments if segment.problem not in chosen],
        [segment for segment in segments if segment.problem in chosen],
    )


def token_kinds(segment: Segment, offsets: Sequence[tuple[int, int]]) -> Kinds:
    """Return the kind of each token: 1 for style, 0 for capability, :data:`UNKNOWN` for whitespace alone.

    A token that overlaps a style span is style.
    """
    written = np.concatenate(([0], np.cumsum(segment.written())))
    style = np.concatenate(([0], np.cumsum(segment.style() & segment.written())))
    starts, ends = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
    kinds = (style[ends] > style[starts]).astype(np.int8)
    kinds[written[ends] == written[starts]] = UNKNOWN
    return kinds


def word_kinds(segment: Segment) -> list[bool]:
    """Return, for each word, whether it overlaps a style span. The method hands over at the ends of these words."""
    style = segment.style() & segment.written()
    return [bool(style[start:end].any()) for start, end in words(segment.text)]


def span_starts(segment: Segment) -> list[int]:
    """Return the character offsets, other than the first, at which a span of either kind starts."""
    kinds, places = word_kinds(segment), words(segment.text)
    changes = [i for i in range(1, len(kinds)) if kinds[i] != kinds[i - 1]]
    return [places[i][1] - len(segment.text[slice(*places[i])].lstrip()) for i in changes]
