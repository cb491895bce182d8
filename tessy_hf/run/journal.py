"""Durable rows: finished rows are never written again nor lost, interrupted ones resume from their last kept span.

Kept spans and finished columns go in as rows are written; claims, in a later run or another process, say what is there
already. Knows nothing of models, datasets or settings: a run is a fingerprint, a row is a key, columns and state are
JSON values, written as they are given. One SQLite file in WAL mode serves all processes of one machine.

What survives which death:
    Writes are buffered until :meth:`Journal.flush`. A row counts as finished once the flush after its
    :meth:`Journal.finish` has returned. It then survives SIGKILL and power cuts: commits with a finished or failed
    row are synced to disk (``synchronous=FULL``). Commits with spans only, and those of ``flush(sync=False)``, are not
    (``NORMAL``), since most are such: they survive SIGKILL; a power cut may lose those since the last synced commit.
    Such text, and what was still buffered, is generated again. The file stays consistent either way.

Who may write a row:
    One claim at a time. A claim holds until the row is finished, failed or released, until its process is gone, or
    until that process has not flushed for :data:`LEASE_SECONDS`. What a process writes to a row that was taken over
    while it slept is dropped. A forked child starts with no claims and an empty buffer.
"""

from __future__ import annotations

import functools
import json
import os
import socket
import sqlite3
import time
import uuid
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tessy_hf.errors import JournalError
from tessy_hf.run.journal_reader import AUTHORS, PARTS, ROW, Counts, JournalReader, Key, joined, row_key, utf8
from tessy_hf.trajectory import RowKey, Span

__all__ = ["Claim", "Counts", "Journal"]

LEASE_SECONDS = 60.0
"""How long a claim holds after its process last flushed, where it cannot be seen that the process is gone."""

_ENROLL = "INSERT OR IGNORE INTO rows (fingerprint, key, prompt_hash) VALUES (?, CAST(? AS TEXT), ?)"
_DESCRIPTIONS = "CREATE TABLE IF NOT EXISTS descriptions (fingerprint TEXT PRIMARY KEY, text TEXT NOT NULL)"


@dataclass(frozen=True, slots=True)
class Claim:
    """The answer to :meth:`Journal.claim`.

    ``finished``: take ``columns``. ``started``: write the row, on from ``spans`` and ``state``. ``busy``: someone
    else, or this journal itself, is writing it; ask again later.
    """

    status: Literal["finished", "started", "busy"]
    columns: dict[str, Any] = field(default_factory=dict)  # the last failure's where the row is out of attempts
    attempts: int = 0  # how many failed so far, over all runs
    spans: list[Span] = field(default_factory=list)  # kept so far; neighbors differ in author or part
    state: dict[str, Any] = field(default_factory=dict)  # last given to append(); empty if none was


@dataclass(slots=True)
class _Lease:
    """A claimed row, and what of it is not committed yet."""

    row: int
    number: int
    pieces: list[tuple[int, int, int, int, bytes]] = field(default_factory=list)
    state: Mapping[str, Any] | None = None
    columns: bytes | None = None
    finish_reason: str | None = None
    failed: int = 0
    ended: bool = False


FINAL = 1 << 20
"""Failed attempts that stand for one that no other can better."""


