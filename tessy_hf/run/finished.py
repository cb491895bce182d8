"""Finished rows as tables of one schema, from a dataset, a stream, or a journal.

Memory is bounded by a batch, whatever the length of the stream. Knows nothing of files or of the Hub.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tessy_hf.errors import DatasetError, JournalError
from tessy_hf.rows import columns, parquet
from tessy_hf.rows.datasets_internals import table
from tessy_hf.rows.tools import CALL_KEYS, SOURCE_TOOLS, TOOLS
from tessy_hf.run.journal import Journal
from tessy_hf.run.journal_reader import JournalReader

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset, Features, IterableDataset

TRAINERS_OWN = frozenset(
    "prompt completion chosen rejected conversations input_ids labels completion_mask assistant_masks seq_lengths "
    "image images chat_template_kwargs".split()
)
"""Columns that ``trl.SFTTrainer`` reads in place of ``messages``, as tokens it has made itself, or as options of the
chat template (TRL 1.16, ``SFTTrainer._prepare_dataset`` and ``data_utils.is_conversational``)."""


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

        return Dataset(pa.concat_tables([table([], self.features), *self.tables()]))

    def tables(self) -> Iterator[pa.Table]:
        """Iterate over the rows, in order, a bounded number at a time."""
        for part in self._tables():
            yield _typed(part.rename_columns(list(self.features)), self.features)

    def _tables(self) -> Iterator[pa.Table]:
        from datasets import Dataset

        if isinstance(self.given, Dataset):
            rows = self.given.with_format("arrow").select_columns(list(self._features))
            for start in range(0, len(rows), parquet.BATCH_ROWS):
                yield rows[start : start + parquet.BATCH_ROWS]
            return
        rows = iter(self._rows())
        while batch := list(islice(rows, parquet.BATCH_ROWS)):
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
    from datasets import Value

    ours = SOURCE_TOOLS in features or features.get(TOOLS) == Value("string")  # a run stores what it showed as strings
    unseen = set() if ours else {TOOLS}
    names = {name: f"source_{name}" if name in TRAINERS_OWN | unseen else name for name in features}
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


def journal_features(journal: JournalReader) -> Features:
    """Return the types of a journal's rows; whether thinking has a key of its own is read from them."""
    from datasets import Features, Value

    keys: set[str] = set()
    for _, row in journal.finished():
        keys = {key for message in row["messages"] for key in message}
        if row["spans"]:
            break
    tools = {TOOLS: Value("string")} if journal.has_key(TOOLS) else {}
    typed = columns.schema("thinking" not in keys, any(map(journal.has_key, CALL_KEYS)))
    return Features({"key": Value("string"), **tools, **typed})
