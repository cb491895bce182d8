"""Reads the rows of one run in a journal file: which are done, how the others stand. Changes nothing."""

from __future__ import annotations

import json
import os
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import groupby, islice
from pathlib import Path
from typing import Any, NamedTuple

from tessy_hf.run.journal_file import JournalFile
from tessy_hf.trajectory import Author, Part, RowKey, Span

Key = RowKey | str
"""A row's key; a string is an id without a prompt hash."""

# Text is bound as bytes and cast, so that what is no valid Unicode (lone surrogates) comes back as it was.
ROW = "fingerprint = ? AND key = CAST(? AS TEXT) AND prompt_hash = ?"
DONE = "(finish_reason IS NOT NULL OR attempts >= ?)"
_STANDING = f"""CASE WHEN {DONE} THEN 'done' WHEN attempts > 0 THEN 'failed_before'
    WHEN EXISTS (SELECT 1 FROM pieces WHERE row = id) THEN 'to_continue' ELSE 'to_do' END"""


AUTHORS: tuple[Author, ...] = ("student", "teacher")  # pieces.author and pieces.part index these
PARTS: tuple[Part, ...] = ("thinking", "answer")


class Counts(NamedTuple):
    """How many rows are done (finished, or out of attempts), half written, not begun, to be tried again."""

    done: int = 0
    to_continue: int = 0
    to_do: int = 0
    failed_before: int = 0


