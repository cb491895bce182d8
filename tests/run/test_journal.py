"""What is finished is never written again nor lost, what is under way continues, whatever dies; files stay whole."""

import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import textwrap
import threading
from collections import Counter
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tessy_hf.errors import JournalError, TessyError
from tessy_hf.run import journal as journal_module
from tessy_hf.run import journal_file
from tessy_hf.run.journal import Counts, Journal
from tessy_hf.trajectory import Span

COLUMNS = {"thinking": "okay so", "answer": "2", "finish_reason": "stop", "error": None, "spans": [{"start": 0}]}
FAILED = {"answer": "", "finish_reason": "error", "error": "the engine did not answer"}


def span(text, author="teacher", part="thinking"):
    return Span(author, part, text)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "journal.sqlite"


@pytest.fixture
def opened(path):
    """Make journals of one file, and close them at the end."""
    made = []

    def open_journal(fingerprint="run", **options):
        made.append(Journal(path, fingerprint, **options))
        return made[-1]

    yield open_journal
    for journal in made:
        journal._file.close()


def script(body, *arguments, **options):
    """Start a Python process that runs ``body`` with the arguments as ``sys.argv[1:]``."""
    head = """
        import os, signal, sys
        from tessy_hf.errors import JournalError
        from tessy_hf.run.journal import Journal
        from tessy_hf.trajectory import Span

        def say(*words):
            print(*words, flush=True)
    """
    code = textwrap.dedent(head) + textwrap.dedent(body)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], **pipes, **options)


def result_of(process, given=None):
    """Wait for a process and return the lines it printed."""
    out, err = process.communicate(given, timeout=120)
    assert process.returncode == 0, err
    return out.splitlines()


def kill(process):
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL


def query(path, sql, *values):
    with closing(sqlite3.connect(path)) as db, db:
        return db.execute(sql, values).fetchall()


# --- one row


def test_a_finished_row_is_looked_up_and_never_claimed_again(opened):
    first = opened()
    assert first.claim("a").status == "started"
    first.append("a", [span("okay so")])
    first.finish("a", COLUMNS)
    first.flush()
    for journal in (first, opened()):
        claim = journal.claim("a")
        assert (claim.status, claim.columns, claim.attempts) == ("finished", COLUMNS, 0)


def test_a_row_under_way_continues_at_its_last_kept_span(opened):
    first = opened()
    first.claim("a")
    first.append("a", [span("Okay", "student"), span(", so"), span(" 1+1")], {"turn": "teacher"})
    first.flush()
    first.append("a", [span(" is"), span(" 2", part="answer")], {"turn": "student", "generated": {"teacher": 5}})
    first.append("a", [span(".", part="answer")])
    first.close()

    second = opened()
    claim = second.claim("a")
    assert claim.status == "started"
    assert claim.spans == [span("Okay", "student"), span(", so 1+1 is"), span(" 2.", part="answer")]
    assert claim.state == {"turn": "student", "generated": {"teacher": 5}}
    second.append("a", [span("!", part="answer")])
    second.close()
    assert opened().claim("a").spans[-1] == span(" 2.!", part="answer")


def test_nothing_is_written_before_it_is_flushed(opened, path):
    journal = opened()
    journal.claim("a")
    journal.append("a", [span("x")])
    journal.claim("b")
    journal.finish("b", COLUMNS)
    assert query(path, "SELECT count(*) FROM pieces") == query(path, "SELECT count(*) FROM results") == [(0,)]
    assert list(journal.finished()) == []
    journal.flush()
    assert query(path, "SELECT count(*) FROM pieces") == query(path, "SELECT count(*) FROM results") == [(1,)]
    assert list(journal.finished()) == [("b", COLUMNS)]


def test_finished_rows_are_synced_to_disk_and_spans_are_not(opened):
    journal = opened()

    def level():
        with journal._file.use() as db:
            return db.execute("PRAGMA synchronous").fetchone()[0]

    journal.claim("a")
    journal.append("a", [span("x")])
    journal.flush()
    assert level() == 1  # NORMAL
    journal.finish("a", COLUMNS)
    journal.flush()
    assert level() == 2  # FULL


