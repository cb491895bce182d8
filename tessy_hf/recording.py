"""What a pilot's rows asked of the engines, and how long each request took: engines that are watched from outside.

Two speakers go in, the same two come out with engines that note each request. A normal run has none of this. Knows
nothing of what the notes are for; :mod:`tessy_hf.simulate` reads them.
"""

from __future__ import annotations

import asyncio
import copy
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, NamedTuple

from tessy_hf.engines.base import Completion, Engine, Request
from tessy_hf.errors import SettingsError
from tessy_hf.speaker import Speaker
from tessy_hf.trajectory import Author


class Visit(NamedTuple):
    """One request, or one piece of a stream, as the row saw it.

    Attributes:
        order: The row's place in the run.
        author: Whose engine was asked.
        begin: When it was asked, in seconds.
        end: When the answer was there.
        tokens: How many tokens the engine generated, the one that stopped it included.
        read: How many ids of the prompt were new to the engine; a guess where it does not say.
    """

    order: int
    author: Author
    begin: float
    end: float
    tokens: int
    read: int


class Recorder:
    """The notes of one pilot.

    Attributes:
        visits: In the order in which they ended.
        replicas: Among how many replicas each author's requests were spread.
    """

    def __init__(self) -> None:
        self.visits: list[Visit] = []
        self.replicas: dict[Author, int] = {"teacher": 1, "student": 1}
        self._clock: tuple[float, float] | None = None

    @property
    def processor(self) -> float:
        """Seconds of processor time that the event loop's thread took from the first note to the last."""
        return self._clock[1] - self._clock[0] if self._clock else 0.0

    def clear(self) -> None:
        """Forget what was noted so far."""
        self.visits, self._clock = [], None

    def note(self, visit: Visit) -> None:
        """Keep a visit. Called on the loop's thread."""
        now = time.thread_time()
        self._clock = (self._clock[0] if self._clock else now, now)
        self.visits.append(visit)

    def watch(self, teacher: Speaker, student: Speaker) -> tuple[Speaker, Speaker]:
        """Return the speakers with watched engines.

        Raises:
            SettingsError: They are one engine, whose time cannot be told apart.
        """
        if teacher.engine is student.engine:
            raise SettingsError(
                f"Teacher and student are one engine, {teacher.engine.model!r}: its replicas cannot be shared out "
                "between them. Describe two engines to have them simulated."
            )
        return self._watched("teacher", teacher), self._watched("student", student)

    def _watched(self, author: Author, speaker: Speaker) -> Speaker:
        self.replicas[author] = getattr(speaker.engine, "replicas", 1)
        watched = copy.copy(speaker)
        watched.engine = Watched(speaker.engine, author, self)
        return watched


class Watched:
    """An engine whose requests are noted; all else is the engine's own.

    Args:
        engine: The engine.
        author: Whose it is.
        recorder: Where to note.
    """

    def __init__(self, engine: Engine, author: Author, recorder: Recorder) -> None:
        self._engine, self._author, self._recorder = engine, author, recorder
        self._seen: dict[int, int] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    async def complete(self, request: Request) -> Completion:
        """Ask the engine."""
        begin = asyncio.get_running_loop().time()
        completion = await self._engine.complete(request)
        self._note(request, completion, begin)
        return completion

    async def stream(self, request: Request) -> AsyncGenerator[Completion, None]:
        """Ask the engine; each piece is a visit."""
        async with aclosing(self._engine.stream(request)) as pieces:
            while True:
                begin = asyncio.get_running_loop().time()
                piece = await anext(pieces, None)
                if piece is None:
                    return
                self._note(request, piece, begin)
                yield piece

    def _note(self, request: Request, completion: Completion, begin: float) -> None:
        read, length = completion.prompt_tokens_read, len(request.prompt_ids)
        if read is None:
            read = max(0, length - self._seen.get(request.order, 0))
        self._seen[request.order] = length
        tokens = len(completion.token_ids) + (completion.stop_id is not None)
        self._recorder.note(Visit(request.order, self._author, begin, asyncio.get_running_loop().time(), tokens, read))
