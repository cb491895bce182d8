"""Parquet files of bounded size: typed tables go in, files come out.

Memory is bounded by a row group. The same tables give the same files, byte for byte, so that what was uploaded once is
known by its hash. Knows nothing of the Hub.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tessy_hf.errors import DatasetError
from tessy_hf.manifest import ShardRecord
from tessy_hf.rows import run_record
from tessy_hf.rows.datasets_internals import bytes_of
from tessy_hf.rows.datasets_internals import table as table_of
from tessy_hf.rows.prompt import finished_prompt_hash
from tessy_hf.rows.tools import decoded
from tessy_hf.trajectory import RowKey

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Features

BATCH_ROWS = 64
"""Rows that are converted at a time. A shard ends after a whole number of such batches."""

ROW_GROUP_BYTES = 16 << 20
"""About how many bytes, uncompressed, a row group holds; as much is in memory."""


def keys(table: pa.Table, id_column: str | None, hashed: Sequence[str] = ()) -> list[RowKey]:
    """Return what identifies each row over all releases: its id, else its seed, and the hash of what it answers.

    Args:
        table: Finished rows.
        id_column: The column with the ids, where there is one.
        hashed: The columns that decide a row besides its prompt, see :func:`tessy_hf.rows.prompt.hashed_columns`.

    Returns:
        The keys, with ids as they are stored. Rows without a chat, whose prompts could not be used, have no hash.
    """
    name = next(name for name in (id_column, "key", "seed") if name is not None and name in table.column_names)
    read = [one for one in hashed if one in table.column_names]
    chats = table.column("messages").to_pylist()
    rows = table.select(read).to_pylist() if read else [None] * len(chats)
    return [
        RowKey(one, finished_prompt_hash(decoded(chat), row) if chat else "")
        for one, chat, row in zip(table.column(name).to_pylist(), chats, rows, strict=True)
    ]


def grouped(tables: Iterable[pa.Table], size: int) -> Iterator[pa.Table]:
    """Put tables together until they have about so many bytes; leave out empty ones."""
    import pyarrow as pa

    group: list[pa.Table] = []
    for table in tables:
        group += [table] if table.num_rows else []
        if sum(one.nbytes for one in group) >= size:
            yield pa.concat_tables(group)
            group = []
    if group:
        yield pa.concat_tables(group)


def tables(rows: Iterable[Mapping[str, Any]], features: Features) -> Iterator[pa.Table]:
    """Iterate over rows as tables of exactly these types, a bounded number of rows at a time."""
    given = iter(rows)
    while batch := list(islice(given, BATCH_ROWS)):
        yield table_of(batch, features)


def is_complete(table: pa.Table, complete: Sequence[str]) -> Any:
    """Return a mask: which rows ended with one of these finish reasons."""
    import pyarrow as pa
    import pyarrow.compute as pc

    return pc.fill_null(pc.is_in(table.column("finish_reason"), value_set=pa.array(list(complete))), False)


class ShardWriter:
    """Writes tables into Parquet files of bounded size.

    Args:
        folder: Where the files are made.
        prefix: The path in the repository, up to the number: ``data/train-``.
        first: The number of the first file.
        features: The schema.
        max_bytes: About how many uncompressed bytes a file holds.
        record: The run's record, as JSON, for the files' metadata.
    """

    def __init__(
        self, folder: Path, prefix: str, first: int, features: Features, max_bytes: int, record: str | None = None
    ) -> None:
        self._folder, self._prefix, self._number = folder, prefix, first
        self._features, self._max_bytes = features, max_bytes
        schema = features.arrow_schema
        self._schema = schema if record is None else schema.with_metadata(run_record.metadata(schema, record))
        self._buffer: list[pa.Table] = []
        self._buffered = self._written = self._rows = 0
        self._writer: Any = None
        self.rows = 0
        self.uncompressed = 0

    def write(self, table: pa.Table) -> Iterator[tuple[ShardRecord, Path]]:
        """Write a table; give the file that it has filled, if it has."""
        if table.num_rows:
            self._buffer.append(table)
            self._buffered += table.nbytes
            if self._buffered >= ROW_GROUP_BYTES:
                self._flush()
            if self._written + self._buffered >= self._max_bytes:
                yield self._end()

    def close(self) -> Iterator[tuple[ShardRecord, Path]]:
        """Give the last file, if there are rows left."""
        if self.has_rows:
            yield self._end()

    def _path(self) -> Path:
        return self._folder / f"{self._prefix.replace('/', '-')}{self._number:05d}.parquet"

    def _flush(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        if self._writer is None:
            self._writer = pq.ParquetWriter(
                self._path(), self._schema, use_content_defined_chunking=True, write_page_index=True
            )
        if self._buffer:
            table = pa.concat_tables(self._buffer).combine_chunks()
            self._writer.write_table(table, row_group_size=max(table.num_rows, 1))
            self._rows += table.num_rows
            self._written += self._buffered
        self._buffer, self._buffered = [], 0

    def _end(self) -> tuple[ShardRecord, Path]:
        self._flush()
        self._writer.close()
        path = self._path()
        name = f"{self._prefix}{self._number:05d}.parquet"
        shard = ShardRecord(path=name, rows=self._rows, bytes=path.stat().st_size, sha256=sha256(path))
        self.rows += self._rows
        self.uncompressed += self._written
        self._number += 1
        self._writer, self._written, self._rows = None, 0, 0
        return shard, path

    @property
    def has_rows(self) -> bool:
        """Whether there are rows that are not in a finished file yet."""
        return bool(self._buffer or self._writer is not None)

    def abandon(self) -> None:
        """Let go of a file that could not be written to its end, quietly: what was wrong has been raised."""
        writer, self._writer = self._writer, None
        if writer is not None:
            with suppress(OSError):
                writer.close()

    def empty(self) -> tuple[ShardRecord, Path]:
        """Write a file without rows, so that the schema is there."""
        return self._end()


def sha256(path: Path) -> str:
    """Hash a file."""
    total = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            total.update(piece)
    return total.hexdigest()


def checked_size(size: int | str) -> int:
    """Read a size in bytes, such as ``"500MB"``.

    Raises:
        DatasetError: It is not a size.
    """
    try:
        number = bytes_of(size)
    except ValueError:
        number = 0
    if number < 1:
        raise DatasetError(
            f'max_shard_size is {size!r}. A number of bytes is expected, such as 500_000_000 or "500MB".'
        )
    return number
