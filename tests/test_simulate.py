"""Runs on other numbers of replicas and rows in flight, told from a pilot: against theory, and against real runs."""

import asyncio
import json
import zlib
from collections import Counter

import numpy as np
import pytest
from datasets import Dataset
from typer.testing import CliRunner

from tessy_hf import Script, ScriptedEngine, Speaker, TessyTransform, demo
from tessy_hf.cli import _show_plans, app
from tessy_hf.errors import SettingsError
from tessy_hf.recording import Recorder
from tessy_hf.service import Service, at_once, fit
from tessy_hf.simulate import Measured, Step, Trace, pilot, simulate, survey
from tests.crashes import CheapPredictor
from tests.rules import by_first_letter
from tests.worlds import make_tokenizer

# --- the speed of a replica, from requests whose speed is known


def served(seconds, size=lambda random: 1.0, most=40, waves=6, seed=0):
    """Let a number of rows that rises and falls be served together, a unit of work in ``seconds(rows)``.

    Returns begin, end and size of each request.
    """
    random, step, now = np.random.default_rng(seed), 0.001, 0.0
    left, begun, sizes, visits = [], [], [], []
    while now < waves * 4:
        for _ in range(max(0, int(most * (0.5 - 0.5 * np.cos(np.pi * now / 2))) - len(left))):
            sizes.append(size(random))
            left.append(sizes[-1] * random.uniform(0.9, 1.1))
            begun.append(now)
        now += step
        left = [work - step / seconds(len(left)) for work in left]
        for at in [at for at, work in enumerate(left) if work <= 0][::-1]:
            left.pop(at)
            visits.append((begun.pop(at), now, sizes.pop(at)))
    return np.array(visits).T


@pytest.mark.parametrize(
    "seconds",
    [lambda n: 0.05, lambda n: 0.02 + 0.004 * n, lambda n: 0.05 * np.maximum(1, n / 16)],
    ids=["flat", "rising", "full at 16"],
)
def test_the_speed_of_a_replica_is_found(seconds):
    begin, end, _ = served(seconds)
    found = fit(begin, end, np.ones(len(begin)), np.zeros(len(begin)))
    for rows in (5, 10, 20, 35):
        assert float(found.seconds(rows)) == pytest.approx(seconds(rows), rel=0.15)


@pytest.mark.parametrize("seed", range(4))
def test_work_that_nothing_tells_of_scales_the_speed_but_does_not_bend_it(seed):
    for seconds in (lambda n: 0.02 + 0.004 * n, lambda n: 0.05 * np.maximum(1, n / 16)):
        begin, end, _ = served(seconds, size=lambda random: random.lognormal(0, 0.6), seed=seed)
        found = fit(begin, end, np.ones(len(begin)), np.zeros(len(begin)))
        errors = [float(found.seconds(rows)) / seconds(rows) for rows in (3, 5, 10, 20, 35)]
        assert max(errors) - min(errors) < 0.08, errors


def test_what_a_request_costs_by_its_size_is_found():
    begin, end, size = served(lambda n: 0.001 + 0.0002 * n, size=lambda random: random.integers(4, 40))
    found = fit(begin, end, size, np.zeros(len(begin)))
    assert float(found.work(40, 0) / found.work(10, 0)) == pytest.approx(4, rel=0.05)
    assert float(np.mean(found.work(size, 0))) == pytest.approx(1, rel=0.01)


def test_rows_at_once_are_counted_when_a_request_begins_and_while_it_lasts():
    assert list(at_once(np.array([0.0, 0.0, 1.0]), np.array([2.0, 1.0, 2.0]))) == [2.0, 2.0, 2.0]
    assert list(at_once(np.array([0.0, 0.5]), np.array([1.0, 1.0]))) == [1.25, 2.0]


