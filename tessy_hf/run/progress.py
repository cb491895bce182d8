"""The status line of a run: rows done, in flight and failed, tokens per second by author, the teacher's share."""

from __future__ import annotations

import contextlib
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import multiprocess

from tessy_hf.run.journal import Counts
from tessy_hf.run.metering import Meter
from tessy_hf.run.window import Window


def say(text: str) -> None:
    """Write a line on stderr, above a status line where there is one."""
    from datasets.utils import tqdm

    tqdm.write(f"TESSY: {text}", file=sys.stderr)


Origin = Literal["written", "found", "refused"]
"""Where a row comes from: written now; found in a journal or shared rows; or refused, as its prompt cannot be used."""

_DETAILS = re.compile(r"'[^']*'|\d+")  # in which errors of the same kind differ


@dataclass
class Summary:
    """How the rows of a run ended.

    Attributes:
        finished: Rows that are complete, or ended at a limit.
        failed: Rows that failed for good.
        refused: Rows whose prompt cannot be used.
        found: How many of the finished and failed rows were there before.
        tokens: Kept tokens of the rows, per author.
        written_tokens: Kept tokens of the rows that were not there before, per author.
        seconds: From the first row's begin to the last one's end.
        errors: How often rows failed with each kind of error; kinds are in the order in which they came.
        examples: For each kind the first error.
        refusal: Why the first prompt was refused.
    """

    finished: int = 0
    failed: int = 0
    refused: int = 0
    found: int = 0
    tokens: dict[str, int] = field(default_factory=lambda: {"teacher": 0, "student": 0})
    written_tokens: dict[str, int] = field(default_factory=lambda: {"teacher": 0, "student": 0})
    seconds: float = 0.0
    errors: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    refusal: str | None = None

    @property
    def teacher_share(self) -> float:
        """The teacher's share of the kept tokens."""
        return self.tokens["teacher"] / max(1, sum(self.tokens.values()))

    def add(self, row: Mapping[str, Any], origin: Origin) -> None:
        """Count a row."""
        self.found += origin == "found"
        for author in self.tokens:
            self.tokens[author] += row[f"{author}_tokens"]
            self.written_tokens[author] += row[f"{author}_tokens"] if origin == "written" else 0
        if origin == "refused":
            self.refused += 1
            self.refusal = self.refusal or row["error"]
        elif row["finish_reason"] == "error":
            self.failed += 1
            kind = _DETAILS.sub("", row["error"])
            self.errors[kind] += 1
            self.examples.setdefault(kind, row["error"])
        else:
            self.finished += 1

    @property
    def rows(self) -> int:
        """All rows."""
        return self.finished + self.failed + self.refused

    @property
    def counts(self) -> str:
        """How many rows ended how, for people."""
        found = f", {self.found:,} of them before" if self.found else ""
        refused = f", {self.refused:,} refused for their prompts" if self.refused else ""
        return f"{self.finished:,} rows finished, {self.failed:,} failed{found}{refused}"

    def __str__(self) -> str:
        """Say it in a few lines."""
        speed = sum(self.written_tokens.values()) / (self.seconds or 1)
        lines = [self.counts, f"teacher share of tokens {self.teacher_share:.0%}, {speed:,.0f} tokens/s"]
        if self.errors:
            first = next(iter(self.examples))
            (most, count), *_ = self.errors.most_common(1)
            lines.append(f"first error: {self.examples[first]}")
            lines.append(
                f"most frequent error ({count:,} of {self.failed:,}): "
                + ("the same" if most == first else self.examples[most])
            )
        if self.refusal:
            lines.append(f"first refusal: {self.refusal}")
        return "\n".join(lines)


class Progress:
    """One status line of one process. Obeys ``datasets.disable_progress_bars()``; silent in ``num_proc`` workers.

    Args:
        meter: What the rows wait for.
        window: Which rows may be in flight.
    """

    def __init__(self, meter: Meter, window: Window) -> None:
        self._meter, self._window = meter, window
        self.in_flight = 0
        self.summary = Summary()
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

    def done(self, row: Mapping[str, Any], origin: Origin) -> None:
        """Count a row as done."""
        self.summary.add(row, origin)
        self.summary.seconds = self._seconds
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

    @property
    def _seconds(self) -> float:
        return max(time.monotonic() - self._begin, 1e-9) if self._begin is not None else 0.0

    def line(self) -> str:
        """Return what stands behind the count of rows."""
        seconds, sums = self._seconds or 1.0, self.summary
        speeds = ", ".join(f"{author} {tokens / seconds:.0f} tok/s" for author, tokens in sums.written_tokens.items())
        return (
            f"{self.in_flight} in flight{self._window.reason}, {sums.failed + sums.refused} failed, {speeds}, "
            f"teacher share of rows {sums.teacher_share:.0%}{self._bottleneck(seconds)}"
        )

    def _bottleneck(self, seconds: float) -> str:
        """Say how much of the time each model had work, and for what the rows waited longest."""
        loads = self._meter.loads()
        if not loads:
            return ""
        authors = [author for author in self.summary.tokens if author in loads]
        busy = ", ".join(f"{author} {loads[author].busy / seconds:.0%} busy" for author in authors)
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
