"""One transform at work in one process: its loop on a thread, its engines, and which rows are in flight.

Batches of columns go in from the thread that maps, finished columns come out. The only owner of an event loop.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import replace
from typing import Any

from tessy_hf.engines.base import derive_seed
from tessy_hf.errors import PromptError
from tessy_hf.manifest import RunRecord
from tessy_hf.method import rules
from tessy_hf.method.speaker import Speaker
from tessy_hf.rows import columns, run_record
from tessy_hf.rows.batch import Columns, rows_of
from tessy_hf.rows.prompt import PromptReader, length
from tessy_hf.rows.tools import TOOLS, are_shown, tool_columns
from tessy_hf.run.metering import Meter
from tessy_hf.run.open_stores import OpenStores
from tessy_hf.run.progress import Origin, Progress, Summary
from tessy_hf.run.stores import other_runs, why_anew
from tessy_hf.run.synthesis import Asked, Synthesis
from tessy_hf.run.window import Window
from tessy_hf.settings import Settings
from tessy_hf.trajectory import Prompt

CHARACTERS_PER_TOKEN = 3
"""Roughly, and rather too few than too many: only to plan by."""

STALL_SECONDS = 120.0
"""After so long without an answer from engines or predictors, what is waited for is named."""

RUNS: dict[str, Run] = {}
"""What is live in this process, by the token of its transform. A forked child starts with none."""


def _close_all() -> None:
    while RUNS:
        RUNS.popitem()[1].close()


os.register_at_fork(after_in_child=RUNS.clear)
atexit.register(_close_all)


class Run:
    """A transform at work.

    Args:
        teacher: The strong model; ``None`` where it is not asked.
        student: The model to be trained.
        settings: The run's settings.
        identify: Returns the run's fingerprint. Called once, when all engines can say what they are.
        record: Describes the run, for the journal and shared rows.

    Attributes:
        fingerprint: The run's fingerprint; empty before the first batch.
    """

    def __init__(
        self,
        teacher: Speaker | None,
        student: Speaker,
        settings: Settings,
        identify: Callable[[], str],
        record: Callable[[], RunRecord],
    ) -> None:
        self._settings, self._identify, self._record = settings, identify, record
        self.fingerprint = ""
        self.meter = Meter(settings.request_timeout)
        teacher = teacher or student  # stands where one is expected, and is not asked
        self._teacher, self._student = self.meter.speakers(teacher, student)
        self._starts_apart = teacher.engine is not student.engine
        self.window = Window(settings.rows_in_flight, (settings.max_thinking_tokens + settings.max_answer_tokens) // 4)
        self._progress = Progress(self.meter, self.window)
        self._stores: OpenStores | None = None
        self._synthesis: Synthesis
        self._rows_begun = 0
        self._planned = self._warned = self._told_of_tools = False
        self._started: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._passes: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Pass] = weakref.WeakKeyDictionary()
        self._admission = asyncio.Lock()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="tessy", daemon=True)
        self._thread.start()

    # --- called from other threads

    def submit(self, batch: Columns, caller: asyncio.AbstractEventLoop | None) -> Future[dict[str, list[Any]]]:
        """Hand a batch to the loop. ``caller`` distinguishes one pass over a dataset from the next."""
        if caller is None:
            return asyncio.run_coroutine_threadsafe(self._batch(batch, set()), self._loop)
        if caller not in self._passes:
            self._passes[caller] = _Pass(caller)
        return asyncio.run_coroutine_threadsafe(self._batch(batch, self._passes[caller].enter()), self._loop)

    def write(self, prompt: Prompt, asked: Asked) -> Future[tuple[dict[str, Any], Origin]]:
        """Write one row outside of any dataset, after the first batch. To stop it, cancel the future."""
        return asyncio.run_coroutine_threadsafe(self._alone(prompt, asked), self._loop)

    def expect(self, rows: int | None, found: int | None = None) -> None:
        """Expect so many rows, and where a plan has told it, so many that are there already: it is not told again."""
        self._planned = self._planned or found is not None
        self._progress.expect(rows, found)

    @property
    def summary(self) -> Summary:
        """How the rows so far ended."""
        return self._progress.summary

    def close(self) -> None:
        """Cancel what is under way, close the engines, end the loop."""
        if self._loop.is_closed():
            return
        stopped = asyncio.run_coroutine_threadsafe(self._stop(), self._loop)
        wait([stopped])
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        stopped.result()

    # --- start and end

    async def _open_stores(self) -> OpenStores:
        """Settle the fingerprint, under which rows are looked up from then on, and name the places where rows are."""
        for speaker in (self._teacher, self._student):
            if not getattr(speaker.engine, "identity_is_known", True):  # of a server that was down
                await speaker.engine.start()
        fingerprint = await asyncio.to_thread(self._identify)
        self._stores = stores = OpenStores(self._settings, fingerprint, self.window)
        self._made_of = self._teacher, self._student, self._settings, fingerprint, self.meter
        self._synthesis = Synthesis(*self._made_of, stores.commits, stores.outbox)
        self.fingerprint = fingerprint
        return stores

    async def _start(self) -> None:
        """Check what can be checked before anything heavy is loaded, then load it."""
        self._own(asyncio.create_task(_report_stalls(self.meter, self._progress)))
        stores = await self._open_stores()
        await asyncio.to_thread(self._synthesis.check)
        async for line in stores.check(plan_is_told=self._planned):
            self._progress.write(line)
        if stores.commits is not None:
            self._own(asyncio.create_task(stores.commits.sync_regularly()))
        await _start(self._teacher, self._student, together=self._starts_apart)
        rules.check_engines(self._settings.needs, {"teacher": self._teacher, "student": self._student})
        self.window.open(self._teacher.engine, self._student.engine)
        described = await asyncio.to_thread(self._record)  # reads files; all revisions are known now
        await asyncio.to_thread(run_record.remember, described)
        stores.describe(described, self._student.thinking_format.key)

    async def _stop(self) -> None:
        own = list(self._tasks)  # not those of libraries, which end with the engines
        for task in own:
            task.cancel()
        await asyncio.gather(*own, return_exceptions=True)
        self._progress.close()
        await _close(self._stores, self._teacher, self._student)

    def _own(self, task: asyncio.Task[Any] | None) -> asyncio.Task[Any]:
        """Keep a task until it is done, to cancel it at the end."""
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # --- batches and rows

    async def _alone(self, prompt: Prompt, asked: Asked) -> tuple[dict[str, Any], Origin]:
        task = self._own(asyncio.current_task())
        async with self._admission:
            await self.window.enter()
        task.add_done_callback(self._leave)
        return await self._row(prompt, {}, Synthesis(*self._made_of, None, None, asked))

    async def _batch(self, batch: Columns, seen: set[str]) -> dict[str, list[Any]]:
        self._own(asyncio.current_task())
        reader = PromptReader(self._settings, list(batch), seen)
        inputs = rows_of(batch, reader.read_columns, self._settings.prompt_column)
        tasks: dict[int, asyncio.Task[tuple[dict[str, Any], Origin]]] = {}
        try:
            async with self._admission:  # one batch after another, in the order in which they came
                if self._started is None:
                    self._started = self._own(asyncio.create_task(self._start()))
                await asyncio.shield(self._started)
                prompts = [_read(reader, row, self._settings.seed) for row in inputs]
                self._enroll([prompt for prompt in prompts if isinstance(prompt, Prompt)])
                for number in _longest_first(prompts):
                    await self.window.enter()
                    writing = self._row(prompts[number], inputs[number], self._synthesis)
                    tasks[number] = self._own(asyncio.create_task(writing))
                    tasks[number].add_done_callback(self._leave)
            rows = [row for row, _ in await asyncio.gather(*(tasks[number] for number in range(len(inputs))))]
            await self._synthesis.stored()
        finally:
            for one in tasks.values():
                one.cancel()
        asked = batch[self._settings.prompt_column]
        tools = tool_columns(asked, batch[TOOLS]) if TOOLS in reader.hashed_columns else {}
        if tools and not all(map(are_shown, asked)) and not self._told_of_tools:
            self._told_of_tools = True
            self._progress.write("tools are not shown beside prompts that are text, only beside lists of messages.")
        return {**tools, **{name: [row.get(name) for row in rows] for name in columns.COLUMNS}}  # old rows lack some

    def _enroll(self, prompts: list[Prompt]) -> None:
        """Give rows their places in the journal, and say once that ids are there with other prompts."""
        other_prompts: dict[str, str] = {}
        keys = [prompt.row_key for prompt in prompts]
        commits = self._stores and self._stores.commits
        if commits and not self._planned:
            for line in other_runs(commits.journal, self._record, keys):
                self._progress.write(line)
        self._planned = True
        self._synthesis.enroll(keys, other_prompts)
        if other_prompts and not self._warned:
            self._warned = True
            for line in why_anew(other_prompts, self._settings):
                self._progress.write(line)

    async def _row(
        self, prompt: Prompt | PromptError, inputs: Mapping[str, Any], synthesis: Synthesis
    ) -> tuple[dict[str, Any], Origin]:
        """Write one row, whatever its prompt is like."""
        origin: Origin
        self._rows_begun += 1
        if isinstance(prompt, PromptError):
            row, origin = synthesis.unusable(prompt), "refused"
        else:
            with self._progress.row():
                row, origin = await synthesis.row(replace(prompt, order=self._rows_begun), inputs)
            tokens = length(prompt.messages) // CHARACTERS_PER_TOKEN + row["teacher_tokens"] + row["student_tokens"]
            self.window.learn(tokens, self.meter.recomputed_tokens)
        self._progress.done(row, origin)
        return row, origin

    def _leave(self, _: asyncio.Task[Any]) -> None:
        """Give a row's place in the window to the next."""
        self.window.leave()
        if self._stores is not None and self._stores.outbox is not None:
            self._stores.outbox.hurry()


