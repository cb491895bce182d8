"""Finished rows on storage that all hosts see: small Parquet files, each of them whole or not there.

A folder as fsspec names it (``/shared/run``, ``s3://bucket/run``) and rows by their keys go in; which keys are there,
and their rows, come out, on any host. Writers need not know of each other: a file is named after its run and its
content, and is never changed. A row may be in several files, where two hosts wrote it; a merge takes one. Knows
nothing of models and prompts.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from tessy_hf.errors import PartsError
from tessy_hf.rows import columns, run_record
from tessy_hf.rows.datasets_internals import table
from tessy_hf.run.storage import PROMPT_HASH, RETRIES, ParquetRows, Place, check_writable, file_system, put
from tessy_hf.trajectory import RowKey

READERS = 16
"""Files that are looked into at the same time."""

_NAME = re.compile(r"part-(?P<run>\w+)-\w+\.parquet")


class SharedRows:
    """The shared rows of one run in a folder."""

    def __init__(self, folder: str, fingerprint: str) -> None:
        self.folder, self.fingerprint = str(folder), fingerprint
        self._features: Mapping[str, Any] = {}
        self._record = "{}"
        self._system, self._path = file_system(self.folder)
        self._files = ParquetRows(self._system)
        self._known: set[str] = set()
        self._places: dict[RowKey, Place] = {}

    def __len__(self) -> int:
        """Return how many rows are known to be there, those that failed included."""
        return len(self._places)

    def describe(self, features: Mapping[str, Any], record: str) -> None:
        """State, before the first is written, the types of the rows' columns and the run's record, as JSON."""
        self._features, self._record = features, record

    def check(self) -> None:
        """Check before anything is generated that rows can be put there.

        Raises:
            PartsError: They cannot.
        """
        with self._writing("Rows"):
            check_writable(self._system, self._path)

    @contextmanager
    def _writing(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # noqa: BLE001 - file systems of fsspec raise errors of their own libraries
            raise PartsError(
                f"{what} cannot be written to {self.folder}: {error}. A folder that this user may write to, with free "
                "space, is expected; check it and run again, nothing that is in the journal is lost."
            ) from error

    def refresh(self) -> None:
        """Look which files were added, by whomever.

        Raises:
            PartsError: The folder cannot be read, or holds rows of another run.
        """
        found = list_shared(self._system, self._path)
        others = set(found.values()) - {self.fingerprint}
        if others:
            raise PartsError(
                f"The folder {self.folder} holds parts of another run: {', '.join(sorted(others))}. Parts of this "
                f"one, {self.fingerprint}, or none are expected: rows of different settings or models are not mixed. "
                "Pass parts= with another folder, or the settings of that run."
            )
        new = [path for path in found if path not in self._known]
        with ThreadPoolExecutor(READERS) as pool:
            for path, rows in zip(new, pool.map(lambda path: list(self._files.keys(path)), new), strict=True):
                self._known.add(path)
                for key, _, place in rows:
                    self._place(key, place)

    def _place(self, key: RowKey, place: Place) -> None:
        known = self._places.get(key)
        if known is None or (known.failed and not place.failed):
            self._places[key] = place

    def done(self, key: RowKey) -> bool:
        """Return whether a row is there and has not failed."""
        return key in self._places and not self._places[key].failed

    def failed(self, key: RowKey) -> bool:
        """Return whether a row is there as a failure only."""
        return key in self._places and self._places[key].failed

    def row(self, key: RowKey) -> dict[str, Any]:
        """Read a row that is there."""
        return self._files.row(self._places[key])

    def write(self, rows: Mapping[RowKey, Mapping[str, Any]]) -> None:
        """Write rows as one file. When this returns they outlive this host.

        Raises:
            PartsError: The storage refuses, or failed again and again.
        """
        content = encode(rows, self._features, self._record)
        name = f"part-{self.fingerprint}-{hashlib.sha256(content).hexdigest()[:16]}.parquet"
        path = f"{self._path}/{name}"
        with self._writing(f"The part {name}"):
            put(self._system, path, content)
        self._known.add(path)
        for number, (key, row) in enumerate(rows.items()):
            self._place(key, Place(path, 0, number, row["finish_reason"] == "error"))


def list_shared(system: Any, path: str) -> dict[str, str]:
    """Return the paths of the files of shared rows in a folder, sorted, and the run that each is of.

    Raises:
        PartsError: The folder cannot be read.
    """
    system.invalidate_cache()
    try:
        found = RETRIES.call(lambda: system.ls(path, detail=False))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise PartsError(
            f"The folder {path} cannot be read: {error}. One that this user may read is expected; check its address "
            "and the credentials in the environment."
        ) from error
    names = sorted({str(name).rpartition("/")[2] for name in found})
    return {f"{path}/{name}": match["run"] for name in names if (match := _NAME.fullmatch(name))}


def encode(rows: Mapping[RowKey, Mapping[str, Any]], features: Mapping[str, Any], record: str) -> bytes:
    """Return rows as the content of one Parquet file of one row group, with the run's record in its metadata."""
    import pyarrow.parquet as pq
    from datasets import Features, Value

    names = {"key": Value("string"), PROMPT_HASH: Value("string")}
    keyed = (
        {"key": key.id, PROMPT_HASH: key.prompt_hash, **{name: row.get(name) for name in columns.COLUMNS}}
        for key, row in rows.items()
    )
    written = table(keyed, Features({**names, **columns.fitting(features, rows.values())}))
    buffer = io.BytesIO()
    described = written.replace_schema_metadata(run_record.metadata(written.schema, record))
    pq.write_table(described, buffer, compression="zstd", row_group_size=max(len(written), 1))
    return buffer.getvalue()
