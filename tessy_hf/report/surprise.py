"""Figures of sets of texts: how well they suit a student (Rank-Surprisal Ratio, arXiv 2601.14249), words of doubt."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from tessy_hf.engines.scoring import Surprise

MARKERS = ("wait", "hmm", "maybe", "perhaps", "actually", "alternatively", "let me check", "not sure", "i think")
"""Words by which a text doubts itself; data that lost them teaches false certainty (arXiv 2603.24472)."""

_MARKER = re.compile(rf"\b({'|'.join(MARKERS)})\b", re.IGNORECASE)
_WORD = re.compile(r"\S+")


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
