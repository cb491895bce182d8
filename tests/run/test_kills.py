"""Killed at random moments and begun again: every row once, nothing finished written again, one chunk a row lost.

Every call of an engine is counted, in all processes, see `tests.crashes`.
"""

import json
import os
import random
import signal
import time
from collections import defaultdict

import pytest

from tests import crashes
from tests.crashes import Work
from tests.rules import own_rule, rule_name

pytestmark = pytest.mark.slow

CHUNK = {"scripts": 8, "models": 8}
"""Tokens; streams, which have no chunks, are held to the same."""


def tokens(made):
    return sum(call.tokens for call in made if call.what == "answered")


def rows_in(made):
    return {call.row for call in made}


def die_and_rerun(work, expected, kills, seed):
    """Kill a run again and again, check after each death what is kept, then let it run to the end."""
    draw, total = random.Random(seed), os.path.getsize(work.folder.with_name("unbroken") / "calls")
    most = work.transform.settings.rows_in_flight * CHUNK[work.world]
    before, done, texts = {}, set(), defaultdict(str)
    for number in range(kills):
        start, process = crashes.size(work), crashes.begin(work)
        code = crashes.kill_when(process, work, draw.randrange(1, int(1.2 * total / kills)), draw.uniform(0, 0.05))
        assert code == -signal.SIGKILL, f"the run ended before death {number}"
        made = crashes.calls(work, start)
        assert not rows_in(made) & done, "a finished row was written again"
        now_done, after = crashes.kept(work)
        assert done <= now_done, "a finished row is gone"
        for row, (text, _) in before.items():
            assert row in now_done or after[row][0].startswith(text), f"{row}: kept text is gone"
            texts[row] = max(texts[row], text, key=len)
        lost = crashes.lost(made, now_done, before, after)
        assert sum(lost.values()) <= most, f"death {number} cost more than a chunk per row in flight: {lost}"
        done, before = now_done, after
    start = crashes.size(work)
    rows = crashes.end(crashes.begin(work), work)
    assert rows == expected  # every row once, in order, with the texts of an unbroken run
    assert not rows_in(crashes.calls(work, start)) & done
    for row, messages, _, _ in rows:
        assert texts[row].strip() in json.dumps(messages[-1], ensure_ascii=False).replace("\\n", "\n")
    assert any(texts.values()) and done, "the deaths came too early to show anything"
    return most


@pytest.mark.parametrize(
    ("world", "count", "settings", "kills"),
    [
        ("scripts", 200, {"chunk_tokens": 8}, 20),
        ("scripts", 200, {"stream": True}, 20),
        ("models", 60, {"chunk_tokens": 8}, 10),
        ("models", 60, {"stream": True}, 6),
    ],
    ids=["scripts-chunks", "scripts-streams", "models-chunks", "models-streams"],
)
def test_runs_that_are_killed_end_as_unbroken_ones(tmp_path, world, count, settings, kills):
    work = Work(world, tmp_path / "killed", tuple(range(count)), settings)
    expected, undisturbed = crashes.unbroken(work, tmp_path / "unbroken")
    assert len({row for row, *_ in expected}) == count
    most = die_and_rerun(work, expected, kills, seed=5)
    # What was lost, once more, and the rest of a chunk that began elsewhere.
    assert tokens(crashes.calls(work)) <= tokens(undisturbed) + 2 * kills * most


RULES = [
    {"every": 4},
    {"student-accepts": 0.3},
    {"name": "entropy", "threshold": 0.5, "words": 3},
    {"name": "entropy", "threshold": 0.5, "words": 3, "measure": "surprise"},
    {"name": "likeliest", "words": 6, "candidates": 2},
    own_rule,
]


@pytest.mark.parametrize("rule", RULES, ids=rule_name)
def test_runs_of_each_rule_that_are_killed_end_as_unbroken_ones(tmp_path, rule):
    settings = {"chunk_tokens": 8, "switch": rule, "temperature": 0.6 if "candidates" in str(rule) else 0}
    work = Work("models", tmp_path / "killed", tuple(range(10)), settings)
    expected, _ = crashes.unbroken(work, tmp_path / "unbroken")
    total = os.path.getsize(tmp_path / "unbroken" / "calls")
    for _ in range(3):
        process = crashes.begin(work)
        assert crashes.kill_when(process, work, int(total / 5), 0.01) == -signal.SIGKILL
    done, under_way = crashes.kept(work)
    assert done or under_way
    assert crashes.end(crashes.begin(work), work) == expected


