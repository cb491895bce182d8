"""Where a run keeps its rows, and how a dataset's rows stand there. Starts nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets

from tessy_hf.errors import PromptError
from tessy_hf.manifest import RunRecord, differences
from tessy_hf.rows.prompt import PromptReader
from tessy_hf.run.journal import Counts, Journal
from tessy_hf.run.journal_reader import JournalReader
from tessy_hf.run.progress import say
from tessy_hf.run.shared_rows import SharedRows
from tessy_hf.settings import Settings
from tessy_hf.trajectory import RowKey

NAMED_RUNS = 3
"""Of how many other runs in its journal a new run speaks."""


def journal_of(settings: Settings, fingerprint: str) -> Journal | None:
    """Return the journal of a run, where it has one. Touches no file."""
    if settings.journal is None:
        return None
    folder = Path(datasets.config.HF_DATASETS_CACHE).parent / "tessy"
    path = folder / f"{fingerprint}.journal" if settings.journal == "auto" else settings.journal
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
    reader = PromptReader(settings, list(dataset.column_names or next(iter(dataset), names)))
    journal, shared = journal_of(settings, fingerprint), shared_rows_of(settings, fingerprint)
    if shared is not None:
        shared.refresh()
    unusable = done = 0
    other_prompts: dict[str, str] = {}

    def keys() -> Iterator[RowKey]:
        nonlocal unusable, done
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

    if journal is None or not journal.path.exists():
        counts = Counts(to_do=sum(1 for _ in keys()))
    else:
        counts = journal.plan(keys(), other_prompts)
        for line in other_runs(journal, record):
            say(line)
        journal.close()
    for line in why_anew(other_prompts, settings):
        say(line)
    return counts._replace(done=counts.done + done, to_do=counts.to_do + unusable)


def other_runs(journal: JournalReader, record: Callable[[], RunRecord]) -> Iterator[str]:
    """Say of a journal that holds other runs than this one, not begun yet, why their rows are not taken over."""
    runs = journal.fingerprints()
    if journal.fingerprint in runs:
        return
    for run in [run for run, counts in runs.items() if counts.done][-NAMED_RUNS:]:
        described = JournalReader(journal.path, run).description()
        other = differences(RunRecord.model_validate_json(described), record()) if described else ["its description"]
        why = f"differs in {', '.join(other[:4])}" if other else "is of another version of tessy-hf"
        yield f"the journal has {runs[run].done} rows of run {run}, which {why}: they are not taken over."


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
