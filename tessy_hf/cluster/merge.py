"""One dataset of what many hosts wrote: parts, journals and files of rows go in with the prompts, the rows come out.

The prompts decide. Each has exactly one row in the result, in their order, with their columns, as one process would
have written them. A row belongs to a prompt if both its id and the hash of what it answers are the prompt's. Missing,
duplicate and unknown rows are listed by id before anything is written. Ids are read first, texts one row group at a
time, so that memory does not grow with the texts.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tessy_hf.errors import MergeError, PartsError, PromptError
from tessy_hf.manifest import RunRecord
from tessy_hf.rows import columns
from tessy_hf.rows.datasets_internals import table
from tessy_hf.rows.parquet import BATCH_ROWS, ShardWriter
from tessy_hf.rows.prompt import PromptReader, hashed_columns
from tessy_hf.run.finished import journal_features, open_journal
from tessy_hf.run.journal_reader import JournalReader
from tessy_hf.run.shared_rows import list_shared, record_of
from tessy_hf.run.storage import ParquetRows, file_system
from tessy_hf.settings import Settings
from tessy_hf.text.thinking_format import HARMONY, THINK_TAGS
from tessy_hf.trajectory import RowKey, Trajectory

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset, Features, IterableDataset

SHARD_BYTES = 500 << 20
"""About how many bytes, uncompressed, a file of a result in several files holds."""

_COSTS = frozenset(name for name in columns.COLUMNS if name.startswith(("discarded_", "generated_")))
"""What may differ between two writings of the same row: what a row that was taken up again had cost before."""


@dataclass
class Report:
    """What a merge found.

    Attributes:
        prompts: How many prompts there are.
        unusable: How many of them no row can be written for (no text, an id that was there before); they get a row
            that says so.
        missing: Ids of prompts without a row.
        foreign: Ids of rows without a prompt. They are left out.
        other_prompts: Ids of prompts without a row, but with a row that answers another prompt. They are in
            ``missing`` as well.
        duplicates: Ids of rows that are there more than once, all the same, or failed but for one; one is taken.
        differing: Ids of rows that are there more than once and differ.
        failed: How many prompts have nothing but a row that failed.
    """

    prompts: int = 0
    unusable: int = 0
    missing: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)
    other_prompts: list[str] = field(default_factory=list)
    duplicates: list[str] = field(default_factory=list)
    differing: list[str] = field(default_factory=list)
    failed: int = 0


@dataclass(frozen=True)
class _Found:
    """A row somewhere: whether it failed, and how to read it."""

    failed: bool
    read: Callable[[], dict[str, Any]]


class Merge:
    """Rows of one run from many places, held against the prompts. Reads ids when made, texts when asked for rows.

    Args:
        sources: Folders of parts or ``.parquet`` files, as fsspec names them (with ``*``), and journals.
        dataset: The prompts, all of them.
        settings: Which columns the prompts and ids are in; by default as parts and journals tell it.
        run: The run, where there are rows of several.
        first: Of rows that differ, take that of the source named first, instead of refusing.
        incomplete: Leave out the prompts whose rows are missing, instead of refusing.

    Raises:
        MergeError: There are rows of several runs, or it is not known which column has the ids.
        PartsError: A file cannot be read.
        JournalError: A journal cannot be read.
        DatasetError: The prompts lack a column.
    """

    def __init__(
        self,
        sources: Sequence[str | Path],
        dataset: Dataset | IterableDataset,
        *,
        settings: Settings | None = None,
        run: str | None = None,
        first: bool = False,
        incomplete: bool = False,
    ) -> None:
        self._dataset, self._given, self._first, self._incomplete = dataset, settings, first, incomplete
        self._rows: dict[RowKey, list[_Found]] = {}
        self._runs: dict[str, int] = {}
        self._record: dict[str, Any] = {}
        self._marks_in_content: bool | None = None
        self._wanted = run
        for source in map(str, sources):
            self._add(source)
        self._check_runs()
        thinking_format = HARMONY if self._marks_in_content is False else THINK_TAGS
        self.features: Features = columns.features(dataset, self.settings.prompt_column, thinking_format)
        self.report = self._matched()

    # --- what is there

    def _add(self, source: str) -> None:
        if source.endswith(".parquet"):
            self._add_files(source, glob=True)
        elif Path(source).is_file():
            self._add_journal(open_journal(Path(source)))
        else:
            self._add_files(source, glob=False)

    def _add_files(self, source: str, *, glob: bool) -> None:
        system, path = file_system(source)
        found = sorted(map(str, system.glob(path))) if glob else list_shared(system, path)
        if not found:
            raise PartsError(
                f"There are no rows at {source!r}. A folder with parts, .parquet files with rows, or journals are "
                "expected; check the path."
            )
        files = ParquetRows(system)
        for file in found:
            schema = files.schema(file)
            self._describe(record_of(schema), _keeps_marks(schema))
            known = self._settings_known
            hashed = hashed_columns(known, schema.names) if known is not None else []
            hashed = [name for name in hashed if name not in ("key", "prompt_hash")]
            for key, run, place in files.keys(file, self._id_column(schema.names, file), hashed):
                self._keep(key, run, _Found(place.failed, lambda place=place: files.row(place)))  # type: ignore[misc]

    def _id_column(self, names: Sequence[str], file: str) -> str:
        """Return the column with the ids: the prompts' own where it is there, else that of shared rows."""
        known = self._settings_known
        if known is not None and known.id_column in names:
            return str(known.id_column)
        if "key" in names:
            return "key"
        raise MergeError(
            f"{file} does not tell which column has the rows' ids. Parts, journals, or the settings of the run with "
            "id_column= are expected; pass settings= (--recipe) with those the rows were written with."
        )

    def _add_journal(self, journal: JournalReader) -> None:
        for run in journal.fingerprints():
            if self._wanted not in (None, run):
                continue
            one = JournalReader(journal.path, run, max_attempts=1)
            described = one.description()
            record = RunRecord.model_validate_json(described).model_dump(mode="json") if described else {}
            self._describe(record, "thinking" not in journal_features(one)["messages"].feature)
            for key, failed in one.keys():
                self._keep(key, run, _Found(failed, lambda one=one, key=key: one.row(key) or {}))  # type: ignore[misc]

    def _describe(self, record: Mapping[str, Any], marks_in_content: bool) -> None:
        if self._marks_in_content is None:
            self._marks_in_content = marks_in_content
        if not self._record and (self._wanted in (None, record.get("fingerprint"))):
            self._record = dict(record)

    def _keep(self, key: RowKey, run: str | None, found: _Found) -> None:
        if self._wanted in (None, run):
            self._runs[str(run)] = self._runs.get(str(run), 0) + 1
            self._rows.setdefault(key, []).append(found)

    def _check_runs(self) -> None:
        if len(self._runs) > 1:
            counts = ", ".join(f"{run} ({count} rows)" for run, count in self._runs.items())
            raise MergeError(
                f"There are rows of several runs: {counts}. Rows of different settings or models are not mixed; leave "
                "the sources of the others out, or pass run= (--run) with one."
            )
        if self._wanted is not None and not self._runs:
            raise MergeError(f"There are no rows of run {self._wanted!r}. Check the name, or leave it out.")

    @property
    def _settings_known(self) -> Settings | None:
        """The settings that tell the prompts' columns: those given, else those that a source has told."""
        if self._given is not None or not self._record.get("settings"):
            return self._given
        told = self._record["settings"]
        names = {name: told[name] for name in ("prompt_column", "id_column", "system_prompt")}
        verifier = told.get("verifier")
        return Settings.check(**names, verifier=_unknown if "function" in (verifier or {}) else verifier)

    @cached_property
    def settings(self) -> Settings:
        """The settings that tell the prompts' columns."""
        if self._settings_known is None:
            raise MergeError(
                "The sources do not tell which columns the run has read. Its settings are expected; pass settings= "
                "(--recipe) with those the rows were written with."
            )
        return self._settings_known

    @property
    def run(self) -> str | None:
        """The fingerprint of the rows' run; ``None`` where there are no rows."""
        return next(iter(self._runs), None)

    @property
    def record(self) -> RunRecord | None:
        """The run's description, where a source has one, for ``push_to_hub(..., manifest=)``."""
        return RunRecord.model_validate(self._record) if self._record else None

    # --- matched with the prompts

    def _matched(self) -> Report:
        report, wanted, unusable = Report(), dict[RowKey, None](), set[str]()
        ids = {key.id for key in self._rows}
        for key, prompt, _ in self._prompts():
            report.prompts += 1
            if key is None:
                report.unusable += 1
                unusable.add(str(self._id(prompt)))
            elif key not in wanted:
                wanted[key] = None
                there = self._rows.get(key)
                if there is None:
                    report.missing.append(key.id)
                    report.other_prompts += [key.id] if key.id in ids else []
                else:
                    report.failed += all(one.failed for one in there)
        report.foreign = [key.id for key in self._rows if key not in wanted and key.id not in unusable]
        for key in wanted:
            if len(found := self._rows.get(key, [])) > 1:
                (report.duplicates if self._are_one(found) else report.differing).append(key.id)
        return report

    def _are_one(self, found: Sequence[_Found]) -> bool:
        """Whether rows of the same id say the same; what failed yields to what did not."""
        texts = (_said(one.read()) for one in found if not one.failed)
        first = next(texts, None)
        return all(text == first for text in texts)

    def _prompts(self) -> Iterator[tuple[RowKey | None, Mapping[str, Any], PromptError | None]]:
        """Iterate over the prompts: the key, the row, and what is wrong with it where there is no key."""
        prompt = self.settings.prompt_column
        names = [name for name in self.features if name not in columns.COLUMNS]
        reader = PromptReader(self.settings, [*names, *([] if prompt in names else [prompt])])
        for row in self._dataset:
            try:
                yield reader.read(row).row_key, row, None
            except PromptError as error:
                yield None, row, error

    # --- the rows

    def check(self) -> None:
        """Refuse where the rows do not make the whole.

        Raises:
            MergeError: Rows are missing, or differ.
        """
        missing, differing = self.report.missing, self.report.differing
        if missing and not self._incomplete:
            raise MergeError(
                f"{len(missing)} of {self.report.prompts} prompts have no row: {some(missing)}. {self._reworded()}"
                "One for each is expected; run their shards again with the same journals and parts, which writes only "
                "what is missing, or pass incomplete=True (--incomplete) to go without them."
            )
        if differing and not self._first:
            raise MergeError(
                f"{len(differing)} rows are there more than once and differ: {some(differing)}. Two hosts wrote them, "
                "and their models did not repeat themselves; each is a proper row. Pass first=True (--first) to take "
                "that of the source named first, or leave a source out."
            )

    def _reworded(self) -> str:
        others = self.report.other_prompts
        return f"Of {some(others)} there are rows, but they answer other prompts. " if others else ""

    def rows(self) -> Iterator[dict[str, Any]]:
        """Iterate over the rows of the result.

        Raises:
            MergeError: See :meth:`check`.
        """
        self.check()
        for key, prompt, error in self._prompts():
            if error is not None:
                yield {**prompt, **self._unusable(prompt, error)}
            elif key in self._rows:
                found = self._rows[key]
                yield {**prompt, **next((one for one in found if not one.failed), found[0]).read()}

    def _id(self, prompt: Mapping[str, Any]) -> Any:
        return prompt[self.settings.id_column] if self.settings.id_column is not None else None

    def _unusable(self, prompt: Mapping[str, Any], error: PromptError) -> dict[str, Any]:
        return columns.row(
            Trajectory(str(self._id(prompt)), finish_reason="error", error=str(error)),
            [],
            None,
            THINK_TAGS,
            method=self._record.get("method") or self.settings.method,
            run_fingerprint=str(self.run),
        )

    def dataset(self) -> IterableDataset:
        """Return the rows as a stream, for instance for ``push_to_hub(merge.dataset(), ..., manifest=merge.record)``.

        Raises:
            MergeError: See :meth:`check`.
        """
        from datasets import IterableDataset

        self.check()
        return IterableDataset.from_generator(self.rows, features=self.features)

    def write(self, out: str | Path) -> int:
        """Write the rows to a ``.parquet`` file, or as several into a folder; return how many.

        What was there under these names stays until all is written.

        Raises:
            MergeError: See :meth:`check`.
        """
        self.check()
        out = Path(out)
        single = out.suffix == ".parquet"
        folder = out.parent if single else out
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".tessy-merge-") as fresh:
            writer = ShardWriter(Path(fresh), "train-", 0, self.features, (1 << 62) if single else SHARD_BYTES)
            written = [path for rows in self._batches() for _, path in writer.write(table(rows, self.features))]
            written += [path for _, path in writer.close()] or ([] if written else [writer.empty()[1]])
            for path in written:
                path.replace(out if single else folder / path.name)
        return writer.rows

    def _batches(self) -> Iterator[list[dict[str, Any]]]:
        rows = self.rows()
        while batch := list(islice(rows, BATCH_ROWS)):
            yield batch


def some(ids: Sequence[str], most: int = 10) -> str:
    """Name a few of many ids."""
    return ", ".join(map(repr, ids[:most])) + (f" and {len(ids) - most} more" if len(ids) > most else "")


def _unknown(row: Mapping[str, Any]) -> bool:
    """Stand for a verifier that was a function: it is not called here, but may have read any column."""
    raise NotImplementedError


def _said(row: Mapping[str, Any]) -> Any:
    """Return what a row says, however it was stored: without what it had cost, and without fields that are null."""
    return _plain({name: value for name, value in row.items() if name not in _COSTS})


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(one) for name, one in value.items() if one is not None}
    return [_plain(one) for one in value] if isinstance(value, list) else value


def _keeps_marks(schema: pa.Schema) -> bool:
    """Whether thinking stands in a message's content, and not under a key of its own."""
    message = schema.field("messages").type.value_type
    return bool(message.get_field_index("thinking") < 0)
