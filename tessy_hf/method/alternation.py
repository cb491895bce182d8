"""THE METHOD: teacher and student write one answer together (TESSY, arXiv 2604.14164, algorithm 1).

A prompt, two speakers and the settings go in, a :class:`~tessy_hf.trajectory.Trajectory` comes out. The student
starts. The current author writes at most k tokens, its boundary predictor says where its kind of text ends, what lies
beyond is rolled back, and the other author takes over. When the thinking is closed, the student writes the final
answer.

Words are judged one by one, each as it stands when the author has written the token with its first letter, and cuts
fall on word ends; so with greedy decoding and a causal predictor the accepted text does not depend on k. Knows nothing
of datasets, HTTP, retries or the Hub.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from itertools import accumulate, groupby
from typing import Literal, NamedTuple

from tessy_hf.boundary.predictor import BoundaryPredictor, window_start
from tessy_hf.engines.base import Completion, Request
from tessy_hf.errors import PromptError, RequestError
from tessy_hf.method.chunk_size import ChunkSizes
from tessy_hf.method.limits import LoopDetector
from tessy_hf.method.speaker import Speaker
from tessy_hf.run.metering import Waits
from tessy_hf.trajectory import Author, FinishReason, Part, Prompt, Span, Trajectory
from tessy_hf.transcript import Preview, TokenList, Transcript
from tessy_hf.vocabulary import words

LONGEST_WORD = 8_192
"""Characters without a space after which a text counts as a degenerate loop."""


@dataclass(frozen=True)
class Plan:
    """Who writes what, and how. The first two fields tell the paper's data recipes apart.

    Attributes:
        thinking: ``alternate`` for TESSY, else the one author of the thinking.
        answer: Who writes the final answer.
        chunk_tokens: k, the most tokens asked of an author at once while alternating; ``None`` to follow the lengths
            of its spans.
        stream: Whether a turn is taken as one stream that is broken off at its boundary, where the engine can.
        temperature: Sampling temperature; 0 is greedy.
        top_p: Nucleus sampling mass.
        max_thinking_tokens: Thinking budget, in the student's tokens.
        max_answer_tokens: Answer budget, in the answering author's tokens.
    """

    thinking: Literal["alternate", "teacher", "student"] = "alternate"
    answer: Author = "student"
    chunk_tokens: int | None = 20
    stream: bool = False
    temperature: float = 0.6
    top_p: float = 1.0
    max_thinking_tokens: int = 32_768
    max_answer_tokens: int = 8_192


_MOST_TOKENS_PER_CHARACTER = 4

CACHE_GRAIN = 256
"""Tokens that an engine may read of a prompt besides what is new: rolled back ones, and a block that is not full."""


class Boundary(NamedTuple):
    """Where the current author's text ends.

    Attributes:
        kept: How many words of the tentative text are the author's kind and complete.
        cut: Whether the text after ``kept`` is the other author's to write.
    """

    kept: int
    cut: bool


async def synthesize(
    prompt: Prompt,
    teacher: Speaker,
    student: Speaker,
    plan: Plan,
    *,
    begun: Trajectory | None = None,
    record: Callable[[Trajectory, Span], None] | None = None,
    waits: Waits | None = None,
) -> Trajectory:
    """Write one row.

    Args:
        prompt: The row's question.
        teacher: The strong model; must be started.
        student: The model to be trained; must be started.
        plan: Who writes what, and how.
        begun: What an earlier attempt kept; the row goes on after it.
        record: Called with each piece of thinking as it is kept.
        waits: Where it is noted what the row waits for, and how long it may.

    Returns:
        The row's trajectory. A prompt that cannot be used or a request that failed for good gives
        ``finish_reason="error"`` with what was kept so far.

    Raises:
        EngineDeadError: An engine is gone; no row can go on.
    """
    trajectory = begun or Trajectory(prompt.key, seed=prompt.seed)
    trajectory.error, trajectory.retryable = None, False
    row = Row(prompt, {"teacher": teacher, "student": student}, plan, trajectory, record, waits or Waits())
    try:
        row.open()
        await _think(row)
        if row.finish is None:
            await _answer(row)
    except (PromptError, RequestError) as error:
        row.end("error", str(error))
        row.trajectory.retryable = isinstance(error, RequestError) and error.retryable
    finally:
        await row.let_go()
        teacher.engine.release(prompt.key)
        student.engine.release(prompt.key)
    return row.trajectory


async def _kinds(predictor: BoundaryPredictor, preview: Preview, places: Mapping[int, int]) -> dict[int, bool]:
    """Return whether words are style, from their tokens. What looks ahead sees nothing before the first token."""
    style: dict[int, bool] = {}
    asked, window = sorted({place for place in places.values() if place >= 0}), predictor.window
    for start, group in groupby(asked, lambda place: window_start(place, window)):
        inside = list(group)
        labels = await predictor.labels(preview.window(start, inside[-1] + 1), inside[0] - start)
        style.update((place, labels[place - inside[0]]) for place in inside)
    return {word: style[place] for word, place in places.items() if place >= 0}


async def _think(row: Row) -> None:
    """Algorithm 1, lines 5 to 20. One author alone is the same loop with nobody to hand over to."""
    first: Author = "student" if row.plan.thinking == "alternate" else row.plan.thinking
    author = row.trajectory.turn = row.trajectory.turn or first  # lines 5, 6
    while not row.trajectory.closed and row.finish is None:  # line 7
        written = await row.write(author)  # line 8
        if written is None:
            return
        boundary = await row.boundary(author, written)  # line 9
        row.keep(author, written, boundary)  # lines 10 to 19
        if row.turn_is_over(author):
            await row.let_go()
        author = row.trajectory.turn


async def _answer(row: Row) -> None:
    """Algorithm 1, lines 21 and 22."""
    author = row.plan.answer
    speaker, view = row.speakers[author], row.transcript.views[author]
    view.append(speaker.dialect.close.partition(speaker.dialect.end_marker)[0])
    view.ids.extend(speaker.close_ids)
    request = row.request(author, "answer", row.plan.max_answer_tokens)
    if request is None:
        return
    async with row.waits_for(author):
        completion = row.count(author, await speaker.engine.complete(request))
    text = speaker.vocabulary.decode(completion.token_ids, view.ids[-1:]).strip()
    row.trajectory.add(author, "answer", text)
    if not row.trajectory.spans:
        raise RequestError(
            f"Row {row.prompt.key!r}: the {author} {speaker.engine.model!r} ended at once: it wrote neither "
            "thinking nor answer. Text was expected; look at the prompt and at the chat template."
        )
    if completion.stop_id is not None:
        row.end("stop")
    else:
        row.end("repetition" if LoopDetector().feed(text) is not None else "length")


class Written(NamedTuple):
    """An author's tentative text: all it wrote that is neither settled nor dropped.

    Attributes:
        text: The text, up to the end of thinking.
        ends: Where each token's text ends in it.
        words: Where each of its words begins and ends.
        begins: Which token has each word's first letter, behind the whitespace.
        spelled: Each word as it was written, the row's first without the whitespace before it.
        closed: Whether the author ended the thinking after it.
    """

    text: str
    ends: list[int]
    words: list[tuple[int, int]]
    begins: list[int]
    spelled: list[str]
    closed: bool

    def beyond(self, word: int) -> int:
        """Return how many tokens come after the one with a word's first letter."""
        return max(0, len(self.ends) - self.begins[word] - 1) if word < len(self.words) else 0

    def part(self, word: int) -> str:
        """Return a word as it stands with its first letter's token, which may hold more than the word."""
        return self.text[self.words[word][0] : self.ends[self.begins[word]]]

    @property
    def complete(self) -> int:
        """How many words have ended."""
        return len(self.words) if self.closed else max(0, len(self.words) - 1)

    @property
    def begun(self) -> int:
        """How many words have their first letter, in a token that ends in the text."""
        last = len(self.words) - 1
        return last + (last < 0 or self.closed or self.ends[self.begins[last]] <= len(self.text))