def test_the_beginning_tells_of_as_many_rows_at_once_as_never_came_again():
    """A replica with 8 places: 16 requests at its beginning, 6 at a time from then on."""
    begin = np.concatenate([np.zeros(16), np.repeat(0.12 + 0.06 * np.arange(60), 6)])
    end = begin + np.where(np.arange(len(begin)) < 8, 0.06, np.where(np.arange(len(begin)) < 16, 0.12, 0.06))
    found = fit(begin, end, np.ones(len(begin)), np.zeros(len(begin)), since=0.12)
    assert found.seconds([1, 6, 8]) == pytest.approx(0.06, rel=0.05) and float(found.seconds(16)) > 0.085
    begin = np.concatenate([np.zeros(16), np.repeat(1 + 0.06 * np.arange(60), 16)])  # as many later: it is not fitted
    end = begin + np.where(begin > 0, 0.06, 1.0)
    found = fit(begin, end, np.ones(len(begin)), np.zeros(len(begin)), since=1.0)
    assert float(found.seconds(16)) == pytest.approx(0.06, rel=0.01)


def test_a_host_has_one_second_for_each_second():
    service = Service((1, 0, 0), base=0.001, bends=(), most=4, floor=0.01)
    assert service.seconds([1, 2, 100]) == pytest.approx([0.01, 0.02, 1.0])


# --- the simulation, against theory


def steady(base, slope=0.0, floor=0.0):
    return Service((1, 0, 0), base, ((0.0, slope),), most=1e9, floor=floor)


def measured(steps, services, rows=8, tokens=10):
    """A pilot of equal rows."""
    trace = Trace(tuple(Step(author, work, host) for author, work, host in steps), tokens)
    return Measured((trace,), services, {"teacher": 1, "student": 1}, rows, 8, 1.0, 0.0)


def run(found, **changes):
    given = {"teachers": 1, "students": 1, "rows_in_flight": 8, "prompts": 400, **changes}
    return simulate(found, **given)


def test_rows_that_never_wait_take_the_sum_of_their_requests():
    services = {"teacher": steady(0.5), "student": steady(0.2), "host": steady(0.1)}
    found = run(measured([("student", 1, 1), ("teacher", 2, 1), ("student", 1, 0)], services))
    assert [found.row_seconds_p50, found.row_seconds_p99] == pytest.approx([1.6, 1.6])
    assert found.hours == pytest.approx(1.6 * 50 / 3600) and found.tail_seconds == pytest.approx(1.6)
    assert found.tokens_per_second == pytest.approx(10 * 8 / 1.6)
    assert found.rows_at_once == pytest.approx({"teacher": 5, "student": 2, "host": 1})


def test_a_replica_that_takes_one_at_a_time_is_the_bound():
    """Speeds in proportion to the rows at once: 2 units of 0.05 s each for a row, so 10 rows a second."""
    services = {"teacher": steady(0, 0.05), "student": steady(0.001), "host": steady(0.001)}
    found = run(measured([("student", 1, 1), ("teacher", 2, 1)], services), prompts=2000, rows_in_flight=32)
    assert found.rows_per_hour == pytest.approx(36000, rel=0.02) and found.busy["teacher"] > 0.99
    double = run(
        measured([("student", 1, 1), ("teacher", 2, 1)], services), teachers=2, prompts=2000, rows_in_flight=64
    )
    assert double.rows_per_hour / found.rows_per_hour == pytest.approx(2, rel=0.02)  # rows go where the fewest are
    assert double.rows_at_once["teacher"] == pytest.approx(32, rel=0.1)


def test_a_closed_network_has_the_throughput_of_mean_value_analysis():
    """Two replicas that take one at a time, a delay: exact by Reiser and Lavenberg (1980), if work is exponential."""
    demands, delay, rows = {"teacher": 0.4, "student": 0.25}, 1.0, 6
    queue = dict.fromkeys(demands, 0.0)
    for inside in range(1, rows + 1):
        waits = {name: demand * (1 + queue[name]) for name, demand in demands.items()}
        throughput = inside / (delay + sum(waits.values()))
        queue = {name: throughput * wait for name, wait in waits.items()}
    random = np.random.default_rng(3)
    draw = lambda: float(random.exponential())  # noqa: E731
    traces = tuple(
        Trace((Step("student", 5 * draw(), draw()), Step("teacher", 5 * draw(), 0.0)), 1) for _ in range(2000)
    )
    services = {"teacher": steady(0, 0.08), "student": steady(0, 0.05), "host": steady(delay)}
    found = simulate(
        Measured(traces, services, {"teacher": 1, "student": 1}, 8, 8, 1.0, 0.0),
        teachers=1,
        students=1,
        rows_in_flight=rows,
        prompts=2000,
    )
    assert found.rows_per_hour / 3600 == pytest.approx(throughput, rel=0.05)
    assert found.rows_at_once["teacher"] == pytest.approx(queue["teacher"], rel=0.15)


