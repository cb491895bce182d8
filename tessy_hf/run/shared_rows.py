"""Finished rows on storage that all hosts see: small Parquet files, each of them whole or not there.

A folder as fsspec names it (``/shared/run``, ``s3://bucket/run``) and rows by their keys go in; which keys are there,
and their rows, come out, on any host. Writers need not know of each other: a part is named after its run and its
content, and is never changed. A row may be in several parts, where two hosts wrote it; a merge takes one.
Knows nothing of models and prompts.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import logging
import os
import re
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import tenacity

from tessy_hf.errors import PartsError
from tessy_hf.rows import columns
from tessy_hf.rows.datasets_internals import table
from tessy_hf.rows.prompt import finished_prompt_hash
from tessy_hf.trajectory import RowKey

if TYPE_CHECKING:
    import pyarrow as pa

PART_BYTES = 16 << 20
"""About how many bytes of text a part holds at most."""

LONGEST_WAIT, SHORTEST_WAIT = 60.0, 0.2
"""Seconds that a finished row waits for others to share its part: while rows wait for a place in the window, and once
none does, when nothing else may come for a while."""

REFRESH_SECONDS = 10.0
"""How old a run's knowledge of other hosts' parts may be."""

CACHE_BYTES = 256 << 20
"""How much of parts that were read is kept in memory."""

READERS = 16
"""Parts that are looked into at the same time."""

_WITHOUT_FOLDERS = frozenset({"s3", "s3a", "gs", "gcs", "abfs", "az", "hf"})
"""Storage that has no folders; making one would at most make a bucket of a misspelt name."""

_NAME = re.compile(r"part-(?P<run>\w+)-\w+\.parquet")
_RECORD = b"tessy_run"
_HASH = "prompt_hash"


logger = logging.getLogger(__name__)


def _may_pass(error: BaseException) -> bool:
    final = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)
    return isinstance(error, OSError) and not isinstance(error, final)


_patiently = tenacity.retry(
    retry=tenacity.retry_if_exception(_may_pass),
    wait=tenacity.wait_random_exponential(0.2, max=5),
    stop=tenacity.stop_after_attempt(6),
    reraise=True,
)
"""Takes a step at storage again where that may help, beyond what the file system does itself."""


class Place(NamedTuple):
    """Where a row is: file, row group and number in it; and whether it failed."""

    path: str
    group: int
    number: int
    failed: bool


class ParquetFiles:
    """Finished rows in Parquet files of one file system, read by place, a few row groups in memory.

    Args:
        system: The file system, of fsspec.
    """

    def __init__(self, system: Any) -> None:
        self._system = system
        self._cache: OrderedDict[tuple[str, int], pa.Table] = OrderedDict()

    def schema(self, path: str) -> pa.Schema:
        """Return a file's schema."""
        return self._read(path, lambda file: file.schema_arrow)

    def keys(
        self, path: str, id_column: str = "key", hashed: Sequence[str] = ()
    ) -> Iterator[tuple[RowKey, str | None, Place]]:
        """Iterate over key, run and place of a file's rows. Reads no text where the file has prompt hashes.

        Args:
            path: The file.
            id_column: The column with the rows' ids.
            hashed: The columns that decide a row besides its prompt, where the file has no prompt hashes.
        """

        def read(file: Any) -> list[pa.Table]:
            asked = [_HASH] if _HASH in file.schema_arrow.names else ["messages", *hashed]
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
                asked = row.get(_HASH) or finished_prompt_hash(row["messages"], {name: row[name] for name in hashed})
                place = Place(path, group, number, row["finish_reason"] == "error")
                yield RowKey(str(row[id_column]), asked), row["run_fingerprint"], place

    def row(self, place: Place) -> dict[str, Any]:
        """Read what a run added to a row: the values of :data:`tessy_hf.rows.columns.COLUMNS`."""
        at = (place.path, place.group)
        if at not in self._cache:
            names = list(columns.COLUMNS)
            self._cache[at] = self._read(place.path, lambda file: file.read_row_group(place.group, columns=names))
            while len(self._cache) > 1 and sum(one.nbytes for one in self._cache.values()) > CACHE_BYTES:
                self._cache.popitem(last=False)
        self._cache.move_to_end(at)
        (row,) = self._cache[at].slice(place.number, 1).to_pylist()
        return {name: row[name] for name in columns.COLUMNS}

    def _read(self, path: str, read: Callable[[Any], Any]) -> Any:
        import pyarrow as pa
        import pyarrow.parquet as pq

        @_patiently
        def opened() -> Any:
            with self._system.open(path, "rb") as bytes_, pq.ParquetFile(bytes_) as file:
                return read(file)

        try:
            return opened()
        except PartsError:
            raise
        except (OSError, pa.ArrowException, KeyError) as error:
            raise PartsError(
                f"The part {path} cannot be read: {error}. A whole Parquet file of finished rows is expected; check "
                "the storage, or remove the file and run again, so that its rows are written anew."
            ) from error