def test_a_failed_row_is_retried_until_it_is_out_of_attempts_counted_over_runs(opened):
    for attempt in range(3):
        journal = opened(max_attempts=3)
        claim = journal.claim("a")
        assert (claim.status, claim.attempts) == ("started", attempt)
        assert claim.spans == ([span("x" * attempt)] if attempt else [])
        journal.append("a", [span("x")])
        journal.fail("a", {**FAILED, "error": f"failure {attempt}"})
        journal.close()
        assert journal.plan(["a"]) == (Counts(done=1) if attempt == 2 else Counts(failed_before=1))
    last = opened(max_attempts=3)
    claim = last.claim("a")
    assert (claim.status, claim.attempts, claim.columns["error"]) == ("finished", 3, "failure 2")
    assert [key for key, _ in last.finished()] == ["a"]
    more = opened(max_attempts=4)
    assert list(more.finished()) == []
    assert more.claim("a").spans == [span("xxx")]
    more.finish("a", COLUMNS)
    more.flush()
    assert last.claim("a").columns == COLUMNS


def test_a_row_that_failed_can_be_claimed_again_at_once(opened):
    journal = opened()
    journal.claim("a")
    journal.append("a", [span("x")], {"turn": "teacher"})
    journal.fail("a", FAILED)
    claim = journal.claim("a")
    assert (claim.status, claim.attempts, claim.spans) == ("started", 1, [span("x")])
    journal.release("a")
    assert journal.claim("a").status == "started"


def test_only_a_claimed_row_can_be_written(opened):
    journal = opened()
    journal.claim("a")
    journal.finish("a", COLUMNS)
    writes = (
        lambda key: journal.append(key, [span("x")]),
        lambda key: journal.finish(key, COLUMNS),
        lambda key: journal.fail(key, FAILED),
        journal.release,
    )
    for write in writes:
        for key in ("a", "b"):
            with pytest.raises(JournalError, match=f"holds no claim on row '{key}'.*Only claimed rows.*call claim"):
                write(key)


def test_columns_that_are_no_json_leave_the_claim_as_it_was(opened):
    journal = opened()
    journal.claim("a")
    with pytest.raises(TypeError):
        journal.finish("a", {"finish_reason": "stop", "spans": {1, 2}})
    journal.finish("a", COLUMNS)
    journal.flush()
    assert journal.claim("a").columns == COLUMNS


odd = st.sampled_from(["\ud83d", "\ude00", "\ud83d\ude00", "\0", "😀", "\u2028", "\ufeff"])
text = st.lists(st.characters() | st.characters(categories=["Cs"]) | odd, max_size=30).map("".join)


@pytest.mark.slow
@settings(max_examples=150)
@example(
    key="\ud83d\0\ude00", pieces=[("teacher", "answer", "\ud83d"), ("teacher", "answer", "\ude00")], value="\udfff"
)
@given(
    key=text,
    pieces=st.lists(st.tuples(st.sampled_from(["teacher", "student"]), st.sampled_from(["thinking", "answer"]), text)),
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | text,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
        max_leaves=6,
    ),
)
def test_any_text_comes_back_as_it_was(tmp_path_factory, key, pieces, value):
    path = tmp_path_factory.getbasetemp() / "unicode" / "journal.sqlite"
    given = [Span(author, part, text) for author, part, text in pieces]
    expected = []
    for piece in given:
        joins = expected and (expected[-1].author, expected[-1].part) == (piece.author, piece.part)
        before = expected.pop().text if joins else ""
        expected.append(Span(piece.author, piece.part, before + piece.text))
    columns = {"finish_reason": "stop", "value": value}
    try:
        with closing(Journal(path, "run")) as journal:
            assert journal.claim(key).status == "started"
            journal.append(key, given, {"value": value})
        with closing(Journal(path, "run")) as journal:
            claim = journal.claim(key)
            assert (claim.spans, claim.state) == (expected, {"value": value})
            assert journal.plan([key]) == (Counts(to_continue=1) if pieces else Counts(to_do=1))
            journal.finish(key, columns)
        with closing(Journal(path, "run")) as journal:
            assert journal.claim(key).columns == columns
            assert list(journal.finished()) == [(key, columns)]
    finally:
        shutil.rmtree(path.parent)


# --- all rows