class Journal(JournalReader):
    """The rows of one run in a journal file, for one thread at a time. Touches no file until used.

    The arguments are those of a :class:`JournalReader`; the file is made with mode 0600 at its first use, missing
    folders with 0700. All methods may raise a :class:`JournalError`: the file cannot be used. What was buffered then
    stays buffered.
    """

    def __init__(self, path: str | os.PathLike[str], fingerprint: str, *, max_attempts: int = 3) -> None:
        super().__init__(path, fingerprint, max_attempts=max_attempts)
        self._forget()
        _JOURNALS.add(self)

    def _forget(self) -> None:
        """Start with no claims and an empty buffer, under a new token."""
        self._token, self._renewed, self._unsynced = uuid.uuid4().hex[:16], 0.0, False
        self._held: dict[RowKey, _Lease] = {}
        self._unwritten: dict[RowKey, _Lease] = {}

    # --- one row

    def enroll(self, keys: Iterable[Key]) -> None:
        """Give rows their places in the order of the run's rows, whichever of them is claimed first."""
        names = [self._name(key) for key in keys]
        with self._transaction() as db:
            db.executemany(_ENROLL, names)

    def claim(self, key: Key) -> Claim:
        """Look a row up if it is finished; else ask to write it."""
        key, name = row_key(key), self._name(key)
        if key in self._unwritten:
            self.flush()
        with self._file.use() as db:
            if (done := self._done(db, key)) is not None:
                return Claim("finished", *done)
        with self._transaction() as db:
            if (done := self._done(db, key)) is not None:  # another process was faster
                return Claim("finished", *done)
            db.execute(_ENROLL, name)
            found = db.execute(f"SELECT id, owner, attempts, state FROM rows WHERE {ROW}", name)
            row, owner, attempts, state = found.fetchone()
            if owner is not None and _is_live(db, owner):
                return Claim("busy", attempts=attempts)
            db.execute("UPDATE rows SET owner = ? WHERE id = ?", (self._token, row))
            found = db.execute("SELECT author, part, text FROM pieces WHERE row = ? ORDER BY number", (row,))
            pieces = found.fetchall()
        self._held[key] = _Lease(row, len(pieces))
        return Claim("started", spans=joined(pieces), state=json.loads(state or "{}"), attempts=attempts)

    def append(self, key: Key, pieces: Iterable[Span], state: Mapping[str, Any] | None = None) -> None:
        """Buffer text kept of a claimed row. The cost does not depend on how much the row has already.

        The state is JSON values needed to continue after it, in place of those before; not to change until flushed.
        """
        lease = self._lease(key)
        for piece in pieces:
            author, part = AUTHORS.index(piece.author), PARTS.index(piece.part)
            lease.pieces.append((lease.row, lease.number, author, part, utf8(piece.text)))
            lease.number += 1
        if state is not None:
            lease.state = state
        self._unwritten[row_key(key)] = lease

    def finish(self, key: Key, columns: Mapping[str, Any]) -> None:
        """Buffer a finished row, of JSON values, and end the claim. Durable once flushed."""
        self._end(key, columns, finish_reason=str(columns.get("finish_reason")))

    def fail(self, key: Key, columns: Mapping[str, Any], *, final: bool = False) -> None:
        """Buffer a failed attempt and end the claim. The text kept so far stays, for the next attempt.

        Args:
            key: The row.
            columns: The row, with its error.
            final: Whether no attempt can help, in this run or another: the failure counts as more than any maximum.
        """
        self._end(key, columns, failed=FINAL if final else 1)

    def release(self, key: Key) -> None:
        """Buffer the end of the claim on an unfinished row. The text kept so far stays."""
        self._end(key)

    def _end(
        self, key: Key, columns: Mapping[str, Any] | None = None, finish_reason: str | None = None, failed: int = 0
    ) -> None:
        key, lease = row_key(key), self._lease(key)
        if columns is not None:
            lease.columns = _json(columns)
        lease.finish_reason, lease.failed, lease.ended = finish_reason, failed, True
        self._unwritten[key] = lease
        del self._held[key]

    def _lease(self, key: Key) -> _Lease:
        row = row_key(key)
        try:
            return self._held[row]
        except KeyError:
            raise JournalError(
                f"The journal {self.path} holds no claim on row {row.id!r}. Only claimed rows can be written, until "
                "they are finished, failed or released; call claim() and write where it answers 'started'."
            ) from None

    # --- all rows

    def flush(self, *, sync: bool = True) -> None:
        """Commit what is buffered and, a few times a minute, renew all claims. Free where there is nothing to do.

        Finished and failed rows survive the process, and where ``sync`` is set a power cut too.
        """
        ended = self._unsynced or any(lease.columns is not None for lease in self._unwritten.values())
        if self._unwritten or (sync and ended) or (self._held and self._renewal_is_due()):
            with self._transaction(synced=sync and ended) as db:
                self._write(db)
                if sync and not self._unwritten:  # an empty transaction would not be synced
                    db.execute("UPDATE owners SET expires = expires WHERE token = ?", (self._token,))
            self._unsynced = ended and not sync
            for lease in self._unwritten.values():
                lease.pieces, lease.state = [], None
            self._unwritten.clear()

    def close(self) -> None:
        """Flush, release all claims and close the file. The journal can be used again."""
        for key in list(self._held):
            self.release(key)
        try:
            self.flush()
            if self._renewed:
                with self._transaction() as db:
                    db.execute("DELETE FROM owners WHERE token = ?", (self._token,))
                self._renewed = 0.0
        finally:
            self._file.close()

    def describe(self, description: str) -> None:
        """Keep a text that describes this run, in place of the one kept before."""
        with self._transaction() as db:
            db.execute(_DESCRIPTIONS)
            db.execute("INSERT OR REPLACE INTO descriptions VALUES (?, ?)", (self.fingerprint, description))

    # --- writing

    @contextmanager
    def _transaction(self, synced: bool = False) -> Iterator[sqlite3.Connection]:
        """Commit what the caller writes, all or nothing, and renew the claims if that is due."""
        with self._file.use() as db:
            db.execute(f"PRAGMA synchronous = {'FULL' if synced else 'NORMAL'}")
            db.execute("BEGIN IMMEDIATE")
            try:
                renewed = self._renewed
                if self._renewal_is_due():
                    renewed = time.time()
                    owner = (self._token, _host(), os.getpid(), renewed + LEASE_SECONDS)
                    db.execute("INSERT OR REPLACE INTO owners VALUES (?, ?, ?, ?)", owner)
                yield db
                db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise
        self._renewed = renewed

    def _write(self, db: sqlite3.Connection) -> None:
        held = {row for (row,) in db.execute("SELECT id FROM rows WHERE owner = ?", (self._token,))}
        leases = [lease for lease in self._unwritten.values() if lease.row in held]  # others were taken over
        states = [(_json(lease.state), lease.row) for lease in leases if lease.state is not None]
        pieces = [piece for lease in leases if lease.finish_reason is None for piece in lease.pieces]
        db.executemany("UPDATE rows SET state = CAST(? AS TEXT) WHERE id = ?", states)
        db.executemany("INSERT OR REPLACE INTO pieces VALUES (?, ?, ?, ?, CAST(? AS TEXT))", pieces)
        for lease in leases:
            if lease.ended:
                change = "UPDATE rows SET owner = NULL, finish_reason = ?, attempts = attempts + ? WHERE id = ?"
                db.execute(change, (lease.finish_reason, lease.failed, lease.row))
            if lease.columns is not None:
                db.execute("INSERT OR REPLACE INTO results VALUES (?, CAST(? AS TEXT))", (lease.row, lease.columns))
            if lease.finish_reason is not None:
                db.execute("DELETE FROM pieces WHERE row = ?", (lease.row,))

    def _renewal_is_due(self) -> bool:
        return abs(time.time() - self._renewed) >= LEASE_SECONDS / 4


