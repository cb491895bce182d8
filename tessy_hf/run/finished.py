"""Finished rows as tables of one schema, from a dataset, a stream, files, or a journal and its prompts.

Memory is bounded by a batch, whatever the length of the stream. Knows nothing of the Hub.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import Dataset, Features, IterableDataset, Value

from tessy_hf.errors import DatasetError, JournalError
from tessy_hf.manifest import RunRecord
from tessy_hf.rows import columns, parquet, run_record
from tessy_hf.rows.datasets_internals import table
from tessy_hf.rows.loading import ending, load_finished, load_rows
from tessy_hf.rows.tools import CALL_KEYS, SOURCE_TOOLS, TOOLS
from tessy_hf.run.answers import Answers
from tessy_hf.run.journal import Journal
from tessy_hf.run.journal_file import is_journal
from tessy_hf.run.journal_reader import Counts, JournalReader

if TYPE_CHECKING:
    import pyarrow as pa

    from tessy_hf.text.vocabulary import Vocabulary

TRAINERS_OWN = frozenset(
    "prompt completion chosen rejected conversations input_ids labels completion_mask assistant_masks seq_lengths "
    "image images chat_template_kwargs".split()
)
"""Columns that ``trl.SFTTrainer`` reads in place of ``messages``, as tokens it has made itself, or as options of the
chat template (TRL 1.16, ``SFTTrainer._prepare_dataset`` and ``data_utils.is_conversational``)."""


class Rows:
    """Finished rows of whatever kind, as tables with one schema.

    Prompts' columns that a trainer would take for its own (:data:`TRAINERS_OWN`) get ``source_`` before their names,
    so that what is released trains as it is.

    Args:
        rows: A ``Dataset``, an ``IterableDataset``, a :class:`Journal`, or the path of a journal, of files that end
            in one of :data:`tessy_hf.rows.loading.FORMATS`, or of a folder of such.
        run: Which run of the journal, where it holds several.
        max_attempts: How many attempts at a row of the journal may have failed for it to count as done, and failed.
        prompts: What a journal's rows are to answer. They get the prompts' columns and order, and rows of other
            prompts, whose number is ``foreign``, are left out.

    Raises:
        DatasetError: The rows have no schema, lack columns that the transform adds, or a name would be there twice.
        JournalError: The path is no journal, or the journal holds several runs.
    """

    def __init__(
        self,
        rows: Dataset | IterableDataset | Journal | str | Path,
        run: str | None = None,
        max_attempts: int = 1,
        prompts: Dataset | IterableDataset | None = None,
    ) -> None:
        self._records: list[RunRecord] = []
        self.watch: Callable[[Mapping[str, Any]], Any] = lambda row: None
        """Is told each row of a stream as it comes."""
        self.answered: Answers | None = None
        if isinstance(rows, (str, Path)) and (ending(str(rows)) or Path(rows).is_dir()):
            self._records, rows = run_record.read_all(str(rows)), load_rows(str(rows))
        self.given = _journal(rows, run, max_attempts) if isinstance(rows, (Journal, str, Path)) else rows
        if isinstance(self.given, Journal):
            stored = run_record.parse(self.given.description() or "{}", self.given.path)
            self._records = [stored] if stored is not None else []
            features: Features | None = journal_features(self.given)
            if prompts is not None:
                self.answered = Answers(self.given, prompts, self._records, features)
                features = self.answered.features
        elif isinstance(self.given, (Dataset, IterableDataset)):
            features = self.given.features
        else:
            kind = type(rows).__name__
            hint = " Pass one split of it." if kind.endswith("Dict") else ""
            raise DatasetError(
                f"push_to_hub got a {kind}. A Dataset, an IterableDataset or a journal is expected.{hint}"
            )
        if features is None:
            raise DatasetError(
                "The stream has no schema, so it cannot be written without guessing types. Pass it to map: "
                "prompts.map(transform, batched=True, features=transform.features(prompts))."
            )
        if prompts is not None and self.answered is None:
            raise DatasetError("Only a journal needs prompts; other rows have their columns. Leave them out.")
        missing = [name for name in columns.COLUMNS if name not in (*features, *columns.LATER)]
        if missing:
            raise DatasetError(
                f"The rows have no {', '.join(missing)}. Columns: {', '.join(features)}. Expected are rows that "
                "a TessyTransform has written, with all columns it adds; for other rows use their own push_to_hub()."
            )
        self._features, self.features = features, _released(features)

    def record(self, fingerprint: str) -> RunRecord | None:
        """Return the record of a run that the files or the journal carry, if they do."""
        found = next((record for record in self._records if record.fingerprint == fingerprint), None)
        if found is not None and self.answered is not None:
            return found.model_copy(update={"source": self.answered.source})
        return found

    @property
    def own_record(self) -> dict[str, Any] | None:
        """The record of the one run that the rows are of, where they carry it."""
        return self._records[0].model_dump() if self._records else None

    @property
    def count(self) -> int | None:
        """How many rows there are, where that is known beforehand."""
        if self.answered is not None:
            return self.answered.count
        if isinstance(self.given, IterableDataset):
            return None
        return _counts(self.given).done if isinstance(self.given, Journal) else len(self.given)

    @property
    def unfinished(self) -> int:
        """How many rows a journal holds that are not done, or how many prompts have none that is."""
        if self.answered is not None:
            return self.answered.missing
        return sum(_counts(self.given)[1:]) if isinstance(self.given, Journal) else 0

    def fingerprints(self) -> set[str] | None:
        """Return the runs the rows are of, where that is known without generating any; ``None`` for streams."""
        if isinstance(self.given, IterableDataset):
            return None
        if isinstance(self.given, Journal):
            return {self.given.fingerprint}
        return {value for value in self.given.unique("run_fingerprint") if value is not None}

    def dataset(self) -> Dataset:
        """Return all rows as one dataset in memory."""
        import pyarrow as pa

        return Dataset(pa.concat_tables([table([], self.features), *self.tables()]))

    def tables(self) -> Iterator[pa.Table]:
        """Iterate over the rows, in order, a bounded number at a time, each table with exactly the same schema."""
        for part in self._tables():
            typed = part.rename_columns(list(self.features)).cast(self.features.arrow_schema)
            yield typed.combine_chunks()

    def _tables(self) -> Iterator[pa.Table]:
        if isinstance(self.given, Dataset):
            found = self.given.with_format("arrow").select_columns(list(self._features))
            for start in range(0, len(found), parquet.BATCH_ROWS):
                yield found[start : start + parquet.BATCH_ROWS]
            return
        yield from parquet.tables(self._rows(), self._features)

    def _rows(self) -> Iterator[dict[str, Any]]:
        if self.answered is not None:
            yield from self.answered.rows()
        elif isinstance(self.given, Journal):
            yield from ({"key": key, **row} for key, row in self.given.finished())
        else:
            for row in self.given.with_format(None):
                self.watch(row)
                yield row


def _released(features: Features) -> Features:
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


def open_rows(
    source: str,
    split: str = "train",
    config_name: str | None = None,
    run: str | None = None,
    vocabulary: Vocabulary | None = None,
) -> Dataset:
    """Load the finished rows of a file, a folder, a dataset on the Hub or a journal, of which ``run`` names one run.

    A ``vocabulary`` counts the tokens of rows that others released.

    Raises:
        TessyError: They cannot be read, or are no rows of a TessyTransform.
    """
    if is_journal(Path(source)):
        return Rows(source, run).dataset()
    return load_finished(source, split, config_name, vocabulary=vocabulary)


def half_written(source: str, run: str | None = None) -> Iterator[dict[str, Any]]:
    """Iterate over the rows that a journal has the beginning of, without their prompts; over none of another file."""
    if not is_journal(Path(source)):
        return
    for key, spans in _journal(source, run, 1).unfinished():
        ends = list(accumulate(len(span.text) for span in spans))
        laid = zip(spans, [0, *ends], ends, strict=False)
        texts = {part: "".join(span.text for span in spans if span.part == part) for part in ("thinking", "answer")}
        yield {
            "key": key,
            **texts,
            "messages": [{"role": "assistant", "content": "".join(texts.values())}],
            "spans": [{"author": s.author, "part": s.part, "start": a, "end": b, "tokens": 0} for s, a, b in laid],
        }


# --- journals


def open_journal(path: Path) -> Journal:
    """Open a journal for reading.

    Raises:
        JournalError: There is none.
    """
    if not path.is_file():
        raise JournalError(f"There is no journal at {path}. A file that a run wrote is expected; check the path.")
    return Journal(path, "")


def _counts(journal: Journal) -> Counts:
    return journal.fingerprints()[journal.fingerprint]


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
    """Return the types of a journal's rows; the key that holds the thinking is read from them."""
    keys: set[str] = set()
    for _, row in journal.finished():
        keys = {key for message in row["messages"] for key in message}
        if row["spans"]:
            break
    tools = {TOOLS: Value("string")} if journal.has_key(TOOLS) else {}
    typed = columns.schema(columns.thinking_key(keys), any(map(journal.has_key, CALL_KEYS)))
    return Features({"key": Value("string"), **tools, **typed})
