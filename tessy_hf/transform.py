"""The object given to ``Dataset.map``: batches of prompts in, batches of columns out.

All rows of a run, whatever batch they came in, pass in order through one window of ``rows_in_flight`` rows on one
background loop (:mod:`tessy_hf.run.runner`); so no batch waits for another and none has a tail of its own.
"""

from __future__ import annotations

import asyncio
import copy
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
from tessy_hf.rows.batch import Columns
from tessy_hf.rows.output import write_rows
from tessy_hf.rows.tools import SOURCE_TOOLS, TOOLS
from tessy_hf.run.batch_function import BatchFunction
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


class TessyTransform(BatchFunction):
    """Cooperative synthesis as a function for ``map(..., batched=True)``.

    Works on ``Dataset`` and ``IterableDataset``, in scripts, notebooks and with ``num_proc``. A rerun finds the
    cache of ``datasets``, a changed setting or speaker does not. Engines live from the first batch to :meth:`close`.

    Args:
        teacher: The strong model, writer of capability spans: a :class:`Speaker`, an engine, or a model's Hub id or
            folder, which ``transformers`` then runs in this process. ``student-only`` needs none.
        student: The model to be trained, writer of style spans and the answer. ``teacher-only`` reads its tokenizer.
        **settings: See :class:`tessy_hf.settings.Settings`, for instance ``prompt_column`` and ``journal``.

    Raises:
        SettingsError: A setting is unknown or out of range, or an author or its boundary predictor is missing.
    """

    teacher: Speaker | None
    student: Speaker
    settings: Settings
    source: provenance.SourceRecord | None  # the prompts last asked about with features()
    recipe: str | None  # the file it was read from
    _token: str
    _begun: str | None
    _expected: tuple[int | None, int | None]  # rows, and those found
    _asked: tuple[Speaker | None, Speaker]  # as far as the method uses them

    def __new__(cls, *, teacher: Model | None = None, student: Model, **settings: Unpack[GivenSettings]) -> Self:
        """Check the settings. Loads nothing."""
        speakers = None if teacher is None else as_speaker(teacher), as_speaker(student)
        return cls._make(*speakers, Settings.check(**settings), uuid.uuid4().hex)

    @classmethod
    def _make(cls, teacher: Speaker | None, student: Speaker, settings: Settings, token: str, *origin: Any) -> Self:
        teacher, student = _complete(teacher, student, settings)
        self = cls._new()
        self.teacher, self.student, self.settings = teacher, student, settings
        self._asked, self._expected = _asked(teacher, student, settings), (None, None)
        (self.source, self.recipe), self._token, self._begun = origin or (None, None), token, None
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
        transform = cls(teacher=teacher, student=student, **settings)
        transform.recipe = str(path)
        return transform

    @property
    def asked(self) -> dict[str, Speaker]:
        """The speakers that the method asks for text, by author, as far as it uses them."""
        both = zip(("teacher", "student"), self._asked, strict=True)
        return {name: one for name, one in both if one is not None and name in self.settings.authors}

    @property
    def run_fingerprint(self) -> str:
        """The hash of all that decides the rows. While engines are open it is that of the models they have loaded."""
        return (self._token in RUNS and RUNS[self._token].fingerprint) or self._fingerprint()

    def _fingerprint(self) -> str:
        both = zip(("teacher", "student"), self._asked, strict=True)
        return self.settings.fingerprint({name: one and one.identity for name, one in both})

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
        """Return the schema of ``dataset.map(self, batched=True)``, of a ``DatasetDict`` that of its first split.

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
        asked = *self._asked, self.settings, self.run_fingerprint
        return provenance.record(*asked, self.source, self._begun, self.recipe)

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
        return self._make(self.teacher, self.student, changed, uuid.uuid4().hex, self.source, self.recipe)

    def loads(self) -> dict[str, Load]:
        """Return for what rows waited since the engines were started: ``teacher``, ``student``, ``predictors``."""
        return RUNS[self._token].meter.loads() if self._token in RUNS else {}

    def summary(self) -> Summary:
        """Return how the rows since the engines were started ended; ``print`` it."""
        return RUNS[self._token].summary if self._token in RUNS else Summary()

    # --- being called

    def submit(self, batch: Columns, caller: asyncio.AbstractEventLoop | None = None) -> Future[dict[str, list[Any]]]:
        """Hand over a batch of columns; return the future of the new ones. Rows enter the window in this order."""
        return self.run().submit(batch, caller)

    @property
    def layout(self) -> tuple[str, str | None]:
        """The column with the prompts, and the key for thinking in messages."""
        return self.settings.prompt_column, self._asked[1].thinking_format.key

    def run(self) -> Run:
        """Return what is live; it is made at first use."""
        if self._token not in RUNS:
            self._begun = provenance.now()
            STREAMS.open(self)
            RUNS[self._token] = run = Run(*self._asked, self.settings, self._fingerprint, self.record)
            run.expect(*self._expected)
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
        return _restore, (type(self), self.teacher, self.student, self.settings, self._token, self.source, self.recipe)

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


def _complete(teacher: Speaker | None, student: Speaker, settings: Settings) -> tuple[Speaker | None, Speaker]:
    """Return the speakers with all that a method needs of them.

    Raises:
        SettingsError: A teacher or a boundary predictor is missing.
    """
    if teacher is None and "teacher" in settings.authors:
        raise SettingsError(
            f"The method {settings.method!r} needs a teacher and got none. Pass for instance "
            'teacher="Qwen/Qwen3-8B", or method="student-only".'
        )
    if teacher is not None and settings.reads_predictors:
        return _with_predictors(teacher, student)
    return teacher, student


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


STREAMS = datasets_internals.TypedStreams(TessyTransform)
datasets_internals.hash_as(TessyTransform, lambda transform: f"TessyTransform {transform.run_fingerprint}")