def test_a_plan_counts_how_rows_stand_and_changes_nothing(opened, path):
    journal = opened()
    for n in range(1_200):
        journal.claim(f"r{n}")
        if n < 700:
            journal.finish(f"r{n}", COLUMNS)
        elif n < 900:
            journal.append(f"r{n}", [span("x")])
        elif n < 1_000:
            journal.append(f"r{n}", [span("x")])
            journal.fail(f"r{n}", FAILED)
    journal.close()
    before = query(path, "SELECT * FROM rows")
    keys = (f"r{n}" for n in range(1_500))
    assert journal.plan(keys) == Counts(done=700, to_continue=200, to_do=500, failed_before=100)
    assert journal.plan(["r0", "r0", "r899", "new", "new"]) == Counts(done=2, to_continue=1, to_do=2)
    assert journal.plan([]) == Counts()
    assert opened("another").plan(["r0"]) == Counts(to_do=1)
    assert query(path, "SELECT * FROM rows") == before


def test_runs_in_one_file_are_never_mixed(opened):
    one, two = opened("one"), opened("two")
    for journal in (one, two):
        assert journal.claim("a").status == "started"
        journal.append("a", [span(journal.fingerprint)])
        journal.flush()
    one.finish("a", COLUMNS)
    one.flush()
    two.claim("b")
    assert two.claim("a").status == "busy"
    two.release("a")
    assert two.claim("a").spans == [span("two")]
    assert one.fingerprints() == {"one": Counts(done=1), "two": Counts(to_continue=1, to_do=1)}
    assert list(two.finished()) == []
    assert list(one.finished()) == [("a", COLUMNS)]


def test_finished_rows_come_in_the_order_of_their_first_claims(opened):
    journal = opened()
    keys = [f"r{n}" for n in range(300)]
    for key in keys:
        journal.claim(key)
    shuffled = random.Random(0).sample(keys, len(keys))
    for key in shuffled[:250]:
        journal.finish(key, {"finish_reason": "stop", "key": key})
    journal.flush()
    expected = [key for key in keys if key in shuffled[:250]]
    assert [(key, columns["key"]) for key, columns in journal.finished()] == [(key, key) for key in expected]


def test_the_file_can_be_read_while_rows_are_written(opened):
    journal = opened()
    for n in range(200):
        journal.claim(f"r{n}")
        journal.finish(f"r{n}", COLUMNS)
    journal.flush()
    seen = []
    for key, _ in opened().finished():
        journal.claim(f"later {key}")
        journal.finish(f"later {key}", COLUMNS)
        journal.flush()
        seen.append(key)
        if len(seen) == 200:
            break
    assert seen == [f"r{n}" for n in range(200)]


def test_an_append_costs_the_same_however_long_the_row_is(opened, path):
    journal = opened()

    def written(key):
        """The bytes that one more piece of a row adds to the write-ahead log."""
        with journal._file.use() as db:
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        journal.append(key, [span("x" * 80)], {"turn": "teacher"})
        journal.flush()
        return os.path.getsize(f"{path}-wal")

    for key, pieces in (("short", 50), ("long", 20_000)):
        journal.claim(key)
        journal.append(key, [span("x" * 80)] * pieces)
        journal.flush()
    assert written("long") <= written("short") + 4 * 4_200  # at most a split of one page


def test_the_file_grows_linearly_with_the_text(opened, path):
    sizes = []
    for part in range(4):
        journal = opened()
        for n in range(50):
            key = f"{part} {n}"
            journal.claim(key)
            for _ in range(10):
                journal.append(key, [span("x" * 80)] * 10, {"turn": "teacher"})
                journal.flush()
            if n % 2:
                journal.finish(key, {"finish_reason": "stop", "thinking": "x" * 8_000})
        journal.close()
        sizes.append(path.stat().st_size)
    steps = [after - before for before, after in zip(sizes, sizes[1:], strict=False)]
    kept = 50 * 8_000
    assert all(kept * 0.9 < step < kept * 1.8 for step in steps)


# --- who may write


def test_a_row_that_someone_writes_is_busy_until_it_is_released(opened, path):
    one, two = opened(), opened()
    one.claim("a")
    assert one.claim("a").status == two.claim("a").status == "busy"
    other = script(
        """
        journal = Journal(sys.argv[1], "run")
        say(journal.claim("a").status, journal.claim("b").status)
        sys.stdin.readline()
        journal.append("b", [Span("teacher", "thinking", "mine")])
        journal.close()
        """,
        path,
    )
    assert other.stdout.readline().split() == ["busy", "started"]
    assert one.claim("b").status == "busy"
    result_of(other, "go on\n")
    assert one.claim("b").spans == [span("mine")]
    one.append("a", [span("x")])
    one.release("a")
    one.flush()
    assert two.claim("a").spans == [span("x")]
    one.close()


