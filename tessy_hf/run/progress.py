"""The status line and the summary of a run: the bottleneck, rows, time left, tokens per second, teacher's share."""

from __future__ import annotations

import contextlib
import re
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import multiprocess

from tessy_hf.rows.datasets_internals import close_bars
from tessy_hf.run.metering import Meter
from tessy_hf.run.window import Window


def say(text: str) -> None:
    """Write a line on stderr, above a status line where there is one."""
    from datasets.utils import tqdm

    tqdm.write(f"TESSY: {text}", file=sys.stderr)


Origin = Literal["written", "found", "refused"]
"""Where a row comes from: written now; found in a journal or shared rows; or refused, as its prompt cannot be used."""

WIDTH = 80
"""Columns that the status line takes at most."""

LOG_SECONDS, LOG_WIDTH = 60.0, 200
"""How often the status is logged where it cannot be drawn, and in how many characters."""

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
    """One status line of one process: on a terminal or in a notebook drawn in place, else a log line now and then.

    Takes the place of the bar that `datasets` draws for a ``map``. Obeys ``datasets.disable_progress_bars()``; silent
    in ``num_proc`` workers.

    Args:
        meter: What the rows wait for.
        window: Which rows may be in flight.
    """

    def __init__(self, meter: Meter, window: Window) -> None:
        self._meter, self._window = meter, window
        self.in_flight = 0
        self.summary = Summary()
        self._written = self._found = 0
        self._before = 0, 0  # rows, and those written, before those that are expected now
        self._total: int | None = None
        self._begin: float | None = None  # of the first row: models load before it
        self._said = 0.0
        self._bar: Any = None

    def expect(self, total: int | None, found: int | None = None) -> None:
        """Expect so many rows from now on, of which so many need not be written, where a plan has told it."""
        self._total, self._found, self._before = total, found or 0, (self.summary.rows, self._written)

    @contextlib.contextmanager
    def row(self) -> Iterator[None]:
        """Count a row as in flight."""
        if self._begin is None:
            self._begin = self._said = time.monotonic()
        self.in_flight += 1
        try:
            yield
        finally:
            self.in_flight -= 1

    def done(self, row: Mapping[str, Any], origin: Origin) -> None:
        """Count a row as done."""
        self.summary.add(row, origin)
        self.summary.seconds = self._seconds
        self._written += origin == "written"
        self._show()
        if self._total is not None and self._rows >= self._total:
            self.close()

    def _show(self) -> None:
        from datasets.utils import is_progress_bar_enabled, tqdm

        if self._is_worker() or not is_progress_bar_enabled():
            return
        if not _is_drawn():
            now = time.monotonic()
            if now - self._said >= LOG_SECONDS:
                self._said = now
                say(self.line(LOG_WIDTH))
            return
        width = min(WIDTH, shutil.get_terminal_size().columns)
        line = self.line(width - 1)
        if self._bar is None:
            close_bars()
            shape = {"initial": self._rows - 1, "ncols": width, "bar_format": "{desc}", "leave": True}
            self._bar = tqdm(desc=line, total=self._total, **shape)
        self._bar.set_description_str(line, refresh=False)
        self._bar.update()

    def write(self, text: str) -> None:
        """Write a line above the status line; of ``num_proc`` workers, only the first one does."""
        if not self._is_worker() or multiprocess.current_process().name.endswith("-1"):
            say(text)

    @property
    def _seconds(self) -> float:
        return max(time.monotonic() - self._begin, 1e-9) if self._begin is not None else 0.0

    @property
    def _rows(self) -> int:
        return self.summary.rows - self._before[0]

    def line(self, width: int = WIDTH) -> str:
        """Return the status in at most ``width`` characters, the bottleneck first; what matters less is left out."""
        sums = self.summary
        failed = sums.failed + sums.refused
        fields = {
            "bottleneck": self._bottleneck(),
            "rows": self._share_done(),
            "eta": self._eta(),
            "speed": f"{_short(sum(sums.written_tokens.values()) / (self._seconds or 1))} tok/s",
            "share": f"teacher {sums.teacher_share:.0%}",
            "failed": f"{failed:,} failed" if failed else "",
            "flight": f"{self.in_flight} in flight{self._window.reason}",
        }
        for last in ("", "flight", "share", "speed", "eta"):
            fields.pop(last, None)
            text = "  ".join(filter(None, fields.values()))
            if len(text) <= width:
                break
        return text[:width]

    def _share_done(self) -> str:
        if not self._total or self._rows > self._total:
            return f"{self._rows:,} rows"
        return f"{self._rows:,}/{self._total:,} {self._rows / self._total:.0%}"

    def _eta(self) -> str:
        """Say how long the rows that are to be written take at the speed of those that were."""
        if not self._total or not self._written:
            return ""
        written = self._written - self._before[1]
        left = max(0, self._total - max(self._found, self._rows - written) - written)
        seconds = round(left * self._seconds / self._written)
        minutes = seconds // 60
        return f"ETA {f'{minutes // 60}h{minutes % 60:02}m' if minutes >= 60 else f'{minutes}m{seconds % 60:02}s'}"

    def _bottleneck(self) -> str:
        """Name what the rows waited for longest."""
        loads = self._meter.loads()
        return f"{max(loads, key=lambda name: loads[name].waited).removesuffix('s')}-bound" if loads else ""

    @staticmethod
    def _is_worker() -> bool:
        return bool(multiprocess.current_process().daemon)

    def close(self) -> None:
        """End the line."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _is_drawn() -> bool:
    """Return whether standard error can draw over a line: a terminal or a notebook."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return sys.stderr.isatty() or shell is not None


def _short(number: float) -> str:
    return f"{number:,.0f}" if number < 10_000 else f"{number / 1000:,.0f}k"
