"""One dataset of what many hosts wrote: parts, journals and files of rows go in with the prompts, the rows come out.

The prompts decide. Each has exactly one row in the result, in their order, with their columns, as one process would
have written them. A row belongs to a prompt if both its id and the hash of what it answers are the prompt's. Missing,
duplicate and unknown rows are listed by id before anything is written. Ids are read first, texts one row group at a
time, so that memory does not grow with the texts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tessy_hf.cluster.sources import Found, Sources
from tessy_hf.errors import MergeError, PromptError
from tessy_hf.manifest import RunRecord
from tessy_hf.rows import columns, prompt_source
from tessy_hf.rows.output import Output, some
from tessy_hf.rows.parquet import tables
from tessy_hf.rows.prompt import read_prompts
from tessy_hf.rows.tools import with_tools
from tessy_hf.run.answers import unusable
from tessy_hf.settings import Settings
from tessy_hf.trajectory import RowKey

if TYPE_CHECKING:
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
        self._places, self._dataset, self._first, self._incomplete = sources, dataset, first, incomplete
        self._sources = Sources(sources, settings, run)
        self._rows = self._sources.rows
        self.settings = self._sources.settings
        self.features: Features = columns.features(dataset, self.settings.prompt_column, self._sources.thinking_format)
        self.report = self._matched()

    @property
    def run(self) -> str | None:
        """The fingerprint of the rows' run; ``None`` if there are no rows."""
        return self._sources.run

    @property
    def record(self) -> RunRecord | None:
        """The run's record, if a source has one, with these prompts, for ``push_to_hub(..., manifest=)``."""
        found = self._sources.record
        return found and found.model_copy(update={"source": prompt_source.source(self._dataset)})

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

    def _are_one(self, found: Sequence[Found]) -> bool:
        """Whether rows of the same id say the same; what failed yields to what did not."""
        texts = (_said(one.read()) for one in found if not one.failed)
        first = next(texts, None)
        return all(text == first for text in texts)

    def _prompts(self) -> Iterator[tuple[RowKey | None, Mapping[str, Any], PromptError | None]]:
        return read_prompts(self._dataset, self.settings)

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
                method = (self.record and self.record.method) or self.settings.method
                yield {**with_tools(prompt, self.settings.prompt_column), **unusable(error, method, str(self.run))}
            elif key in self._rows:
                found = self._rows[key]
                yield {
                    **with_tools(prompt, self.settings.prompt_column),
                    **next((one for one in found if not one.failed), found[0]).read(),
                }

    def _id(self, prompt: Mapping[str, Any]) -> Any:
        return prompt[self.settings.id_column] if self.settings.id_column is not None else None

    def dataset(self) -> IterableDataset:
        """Return the rows as a stream, for instance for ``push_to_hub(merge.dataset(), ..., manifest=merge.record)``.

        Raises:
            MergeError: See :meth:`check`.
        """
        from datasets import IterableDataset

        self.check()
        return IterableDataset.from_generator(self.rows, features=self.features)

    def write(self, out: str | Path, *, overwrite: bool = False) -> int:
        """Write the rows to a ``.parquet`` or ``.jsonl`` file, or as several into a folder; return how many.

        What was there under these names stays until all is written.

        Raises:
            MergeError: See :meth:`check`.
            OutputError: The place cannot be written to, or holds something else than rows of this run and prompts.
        """
        output = Output(out, self._places, overwrite=overwrite, shard_bytes=SHARD_BYTES)
        self.check()
        output.check_old(
            str(self.run), self.settings, lambda: [key for key, *_ in self._prompts() if key in self._rows]
        )
        return output.write(tables(self.rows(), self.features), self.features, lambda: self.record)


def _said(row: Mapping[str, Any]) -> Any:
    """Return what a row says, however it was stored: without what it had cost, and without fields that are null."""
    return _plain({name: value for name, value in row.items() if name not in _COSTS})


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(one) for name, one in value.items() if one is not None}
    return [_plain(one) for one in value] if isinstance(value, list) else value
