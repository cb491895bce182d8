"""When a journal's writes become durable: soon after they are made, without taking more than a share of the time."""

from __future__ import annotations

import asyncio

from tessy_hf.errors import JournalError
from tessy_hf.run.journal import Journal

PAUSE_FACTOR = 40.0
"""Minimum pause after a commit, in units of its duration: commits take a fortieth of the time at most."""

LONGEST_PAUSE = 0.05
"""Seconds after which writes are committed in any case: an engine rarely takes less for a chunk of a row."""

SYNC_SECONDS = 0.5
"""Seconds between syncs to disk, against a power cut."""


class Commits:
    """Commits a journal on one event loop.

    A row's text is committed before the engine has done any work on what follows it, unless a commit was made just
    before.
    """

    def __init__(self, journal: Journal) -> None:
        self.journal, self.close = journal, journal.close
        self._error: JournalError | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._pauses_until = 0.0

    def soon(self) -> None:
        """Commit what was written, against a kill of the process.

        Raises:
            JournalError: An earlier commit failed: nothing written since is safe.
        """
        if self._error is not None:
            raise self._error
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_at(self._pauses_until, self._flush)

    async def sync_regularly(self) -> None:
        """Sync finished rows to disk until cancelled, or until the journal fails."""
        while self._error is None:
            await asyncio.sleep(SYNC_SECONDS)
            self._flush(sync=True)

    def _flush(self, sync: bool = False) -> None:
        loop, self._timer = asyncio.get_running_loop(), None
        begin = loop.time()
        try:
            self.journal.flush(sync=sync)
        except JournalError as error:
            self._error = error
        self._pauses_until = loop.time() + min(PAUSE_FACTOR * (loop.time() - begin), LONGEST_PAUSE)
