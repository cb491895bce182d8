"""What hangs is named, and ended when its time is over."""

import asyncio
from types import SimpleNamespace

import pytest
from datasets import Dataset

from tessy_hf.boundary.predictor import BoundaryPredictor
from tessy_hf.engines.base import Completion, Request
from tessy_hf.engines.scripted import Script, ScriptedEngine
from tessy_hf.errors import RequestError
from tessy_hf.method.speaker import Speaker
from tessy_hf.run import runner as run
from tessy_hf.run.metering import CACHE_GRAIN, Meter, MeteredEngine, MeteredPredictor
from tessy_hf.run.progress import Progress
from tessy_hf.run.window import Window
from tessy_hf.transform import TessyTransform
from tests import clock
from tests.rules import both, by_first_letter


def request(row="r7", ids=range(5)):
    return Request(row, 1, "thinking", ids, 20, 0.0, 1.0, 0, frozenset())


class Slow:
    """An engine whose requests take as many seconds as their row's name says, and a predictor that takes five."""

    model = "m"

    def __init__(self, computed=()):
        self.computed, self.closed, self.released = iter(computed), 0, []

    async def complete(self, request):
        await asyncio.sleep(float(request.row))
        return Completion([1], None, uncached_prompt_tokens=next(self.computed, None))

    async def stream(self, request):
        try:
            for _ in range(3):
                yield await self.complete(request)
        finally:
            self.closed += 1

    def release(self, row):
        self.released.append(row)

    async def labels(self, window, since=0):
        await asyncio.sleep(5)
        return [True] * (len(window) - since)


def metered(meter, author="teacher", computed=()):
    return MeteredEngine(Slow(computed), author, meter)


def test_a_request_that_takes_too_long_fails_its_row_which_may_be_tried_again():
    with pytest.raises(
        RequestError, match=r"Row '3' got nothing from the teacher 'm' within 2 s.*request_timeout"
    ) as e:
        clock.run(metered(Meter(2)).complete(request("3")))
    assert e.value.retryable
    with pytest.raises(RequestError, match="A row got nothing from the student boundary predictor within 2 s"):
        clock.run(MeteredPredictor(Slow(), "student", Meter(2)).labels([1, 2]))


def test_each_piece_of_a_stream_has_its_own_deadline_and_a_late_one_ends_it():
    async def pieces(deadline):
        engine = metered(Meter(deadline))
        try:
            return [piece.token_ids async for piece in engine.stream(request("2"))]
        finally:
            assert engine.closed == 1

    assert clock.run(pieces(3)) == [[1], [1], [1]]
    with pytest.raises(RequestError, match="Row '2' got nothing"):
        clock.run(pieces(1))


def test_each_request_has_its_own_deadline():
    async def session():
        meter = Meter(2)
        engine = metered(meter)
        answers = [engine.complete(request(row)) for row in ("1", "5", "1.5", "7")]
        return await asyncio.gather(*answers, return_exceptions=True), meter.stalled(0)

    answers, left = clock.run(session())
    assert [str(answer).split(" got")[0] for answer in answers[1::2]] == ["Row '5'", "Row '7'"]
    assert answers[0] == answers[2] == Completion([1], None) and left is None


def test_a_row_that_is_cancelled_is_not_taken_for_late():
    async def session():
        task = asyncio.create_task(metered(Meter(2)).complete(request("10")))
        await asyncio.sleep(0)
        task.cancel()
        await task

    with pytest.raises(asyncio.CancelledError):
        clock.run(session())


def test_a_timeout_of_somebody_elses_is_left_alone():
    async def fails():
        raise TimeoutError("of a socket")

    with pytest.raises(TimeoutError, match="of a socket"):
        clock.run(Meter(10).wait(fails(), "the teacher 'm'", of="teacher"))


def test_all_else_is_the_engine_s_own():
    engine = metered(Meter())
    engine.release("r7")
    assert engine.model == "m" and engine.released == ["r7"]
    with pytest.raises(AttributeError):
        _ = engine.nothing


