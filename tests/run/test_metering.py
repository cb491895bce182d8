"""What hangs is named, and ended when its time is over."""

import asyncio
from types import SimpleNamespace

import pytest
from datasets import Dataset

from tessy_hf.engines.scripted import Script, ScriptedEngine
from tessy_hf.errors import RequestError
from tessy_hf.method.speaker import Speaker
from tessy_hf.run import runner as run
from tessy_hf.run.metering import Waits
from tessy_hf.run.progress import Progress
from tessy_hf.run.window import Window
from tessy_hf.transform import TessyTransform
from tests import clock
from tests.rules import both, by_first_letter


def test_what_takes_too_long_fails_its_row_which_may_be_tried_again():
    async def too_long():
        async with Waits(0.01).on("r7", "the teacher 'm'"):
            await asyncio.sleep(10)

    with pytest.raises(
        RequestError, match=r"Row 'r7' got nothing from the teacher 'm' within 0.01 s.*request_timeout"
    ) as e:
        clock.run(too_long())
    assert e.value.retryable


def test_each_wait_has_its_own_time_though_one_alarm_rings_for_all():
    async def waiting(waits, row, begin, seconds):
        await asyncio.sleep(begin)
        async with waits.on(row, "the teacher 'm'"):
            await asyncio.sleep(seconds)
        return row

    async def session():
        waits = Waits(0.2)
        short = [waiting(waits, f"short {n}", 0.05 * n, 0.05) for n in range(8)]  # over before and after the alarm
        long = [waiting(waits, f"long {n}", 0.05 * n, 10) for n in range(4)]
        done = await asyncio.wait_for(asyncio.gather(*short, *long, return_exceptions=True), 5)
        return done, waits.stalled(0)

    done, left = clock.run(session())
    assert done[:8] == [f"short {n}" for n in range(8)]
    assert [str(error).split(" got")[0] for error in done[8:]] == [f"Row 'long {n}'" for n in range(4)]
    assert left is None


def test_a_row_that_is_cancelled_is_not_taken_for_late():
    async def session():
        async def waiting():
            async with Waits(0.01).on("a", "the teacher 'm'"):
                await asyncio.sleep(10)

        task = asyncio.create_task(waiting())
        await asyncio.sleep(0)
        task.cancel()
        await task

    with pytest.raises(asyncio.CancelledError):
        clock.run(session())


def test_a_timeout_of_somebody_elses_is_left_alone():
    async def fails():
        async with Waits(10).on("r7", "the teacher 'm'"):
            raise TimeoutError("of a socket")

    with pytest.raises(TimeoutError, match="of a socket"):
        clock.run(fails())


def test_it_is_known_how_long_rows_waited_for_what():
    async def session():
        waits = Waits()
        async with waits.on("a", "the teacher 'm'", of="teacher"), waits.on("b", "the teacher 'm'", of="teacher"):
            await asyncio.sleep(5)
        await asyncio.sleep(60)
        async with waits.on("a", "the teacher 'm'", of="teacher"):
            await asyncio.sleep(2)
        async with waits.on("a", "the student 's'", of="student"):
            pass
        return waits.loads()

    loads = clock.run(session())
    assert loads["teacher"] == pytest.approx((5 + 2, 2 * 5 + 2, 3))
    assert loads["student"] == (0, 0, 1)


def test_the_progress_line_names_what_slows_the_run_down(monkeypatch):
    async def session():
        monkeypatch.setattr("tessy_hf.run.progress.time", SimpleNamespace(monotonic=asyncio.get_running_loop().time))
        waits = Waits()
        progress = Progress(waits, Window(64, 1000))
        with progress.row():
            assert "bound" not in progress.line()
            async with waits.on("a", "the student 's'", of="student"):
                await asyncio.sleep(0.01)
            async with waits.on("a", "the teacher 'm'", of="teacher"):
                await asyncio.sleep(0.09)
            return progress.line()

    line = clock.run(session())
    assert line.endswith("teacher 90% busy, student 10% busy: teacher-bound"), line


def test_nothing_is_stalled_while_something_comes():
    async def session():
        waits = Waits()
        assert waits.stalled(0) is None
        async with (
            waits.on("a", "the teacher 'm'"),
            waits.on("b", "the student 'n'"),
            waits.on("c", "the teacher 'm'"),
        ):
            named = waits.stalled(0)
            assert waits.stalled(5) is None
        assert waits.stalled(0) is None
        return named

    named = asyncio.run(session())
    assert named == "the teacher 'm' (2 rows), the student 'n' (1 row); the longest, row 'a', since 0 s"


def transform(latency, **settings):
    teacher, student = both(by_first_letter)
    return TessyTransform(
        teacher=Speaker(ScriptedEngine(lambda row: Script(["Tea so"]), latency=latency, name="slow"), teacher),
        student=Speaker(ScriptedEngine(lambda row: Script(["all Then"], "3")), student),
        id_column="id",
        journal=None,
        **settings,
    )


PROMPTS = Dataset.from_dict({"id": ["a", "b"], "prompt": ["How many?", "How far?"]})


def test_a_run_names_what_it_waits_for(monkeypatch, capfd):
    monkeypatch.setattr(run, "STALL_SECONDS", 0.1)
    with transform(0.5) as slow:
        rows = list(PROMPTS.map(slow, batched=True, load_from_cache_file=False))
    assert [row["finish_reason"] for row in rows] == ["stop", "stop"]
    told = [line for line in capfd.readouterr().err.splitlines() if "Waiting for" in line]
    assert any("Waiting for the teacher 'slow' (2 rows); the longest, row " in line for line in told)


def test_a_row_whose_engine_hangs_fails_in_time_and_the_others_do_not():
    hangs = transform(lambda request: 60 if request.row == "b" else 0, request_timeout=0.2, max_attempts=2)
    with hangs:
        rows = list(PROMPTS.map(hangs, batched=True, load_from_cache_file=False))
    assert [row["finish_reason"] for row in rows] == ["stop", "error"]
    assert "Row 'b' got nothing from the teacher 'slow' within 0.2 s" in rows[1]["error"]
