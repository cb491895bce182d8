"""One transform at work in one process: its loop on a thread, its engines, its window of rows, its journal.

Batches of columns go in from the thread that maps, finished columns come out. The only owner of an event loop.
"""

from __future__ import annotations

import asyncio
import atexit
import functools
import gc
import os
import threading
import weakref
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets

from tessy_hf.engines.base import derive_seed
from tessy_hf.errors import DatasetError, JournalError, PromptError
from tessy_hf.manifest import RunRecord
from tessy_hf.method import methods
from tessy_hf.method.speaker import Speaker
from tessy_hf.rows import columns
from tessy_hf.rows.prompt import PromptReader, length
from tessy_hf.run.journal import Claim, Counts, Journal
from tessy_hf.run.metering import Load, Waits
from tessy_hf.run.progress import Progress, say
from tessy_hf.run.shared_rows import Outbox, Parts
from tessy_hf.run.window import Window
from tessy_hf.settings import Settings
from tessy_hf.trajectory import Draft, Message, Prompt, RowKey, Span, Trajectory
from tessy_hf.verifiers import verifiers

Batch = Mapping[str, Sequence[Any]]
Columns = dict[str, list[Any]]
REST = 40.0
"""How many times as long as the last commit took none is made: commits take a fortieth of the time at most."""

LONGEST_REST = 0.05
"""Seconds after which what was kept is committed in any case: an engine rarely takes less for a chunk of a row."""

CHARACTERS_PER_TOKEN = 3
"""Roughly, and rather too few than too many: only to plan by."""

RUNS: dict[str, Run] = {}
"""What is live in this process, by the token of its transform. A forked child starts with none."""

STALL_SECONDS = 120.0
"""After so long without anything from engines or predictors, what is waited for is named."""


def _close_all() -> None:
    while RUNS:
        RUNS.popitem()[1].close()


os.register_at_fork(after_in_child=RUNS.clear)
atexit.register(_close_all)