def test_a_killed_process_loses_what_it_had_not_flushed_and_nothing_else(opened, path):
    process = script(
        """
        journal = Journal(sys.argv[1], "run")
        for key in ("finished", "buffered", "kept", "untouched", "failed"):
            journal.claim(key)
        journal.finish("finished", {"finish_reason": "stop", "answer": "2"})
        journal.append("kept", [Span("student", "thinking", "Okay"), Span("teacher", "thinking", " so")], {"turn": 1})
        journal.append("buffered", [Span("student", "thinking", "early")])
        journal.fail("failed", {"finish_reason": "error"})
        journal.flush()
        journal.append("kept", [Span("teacher", "thinking", " lost")], {"turn": 2})
        journal.finish("buffered", {"finish_reason": "stop"})
        say("ready")
        sys.stdin.readline()
        """,
        path,
    )
    assert process.stdout.readline() == "ready\n"
    journal = opened()
    assert [journal.claim(key).status for key in ("buffered", "kept", "untouched")] == ["busy"] * 3
    kill(process)
    assert journal.plan(["finished", "buffered", "kept", "untouched", "failed"]) == Counts(1, 2, 1, 1)
    assert journal.claim("finished").columns == {"finish_reason": "stop", "answer": "2"}
    assert journal.claim("kept").spans == [span("Okay", "student"), span(" so")]
    assert journal.claim("buffered").spans == [span("early", "student")]
    assert journal.claim("untouched").spans == []
    assert journal.claim("failed").attempts == 1
    journal.release("kept")
    assert journal.claim("kept").state == {"turn": 1}


