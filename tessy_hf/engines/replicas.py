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
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from tessy_hf.engines.connections import ReplicaError
from tessy_hf.errors import RequestError
from tessy_hf.retries import RetryPolicy

if TYPE_CHECKING:
    from tessy_hf.engines.completions_api import Protocol

MOVE_SECONDS = 2.0
"""So long a row waits for its own server rather than go to another one, which would have to read its prompt again."""

PROBE_SECONDS = 12.0
"""So long a server that was down gets one request at a time: longer than it may take to refuse a connection, but not
as long as it may take to answer."""

BACKOFF = RetryPolicy(first_pause=0.1, longest_pause=10.0)
"""How long a server that failed is left alone."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Service:
    """What a server was found to offer."""

    protocol: Protocol  # how it is asked
    exact: bool  # whether ids go in and come out, so that it can stream
    context_length: int  # most tokens of prompt and completion
    cache_tokens: int | None  # how many its cache holds, where it tells


@dataclass(eq=False)
class Replica:
    """One server: its rows, its turns, and until when it is left alone."""

    url: str
    service: Service
    most: int  # requests at once
    rows: int = 0
    down: bool = False  # whether nothing served there when it was last asked
    error: ReplicaError | None = None  # how it was found to be down or busy when it was last asked
    failing_since: float = 0.0  # when it began to be so, by time.monotonic()

    def __post_init__(self) -> None:
        self._waiting: deque[asyncio.Future[int | None]] = deque()
        self._running = self._turns = self._turns_at_failure = self._failures = 0
        self._limit, self._closed_until, self._probing = float(self.most), 0.0, False
        self._timer: asyncio.TimerHandle | None = None

    @property
    def pause(self) -> float:
        """For how many more seconds it is left alone."""
        return max(0.0, self._closed_until - time.monotonic())

    async def enter(self) -> int | None:
        """Wait for a turn; return its number, or ``None`` where the row is to be routed again."""
        if not self._waiting and self._open:
            return self._begin()
        turn: asyncio.Future[int | None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            return await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled() and (number := turn.result()) is not None:
                self.leave(number)
            raise

    def leave(self, turn: int, *, answered: bool = False) -> None:
        """End a turn; a request that was answered lets a little more be asked at once."""
        self._running -= 1
        if answered:
            self._limit = min(float(self.most), self._limit + 1 / self._limit)
        if turn > self._turns_at_failure:
            self._probing = False
        self._admit()

    def answered(self, turn: int) -> None:
        """Note an answer to a request: the server serves."""
        if turn > self._turns_at_failure:  # requests sent before the last failure say nothing new
            self.down, self.error, self._failures = False, None, 0
            self._reopen()

    def failed(self, turn: int, error: ReplicaError) -> None:
        """Leave the server alone for a while, or ask it for half as much at once, where it is down or busy.

        Requests sent before the last failure say nothing new.
        """
        if turn <= self._turns_at_failure:
            return
        self.failing_since = self.failing_since if self.error is not None else time.monotonic()
        self.error, self._failures, self._turns_at_failure = error, self._failures + 1, self._turns
        if error.kind == "busy":
            self._limit = max(1.0, self._limit / 2)
        self.down, self._probing = error.kind == "down", False
        pause = BACKOFF.pause(self._failures, error)
        self._closed_until = time.monotonic() + pause
        self._after(pause, self._reopen)

    def turn_away(self) -> None:
        """Let the rows that wait for a turn be routed again."""
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)

    @property
    def _open(self) -> bool:
        return self._running < max(1, int(self._limit)) and not (self.pause or (self.down and self._probing))

    def _begin(self) -> int:
        self._running, self._turns = self._running + 1, self._turns + 1
        self._probing = self.down  # one request finds out whether it serves again
        if self._probing:
            self._after(PROBE_SECONDS, self._serves)
        return self._turns

    def _after(self, seconds: float, then: Callable[[], None]) -> None:
        """Do something later, in place of what was to be done."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(seconds, then)

    def _serves(self) -> None:
        self.down = self._probing = False
        self._admit()

    def _reopen(self) -> None:
        self._closed_until = 0.0
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
    answered: Callable[[], None]  # to be called while parts of the answer arrive; the turn's end tells by itself