class JournalReader:
    """The rows of one run in a journal file. Touches no file until used.

    Args:
        path: The file.
        fingerprint: The run's. Rows of other fingerprints in the file are not seen.
        max_attempts: How many attempts at a row may fail, over all runs, before the failure is final.
    """

    def __init__(self, path: str | os.PathLike[str], fingerprint: str, *, max_attempts: int = 3) -> None:
        self.path = Path(path).expanduser().absolute()
        self.fingerprint = fingerprint
        self.max_attempts = max_attempts
        self._file = JournalFile(self.path)

    def plan(self, keys: Iterable[Key], other_prompts: dict[str, str] | None = None) -> Counts:
        """Count how the rows with these keys stand in this run.

        Args:
            keys: The rows.
            other_prompts: Gets the ids that are here with other prompts only, and the hash of such a prompt, which is
                empty where it is not known. Their rows count as to do.

        Raises:
            JournalError: The file cannot be used.
        """
        counts: Counter[str] = Counter()
        rows = map(row_key, keys)
        while chunk := list(islice(rows, 500)):
            standing = self._standing({row.id for row in chunk})
            counts.update(standing.get(row, "to_do") for row in chunk)
            if other_prompts is not None:
                known = {row.id: row.prompt_hash for row in standing}
                missing = (row.id for row in chunk if row not in standing)
                other_prompts.update((name, known[name]) for name in missing if name in known)
        return Counts(**counts)

    def _standing(self, ids: set[str]) -> dict[RowKey, str]:
        marks = ", ".join(["CAST(? AS TEXT)"] * len(ids))
        query = f"SELECT key, prompt_hash, {_STANDING} FROM rows WHERE fingerprint = ? AND key IN ({marks})"
        with self._file.use() as db:
            found = db.execute(query, (self.max_attempts, self.fingerprint, *map(utf8, ids))).fetchall()
        return {RowKey(*key): how for *key, how in found}

    def finished(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Iterate over ids and columns of this run's rows that are done, in the order in which they were first met."""
        for key, columns in self._pages("key, columns", 64):
            yield key, json.loads(columns)

    def keys(self) -> Iterator[tuple[RowKey, bool]]:
        """Iterate over the keys of this run's rows that are done, and whether they failed. Reads no columns."""
        for key, prompt_hash, failed in self._pages("key, prompt_hash, finish_reason IS NULL", 1000):
            yield RowKey(key, prompt_hash), bool(failed)

    def _pages(self, names: str, size: int) -> Iterator[tuple[Any, ...]]:
        """Read what is done a page at a time: writers are not kept waiting, nor is memory filled."""
        query = f"""SELECT id, {names} FROM rows NOT INDEXED JOIN results ON row = id
            WHERE id > ? AND fingerprint = ? AND {DONE} ORDER BY id LIMIT {size}"""
        last = 0
        while True:
            with self._file.use() as db:
                page = db.execute(query, (last, self.fingerprint, self.max_attempts)).fetchall()
            if not page:
                return
            for last, *values in page:  # noqa: B007 - the last id is where the next page begins
                yield tuple(values)

    def unfinished(self) -> Iterator[tuple[str, list[Span]]]:
        """Iterate over ids and text so far of the rows that are being written, or were when their run ended."""
        query = """SELECT rows.id, key, author, part, text FROM rows JOIN pieces ON row = rows.id
            WHERE fingerprint = ? AND finish_reason IS NULL ORDER BY rows.id, number"""
        with self._file.use() as db:
            found = db.execute(query, (self.fingerprint,)).fetchall()
        for (_, key), pieces in groupby(found, key=lambda piece: piece[:2]):
            yield key, joined(piece[2:] for piece in pieces)

    def has_key(self, name: str) -> bool:
        """Return whether any row of this run has this key in its columns, at whatever depth."""
        query = "SELECT 1 FROM rows JOIN results ON row = id WHERE fingerprint = ? AND instr(columns, ?) LIMIT 1"
        with self._file.use() as db:
            return db.execute(query, (self.fingerprint, f'"{name}":')).fetchone() is not None

    def row(self, key: Key) -> dict[str, Any] | None:
        """Return the columns of a row that is done, or ``None``."""
        with self._file.use() as db:
            done = self._done(db, key)
        return done[0] if done is not None else None

    def _done(self, db: sqlite3.Connection, key: Key) -> tuple[dict[str, Any], int] | None:
        """Return columns and failed attempts of a row that is done."""
        query = f"SELECT columns, attempts FROM rows JOIN results ON row = id WHERE {ROW} AND {DONE}"
        found = db.execute(query, (*self._name(key), self.max_attempts)).fetchone()
        return found and (json.loads(found[0]), found[1])

    def _name(self, key: Key) -> tuple[str, bytes, str]:
        """Return the values for :data:`ROW`."""
        row = row_key(key)
        return self.fingerprint, utf8(row.id), row.prompt_hash

    def fingerprints(self) -> dict[str, Counts]:
        """Count the rows of each run in the file, oldest first; ``to_do`` counts those met without text."""
        query = f"SELECT fingerprint, {_STANDING}, count(*) FROM rows GROUP BY 1, 2 ORDER BY min(id)"
        with self._file.use() as db:
            found = db.execute(query, (self.max_attempts,)).fetchall()
        counts: dict[str, Counts] = {}
        for run, standing, count in found:
            counts[run] = counts.get(run, Counts())._replace(**{standing: count})
        return counts

    def description(self) -> str | None:
        """Return the text that describes this run, or ``None``."""
        with self._file.use() as db:
            if not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'descriptions'").fetchone():
                return None
            query = "SELECT text FROM descriptions WHERE fingerprint = ?"
            found = db.execute(query, (self.fingerprint,)).fetchone()
        return found and str(found[0])

    def close(self) -> None:
        """Close the file. The next use opens it again."""
        self._file.close()


def joined(pieces: Iterable[tuple[int, int, str]]) -> list[Span]:
    """Join neighboring pieces of the same author and part, as they are stored."""
    kinds = groupby(pieces, key=lambda piece: piece[:2])
    return [Span(AUTHORS[a], PARTS[p], "".join(text for *_, text in group)) for (a, p), group in kinds]


def row_key(key: Key) -> RowKey:
    """Return a key as a pair."""
    return key if isinstance(key, RowKey) else RowKey(key)


def utf8(text: str) -> bytes:
    """Encode any text, half surrogates too."""
    return text.encode("utf-8", "surrogatepass")
