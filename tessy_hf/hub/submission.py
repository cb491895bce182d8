"""The rows that are to be pushed, and the records of the runs that wrote them.

Rows go in (a dataset, a stream, a journal); their fingerprints, and a record for each, come out. Knows nothing of what
is on the Hub.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from tessy_hf.manifest import Manifest, RunRecord
from tessy_hf.rows import datasets_internals

if TYPE_CHECKING:
    from tessy_hf.run.finished import Rows
    from tessy_hf.transform import TessyTransform


class Submission:
    """Rows with the records of their runs.

    Args:
        rows: The rows.
        manifest: A record of their run, or a manifest with several, where the caller has one.
    """

    def __init__(self, rows: Rows, manifest: Manifest | RunRecord | None) -> None:
        self.rows = rows
        self._records = manifest.runs if isinstance(manifest, Manifest) else [manifest] if manifest else []

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

    def record(self, fingerprint: str) -> RunRecord:
        """Return the best record of a run: the caller's, the stream's, the journal's, or one of this process."""
        from tessy_hf.run.journal import Journal
        from tessy_hf.transform import TRANSFORMS

        if given := [run for run in self._records if run.fingerprint == fingerprint]:
            return given[0]
        if own := [one for one in self._mapped if one.run_fingerprint == fingerprint]:
            return own[0].record()
        if isinstance(self.rows.given, Journal) and (stored := self.rows.given.description()):
            return RunRecord.model_validate_json(stored)
        alive = [one for one in TRANSFORMS if one.run_fingerprint == fingerprint]
        if not alive:
            return RunRecord(fingerprint=fingerprint)
        return next((one for one in alive if one.source is not None), alive[0]).record()

    @property
    def _mapped(self) -> list[TessyTransform]:
        """The last transform that a stream is mapped with, if any."""
        from datasets import IterableDataset

        from tessy_hf.transform import TessyTransform

        if not isinstance(self.rows.given, IterableDataset):
            return []
        functions = (getattr(step, "function", None) for step in datasets_internals.stream_steps(self.rows.given))
        return [function for function in functions if isinstance(function, TessyTransform)][:1]
