"""How surprising the student finds each word (-log p): tokens' log-probabilities go in, words cut at spans come out.

The column :data:`WORDS` has a number for each word of thinking and answer, in order; fewer where a text was cut off.
Knows nothing of models and pages.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

from tessy_hf.rows.columns import Piece, pieces
from tessy_hf.text.vocabulary import owners, words

WORDS = "student_word_surprisals"
COLUMNS = ("student_surprisal", "student_rank", "student_rsr", WORDS)
"""What ``tessy analyze --columns`` adds: means over the tokens of a row, their ratio, and words."""

Segment = tuple[int, float | None]
"""Characters of a span, and the surprise of the word they belong to."""


class Word(NamedTuple):
    """A word of a row: who began it, in which part, its place there from 0 to 1, and its surprise in nats."""

    author: str
    part: str
    place: float
    surprise: float


def by_word(text: str, offsets: Sequence[tuple[int, int]], logprobs: Sequence[float]) -> list[float]:
    """Sum -log p over the tokens that end in each word; words behind the last scored token are left out."""
    ends = [end for _, end in words(text)]
    found = [0.0] * len(ends)
    scored = owners(offsets[: len(logprobs)], ends)
    for word, logprob in zip(scored, logprobs, strict=False):
        if word < len(found):
            found[word] -= logprob
    complete = len(found) if len(logprobs) >= len(offsets) else max(scored, default=0)
    return [round(one, 3) for one in found[:complete]]


def segments(row: Mapping[str, Any]) -> list[list[Segment]]:
    """Cut each span of a row at the ends of its words; nothing where the row has no surprise of words."""
    found = [span for spans, scored in _parts(row) for span in _cut(spans, scored)]
    return found if any(surprise is not None for span in found for _, surprise in span) else []


def row_words(row: Mapping[str, Any]) -> Iterator[Word]:
    """Yield the words of a row that were scored."""
    for spans, scored in _parts(row):
        last = [end - 1 for end in accumulate(len(piece.text) for piece in spans)]
        wrote = owners(((start, start) for start, *_ in scored), last)
        for (start, _, surprise), at in zip(scored, wrote, strict=True):
            if surprise is not None:
                yield Word(spans[at].author, spans[at].part, start / (last[-1] + 1), surprise)


def _parts(row: Mapping[str, Any]) -> Iterator[tuple[list[Piece], list[tuple[int, int, float | None]]]]:
    """Yield the spans of each part, with first character, end and surprise of each of its words."""
    cut, left = pieces(row), iter(row.get(WORDS) or ())
    for part in dict.fromkeys(piece.part for piece in cut):
        spans = [piece for piece in cut if piece.part == part]
        text = "".join(piece.text for piece in spans)
        yield spans, [(end - len(text[at:end].lstrip()), end, next(left, None)) for at, end in words(text)]


def _cut(spans: Sequence[Piece], scored: Sequence[tuple[int, int, float | None]]) -> Iterator[list[Segment]]:
    ends = [(end, surprise) for _, end, surprise in scored] + [(sum(len(piece.text) for piece in spans), None)]
    at = place = 0
    for piece in spans:
        end, own = at + len(piece.text), list[Segment]()
        while at < end:
            stop, surprise = min(end, ends[place][0]), ends[place][1]
            own += [(stop - at, surprise)] if stop > at else []
            at, place = stop, place + (stop == ends[place][0])
        yield own


def known(columns: Iterable[str]) -> bool:
    """Return whether rows with these columns say how the student finds them."""
    return set(COLUMNS) <= set(columns)
