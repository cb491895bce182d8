"""The servers of a model: which one serves a row, how many requests at once, which are left alone, come or go.

A row's key goes in; a turn at a server comes out. A row stays with its server, for that server's prefix cache, until
it fails the row; a new row goes to the server with the fewest. Servers that are down or ask for less are left alone as
a whole, so that a run waits for them and not each row by itself. Knows no HTTP library, JSON or retries.
"""

from __future__ import annotations

import asyncio
import logging
import time
import zlib
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from tessy_hf.engines.connections import ReplicaError
from tessy_hf.errors import RequestError
from tessy_hf.retries import RetryPolicy

if TYPE_CHECKING:
    from tessy_hf.engines.completions_api import Protocol

MOVE_SECONDS = 2.0
"""So long a row waits for its own server rather than go to another one, which would have to read its prompt again."""

BACKOFF = RetryPolicy(first_pause=0.1, longest_pause=10.0)
"""How long a server that failed is left alone."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Service:
    """What a server was found to offer.

    Attributes:
        protocol: How it is asked.
        exact: Whether ids go in and come out, so that it can stream.
        context_length: Most tokens of prompt and completion.
        cache_tokens: How many tokens its cache holds, where it tells.
    """

    protocol: Protocol
    exact: bool
    context_length: int
    cache_tokens: int | None


@dataclass(eq=False)
class Replica:
    """One server: its rows, its turns, and until when it is left alone."""

    url: str
    service: Service
    most: int
    rows: set[str] = field(default_factory=set)
    down: bool = False
    _limit: float = field(init=False)
    _running: int = 0
    _probing: bool = False
    _waiting: deque[asyncio.Future[float | None]] = field(default_factory=deque)
    _failures: int = 0
    _failed_at: float = 0.0
    _closed_until: float = 0.0
    _timer: asyncio.TimerHandle | None = None

    def __post_init__(self) -> None:
        self._limit = float(self.most)

    @property
    def pause(self) -> float:
        """For how many more seconds it is left alone."""
        return max(0.0, self._closed_until - time.monotonic())

    async def enter(self) -> float | None:
        """Wait for a turn.

        Returns:
            When it began, for :meth:`leave`; ``None`` where the row is to be routed again.
        """
        if not self._waiting and self._open:
            return self._begin()
        turn: asyncio.Future[float | None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            return await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled() and (entered := turn.result()) is not None:
                self.leave(entered)
            raise

    def leave(self, entered: float, *, answered: bool = False) -> None:
        """End a turn; a request that was answered lets a little more be asked at once."""
        self._running -= 1
        if answered:
            self._limit = min(float(self.most), self._limit + 1 / self._limit)
        if entered > self._failed_at:
            self._probing = False
        self._admit()

    def answered(self, entered: float) -> None:
        """Note an answer to a request: the server serves."""
        if entered > self._failed_at:  # requests sent before the last failure say nothing new
            self.down, self._failures = False, 0
            self._reopen()

    def failed(self, entered: float, error: ReplicaError) -> None:
        """Leave the server alone for a while, or ask it for half as much at once, where it is down or busy.

        Requests sent before the last failure say nothing new.
        """
        if entered <= self._failed_at:
            return
        self._failures, self._failed_at = self._failures + 1, time.monotonic()
        if error.kind == "busy":
            self._limit = max(1.0, self._limit / 2)
        self.down, self._probing = error.kind == "down", False
        pause = BACKOFF.pause(self._failures, error)
        self._closed_until = self._failed_at + pause
        self.stop_timer()
        self._timer = asyncio.get_running_loop().call_later(pause, self._reopen)

    def turn_away(self) -> None:
        """Let the rows that wait for a turn be routed again."""
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)

    def stop_timer(self) -> None:
        """Forget the end of the pause."""
        if self._timer is not None:
            self._timer.cancel()

    @property
    def _open(self) -> bool:
        most = self._running < max(1, int(self._limit)) and not (self.down and self._probing)
        return most and not self.pause

    def _begin(self) -> float:
        self._running += 1
        self._probing = self.down  # one request finds out whether it serves again
        return time.monotonic()

    def _reopen(self) -> None:
        self._closed_until = 0.0
        self.stop_timer()
        self._admit()

    def _admit(self) -> None:
        while self._waiting and self._open:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(self._begin())


@dataclass(frozen=True)
class Turn:
    """A turn at a server: where to send one request to."""

    url: str
    service: Service
    answered: Callable[[], None]
    """To be called while parts of the answer arrive; the end of the turn tells by itself."""


class Replicas:
    """The servers there are now, and which of them has which row.

    Attributes:
        answered_at: When any of them last answered, by ``time.monotonic()``; 0 before.
        missed: Set when one is found to be down.
    """

    def __init__(self) -> None:
        self._all: list[Replica] = []
        self._homes: dict[str, Replica] = {}
        self.answered_at = 0.0
        self.missed = asyncio.Event()

    def __iter__(self) -> Iterator[Replica]:
        return iter(self._all)

    def __len__(self) -> int:
        return len(self._all)

    @property
    def pause(self) -> float:
        """Seconds until the first of them may be asked again."""
        return min((replica.pause for replica in self._all), default=0.0)

    @property
    def all_down(self) -> bool:
        """Whether none serves."""
        return all(replica.down for replica in self._all)

    @property
    def exact(self) -> bool:
        """Whether all of them take and give ids."""
        return all(replica.service.exact for replica in self._all)

    @property
    def cache_tokens(self) -> int | None:
        """How many tokens their caches hold together, where all of them tell."""
        known = [replica.service.cache_tokens for replica in self._all]
        return sum(one or 0 for one in known) if known and all(known) else None

    def change(self, replicas: Sequence[Replica]) -> None:
        """Replace the servers: those that are gone finish what they have; rows that wait are routed again."""
        before, self._all = self._all, list(replicas)
        for replica in before:
            if replica not in self._all or replica.pause:
                replica.turn_away()

    @asynccontextmanager
    async def turn(self, row: str) -> AsyncIterator[Turn]:
        """Wait for a turn at the row's server; where the request fails in it, the next one may be elsewhere."""
        replica, entered = await self._enter(row)
        answered = False
        try:
            yield Turn(replica.url, replica.service, partial(self._answered, replica, entered))
            answered = True
        except ReplicaError as error:
            self._failed(row, replica, entered, error)
            answered = error.kind == "invalid"
            raise
        except RequestError:
            answered = True
            raise
        finally:
            if answered:
                self._answered(replica, entered)
            replica.leave(entered, answered=answered)

    def release(self, row: str) -> None:
        """Forget which server has a row."""
        home = self._homes.pop(row, None)
        if home is not None:
            home.rows.discard(row)

    def close(self) -> None:
        """End all pauses."""
        for replica in self._all:
            replica.stop_timer()

    async def _enter(self, row: str) -> tuple[Replica, float]:
        while True:
            replica = self._route(row)
            if (entered := await replica.enter()) is not None:
                return replica, entered

    def _answered(self, replica: Replica, entered: float) -> None:
        was_down, self.answered_at = replica.down, time.monotonic()
        replica.answered(entered)
        if was_down and not replica.down:
            logger.info("The server at %s serves again.", replica.url)
            for other in self._all:
                if other.pause:
                    other.turn_away()

    def _failed(self, row: str, replica: Replica, entered: float, error: ReplicaError) -> None:
        if error.kind in ("lost", "invalid"):
            self._place(row, avoid=replica)
            return
        was_down = replica.down
        replica.failed(entered, error)
        error.retry_after = 0.0  # the server is left alone; others may be asked at once
        if replica.down:
            self.missed.set()
        if self._away(replica):
            replica.turn_away()
        if replica.down and not was_down and not self.all_down:
            logger.warning("%s Its rows go to the other servers until it serves again.", error)

    def _route(self, row: str) -> Replica:
        """Return the row's server, or another where it has none, or one that went or is left alone."""
        home = self._homes.get(row)
        return home if home is not None and home in self._all and not self._away(home) else self._place(row)

    def _away(self, replica: Replica) -> bool:
        """Whether a server's rows had better go to another one."""
        best = self.pause
        return replica.pause - best > (0.0 if replica.down and not best else MOVE_SECONDS)

    def _place(self, row: str, avoid: Replica | None = None) -> Replica:
        """Give a row one of the servers with the fewest rows."""
        others = [replica for replica in self._all if replica is not avoid] or self._all
        there = [replica for replica in others if not self._away(replica)] or others
        name = row.encode("utf-8", "surrogatepass")
        self.release(row)
        home = min(there, key=lambda one: (len(one.rows), zlib.crc32(name, zlib.crc32(one.url.encode()))))
        home.rows.add(row)
        self._homes[row] = home
        return home
