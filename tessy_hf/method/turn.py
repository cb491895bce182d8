"""One author of a row: what its engine is asked, where its kind of text ends, what of its text is kept.

Token ids come from the engine, words go to the boundary predictor, kept text goes out; :mod:`.alternation` says whose
turn it is. Knows nothing of datasets, HTTP, retries or waiting.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import AsyncGenerator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager

from tessy_hf.errors import PromptError, RequestError
from tessy_hf.method.asking import Asking
from tessy_hf.method.chunk import LOOKBACK, Chunk, Marks
from tessy_hf.method.chunk_size import ChunkSizes
from tessy_hf.method.limits import Limits, LoopDetector
from tessy_hf.method.row import Row
from tessy_hf.method.rules import rule_of
from tessy_hf.method.speaker import Speaker
from tessy_hf.plan import Plan
from tessy_hf.text.transcript import TokenList, Transcript
from tessy_hf.trajectory import Author, Ending, Prompt, Trajectory

Speakers = Mapping[Author, Speaker]
Turns = dict[Author, "Turn"]


@asynccontextmanager
async def open_turns(
    prompt: Prompt, speakers: Speakers, plan: Plan, y: Trajectory
) -> AsyncGenerator[dict[Author, Turn]]:
    """Render the prompt for all who write, and restore what an earlier attempt kept.

    Raises:
        PromptError: A template refuses the prompt, or it leaves no room in a model's context.
    """
    if "student" not in plan.writers:
        speakers["student"].open_turn(prompt.messages, prompt.tools)  # it is trained on the row, tools included
    views = {author: _open_view(author, speakers[author], prompt) for author in sorted(plan.writers)}
    reads = plan.alternates and rule_of(plan).reads_predictors
    predictors = [s.boundary for s in speakers.values() if reads and s.boundary is not None]
    counter = speakers["student"].vocabulary
    transcript = Transcript(views, [counter, *(predictor.vocabulary for predictor in predictors)])
    limits = Limits(plan.max_thinking_tokens, transcript.reader(counter))
    sizes = ChunkSizes(plan.chunk_tokens)
    for span in y.spans:
        transcript.restore(span.text)
        limits.restore(span.text)
        if span.author in views and plan.chunk_tokens is None:
            sizes.observe(span.author, len(views[span.author].vocabulary.encode(span.text).ids))
    thinks = speakers["student"].thinking_format.thinks
    row = Row(prompt, plan, y, transcript, limits, sizes, _marks(speakers), thinks, speakers)
    async with AsyncExitStack() as stack:
        turns = {author: Turn(author, speakers[author], row) for author in views}
        for turn in turns.values():
            stack.push_async_callback(turn.close_stream)
        yield turns


def _marks(speakers: Speakers) -> Marks:
    patterns = (speakers[author].thinking_format.final_answer for author in ("student", "teacher"))
    pattern = next(filter(None, patterns), None)
    ends = (marker for speaker in speakers.values() for marker in speaker.text_markers)
    return Marks(tuple(ends), re.compile(pattern) if pattern else None)


def _open_view(author: Author, speaker: Speaker, prompt: Prompt) -> TokenList:
    ids, tail = speaker.open_turn(prompt.messages, prompt.tools)
    if len(ids) >= speaker.engine.context_length:
        raise PromptError(
            f"Row {prompt.key!r}: the prompt has {len(ids)} tokens for the {author} {speaker.engine.model!r}, whose "
            f"context holds {speaker.engine.context_length}. Shorten or filter such prompts, or serve the model with "
            "a longer context."
        )
    return TokenList(speaker.vocabulary, ids, tail)


class Turn:
    """An author's turns in one row: one after another, each from a hand-over to the next.

    Args:
        author: Who.
        speaker: Its engine, predictor and thinking format; started.
        row: What it shares with the other author.
    """

    def __init__(self, author: Author, speaker: Speaker, row: Row) -> None:
        self._author, self._speaker, self._row = author, speaker, row
        self._view = row.transcript.views[author]
        self._rule = rule_of(row.plan)
        self._judge = self._rule.judge(author, row) if row.plan.alternates else None
        self._asking = Asking(author, speaker, row, self._rule.needs(author) if row.plan.alternates else ())
        self.close_stream = self._asking.close_stream
        self._must_keep = False  # a word of the other kind, the turn's first; what follows is not read
        self._measured: tuple[list[float], list[float]] = [], []  # log-probabilities and entropies of its turn

    # --- line 8

    async def write(self) -> Chunk:
        """Let the author write on; return all of its text that is not settled yet.

        Raises:
            RequestError: The engine failed for good.
            EngineDeadError: The engine is gone.
        """
        return await (self._rule.write(self, self._author, self._row) if self._judge is not None else self.go_on())

    async def go_on(self) -> Chunk:
        """Ask the author for more; see :meth:`write`."""
        completion = await self._asking.next_tokens()
        if completion is None:
            return Chunk(full=True)
        self._view.push(completion.token_ids)
        for values, more in zip(self._measured, (completion.logprobs, completion.entropies), strict=True):
            values.extend(more or ())
        text, ends = self._view.tentative()
        row, stopped = self._row, completion.stop_id is not None
        whole = not (row.row_thinks or self._speaker.thinking_format.thinks)
        kept = row.trajectory.last_text(LOOKBACK if row.marks.final_answer else 1)
        ahead = self._judge.lookahead if self._judge is not None else 0
        chunk = Chunk.read(text, ends, row.marks, kept=kept, stopped=stopped, whole=whole, lookahead=ahead)
        logprobs, entropies = (values[len(values) - len(ends) :] for values in self._measured)
        return chunk._replace(logprobs=logprobs, entropies=entropies)

    async def candidate(self, number: int, words: int) -> tuple[Chunk, array[int]]:
        """Write a turn of at least some words; return it and its tokens, which are taken back."""
        self._row.trajectory.discarded[self._author] += self._view.drop()
        self._asking.candidate = number
        chunk, left = await self.go_on(), self._row.limits.tokens_left
        while not (chunk.closed or chunk.full or chunk.complete > words or self._view.tentative_tokens >= left):
            chunk = await self.go_on()
        self._asking.candidate, ids = 0, self._view.ids[self._view.committed :]
        self._view.drop()
        await self.close_stream()
        return chunk, ids

    def choose(self, ids: array[int], dropped: int) -> None:
        """Take a candidate's tokens as what the author wrote; others had ``dropped`` tokens."""
        self._view.push(ids)
        self._row.trajectory.discarded[self._author] += dropped

    # --- line 9

    async def boundary(self, chunk: Chunk) -> int | None:
        """Return the index of the first word that is the other author's to write; ``None`` where none is."""
        if self._judge is None:
            return None
        other = await self._judge.first_of_other_kind(chunk)
        empty = self._row.trajectory.turn_is_empty and self._rule.keeps_a_word
        self._must_keep = other == 0 and empty  # an author that took over keeps at least one word
        if self._must_keep:
            if chunk.complete:
                return 1
            self._judge.restart()  # judge it again when it is complete
            return None
        return other

    def limit(self, chunk: Chunk, boundary: int | None) -> tuple[int, Ending | None]:
        """Return how many words before the boundary the limits allow, and how the row ends if they end it."""
        waits = self._judge is not None and self._judge.waits
        return self._row.limits.apply(chunk, boundary, waits=waits, must_keep=self._must_keep)

    # --- lines 10, 11

    async def keep(self, chunk: Chunk, count: int, *, boundary: int | None, ends: bool) -> str:
        """Keep the first words of a chunk and return their text.

        Args:
            chunk: The author's text.
            count: How many words to keep.
            boundary: Where the other author takes over, for :class:`ChunkSizes`; ``None`` where it does not.
            ends: Whether the turn ends: the rest of the chunk is rolled back. Else only what ends where a token ends
                is settled, and the rest stays for the next chunk.
        """
        if not ends:
            return self._settle(chunk, chunk.aligned(count), count)
        if boundary is not None:
            self._row.chunk_sizes.observe(
                self._author, self._view.turn_tokens - chunk.tokens_after(count + chunk.lookahead)
            )
        text = chunk.upto(count)
        dropped = self._row.transcript.cut(self._author, chunk.ends, chunk.end(count), text)
        self._row.trajectory.discarded[self._author] += dropped
        self._row.limits.settle(None)
        for values in self._measured:
            values.clear()
        if self._judge is not None:
            self._judge.restart()
        await self.close_stream()
        return text

    def _settle(self, chunk: Chunk, aligned: int, count: int) -> str:
        text = chunk.upto(aligned)
        self._row.limits.settle(aligned)
        self._row.trajectory.turn_words += aligned
        if self._judge is not None:
            self._judge.settle(aligned)
        if aligned:
            self._row.transcript.commit(self._author, chunk.ends, chunk.end(aligned), text)
        return text

    # --- lines 21, 22

    async def answer(self) -> tuple[str, Ending]:
        """Close the thinking and write the final answer; return its text and how it ended.

        Raises:
            RequestError: The engine failed for good, or the row would have no text at all.
            EngineDeadError: The engine is gone.
        """
        row = self._row
        text, ending = ("", Ending("stop")) if row.trajectory.whole else await self._final_answer()
        if not text and not row.trajectory.spans:
            raise RequestError(
                f"Row {row.prompt.key!r}: the {self._author} {self._speaker.engine.model!r} ended at once: it wrote "
                "neither thinking nor answer. Text was expected; look at the prompt and at the chat template."
            )
        return text, ending

    async def _final_answer(self) -> tuple[str, Ending]:
        speaker, view, row = self._speaker, self._view, self._row
        before, marker_ids = speaker.closing
        view.append(before)
        view.ids.extend(marker_ids)
        most = row.answer_tokens
        room = speaker.engine.context_length - len(view.ids)
        completion = await self._asking.answer(most)
        if completion is None:
            return "", Ending("length", "context" if most > 0 else "answer")
        text = self._as_answer(speaker.vocabulary.decode(completion.token_ids, view.ids[-1:]))
        if completion.stop_id is not None:
            return text, Ending("stop")
        if LoopDetector().feed(text) is not None:
            return text, Ending("repetition")
        return text, Ending("length", "answer" if most <= room else "context")

    def _as_answer(self, text: str) -> str:
        """Return an answer as the row has it: without white space around it, but for what parts it from the thinking.

        A row that marks its thinking has that in the mark.
        """
        answer = text.strip()
        if not answer or self._row.row_thinks or not self._row.trajectory.spans:
            return answer
        own = text[: len(text) - len(text.lstrip())]
        return ("\n\n" if self._speaker.thinking_format.thinks else own) + answer
