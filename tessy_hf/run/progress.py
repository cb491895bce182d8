"""The status line of a run: rows done, in flight and failed, tokens per second by author, the teacher's share."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import multiprocess

from tessy_hf.run.journal import Counts
from tessy_hf.run.metering import Meter
from tessy_hf.run.window import Window


def say(text: str) -> None:
    """Write a line on stderr, above a status line where there is one."""
    from datasets.utils import tqdm

    tqdm.write(f"TESSY: {text}", file=sys.stderr)


class Progress:
    """One status line of one process. Obeys ``datasets.disable_progress_bars()``; silent in ``num_proc`` workers.

    Args:
        meter: What the rows wait for.
        window: Which rows may be in flight.
    """

    def __init__(self, meter: Meter, window: Window) -> None:
        self._meter, self._window = meter, window
        self.in_flight = 0
        self.failed = 0
        self.tokens = {"teacher": 0, "student": 0}
        self._begin: float | None = None  # of the first row: models load before it
        self._bar: Any = None

    @contextlib.contextmanager
    def row(self) -> Iterator[None]:
        """Count a row as in flight."""
        self._begin = self._begin or time.monotonic()
        self.in_flight += 1
        try:
            yield
        finally:
            self.in_flight -= 1

    def done(self, row: Mapping[str, Any]) -> None:
        """Count a row as done."""
        self.failed += row["finish_reason"] == "error"
        for author in self.tokens:
            self.tokens[author] += row[f"{author}_tokens"]
        if self._bar is None:
            self._open()
        self._bar.set_postfix_str(self.line(), refresh=False)
        self._bar.update()

    def plan(self, counts: Counts | None, journal: Path) -> None:
        """Say what an earlier run left in the journal, and so what there is to do."""
        done, to_continue, _, failed = counts or (0, 0, 0, 0)
        self.write(
            f"{done} rows done, {to_continue} to continue, {failed} failed before, all others to do "
            f"(journal: {journal})."
        )

    def write(self, text: str) -> None:
        """Write a line above the status line; of ``num_proc`` workers, only the first one does."""
        if not self._is_worker() or multiprocess.current_process().name.endswith("-1"):
            say(text)

    def line(self) -> str:
        """Return what stands behind the count of rows."""
        seconds = max(time.monotonic() - (self._begin or 0.0), 1e-9)
        teacher, student = self.tokens["teacher"], self.tokens["student"]
        share = teacher / (teacher + student) if teacher + student else 0.0
        return (
            f"{self.in_flight} in flight{self._window.reason}, {self.failed} failed, "
            f"teacher {teacher / seconds:.0f} tok/s, student {student / seconds:.0f} tok/s, "
            f"teacher share of rows {share:.0%}{self._bottleneck(seconds)}"
        )

    def _bottleneck(self, seconds: float) -> str:
        """Say how much of the time each model had work, and for what the rows waited longest."""
        loads = self._meter.loads()
        if not loads:
            return ""
        busy = ", ".join(f"{name} {loads[name].busy / seconds:.0%} busy" for name in self.tokens if name in loads)
        return f"; {busy}: {max(loads, key=lambda name: loads[name].waited).removesuffix('s')}-bound"

    def _open(self) -> None:
        from datasets.utils import tqdm

        self._bar = tqdm(desc="TESSY", unit=" rows", disable=self._is_worker())

    @staticmethod
    def _is_worker() -> bool:
        return bool(multiprocess.current_process().daemon)

    def close(self) -> None:
        """End the line."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
