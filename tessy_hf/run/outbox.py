"""Finished rows of a run on their way into shared rows, several to a file; and a look at those of other hosts."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

from tessy_hf.run.shared_rows import SharedRows
from tessy_hf.trajectory import RowKey

FILE_BYTES = 16 << 20
"""About how many bytes of text a file holds at most."""

LONGEST_WAIT, SHORTEST_WAIT = 60.0, 0.2
"""Seconds that a finished row waits for others to share its file: while rows wait for a place in the window, and once
none does, when nothing else may come for a while."""

REFRESH_SECONDS = 10.0
"""How old a run's knowledge of other hosts' rows may be."""

logger = logging.getLogger(__name__)


class Outbox:
    """Writes finished rows to shared rows. Used by one event loop.

    A file is made of ``most`` rows, or of those that came until the first has waited long enough.

    Args:
        shared: Where they go.
        most: How many rows wait for each other.
        has_room: Whether the run could take more rows than it has.
    """

    def __init__(self, shared: SharedRows, most: Callable[[], int], has_room: Callable[[], bool]) -> None:
        self.shared, self._most, self._has_room = shared, most, has_room
        self._rows: dict[RowKey, Mapping[str, Any]] = {}
        self._bytes = 0
        self._waiting: dict[RowKey, asyncio.Future[None]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._writing: asyncio.Task[None] | None = None
        self._due = self._hurried = False
        self._failure: Exception | None = None
        self._reading = asyncio.Lock()
        self._refreshed = float("-inf")

    async def find(self, key: RowKey) -> dict[str, Any] | None:
        """Return a row that is in shared rows, unless it failed there.

        Raises:
            PartsError: They cannot be read.
        """
        if time.monotonic() - self._refreshed > REFRESH_SECONDS:
            async with self._reading:
                if time.monotonic() - self._refreshed > REFRESH_SECONDS:
                    await asyncio.to_thread(self.shared.refresh)
                    self._refreshed = time.monotonic()
        if not self.shared.done(key):
            return None
        async with self._reading:
            return await asyncio.to_thread(self.shared.row, key)

    def add(self, key: RowKey, row: Mapping[str, Any]) -> None:
        """Take a finished row, unless it is there already; a failure counts only as long as there is nothing else.

        Raises:
            PartsError: Rows taken before could not be written.
        """
        if self._failure is not None:
            raise self._failure
        there = self.shared.done(key) or (row["finish_reason"] == "error" and self.shared.failed(key))
        if there or key in self._waiting:
            return
        loop = asyncio.get_running_loop()
        self._rows[key], self._waiting[key] = row, loop.create_future()
        self._bytes += 3 * len(row["thinking"]) + 2 * len(row["answer"])
        if self._timer is None:
            self._timer = loop.call_later(LONGEST_WAIT, self._begin)
            self._hurried = False
        if len(self._rows) >= self._most() or self._bytes >= FILE_BYTES:
            self._begin()

    def hurry(self) -> None:
        """Write what is waiting soon, if the run has room for more rows than there are."""
        if self._timer is not None and not self._hurried and self._has_room():
            self._timer.cancel()
            self._timer = asyncio.get_running_loop().call_later(SHORTEST_WAIT, self._begin)
            self._hurried = True

    async def stored(self) -> None:
        """Wait until all rows taken so far are written.

        Raises:
            PartsError: They cannot be written.
        """
        self.hurry()
        await asyncio.gather(*map(asyncio.shield, self._waiting.values()))
        if self._failure is not None:
            raise self._failure

    async def close(self) -> None:
        """Write what is left, as well as that can be done."""
        if self._rows and self._failure is None:
            self._begin()
        if self._writing is not None:
            await self._writing
        if self._failure is not None:
            logger.warning("Finished rows are not in %s: %s", self.shared.folder, self._failure)

    def _begin(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._due = True
        if self._writing is None:
            self._writing = asyncio.ensure_future(self._write())

    async def _write(self) -> None:
        """Write files, one after the other, for as long as some are due."""
        try:
            while self._due and self._rows:
                rows, self._rows, self._bytes, self._due = self._rows, {}, 0, False
                try:
                    await asyncio.to_thread(self.shared.write, rows)
                except Exception as error:  # noqa: BLE001 - raised to those who wait
                    self._failure = error
                for key in rows:
                    waiting = self._waiting.pop(key)
                    if not waiting.done():
                        waiting.set_result(None)
        finally:
            self._writing = None
