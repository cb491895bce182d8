"""How a run begins and ends on the command line: what is there, a summary, the next command, what is kept."""

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
    from tessy_hf.run.journal import Counts
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


def tell_plan(transform: TessyTransform, counts: Counts) -> None:
    """Print how the rows stand before a run, and what it loads."""
    from tessy_hf.run.progress import say

    reused = f"{counts.done:,} of {sum(counts):,} rows are there already and are reused, " if counts.done else ""
    others = {"to continue": counts.to_continue, "failed before": counts.failed_before}
    more = "".join(f", {number:,} {what}" for what, number in others.items() if number)
    places = {"journal": _journal(transform), "parts": transform.settings.parts}
    kept = (
        ", ".join(f"{name}: {place}" for name, place in places.items() if place) or "kept nowhere until all are done"
    )
    say(f"{reused}{counts.to_do:,} rows to write{more} ({kept})")
    one_line_for_weights(transform)


def one_line_for_weights(transform: TessyTransform) -> None:
    """Name the models that a run loads in this process, in place of a bar of `transformers` for each."""
    from transformers.utils import logging

    from tessy_hf.engines.server import ServerEngine
    from tessy_hf.run.progress import say

    logging.disable_progress_bar()
    speakers = {name: one for name, one in transform.asked.items() if not isinstance(one.engine, ServerEngine)}
    loaded = [f"{name} {one.engine.model}" for name, one in speakers.items()]
    predictors = sum(one.boundary is not None for one in transform.asked.values())
    loaded += [f"{predictors} boundary predictors"] if predictors else []
    if loaded:
        say(f"Loading weights: {', '.join(loaded)}")


def show(summary: Summary, transform: TessyTransform, data: str, out: Path | None, *, trial: bool = False) -> None:
    """Print the summary of a run that has ended, where its rows are kept, and the next command.

    After a ``trial`` these are the commands that show its rows and write all others.
    """
    from tessy_hf.report.show import visible

    settings, console = transform.settings, Console()
    lines = [visible(str(summary))]
    if out is not None:
        lines.append(f"view: {shlex.join(['tessy', 'view', str(out)])}")
    if place := _journal(transform):
        lines.append(f"journal: {place}")
    if trial and not summary.failed:
        words = iter(sys.argv[1:])
        whole = [word for word in words if not (word == "--limit" and next(words)) and not word.startswith("--limit=")]
        kept = "  (all rows; these are reused)" if _journal(transform) or settings.parts else "  (all rows)"
        lines.append(f"next: {shlex.join(['tessy', *whole])}{kept}")
    elif summary.failed and (settings.journal or settings.parts):
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
