"""The object given to ``Dataset.map``: batches of prompts in, batches of columns out.

The only owner of an event loop. All rows of a run, whatever batch they came in, pass through one window of
``rows_in_flight`` rows on one background loop, in order; so no batch waits for another and none has a tail of its own.
"""

from __future__ import annotations

import asyncio
import atexit
import functools
import hashlib
import json
import os
import threading
import uuid
import weakref
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import Future
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets

from tessy_hf import columns
from tessy_hf.alternate import synthesize
from tessy_hf.engines.base import derive_seed
from tessy_hf.errors import DatasetError, JournalError, PromptError, SettingsError
from tessy_hf.journal import Claim, Journal
from tessy_hf.progress import Progress
from tessy_hf.settings import Settings
from tessy_hf.speaker import Speaker
from tessy_hf.trajectory import Message, Prompt, Span, Trajectory

if TYPE_CHECKING:
    from datasets import Dataset, Features, IterableDataset

Batch = Mapping[str, Sequence[Any]]
Columns = dict[str, list[Any]]


class TessyTransform(functools.partial[Any]):
    """Cooperative synthesis as a function for ``map(..., batched=True)``.

    Works on ``Dataset`` and on streaming ``IterableDataset``, in scripts, in notebooks and with ``num_proc``. Its
    fingerprint is that of its settings and speakers, so a rerun finds the ``datasets`` cache and a changed setting
    does not. Engines are started at the first batch and stay until :meth:`close`.

    It is a ``functools.partial`` because that is the one kind of object in which ``datasets`` can find a coroutine
    function where there is no running event loop (scripts), and a plain one where there is (notebooks).

    Args:
        teacher: The strong model, writer of capability spans.
        student: The model to be trained, writer of style spans and of the answer.
        **settings: See :class:`tessy_hf.settings.Settings`: ``method``, ``chunk_tokens``, ``temperature``, ``top_p``,
            ``seed``, ``max_thinking_tokens``, ``max_answer_tokens``, ``prompt_column``, ``id_column``,
            ``system_prompt``, ``rows_in_flight``, ``journal``, ``max_attempts``.

    Raises:
        SettingsError: A setting is unknown or out of range, or an author lacks a boundary predictor.
    """

    teacher: Speaker
    student: Speaker
    settings: Settings
    _token: str
    _async: bool

    def __new__(cls, *, teacher: Speaker, student: Speaker, **settings: Any) -> TessyTransform:
        """Check the settings. Loads nothing."""
        return cls._make(teacher, student, Settings.check(**settings), uuid.uuid4().hex)

    @classmethod
    def _make(cls, teacher: Speaker, student: Speaker, settings: Settings, token: str) -> TessyTransform:
        self = super().__new__(cls, print)
        for name, speaker in (("teacher", teacher), ("student", student)):
            if settings.alternates and speaker.boundary is None:
                raise SettingsError(
                    f"The {name} has no boundary predictor, which method={settings.method!r} needs. "
                    f"Pass {name}=Speaker(engine, boundary=...) with a Hub id or folder, or another method."
                )
        self.teacher, self.student, self.settings = teacher, student, settings
        self._token, self._async = token, False
        return self

    @classmethod
    def from_yaml(cls, path: str | Path) -> TessyTransform:
        """Read a transform from a YAML file: the settings by name, and ``teacher`` and ``student``.

        Raises:
            SettingsError: The file cannot be read as such a description.
        """
        from tessy_hf.recipe import read

        teacher, student, settings = read(Path(path))
        return cls(teacher=teacher, student=student, **settings)

    @property
    def run_fingerprint(self) -> str:
        """The hash of all that decides the rows."""
        return self.settings.fingerprint({"teacher": self.teacher.identity, "student": self.student.identity})

    def features(self, dataset: Dataset | IterableDataset) -> Features:
        """Return the schema of ``dataset.map(self, batched=True)``, for ``map(..., features=...)``.

        Raises:
            DatasetError: The prompt column is missing, or a column would be overwritten.
        """
        return columns.features(dataset, self.settings.prompt_column, self.student.dialect)

    # --- being called

    @property
    def func(self) -> Any:
        """What ``datasets`` inspects: a coroutine function, unless an event loop runs in this thread already."""
        self._async = not _loop_is_running()
        return _coroutine_function if self._async else _function

    def __call__(self, batch: Batch, /) -> Any:
        """Write the rows of a batch.

        Returns:
            The new columns; inside an asynchronous ``map``, an awaitable of them.

        Raises:
            DatasetError: The batch lacks a column, or is not a batch.
            TemplateError: A chat template would lose the thinking.
            BoundaryError: A boundary predictor cannot be read.
            EngineDeadError: An engine is gone; finished rows are in the journal, where there is one.
        """
        run = _runtime(self)
        if self._async and _loop_is_running():
            task = asyncio.current_task()
            if (
                task is not None
            ):  # `datasets` abandons its tasks when a stream is dropped: no complaint for each of them
                task._log_destroy_pending = False  # type: ignore[attr-defined]
            return asyncio.wrap_future(run.submit(batch, asyncio.get_running_loop()))
        return run.submit(batch, None).result()

    def close(self) -> None:
        """Stop what is under way and let go of the engines. The transform can be used again; it starts afresh."""
        run = _RUNTIMES.pop(self._token, None)
        if run is not None:
            run.close()

    def __enter__(self) -> TessyTransform:
        """Return the transform itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()

    # --- being pickled, hashed and shown

    def __reduce__(self) -> Any:
        """Carry the description, never what is live."""
        return _restore, (type(self), self.teacher, self.student, self.settings, self._token)

    def __repr__(self) -> str:
        """Show the method and the models."""
        models = f"teacher={self.teacher.engine.model!r}, student={self.student.engine.model!r}"
        return f"TessyTransform({models}, method={self.settings.method!r}, fingerprint={self.run_fingerprint})"


def _restore(
    cls: type[TessyTransform], teacher: Speaker, student: Speaker, settings: Settings, token: str
) -> TessyTransform:
    return cls._make(teacher, student, settings, token)


async def _coroutine_function(batch: Batch) -> None:
    """Stand where ``inspect.iscoroutinefunction`` looks."""


def _function(batch: Batch) -> None:
    """Stand where ``inspect.iscoroutinefunction`` looks."""


def _loop_is_running() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _register_with_hasher() -> None:
    """Make the ``datasets`` fingerprint that of the run. Live handles would make it random."""
    from datasets.utils._dill import pklregister

    @pklregister(TessyTransform)  # type: ignore[untyped-decorator]
    def _save(pickler: Any, transform: TessyTransform) -> None:
        pickler.save_reduce(str, (f"TessyTransform {transform.run_fingerprint}",), obj=transform)


# --- what is live, once per process

_RUNTIMES: dict[str, _Runtime] = {}


def _runtime(transform: TessyTransform) -> _Runtime:
    run = _RUNTIMES.get(transform._token)
    if run is None:
        run = _RUNTIMES[transform._token] = _Runtime(transform)
    return run


def _close_all() -> None:
    while _RUNTIMES:
        _RUNTIMES.popitem()[1].close()


os.register_at_fork(after_in_child=_RUNTIMES.clear)
atexit.register(_close_all)


class _Runtime:
    """One transform at work in one process: its loop on a thread, its engines, its window of rows."""

    def __init__(self, transform: TessyTransform) -> None:
        self._teacher, self._student, self._settings = transform.teacher, transform.student, transform.settings
        self._fingerprint = transform.run_fingerprint
        self._progress = Progress()
        self._journal = _journal(self._settings, self._fingerprint)
        self._journal_error: JournalError | None = None
        self._rows_seen = 0
        self._started: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._ids: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, set[str]] = weakref.WeakKeyDictionary()
        self._loop = asyncio.new_event_loop()
        self._admission = asyncio.Lock()
        self._window = asyncio.Semaphore(self._settings.rows_in_flight)
        self._thread = threading.Thread(target=self._loop.run_forever, name="tessy", daemon=True)
        self._thread.start()

    def submit(self, batch: Batch, caller: asyncio.AbstractEventLoop | None) -> Future[Columns]:
        """Hand a batch to the loop. ``caller`` tells one pass over a dataset from the next."""
        seen = self._ids.setdefault(caller, set()) if caller is not None else set()
        return self._run(self._batch(batch, seen))

    def _run(self, work: Coroutine[Any, Any, Any]) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def close(self) -> None:
        """Cancel what is under way, close the engines, end the loop."""
        if self._loop.is_closed():
            return
        self._run(self._stop()).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _stop(self) -> None:
        own = list(self._tasks)  # not those of libraries, which end with the engines
        for task in own:
            task.cancel()
        await asyncio.gather(*own, return_exceptions=True)
        self._progress.close()
        if self._journal is not None:
            self._journal.close()
        await asyncio.gather(self._teacher.close(), self._student.close())

    async def _start(self) -> None:
        """Check what can be checked before anything heavy is loaded, then load it."""
        self._teacher.check_templates(student=False)
        self._student.check_templates(student=True)
        if self._journal is not None:
            self._progress.say(self._journal.fingerprints().get(self._fingerprint))
            self._own(asyncio.create_task(self._tick(self._journal)))
        if self._teacher.engine is self._student.engine:
            await self._teacher.start()
            await self._student.start()
        else:
            await asyncio.gather(self._teacher.start(), self._student.start())

    def _own(self, task: asyncio.Task[Any]) -> asyncio.Task[Any]:
        """Keep a task until it is done, to cancel it at the end."""
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _tick(self, journal: Journal) -> None:
        """Commit what was written: each 50 ms against a kill, twice a second against a power cut."""
        for number in count(1):
            await asyncio.sleep(0.05)
            try:
                journal.flush(sync=number % 10 == 0)
            except JournalError as error:
                self._journal_error = error  # the next piece that is kept stops the run with it
                return

    async def _batch(self, batch: Batch, seen: set[str]) -> Columns:
        settings, this = self._settings, asyncio.current_task()
        if this is not None:
            self._own(this)
        columns.check_columns(list(batch), settings.prompt_column, settings.id_column)
        prompts = batch[settings.prompt_column]
        if isinstance(prompts, str) or prompts is None:
            raise DatasetError(
                "The transform got a single row. A batch is expected: call map(transform, batched=True)."
            )
        if self._started is None:
            self._started = self._own(asyncio.create_task(self._start()))
        await asyncio.shield(self._started)
        ids = batch[settings.id_column] if settings.id_column is not None else [None] * len(prompts)
        tasks: list[asyncio.Task[dict[str, Any]]] = []
        try:
            async with self._admission:
                for given, prompt in zip(ids, prompts, strict=True):
                    await self._window.acquire()
                    tasks.append(self._own(asyncio.create_task(self._row(given, prompt, seen))))
                    tasks[-1].add_done_callback(lambda _: self._window.release())
            rows = await asyncio.gather(*tasks)
            if self._journal is not None:
                self._journal.flush()  # now they are durable
        finally:
            for task in tasks:
                task.cancel()
        return {name: [row[name] for row in rows] for name in columns.COLUMNS}

    async def _row(self, given: Any, prompt: Any, seen: set[str]) -> dict[str, Any]:
        """Write one row, whatever its prompt is like."""
        self._rows_seen += 1
        try:
            key, messages = self._read(given, prompt, seen)
        except PromptError as error:
            row = self._columns(Trajectory(str(given), finish_reason="error", error=str(error)), [])
        else:
            work = Prompt(key, messages, derive_seed(self._settings.seed, key), self._rows_seen)
            with self._progress.row():
                row = await (self._write(work) if self._journal is None else self._write_durably(work, self._journal))
        self._progress.done(row)
        return row

    def _columns(self, trajectory: Trajectory, messages: Sequence[Message]) -> dict[str, Any]:
        return columns.row(
            trajectory,
            messages,
            self._student.vocabulary,
            self._student.dialect,
            method=self._settings.method,
            run_fingerprint=self._fingerprint,
        )

    async def _write(self, prompt: Prompt) -> dict[str, Any]:
        """Write a row, trying again after what was kept where that may help."""
        plan, trajectory = self._settings.plan(prompt.key), None
        for attempt in range(1, self._settings.max_attempts + 1):
            trajectory = await synthesize(prompt, self._teacher, self._student, plan, begun=trajectory)
            if not trajectory.retryable or attempt == self._settings.max_attempts:
                break
            await asyncio.sleep(_pause(attempt))
        assert trajectory is not None
        return self._columns(trajectory, prompt.messages)

    async def _write_durably(self, prompt: Prompt, journal: Journal) -> dict[str, Any]:
        """Look a row up in the journal, or write it there as it is written."""
        plan = self._settings.plan(prompt.key)
        while True:
            claim = await self._claim(prompt.key, journal)
            if claim.status == "finished":
                return claim.columns
            begun = Trajectory.resume(prompt.key, prompt.seed, claim.spans, claim.state)
            try:
                record = functools.partial(self._record, journal)
                trajectory = await synthesize(prompt, self._teacher, self._student, plan, begun=begun, record=record)
                row = self._columns(trajectory, prompt.messages)
            except BaseException:
                journal.release(prompt.key)
                raise
            if trajectory.finish_reason != "error":
                journal.finish(prompt.key, row)
                return row
            journal.fail(prompt.key, row)
            if not trajectory.retryable or claim.attempts + 1 >= self._settings.max_attempts:
                return row
            await asyncio.sleep(_pause(claim.attempts + 1))

    async def _claim(self, key: str, journal: Journal) -> Claim:
        """Claim a row, waiting while another row with the same key or another process writes it."""
        while (claim := journal.claim(key)).status == "busy":  # noqa: ASYNC110 - another process sends no event
            await asyncio.sleep(0.2)
        return claim

    def _record(self, journal: Journal, trajectory: Trajectory, piece: Span) -> None:
        if self._journal_error is not None:
            raise self._journal_error
        journal.append(trajectory.key, [piece] if piece.text else [], trajectory.state())

    def _read(self, given: Any, prompt: Any, seen: set[str]) -> tuple[str, list[Message]]:
        """Return a row's key and messages.

        Raises:
            PromptError: The prompt is no prompt, or its id was seen before in this pass.
        """
        settings = self._settings
        messages = _messages(prompt, given, settings.prompt_column)
        if settings.system_prompt is not None:
            messages = [{"role": "system", "content": settings.system_prompt}, *messages]
        if settings.id_column is None:
            text = json.dumps(messages, sort_keys=True, ensure_ascii=False, default=str)
            return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32], messages
        if given is None or given == "":
            raise PromptError(
                f"A row has no id: column {settings.id_column!r} is {given!r}. "
                "Each row needs its own; fill the column or choose another with id_column=."
            )
        key = str(given)
        if key in seen:
            raise PromptError(
                f"Row {key!r}: another row has the same {settings.id_column!r}. Ids must be unique, else two rows "
                "would be taken for one; make them so, or pass id_column=None to tell rows apart by their prompts."
            )
        seen.add(key)
        return key, messages


def _pause(attempt: int) -> float:
    """Return the seconds to wait after a failed attempt."""
    return min(30.0, 0.1 * float(2**attempt))


def _journal(settings: Settings, fingerprint: str) -> Journal | None:
    if settings.journal is None:
        return None
    if settings.journal != "auto":
        return Journal(settings.journal, fingerprint, max_attempts=settings.max_attempts)
    folder = Path(datasets.config.HF_DATASETS_CACHE).parent / "tessy"
    return Journal(folder / f"{fingerprint}.journal", fingerprint, max_attempts=settings.max_attempts)


def _messages(prompt: Any, row: Any, column: str) -> list[Message]:
    """Read a prompt as chat messages.

    Raises:
        PromptError: It is neither text nor messages ending in the user's turn.
    """
    name = "A row" if row is None else f"Row {str(row)!r}"
    if isinstance(prompt, str) and prompt.strip():
        return [{"role": "user", "content": prompt}]
    if isinstance(prompt, list) and prompt and all(isinstance(m, Mapping) and m.get("content") for m in prompt):
        if prompt[-1].get("role") == "user":
            return [{"role": m["role"], "content": m["content"]} for m in prompt]
        raise PromptError(
            f"{name}: the last message in {column!r} is by {prompt[-1].get('role')!r}. A prompt ends in the user's "
            "turn; drop the messages after it."
        )
    shown = repr(prompt) if len(repr(prompt)) <= 60 else repr(prompt)[:57] + "..."
    raise PromptError(
        f"{name}: column {column!r} is {shown} ({type(prompt).__name__}). A non-empty string or a list of chat "
        "messages is expected; filter such rows or pass prompt_column= with another column."
    )


_register_with_hasher()
