"""A function for ``Dataset.map``: asynchronous in scripts, so that batches overlap; a plain one where a loop runs."""

from __future__ import annotations

import asyncio
import functools
import weakref
from concurrent.futures import Future
from typing import Any, Self

from tessy_hf.rows.batch import Batch, Columns


class BatchFunction(functools.partial[Any]):
    """What `datasets` calls with batches.

    It is a ``functools.partial``, the one kind of object in which ``datasets`` can find a coroutine function where no
    event loop runs (scripts), and a plain one where one does (notebooks).
    """

    _async: bool

    @classmethod
    def _new(cls) -> Self:
        self = super().__new__(cls, print)
        self._async = False
        return self

    def submit(self, batch: Columns, caller: asyncio.AbstractEventLoop | None = None) -> Future[dict[str, list[Any]]]:
        """Begin a batch; ``caller`` is the loop of an asynchronous ``map``."""
        raise NotImplementedError

    @property
    def layout(self) -> tuple[str, str | None]:
        """See :meth:`tessy_hf.rows.batch.Batch.returned`."""
        raise NotImplementedError

    @property
    def func(self) -> Any:
        """What ``datasets`` inspects: a coroutine function, unless an event loop runs in this thread already."""
        self._async = not _loop_is_running()
        return _coroutine_function if self._async else _function

    def __call__(self, batch: Any, /, *extra: Any) -> Any:
        """Write the rows of a batch: return the new columns; inside an asynchronous ``map``, an awaitable of them.

        Raises:
            DatasetError: It is not a batch, or lacks a column.
            TemplateError: A chat template would lose the thinking.
            BoundaryError: A boundary predictor cannot be read.
            EngineDeadError: An engine is gone; finished rows are in the journal, where there is one.
        """
        given, layout = Batch.read(batch, extra), self.layout  # before the loop imports what this does
        if not (self._async and _loop_is_running()):
            return given.returned(self.submit(given.columns).result(), *layout)
        return _later(given, self.submit(given.columns, asyncio.get_running_loop()), layout)


async def _later(given: Batch, written: Future[dict[str, list[Any]]], layout: tuple[str, str | None]) -> Any:
    # Not asyncio.wrap_future: it would keep the tasks of a stream that was dropped, which `datasets` leaves pending.
    waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    written.add_done_callback(functools.partial(_wake, weakref.ref(waiter)))
    try:
        await waiter
        return given.returned(written.result(), *layout)
    finally:
        written.cancel()


def _wake(waiter: weakref.ref[asyncio.Future[None]], written: Future[Any]) -> None:
    if (waits := waiter()) is not None and not waits.get_loop().is_closed():
        waits.get_loop().call_soon_threadsafe(_end, waits, written.cancelled())


def _end(waiter: asyncio.Future[None], cancelled: bool) -> None:
    if cancelled:
        waiter.cancel()
    elif not waiter.done():
        waiter.set_result(None)


async def _coroutine_function(batch: Batch) -> None:
    """Stand where ``inspect.iscoroutinefunction`` looks."""


def _function(batch: Batch) -> None:
    """Stand where ``inspect.iscoroutinefunction`` looks."""


def _loop_is_running() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
