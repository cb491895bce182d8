"""How many tokens to ask of an author at once, from how long its spans were in this row.

A large chunk is rolled back more often, a small one costs a request. The best size follows from the lengths of the
author's spans so far: the one that costs least on average. It depends on the row alone, not on the run around it, so
that a row that is sampled again is asked for in the same pieces. Knows nothing of text.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np

from tessy_hf.trajectory import Author

CANDIDATES = np.array([4, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64, 96, 128, 192, 256])
"""Sizes to choose from, in tokens."""

REQUEST_COST = 2.0
"""What a request costs besides its new tokens, counted in new tokens. See `benchmarks/README.md`."""

PRIOR: dict[Author, tuple[int, ...]] = {"student": (3, 6, 9), "teacher": (6, 12, 20)}
"""Lengths of spans to begin with, in tokens; a row's own push them out."""

MEMORY = 24

LONGEST = 4_096
"""Tokens from which on spans are all taken to be as long: which size is cheapest does not change any more."""

_COSTS = -(-np.arange(LONGEST + 1)[:, None] // CANDIDATES) * (CANDIDATES + REQUEST_COST)
"""What each size costs for a span of each length, worked out once."""


class ChunkSizes:
    """The next chunk's size for each author of one row.

    Args:
        fixed: The same size always; ``None`` to follow the spans.
    """

    __slots__ = ("_fixed", "_lengths")

    def __init__(self, fixed: int | None) -> None:
        self._fixed = fixed
        self._lengths: dict[Author, deque[int]] = {
            author: deque(lengths, maxlen=MEMORY) for author, lengths in PRIOR.items()
        }

    def observe(self, author: Author, tokens: int) -> None:
        """Learn that a turn took ``tokens`` tokens until its end could be seen."""
        self._lengths[author].append(max(1, tokens))

    def next(self, author: Author, so_far: int) -> int:
        """Return how many tokens to ask for after ``so_far`` tokens of the author's turn."""
        return self._fixed if self._fixed is not None else _cheapest(self._lengths[author], so_far)


def _cheapest(lengths: Sequence[int], so_far: int) -> int:
    """Return the size that costs least for what is left of turns like these that last longer than ``so_far``."""
    left = [min(length - so_far, LONGEST) for length in lengths if length > so_far] or [min(max(lengths), LONGEST)]
    return int(CANDIDATES[_COSTS[left].sum(axis=0).argmin()])