def test_it_is_known_how_long_rows_waited_for_what():
    async def session():
        meter = Meter()
        teacher, student = metered(meter), metered(meter, "student")
        await asyncio.gather(teacher.complete(request("5")), teacher.complete(request("5")))
        await asyncio.sleep(60)
        await teacher.complete(request("2"))
        await student.complete(request("0"))
        await MeteredPredictor(Slow(), "student", meter).labels([1])
        return meter.loads()

    loads = clock.run(session())
    assert loads["teacher"] == pytest.approx((5 + 2, 2 * 5 + 2, 3))
    assert loads["student"] == (0, 0, 1) and loads["predictors"] == pytest.approx((5, 5, 1))


def test_tokens_that_an_engine_had_before_and_computes_again_are_counted():
    """Of what is new to it, and of a block that was not full, it is no wonder."""

    async def recomputed(*requests):
        meter = Meter()
        engine = metered(meter, computed=[computed for _, computed in requests])
        for length, _ in requests:
            await engine.complete(request("0", range(length)))
        return meter.recomputed_tokens

    assert clock.run(recomputed((1000, 1000), (1020, 20 + CACHE_GRAIN), (1040, 20))) == 0
    assert clock.run(recomputed((1000, 1000), (1020, 1020), (1040, None))) == 1020 - 20 - CACHE_GRAIN


def test_the_progress_line_names_what_slows_the_run_down(monkeypatch):
    async def session():
        monkeypatch.setattr("tessy_hf.run.progress.time", SimpleNamespace(monotonic=asyncio.get_running_loop().time))
        meter = Meter()
        progress = Progress(meter, Window(64, 1000))
        with progress.row():
            assert "bound" not in progress.line()
            await metered(meter, "student").complete(request("1"))
            await metered(meter).complete(request("9"))
            return progress.line()

    assert clock.run(session()).startswith("teacher-bound  0 rows  0 tok/s  ")


def test_nothing_is_stalled_while_something_comes():
    async def session():
        meter = Meter()
        teacher, student = metered(meter), metered(meter, "student")
        waiting = [asyncio.create_task(engine.complete(request("9"))) for engine in (teacher, student, teacher)]
        await asyncio.sleep(3)
        stalled = meter.stalled(2), meter.stalled(5)
        await asyncio.gather(*waiting)
        return *stalled, meter.stalled(0)

    named = "the teacher 'm' (2 rows), the student 'm' (1 row); the longest, row '9', since 3 s"
    assert clock.run(session()) == (named, None, None)


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
    told = ""
    with transform(1e6) as slow:
        written = slow.submit(PROMPTS[:])
        while "Waiting for the teacher 'slow' (2 rows); the longest, row " not in told:
            assert not written.done()
            told += capfd.readouterr().err


@pytest.mark.slow
def test_a_row_whose_engine_hangs_fails_in_time_and_the_others_do_not():
    hangs = transform(lambda request: 60 if request.row == "b" else 0, request_timeout=1.0, max_attempts=1)
    with hangs:
        rows = list(PROMPTS.map(hangs, batched=True, load_from_cache_file=False))
    assert [row["finish_reason"] for row in rows] == ["stop", "error"]
    assert "Row 'b' got nothing from the teacher 'slow' within 1 s" in rows[1]["error"]


@pytest.mark.parametrize(("other", "shared"), [({}, True), ({"window": 64}, False), ({"device": "cpu"}, False)])
def test_the_same_predictor_is_loaded_once_for_both_authors(other, shared):
    given = Speaker(Slow(), BoundaryPredictor()), Speaker(Slow(), BoundaryPredictor(**other))
    teacher, student = Meter().speakers(*given)
    assert (student.boundary.files is teacher.boundary.files) == shared
    assert given[1].boundary.files is not given[0].boundary.files, "the speakers that were given stay as they are"
