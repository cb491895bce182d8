"""What a run waits for: what hangs is named, and ended when its time is over; what slows the run down is known."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from types import TracebackType
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


class _Wait:
    """One row's wait, as an asynchronous context. See :meth:`Waits.on`."""

    __slots__ = ("_cancelling", "_load", "_task", "_waits", "begin", "expired", "row", "what")

    def __init__(self, waits: Waits, load: _Meter, row: str, what: str) -> None:
        self._waits, self._load = waits, load
        self.row, self.what, self.expired = row, what, False

    async def __aenter__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._task, self._cancelling = task, task.cancelling()
        self.begin = self._waits.begin(self)
        self._load.change(self.begin, 1)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._load.change(self._waits.end(self), -1)
        if self.expired and self._task.uncancel() <= self._cancelling and kind is asyncio.CancelledError:
            raise RequestError(
                f"Row {self.row!r} got nothing from {self.what} within {self._waits.deadline:g} s. Look at its log; "
                "if it only needs longer, raise request_timeout.",
                retryable=True,
            ) from error

    def expire(self) -> None:
        """End the wait: its deadline has passed."""
        self.expired = True
        self._task.cancel()


class Waits:
    """Everything that is waited for at the moment.

    Args:
        deadline: Seconds that an engine or a predictor may take for one request; ``None`` for any time.

    Attributes:
        read_again: Tokens of rows that engines had to read once more, as their caches had thrown them out.
    """

    def __init__(self, deadline: float | None = None) -> None:
        self.deadline = deadline
        self._going: dict[_Wait, None] = {}  # the oldest first
        self._loads: dict[str, _Meter] = {}
        self._alarm: asyncio.TimerHandle | None = None
        self.read_again = 0

    def on(self, row: str, what: str, of: str = "") -> AbstractAsyncContextManager[None]:
        """Wait for ``what`` on behalf of a row, which is a part of ``of`` in :meth:`loads`.

        Raises:
            RequestError: The deadline passed. The row may be tried again.
        """
        load = self._loads.get(of or what) or self._loads.setdefault(of or what, _Meter())
        return _Wait(self, load, row, what)

    def begin(self, wait: _Wait) -> float:
        """Note a wait that begins. Returns the time."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        self._going[wait] = None
        if self._alarm is None and self.deadline is not None:
            self._alarm = loop.call_at(now + self.deadline, self._expire, loop)
        return now

    def end(self, wait: _Wait) -> float:
        """Forget a wait that is over. Returns the time."""
        self._going.pop(wait, None)
        return asyncio.get_running_loop().time()

    def _expire(self, loop: asyncio.AbstractEventLoop) -> None:
        """End the waits whose deadline has passed. One alarm for all: thousands of waits begin in a second."""
        assert self.deadline is not None
        self._alarm = None
        for wait in list(self._going):
            if wait.begin + self.deadline > loop.time():
                self._alarm = loop.call_at(wait.begin + self.deadline, self._expire, loop)
                return
            del self._going[wait]
            wait.expire()

    def loads(self) -> dict[str, Load]:
        """Return how much each thing was waited for."""
        return {name: Load(load.busy, load.waited, load.times) for name, load in self._loads.items()}

    def stalled(self, seconds: float) -> str | None:
        """Return what is waited for, where nothing came for so many seconds; else ``None``."""
        if not self._going:
            return None
        now = asyncio.get_running_loop().time()
        if now - max(wait.begin for wait in self._going) < seconds:
            return None
        rows = Counter(wait.what for wait in self._going)
        oldest = next(iter(self._going))
        named = ", ".join(f"{what} ({count} row{'s' * (count > 1)})" for what, count in rows.most_common())
        return f"{named}; the longest, row {oldest.row!r}, since {now - oldest.begin:.0f} s"
