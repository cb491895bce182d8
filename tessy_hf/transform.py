"""The object given to ``Dataset.map``: batches of prompts in, batches of columns out.

All rows of a run, whatever batch they came in, pass in order through one window of ``rows_in_flight`` rows on one
background loop (:mod:`tessy_hf.run.runner`); so no batch waits for another and none has a tail of its own.
"""

from __future__ import annotations

import asyncio
import copy
import functools
import uuid
import warnings
import weakref
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeAlias, Unpack

from tessy_hf import manifest as provenance
from tessy_hf.boundary.predictor import BoundaryPredictor, is_shipped
from tessy_hf.engines.tokenizer_only import TokenizerOnly
from tessy_hf.errors import DatasetError, SettingsError
from tessy_hf.method.speaker import Model, Speaker, as_speaker
from tessy_hf.rows import columns, datasets_internals, prompt_source
from tessy_hf.rows.batch import Batch, Columns
from tessy_hf.rows.output import write_rows
from tessy_hf.rows.tools import SOURCE_TOOLS, TOOLS
from tessy_hf.run.journal import Counts
from tessy_hf.run.progress import Summary
from tessy_hf.run.runner import RUNS, Run
from tessy_hf.run.stores import plan
from tessy_hf.settings import GivenSettings, Settings, expand_preset

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict, Features, IterableDataset, IterableDatasetDict

    AnyDataset: TypeAlias = Dataset | IterableDataset | DatasetDict | IterableDatasetDict
    from tessy_hf.run.metering import Load

TRANSFORMS: weakref.WeakSet[TessyTransform] = weakref.WeakSet()
"""Those in this process, so that rows that carry only a fingerprint find what wrote them."""


