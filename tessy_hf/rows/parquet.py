"""Finished rows as Parquet files of bounded size: a dataset, a stream or a journal goes in, typed tables come out.

Memory is bounded by a batch and a row group, whatever the length of the stream. The same rows give the same files,
byte for byte, so that what was uploaded once is known by its hash. Knows nothing of the Hub.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tessy_hf.errors import DatasetError, JournalError
from tessy_hf.manifest import ShardRecord
from tessy_hf.rows import columns
from tessy_hf.rows.datasets_internals import table
from tessy_hf.run.journal import Journal

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset, Features, IterableDataset

BATCH_ROWS = 64
"""Rows that are converted at a time. A shard ends after a whole number of such batches."""

ROW_GROUP_BYTES = 16 << 20
"""About how many bytes, uncompressed, a row group holds; as much is in memory."""

TRAINERS_OWN = frozenset(
    "prompt completion chosen rejected conversations input_ids labels completion_mask assistant_masks seq_lengths "
    "image images".split()
)
"""Columns that ``trl.SFTTrainer`` reads in place of ``messages``, or as tokens it has made itself (TRL 1.16,
``SFTTrainer._prepare_dataset`` and ``data_utils.is_conversational``)."""


class Rows:
    """Finished rows of one of three kinds, as tables with one schema.

    Prompts' columns that a trainer would take for its own (:data:`TRAINERS_OWN`) get ``source_`` before their names,
    so that what is released trains as it is.

    Args:
        rows: A ``Dataset``, an ``IterableDataset``, a :class:`Journal`, or a journal's path.
        run: Which run of the journal, where it holds several.
        max_attempts: How many attempts at a row of the journal may have failed for it to count as done, and failed.

    Raises:
        DatasetError: The rows have no schema, lack columns that the transform adds, or a name would be there twice.
        JournalError: The path is no journal, or the journal holds several runs.
    """

    def __init__(
        self,
        rows: Dataset | IterableDataset | Journal | str | Path,
        run: str | None = None,
        max_attempts: int = 1,
    ) -> None:
        from datasets import Dataset, IterableDataset

        self.given = _journal(rows, run, max_attempts) if isinstance(rows, (Journal, str, Path)) else rows
        if isinstance(self.given, Journal):
            self._features: Features = journal_features(self.given)
        elif isinstance(self.given, (Dataset, IterableDataset)):
            self._features = _features(self.given)
        else:
            kind = type(rows).__name__
            hint = " Pass one split of it." if kind.endswith("Dict") else ""
            raise DatasetError(
                f"push_to_hub got a {kind}. A Dataset, an IterableDataset or a journal is expected.{hint}"
            )
        missing = [name for name in columns.COLUMNS if name not in self._features]
        if missing:
            raise DatasetError(
                f"The rows have no {', '.join(missing)}. Columns: {', '.join(self._features)}. Expected are rows that "
                "a TessyTransform has written, with all columns it adds; for other rows use their own push_to_hub()."
            )
        self.features = _released(self._features)

    @property
    def count(self) -> int | None:
        """How many rows there are, where that is known beforehand."""
        from datasets import Dataset

        if isinstance(self.given, Journal):
            return self.given.fingerprints()[self.given.fingerprint].done
        return len(self.given) if isinstance(self.given, Dataset) else None

    @property
    def unfinished(self) -> int:
        """How many rows a journal holds that are not done."""
        if not isinstance(self.given, Journal):
            return 0
        counts = self.given.fingerprints()[self.given.fingerprint]
        return counts.to_continue + counts.to_do + counts.failed_before

    def fingerprints(self) -> set[str] | None:
        """Return the runs the rows are of, where that is known without generating any; ``None`` for streams."""
        from datasets import Dataset

        if isinstance(self.given, Journal):
            return {self.given.fingerprint}
        if isinstance(self.given, Dataset):
            return {value for value in self.given.unique("run_fingerprint") if value is not None}
        return None

    def dataset(self) -> Dataset:
        """Return all rows as one dataset in memory."""
        import pyarrow as pa
        from datasets import Dataset

        empty = self.features.arrow_schema.empty_table()
        return Dataset(pa.concat_tables([empty, *self.tables()]))

    def tables(self) -> Iterator[pa.Table]:
        """Iterate over the rows, in order, :data:`BATCH_ROWS` at a time."""
        for part in self._tables():
            yield _typed(part.rename_columns(list(self.features)), self.features)

    def _tables(self) -> Iterator[pa.Table]:
        from datasets import Dataset

        if isinstance(self.given, Dataset):
            rows = self.given.with_format("arrow").select_columns(list(self._features))
            for start in range(0, len(rows), BATCH_ROWS):
                yield rows[start : start + BATCH_ROWS]
            return
        rows = iter(self._rows())
        while batch := list(islice(rows, BATCH_ROWS)):
            yield table(batch, self._features)

    def _rows(self) -> Iterator[dict[str, Any]]:
        if isinstance(self.given, Journal):
            yield from ({"key": key, **row} for key, row in self.given.finished())
        else:
            yield from self.given.with_format(None)


def _features(rows: Dataset | IterableDataset) -> Features:
    if rows.features is None:
        raise DatasetError(
            "The stream has no schema, so it cannot be written without guessing types. Pass it to map: "
            "prompts.map(transform, batched=True, features=transform.features(prompts))."
        )
    return rows.features


def _released(features: Features) -> Features:
    names = {name: f"source_{name}" if name in TRAINERS_OWN else name for name in features}
    twice = next((name for name in names.values() if list(names.values()).count(name) > 1), None)
    if twice:
        raise DatasetError(
            f"The rows have a column {twice!r}, and one more would get that name because trainers read "
            f"{twice.removeprefix('source_')!r} as their own. Rename or remove one of the two."
        )
    return type(features)({names[name]: kind for name, kind in features.items()})


def _typed(table: pa.Table, features: Features) -> pa.Table:
    """Return the table with exactly the schema of the features, and their description in its metadata."""
    return table.select(list(features)).cast(features.arrow_schema).combine_chunks()


# --- journals


def open_journal(path: Path) -> Journal:
    """Open a journal for reading.

    Raises:
        JournalError: There is none.
    """
    if not path.is_file():
        raise JournalError(f"There is no journal at {path}. A file that a run wrote is expected; check the path.")
    return Journal(path, "")


def _journal(rows: Journal | str | Path, run: str | None, max_attempts: int) -> Journal:
    journal = rows if isinstance(rows, Journal) else open_journal(Path(rows))
    runs = list(journal.fingerprints())
    wanted = run or (journal.fingerprint if isinstance(rows, Journal) else None)
    if wanted is None and len(runs) != 1:
        raise JournalError(
            f"The journal {journal.path} holds {len(runs)} runs: {', '.join(runs)}. Pass run= (--run) with one."
        )
    if wanted is not None and wanted not in runs:
        raise JournalError(
            f"The journal {journal.path} holds no run {wanted!r}, but {', '.join(runs)}. Pass one of these."
        )
    return Journal(journal.path, wanted or runs[0], max_attempts=max_attempts)


def journal_features(journal: Journal) -> Features:
    """Return the types of a journal's rows; read off them whether their thinking stands under a key of its own."""
    from datasets import Features, Value

    keys: set[str] = set()
    for _, row in journal.finished():
        keys = {key for message in row["messages"] for key in message}
        if row["spans"]:
            break
    return Features({"key": Value("string"), **columns.schema(marks_in_content="thinking" not in keys)})