def test_two_processes_never_get_the_same_row(tmp_path):
    path = tmp_path / "new folder" / "journal.sqlite"  # which they make at the same time
    body = """
        import random
        keys = [f"r{n}" for n in range(200)]
        random.Random(int(sys.argv[2])).shuffle(keys)
        say("ready")
        sys.stdin.readline()
        journal = Journal(sys.argv[1], "run")
        waits = True
        for key in keys:
            if journal.claim(key).status == "started":
                say(key)
                if waits:
                    sys.stdin.readline()  # hold it until all have their first row
                    waits = False
        journal.flush()
        say("through")
        sys.stdin.readline()  # hold them until all are through
    """
    processes = [script(body, path, seed) for seed in range(3)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    gone = {process: [] for process in processes}
    threads = [
        threading.Thread(target=lambda process=process: gone[process].extend(iter(process.stdout.readline, "")))
        for process in processes
    ]
    for thread in threads:
        thread.start()
    poll_until(lambda: all(gone.values()))
    for process in processes:
        process.stdin.write("on\n")
        process.stdin.flush()
    poll_until(lambda: all("through\n" in lines for lines in gone.values()))
    for process in processes:
        process.stdin.write("end\n")
        process.stdin.close()
        process.wait(timeout=60)
        assert process.returncode == 0, process.stderr.read()
    for thread in threads:
        thread.join()
    for process in processes:
        process.stdout.close()
        process.stderr.close()
    claimed = Counter(line.strip() for lines in gone.values() for line in lines)
    assert claimed.pop("through") == 3
    assert claimed == {f"r{n}": 1 for n in range(200)}


def poll_until(condition, seconds=60):
    """Wait for a condition, at most so long."""
    waiting = threading.Event()
    for _ in range(int(seconds / 0.02)):
        if condition():
            return
        waiting.wait(0.02)
    raise AssertionError("it did not come about")


@pytest.mark.slow
def test_runs_that_are_killed_again_and_again_write_every_piece_once(opened, path):
    """Killed while it takes the step after the line that was read: runs wait after each line, and never run ahead."""
    body = """
        def tell(*words):
            say(*words)
            sys.stdin.readline()

        journal = Journal(sys.argv[1], "run")
        for n in range(12):
            claim = journal.claim(f"r{n}")
            if claim.status == "started":
                begun = sum(span.text.count("|") for span in claim.spans)
                for piece in range(begun, 5):
                    journal.append(f"r{n}", [Span(("student", "teacher")[piece % 2], "thinking", f"{piece}|")])
                    journal.flush()
                    tell("piece", n, piece)
                spans = [span.text for span in claim.spans]
                journal.finish(f"r{n}", {"finish_reason": "stop", "begun": begun, "spans": spans})
                journal.flush()
                tell("finish", n)
            else:
                tell(claim.status, n)
        tell("end")
    """
    chance, lines, runs = random.Random(1), [], 0
    while "end" not in lines:
        runs += 1
        process = script(body, path)
        for _ in range(chance.randrange(4, 40)):
            lines.append(process.stdout.readline().strip())
            if lines[-1] in ("end", ""):
                break
            process.stdin.write("\n")
            process.stdin.flush()
        kill(process) if lines[-1] != "end" else result_of(process)
    assert runs > 2
    assert "" not in lines and not any(line.startswith("busy") for line in lines)
    written = Counter(line for line in lines if line.startswith(("piece", "finish ")))
    assert set(written.values()) == {1}
    rows = dict(opened().finished())
    assert list(rows) == [f"r{n}" for n in range(12)]
    for row in rows.values():
        assert row["spans"] == [f"{piece}|" for piece in range(row["begun"])]
    assert any(row["begun"] for row in rows.values())


def test_an_owner_elsewhere_is_believed_until_its_lease_ends_and_then_no_more(opened, path):
    sleeper, other = opened(), opened()
    for key in ("a", "b"):
        sleeper.claim(key)
        sleeper.append(key, [span("early")])
    sleeper.flush()
    query(path, "UPDATE owners SET host = 'elsewhere', pid = 1")
    assert other.claim("a").status == "busy"
    query(path, "UPDATE owners SET expires = expires - 3600 WHERE host = 'elsewhere'")
    assert other.claim("a").spans == [span("early")]

    # The sleeper wakes up: what it writes to the row it lost is dropped, the other is still its own.
    for key in ("a", "b"):
        sleeper.append(key, [span(" late")])
    sleeper.flush()
    sleeper.finish("a", {"finish_reason": "stop", "by": "sleeper"})
    sleeper.finish("b", {"finish_reason": "stop", "by": "sleeper"})
    sleeper.flush()
    other.append("a", [span(" on")])
    other.flush()
    assert query(path, "SELECT text FROM pieces ORDER BY number") == [("early",), (" on",)]
    other.finish("a", {"finish_reason": "stop", "by": "other"})
    other.flush()
    assert {key: columns["by"] for key, columns in other.finished()} == {"a": "other", "b": "sleeper"}


def test_the_pid_of_a_dead_owner_may_be_ours_now(opened, path):
    gone = opened()
    gone.claim("a")
    query(path, "UPDATE owners SET token = 'gone'")
    query(path, "UPDATE rows SET owner = 'gone'")
    assert opened().claim("a").status == "started"


def test_another_users_process_is_alive(opened, path, monkeypatch):
    def refuse(pid, number):
        raise PermissionError

    journal = opened()
    journal.claim("a")
    query(path, "UPDATE owners SET pid = 1")
    monkeypatch.setattr(journal_module.os, "kill", refuse)
    assert opened().claim("a").status == "busy"


def test_flushing_renews_the_lease_when_it_is_due(opened, path, monkeypatch):
    now = [1_000_000.0]
    monkeypatch.setattr(journal_module.time, "time", lambda: now[0])
    journal = opened()
    journal.claim("a")

    def left():
        ((expires,),) = query(path, "SELECT expires FROM owners")
        return expires - now[0]

    assert left() == journal_module.LEASE_SECONDS
    now[0] += 5
    journal.flush()
    assert left() == journal_module.LEASE_SECONDS - 5  # nothing to write, nothing written
    now[0] += 15
    journal.flush()
    assert left() == journal_module.LEASE_SECONDS
    now[0] -= 3_600  # a clock that is set back
    journal.flush()
    assert left() == journal_module.LEASE_SECONDS
    now[0] += 3_600  # a process that slept
    journal.append("a", [span("x")])
    journal.flush()
    assert left() == journal_module.LEASE_SECONDS
    assert opened().claim("a").status == "busy"


def test_a_closed_journal_leaves_no_owner_and_can_be_used_again(opened, path):
    journal = opened()
    journal.claim("a")
    journal.append("a", [span("x")])
    journal.close()
    journal.close()
    assert query(path, "SELECT owner FROM rows") == [(None,)]
    assert query(path, "SELECT * FROM owners") == []
    assert journal.claim("a").spans == [span("x")]
    assert query(path, "SELECT count(*) FROM owners") == [(1,)]


def test_a_fork_takes_no_connection_no_claims_and_no_buffer_along(path):
    lines = result_of(
        script(
            """
            def descriptors():
                links = (f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd"))
                return sum(os.readlink(link).startswith(sys.argv[1]) for link in links if os.path.islink(link))

            journal = Journal(sys.argv[1], "run")
            journal.claim("a")
            journal.append("a", [Span("teacher", "thinking", "flushed")])
            journal.flush()
            journal.append("a", [Span("teacher", "thinking", " buffered")])
            assert descriptors() > 0
            child = os.fork()
            if not child:
                assert descriptors() == 0
                journal.flush()
                say("child", journal.claim("a").status, journal.claim("b").status)
                try:
                    journal.append("a", [])
                except JournalError:
                    say("child not claimed")
                journal.finish("b", {"finish_reason": "stop"})
                journal.close()
                os._exit(0)
            assert os.waitpid(child, 0)[1] == 0
            say("parent", journal.claim("b").status, journal.claim("a").status)
            journal.close()
            say("text", "".join(span.text for span in journal.claim("a").spans))
            """,
            path,
        )
    )
    assert lines == ["child busy started", "child not claimed", "parent finished busy", "text flushed buffered"]


def test_processes_may_fork_while_a_thread_writes(path):
    lines = result_of(
        script(
            """
            import threading
            from multiprocess import get_context

            def work(n):
                for m in range(10):
                    if journal.claim(f"{n} {m}").status == "started":
                        journal.finish(f"{n} {m}", {"finish_reason": "stop"})
                    journal.flush()
                journal.close()

            def keep_writing():
                while not stop.is_set():
                    journal.append("a", [Span("teacher", "thinking", "x")])
                    journal.flush()
                    written.append(1)

            journal, stop, written = Journal(sys.argv[1], "run"), threading.Event(), []
            journal.claim("a")
            writer = threading.Thread(target=keep_writing)
            writer.start()
            for _ in range(5):
                children = [get_context("fork").Process(target=work, args=(n,)) for n in range(4)]
                for child in children:
                    child.start()
                for child in children:
                    child.join()
                    assert child.exitcode == 0
            stop.set()
            writer.join()
            journal.close()
            say(len(list(journal.finished())), len(written) == sum(len(s.text) for s in journal.claim("a").spans))
            """,
            path,
        )
    )
    assert lines == ["40 True"]
    assert query(path, "PRAGMA integrity_check") == [("ok",)]


# --- the file


def test_the_files_are_for_the_owner_alone(tmp_path):
    shared = tmp_path / "shared"
    shared.mkdir(mode=0o755)
    path = shared / "deep" / "er" / "journal.sqlite"
    before = os.umask(0)
    try:
        journal = Journal(path, "run")
        journal.claim("a")
    finally:
        os.umask(before)
    modes = {file.name: file.stat().st_mode & 0o777 for file in path.parent.iterdir()}
    assert modes == {"journal.sqlite": 0o600, "journal.sqlite-wal": 0o600, "journal.sqlite-shm": 0o600}
    assert [folder.stat().st_mode & 0o777 for folder in (path.parent, path.parent.parent)] == [0o700, 0o700]
    assert shared.stat().st_mode & 0o777 == 0o755
    journal.close()
    assert [file.name for file in path.parent.iterdir()] == ["journal.sqlite"]


def test_nothing_is_written_but_what_was_given(path):
    secret = "hf_" + "s3cr3t" * 4
    body = """
        journal = Journal(sys.argv[1], "run")
        journal.claim("a")
        journal.append("a", [Span("teacher", "thinking", "the given text")])
        journal.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    """
    process = script(body, path, env={**os.environ, "HF_TOKEN": secret, "OPENAI_API_KEY": secret})
    process.communicate(timeout=60)
    content = b"".join(file.read_bytes() for file in path.parent.iterdir() if file.name.startswith(path.name))
    assert b"the given text" in content and secret.encode() not in content


def foreign(path):
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("CREATE TABLE bookmarks (url TEXT)")


def foreign_with_hot_log(path):
    body = """
        import sqlite3
        db = sqlite3.connect(sys.argv[1], isolation_level=None)
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("CREATE TABLE bookmarks (url TEXT)")
        os.kill(os.getpid(), signal.SIGKILL)
    """
    script(body, path).communicate(timeout=60)
    assert os.path.getsize(f"{path}-wal")


def newer(path):
    filled(path)
    query(path, f"PRAGMA user_version = {journal_file.FORMAT + 1}")


def filled(path):
    journal = Journal(path, "run")
    for n in range(50):
        journal.claim(f"r{n}")
        journal.append(f"r{n}", [span("x" * 2_000)])
    journal.close()


def truncated(path):
    filled(path)
    os.truncate(path, path.stat().st_size // 2)


def header_gone(path):
    filled(path)
    path.write_bytes(b"\0" * 200 + path.read_bytes()[200:])


def pages_gone(path):
    filled(path)
    content = path.read_bytes()
    path.write_bytes(content[:4_096] + b"\xff" * (len(content) - 4_096))


def text_file(path):
    path.write_text("no database at all, but a text that someone wrote\n" * 99)


def folder_there(path):
    path.mkdir()


def empty(path):
    path.touch()


def log_alone(path):
    path.with_name(path.name + "-wal").write_text("the last writes")


def parent_is_a_file(path):
    path.parent.rmdir()
    path.parent.write_text("a file")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (foreign, "is a SQLite file of another program.*is expected.*another path"),
        (foreign_with_hot_log, "is a SQLite file of another program.*is expected.*another path"),
        (newer, "has format 3.*reads formats up to 2.*upgrade tessy_hf"),
        (truncated, "is damaged or cut short.*is expected.*put a copy"),
        (header_gone, "is not a SQLite file.*is expected.*put a copy"),
        (pages_gone, "is damaged or cut short.*is expected.*put a copy"),
        (text_file, "is not a SQLite file.*is expected.*put a copy"),
        (empty, "is an empty file.*is expected.*another path"),
        (folder_there, "is a folder.*is expected.*pass journal=.*/journal.sqlite/journal.sqlite"),
        (log_alone, "is gone, but journal.sqlite-wal.*are expected.*put"),
        (parent_is_a_file, "cannot be made: Not a directory.*is expected.*pass journal="),
    ],
)
def test_a_file_that_is_no_sound_journal_is_explained_and_left_as_it_is(tmp_path, damage, message):
    path = tmp_path / "folder" / "journal.sqlite"
    path.parent.mkdir()
    damage(path)
    log = path.with_name(path.name + "-wal")
    before = [file.read_bytes() if file.is_file() else b"" for file in (path, log)]
    for use in (
        lambda journal: journal.claim("r1"),
        lambda journal: journal.plan(["r1"]),
        lambda journal: list(journal.finished()),
        lambda journal: journal.fingerprints(),
    ):
        journal = Journal(path, "run")
        with pytest.raises(JournalError, match=message) as caught:
            use(journal)
        assert isinstance(caught.value, TessyError) and isinstance(caught.value, OSError)
        journal.close()
        assert [file.read_bytes() if file.is_file() else b"" for file in (path, log)] == before
    assert not path.parent.is_dir() or not list(path.parent.glob(".tessy*"))


