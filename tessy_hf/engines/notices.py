"""What is said while no server answers."""

from __future__ import annotations

import asyncio
import logging
import time

from tessy_hf.engines.replicas import Replicas

FIRST_NOTICE, NEXT_NOTICE = 1.0, 10.0
"""Seconds after which it is logged that servers are waited for, and between such messages."""

logger = logging.getLogger(__name__)


class Notices:
    """Logs what a run waits for, once for all rows: after a second, then again and again."""

    def __init__(self, model: str, retry_timeout: float, replicas: Replicas) -> None:
        self._model, self._retry_timeout, self._replicas, self._words = model, retry_timeout, replicas, ""
        self._task: asyncio.Task[None] | None = None

    def wait(self, words: str) -> None:
        """Note that an answer is waited for, and why."""
        self._words = words
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._log())

    def stop(self) -> None:
        """Log no more."""
        if self._task is not None:
            self._task.cancel()
            self._task = None

    async def _log(self) -> None:
        begin, pause = time.monotonic(), FIRST_NOTICE
        while True:
            await asyncio.sleep(pause)
            if self._replicas.answered_at > begin:
                return
            words = "%s: no answer for %.0f s. %s Giving up after %g s (retry_timeout)."
            waited = time.monotonic() - begin
            logger.warning(words, self._model, waited, self._words, self._retry_timeout)
            pause = NEXT_NOTICE
