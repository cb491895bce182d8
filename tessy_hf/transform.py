"""The object given to ``Dataset.map``: batches of prompts in, batches of columns out.

All rows of a run, whatever batch they came in, pass in order through one window of ``rows_in_flight`` rows on one
background loop (:mod:`tessy_hf.run`); so no batch waits for another and none has a tail of its own.
"""

from __future__ import annotations

import asyncio
import functools
import uuid
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tessy_hf import columns, provenance, typed_streams
from tessy_hf.errors import SettingsError
from tessy_hf.run import RUNS, Batch, Run
from tessy_hf.settings import Settings
from tessy_hf.speaker import Speaker

if TYPE_CHECKING:
    from datasets import Dataset, Features, IterableDataset

TRANSFORMS: weakref.WeakSet[TessyTransform] = weakref.WeakSet()
"""Those in this process, so that rows that carry only a fingerprint find what wrote them."""


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
    source: provenance.SourceRecord | None
    """The prompts last asked about with :meth:`features`."""
    _token: str
    _async: bool
    _begun: str | None

    def __new__(cls, *, teacher: Speaker, student: Speaker, **settings: Any) -> TessyTransform:
        """Check the settings. Loads nothing."""
        return cls._make(teacher, student, Settings.check(**settings), uuid.uuid4().hex)

    @classmethod
    def _make(
        cls,
        teacher: Speaker,
        student: Speaker,
        settings: Settings,
        token: str,
        source: provenance.SourceRecord | None = None,
    ) -> TessyTransform:
        self = super().__new__(cls, print)
        for name, speaker in (("teacher", teacher), ("student", student)):
            if settings.alternates and speaker.boundary is None:
                raise SettingsError(
                    f"The {name} has no boundary predictor, which method={settings.method!r} needs. "
                    f"Pass {name}=Speaker(engine, boundary=...) with a Hub id or folder, or another method."
                )
        self.teacher, self.student, self.settings = teacher, student, settings
        self.source, self._token, self._async, self._begun = source, token, False, None
        TRANSFORMS.add(self)
        return self

    @classmethod
    def from_yaml(cls, path: str | Path, *changes: str) -> TessyTransform:
        """Read a transform from a YAML file: the settings by name, and ``teacher`` and ``student``.

        Args:
            path: The file.
            *changes: What is to be different, for instance ``"temperature=0.5"`` or ``"teacher.model=me/model"``.

        Raises:
            SettingsError: The file cannot be read as such a description.
        """
        from tessy_hf.recipe import read

        teacher, student, settings = read(Path(path), changes)
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
        features = columns.features(dataset, self.settings.prompt_column, self.student.dialect)
        self.source = provenance.source(dataset)
        return features

    def record(self) -> provenance.RunRecord:
        """Describe the run: models and their revisions, settings, prompts, libraries and this machine."""
        return provenance.record(
            self.teacher, self.student, self.settings, self.run_fingerprint, self.source, self._begun
        )

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
        run = self._run()
        if self._async and _loop_is_running():
            task = asyncio.current_task()
            if (
                task is not None
            ):  # `datasets` abandons its tasks when a stream is dropped: no complaint for each of them
                task._log_destroy_pending = False  # type: ignore[attr-defined]
            return asyncio.wrap_future(run.submit(batch, asyncio.get_running_loop()))
        return run.submit(batch, None).result()

    def _run(self) -> Run:
        if self._token not in RUNS:
            self._begun = provenance.now()
            RUNS[self._token] = Run(self.teacher, self.student, self.settings, self.run_fingerprint, self.record)
        return RUNS[self._token]

    def close(self) -> None:
        """Stop what is under way and let go of the engines. The transform can be used again; it starts afresh."""
        run = RUNS.pop(self._token, None)
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
        return _restore, (type(self), self.teacher, self.student, self.settings, self._token, self.source)

    def __repr__(self) -> str:
        """Show the method and the models."""
        models = f"teacher={self.teacher.engine.model!r}, student={self.student.engine.model!r}"
        return f"TessyTransform({models}, method={self.settings.method!r}, fingerprint={self.run_fingerprint})"


def _restore(cls: type[TessyTransform], *given: Any) -> TessyTransform:
    return cls._make(*given)


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


_register_with_hasher()
typed_streams.install(lambda function: isinstance(function, TessyTransform))
