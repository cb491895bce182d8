"""The rows of a journal that answer given prompts: with the prompts' columns, in their order, and none of others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from tessy_hf.errors import JournalError, PromptError
from tessy_hf.manifest import RunRecord
from tessy_hf.rows import columns, prompt_source, run_record
from tessy_hf.rows.prompt import read_prompts
from tessy_hf.rows.tools import with_tools
from tessy_hf.run.journal_reader import JournalReader
from tessy_hf.text.thinking_format import THINK_TAGS
from tessy_hf.trajectory import Trajectory

if TYPE_CHECKING:
    from datasets import Dataset, Features, IterableDataset


class Answers:
    """The rows of a journal that answer these prompts, in their order, with their columns.

    Args:
        journal: The journal, of one run.
        prompts: The prompts.
        records: The run's record, which tells how it read its prompts.
        features: Types of the journal's rows.

    Raises:
        JournalError: The journal has no record.
        DatasetError: The prompts lack a column.
    """

    def __init__(
        self, journal: JournalReader, prompts: Dataset | IterableDataset, records: list[RunRecord], features: Features
    ) -> None:
        settings = run_record.prompt_settings(records[0].model_dump()) if records else None
        if settings is None:
            raise JournalError(
                f"The journal {journal.path} does not tell which columns its run has read. One that this version "
                "has written to is expected; run the recipe once more with it, which writes no row again."
            )
        self._journal, self._prompts, self._settings, self._record = journal, prompts, settings, records[0]
        self.features: Features = columns.features(prompts, settings.prompt_column, THINK_TAGS)
        self.features["messages"] = features["messages"]
        self.source = prompt_source.source(prompts)
        done = {key for key, _ in journal.keys()}
        asked = [key for key, _, _ in read_prompts(prompts, settings)]
        self.missing = sum(key is not None and key not in done for key in asked)
        self.count = len(asked) - self.missing
        self.foreign = len(done.difference(asked))

    def rows(self) -> Iterator[dict[str, Any]]:
        """Iterate over the rows; prompts that cannot be used get one that says so."""
        asked = self._settings.prompt_column
        for key, prompt, error in read_prompts(self._prompts, self._settings):
            if error is not None:
                method = self._record.method or self._settings.method
                yield {**with_tools(prompt, asked), **unusable(error, method, self._journal.fingerprint)}
            elif key is not None and (row := self._journal.row(key)) is not None:
                yield {**with_tools(prompt, asked), **row}


def unusable(error: PromptError, method: str, run_fingerprint: str) -> dict[str, Any]:
    """Return the columns of a row whose prompt cannot be used."""
    failed = Trajectory("", finish_reason="error", error=str(error))
    return columns.row(failed, [], None, THINK_TAGS, method=method, run_fingerprint=run_fingerprint)
