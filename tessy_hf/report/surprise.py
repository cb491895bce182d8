"""How well a text suits a student: the Rank-Surprisal Ratio (RSR, arXiv 2601.14249), and words of doubt.

Log-probabilities and ranks go in, figures come out. Knows no models and no datasets.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

MOST_RANK = 100
"""Ranks above count as this one."""

MARKERS = ("wait", "hmm", "maybe", "perhaps", "actually", "alternatively", "let me check", "not sure", "i think")
"""Words by which a text doubts itself; data that lost them teaches false certainty (arXiv 2603.24472)."""

_MARKER = re.compile(rf"\b({'|'.join(MARKERS)})\b", re.IGNORECASE)
_WORD = re.compile(r"\S+")


class Surprise(NamedTuple):
    """How a student finds one text, means over its tokens.

    Attributes:
        surprisal: Negative log-probability, in nats.
        rank: Rank in the student's vocabulary, at most :data:`MOST_RANK`.
        tokens: How many tokens there are.
    """

    surprisal: float
    rank: float
    tokens: int

    @property
    def rsr(self) -> float | None:
        """Rank over surprisal: the lower, the more of the text is new to the student and yet near to it."""
        return self.rank / self.surprisal if self.surprisal > 0 else None


def surprise(logprobs: Sequence[float], ranks: Sequence[int]) -> Surprise | None:
    """Return how the student finds a text; ``None`` of one without tokens."""
    count = len(logprobs)
    if not count:
        return None
    return Surprise(-sum(logprobs) / count, sum(min(rank, MOST_RANK) for rank in ranks) / count, count)


def of_set(texts: Iterable[Surprise | None]) -> dict[str, float | int | None]:
    """Return the figures of a set: RSR is the sum of its texts' mean ranks over that of their mean surprisals."""
    known = [one for one in texts if one is not None]
    surprisals, ranks = sum(one.surprisal for one in known), sum(one.rank for one in known)
    count = max(1, len(known))
    means = {"surprisal": surprisals / count, "rank": ranks / count}
    return {"rsr": ranks / surprisals if surprisals > 0 else None, **means, "texts": len(known)}


def markers(texts: Iterable[str]) -> dict[str, float]:
    """Return how often each of :data:`MARKERS` stands in texts, per thousand words."""
    counts, words = dict.fromkeys(MARKERS, 0), 0
    for text in texts:
        words += len(_WORD.findall(text))
        for found in _MARKER.finditer(text):
            counts[found[1].lower()] += 1
    return {marker: 1000 * count / max(1, words) for marker, count in counts.items()}


def markers_by_method(texts: Mapping[str, Iterable[str]]) -> dict[str, dict[str, float]]:
    """Return :func:`markers` of the texts of each method."""
    return {method: markers(own) for method, own in sorted(texts.items())}
