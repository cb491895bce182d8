"""How many tokens to ask of an author at once, from how long its spans were in this row.

A large chunk is rolled back more often, a small one costs a request. The best size follows from the lengths of the
author's spans so far: the one that costs least on average. It depends on the row alone, not on the run around it, so
that a row that is sampled again is asked for in the same pieces. Knows nothing of text.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from functools import cache

from tessy_hf.trajectory import Author

CANDIDATES = (4, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64, 96, 128, 192, 256)
"""Sizes to choose from, in tokens."""

REQUEST_COST = 2.0
"""What a request costs besides its new tokens, counted in new tokens. See `benchmarks/README.md`."""

PRIOR: dict[Author, tuple[int, ...]] = {"student": (3, 6, 9), "teacher": (6, 12, 20)}
"""Lengths of spans to begin with, in tokens; a row's own push them out."""

MEMORY = 24

LONGEST = 4_096
"""Tokens from which on spans are all taken to be as long: which size is cheapest does not change any more."""


@cache
def _costs(length: int) -> tuple[float, ...]:
    """Return what each size costs for a span of so many tokens."""
    return tuple(-(-length // size) * (size + REQUEST_COST) for size in CANDIDATES)


def _sum(lengths: Iterable[int]) -> list[float]:
    totals = [0.0] * len(CANDIDATES)
    for length in lengths:
        totals = [total + cost for total, cost in zip(totals, _costs(length), strict=True)]
    return totals


_PRIOR_COSTS = {author: _sum(lengths) for author, lengths in PRIOR.items()}


class ChunkSizes:
    """The next chunk's size for each author of one row.

    Plain lists: numpy would let go of the interpreter's lock at each turn, which predictors then hold.

    Args:
        fixed: The same size always, perhaps one for each author; ``None`` to follow the spans.
    """

    __slots__ = ("_costs", "_fixed", "_lengths")

    def __init__(self, fixed: int | Mapping[Author, int] | None) -> None:
        self._fixed = dict.fromkeys(PRIOR, fixed) if isinstance(fixed, int) else fixed
        self._lengths: dict[Author, deque[int]] = {author: deque(lengths) for author, lengths in PRIOR.items()}
        self._costs = _PRIOR_COSTS.copy()

    def observe(self, author: Author, tokens: int) -> None:
        """Learn that a turn took ``tokens`` tokens until its end could be seen."""
        lengths = self._lengths[author]
        lengths.append(min(max(1, tokens), LONGEST))
        oldest = lengths.popleft() if len(lengths) > MEMORY else 0
        told = zip(self._costs[author], _costs(lengths[-1]), _costs(oldest), strict=True)
        self._costs[author] = [total + new - old for total, new, old in told]

    def next(self, author: Author, so_far: int) -> int:
        """Return how many tokens to ask for after ``so_far`` tokens of the author's turn."""
        if self._fixed is not None:
            return self._fixed[author]
        costs = self._costs[author] if not so_far else self._left(author, so_far)
        return CANDIDATES[costs.index(min(costs))]

    def _left(self, author: Author, so_far: int) -> list[float]:
        """Return what sizes cost for what is left of turns like these that last longer than ``so_far``."""
        lengths = self._lengths[author]
        return _sum([length - so_far for length in lengths if length > so_far] or [max(lengths)])