_JOURNALS: weakref.WeakSet[Journal] = weakref.WeakSet()


def _forget_all() -> None:
    for journal in list(_JOURNALS):
        journal._forget()


os.register_at_fork(after_in_child=_forget_all)


def _is_live(db: sqlite3.Connection, token: str) -> bool:
    """Return whether the owner of a claim may still write; delete it if not."""
    owner = db.execute("SELECT host, pid, expires FROM owners WHERE token = ?", (token,)).fetchone()
    live = owner is not None and owner[2] >= time.time() and (owner[0] != _host() or _runs(owner[1], token))
    if not live:
        db.execute("DELETE FROM owners WHERE token = ?", (token,))
    return live


def _runs(pid: int, token: str) -> bool:
    if pid == os.getpid():  # this process, or a dead one whose pid it has now
        return any(journal._token == token for journal in _JOURNALS)
    try:
        os.kill(pid, 0)
    except OSError as error:
        return isinstance(error, PermissionError)  # it is there, but another user's
    return True


@functools.cache
def _host() -> str:
    """Return what makes pids comparable: this boot of this machine, and this namespace of pids."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return socket.gethostname()


_encode = json.JSONEncoder(ensure_ascii=False).encode  # json.dumps would make an encoder each time


def _json(value: Mapping[str, Any]) -> bytes:
    return utf8(_encode(value))
