"""What a run waits for: what hangs is named, and ended when its time is over; what slows the run down is known."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import NamedTuple

from tessy_hf.errors import RequestError


class Load(NamedTuple):
    """How much something was waited for.

    Attributes:
        busy: Seconds in which any row waited for it.
        waited: Seconds that all rows together did.
        times: How often one began to.
    """

    busy: float = 0.0
    waited: float = 0.0
    times: int = 0

    def __sub__(self, earlier: Load) -> Load:
        """Return what came since then."""
        return Load(self.busy - earlier.busy, self.waited - earlier.waited, self.times - earlier.times)


@dataclass(slots=True)
class _Meter:
    """How many rows wait for something, and how long they did."""

    rows: int = 0
    at: float = 0.0
    busy: float = 0.0
    waited: float = 0.0
    times: int = 0

    def change(self, now: float, by: int) -> None:
        self.times += by > 0
        self.busy += (now - self.at) * (self.rows > 0)
        self.waited += (now - self.at) * self.rows
        self.rows, self.at = self.rows + by, now


class Waits:
    """Everything that is waited for at the moment.

    Args:
        deadline: Seconds that an engine or a predictor may take for one request; ``None`` for any time.

    Attributes:
        read_again: Tokens of rows that engines had to read once more, as their caches had thrown them out.
    """

    def __init__(self, deadline: float | None = None) -> None:
        self._deadline = deadline
        self._since: dict[str, tuple[float, str]] = {}
        self._loads: dict[str, _Meter] = {}
        self.read_again = 0

    @asynccontextmanager
    async def on(self, row: str, what: str, of: str = "") -> AsyncIterator[None]:
        """Wait for ``what`` on behalf of a row, which is a part of ``of`` in :meth:`loads`.

        Raises:
            RequestError: The deadline passed. The row may be tried again.
        """
        begin = asyncio.get_running_loop().time()
        self._since[row] = begin, what
        load = self._loads.setdefault(of or what, _Meter())
        load.change(begin, 1)
        try:
            async with asyncio.timeout(self._deadline) as limit:
                yield
        except TimeoutError as error:
            if not limit.expired():
                raise
            raise RequestError(
                f"Row {row!r} got nothing from {what} within {self._deadline:g} s. Look at its log; if it only needs "
                "longer, raise request_timeout.",
                retryable=True,
            ) from error
        finally:
            self._since.pop(row, None)
            load.change(asyncio.get_running_loop().time(), -1)

    def loads(self) -> dict[str, Load]:
        """Return how much each thing was waited for."""
        return {name: Load(load.busy, load.waited, load.times) for name, load in self._loads.items()}

    def stalled(self, seconds: float) -> str | None:
        """Return what is waited for, where nothing came for so many seconds; else ``None``."""
        if not self._since:
            return None
        now = asyncio.get_running_loop().time()
        if now - max(since for since, _ in self._since.values()) < seconds:
            return None
        rows = Counter(what for _, what in self._since.values())
        oldest, (since, _) = min(self._since.items(), key=lambda item: item[1])
        named = ", ".join(f"{what} ({count} row{'s' * (count > 1)})" for what, count in rows.most_common())
        return f"{named}; the longest, row {oldest!r}, since {now - since:.0f} s"
