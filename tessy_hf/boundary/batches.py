"""Batch the calls of a predictor: those that arrive while all workers are busy form the next batch."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from tessy_hf.errors import BoundaryError, TessyError

MAX_BATCH = 256
"""The most windows in one batch."""

Labels = Sequence[bool]
Read = Callable[[Sequence[Sequence[int]], Sequence[int]], Sequence[Labels]]
Call = tuple[Sequence[int], int, asyncio.Future[Labels]]


class Batches:
    """Calls of ``read`` in threads of its own, with windows and from which index on labels are wanted."""

    def __init__(self, read: Read, workers: int = 1, initializer: Callable[[], None] | None = None) -> None:
        self._read, self._idle = read, workers
        self._waiting: list[Call] = []
        self._workers = ThreadPoolExecutor(workers, thread_name_prefix="tessy-boundary", initializer=initializer)

    async def submit(self, window: Sequence[int], since: int) -> Labels:
        """Return whether each token of ``window`` from ``since`` on is style.

        Raises:
            BoundaryError: The predictor failed.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Labels] = loop.create_future()
        self._waiting.append((window, since, future))
        if self._idle:
            self._idle -= 1
            loop.call_soon(self._next, loop)  # after calls that are ready in this iteration of the loop
        return await future

    def close(self) -> None:
        """End the threads."""
        self._workers.shutdown(wait=True, cancel_futures=True)

    def _next(self, loop: asyncio.AbstractEventLoop) -> None:
        batch, self._waiting = self._waiting[:MAX_BATCH], self._waiting[MAX_BATCH:]
        if not batch:
            self._idle += 1
            return
        windows, since, _ = zip(*batch, strict=True)
        reading = loop.run_in_executor(self._workers, self._read, windows, since)
        reading.add_done_callback(lambda done: self._deliver(loop, batch, done))

    def _deliver(
        self, loop: asyncio.AbstractEventLoop, batch: list[Call], done: asyncio.Future[Sequence[Labels]]
    ) -> None:
        error = done.exception()
        if error is not None and not isinstance(error, TessyError):
            error = BoundaryError(f"The boundary predictor failed: {error!r}.")
        for index, (_, _, future) in enumerate(batch):
            if future.done():
                continue
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(done.result()[index])
        self._next(loop)
