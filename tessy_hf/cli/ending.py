"""How a run ends on the command line: a summary and the next command, or what is kept where it was stopped."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console

from tessy_hf.errors import SettingsError

if TYPE_CHECKING:
    from tessy_hf.run.progress import Summary
    from tessy_hf.transform import TessyTransform


def most_failures(allowed: str, rows: int) -> float:
    """Return how many of so many rows may fail, from a number (``12``) or a share (``5%``).

    Raises:
        SettingsError: It is neither.
    """
    found = re.fullmatch(r"(\d+)|(\d+(?:\.\d+)?)%", allowed)
    if found is None:
        raise SettingsError(
            f"--allow-failures {allowed!r} is neither a number nor a share of the rows. Use for instance 12 or 5%."
        )
    return float(found[1]) if found[1] else float(found[2]) / 100 * rows


def check_failures(failed: int, rows: int, allowed: str) -> None:
    """Exit with 1 if more of the rows failed than allowed."""
    if failed > most_failures(allowed, rows):
        Console(stderr=True).print(
            f"{failed:,} of {rows:,} rows failed for good; --allow-failures {allowed}.", highlight=False
        )
        raise typer.Exit(1)


@contextmanager
def stopping(transform: TessyTransform) -> Iterator[None]:
    """Say what is kept and how to go on if the run is stopped, by Ctrl-C or by an error after the first rows."""
    from tessy_hf.run.progress import say

    try:
        yield
    except BaseException as error:
        summary = transform.summary()
        if summary.rows or isinstance(error, KeyboardInterrupt):
            say(f"stopped: {summary.counts}. {_kept(transform)}")
        raise


def show(summary: Summary, transform: TessyTransform, data: str, out: Path | None) -> None:
    """Print the summary of a run that has ended, where its rows are kept, and the next command."""
    settings, console = transform.settings, Console()
    lines = [str(summary), *(f"journal: {place}" for place in [_journal(transform)] if place)]
    if summary.failed and (settings.journal or settings.parts):
        again = f"{_command()} --set max_attempts={2 * settings.max_attempts}"
        lines.append(f"next: {again}  (tries the failed rows again)")
    elif out is None:
        merge = ["tessy", "merge", str(settings.parts), "--prompts", data, "--out", "rows.parquet"]
        lines.append(f"next, when all hosts are done: {shlex.join(merge)}")
    else:
        lines.append(f"next: {shlex.join(['tessy', 'push', str(out), 'user/name'])}")
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


def _kept(transform: TessyTransform) -> str:
    """Say what of a run that was stopped is kept, and how it goes on."""
    places = [place for place in (_journal(transform), transform.settings.parts) if place]
    if not places:
        return "Nothing is kept: the run has neither a journal nor parts."
    return f"They and what is half-written are kept in {' and '.join(places)}; to go on: {_command()}"


def _journal(transform: TessyTransform) -> str | None:
    from tessy_hf.run.stores import journal_of

    journal = journal_of(transform.settings, transform.run_fingerprint)
    return str(journal.path) if journal is not None else None


def _command() -> str:
    return shlex.join(["tessy", *sys.argv[1:]])
