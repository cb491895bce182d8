"""What an author's engine is asked in one row: its next tokens, as chunks or as a stream, and the final answer.

Knows nothing of words or of whose turn it is.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Collection

from tessy_hf.engines.base import Completion, Measure, Request, derive_seed
from tessy_hf.errors import RequestError
from tessy_hf.method.row import Row
from tessy_hf.method.speaker import Speaker
from tessy_hf.trajectory import Author, Part


class Asking:
    """An author's requests in one row.

    Args:
        author: Who.
        speaker: Its engine; started.
        row: What it shares with the other author.
        needs: What is to be measured of its thinking.

    Attributes:
        candidate: Which of several texts it writes; each but the first has a seed of its own.
    """

    def __init__(self, author: Author, speaker: Speaker, row: Row, needs: Collection[Measure]) -> None:
        self._author, self._speaker, self._row, self._needs = author, speaker, row, needs
        self._view = row.transcript.views[author]
        self._stream: AsyncGenerator[Completion, None] | None = None
        self.candidate = 0

    async def next_tokens(self) -> Completion | None:
        """Return the author's next tokens: of the stream that is its turn, or a chunk; ``None`` for a full context."""
        if self._stream is not None:
            piece = await anext(self._stream, None)
            if piece is not None:
                return self._count(piece)
            await self.close_stream()  # it gave all that was asked for
        plan, engine = self._row.plan, self._speaker.engine
        k = self._row.chunk_sizes.next(self._author, self._view.turn_tokens)
        streams = plan.alternates and plan.stream and engine.streams
        left = self._row.limits.tokens_left - self._view.tentative_tokens
        request = self._request("thinking", k if plan.alternates and not streams else max(left, k))
        if request is None:
            return None
        if not streams:
            return self._count(await engine.complete(request))
        self._stream = engine.stream(request)
        return await self.next_tokens()

    async def answer(self, max_tokens: int) -> Completion | None:
        """Return the final answer, of at most so many tokens; ``None`` where there is no room for one."""
        request = self._request("answer", max_tokens)
        return request and self._count(await self._speaker.engine.complete(request))

    async def close_stream(self) -> None:
        """Break the stream off, where there is one."""
        if self._stream is not None:
            stream, self._stream = self._stream, None
            await stream.aclose()

    def _request(self, part: Part, max_tokens: int) -> Request | None:
        """Return what to ask of the engine; ``None`` where the context is full."""
        ids, row = self._view.ids, self._row
        room = min(max_tokens, self._speaker.engine.context_length - len(ids))
        if room <= 0:
            return None
        needs = self._needs if part == "thinking" else ()
        return Request(
            row=row.prompt.key,
            order=row.prompt.order,
            part=part,
            prompt_ids=ids,
            max_tokens=room,
            seed=derive_seed(row.prompt.seed, "turn", self.candidate) if self.candidate else row.prompt.seed,
            stop_ids=self._speaker.end_ids if part == "thinking" else self._speaker.vocabulary.special_ids,
            **row.plan.sampling[self._author]._asdict(),
            logprobs="logprobs" in needs,
            entropies="entropies" in needs,
        )

    def _count(self, completion: Completion) -> Completion:
        if not len(completion.token_ids) and completion.stop_id is None:
            raise RequestError(
                f"Row {self._row.prompt.key!r}: the {self._author} {self._speaker.engine.model!r} wrote nothing and "
                "gave no reason. At least one token was expected; look at the engine's log."
            )
        self._row.trajectory.generated[self._author] += len(completion.token_ids)
        return completion
