"""The journal and the shared rows of a run at work, as far as it has them. Knows no engines and no text."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from tessy_hf.manifest import RunRecord
from tessy_hf.rows import columns
from tessy_hf.run.commits import Commits
from tessy_hf.run.journal import Counts
from tessy_hf.run.outbox import Outbox
from tessy_hf.run.stores import journal_of, shared_rows_of
from tessy_hf.run.window import Window
from tessy_hf.settings import Settings


class OpenStores:
    """Where a run keeps its rows and finds those of earlier runs. Used by one event loop.

    Args:
        settings: The run's settings.
        fingerprint: The run's fingerprint.
        window: The rows in flight: shared rows wait for each other as long as there may be more.
    """

    def __init__(self, settings: Settings, fingerprint: str, window: Window) -> None:
        journal, shared = journal_of(settings, fingerprint), shared_rows_of(settings, fingerprint)
        half, has_room = (lambda: max(1, window.limit // 2)), (lambda: window.rows < window.limit)
        self._fingerprint, self._parts = fingerprint, settings.parts
        self.commits = Commits(journal) if journal is not None else None
        self.outbox = Outbox(shared, half, has_room) if shared is not None else None

    async def check(self, *, plan_is_told: bool) -> AsyncIterator[str]:
        """Check that rows can be kept; say what earlier runs left, of the journal unless a plan has told.

        Raises:
            TessyError: The journal or the shared rows cannot be used.
        """
        if self.outbox is not None:
            await asyncio.to_thread(self.outbox.shared.check)
            await asyncio.to_thread(self.outbox.shared.refresh)
            yield f"{len(self.outbox.shared)} rows are there already (parts: {self._parts})."
        if self.commits is not None and not plan_is_told:
            journal = self.commits.journal
            done, to_continue, _, failed = journal.fingerprints().get(self._fingerprint) or Counts()
            yield (
                f"{done} rows done, {to_continue} to continue, {failed} failed before, all others to do "
                f"(journal: {journal.path})."
            )

    def describe(self, record: RunRecord, thinking_key: str | None) -> None:
        """Keep the run's record beside its rows."""
        if self.commits is not None:
            self.commits.journal.describe(record.model_dump_json())
        if self.outbox is not None:
            self.outbox.shared.describe(columns.schema(thinking_key), record.model_dump_json())

    async def close(self) -> None:
        """Write what is left."""
        try:
            if self.commits is not None:
                self.commits.close()
        finally:
            if self.outbox is not None:
                await self.outbox.close()