# --- what tells rows apart


def keys(table: pa.Table, id_column: str | None) -> list[Any]:
    """Return what tells each row from the others over all releases.

    The id, where there is a column of ids; else the row's seed, which derives from the run's seed and the row's key.
    """
    name = next(name for name in (id_column, "key", "seed") if name is not None and name in table.column_names)
    return table.column(name).to_pylist()  # type: ignore[no-any-return]


def is_complete(table: pa.Table, complete: Sequence[str]) -> Any:
    """Return a mask: which rows ended with one of these finish reasons."""
    import pyarrow as pa
    import pyarrow.compute as pc

    return pc.fill_null(pc.is_in(table.column("finish_reason"), value_set=pa.array(list(complete))), False)


# --- files


class ShardWriter:
    """Writes tables into Parquet files of bounded size.

    Args:
        folder: Where the files are made.
        prefix: The path in the repository, up to the number: ``data/train-``.
        first: The number of the first file.
        features: The schema.
        max_bytes: About how many uncompressed bytes a file holds.
    """

    def __init__(self, folder: Path, prefix: str, first: int, features: Features, max_bytes: int) -> None:
        self._folder, self._prefix, self._number = folder, prefix, first
        self._features, self._max_bytes = features, max_bytes
        self._schema = features.arrow_schema
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


def total(shards: Iterable[ShardRecord], of: str) -> int:
    """Add up ``rows`` or ``bytes``."""
    return sum(int(getattr(shard, of)) for shard in shards)


def checked_size(size: int | str) -> int:
    """Read a size in bytes, such as ``"500MB"``.

    Raises:
        DatasetError: It is none.
    """
    from datasets.utils.py_utils import convert_file_size_to_int

    try:
        number = int(convert_file_size_to_int(size))
    except ValueError:
        number = 0
    if number < 1:
        raise DatasetError(
            f'max_shard_size is {size!r}. A number of bytes is expected, such as 500_000_000 or "500MB".'
        )
    return number
