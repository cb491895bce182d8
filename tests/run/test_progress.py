"""The summary of a run and its status line."""

from types import SimpleNamespace

import datasets
import pytest
from datasets.utils import tqdm

from tessy_hf.run.metering import Load
from tessy_hf.run.progress import Progress
from tessy_hf.run.window import Window
from tests.test_transform import prompts, rows_of, scripted


def test_rows_that_were_there_before_count_as_rows_but_not_into_rates(tmp_path):
    journal = str(tmp_path / "rows.journal")
    rows_of(prompts(3), scripted(journal=journal))
    with scripted(journal=journal) as transform:
        given = prompts(5)
        given.map(transform, batched=True, features=transform.features(given), load_from_cache_file=False)
        told = transform.summary()
    assert (told.finished, told.found, told.failed) == (5, 3, 0)
    assert told.tokens["student"] > told.written_tokens["student"] > 0 == told.written_tokens["teacher"]


# --- the status line


def finished(teacher=3, student=1):
    return {"finish_reason": "stop", "error": None, "teacher_tokens": teacher, "student_tokens": student}


def meter_of(**waited):
    return SimpleNamespace(loads=lambda: {name: Load(1.0, seconds, 1) for name, seconds in waited.items()})


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands until it is told to go on."""
    now = SimpleNamespace(monotonic=lambda: now.seconds, seconds=100.0)
    monkeypatch.setattr("tessy_hf.run.progress.time", now)
    return now


def test_the_line_begins_with_the_bottleneck_and_leaves_out_what_matters_less(clock):
    progress = Progress(meter_of(teacher=9.0, student=1.0, predictors=2.0), Window(64, 1000))
    progress.expect(80_000, 20_000)
    with progress.row():
        for origin, count in (("found", 20_000), ("written", 1_000)):
            for _ in range(count):
                progress.done(finished(), origin)
        progress.done({**finished(0, 0), "finish_reason": "error", "error": "no"}, "written")
        clock.seconds += 500
        line = progress.line(200)
    eta = "ETA 8h11m"  # 58,999 rows at 1,001 in 500 s: the rows that were there took no time
    assert line == f"teacher-bound  21,001/80,000 26%  {eta}  8 tok/s  teacher 75%  1 failed  1 in flight"
    assert progress.line(79) == line.removesuffix("  1 in flight")
    assert progress.line(62) == f"teacher-bound  21,001/80,000 26%  {eta}  8 tok/s  1 failed"
    assert progress.line(53) == f"teacher-bound  21,001/80,000 26%  {eta}  1 failed"
    assert progress.line(45) == "teacher-bound  21,001/80,000 26%  1 failed"
    progress.expect(1_001)  # the next dataset
    assert progress.line().startswith("teacher-bound  0/1,001 0%  ETA 8m20s")


@pytest.mark.parametrize("drawn", [True, False])
def test_the_line_is_drawn_on_a_terminal_and_logged_once_a_minute_elsewhere(clock, monkeypatch, capsys, drawn):
    monkeypatch.setattr("tessy_hf.run.progress._is_drawn", lambda: drawn)
    monkeypatch.setenv("COLUMNS", "200")
    datasets.enable_progress_bars()
    try:
        progress = Progress(meter_of(predictors=1.0), Window(64, 1000))
        progress.expect(3, 0)
        for _ in range(3):
            with progress.row():
                clock.seconds += 25
                progress.done(finished(), "written")
        closed = capsys.readouterr().err  # with its last row
        progress.close()
    finally:
        datasets.disable_progress_bars()
    lines = [line for line in closed.replace("\r", "\n").split("\n") if line.strip()]
    if drawn:
        assert closed.endswith("\n") and lines[-1].startswith("predictor-bound  3/3 100%")
        assert all(len(line) < 80 for line in lines)
    else:
        assert [line.split("  ")[:2] for line in lines] == [["TESSY: predictor-bound", "3/3 100%"]]
    assert capsys.readouterr().err == ""


def test_the_line_takes_the_place_of_the_bar_of_a_map_and_of_no_other(monkeypatch, capsys):
    monkeypatch.setattr("tessy_hf.run.progress._is_drawn", lambda: True)
    datasets.enable_progress_bars()
    try:
        with tqdm(total=2, desc="mine") as mine, scripted() as transform:
            transform.map(prompts(2))
            mine.update()
            mine.refresh()
        shown = capsys.readouterr().err
        assert datasets.is_progress_bar_enabled()
    finally:
        datasets.disable_progress_bars()
    assert "Map: 100%" not in shown and "2/2 100%" in shown and "mine:  50%" in shown