class Run:
    """A transform at work.

    Args:
        teacher: The strong model.
        student: The model to be trained.
        settings: The run's settings.
        fingerprint: The run's fingerprint.
        record: Describes the run, for the journal.
        in_order: Whether rows begin in the order of their prompts, and as many at once as may be in flight; else the
            longest prompts of a batch come first, and an empty window is filled by halves.
    """

    def __init__(
        self,
        teacher: Speaker,
        student: Speaker,
        settings: Settings,
        fingerprint: str,
        record: Callable[[], RunRecord],
        in_order: bool = False,
    ) -> None:
        self._describe, self._in_order = record, in_order
        self._teacher, self._student, self._settings = teacher, student, settings
        self._fingerprint = fingerprint
        self._verifier = verifiers.build(settings.verifier)
        self._waits = Waits(settings.request_timeout)
        longest = settings.max_thinking_tokens + settings.max_answer_tokens
        self._window = Window(settings.rows_in_flight, longest // 4, halves=settings.alternates and not in_order)
        self._progress = Progress(self._waits, self._window)
        self._journal = journal_of(self._settings, self._fingerprint)
        self._journal_error: JournalError | None = None
        self._commit: asyncio.TimerHandle | None = None
        self._rests_until = 0.0
        self._rows_seen = 0
        self._started: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._writing: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()
        self._told_of_other_prompts = False
        self._ids: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, set[str]] = weakref.WeakKeyDictionary()
        self._loop = asyncio.new_event_loop()
        self._admission = asyncio.Lock()
        self._outbox = self._make_outbox()
        self._thread = threading.Thread(target=self._loop.run_forever, name="tessy", daemon=True)
        self._thread.start()

    def _make_outbox(self) -> Outbox | None:
        parts = parts_of(self._settings, self._fingerprint)
        if parts is None:
            return None
        return Outbox(parts, lambda: max(1, self._window.limit // 2), lambda: self._window.rows < self._window.limit)

    def submit(self, batch: Batch, caller: asyncio.AbstractEventLoop | None) -> Future[Columns]:
        """Hand a batch to the loop. ``caller`` tells one pass over a dataset from the next."""
        seen = self._ids.setdefault(caller, set()) if caller is not None else set()
        return self._run(self._batch(batch, seen))

    def _run(self, work: Coroutine[Any, Any, Any]) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def loads(self) -> dict[str, Load]:
        """Return for what the rows waited so far."""
        return self._waits.loads()

    def close(self) -> None:
        """Cancel what is under way, close the engines, end the loop."""
        if self._loop.is_closed():
            return
        self._run(self._stop()).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        gc.unfreeze()

    async def _stop(self) -> None:
        own = list(self._tasks)  # not those of libraries, which end with the engines
        for task in own:
            task.cancel()
        await asyncio.gather(*own, return_exceptions=True)
        self._progress.close()
        if self._commit is not None:
            self._commit.cancel()
        if self._journal is not None:
            self._journal.close()
        if self._outbox is not None:
            await self._outbox.close()
        await asyncio.gather(self._teacher.close(), self._student.close())

    async def _start(self) -> None:
        """Check what can be checked before anything heavy is loaded, then load it."""
        self._own(asyncio.create_task(self._watch()))
        self._teacher.check_templates(student=False)
        self._student.check_templates(student=True)
        await asyncio.to_thread(verifiers.check, self._verifier)
        if self._outbox is not None:
            await asyncio.to_thread(self._outbox.parts.refresh)
            self._progress.write(f"{len(self._outbox.parts)} rows are there already (parts: {self._settings.parts}).")
        if self._journal is not None:
            self._progress.say(self._journal.fingerprints().get(self._fingerprint), self._journal.path)
            self._own(asyncio.create_task(self._tick(self._journal)))
        if self._teacher.engine is self._student.engine:
            await self._teacher.start()
            await self._student.start()
        else:
            await asyncio.gather(self._teacher.start(), self._student.start())
        self._window.open(self._teacher.engine, self._student.engine)
        # Else each full collection looks through all that torch and its like have made: a third of a second in which
        # no row goes on.
        gc.freeze()
        if self._journal is None and self._outbox is None:
            return
        record = await asyncio.to_thread(self._describe)  # reads files; the models' revisions are known by now
        if self._journal is not None:
            self._journal.describe(record.model_dump_json())
        if self._outbox is not None:
            features = columns.schema(self._student.dialect.marks_in_content)
            self._outbox.parts.describe(features, record.model_dump_json())

    def _own(self, task: asyncio.Task[Any]) -> asyncio.Task[Any]:
        """Keep a task until it is done, to cancel it at the end."""
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _watch(self) -> None:
        """Name what is waited for when nothing comes any more; less and less often."""
        patience = STALL_SECONDS
        while True:
            await asyncio.sleep(STALL_SECONDS / 4)
            if self._waits.stalled(STALL_SECONDS) is None:
                patience = STALL_SECONDS
            elif (hanging := self._waits.stalled(patience)) is not None:
                self._progress.write(f"nothing came for {patience:.0f} s. Waiting for {hanging}.")
                patience *= 2

    async def _tick(self, journal: Journal) -> None:
        """Sync what was written twice a second, against a power cut."""
        while self._journal_error is None:
            await asyncio.sleep(0.5)
            self._flush(journal, sync=True)

    def _flush_soon(self, journal: Journal) -> None:
        """Commit against a kill, in this turn of the loop unless a commit was made just now.

        So a row's text is safe before the engine has done any work on what follows it.
        """
        if self._commit is None:
            self._commit = self._loop.call_at(self._rests_until, self._flush, journal)

    def _flush(self, journal: Journal, sync: bool = False) -> None:
        if self._commit is not None:
            self._commit.cancel()
        self._commit, begin = None, self._loop.time()
        try:
            journal.flush(sync=sync)
        except JournalError as error:
            self._journal_error = error  # the next piece that is kept stops the run with it
        end = self._loop.time()
        self._rests_until = end + min(REST * (end - begin), LONGEST_REST)

    async def _batch(self, batch: Batch, seen: set[str]) -> Columns:
        settings, this = self._settings, asyncio.current_task()
        if this is not None:
            self._own(this)
        reader = PromptReader(settings, list(batch), seen)
        given_prompts = batch[settings.prompt_column]
        if isinstance(given_prompts, str) or given_prompts is None:
            raise DatasetError(
                "The transform got a single row. A batch is expected: call map(transform, batched=True)."
            )
        read = {name: batch[name] for name in reader.read_columns}
        rows_given = [dict(zip(read, values, strict=True)) for values in zip(*read.values(), strict=True)]
        tasks: dict[int, asyncio.Task[dict[str, Any]]] = {}
        try:
            async with self._admission:  # one batch after another, in the order in which they came
                if self._started is None:
                    self._started = self._own(asyncio.create_task(self._start()))
                await asyncio.shield(self._started)
                asked = [self._read(reader, row) for row in rows_given]
                if self._journal is not None and self._outbox is None:  # what is in parts has no place in the journal
                    self._enroll([row.row_key for row in asked if isinstance(row, Prompt)], self._journal)
                for number in range(len(asked)) if self._in_order else _longest_first(asked):
                    await self._window.enter()
                    row = rows_given[number]
                    tasks[number] = self._own(asyncio.create_task(self._row(reader.id(row), asked[number], row)))
                    tasks[number].add_done_callback(self._leave)
            rows = await asyncio.gather(*(tasks[number] for number in range(len(asked))))
            if self._journal is not None:
                self._journal.flush()  # now they are durable
            if self._outbox is not None:
                await self._outbox.stored()
        finally:
            for task in tasks.values():
                task.cancel()
        return {name: [row[name] for row in rows] for name in columns.COLUMNS}

    def _leave(self, _: asyncio.Task[Any]) -> None:
        """Give a row's place in the window to the next."""
        self._window.leave()
        if self._outbox is not None:
            self._outbox.hurry()

    def _read(self, reader: PromptReader, row: Mapping[str, Any]) -> Prompt | PromptError:
        try:
            prompt = reader.read(row)
        except PromptError as error:
            return error
        return replace(prompt, seed=derive_seed(self._settings.seed, prompt.key))

    def _enroll(self, keys: list[RowKey], journal: Journal) -> None:
        """Give rows their places in the journal, and say once that ids are there with other prompts."""
        if not self._told_of_other_prompts:
            others: dict[str, str] = {}
            journal.plan(keys, others)
            for line in _why_anew(others, self._settings):
                self._progress.write(line)
                self._told_of_other_prompts = True
        journal.enroll(keys)

    async def _row(self, given: Any, asked: Prompt | PromptError, row: Mapping[str, Any]) -> dict[str, Any]:
        """Write one row, whatever its prompt is like; ``row`` is what its verifier may read."""
        self._rows_seen += 1
        if isinstance(asked, PromptError):
            done = self._columns(Trajectory(str(given), finish_reason="error", error=str(asked)), [])
        else:
            prompt = replace(asked, order=self._rows_seen)
            # Engines know a row by its id: two rows of one id, of two passes, are written one after the other.
            lock = self._writing.setdefault(prompt.key, asyncio.Lock())
            with self._progress.row():
                async with lock:
                    done = await self._look_up_or_write(prompt, row)
            self._learn_length(prompt.messages, done)
        self._progress.done(done)
        return done

    async def _look_up_or_write(self, prompt: Prompt, given: Mapping[str, Any]) -> dict[str, Any]:
        if self._outbox is not None and (found := await self._outbox.find(prompt.row_key)) is not None:
            return found
        if self._journal is None:
            done = await self._write(prompt, given)
        else:
            done = await self._write_durably(prompt, given, self._journal)
        if self._outbox is not None:
            self._outbox.add(prompt.row_key, done)
        return done

    def _learn_length(self, messages: Sequence[Message], row: Mapping[str, Any]) -> None:
        prompt = length(messages) // CHARACTERS_PER_TOKEN
        self._window.learn(prompt + row["teacher_tokens"] + row["student_tokens"], self._waits.read_again)

    def _columns(
        self, trajectory: Trajectory, messages: Sequence[Message], draft: Draft | None = None
    ) -> dict[str, Any]:
        return columns.row(
            trajectory,
            messages,
            self._student.vocabulary,
            self._student.dialect,
            method=self._settings.method,
            run_fingerprint=self._fingerprint,
            draft=draft,
        )

    async def _attempt(
        self,
        prompt: Prompt,
        given: Mapping[str, Any],
        draft: Draft,
        keep: Callable[[Draft, Span | None], None] | None = None,
    ) -> Trajectory:
        return await methods.write(
            prompt,
            self._teacher,
            self._student,
            self._settings,
            draft,
            given=given,
            verifier=self._verifier,
            record=functools.partial(self._record, keep),
            waits=self._waits,
        )

    async def _write(self, prompt: Prompt, given: Mapping[str, Any]) -> dict[str, Any]:
        """Write a row, trying again after what was kept where that may help."""
        draft = Draft(prompt.key, prompt.seed, self._settings.judged)
        attempt = 1
        while (trajectory := await self._attempt(prompt, given, draft)).retryable:
            if attempt == self._settings.max_attempts:
                break
            await asyncio.sleep(_pause(attempt))
            attempt += 1
        return self._columns(trajectory, prompt.messages, draft)

    async def _write_durably(self, prompt: Prompt, given: Mapping[str, Any], journal: Journal) -> dict[str, Any]:
        """Look a row up in the journal, or write it there as it is written."""
        while True:
            claim = await self._claim(prompt.row_key, journal)
            if claim.status == "finished":
                return claim.columns
            draft = Draft.resume(prompt.key, prompt.seed, self._settings.judged, claim.spans, claim.state)
            try:
                trajectory = await self._attempt(prompt, given, draft, functools.partial(self._keep, prompt, journal))
                row = self._columns(trajectory, prompt.messages, draft)
            except BaseException:
                journal.release(prompt.row_key)
                raise
            if trajectory.finish_reason != "error":
                journal.finish(prompt.row_key, row)
                self._flush_soon(journal)
                return row
            journal.fail(prompt.row_key, row)
            self._flush_soon(journal)
            if not trajectory.retryable or claim.attempts + 1 >= self._settings.max_attempts:
                return row
            await asyncio.sleep(_pause(claim.attempts + 1))

    async def _claim(self, key: RowKey, journal: Journal) -> Claim:
        """Claim a row, waiting while another process writes it."""
        while (claim := journal.claim(key)).status == "busy":  # noqa: ASYNC110 - another process sends no event
            await asyncio.sleep(0.2)
        return claim

    def _record(self, keep: Callable[[Draft, Span | None], None] | None, draft: Draft, piece: Span | None) -> None:
        self._window.part()
        if keep is not None:
            keep(draft, piece)

    def _keep(self, prompt: Prompt, journal: Journal, draft: Draft, piece: Span | None) -> None:
        if self._journal_error is not None:
            raise self._journal_error
        journal.append(prompt.row_key, [piece] if piece is not None and piece.text else [], draft.state())
        self._flush_soon(journal)


def _longest_first(asked: Sequence[Prompt | PromptError]) -> list[int]:
    """Return in which order to begin rows: longer prompts tend to have longer rows, which are best not begun last."""
    lengths = [0 if isinstance(row, PromptError) else length(row.messages) for row in asked]
    return sorted(range(len(asked)), key=lengths.__getitem__, reverse=True)


def _why_anew(others: Mapping[str, str], settings: Settings) -> Iterator[str]:
    """Say why rows whose ids are in the journal, with these prompts, are not taken from there."""
    unknown = sum(not prompt_hash for prompt_hash in others.values())
    read = " or other columns that the verifier reads" if settings.verifier is not None else ""
    for count, why in (
        (len(others) - unknown, f"seen before with another prompt{read}"),
        (unknown, "begun by an earlier version, which did not keep what half-written rows answer"),
    ):
        if count:
            yield f"{count} id{'s were' if count > 1 else ' was'} {why}: written anew."


def _pause(attempt: int) -> float:
    """Return the seconds to wait after a failed attempt."""
    return min(30.0, 0.1 * float(2**attempt))


def journal_of(settings: Settings, fingerprint: str) -> Journal | None:
    """Return the journal of a run, where it has one. Touches no file."""
    if settings.journal is None:
        return None
    if settings.journal != "auto":
        return Journal(settings.journal, fingerprint, max_attempts=settings.max_attempts)
    folder = Path(datasets.config.HF_DATASETS_CACHE).parent / "tessy"
    return Journal(folder / f"{fingerprint}.journal", fingerprint, max_attempts=settings.max_attempts)


def parts_of(settings: Settings, fingerprint: str) -> Parts | None:
    """Return the parts of a run, where it puts rows into such. Touches no file."""
    return Parts(settings.parts, fingerprint) if settings.parts is not None else None


def count(dataset: Any, settings: Settings, fingerprint: str) -> Counts:
    """Count how a dataset's rows stand: done, to continue, to do, failed before. Starts nothing."""
    names = [name for name in (settings.prompt_column, settings.id_column) if name is not None]
    reader = PromptReader(settings, list(dataset.column_names or next(iter(dataset), names)))
    journal, unusable, in_parts, others = journal_of(settings, fingerprint), 0, 0, dict[str, str]()
    parts = parts_of(settings, fingerprint)
    if parts is not None:
        parts.refresh()

    def keys() -> Iterator[RowKey]:
        nonlocal unusable, in_parts
        for row in dataset.select_columns(reader.read_columns):
            try:
                key = reader.read(row).row_key
            except PromptError:
                unusable += 1
                continue
            if parts is not None and parts.done(key):
                in_parts += 1
            else:
                yield key

    if journal is None or not journal.path.exists():
        counts = Counts(to_do=sum(1 for _ in keys()))
    else:
        counts = journal.plan(keys(), others)
        journal.close()
    for line in _why_anew(others, settings):
        say(line)
    return counts._replace(done=counts.done + in_parts, to_do=counts.to_do + unusable)
