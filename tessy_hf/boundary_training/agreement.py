"""Several annotations of the same text: character masks go in, their majority and their agreement come out."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np

from tessy_hf.boundary_training.segments import Mask


def majority(masks: Sequence[Mask]) -> list[tuple[int, int]]:
    """Return the spans that more than half of the annotations mark."""
    edges = np.diff(np.concatenate(([0], np.mean(masks, axis=0) > 0.5, [0])).astype(np.int8))
    return list(zip(np.flatnonzero(edges > 0).tolist(), np.flatnonzero(edges < 0).tolist(), strict=True))


def agreement(texts: Sequence[Sequence[Mask]]) -> dict[str, float]:
    """Return the character F1 and Cohen's kappa of all pairs of annotations, pooled over texts.

    Args:
        texts: For each text its annotations, each a mask of its characters.
    """
    counts = np.zeros(4)  # both style, only the first, only the second, neither
    for masks in texts:
        for one, other in combinations(masks, 2):
            counts += [(one & other).sum(), (one & ~other).sum(), (~one & other).sum(), (~one & ~other).sum()]
    both, first, second, neither = counts
    total = max(1, counts.sum())
    seen = (both + neither) / total
    chance = ((both + first) * (both + second) + (neither + first) * (neither + second)) / total**2
    f1 = 2 * both / max(1, 2 * both + first + second)
    return {"char_f1": round(float(f1), 4), "kappa": round(float((seen - chance) / max(1e-9, 1 - chance)), 4)}