class Parts:
    """The parts of one run in a folder. Touches no file until used.

    Args:
        folder: Where, as fsspec names it. Made when the first part is written.
        fingerprint: The run's.
    """

    def __init__(self, folder: str, fingerprint: str) -> None:
        self.folder, self.fingerprint = str(folder), fingerprint
        self._features: Mapping[str, Any] = {}
        self._record = "{}"
        self._system, self._path = file_system(self.folder)
        self._files = ParquetFiles(self._system)
        self._known: set[str] = set()
        self._places: dict[RowKey, Place] = {}

    def __len__(self) -> int:
        """Return how many rows are known to be there, those that failed included."""
        return len(self._places)

    def describe(self, features: Mapping[str, Any], record: str) -> None:
        """Tell, before the first is written, the types of the rows' columns and the run's description, as JSON."""
        self._features, self._record = features, record

    def refresh(self) -> None:
        """Look which parts were added, by whomever.

        Raises:
            PartsError: The folder cannot be read, or holds parts of another run.
        """
        new = [path for path in self._listed() if path not in self._known]
        with ThreadPoolExecutor(READERS) as pool:
            for path, found in zip(new, pool.map(lambda path: list(self._files.keys(path)), new), strict=True):
                self._known.add(path)
                for key, _, place in found:
                    self._place(key, place)

    def _listed(self) -> list[str]:
        found = listed(self._system, self._path)
        others = {str(run_of(path)) for path in found} - {self.fingerprint}
        if others:
            raise PartsError(
                f"The folder {self.folder} holds parts of another run: {', '.join(sorted(others))}. Parts of this "
                f"one, {self.fingerprint}, or none are expected: rows of different settings or models are not mixed. "
                "Pass parts= with another folder, or the settings of that run."
            )
        return found

    def _place(self, key: RowKey, place: Place) -> None:
        known = self._places.get(key)
        if known is None or (known.failed and not place.failed):
            self._places[key] = place

    def done(self, key: RowKey) -> bool:
        """Whether a row is there and has not failed."""
        return key in self._places and not self._places[key].failed

    def failed(self, key: RowKey) -> bool:
        """Whether a row is there as a failure only."""
        return key in self._places and self._places[key].failed

    def row(self, key: RowKey) -> dict[str, Any]:
        """Read a row that is there."""
        return self._files.row(self._places[key])

    def write(self, rows: Mapping[RowKey, Mapping[str, Any]]) -> None:
        """Write rows as one part. When this returns they outlive this host.

        Raises:
            PartsError: The storage refuses, or failed again and again.
        """
        content = part(rows, self._features, self._record)
        name = f"part-{self.fingerprint}-{hashlib.sha256(content).hexdigest()[:16]}.parquet"
        path = f"{self._path}/{name}"
        try:
            _put(self._system, path, content)
        except OSError as error:
            raise PartsError(
                f"The part {name} cannot be written to {self.folder}: {error}. A folder that this user may write to, "
                "with free space, is expected; check it and run again, nothing that is in the journal is lost."
            ) from error
        self._known.add(path)
        for number, (key, row) in enumerate(rows.items()):
            self._place(key, Place(path, 0, number, row["finish_reason"] == "error"))


def part(rows: Mapping[RowKey, Mapping[str, Any]], features: Mapping[str, Any], record: str) -> bytes:
    """Return rows, by key, as the content of one Parquet file of one row group, with the run's description."""
    import pyarrow.parquet as pq
    from datasets import Features, Value

    written = table(
        (
            {"key": key.id, _HASH: key.prompt_hash, **{name: row[name] for name in columns.COLUMNS}}
            for key, row in rows.items()
        ),
        Features({"key": Value("string"), _HASH: Value("string"), **features}),
    )
    buffer = io.BytesIO()
    described = written.replace_schema_metadata({**(written.schema.metadata or {}), _RECORD: record.encode()})
    pq.write_table(described, buffer, compression="zstd", row_group_size=max(len(written), 1))
    return buffer.getvalue()


def record_of(schema: pa.Schema) -> dict[str, Any]:
    """Return the run's description in a part's schema; an empty one where there is none."""
    described: dict[str, Any] = json.loads((schema.metadata or {}).get(_RECORD, b"{}"))
    return described


# --- storage


def file_system(folder: str) -> tuple[Any, str]:
    """Return the file system of a folder and its path there.

    Raises:
        PartsError: fsspec does not know it.
    """
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(folder)
    except (ImportError, ValueError) as error:
        raise PartsError(
            f"The folder {folder!r} cannot be reached: {error}. A path, or an address that fsspec knows, is expected; "
            "install what it names (pip install s3fs, for s3://), or pass another."
        ) from error
    return system, str(path).rstrip("/")