def test_joined_visits_and_a_sample_of_the_rows_tell_the_same():
    random = np.random.default_rng(1)
    traces = tuple(
        Trace(tuple(Step(("student", "teacher")[n % 2], random.gamma(2), 1.0) for n in range(length)), length)
        for length in random.integers(20, 60, 50)
    )
    services = {"teacher": steady(0.05, 0.004), "student": steady(0.03, 0.001), "host": steady(0.002, 0.0001)}
    found = Measured(traces, services, {"teacher": 1, "student": 1}, 8, 8, 1.0, 0.0)
    plan = {"teachers": 6, "students": 2, "rows_in_flight": 60}
    whole = simulate(found, **plan, prompts=1900, visits=10_000_000)
    joined = simulate(found, **plan, prompts=1900, visits=25_000)
    sample = simulate(found, **plan, prompts=19_000, visits=25_000)
    assert (whole.joined, whole.simulated_rows, sample.simulated_rows) == (1, 1900, 2000) and joined.joined > 5
    assert joined.rows_per_hour == pytest.approx(whole.rows_per_hour, rel=0.03)
    assert sample.rows_per_hour == pytest.approx(whole.rows_per_hour, rel=0.08)
    assert joined.busy == pytest.approx(whole.busy, abs=0.05)


def test_a_thousand_replicas_are_simulated_and_one_process_is_too_few_for_them():
    services = {"teacher": steady(0.2, 0.005), "student": steady(0.1, 0.0005), "host": steady(0.003, 0.0, 0.0005)}
    traces = tuple(
        Trace(tuple(Step(("student", "teacher")[n % 2], 1.0, 1.0) for n in range(length)), length)
        for length in range(200, 601, 10)
    )
    found = Measured(traces, services, {"teacher": 1, "student": 1}, 8, 8, 1.0, 0.0)
    plan = {"teachers": 700, "students": 300, "rows_in_flight": 2000, "prompts": 80_000, "visits": 60_000}
    one, many = (run(found, **plan, hosts=hosts) for hosts in (1, 64))
    assert one.simulated_rows == 6000 and one.busy["host"] > 0.95
    assert one.rows_per_hour == pytest.approx(3600 / (400 * 0.0005), rel=0.1)  # its event loop is the bound
    assert many.rows_per_hour > 5 * one.rows_per_hour and many.busy["host"] < 0.9


def test_the_seed_decides():
    services = {"teacher": steady(0, 0.05), "student": steady(0.01), "host": steady(0.001)}
    found = measured([("student", 1, 1), ("teacher", 2, 1)], services)
    first, again, other = (run(found, teachers=3, seed=seed) for seed in (1, 1, 2))
    assert first == again != other


def test_the_best_plan_is_the_fastest_of_those_with_about_the_fewest_gpu_hours():
    services = {"teacher": steady(0, 0.1), "student": steady(0, 0.02), "host": steady(0.001)}
    draw = np.random.default_rng(2).gamma  # equal rows would go through the stations together
    traces = tuple(Trace((Step("student", draw(1), 1), Step("teacher", draw(1), 0)), 10) for _ in range(1000))
    found = Measured(traces, services, {"teacher": 1, "student": 1}, 8, 8, 1.0, 0.0)
    runs = survey(found, 20_000, teachers=[1, 5, 10], students=[1, 2, 4], rows_in_flight=[400])
    assert [(run.teachers, run.students) for run in runs if run.best] == [(10, 2)]
    assert len(runs) == 9 and not any(run.beyond_pilot for run in runs)
    dear = survey(found, 2000, teachers=[1, 5], students=[1], gpus={"teacher": 1, "student": 30})
    assert [run.rows_in_flight for run in dear] == [8, 40]
    assert [run.teachers for run in dear if run.best] == [5] and dear[1].gpu_hours == pytest.approx(35 * dear[1].hours)


