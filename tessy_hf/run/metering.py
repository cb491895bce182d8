"""Per-request deadlines, stall reports, and which model is the bottleneck.

Engines and boundary predictors are wrapped; what they are asked and answer stays the same. Knows nothing of what the
answers are for.
"""

from __future__ import annotations

import asyncio
import copy
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar, cast

from tessy_hf.boundary.predictor import BoundaryPredictor
from tessy_hf.engines.base import Completion, Engine, Request
from tessy_hf.errors import RequestError
from tessy_hf.method.speaker import Speaker
from tessy_hf.trajectory import Author

T = TypeVar("T")

CACHE_GRAIN = 256
"""Tokens that an engine may recompute of a prompt besides its new ones: rolled back ones, and a block not full."""


class Load(NamedTuple):
    """How much something was waited for."""

    busy: float = 0.0  # seconds in which anything waited for it
    waited: float = 0.0  # seconds of waiting, summed over all requests
    times: int = 0  # requests

    def __sub__(self, earlier: Load) -> Load:
        """Return what came since then."""
        return Load(self.busy - earlier.busy, self.waited - earlier.waited, self.times - earlier.times)


@dataclass(slots=True)
class _Usage:
    """The requests that one thing has, since when it has that many, and how long it was waited for before."""

    requests: int = 0
    at: float = 0.0
    load: Load = Load()

    def change(self, now: float, by: int) -> None:
        busy, waited, times = self.load
        more = (now - self.at) * self.requests
        self.load = Load(busy + (now - self.at) * (more > 0), waited + more, times + (by > 0))
        self.requests, self.at = self.requests + by, now


@dataclass(frozen=True, slots=True, eq=False)
class _Wait:
    what: str
    row: str | None
    begin: float


class Meter:
    """All requests that a run waits for, each for ``deadline`` seconds at most; ``None`` for any time."""

    def __init__(self, deadline: float | None = None) -> None:
        self.deadline = deadline
        self.recomputed_tokens = 0  # those of rows that engines computed once more, as their caches had evicted them
        self._waits: dict[_Wait, None] = {}  # the oldest first
        self._usage: dict[str, _Usage] = {}

    async def wait(self, answer: Awaitable[T], what: str, *, of: str, row: str | None = None) -> T:
        """Await an answer.

        Args:
            answer: What is awaited.
            what: Who gives it, for people.
            of: Where it counts in :meth:`loads`.
            row: The row that waits, where it is known.

        Raises:
            RequestError: The deadline passed. The row may be tried again.
        """
        clock = asyncio.get_running_loop().time
        wait, usage = _Wait(what, row, clock()), self._usage.setdefault(of, _Usage())
        self._waits[wait] = None
        usage.change(wait.begin, 1)
        try:
            async with asyncio.timeout(self.deadline) as limit:
                return await answer
        except TimeoutError as error:
            if not limit.expired():
                raise
            who = "A row" if row is None else f"Row {row!r}"
            raise RequestError(
                f"{who} got nothing from {what} within {self.deadline:g} s. Look at its log; if it only needs "
                "longer, raise request_timeout.",
                retryable=True,
            ) from error
        finally:
            del self._waits[wait]
            usage.change(clock(), -1)

    def loads(self) -> dict[str, Load]:
        """Return how much each thing was waited for."""
        return {name: usage.load for name, usage in self._usage.items()}

    def stalled(self, seconds: float) -> str | None:
        """Return what is waited for, where nothing came for so many seconds; else ``None``."""
        now = asyncio.get_running_loop().time()
        if now - max((wait.begin for wait in self._waits), default=float("inf")) < seconds:
            return None
        counts = Counter(wait.what for wait in self._waits)
        oldest = next(iter(self._waits))
        named = ", ".join(f"{what} ({count} row{'s' * (count > 1)})" for what, count in counts.most_common())
        row = "" if oldest.row is None else f", row {oldest.row!r},"
        return f"{named}; the longest{row} since {now - oldest.begin:.0f} s"

    def speakers(self, teacher: Speaker, student: Speaker) -> tuple[Speaker, Speaker]:
        """Return metered copies; the same predictor is loaded once, so that the calls of both form batches."""
        if isinstance(student.boundary, BoundaryPredictor) and student.boundary.same_as(teacher.boundary):
            student = copy.copy(student)
            student.boundary = teacher.boundary
        return self.speaker("teacher", teacher), self.speaker("student", student)

    def speaker(self, author: Author, speaker: Speaker) -> Speaker:
        """Return a copy of a speaker whose engine and predictor are metered."""
        metered = copy.copy(speaker)
        metered.engine = cast(Engine, MeteredEngine(speaker.engine, author, self))
        if speaker.boundary is not None:
            metered.boundary = cast(BoundaryPredictor, MeteredPredictor(speaker.boundary, author, self))
        return metered


class MeteredEngine:
    """An engine whose requests are metered; all else is the engine's own.

    Each request, and each piece of a stream, may fail with a :class:`RequestError` as its deadline passes.
    """

    def __init__(self, engine: Engine, author: Author, meter: Meter) -> None:
        self._engine, self._meter = engine, meter
        self._wait = partial(meter.wait, what=f"the {author} {engine.model!r}", of=author)
        self._shown: dict[str, int] = {}  # how many ids of a row the engine has had

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    async def complete(self, request: Request) -> Completion:
        """Ask the engine."""
        new = self._new_tokens(request)
        return self._count(await self._wait(self._engine.complete(request), row=request.row), new)

    async def stream(self, request: Request) -> AsyncGenerator[Completion, None]:
        """Ask the engine; the deadline is that of each piece."""
        new = self._new_tokens(request)
        async with aclosing(self._engine.stream(request)) as pieces:
            while (piece := await self._wait(anext(pieces, None), row=request.row)) is not None:
                yield self._count(piece, new)

    def release(self, row: str) -> None:
        """Forget a row that has ended."""
        self._shown.pop(row, None)
        self._engine.release(row)

    def _new_tokens(self, request: Request) -> int:
        length = len(request.prompt_ids)
        new = length - self._shown.get(request.row, 0)
        self._shown[request.row] = length
        return max(0, new)

    def _count(self, completion: Completion, new: int) -> Completion:
        recomputed = (completion.uncached_prompt_tokens or 0) - new - CACHE_GRAIN
        self._meter.recomputed_tokens += max(0, recomputed)
        return completion


class MeteredPredictor:
    """A boundary predictor whose requests are metered; all else is the predictor's own."""

    def __init__(self, predictor: BoundaryPredictor, author: Author, meter: Meter) -> None:
        self._predictor, self._meter = predictor, meter
        self._what = f"the {author} boundary predictor"

    def __getattr__(self, name: str) -> Any:
        return getattr(self._predictor, name)

    async def labels(self, window: Sequence[int], since: int = 0) -> Sequence[bool]:
        """Ask the predictor; raise a :class:`RequestError` as the deadline passes."""
        return await self._meter.wait(self._predictor.labels(window, since), self._what, of="predictors")
