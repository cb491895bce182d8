"""Where the rows of a run are: folders of shared rows, journals and files go in, what they hold is found by key.

Ids are read first, texts one row group at a time, so that memory does not grow with the texts. Knows no prompts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tessy_hf.errors import MergeError, PartsError
from tessy_hf.manifest import RunRecord
from tessy_hf.rows import columns, run_record
from tessy_hf.rows.prompt import hashed_columns
from tessy_hf.run.finished import journal_features, open_journal
from tessy_hf.run.journal_reader import JournalReader
from tessy_hf.run.shared_rows import list_shared
from tessy_hf.run.storage import ParquetRows, file_system
from tessy_hf.settings import Settings
from tessy_hf.text.thinking_format import ThinkingFormat
from tessy_hf.trajectory import RowKey


@dataclass(frozen=True)
class Found:
    """A row somewhere: whether it failed, and how to read it."""

    failed: bool
    read: Callable[[], dict[str, Any]]


class Sources:
    """The rows of one run in many places.

    Args:
        places: Folders of shared rows or ``.parquet`` files, as fsspec names them (with ``*``), and journals.
        settings: The run's settings; by default as the places record them.
        run: The run, if there are rows of several.

    Attributes:
        rows: What was found, by key.

    Raises:
        MergeError: There are rows of several runs, or the id column is unknown.
        PartsError: A file cannot be read.
        JournalError: A journal cannot be read.
    """

    def __init__(self, places: Sequence[str | Path], settings: Settings | None, run: str | None) -> None:
        self._given, self._wanted = settings, run
        self.rows: dict[RowKey, list[Found]] = {}
        self._runs: dict[str, int] = {}
        self._record: dict[str, Any] = {}
        self._keys: set[str] | None = None
        for place in map(str, places):
            self._add(place)
        self._check_runs()

    def _add(self, source: str) -> None:
        if source.endswith(".parquet"):
            self._add_files(source, glob=True)
        elif Path(source).is_file():
            self._add_journal(open_journal(Path(source)))
        else:
            self._add_files(source, glob=False)

    def _add_files(self, source: str, *, glob: bool) -> None:
        import pyarrow as pa

        system, path = file_system(source)
        found = sorted(map(str, system.glob(path))) if glob else list(list_shared(system, path))
        if not found:
            raise PartsError(
                f"There are no rows at {source!r}. A folder with parts, .parquet files with rows, or journals are "
                "expected; check the path."
            )
        files = ParquetRows(system)
        for file in found:
            schema = files.schema(file)
            messages = schema.field("messages").type if "messages" in schema.names else None
            if not (messages and (pa.types.is_list(messages) or pa.types.is_large_list(messages))):
                raise PartsError(
                    f"{file} has no column 'messages' with lists. Finished rows are expected; leave out other files."
                )
            message = messages.value_type
            keys = set(message.names) if pa.types.is_struct(message) else None  # messages with tool calls are JSON
            self._describe(run_record.of_schema(schema), keys)
            known = self._settings_known
            hashed = hashed_columns(known, schema.names) if known is not None else []
            hashed = [name for name in hashed if name != "key"]
            for key, run, place in files.keys(file, self._id_column(schema.names, file), hashed):
                self._keep(key, run, Found(place.failed, lambda place=place: files.row(place)))  # type: ignore[misc]

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
            stored = run_record.parse(one.description() or "{}", one.path)
            record = stored.model_dump(mode="json") if stored is not None else {}
            message = journal_features(one)["messages"].feature
            self._describe(record, set(message) if isinstance(message, dict) else None)
            for key, failed in one.keys():
                self._keep(key, run, Found(failed, lambda one=one, key=key: _columns_of(one.row(key))))  # type: ignore[misc]

    def _describe(self, record: Mapping[str, Any], keys: set[str] | None) -> None:
        self._keys = keys if self._keys is None else self._keys
        if record and self._wanted in (None, record.get("fingerprint")):  # of many hosts, the one that began first
            self._record = min(filter(None, (self._record, dict(record))), key=_age)

    def _keep(self, key: RowKey, run: str | None, found: Found) -> None:
        if self._wanted in (None, run):
            self._runs[str(run)] = self._runs.get(str(run), 0) + 1
            self.rows.setdefault(key, []).append(found)

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
        return self._given or run_record.prompt_settings(self._record)

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

    @property
    def thinking_format(self) -> ThinkingFormat:
        """The format of the rows' messages, as far as they tell it: the key that holds the thinking."""
        return ThinkingFormat(key=columns.thinking_key(self._keys or ()))


def _age(record: Mapping[str, Any]) -> tuple[str, str]:
    return str(record.get("begun") or "~"), json.dumps(record, sort_keys=True)


def _columns_of(row: Mapping[str, Any] | None) -> dict[str, Any]:
    return {name: row.get(name) for name in columns.COLUMNS} if row else {}
