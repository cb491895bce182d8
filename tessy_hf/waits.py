"""What a run waits for, so that what hangs is named, and ended when its time is over."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from tessy_hf.errors import RequestError


class Waits:
    """Everything that is waited for at the moment.

    Args:
        deadline: Seconds that an engine or a predictor may take for one request; ``None`` for any time.
    """

    def __init__(self, deadline: float | None = None) -> None:
        self._deadline = deadline
        self._since: dict[str, tuple[float, str]] = {}

    @asynccontextmanager
    async def on(self, row: str, what: str) -> AsyncIterator[None]:
        """Wait for ``what`` on behalf of a row.

        Raises:
            RequestError: The deadline passed. The row may be tried again.
        """
        self._since[row] = asyncio.get_running_loop().time(), what
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