class TessyTransform(functools.partial[Any]):
    """Cooperative synthesis as a function for ``map(..., batched=True)``.

    Works on ``Dataset`` and ``IterableDataset``, in scripts, notebooks and with ``num_proc``. A rerun finds the
    ``datasets`` cache, a changed setting or speaker does not. Engines live from the first batch to :meth:`close`.

    It is a ``functools.partial``, the one kind of object in which ``datasets`` can find a coroutine function where no
    event loop runs (scripts), and a plain one where one does (notebooks).

    Until :meth:`close`, `datasets` converts streams that it writes by their declared features
    (:mod:`tessy_hf.rows.datasets_internals`), so that their own ``push_to_hub()`` and ``to_parquet()`` work.

    Args:
        teacher: The strong model, writer of capability spans: a :class:`Speaker`, an engine, or a model's Hub id or
            folder, which ``transformers`` then runs in this process. ``student-only`` needs none.
        student: The model to be trained, writer of style spans and of the answer. Of ``teacher-only`` only its
            tokenizer is loaded.
        **settings: See :class:`tessy_hf.settings.Settings`, for instance ``method``, ``prompt_column``, ``journal``.

    Raises:
        SettingsError: A setting is unknown or out of range, or an author or its boundary predictor is missing.
    """

    teacher: Speaker | None
    student: Speaker
    settings: Settings
    source: provenance.SourceRecord | None  # the prompts last asked about with features()
    _token: str
    _async: bool
    _begun: str | None
    _expected: tuple[int | None, int | None]  # rows, and those found
    _asked: tuple[Speaker | None, Speaker]  # as far as the method uses them

    def __new__(cls, *, teacher: Model | None = None, student: Model, **settings: Unpack[GivenSettings]) -> Self:
        """Check the settings. Loads nothing."""
        first = None if teacher is None else as_speaker(teacher)
        return cls._make(first, as_speaker(student), Settings.check(**settings), uuid.uuid4().hex)

    @classmethod
    def _make(
        cls, teacher: Speaker | None, student: Speaker, settings: Settings, token: str, source: Any = None
    ) -> Self:
        if teacher is None and "teacher" in settings.authors:
            raise SettingsError(
                f"The method {settings.method!r} needs a teacher and got none. Pass for instance "
                'teacher="Qwen/Qwen3-8B", or method="student-only".'
            )
        if settings.reads_predictors:
            assert teacher is not None
            teacher, student = _with_predictors(teacher, student)
        self = super().__new__(cls, print)
        self.teacher, self.student, self.settings = teacher, student, settings
        self._asked, self._expected = _asked(teacher, student, settings), (None, None)
        self.source, self._token, self._async, self._begun = source, token, False, None
        TRANSFORMS.add(self)
        STREAMS.open(self)
        return self

    @classmethod
    def from_yaml(cls, path: str | Path, *changes: str) -> TessyTransform:
        """Read a transform from a YAML file: the settings by name, and ``teacher`` and ``student``.

        ``changes`` override it, for instance ``"temperature=0.5"`` or ``"teacher.model=me/model"``.

        Raises:
            SettingsError: The file cannot be read as such a description.
        """
        from tessy_hf.recipe import read

        teacher, student, settings = read(Path(path), changes)
        return cls(teacher=teacher, student=student, **settings)

    @property
    def asked(self) -> dict[str, Speaker]:
        """The speakers that the method asks for text, by author, as far as it uses them."""
        both = {"teacher": self._asked[0], "student": self._asked[1]}
        return {name: one for name, one in both.items() if one is not None and name in self.settings.authors}

    @property
    def run_fingerprint(self) -> str:
        """The hash of all that decides the rows. While engines are open it is that of the models they have loaded."""
        run = RUNS.get(self._token)
        return (run and run.fingerprint) or self._fingerprint()

    def _fingerprint(self) -> str:
        teacher, student = self._asked
        return self.settings.fingerprint({"teacher": teacher and teacher.identity, "student": student.identity})

    def map(self, dataset: AnyDataset, **options: Any) -> Any:
        """Write an answer to each prompt: ``dataset.map(self, batched=True, features=self.features(dataset))``.

        Each split of a ``DatasetDict`` is mapped. ``options`` are those of ``map``, such as ``num_proc``.

        Raises:
            DatasetError: The prompt column is missing, or a column would be overwritten.
        """
        if isinstance(dataset, Mapping):
            splits: Any = type(dataset)
            return splits({name: self.map(split, **options) for name, split in dataset.items()})
        features = _without(self.features(dataset), options.get("remove_columns") or [])
        return dataset.map(self, **{"batched": True, "features": features, **options})

    def features(self, dataset: AnyDataset) -> Features:
        """Return the schema of ``dataset.map(self, batched=True)``, for ``map(..., features=...)``.

        Of a ``DatasetDict`` it is that of the first split: its ``map`` has one for all.

        Raises:
            DatasetError: The prompt column is missing, or a column would be overwritten.
        """
        dataset = _splits(dataset)[0]
        features = columns.features(dataset, self.settings.prompt_column, self._asked[1].thinking_format)
        self.source = prompt_source.source(dataset)
        self._expect(len(dataset) if hasattr(dataset, "__len__") else None)
        return features

    def _expect(self, rows: int | None, found: int | None = None) -> None:
        """Note how many rows come, for the status line."""
        if found is None and rows == self._expected[0]:
            found = self._expected[1]  # a plan of these rows has told
        self._expected = rows, found
        if self._token in RUNS:
            RUNS[self._token].expect(rows, found)

    def record(self) -> provenance.RunRecord:
        """Describe the run: models and their revisions, settings, prompts, libraries and this machine."""
        return provenance.record(*self._asked, self.settings, self.run_fingerprint, self.source, self._begun)

    def write(self, rows: Dataset | IterableDataset, path: str | Path, *, overwrite: bool = False) -> int:
        """Write rows to a ``.parquet`` or ``.jsonl`` file with the run's record, all or none; return their number.

        Args:
            rows: What :meth:`map` has returned; a stream is generated meanwhile.
            path: The file. One of this run with no other rows is replaced.
            overwrite: Whether to replace any file.

        Raises:
            OutputError: The file cannot be written, or another one is there.
        """
        return write_rows(rows, path, self.settings, self.run_fingerprint, self.record, overwrite=overwrite)

    def plan(self, dataset: AnyDataset) -> Counts:
        """Count how a dataset's rows stand before any work. Reads prompts and journal; starts nothing.

        Says on stderr how many ids were seen before with another prompt: such rows are written anew.

        Raises:
            DatasetError: The prompt column or the id column is missing.
            JournalError: The journal cannot be read.
        """
        counts = [plan(split, self.settings, self.run_fingerprint, self.record) for split in _splits(dataset)]
        summed = Counts(*map(sum, zip(*counts, strict=True)))
        self._expect(sum(summed), summed.done)
        return summed

    def with_settings(self, **settings: Unpack[GivenSettings]) -> Self:
        """Return the same transform with some settings changed, for instance ``journal=None``.

        Raises:
            SettingsError: A setting is unknown or out of range.
        """
        changed = Settings.check(**{**dict(self.settings), **expand_preset(settings)})
        return self._make(self.teacher, self.student, changed, uuid.uuid4().hex, self.source)

    def loads(self) -> dict[str, Load]:
        """Return for what rows waited since the engines were started: ``teacher``, ``student``, ``predictors``."""
        return RUNS[self._token].meter.loads() if self._token in RUNS else {}

    def summary(self) -> Summary:
        """Return how the rows since the engines were started ended; ``print`` it."""
        return RUNS[self._token].summary if self._token in RUNS else Summary()

    # --- being called

    @property
    def func(self) -> Any:
        """What ``datasets`` inspects: a coroutine function, unless an event loop runs in this thread already."""
        self._async = not _loop_is_running()
        return _coroutine_function if self._async else _function

    def __call__(self, batch: Any, /, *extra: Any) -> Any:
        """Write the rows of a batch: return the new columns; inside an asynchronous ``map``, an awaitable of them.

        Raises:
            DatasetError: It is not a batch, or lacks a column.
            TemplateError: A chat template would lose the thinking.
            BoundaryError: A boundary predictor cannot be read.
            EngineDeadError: An engine is gone; finished rows are in the journal, where there is one.
        """
        given = Batch.read(batch, extra)
        layout = self.settings.prompt_column, self._asked[1].thinking_format.key
        if not (self._async and _loop_is_running()):
            return given.returned(self.submit(given.columns).result(), *layout)
        return _later(given, self.run().submit(given.columns, asyncio.get_running_loop()), layout)

    def submit(self, batch: Columns) -> Future[dict[str, list[Any]]]:
        """Hand over a batch of columns; return the future of the new ones. Rows enter the window in this order."""
        return self.run().submit(batch, None)

    def run(self) -> Run:
        """Return what is live; it is made at first use."""
        if self._token not in RUNS:
            self._begun = provenance.now()
            STREAMS.open(self)
            RUNS[self._token] = Run(*self._asked, self.settings, self._fingerprint, self.record)
            RUNS[self._token].expect(*self._expected)
        return RUNS[self._token]

    def close(self) -> None:
        """Stop what is under way and close the engines. The transform can be used again; it starts afresh."""
        STREAMS.close(self)
        if (run := RUNS.pop(self._token, None)) is not None:
            run.close()

    def __enter__(self) -> Self:
        """Return the transform itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()

    # --- being pickled, hashed and shown

    def __reduce__(self) -> Any:
        """Carry the description, never what is live."""
        return _restore, (type(self), self.teacher, self.student, self.settings, self._token, self.source)

    def __repr__(self) -> str:
        """Show the method and the models."""
        models = f"teacher={self.teacher and self.teacher.engine.model!r}, student={self.student.engine.model!r}"
        return f"TessyTransform({models}, method={self.settings.method!r}, fingerprint={self.run_fingerprint})"


def _asked(teacher: Speaker | None, student: Speaker, settings: Settings) -> tuple[Speaker | None, Speaker]:
    """Return the speakers as far as a method uses them; nothing else is loaded, started or in the fingerprint."""
    teacher, student = copy.copy(teacher), copy.copy(student)
    if "student" not in settings.authors:
        student.engine = TokenizerOnly(student.engine)
    for one in (teacher, student):
        if one is not None and not settings.reads_predictors:
            one.boundary = None
    return teacher if "teacher" in settings.authors else None, student


def _with_predictors(teacher: Speaker, student: Speaker) -> tuple[Speaker, Speaker]:
    """Give the small predictor that comes with the package to an author that has none, and say so.

    Raises:
        SettingsError: This installation has no small predictor.
    """
    missing = [name for name, speaker in (("teacher", teacher), ("student", student)) if speaker.boundary is None]
    if not missing:
        return teacher, student
    where = ", ".join(f"{name}=Speaker(engine, boundary=...)" for name in missing)
    lacking = f"The {' and the '.join(missing)} {'has' if len(missing) == 1 else 'have'} no boundary predictor"
    if not is_shipped():
        raise SettingsError(
            f"{lacking}, which methods that alternate by predictors need, and the small one that comes with tessy-hf "
            f"is not installed. Pass {where} with a Hub id or folder, or another method or switch."
        )
    warnings.warn(
        f"{lacking}: the small one that comes with tessy-hf is used. It has a few million parameters and knows only "
        f"English reasoning text like that of gpt-oss and Qwen3. For better spans pass {where} with a Hub id or "
        "folder; boundary=BoundaryPredictor() chooses the small one without this warning.",
        stacklevel=4,
    )
    small = BoundaryPredictor()
    first, second = (copy.copy(s) if s.boundary is None else s for s in (teacher, student))
    first.boundary, second.boundary = first.boundary or small, second.boundary or small
    return first, second


def _without(features: Features, removed: str | list[str]) -> Features:
    """Return the schema of rows whose input columns are removed; what the models were shown stays."""
    names = {removed} if isinstance(removed, str) else {*removed}
    gone = names.difference((*columns.COLUMNS, TOOLS, SOURCE_TOOLS))
    return type(features)({name: kind for name, kind in features.items() if name not in gone})


def _splits(dataset: Any) -> list[Any]:
    """Return the splits of a dataset, or the one dataset.

    Raises:
        DatasetError: There is none.
    """
    splits = list(dataset.values()) if isinstance(dataset, Mapping) else [dataset]
    if not splits:
        raise DatasetError("The DatasetDict has no splits. At least one with prompts is expected; look at its files.")
    return splits


def _restore(cls: type[TessyTransform], *given: Any) -> TessyTransform:
    return cls._make(*given)


async def _later(given: Batch, written: Future[dict[str, list[Any]]], layout: tuple[str, str | None]) -> Any:
    # Not asyncio.wrap_future: it would keep the tasks of a stream that was dropped, which `datasets` leaves pending.
    waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    written.add_done_callback(functools.partial(_wake, weakref.ref(waiter)))
    try:
        await waiter
        return given.returned(written.result(), *layout)
    finally:
        written.cancel()


def _wake(waiter: weakref.ref[asyncio.Future[None]], written: Future[Any]) -> None:
    if (waits := waiter()) is not None and not waits.get_loop().is_closed():
        waits.get_loop().call_soon_threadsafe(_end, waits, written.cancelled())


def _end(waiter: asyncio.Future[None], cancelled: bool) -> None:
    if cancelled:
        waiter.cancel()
    elif not waiter.done():
        waiter.set_result(None)


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


STREAMS = datasets_internals.TypedStreams(TessyTransform)
datasets_internals.hash_as(TessyTransform, lambda transform: f"TessyTransform {transform.run_fingerprint}")
