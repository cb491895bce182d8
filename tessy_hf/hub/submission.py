"""The rows that are to be pushed, and the records of the runs that wrote them.

Rows go in (a dataset, a stream, a journal); their fingerprints, and a record for each, come out. Knows nothing of what
is on the Hub.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from functools import cached_property

from tessy_hf import transform
from tessy_hf.errors import DatasetError, JournalError
from tessy_hf.manifest import Manifest, RunRecord
from tessy_hf.rows import datasets_internals, run_record
from tessy_hf.rows.prompt import hashed_columns
from tessy_hf.run.finished import Rows
from tessy_hf.run.journal import Journal


class Submission:
    """Rows with the records of their runs.

    Args:
        rows: The rows.
        manifest: A record of their run, or a manifest with several, where the caller has one.

    Raises:
        JournalError: They are a journal's, without their prompts.
        DatasetError: The manifest is of another run.
    """

    def __init__(self, rows: Rows, manifest: Manifest | RunRecord | None) -> None:
        self.rows = rows
        if isinstance(rows.given, Journal) and rows.answered is None:
            raise JournalError(
                f"The journal {rows.given.path} has no columns of the prompts, and may have rows of several prompt "
                "files. Pass prompts= (--prompts) with those to release, or push the file that the run wrote."
            )
        self._records = manifest.runs if isinstance(manifest, Manifest) else [manifest] if manifest else []
        self.check_records(rows.fingerprints() or {one.run_fingerprint for one in self._mapped})

    def check_records(self, runs: Collection[str]) -> None:
        """Refuse a manifest that is of none of the rows' runs.

        Raises:
            DatasetError: It is not.
        """
        described = {run.fingerprint for run in self._records}
        if described and runs and described.isdisjoint(runs):
            raise DatasetError(
                f"The rows are of run {', '.join(sorted(runs))}, the manifest or recipe is of "
                f"{', '.join(sorted(described))}. Pass the recipe that wrote them, with the same --set and the same "
                "models, or none."
            )

    def remarks(self) -> Iterator[str]:
        """Say what is left out, and what the manifest will lack."""
        if (answers := self.rows.answered) is not None:
            if answers.foreign:
                yield f"{answers.foreign} rows of the journal answer other prompts than these: left out"
            if answers.missing:
                yield f"{answers.missing} of these prompts have no finished row in the journal"
        for run in sorted(self.rows.fingerprints() or ()):
            column = self.record(run).settings.get("prompt_column")
            if column and not {column, f"source_{column}"} & set(self.rows.features):
                yield f"the rows have no column {column!r}; `tessy merge JOURNAL --prompts` writes the prompts'"
            if self.record(run).student is None:
                yield f"of run {run} only the fingerprint is known; pass manifest= (--recipe) to name its models"

    @cached_property
    def fingerprints(self) -> set[str]:
        """The fingerprints of the runs. Only a stream of which nothing is known generates rows for that."""
        known = self.rows.fingerprints()
        if known is None:
            known = {transform.run_fingerprint for transform in self._mapped} or {
                run.fingerprint for run in self._records
            }
        if not known:
            first = next(self.rows.tables(), None)
            known = set(first.column("run_fingerprint").to_pylist()) if first is not None else set()
        return known - {None}

    @cached_property
    def id_column(self) -> str | None:
        """The column that tells rows apart, where a run has one."""
        runs = map(self.record, sorted(self.fingerprints))
        return next((run.settings["id_column"] for run in runs if run.settings.get("id_column")), None)

    @cached_property
    def hashed_columns(self) -> list[str]:
        """The columns that decide a row besides its prompt."""
        runs = (run_record.prompt_settings(self.record(run).model_dump()) for run in sorted(self.fingerprints))
        names = list(self.rows.features)
        return sorted({name for settings in runs if settings for name in hashed_columns(settings, names)})

    def record(self, fingerprint: str) -> RunRecord:
        """Return the best record of a run: one that names its prompts, else the first there is.

        Looked for with the caller, the rows themselves (stream, files, journal), this process, and this machine.
        """
        found: list[RunRecord | None] = [run for run in self._records if run.fingerprint == fingerprint]
        found += [one.record() for one in self._mapped if one.run_fingerprint == fingerprint]
        found += [self.rows.record(fingerprint)]
        found += [one.record() for one in transform.TRANSFORMS if one.run_fingerprint == fingerprint]
        known = [run for run in (*found, run_record.recall(fingerprint)) if run is not None]
        first = known[0] if known else RunRecord(fingerprint=fingerprint)
        return next((run for run in known if run.source is not None), first)

    @property
    def mapped(self) -> transform.TessyTransform | None:
        """The transform that writes the rows of a stream, if any."""
        return next(iter(self._mapped), None)

    @property
    def _mapped(self) -> list[transform.TessyTransform]:
        """The last transform that a stream is mapped with, if any."""
        from datasets import IterableDataset

        if not isinstance(self.rows.given, IterableDataset):
            return []
        functions = (getattr(step, "function", None) for step in datasets_internals.stream_steps(self.rows.given))
        return [function for function in functions if isinstance(function, transform.TessyTransform)][:1]
