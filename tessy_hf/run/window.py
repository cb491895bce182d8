"""How many rows are written at the same time: a fixed number, or as many as the engines' caches hold.

More rows keep the engines busier, until their keys and values no longer fit: then engines evict the caches of rows
that wait and compute them again at each turn, which costs more than it gains. Knows nothing of text.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from tessy_hf.engines.base import Engine

ROWS = 64
"""Rows in flight where no engine tells the size of its cache."""

MOST_ROWS = 512
"""The most there is a use for: two engines with vLLM's usual batch of 256."""

FILLED = 0.9
"""The share of a cache that is planned for."""

GUESSES = 8
"""For how many finished rows the guess of their length counts, before any is finished."""

TOLERATED = 0.1
"""Tokens that may be recomputed, as a share of the tokens of the rows that end meanwhile, before the window closes."""


class Window:
    """The rows in flight. Used by one event loop; rows enter one after another.

    Args:
        rows: How many, or ``"auto"``.
        guess: Tokens that a row is expected to have, before any has ended.
    """

    def __init__(self, rows: int | Literal["auto"], guess: int) -> None:
        self.rows = 0  # in flight
        self._fixed = None if rows == "auto" else rows
        self._engines: tuple[Engine, ...] = ()
        self._finished, self._sum, self._squares = float(GUESSES), float(GUESSES * guess), float(GUESSES * guess**2)
        self._share = 1.0
        self._recomputed = 0
        self._changed = asyncio.Event()

    def open(self, *engines: Engine) -> None:
        """Follow the caches of these engines, which are started. Their servers may come and go."""
        self._engines = engines

    @property
    def _cache(self) -> int | None:
        return min((held for engine in self._engines if (held := engine.cache_tokens) is not None), default=None)

    @property
    def limit(self) -> int:
        """How many rows may be in flight now."""
        if self._fixed is not None:
            return self._fixed
        cache = self._cache
        fit = ROWS if cache is None else FILLED * cache / self.row_tokens
        return max(1, min(MOST_ROWS, int(fit * self._share)))

    @property
    def row_tokens(self) -> float:
        """Expected tokens of a row in flight: the larger of ``E[n]`` and the length-biased ``E[n²] / 2 E[n]``.

        Longer rows are in flight for longer, each with half of its tokens on average.
        """
        return max(self._sum / self._finished, self._squares / (2 * self._sum))

    async def enter(self) -> None:
        """Wait until another row may be written."""
        while self.rows >= self.limit:
            self._changed.clear()
            await self._changed.wait()
        self.rows += 1

    def leave(self) -> None:
        """Make room for another row."""
        self.rows -= 1
        self._changed.set()

    def learn(self, tokens: int, recomputed: int) -> None:
        """Learn from a row that ended: its tokens with its prompt, and those recomputed so far for all rows."""
        self._finished += 1
        self._sum += tokens
        self._squares += tokens**2
        if recomputed - self._recomputed <= TOLERATED * tokens:
            self._share = min(1.0, 1.02 * self._share)
        elif self.rows <= self.limit:  # else it closed before, and rows that came in earlier still overflow the caches
            self._share = max(0.8 * self._share, 1 / MOST_ROWS)
        self._recomputed = recomputed
        self._changed.set()

    @property
    def reason(self) -> str:
        """Say where the limit comes from, for people; nothing where it is fixed."""
        if self._fixed is not None:
            return ""
        cache = self._cache
        held = "size unknown" if cache is None else f"{cache:,} tokens"
        kept = "" if self._share == 1 else f", {self._share:.0%} used as it overflowed"
        return f" of {self.limit} (cache: {held}{kept}; a row: {self.row_tokens:,.0f})"
