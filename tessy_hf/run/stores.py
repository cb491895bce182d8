"""Where a run keeps its rows, and how a dataset's rows stand there. Starts nothing."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, suppress
from itertools import chain, islice
from pathlib import Path
from typing import Any

import datasets

from tessy_hf.errors import DatasetError, JournalError, PromptError
from tessy_hf.manifest import RunRecord, differences
from tessy_hf.rows import run_record
from tessy_hf.rows.prompt import PromptReader, read_prompts
from tessy_hf.run.journal import Counts, Journal
from tessy_hf.run.journal_file import is_journal
from tessy_hf.run.journal_reader import JournalReader
from tessy_hf.run.progress import say
from tessy_hf.run.shared_rows import SharedRows
from tessy_hf.settings import Settings
from tessy_hf.trajectory import RowKey

LOOKED_AT, NAMED_RUNS = 20, 3
"""In how many journals a new run looks for rows of its prompts, and of how many other runs it speaks."""

ENDINGS = (".journal", ".sqlite", ".sqlite3", ".db")
"""How the names of files end that are looked at for journals."""

BRIEF = 24
"""Characters shown of a value that differs."""

SAMPLE = 500
"""How many of its prompts are looked up in journals of other runs."""


def journal_of(settings: Settings, fingerprint: str) -> Journal | None:
    """Return the journal of a run, where it has one. Touches no file."""
    if settings.journal is None:
        return None
    path = _default_folder() / f"{fingerprint}.journal" if settings.journal == "auto" else settings.journal
    return Journal(path, fingerprint, max_attempts=settings.max_attempts)


def shared_rows_of(settings: Settings, fingerprint: str) -> SharedRows | None:
    """Return the shared rows of a run, where it has any. Touches no file."""
    return SharedRows(settings.parts, fingerprint) if settings.parts is not None else None


def plan(dataset: Any, settings: Settings, fingerprint: str, record: Callable[[], RunRecord]) -> Counts:
    """Count how a dataset's rows stand.

    Says on stderr which ids were seen before with another prompt, and which runs the journal has instead of this one.

    Args:
        dataset: The prompts.
        settings: The run's settings.
        fingerprint: The run's fingerprint.
        record: Describes the run.

    Raises:
        TessyError: A column is missing, or the journal or the shared rows cannot be read.
    """
    names = [name for name in (settings.prompt_column, settings.id_column) if name is not None]
    given = list(dataset.column_names or next(iter(dataset), names))
    journal, shared = journal_of(settings, fingerprint), shared_rows_of(settings, fingerprint)
    if shared is not None:
        shared.refresh()
    unusable = done = 0
    other_prompts: dict[str, str] = {}

    def keys() -> Iterator[RowKey]:
        nonlocal unusable, done
        reader = PromptReader(settings, given)
        for row in dataset.select_columns(reader.read_columns):
            try:
                key = reader.read(row).row_key
            except PromptError:
                unusable += 1
                continue
            if shared is not None and shared.done(key):
                done += 1
            else:
                yield key

    left = keys()
    sample = list(islice(left, SAMPLE))
    if journal is not None:
        for line in other_runs(journal, record, sample):
            say(line)
    if journal is None or not journal.path.exists():
        counts = Counts(to_do=len(sample) + sum(1 for _ in left))
    else:
        counts = journal.plan(chain(sample, left), other_prompts)
        journal.close()
    for line in why_anew(other_prompts, settings):
        say(line)
    return counts._replace(done=counts.done + done, to_do=counts.to_do + unusable)


def undone(rows: Iterable[Mapping[str, Any]], settings: Settings, fingerprint: str) -> Iterator[Mapping[str, Any]]:
    """Iterate over prompts that have no finished row of this run in its journal or among the shared rows."""
    journal, shared = journal_of(settings, fingerprint), shared_rows_of(settings, fingerprint)
    if shared is not None:
        shared.refresh()
    for key, row, _ in read_prompts(rows, settings):
        there = shared is not None and key is not None and shared.done(key)
        if not there and (journal is None or not journal.path.exists() or key is None or journal.row(key) is None):
            yield row


def other_runs(journal: JournalReader, record: Callable[[], RunRecord], keys: Iterable[RowKey]) -> Iterator[str]:
    """Name the runs that have rows of these prompts already and what differs, before a run that has none begins."""
    if journal.path.exists() and journal.fingerprint in journal.fingerprints():
        return
    sample, named = list(islice(keys, SAMPLE)), 0
    for path in find_journals(journal.path.parent, deep=False)[:LOOKED_AT]:
        reader = JournalReader(path, "", max_attempts=journal.max_attempts)
        with suppress(JournalError), closing(reader):  # it is not the journal of this run
            for run, counts in reader.fingerprints().items():
                reader.fingerprint = run
                if counts.done and named < NAMED_RUNS and reader.plan(sample).done:
                    named += 1
                    why = _why(reader, record)
                    yield f"{path} has {counts.done} rows of run {run}, which {why}: they are not reused."


def _why(other: JournalReader, record: Callable[[], RunRecord]) -> str:
    try:
        described = run_record.parse(other.description() or "{}", other.path)
    except DatasetError:
        return "is of another version of tessy-hf"
    if described is None:
        return "does not say what it is"
    found = differences(described, record())
    named = [f"{name} ({_brief(before)}, now {_brief(now)})" for name, (before, now) in found.items()]
    return f"differs in {', '.join(named[:4])}" if named else "is of another version of tessy-hf"


def _brief(value: Any) -> str:
    shown = str(value)
    return shown if len(shown) <= BRIEF else f"{shown[:BRIEF]}…"


def find_journals(folder: Path, *, deep: bool = True) -> list[Path]:
    """Return the journals in a folder, or below it too, and those in the default place; the latest written first."""
    found = set(_default_folder().glob("*.journal"))
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if deep and not name.startswith((".", "_", "node_modules"))]
        found |= {Path(place, name).resolve() for name in names if name.endswith(ENDINGS)}
    return sorted(filter(is_journal, found), key=lambda path: path.stat().st_mtime, reverse=True)


def _default_folder() -> Path:
    return Path(datasets.config.HF_DATASETS_CACHE).parent / "tessy"


def why_anew(other_prompts: Mapping[str, str], settings: Settings) -> Iterator[str]:
    """Say why rows whose ids are in the journal, with these prompts, are not taken from there."""
    unknown = sum(not prompt_hash for prompt_hash in other_prompts.values())
    read = " or other columns that the verifier reads" if settings.verifier is not None else ""
    for count, why in (
        (len(other_prompts) - unknown, f"seen before with another prompt{read}"),
        (unknown, "begun by an earlier version, which did not keep what half-written rows answer"),
    ):
        if count:
            yield f"{count} id{'s were' if count > 1 else ' was'} {why}: written anew."