def listed(system: Any, path: str) -> list[str]:
    """Return the parts in a folder, whosever they are, by name.

    Raises:
        PartsError: The folder cannot be read.
    """
    system.invalidate_cache()
    try:
        found = _patiently(system.ls)(path, detail=False)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise PartsError(
            f"The folder {path} cannot be read: {error}. One that this user may read is expected; check its address "
            "and the credentials in the environment."
        ) from error
    names = {str(name).rpartition("/")[2] for name in found}
    return sorted(f"{path}/{name}" for name in names if run_of(name) is not None)


def run_of(path: str) -> str | None:
    """Return the run whose part this is by its name, or ``None`` for other files."""
    found = _NAME.fullmatch(path.rpartition("/")[2])
    return found["run"] if found else None


@_patiently
def _put(system: Any, path: str, content: bytes) -> None:
    """Put a file there, whole or not at all. Object storage does so by itself; on disks it is renamed into place."""
    folder = path.rpartition("/")[0]
    protocols = {system.protocol} if isinstance(system.protocol, str) else set(system.protocol)
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


# --- within a run


class Outbox:
    """Finished rows of a run on their way into parts, and a look at those that other hosts have put there.

    A part is made of ``most`` rows, or of those that came until the first has waited long enough.

    Args:
        parts: Where they go.
        most: How many rows wait for each other.
        has_room: Whether the run could take more rows than it has.
    """

    def __init__(self, parts: Parts, most: Callable[[], int], has_room: Callable[[], bool]) -> None:
        self.parts, self._most, self._has_room = parts, most, has_room
        self._rows: dict[RowKey, Mapping[str, Any]] = {}
        self._bytes = 0
        self._waiting: dict[RowKey, asyncio.Future[None]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._putting: asyncio.Task[None] | None = None
        self._due = self._hurried = False
        self._failure: PartsError | None = None
        self._looking = asyncio.Lock()
        self._looked = float("-inf")

    async def find(self, key: RowKey) -> dict[str, Any] | None:
        """Return a row that is in a part, unless it failed there.

        Raises:
            PartsError: Parts cannot be read.
        """
        if time.monotonic() - self._looked > REFRESH_SECONDS:
            async with self._looking:
                if time.monotonic() - self._looked > REFRESH_SECONDS:
                    await asyncio.to_thread(self.parts.refresh)
                    self._looked = time.monotonic()
        if not self.parts.done(key):
            return None
        async with self._looking:  # one reader at a time
            return await asyncio.to_thread(self.parts.row, key)

    def add(self, key: RowKey, row: Mapping[str, Any]) -> None:
        """Take a finished row, unless it is there already; one that failed counts only as long as none has not.

        Raises:
            PartsError: Rows taken before could not be written.
        """
        if self._failure is not None:
            raise self._failure
        there = self.parts.done(key) or (row["finish_reason"] == "error" and self.parts.failed(key))
        if there or key in self._waiting:
            return
        loop = asyncio.get_running_loop()
        self._rows[key], self._waiting[key] = row, loop.create_future()
        self._bytes += 3 * len(row["thinking"]) + 2 * len(row["answer"])
        if self._timer is None:
            self._timer = loop.call_later(LONGEST_WAIT, self._begin)
            self._hurried = False
        if len(self._rows) >= self._most() or self._bytes >= PART_BYTES:
            self._begin()

    def hurry(self) -> None:
        """Put what is waiting soon, if the run has room for more rows than there are."""
        if self._timer is not None and not self._hurried and self._has_room():
            self._timer.cancel()
            self._timer = asyncio.get_running_loop().call_later(SHORTEST_WAIT, self._begin)
            self._hurried = True

    async def stored(self) -> None:
        """Wait until all rows taken so far are in parts.

        Raises:
            PartsError: They cannot be written.
        """
        self.hurry()
        await asyncio.gather(*map(asyncio.shield, self._waiting.values()))
        if self._failure is not None:
            raise self._failure

    async def close(self) -> None:
        """Put what is left, as well as that can be done."""
        if self._rows and self._failure is None:
            self._begin()
        if self._putting is not None:
            await self._putting
        if self._failure is not None:
            logger.warning("Finished rows are not in %s: %s", self.parts.folder, self._failure)

    def _begin(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._due = True
        if self._putting is None:
            self._putting = asyncio.ensure_future(self._put())

    async def _put(self) -> None:
        """Write parts, one after the other, for as long as some are due."""
        try:
            while self._due and self._rows:
                rows, self._rows, self._bytes, self._due = self._rows, {}, 0, False
                try:
                    await asyncio.to_thread(self.parts.write, rows)
                except PartsError as error:
                    self._failure = error
                for key in rows:
                    waiting = self._waiting.pop(key)
                    if not waiting.done():
                        waiting.set_result(None)
        finally:
            self._putting = None