class Replicas:
    """The servers there are now, and which of them has which row.

    Once all are down or busy, none of them may answer for ``outage_seconds`` before rows are given up.
    """

    def __init__(self, outage_seconds: float) -> None:
        self._all: list[Replica] = []
        self._homes: dict[str, Replica] = {}
        self._outage_seconds = outage_seconds
        self._idle_until = 0.0
        self.answered_at = 0.0  # when any of them last answered well, by time.monotonic()
        self.missed = asyncio.Event()  # set when one is found to be down

    def __iter__(self) -> Iterator[Replica]:
        return iter(self._all)

    def __len__(self) -> int:
        return len(self._all)

    @property
    def pause(self) -> float:
        """Seconds until the first of them may be asked again."""
        return min((replica.pause for replica in self._all), default=0.0)

    @property
    def given_up(self) -> bool:
        """Whether all of them are down or busy and have been for too long, pauses that have begun included."""
        since = max(self.answered_at, self._idle_until, *(replica.failing_since for replica in self._all))
        too_long = time.monotonic() + self.pause - since > self._outage_seconds
        return too_long and all(replica.error for replica in self._all)

    def idle(self) -> None:
        """Note that no row has been asking: the time until now was no outage."""
        self._idle_until = time.monotonic()

    @property
    def exact(self) -> bool:
        """Whether all of them take and give ids."""
        return all(replica.service.exact for replica in self._all)

    @property
    def cache_tokens(self) -> int | None:
        """How many tokens their caches hold together, where all of them tell."""
        known = [replica.service.cache_tokens or 0 for replica in self._all]
        return sum(known) if known and all(known) else None

    def change(self, replicas: Sequence[Replica]) -> None:
        """Replace the servers: those that are gone finish what they have; rows that wait are routed again."""
        before, self._all = self._all, list(replicas)
        for replica in before:
            if replica not in self._all or replica.pause:
                replica.turn_away()

    @asynccontextmanager
    async def turn(self, row: str) -> AsyncIterator[Turn]:
        """Wait for a turn at the row's server; where the request fails in it, the next one may be elsewhere."""
        replica, number = await self._enter(row)
        answered = well = False
        try:
            yield Turn(replica.url, replica.service, partial(self._answered, replica, number))
            answered = well = True
        except ReplicaError as error:
            self._failed(row, replica, number, error)
            answered = error.kind == "invalid"
            raise
        except RequestError:
            answered = well = True
            raise
        finally:
            if answered:
                self._answered(replica, number, well)
            replica.leave(number, answered=answered)

    def release(self, row: str) -> None:
        """Forget which server has a row."""
        if (home := self._homes.pop(row, None)) is not None:
            home.rows -= 1

    async def _enter(self, row: str) -> tuple[Replica, int]:
        """Wait for a turn at the row's server, or at another where it has none, or one that went or is left alone."""
        while True:
            replica = self._homes.get(row)
            if replica is None or replica not in self._all or self._away(replica):
                replica = self._place(row)
            if replica.error is not None and replica.pause and self.given_up:
                raise ReplicaError(str(replica.error), replica.error.kind, 0.0)
            if (number := await replica.enter()) is not None:
                return replica, number

    def _answered(self, replica: Replica, turn: int, well: bool = True) -> None:
        was_down, self.answered_at = replica.down, time.monotonic() if well else self.answered_at
        replica.answered(turn)
        if was_down and not replica.down:
            logger.info("The server at %s serves again.", replica.url)
            for other in self._all:
                if other.pause:
                    other.turn_away()

    def _failed(self, row: str, replica: Replica, turn: int, error: ReplicaError) -> None:
        if error.kind in ("lost", "invalid"):
            self._place(row, avoid=replica)
            return
        was_down = replica.down
        replica.failed(turn, error)
        error.retry_after = 0.0  # the server is left alone; others may be asked at once
        if replica.down:
            self.missed.set()
        if self.given_up:
            for each in self._all:
                each.turn_away()
        elif self._away(replica):
            replica.turn_away()
        if replica.down and not was_down and not all(each.down for each in self._all):
            logger.warning("%s Its rows go to the other servers until it serves again.", error)

    def _away(self, replica: Replica) -> bool:
        """Whether a server's rows had better go to another one."""
        if not replica.pause:
            return False
        best = self.pause
        return replica.pause - best > (0.0 if replica.down and not best else MOVE_SECONDS)

    def _place(self, row: str, avoid: Replica | None = None) -> Replica:
        """Give a row one of the servers with the fewest rows."""
        others = [replica for replica in self._all if replica is not avoid] or self._all
        there = [replica for replica in others if not self._away(replica)] or others
        name = row.encode("utf-8", "surrogatepass")
        self.release(row)
        home = min(there, key=lambda one: (one.rows, zlib.crc32(name, zlib.crc32(one.url.encode()))))
        home.rows += 1
        self._homes[row] = home
        return home