@pytest.mark.parametrize(
    "wrong", [{"teachers": [0]}, {"students": []}, {"rows_in_flight": [-1]}, {"hosts": 0}, {"prompts": 0}]
)
def test_numbers_that_cannot_be_are_refused(wrong):
    found = measured([("student", 1, 0)], {"student": steady(0.1)})
    given = {"prompts": 10, "teachers": [1], "students": [1], **wrong}
    with pytest.raises(SettingsError, match="from 1 on"):
        survey(found, given.pop("prompts"), **given)


def test_what_the_pilot_did_not_see_is_told():
    services = {"student": Service((1, 0, 0), 0.1, ((0.0, 0.01),), most=4)}
    found = measured([("student", 1, 0)], services)
    assert run(found, rows_in_flight=2).beyond_pilot == [] and run(found).beyond_pilot == ["student"]


# --- against runs whose latencies are known


class SleepsPass(asyncio.SelectorEventLoop):
    """A loop in which nobody waits for a sleep: where there is nothing to do, its clock goes on to the next timer.

    So a run takes just the seconds that it sleeps, however slow the machine is.
    """

    def __init__(self):
        super().__init__()
        self._now, self._select = 0.0, self._selector.select
        self._selector.select = self._wait

    def time(self):
        return self._now

    def _wait(self, timeout):
        idle = timeout is not None and timeout > 1  # no row is under way: let the thread that maps work
        ready = self._select(0.002 if idle else timeout and 0)
        if not ready and timeout:
            self._now += timeout
        return ready


@pytest.fixture
def sleeps_pass(monkeypatch):
    monkeypatch.setattr(asyncio, "new_event_loop", SleepsPass)
    monkeypatch.setattr(Recorder, "processor", 0.0)  # it would not pass on this clock


class SlowRule(CheapPredictor):
    async def labels(self, window_ids, since=0):
        await asyncio.sleep(0.01)
        return await super().labels(window_ids, since)


class Cluster(ScriptedEngine):
    """Replicas with so many places each: a request takes its time once it has one. A row is where the fewest are."""

    def __init__(self, *given, replicas=1, places=4, seconds=0.05, **options):
        super().__init__(*given, **options)
        self.replicas, self._places, self._seconds = replicas, places, seconds

    async def start(self):
        await super().start()
        self._free = [asyncio.Semaphore(self._places) for _ in range(self.replicas)]
        self._homes = {}

    def release(self, row):
        self._homes.pop(row, None)
        super().release(row)

    async def complete(self, request):
        held = Counter(self._homes.values())
        home = self._homes.setdefault(request.row, min(range(self.replicas), key=lambda at: held[at]))
        async with self._free[home]:
            await asyncio.sleep(self._seconds)
            return await super().complete(request)


def turns(row, mine, others):
    """Some turns of a few words, the last of each but of the last turn of the other author's kind."""
    count = 1 + zlib.crc32(row.encode()) % 4
    said = [f" {mine}a{n} {mine}e{n} {others}o{n}" for n in range(count)]
    return said


def student_says(row):
    return Script([*turns(row, "a", "z"), " all"], f"it is {row}")


def teacher_says(row):
    return Script([*turns(row, "t", "b"), " to"])


PROMPTS = Dataset.from_dict({"id": [f"row-{n}" for n in range(128)], "prompt": [f"What is {n}?" for n in range(128)]})