async def _start(teacher: Speaker, student: Speaker, *, together: bool) -> None:
    if together:
        await asyncio.gather(teacher.start(), student.start())
    else:
        await teacher.start()
        await student.start()


async def _close(stores: OpenStores | None, *speakers: Speaker) -> None:
    try:
        if stores is not None:
            await stores.close()
    finally:  # a full disk keeps no engine alive
        await asyncio.gather(*(speaker.close() for speaker in speakers))


async def _report_stalls(meter: Meter, progress: Progress) -> None:
    """Name what is waited for when nothing comes any more; less and less often."""
    after = STALL_SECONDS
    while True:
        await asyncio.sleep(STALL_SECONDS / 4)
        if meter.stalled(STALL_SECONDS) is None:
            after = STALL_SECONDS
        elif (stalled := meter.stalled(after)) is not None:
            progress.write(f"nothing came for {after:.0f} s. Waiting for {stalled}.")
            after *= 2


def _read(reader: PromptReader, row: Mapping[str, Any], seed: int) -> Prompt | PromptError:
    try:
        prompt = reader.read(row)
    except PromptError as error:
        return error
    return replace(prompt, seed=derive_seed(seed, prompt.key))


class _Pass:
    """One pass over a stream, on a loop of `datasets`, which leaves it with its tasks where the stream is dropped.

    Our coroutines in these tasks cancel their batches then; the loop is told not to log that they were pending.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._seen: set[str] = set()
        self._tasks: set[int] = set()
        self._handler = loop.get_exception_handler()
        loop.set_exception_handler(self._handle)

    def enter(self) -> set[str]:
        """Note the task that hands over a batch; return the ids that this pass has seen."""
        if (task := asyncio.current_task()) is not None:
            self._tasks.add(id(task))
        return self._seen

    def _handle(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if id(context.get("task")) not in self._tasks:
            self._handler(loop, context) if self._handler is not None else loop.default_exception_handler(context)


def _longest_first(prompts: Sequence[Prompt | PromptError]) -> list[int]:
    """Return in which order to begin rows: longer prompts tend to have longer rows, which are best not begun last."""
    lengths = [0 if isinstance(prompt, PromptError) else length(prompt.messages) for prompt in prompts]
    return sorted(range(len(prompts)), key=lengths.__getitem__, reverse=True)