@dataclass
class Row:
    """One row under way: its transcript, its trajectory and whose turn it is."""

    prompt: Prompt
    speakers: dict[Author, Speaker]
    plan: Plan
    trajectory: Trajectory
    record: Callable[[Trajectory, Span], None] | None = None
    waits: Waits = field(default_factory=Waits)
    transcript: Transcript = field(init=False)
    finish: FinishReason | None = None
    _stream: AsyncGenerator[Completion, None] | None = None
    _asked: dict[Author, int] = field(default_factory=dict)  # how many ids an author's engine was last shown
    _fresh: int = 0  # how many of those it is shown now are new
    _chunks: ChunkSizes = field(init=False)
    _judged: int = 0  # words of the tentative text whose kind is known
    _complete: int = 0  # words of it that were complete before the last chunk
    _loops: LoopDetector = field(default_factory=LoopDetector)

    def __post_init__(self) -> None:
        self._chunks = ChunkSizes(self.plan.chunk_tokens)

    def open(self) -> None:
        """Render the prompt for all who write.

        Raises:
            PromptError: A template refuses the prompt, or it leaves no room in a model's context.
        """
        views: dict[Author, TokenList] = {}
        writers = {"teacher", "student"} if self._alternates else {self.plan.thinking, self.plan.answer}
        for author, speaker in self.speakers.items():
            if author not in writers:
                continue
            ids, tail = speaker.open_turn(self.prompt.messages)
            if len(ids) >= speaker.engine.context_length:
                raise PromptError(
                    f"Row {self.prompt.key!r}: the prompt has {len(ids)} tokens for the {author} "
                    f"{speaker.engine.model!r}, whose context holds {speaker.engine.context_length}. "
                    "Shorten or filter such prompts, or serve the model with a longer context."
                )
            views[author] = TokenList(speaker.vocabulary, ids, tail)
        predictors = [speaker.boundary for speaker in self.speakers.values() if self._alternates and speaker.boundary]
        readers = [self.speakers["student"].vocabulary, *(predictor.vocabulary for predictor in predictors)]
        self.transcript = Transcript(views, readers)
        for span in self.trajectory.spans:
            self.transcript.recall(span.text)
            self._loops.feed(span.text)
            if span.author in views and self.plan.chunk_tokens is None:
                self._chunks.observe(span.author, len(views[span.author].vocabulary.encode(span.text).ids))

    @property
    def _alternates(self) -> bool:
        return self.plan.thinking == "alternate"

    def end(self, finish: FinishReason, error: str | None = None) -> None:
        """Record how the row ended."""
        self.finish = self.trajectory.finish_reason = finish
        self.trajectory.error = error

    # --- writing

    def request(self, author: Author, part: Part, max_tokens: int) -> Request | None:
        """Ask an author to continue; ``None`` where its context is full, which ends the row."""
        speaker, ids = self.speakers[author], self.transcript.views[author].ids
        room = min(max_tokens, speaker.engine.context_length - len(ids))
        if room <= 0:
            self.end("length")
            return None
        self._fresh = len(ids) - self._asked.get(author, 0)
        self._asked[author] = len(ids)
        return Request(
            row=self.prompt.key,
            order=self.prompt.order,
            part=part,
            prompt_ids=ids,
            max_tokens=room,
            temperature=self.plan.temperature,
            top_p=self.plan.top_p,
            seed=self.prompt.seed,
            stop_ids=speaker.end_ids if part == "thinking" else speaker.vocabulary.special_ids,
        )

    def count(self, author: Author, completion: Completion) -> Completion:
        """Count what an author wrote.

        Raises:
            RequestError: It is nothing at all.
        """
        if not len(completion.token_ids) and completion.stop_id is None:
            raise RequestError(
                f"Row {self.prompt.key!r}: the {author} {self.speakers[author].engine.model!r} wrote nothing and gave "
                "no reason. At least one token was expected; look at the engine's log."
            )
        self.trajectory.generated[author] += len(completion.token_ids)
        self.waits.read_again += max(0, (completion.prompt_tokens_read or 0) - max(0, self._fresh) - CACHE_GRAIN)
        return completion

    async def _more(self, author: Author) -> Completion | None:
        """Return the author's next tokens: of the stream that is its turn, or a chunk; ``None`` for a full context."""
        if self._stream is not None:
            async with self.waits_for(author):
                piece = await anext(self._stream, None)
            if piece is not None:
                return self.count(author, piece)
            await self.let_go()  # all that was asked for is there
        view, engine = self.transcript.views[author], self.speakers[author].engine
        room = self.plan.max_thinking_tokens - len(self.transcript.reader(self.speakers["student"].vocabulary).ids)
        k = self._chunks.next(author, view.turn_tokens)
        streams = self._alternates and self.plan.stream and engine.streams
        request = self.request(author, "thinking", k if self._alternates and not streams else max(room, k))
        if request is None:
            return None
        if not streams:
            async with self.waits_for(author):
                return self.count(author, await engine.complete(request))
        self._stream = engine.stream(request)
        return await self._more(author)

    def waits_for(self, author: Author, what: str = "") -> AbstractAsyncContextManager[None]:
        """Note that the row waits for an author's engine, or for something else of the author's."""
        named = f"the {author} {what or repr(self.speakers[author].engine.model)}"
        return self.waits.on(self.prompt.key, named, of="predictors" if what else author)

    def turn_is_over(self, author: Author) -> bool:
        """Whether the author's text goes on no more."""
        return self.trajectory.turn != author or self.trajectory.closed or self.finish is not None

    async def let_go(self) -> None:
        """Break the stream off."""
        if self._stream is not None:
            stream, self._stream = self._stream, None
            await stream.aclose()

    async def write(self, author: Author) -> Written | None:
        """Let the author write on, and return all of its text that is not settled yet."""
        view = self.transcript.views[author]
        completion = await self._more(author)
        if completion is None:
            self.trajectory.discarded[author] += view.drop()
            return None
        view.push(completion.token_ids)
        text, ends = view.tentative()
        closed = completion.stop_id is not None
        # An end marker may also be spelled out in tokens that are not special.
        found = [at for at in (text.find(s.dialect.end_marker) for s in self.speakers.values()) if at >= 0]
        if found:
            text, closed = text[: min(found)], True
        elif not closed:
            text = text.rstrip("\ufffd")  # the last character may lack some of its bytes
        spans, first = words(text), not self.trajectory.spans
        plain = [text[start:end] for start, end in spans]
        begins = [bisect_right(ends, end - len(word.lstrip())) for word, (_, end) in zip(plain, spans, strict=True)]
        spelled = [plain[0].lstrip(), *plain[1:]] if first and plain else plain
        return Written(text, ends, spans, begins, spelled, closed)

    # --- judging

    async def boundary(self, author: Author, written: Written) -> Boundary:
        """Say where the author's kind of text ends."""
        complete = written.complete
        predictor = self.speakers[author].boundary if self._alternates else None
        other = await self._first_of_other_kind(author, predictor, written) if predictor is not None else None
        if other is None:
            return Boundary(complete, cut=False)
        if other == 0 and self.trajectory.turn_is_empty:  # an author that took over keeps at least one word
            other = 1 if complete else None
        if other is None:
            self._judged = 0  # to be seen again when it is complete
            return Boundary(complete, cut=False)
        return Boundary(other, cut=True)

    async def _first_of_other_kind(self, author: Author, predictor: BoundaryPredictor, written: Written) -> int | None:
        """Return the index of the first word, of those not judged yet, that is not the author's kind of text.

        A word is judged by the token that holds its first letter, in the text up to the author's token with this
        letter: nothing that is written later can change that. Predictors that look ahead judge by the token before,
        which half a word may spell in another way, so they wait until the word is complete.
        """
        stop = written.complete if predictor.label_shift else written.begun
        asked = range(self._judged, max(self._judged, stop))
        self._judged = asked.stop
        if not asked:
            return None
        async with self.waits_for(author, "boundary predictor"):
            readings = self._readings(predictor, written, asked)
            kinds = [await _kinds(predictor, *readings[0])]
            if len(readings) > 1:
                kinds += await asyncio.gather(*(_kinds(predictor, *reading) for reading in readings[1:]))
        own_kind = author == "student"  # style is the student's to write
        return min((word for kind in kinds for word, style in kind.items() if style != own_kind), default=None)

    def _readings(
        self, predictor: BoundaryPredictor, written: Written, asked: range
    ) -> list[tuple[Preview, dict[int, int]]]:
        """Lay words before the predictor: texts, each with the tokens to look at by word.

        The words share the text of the last one. What comes after a word makes no difference to it where a token of
        that text ends just where the word's own text would; else it gets a text of its own.
        """
        reader, shift = self.transcript.reader(predictor.vocabulary), predictor.label_shift
        before = list(accumulate(map(len, written.spelled), initial=0))
        whole = "".join(written.spelled)
        if shift:
            parts = {i: written.spelled[i] for i in asked}
        else:
            parts = {i: written.part(i) for i in asked}
            if not self.trajectory.spans and 0 in parts:
                parts[0] = parts[0].lstrip()
        last = asked[-1]
        shared = reader.preview(whole[: before[last]] + parts[last])
        token_ends = set(shared.ends)
        readings: list[tuple[Preview, dict[int, int]]] = [(shared, {})]
        for i, part in parts.items():
            letter = before[i] + len(part) - len(part.lstrip())
            if i == last or before[i] + len(part) in token_ends:
                preview, places = readings[0]
            else:
                preview, places = reader.preview(whole[: before[i]] + part), {}
                readings.append((preview, places))
            places[i] = preview.token_at(letter) - shift
        return readings

    # --- keeping

    def keep(self, author: Author, written: Written, boundary: Boundary) -> None:
        """Settle what is the author's own, drop what lies beyond and hand over; end the row at a limit."""
        kept, limit = self._limit(written, boundary)
        cut = boundary.cut or limit is not None or written.closed
        self._complete = kept
        if not cut:  # settle only up to a word end that is also a token end
            token_ends = set(written.ends)
            aligned = next((n for n in range(kept, 0, -1) if written.words[n - 1][1] in token_ends), 0)
            self._judged, self._complete, kept = max(0, self._judged - aligned), kept - aligned, aligned
        stop = written.words[kept - 1][1] if kept else 0
        spelled = "".join(written.spelled[:kept])
        if cut:
            if boundary.cut:
                self._chunks.observe(author, self.transcript.views[author].turn_tokens - written.beyond(kept))
            dropped = self.transcript.cut(author, written.text, written.ends, stop, spelled)
            self.trajectory.discarded[author] += dropped
            self._judged = self._complete = 0
        elif kept:
            self.transcript.settle(author, written.text, written.ends, stop, spelled)
        self.trajectory.add(author, "thinking", spelled)
        if limit is not None:
            self.end(limit)
        elif boundary.cut:
            self.trajectory.turn = "teacher" if author == "student" else "student"
            self.trajectory.turn_is_empty = True
        else:
            self.trajectory.turn_is_empty &= not kept
            self.trajectory.closed = written.closed
        if self.record is not None and (kept or cut):
            self.record(self.trajectory, Span(author, "thinking", spelled))

    def _limit(self, written: Written, boundary: Boundary) -> tuple[int, FinishReason | None]:
        """Apply the loop detector and the budget: how many words may be kept, and how the row ends if that is all."""
        kept, ends = boundary.kept, list(accumulate(map(len, written.spelled), initial=0))
        text = "".join(written.spelled[:kept])
        looped = self._loops.feed(text[ends[min(self._complete, kept)] :])
        if looped is not None:
            return bisect_right(ends, ends[self._complete] + looped) - 1, "repetition"
        if not boundary.cut and len(written.text) - ends[kept] > LONGEST_WORD:
            return kept, "repetition"
        counter = self.transcript.reader(self.speakers["student"].vocabulary)
        budget = self.plan.max_thinking_tokens
        if budget - len(counter.ids) >= _MOST_TOKENS_PER_CHARACTER * len(text):
            return kept, None  # spares the exact count while the budget is far
        over = (n for n in range(1, kept + 1) if counter.preview(text[: ends[n]]).length > budget)
        fits = next(over, kept + 1) - 1
        return fits, None if fits == kept else "length"