@pytest.fixture
def folder():
    """A folder that other users may enter, which pytest's own are not."""
    with tempfile.TemporaryDirectory() as made:
        yield Path(made)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["file", "folder", "folder to make"])
def test_a_file_or_folder_that_cannot_be_written_is_explained(folder, what):
    """For real: a user without rights (nobody where the tests run as root) meets a file that it may only read."""
    path = folder / ("journal.sqlite" if what != "folder to make" else "more/journal.sqlite")
    if what != "folder to make":
        filled(path)
        path.chmod(0o444 if what == "file" else 0o666)
    folder.chmod(0o777 if what == "file" else 0o555)
    content = path.read_bytes() if path.exists() else None
    body = """
        if os.getuid() == 0:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
        try:
            say(Journal(sys.argv[1], "run").claim("new").status)
        except JournalError as error:
            say(error)
    """
    try:
        (message,) = result_of(script(body, path))
    finally:
        folder.chmod(0o755)
    assert str(path) in message and "expected" in message and "pass journal= with" in message
    assert ("is read-only" if what != "folder to make" else "cannot be made: Permission denied") in message
    assert content == (path.read_bytes() if path.exists() else None)


def test_a_full_disk_is_explained_and_what_was_buffered_can_be_written_later(opened, path):
    """SQLite's own limit on pages gives the error of a full disk."""
    journal = opened()
    journal.claim("a")
    journal.append("a", [span("kept")])
    journal.flush()
    with journal._file.use() as db:
        db.execute(f"PRAGMA max_page_count = {db.execute('PRAGMA page_count').fetchone()[0]}")
    journal.append("a", [span("x" * 100_000)])
    journal.claim("b")
    journal.finish("b", {**COLUMNS, "thinking": "x" * 100_000})
    for _ in range(2):
        with pytest.raises(JournalError, match="disk is full.*is expected.*run again"):
            journal.flush()
        assert opened().plan(["a", "b"]) == Counts(to_continue=1, to_do=1)
    with journal._file.use() as db:
        db.execute("PRAGMA max_page_count = 100000")
    journal.flush()
    assert journal.claim("b").status == "finished"
    journal.release("a")
    assert journal.claim("a").spans == [span("kept" + "x" * 100_000)]