def cluster(teachers=1, students=1, rows_in_flight=16):
    tokenizer = make_tokenizer("qwen")
    teacher = Cluster(teacher_says, tokenizer=tokenizer, replicas=teachers, places=4, seconds=0.08, name="t")
    student = Cluster(student_says, tokenizer=tokenizer, replicas=students, places=8, seconds=0.06, name="s")
    rule = SlowRule(by_first_letter, "qwen")
    return TessyTransform(
        teacher=Speaker(teacher, rule),
        student=Speaker(student, rule),
        id_column="id",
        chunk_tokens=32,
        journal=None,
        rows_in_flight=rows_in_flight,
    )


def foretold(notes, **plan):
    given = {"teachers": 1, "students": 1, "rows_in_flight": 16, "prompts": len(PROMPTS), **plan}
    runs = [simulate(notes, **given, seed=seed) for seed in range(3)]
    return {
        "seconds": float(np.mean([3600 * one.hours for one in runs])),
        "teacher": float(np.mean([one.rows_at_once["teacher"] for one in runs])),
        "median": float(np.mean([one.row_seconds_p50 for one in runs])),
    }


PLANS = (
    {"rows_in_flight": 4},
    {"rows_in_flight": 32},
    {"teachers": 2},
    {"teachers": 3, "rows_in_flight": 24},
    {"teachers": 4, "students": 2, "rows_in_flight": 32},
)


def test_a_pilot_foretells_other_replicas_and_windows(sleeps_pass):
    """The pilot has one replica of each and 16 rows in flight, which its teacher is too small for."""
    with cluster() as made:
        found, notes = pilot(made, PROMPTS, rows=len(PROMPTS))
    assert found.pilot_rows == len(notes.traces) == 128 and notes.services["teacher"].most > 8
    assert sum(len(trace.steps) for trace in notes.traces) == found.teacher.requests + found.student.requests
    assert abs(notes.error) < 0.1
    errors = {}
    for plan in PLANS:
        with cluster(**plan) as made:  # nothing but its rows and its clock are looked at
            seen = pilot(made, PROMPTS, rows=len(PROMPTS))[1]
        told = foretold(notes, **plan)
        errors[str(plan)] = round(seen.seconds / told["seconds"] - 1, 3)
    print(errors)
    assert all(abs(error) < 0.2 for error in errors.values()), errors
    assert np.mean(np.abs(list(errors.values()))) < 0.1, errors


def test_one_engine_for_both_is_refused():
    engine = ScriptedEngine(student_says)
    with pytest.raises(SettingsError, match="one engine"):
        pilot(TessyTransform(teacher=Speaker(engine), student=Speaker(engine), method="student-only"), PROMPTS)


def test_the_command_prints_a_table_or_one_object(tmp_path, capsys):
    prompts = tmp_path / "prompts.jsonl"
    demo.prompts(6, seed=1).to_json(prompts)
    given = ["plan", "recipes/miniature/tessy.yaml", str(prompts), "--rows", "2", "--prompts", "500", "--simulate"]
    given += ["--teachers", "2,4", "--students", "1", "--in-flight", "8,16"]
    told = json.loads(CliRunner().invoke(app, [*given, "--json"]).stdout)
    plans = told["simulation"]["plans"]
    assert [(plan["teachers"], plan["rows_in_flight"]) for plan in plans] == [(2, 8), (2, 16), (4, 8), (4, 16)]
    assert sum(plan["best"] for plan in plans) == 1 and all(plan["prompts"] == 500 for plan in plans)
    assert told["pilot_rows"] == 2 and told["simulation"]["pilot_error"] > -1
    _show_plans(told["simulation"])
    table = capsys.readouterr().out
    assert "best" in table and "teachers" in table and "the pilot itself, simulated" in table


@pytest.mark.parametrize("wrong", [["--teachers", "many"], ["--students", "0"], ["--in-flight", "1,-2"]])
def test_numbers_are_checked_before_the_pilot(tmp_path, wrong):
    prompts = tmp_path / "prompts.jsonl"
    demo.prompts(2, seed=1).to_json(prompts)
    given = ["plan", "recipes/miniature/tessy.yaml", str(prompts), "--simulate", *wrong]
    with pytest.raises(SettingsError, match="Pass for instance"):
        CliRunner().invoke(app, given, catch_exceptions=False)
