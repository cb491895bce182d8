"""A final answer told while it is written: an engine goes in, the same engine comes out, whose answers are streams.

Knows no HTTP. Only for rows that somebody watches: a stream costs an engine more than one request.
"""

from __future__ import annotations

import copy
from array import array
from collections.abc import Callable
from contextlib import aclosing
from typing import Any, cast

from tessy_hf.engines.base import Completion, Engine, Request
from tessy_hf.method.speaker import Speaker


def with_live_answer(speaker: Speaker, tell: Callable[[str], None]) -> Speaker:
    """Return a copy of a speaker; ``tell`` is called with the answer so far, whenever it has grown."""
    told = copy.copy(speaker)
    told.engine = cast(Engine, _LiveAnswers(speaker, tell))
    return told


class _LiveAnswers:
    """An engine that takes answers as streams; all else is the engine's own."""

    def __init__(self, speaker: Speaker, tell: Callable[[str], None]) -> None:
        self._engine, self._speaker, self._tell = speaker.engine, speaker, tell

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    async def complete(self, request: Request) -> Completion:
        """Ask the engine, for an answer piece by piece."""
        if request.part != "answer" or not self._engine.streams:
            return await self._engine.complete(request)
        ids, stop_id, uncached, before = array("i"), None, None, list(request.prompt_ids[-1:])
        async with aclosing(self._engine.stream(request)) as pieces:
            async for piece in pieces:
                uncached = piece.uncached_prompt_tokens if not ids else uncached
                ids.extend(piece.token_ids)
                stop_id = piece.stop_id
                # White space may be the end, and half of a character is not one yet.
                self._tell(self._speaker.vocabulary.decode(ids, before).rstrip("\ufffd").strip())
        return Completion(ids, stop_id, uncached)