def test_a_really_full_disk_is_explained_and_what_was_committed_is_kept(tmp_path):
    """For real: a tiny file system of the process's own. Needs the right to mount one."""
    private = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o size=2m none "$0" && exec "$@"', str(tmp_path)]
    if not shutil.which("unshare") or subprocess.run([*private, "true"], capture_output=True).returncode:
        pytest.skip("no right to mount a file system")
    body = """
        from tessy_hf.errors import JournalError
        from tessy_hf.run.journal import Journal
        journal = Journal("journal.sqlite", "run")
        try:
            for n in range(1_000):
                journal.claim(f"r{n}")
                journal.finish(f"r{n}", {"finish_reason": "stop", "answer": "x" * 10_000})
                journal.flush()
                finished = n
        except JournalError as error:
            print(error)
        print(finished > 10, [key for key, _ in Journal("journal.sqlite", "run").finished()] == [
            f"r{n}" for n in range(finished + 1)])
        try:
            Journal("another.sqlite", "run").claim("a")
        except JournalError as error:
            print(error)
    """
    run = ["sh", "-c", 'cd "$0" && exec "$@"', str(tmp_path), sys.executable, "-c", textwrap.dedent(body)]
    done = subprocess.run([*private, *run], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    first, kept, second = done.stdout.splitlines()
    assert "disk is full" in first or "disk reports an error" in first
    assert kept == "True True"
    assert "another.sqlite" in second and "expected" in second


def test_a_file_locked_by_another_program_is_explained(opened, path, monkeypatch):
    monkeypatch.setattr(journal_file, "BUSY_SECONDS", 0.01)
    journal = opened()
    journal.claim("a")
    journal.append("a", [span("x")])
    with closing(sqlite3.connect(path, isolation_level=None)) as browser:
        browser.execute("BEGIN IMMEDIATE")
        with pytest.raises(JournalError, match="locked by another process.*are expected.*end the process"):
            journal.flush()
    journal.flush()
    journal.release("a")
    assert journal.claim("a").spans == [span("x")]


def test_a_process_may_close_its_journal_while_another_of_its_journals_writes(opened, path):
    one, two = opened("one"), opened("two")
    one.claim("a")
    two.claim("a")
    two.close()
    assert result_of(script('say(Journal(sys.argv[1], "one").claim("a").status)', path)) == ["busy"]
    one.append("a", [span("x")])
    one.close()
    assert opened("one").claim("a").spans == [span("x")]


def test_a_run_can_be_described_and_old_files_hold_no_description(tmp_path):
    journal = Journal(tmp_path / "rows.journal", "run")
    journal.claim("a")
    assert journal.description() is None
    journal.describe("first")
    journal.describe("then")
    journal.close()
    assert Journal(tmp_path / "rows.journal", "run").description() == "then"
    assert Journal(tmp_path / "rows.journal", "other").description() is None