# --- other deaths


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_run_that_is_told_to_end_goes_on_later(tmp_path, number):
    work = Work("scripts", tmp_path / "killed", tuple(range(150)), {"chunk_tokens": 8, "rows_in_flight": 16})
    expected, _ = crashes.unbroken(work, tmp_path / "unbroken")
    code = crashes.kill_when(crashes.begin(work), work, 10_000, 0.0, number)
    assert code == (-number if number == signal.SIGTERM else 1)
    done, under_way = crashes.kept(work)
    assert done and any(text for text, _ in under_way.values())
    start = crashes.size(work)
    assert crashes.end(crashes.begin(work), work) == expected
    assert not rows_in(crashes.calls(work, start)) & done


def test_a_worker_that_is_killed_ends_the_run_and_costs_no_row(tmp_path):
    options = {"num_proc": 2, "batch_size": 5}
    work = Work("scripts", tmp_path / "killed", tuple(range(60)), {"chunk_tokens": 8, "rows_in_flight": 8}, options)
    expected, _ = crashes.unbroken(work._replace(options={}), tmp_path / "unbroken")
    process = crashes.begin(work)
    workers = wait_for_workers(process, work, 2)
    os.kill(min(workers), signal.SIGKILL)
    process.join(60)
    assert process.exitcode == 1 and "abruptly died" in (work.folder / "stderr").read_text()
    done, _ = crashes.kept(work)
    start = crashes.size(work)
    assert crashes.end(crashes.begin(work), work) == expected
    made = crashes.calls(work, start)
    assert done and not rows_in(made) & done and len({call.process for call in made}) == 2


def wait_for_workers(process, work, count):
    """Wait until so many processes have done some work."""
    while process.is_alive():
        made = crashes.calls(work)
        if len(made) > 200 and len({call.process for call in made}) == count:
            return {call.process for call in made}
        time.sleep(0.01)
    raise AssertionError((work.folder / "stderr").read_text()[-3000:])


# --- another shape, and company


def test_only_what_is_new_is_written_whatever_the_shape_of_the_rerun(tmp_path):
    """Another batch size, workers, another order, rows more and rows less: at once."""
    first = Work("scripts", tmp_path / "shapes", tuple(range(40)), {"chunk_tokens": 8}, {"batch_size": 16})
    rows = {row[0]: row for row in crashes.end(crashes.begin(first), first)}
    start, numbers = crashes.size(first), list(range(10, 60))
    random.Random(3).shuffle(numbers)
    second = first._replace(numbers=tuple(numbers), options={"batch_size": 7, "num_proc": 2})
    again = crashes.end(crashes.begin(second), second)
    assert [row[0] for row in again] == [f"r{i}" for i in numbers]
    assert all(row == rows[row[0]] for row in again if row[0] in rows)
    made = crashes.calls(first, start)
    assert rows_in(made) == {f"r{i}" for i in range(40, 60)} and len({call.process for call in made}) == 2


def times_by_row(made):
    """Return when each process was at work on each row: from its first call to its last."""
    times = defaultdict(dict)
    for call in made:
        begin, _ = times[call.row].get(call.process, (call.at, call.at))
        times[call.row][call.process] = begin, call.at
    return times


def test_two_processes_with_overlapping_rows_share_the_work(tmp_path):
    settings = {"chunk_tokens": 8, "rows_in_flight": 16}
    one = Work("scripts", tmp_path / "shared", tuple(range(80)), settings)
    two = one._replace(numbers=tuple(range(119, 39, -1)))
    expected, undisturbed = crashes.unbroken(one._replace(numbers=tuple(range(120))), tmp_path / "unbroken")
    running = crashes.begin(one, "one.json"), crashes.begin(two, "two.json")
    assert crashes.end(running[0], one, "one.json") == expected[:80]
    assert crashes.end(running[1], two, "two.json") == expected[:39:-1]
    made = crashes.calls(one)
    assert len({call.process for call in made}) == 2
    assert all(len(by) == 1 for by in times_by_row(made).values()), "a row was written twice"
    assert len(made) == len(undisturbed)
    assert "locked" not in (one.folder / "stderr").read_text()


def test_rows_of_a_process_that_is_killed_are_taken_over_by_one_that_waits_for_them(tmp_path):
    settings = {"chunk_tokens": 8, "rows_in_flight": 16}
    work = Work("scripts", tmp_path / "shared", tuple(range(40)), settings)
    expected, _ = crashes.unbroken(work, tmp_path / "unbroken")
    first = crashes.begin(work, "first.json")
    while crashes.size(work) < 3_000:
        time.sleep(0.002)
    second = crashes.begin(work, "second.json")
    assert crashes.kill_when(first, work, 5_000, 0.0) == -signal.SIGKILL
    assert crashes.end(second, work, "second.json") == expected
    for row, by in times_by_row(crashes.calls(work)).items():
        spans = sorted(by.values())
        assert all(a[1] <= b[0] for a, b in zip(spans, spans[1:], strict=False)), f"{row} was written twice at a time"
    assert any(len(by) == 2 for by in times_by_row(crashes.calls(work)).values()), "nothing was taken over"
