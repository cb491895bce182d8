"""Files on storage that all hosts see: listed, read by row and written whole, by fsspec, with retries.

Knows Parquet files of finished rows, and nothing of who wrote them.
"""

from __future__ import annotations

import os
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tessy_hf.errors import PartsError
from tessy_hf.retries import RetryPolicy, is_transient, status_of
from tessy_hf.rows import columns
from tessy_hf.rows.prompt import finished_prompt_hash
from tessy_hf.rows.tools import decoded
from tessy_hf.trajectory import RowKey

if TYPE_CHECKING:
    import pyarrow as pa

RETRIES = RetryPolicy(attempts=6, first_pause=0.2, longest_pause=5)
"""For each step at storage, beyond what the file system does itself."""

CACHE_BYTES = 256 << 20
"""How much of the files that were read is kept in memory."""

PROMPT_HASH = "prompt_hash"
"""The column with the hash of what a row answers."""

SHARED = ["key", PROMPT_HASH]
"""The first columns of shared rows."""

_WITHOUT_FOLDERS = frozenset({"s3", "s3a", "gs", "gcs", "abfs", "az", "hf"})
"""Storage that has no folders; making one would at most make a bucket of a misspelt name."""


def file_system(folder: str) -> tuple[Any, str]:
    """Return the file system of a folder and its path there; a :class:`PartsError` where fsspec knows none."""
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(folder)
    except (ImportError, ValueError) as error:
        raise PartsError(
            f"The folder {folder!r} cannot be reached: {error}. A path, or an address that fsspec knows, is expected; "
            "install what it names (pip install s3fs, for s3://), or pass another."
        ) from error
    return system, str(path).rstrip("/")


def put(system: Any, path: str, content: bytes) -> None:
    """Write a file, whole or not at all. Object storage does so by itself; on disks it is renamed into place."""
    RETRIES.call(lambda: _put(system, path, content), retry_on=_may_pass)


def _may_pass(error: BaseException) -> bool:
    """Return whether another try may succeed; on the Hub also where somebody else's commit was faster."""
    return is_transient(error) or status_of(error) == 412


def check_writable(system: Any, folder: str) -> None:
    """Make a folder on a disk; raise an ``OSError`` if nothing can be written to it. Other storage is not asked."""
    if "file" in _protocols(system):
        system.makedirs(folder, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()


def _protocols(system: Any) -> set[str]:
    return {system.protocol} if isinstance(system.protocol, str) else set(system.protocol)


def _put(system: Any, path: str, content: bytes) -> None:
    folder, protocols = path.rpartition("/")[0], _protocols(system)
    if not protocols & _WITHOUT_FOLDERS:
        system.makedirs(folder, exist_ok=True)
    if "file" not in protocols:
        system.pipe_file(path, content)
        return
    fresh = Path(folder, f".{uuid.uuid4().hex}.tmp")
    try:
        with fresh.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)


class Place(NamedTuple):
    """Where a row is: file, row group and number in it; and whether it failed."""

    path: str
    group: int
    number: int
    failed: bool


class ParquetRows:
    """Finished rows in Parquet files of one file system of fsspec, read by place, a few row groups in memory.

    What cannot be read is a :class:`PartsError`.
    """

    def __init__(self, system: Any) -> None:
        self._system = system
        self._cache: dict[tuple[str, int], pa.Table] = {}  # what was used last is last

    def schema(self, path: str) -> pa.Schema:
        """Return a file's schema."""
        return self._read(path, lambda file: file.schema_arrow)

    def keys(
        self, path: str, id_column: str = "key", hashed: Sequence[str] = ()
    ) -> Iterator[tuple[RowKey, str | None, Place]]:
        """Iterate over key, run and place of a file's rows. Reads no text where the file has prompt hashes.

        Where it has none, the columns ``hashed`` decide a row besides its prompt.
        """

        def read(file: Any) -> list[pa.Table]:
            shared = file.schema_arrow.names[:2] == SHARED  # else such a column is of the prompts
            asked = [PROMPT_HASH] if shared else ["messages", *hashed]
            names = list(dict.fromkeys([id_column, "finish_reason", "run_fingerprint", *asked]))
            missing = [name for name in names if name not in file.schema_arrow.names]
            if missing:
                raise PartsError(
                    f"{path} has no column {missing[0]!r}. Finished rows are expected, with their ids in "
                    f"{id_column!r} and all columns that a run adds; leave the file out."
                )
            return [file.read_row_group(group, columns=names) for group in range(file.num_row_groups)]

        for group, found in enumerate(self._read(path, read)):
            for number, row in enumerate(found.to_pylist()):
                besides = {name: row[name] for name in hashed if name in row}
                chat = decoded(row["messages"]) if "messages" in row else None
                asked = row[PROMPT_HASH] if chat is None else finished_prompt_hash(chat, besides)
                place = Place(path, group, number, row["finish_reason"] == "error")
                yield RowKey(str(row[id_column]), asked), row["run_fingerprint"], place

    def row(self, place: Place) -> dict[str, Any]:
        """Read what a run added to a row: the values of :data:`tessy_hf.rows.columns.COLUMNS`."""
        at, names = (place.path, place.group), list(columns.COLUMNS)
        found = self._cache.pop(at, None)
        if found is None:
            found = self._read(place.path, lambda file: file.read_row_group(place.group, columns=names))
        self._cache[at] = found
        while len(self._cache) > 1 and sum(one.nbytes for one in self._cache.values()) > CACHE_BYTES:
            del self._cache[next(iter(self._cache))]
        (row,) = found.slice(place.number, 1).to_pylist()
        return {**{name: row[name] for name in names}, "messages": decoded(row["messages"])}

    def _read(self, path: str, read: Callable[[Any], Any]) -> Any:
        import pyarrow as pa
        import pyarrow.parquet as pq

        def opened() -> Any:
            with self._system.open(path, "rb") as content, pq.ParquetFile(content) as file:
                return read(file)

        try:
            return RETRIES.call(opened)
        except PartsError:
            raise
        except (OSError, pa.ArrowException, KeyError) as error:
            raise PartsError(
                f"The file {path} cannot be read: {error}. A complete Parquet file of finished rows is expected; "
                "check the storage, or remove the file and run again, so that its rows are written anew."
            ) from error
