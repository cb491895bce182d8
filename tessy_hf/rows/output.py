"""Files of finished rows: checked before a run begins, written beside and renamed, with the run's record in them.

Tables go in; a ``.parquet`` or ``.jsonl`` file comes out that is whole, or is as it was. Knows no models.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatch
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tessy_hf.errors import OutputError, TessyError
from tessy_hf.manifest import RunRecord
from tessy_hf.rows import parquet, run_record
from tessy_hf.rows.columns import COLUMNS
from tessy_hf.rows.datasets_internals import features_of
from tessy_hf.rows.loading import ending
from tessy_hf.rows.parquet import ROW_GROUP_BYTES, ShardWriter
from tessy_hf.rows.prompt import hashed_columns, read_prompts
from tessy_hf.settings import Settings
from tessy_hf.trajectory import RowKey

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset, Features, IterableDataset

ENDINGS = (".parquet", ".jsonl")
UNBOUNDED = 1 << 62

_TEXTS = frozenset(COLUMNS) - {"messages", "run_fingerprint", "seed"}
"""Columns that do not tell which row it is."""


class Output:
    """Where finished rows are written.

    Args:
        path: A ``.parquet`` or ``.jsonl`` file.
        inputs: Files, folders and patterns that are read; none of them may be written to.
        overwrite: Whether to replace whatever is there.
        shard_bytes: Allows a folder as the path, for ``.parquet`` files of about so many uncompressed bytes.

    Raises:
        OutputError: The ending is another one, the place cannot be written to, or it is one of the inputs.
    """

    def __init__(
        self,
        path: str | Path,
        inputs: Iterable[str | Path] = (),
        *,
        overwrite: bool = False,
        shard_bytes: int | None = None,
    ) -> None:
        self.path = Path(os.path.realpath(path))  # a link stays one
        self._overwrite = overwrite
        self._kind = self.path.suffix.lower()
        self._shard_bytes = shard_bytes if self._kind not in ENDINGS else None
        if self._kind not in ENDINGS and (shard_bytes is None or ending(self.path.name)):
            also = "" if shard_bytes is None else ", or a folder"
            raise OutputError(
                f"The output {str(path)!r} is neither .parquet nor .jsonl. Pass a path with one of these endings"
                f"{also}."
            )
        if re.match(r"\w{2,}:/", str(path)):
            raise OutputError(f"The output {str(path)!r} is not a local path. Pass one, and copy the file afterwards.")
        if source := next((one for one in map(str, inputs) if self._is_read_by(one)), None):
            raise OutputError(f"The output {str(path)!r} is read as an input ({source!r}). Pass another path.")
        self._check_writable()

    def _is_read_by(self, source: str) -> bool:
        place = Path(os.path.realpath(source))
        same = self.path.exists() and place.exists() and self.path.samefile(place)
        return same or place == self.path or place in self.path.parents or fnmatch(str(self.path), str(place))

    def _check_writable(self) -> None:
        if self.path.exists() and self.path.is_file() == (self._shard_bytes is not None):
            raise OutputError(
                f"The output {str(self.path)!r} is there, but is no {self._noun}. Pass another path, or remove it."
            )
        if self.path.exists() and not os.access(self.path, os.W_OK):
            raise OutputError(f"The output {str(self.path)!r} is write-protected. Pass another path.")
        with self._writing(), self._beside():
            pass

    @property
    def _noun(self) -> str:
        return "file" if self._shard_bytes is None else "folder"

    # --- what is there already

    def check_old(
        self, fingerprint: str, settings: Settings, wanted: Callable[[], Collection[RowKey]] | None = None
    ) -> None:
        """Refuse to replace a file, unless that loses nothing: its rows are of this run, and will be written again.

        Args:
            fingerprint: The run's.
            settings: The run's.
            wanted: The keys of the rows that will be written, where they are known.

        Raises:
            OutputError: Something else is there.
        """
        old = [] if self._overwrite else self._old()
        asked = {_asked(key, settings) for key in wanted()} if old and wanted is not None else None
        for path in old:
            if why := _why_kept(path, fingerprint, settings, asked):
                raise OutputError(
                    f"The output {str(path)!r} is there already, and {why}. Pass another path, or --overwrite "
                    "(overwrite=True) to replace it."
                )

    def check_prompts(self, fingerprint: str, settings: Settings, prompts: Iterable[Mapping[str, Any]]) -> None:
        """Do :meth:`check_old` before rows are written for prompts."""
        self.check_old(fingerprint, settings, lambda: [key for key, *_ in read_prompts(prompts, settings) if key])

    def _old(self) -> list[Path]:
        if self._shard_bytes is None:
            return [self.path] if self.path.exists() else []
        return sorted(self.path.glob("train-*.parquet"))

    # --- writing

    def write(self, tables: Iterable[pa.Table], features: Features, record: Callable[[], RunRecord | None]) -> int:
        """Write rows, and put them in place when all are written; return how many.

        Args:
            tables: The rows, of exactly these types.
            features: Columns and types.
            record: Returns the run's record, once there are rows and the engines have told what they are.

        Raises:
            OutputError: It cannot be written, for instance because the disk is full. What was there is as it was.
        """
        given = iter(tables)
        first = list(islice(given, 1))
        described = found.model_dump_json() if (found := record()) is not None else None
        with self._beside() as folder:
            write = self._write_lines if self._kind == ".jsonl" else self._write_shards
            written, count = write(folder, chain(first, given), features, described)
            with self._writing():
                for path in written:
                    _sync(path)
                self._put_in_place(written)
        return count

    def _write_shards(
        self, folder: Path, tables: Iterator[pa.Table], features: Features, record: str | None
    ) -> tuple[list[Path], int]:
        writer = ShardWriter(folder, "train-", 0, features, self._shard_bytes or UNBOUNDED, record)
        written: list[Path] = []
        try:
            for table in tables:
                with self._writing():
                    written += [path for _, path in writer.write(table)]
            with self._writing():
                written += [path for _, path in writer.close()] or ([] if written else [writer.empty()[1]])
        finally:
            writer.abandon()
        return written, writer.rows

    def _write_lines(
        self, folder: Path, tables: Iterator[pa.Table], features: Features, record: str | None
    ) -> tuple[list[Path], int]:
        from datasets import Dataset

        path, count = folder / self.path.name, 0
        with self._writing(), path.open("wb") as file:
            for table in parquet.grouped(tables, ROW_GROUP_BYTES):
                Dataset(table).to_json(file)
                count += table.num_rows
            if record is not None:
                run_record.sidecar(path).write_text(record, "utf-8")
        return [path], count

    def _put_in_place(self, written: list[Path]) -> None:
        if self._shard_bytes is None:
            beside, place = run_record.sidecar(written[0]), run_record.sidecar(self.path)
            beside.replace(place) if beside.exists() else place.unlink(missing_ok=True)
            written[0].replace(self.path)
            return
        self.path.mkdir(exist_ok=True)
        names = {path.name for path in written}
        for path in written:
            path.replace(self.path / path.name)
        for path in self._old():  # of a result in more files
            path.unlink() if path.name not in names else None

    @contextmanager
    def _beside(self) -> Iterator[Path]:
        """A folder on the same disk, gone in the end."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.path.parent, prefix=f".{self.path.name}-") as folder:
            yield Path(folder)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Say what is wrong with the disk in words of ours."""
        import pyarrow as pa

        try:
            yield
        except TessyError:
            raise
        except (OSError, pa.ArrowException) as error:
            raise OutputError(
                f"The output {str(self.path)!r} cannot be written: {error}. A place where this user may write, with "
                "free space, is expected. What was there is as it was; a rerun takes finished rows from the journal."
            ) from error


def write_rows(
    rows: Dataset | IterableDataset,
    path: str | Path,
    settings: Settings,
    fingerprint: str,
    record: Callable[[], RunRecord | None],
    *,
    overwrite: bool = False,
) -> int:
    """Write a dataset of finished rows, see :meth:`tessy_hf.transform.TessyTransform.write`."""
    output, features = Output(path, overwrite=overwrite), features_of(rows)
    hashed, wanted = hashed_columns(settings, list(features)), set[RowKey]()

    def tables() -> Iterator[pa.Table]:
        for table in parquet.tables(rows.with_format(None), features):
            wanted.update(parquet.keys(table, settings.id_column, hashed))
            yield table
        output.check_old(fingerprint, settings, lambda: wanted)  # all are known, none is replaced

    output.check_old(fingerprint, settings)
    return output.write(tables(), features, record)


def _why_kept(path: Path, fingerprint: str, settings: Settings, asked: Collection[RowKey] | None) -> str | None:
    """Say what would be lost with a file, if anything."""
    import pyarrow as pa

    runs: set[str] = set()
    try:
        record = run_record.read(path)
        keys = []
        for table in _old_tables(path):
            runs.update(map(str, table.column("run_fingerprint").to_pylist()))
            keys += parquet.keys(table, settings.id_column, hashed_columns(settings, table.column_names))
    except (TessyError, OSError, ValueError, KeyError, TypeError, StopIteration, pa.ArrowException):
        return "it has no rows of a run that can be told"
    runs |= {record.fingerprint} if record is not None else set()
    if runs != {fingerprint}:
        return f"it is of run {', '.join(sorted(runs)) or '?'}, not of this one, {fingerprint}"
    lost = [key.id for key in keys if key.prompt_hash and asked is not None and _asked(key, settings) not in asked]
    if lost:
        return f"{len(lost)} of its {len(keys)} rows answer prompts that are not among these: {some(lost)}"
    return None


def _asked(key: RowKey, settings: Settings) -> RowKey:
    """Return what tells rows of one run apart: without an id column what they ask, not their seed."""
    return key._replace(id="" if settings.id_column is None else str(key.id))


def _old_tables(path: Path) -> Iterator[pa.Table]:
    """Read a file of rows as it stands, a bounded number of rows at a time."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if path.suffix.lower() == ".parquet":
        with pq.ParquetFile(path) as file:
            names = [name for name in file.schema_arrow.names if name not in _TEXTS]
            for batch in file.iter_batches(parquet.BATCH_ROWS, columns=names):
                yield pa.Table.from_batches([batch])
        return
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            yield pa.Table.from_pylist([json.loads(line)])


def some(ids: Collection[str], most: int = 10) -> str:
    """Name a few of many ids."""
    return ", ".join(map(repr, list(ids)[:most])) + (f" and {len(ids) - most} more" if len(ids) > most else "")


def _sync(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())
