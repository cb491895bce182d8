"""The SQLite file of a journal: created atomically, recognized, shared by processes, with its errors explained.

A path goes in, a connection comes out of :meth:`JournalFile.use`. Holds the tables of :mod:`tessy_hf.run.journal` and
knows nothing of what is done with them.
"""

from __future__ import annotations

import json
import os
import sqlite3
import tempfile
import threading
import weakref
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from tessy_hf.errors import JournalError
from tessy_hf.rows.prompt import finished_prompt_hash

FORMAT = 2
"""The version of the tables, in the file's ``user_version``."""

APPLICATION_ID = 0x54455353
"""``TESS``, in the file's ``application_id``: tells a journal from other SQLite files."""

BUSY_SECONDS = 30.0
"""Seconds to wait for another process to end its transaction. They take milliseconds."""

WAL_PAGES = 10_000
"""Pages of 4 KiB in the -wal file before they are copied into the file. Rows under way change the same pages again and
again; with SQLite's 1,000 each would be copied many times."""

_ROWS = """
CREATE TABLE rows (
    id INTEGER PRIMARY KEY,               -- counts up in the order in which rows were first met
    fingerprint TEXT NOT NULL,
    key TEXT NOT NULL,                    -- the row's id
    owner TEXT,                           -- the token of the journal that holds the claim
    attempts INTEGER NOT NULL DEFAULT 0,  -- those that failed
    finish_reason TEXT,                   -- NULL until finished
    state TEXT,                           -- JSON: what else is needed to continue
    prompt_hash TEXT NOT NULL DEFAULT '', -- of all that the row asks
    UNIQUE (fingerprint, key, prompt_hash)
);
CREATE INDEX held ON rows (owner) WHERE owner IS NOT NULL;
"""

SCHEMA = f"""
PRAGMA journal_mode = WAL;
BEGIN;
PRAGMA application_id = {APPLICATION_ID};
PRAGMA user_version = {FORMAT};
{_ROWS}
CREATE TABLE pieces (                     -- text kept of rows that are not finished
    row INTEGER, number INTEGER, author INTEGER, part INTEGER, text TEXT, PRIMARY KEY (row, number)
) WITHOUT ROWID;
CREATE TABLE results (row INTEGER PRIMARY KEY, columns TEXT NOT NULL);
CREATE TABLE owners (token TEXT PRIMARY KEY, host TEXT, pid INTEGER, expires REAL);
COMMIT;
"""


def is_journal(path: Path) -> bool:
    """Return whether a file is a journal, by its first bytes."""
    try:
        with path.open("rb") as file:
            head = file.read(72)
    except OSError:
        return False
    return head.startswith(b"SQLite format 3\0") and head[68:] == APPLICATION_ID.to_bytes(4, "big")


class JournalFile:
    """One journal's connection: opened when first used, the file made if need be; closed before a fork.

    SQLite's locks belong to the process and do not cross a fork, but what it remembers of them does: a child that used
    the file after its parent had it open would believe that it holds locks it has not.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._db: sqlite3.Connection | None = None
        _FILES.add(self)

    @contextmanager
    def use(self) -> Iterator[sqlite3.Connection]:
        """Lend the connection, in autocommit mode.

        Raises:
            JournalError: The file cannot be used.
        """
        with _LOCK:
            try:
                if self._db is None:
                    self._db = _open(self.path)
                yield self._db
            except sqlite3.Error as error:  # SQLite's own words are fixed, so they serve as codes
                unknown = f"cannot be used: {error}. A working SQLite file on a local disk is expected; look at it,"
                why = _EXPLANATIONS.get(str(error), f"{unknown} {_ELSEWHERE}")
                raise JournalError(f"The journal {self.path} {why}") from error

    def close(self) -> None:
        """Close the connection. The next use opens another."""
        if self._db is not None:
            self._db.close()
            self._db = None


_FILES: weakref.WeakSet[JournalFile] = weakref.WeakSet()
_LOCK = threading.RLock()


def _before_fork() -> None:
    _LOCK.acquire()  # waits until no thread is in a transaction
    for file in list(_FILES):
        file.close()


os.register_at_fork(before=_before_fork, after_in_parent=_LOCK.release, after_in_child=_LOCK.release)


# --- making and opening


def _open(path: Path) -> sqlite3.Connection:
    try:
        if not path.exists():
            _create(path)
    except JournalError:  # an OSError too
        raise
    except OSError as error:
        raise JournalError(
            f"The journal {path} cannot be made: {error.strerror or error}. A local folder that this user may write "
            "to, with free space, is expected; pass journal= with a path in one."
        ) from error
    if path.is_dir():
        raise JournalError(
            f"The journal {path} is a folder. A file is expected; pass journal='{path}/journal.sqlite'."
        )
    with closing(_connect(path, "ro")) as db:  # one that may write might tidy up in a stranger's file
        (application,) = db.execute("PRAGMA application_id").fetchone()
        (version,) = db.execute("PRAGMA user_version").fetchone()
    if application != APPLICATION_ID:
        seen = "a SQLite file of another program" if path.stat().st_size else "an empty file"
        raise JournalError(
            f"The journal {path} is {seen}. A journal made by tessy_hf, or no file, is expected; pass journal= with "
            "another path."
        )
    if version == 1:
        _upgrade(path)
    elif version != FORMAT:
        raise JournalError(
            f"The journal {path} has format {version}. This version of tessy_hf reads formats up to {FORMAT}; "
            "upgrade tessy_hf, or pass journal= with another path."
        )
    return _connect(path, "rw")


def _create(path: Path) -> None:
    """Create a journal elsewhere and link it into place, so that nobody ever sees half of one."""
    if Path(f"{path}-wal").exists() and not path.exists():
        raise JournalError(
            f"The journal {path} is gone, but {path.name}-wal with its last writes is there. Both or neither are "
            f"expected; put {path.name} back, or move {path.name}-wal away to start anew."
        )
    for folder in reversed([path.parent, *path.parent.parents]):
        if not folder.exists():
            folder.mkdir(mode=0o700, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".tessy-journal-") as folder_name:
        fresh = Path(folder_name, "journal")
        with closing(_connect(fresh, "rwc")) as db:
            db.executescript(SCHEMA)
        fresh.chmod(0o600)  # SQLite gives -wal and -shm the same
        with suppress(FileExistsError):  # another process was faster
            os.link(fresh, path)


def _upgrade(path: Path) -> None:
    """Add prompt hashes to a journal of format 1, which looked rows up by their ids alone.

    A finished row's hash is that of its ``messages``. What half-written rows answer is not known: they are not
    continued.
    """
    with closing(_connect(path, "rw")) as db:
        db.execute("BEGIN IMMEDIATE")
        if db.execute("PRAGMA user_version").fetchone() == (1,):  # no other process was faster
            for step in ("ALTER TABLE rows RENAME TO old", "DROP INDEX held", *_ROWS.split(";\n")[:-1]):
                db.execute(step)
            db.execute("INSERT INTO rows SELECT *, '' FROM old")
            db.execute("DROP TABLE old")
            for row, columns in db.execute("SELECT row, columns FROM results"):
                if messages := json.loads(columns).get("messages"):
                    hashed = finished_prompt_hash(messages)
                    db.execute("UPDATE rows SET prompt_hash = ? WHERE id = ?", (hashed, row))
            db.execute(f"PRAGMA user_version = {FORMAT}")
        db.execute("COMMIT")


def _connect(path: Path, mode: str) -> sqlite3.Connection:
    uri = f"{path.as_uri()}?mode={mode}"
    db = sqlite3.connect(uri, uri=True, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
    db.execute(f"PRAGMA wal_autocheckpoint = {WAL_PAGES}")
    db.text_factory = lambda text: text.decode("utf-8", "surrogatepass")
    return db


# --- errors

_WRITABLE = "A file in a local folder, both writable for this user, is expected; change the permissions,"
_ELSEWHERE = "or pass journal= with another path."
_EXPLANATIONS = {
    "attempt to write a readonly database": f"is read-only. {_WRITABLE} {_ELSEWHERE}",
    "unable to open database file": f"cannot be opened. {_WRITABLE} {_ELSEWHERE}",
    "database or disk is full": "cannot grow: the disk is full. Room for the text of the rows is expected; free some "
    "and run again, what was committed is kept.",
    "disk I/O error": "cannot be read or written: the disk reports an error. A local disk with free space is "
    f"expected; check the disk and its quota, {_ELSEWHERE}",
    "file is not a database": "is not a SQLite file, or its beginning is damaged. A journal is expected; put a copy "
    f"of it there, {_ELSEWHERE}",
    "database disk image is malformed": "is damaged or cut short. A whole journal is expected, with its -wal file "
    f"where there was one; put a copy there, {_ELSEWHERE}",
    "database is locked": f"has been locked by another process for {BUSY_SECONDS:.0f} seconds. Locks of milliseconds "
    "are expected; end the process that holds it (a database browser?) and run again.",
}
