"""What a run would do on more replicas than there are: a discrete-event simulation of a pilot's rows.

A pilot's requests (:mod:`tessy_hf.recording`) go in; throughput, use of both models and the tail come out, for any
number of replicas and rows in flight. Each simulated row repeats the requests of one of the pilot's rows, in their
order: text does not depend on how fast it is written, so they are what this row would ask of any number of replicas.
It is served by one replica of each author, chosen as :class:`~tessy_hf.engines.server.ServerEngine` does, at the speed
that :mod:`tessy_hf.service` measured for as many rows at once, and by this process: the boundary predictors and the
event loop are a third station, with a speed of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from heapq import heappop, heappush
from itertools import accumulate, pairwise
from math import ceil
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tessy_hf.errors import SettingsError
from tessy_hf.estimate import Estimate, run_pilot, scale_up
from tessy_hf.recording import Recorder, Visit
from tessy_hf.service import Floats, Service, fit
from tessy_hf.trajectory import Author

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

    from tessy_hf.transform import TessyTransform

STATIONS = ("teacher", "student", "host")
"""What serves rows: replicas of the two models, and processes with the event loop and the predictors."""

GENERATIONS = 3
"""How many times the rows in flight are simulated; a longer run goes on as fast as the middle of these."""

FEWEST_ROWS = 2_000
"""Rows that are simulated of any longer run, so that none of the pilot's rows counts for too much."""

MOST_VISITS = 600_000
"""Most visits to stations that are simulated of one run, and four times that of a table: some seconds, a minute. Where
rows make more, some are joined to one."""


class Step(NamedTuple):
    """A request of a row, and what its process does until the next."""

    author: Author
    work: float
    host: float


class Trace(NamedTuple):
    """One row of the pilot: what it asked, and how many of the tokens were kept."""

    steps: tuple[Step, ...]
    tokens: int


@dataclass(frozen=True)
class Measured:
    """What a pilot tells of the rows and of the stations.

    Attributes:
        traces: Its rows.
        services: The speed of one replica of each station.
        replicas: How many replicas of teacher and student it had.
        rows_in_flight: How many rows it had in flight.
        rows: How many rows it wrote.
        seconds: How long they took.
        host_busy: The share of that time for which the event loop kept its core busy.
    """

    traces: tuple[Trace, ...]
    services: dict[str, Service]
    replicas: dict[str, int]
    rows_in_flight: int
    rows: int
    seconds: float
    host_busy: float

    def again(self, seed: int = 0) -> Simulated:
        """Simulate the pilot itself, whose hours are known."""
        return simulate(
            self,
            teachers=self.replicas["teacher"],
            students=self.replicas["student"],
            rows_in_flight=self.rows_in_flight,
            prompts=self.rows,
            seed=seed,
        )

    @property
    def error(self) -> float:
        """By how much the throughput of the simulated pilot is off, as a share of what was seen."""
        return self.seconds / (3600 * self.again().hours) - 1


@dataclass(frozen=True)
class Simulated:
    """A simulated run.

    Attributes:
        teachers: Replicas of the teacher.
        students: Replicas of the student.
        hosts: Processes that run the transform, each with its own predictors.
        rows_in_flight: Rows in flight, in all processes together.
        prompts: How many prompts the run has.
        hours: How long it takes.
        rows_per_hour: Rows for each of these hours, tail included.
        tokens_per_second: Accepted tokens per second, likewise.
        busy: By station, the share of the time, until the last prompt is admitted, for which a replica has work.
        rows_at_once: By station, how many rows a replica serves then, on average.
        tail_seconds: From the last prompt's admission to the end.
        row_seconds_p50: How long half of the rows take at most, from admission to end.
        row_seconds_p99: How long 99 of 100 rows do.
        gpu_hours: Hours times the GPUs of all replicas.
        simulated_rows: How many rows were simulated; the rest is taken to go on as fast as the middle of these.
        joined: How many requests of a row that follow were joined to one visit of each station.
        beyond_pilot: Stations that serve more rows at once than in the pilot, so that their speed is extrapolated.
        best: Whether no other plan of the table needs fewer GPU-hours.
    """

    teachers: int
    students: int
    hosts: int
    rows_in_flight: int
    prompts: int
    hours: float
    rows_per_hour: float
    tokens_per_second: float
    busy: dict[str, float]
    rows_at_once: dict[str, float]
    tail_seconds: float
    row_seconds_p50: float
    row_seconds_p99: float
    gpu_hours: float
    simulated_rows: int
    joined: int
    beyond_pilot: list[str]
    best: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self)


# --- what the pilot tells


def pilot(
    transform: TessyTransform,
    prompts: Dataset | IterableDataset,
    total: int | None = None,
    rows: int = 64,
    gpus: Mapping[str, int] | None = None,
) -> tuple[Estimate, Measured]:
    """Run a pilot, as :func:`tessy_hf.estimate.estimate` does, and keep what can be simulated of it.

    Raises:
        DatasetError: As there.
        SettingsError: As there, or teacher and student are one engine.
    """
    recorder = Recorder()
    run = run_pilot(transform, prompts, total, rows, gpus, recorder)
    second = 2  # the place in the run of the pilot's first row: the row that loads the models comes before it
    kept = {
        place: row["teacher_tokens"] + row["student_tokens"]
        for place, row in enumerate(run.rows, start=second)
        if row["finish_reason"] != "error"
    }
    window = transform.settings.rows_in_flight
    return scale_up(run), measure(recorder, kept, _most_at_once(recorder) if window == "auto" else window)


def _most_at_once(recorder: Recorder) -> int:
    """Return how many rows there were between their first request and the end of their last."""
    first: dict[int, float] = {}
    last: dict[int, float] = {}
    for visit in recorder.visits:
        first[visit.order] = min(visit.begin, first.get(visit.order, visit.begin))
        last[visit.order] = max(visit.end, last.get(visit.order, visit.end))
    changes = sorted([(begin, 1) for begin in first.values()] + [(end, -1) for end in last.values()])
    return max(accumulate(change for _, change in changes))


def measure(recorder: Recorder, kept: Mapping[int, int], rows_in_flight: int) -> Measured:
    """Read a pilot's notes.

    Args:
        recorder: The notes.
        kept: How many tokens each of the rows to be simulated has, by its place in the run.
        rows_in_flight: How many were in flight.
    """
    rows: dict[int, list[Visit]] = {}
    for visit in sorted(recorder.visits, key=lambda visit: visit.begin):
        rows.setdefault(visit.order, []).append(visit)
    floor = recorder.processor / len(recorder.visits)  # one thread has no more than a second for each second
    services = {
        name: fit(
            *np.array(times, dtype=float).T,
            replicas=count,
            since=min(visits[-1].end for visits in rows.values()),  # all rows begin at once: not how they go on
            floor=floor if name == "host" else 0.0,
        )
        for name, (times, count) in _seen(recorder, rows.values()).items()
        if times
    }
    traces = tuple(Trace(_steps(visits, services), kept[place]) for place, visits in rows.items() if place in kept)
    replicas = {str(name): count for name, count in recorder.replicas.items()}
    begin, end = min(visits[0].begin for visits in rows.values()), max(visits[-1].end for visits in rows.values())
    return Measured(
        traces, services, replicas, rows_in_flight, len(rows), end - begin, recorder.processor / (end - begin)
    )


_Times = list[tuple[float, float, int, int]]


def _seen(recorder: Recorder, rows: Iterable[list[Visit]]) -> dict[str, tuple[_Times, int]]:
    """Return begin, end, tokens and prompt tokens of all visits by station, and how many replicas shared them."""
    seen: dict[str, tuple[_Times, int]] = {}
    for author, count in recorder.replicas.items():
        seen[author] = [(v.begin, v.end, v.tokens, v.read) for v in recorder.visits if v.author == author], count
    seen["host"] = [(one.end, other.begin, one.tokens, 0) for row in rows for one, other in pairwise(row)], 1
    return seen


def _steps(visits: Sequence[Visit], services: dict[str, Service]) -> tuple[Step, ...]:
    works = [float(services[visit.author].work(visit.tokens, visit.read)) for visit in visits]
    hosts = [float(services["host"].work(visit.tokens, 0)) for visit in visits[:-1]]
    return tuple(map(Step, (visit.author for visit in visits), works, [*hosts, 0.0]))


# --- the simulation

_Route = list[tuple[str, float]]


def simulate(
    measured: Measured,
    *,
    teachers: int,
    students: int,
    rows_in_flight: int,
    prompts: int,
    hosts: int = 1,
    gpus: tuple[float, float] = (1, 1),
    seed: int = 0,
    visits: int = MOST_VISITS,
) -> Simulated:
    """Simulate one run.

    Args:
        measured: What the pilot told.
        teachers: Replicas of the teacher.
        students: Replicas of the student.
        rows_in_flight: Rows in flight.
        prompts: How many prompts the run has.
        hosts: Processes that run the transform.
        gpus: GPUs of one replica of teacher and student.
        seed: Decides which row repeats which of the pilot's, and which replicas serve it.
        visits: About how many visits to simulate at most.
    """
    rows = min(prompts, max(GENERATIONS * rows_in_flight, FEWEST_ROWS))
    joined = max(1, ceil(rows * _visits(measured.traces, 1) / visits))
    random = np.random.default_rng(seed)
    passes = [random.permutation(len(measured.traces)) for _ in range(ceil(rows / len(measured.traces)))]
    chosen = np.concatenate(passes)[:rows].tolist()  # each of the pilot's rows as often as any other
    replicas = {"teacher": teachers, "student": students, "host": hosts}
    routes = [_route(trace.steps, joined) for trace in measured.traces]
    done = _Plant(measured.services, replicas, [routes[i] for i in chosen], random).run(rows_in_flight)
    seconds = float(done.ended.max())
    if rows < prompts:
        first, last = rows_in_flight, rows - rows_in_flight  # neither the start nor the tail
        middle = np.sort(done.ended)[[first, last]]
        seconds += (prompts - rows) * float(middle[1] - middle[0]) / (last - first)
    took, tokens = done.ended - done.begun, np.mean([measured.traces[i].tokens for i in chosen])
    beyond = [name for name, rows in done.rows_at_once.items() if rows > measured.services[name].most]
    return Simulated(
        teachers=teachers,
        students=students,
        hosts=hosts,
        rows_in_flight=rows_in_flight,
        prompts=prompts,
        hours=seconds / 3600,
        rows_per_hour=3600 * prompts / seconds,
        tokens_per_second=float(tokens) * prompts / seconds,
        busy=done.busy,
        rows_at_once=done.rows_at_once,
        tail_seconds=float(done.ended.max() - done.begun.max()),
        row_seconds_p50=float(np.quantile(took, 0.5)),
        row_seconds_p99=float(np.quantile(took, 0.99)),
        gpu_hours=seconds / 3600 * (teachers * gpus[0] + students * gpus[1]),
        simulated_rows=rows,
        joined=joined,
        beyond_pilot=beyond,
    )


def _route(steps: Sequence[Step], joined: int) -> _Route:
    """Return which stations a row visits and with how much work, so many steps that follow joined to one.

    Where rows are served together at a speed that depends on their number alone, throughput depends on how much work
    a row brings to each station, not on how many visits it comes in (Baskett, Chandy, Muntz, Palacios 1975).
    """
    route: _Route = []
    for at in range(0, len(steps), joined):
        work: dict[str, float] = {}
        for step in steps[at : at + joined]:
            work[step.author] = work.get(step.author, 0.0) + step.work
        host = sum(step.host for step in steps[at : at + joined])
        route += [*work.items(), *([("host", host)] if host else [])]
    return route


def survey(
    measured: Measured,
    prompts: int,
    *,
    teachers: Sequence[int],
    students: Sequence[int],
    rows_in_flight: Sequence[int] = (),
    hosts: int = 1,
    gpus: Mapping[str, int] | None = None,
    seed: int = 0,
) -> list[Simulated]:
    """Simulate a run on each of several numbers of replicas, and mark the best.

    Args:
        measured: What the pilot told.
        prompts: How many prompts the run has.
        teachers: Numbers of replicas of the teacher.
        students: Numbers of replicas of the student.
        rows_in_flight: Numbers of rows in flight; by default as many for each teacher as the pilot had.
        hosts: Processes that run the transform.
        gpus: GPUs of ``teacher`` and ``student`` in the pilot, 1 each by default.
        seed: See :func:`simulate`.

    Returns:
        A run for each. The best is the fastest of those that need about the fewest GPU-hours: at most 5% more.

    Raises:
        SettingsError: A number is below 1.
    """
    if not (teachers and students) or min(prompts, hosts, *teachers, *students, *rows_in_flight) < 1:
        raise SettingsError(
            f"Runs of {prompts} prompts with teachers={list(teachers)}, students={list(students)}, "
            f"rows_in_flight={list(rows_in_flight)} and hosts={hosts} cannot be simulated. Pass numbers from 1 on."
        )
    of = {"teacher": 1, "student": 1, **(gpus or {})}
    own = (of["teacher"] / measured.replicas["teacher"], of["student"] / measured.replicas["student"])
    each = measured.rows_in_flight / measured.replicas["teacher"]
    plans = [(t, s, rows) for t in teachers for s in students for rows in rows_in_flight or [ceil(each * t)]]
    runs = [
        simulate(
            measured,
            teachers=t,
            students=s,
            rows_in_flight=rows,
            prompts=prompts,
            hosts=hosts,
            gpus=own,
            seed=seed,
            visits=min(MOST_VISITS, 4 * MOST_VISITS // len(plans)),
        )
        for t, s, rows in plans
    ]
    enough = 1.05 * min(run.gpu_hours for run in runs)
    best = min((run for run in runs if run.gpu_hours <= enough), key=lambda run: run.hours)
    return [replace(run, best=run is best) for run in runs]


def _visits(traces: Sequence[Trace], joined: int) -> float:
    """Return how many visits a row makes on average, about."""
    return float(np.mean([ceil(len(trace.steps) / joined) for trace in traces])) * (2 if joined == 1 else 3)


class _Done(NamedTuple):
    """How a simulated run went: each row's begin and end, and by station how it was used until the last admission."""

    begun: Floats
    ended: Floats
    busy: dict[str, float]
    rows_at_once: dict[str, float]


class _Replica:
    """One station's replica: it serves its rows together, each the slower the more there are.

    Its clock counts the units of work done for each row that it serves. A row is done when the clock reaches what it
    was when the row came, plus the row's work; so only the clock moves, whatever the number of rows.
    """

    __slots__ = ("area", "busy", "clock", "queue", "since", "speed", "stamp")

    def __init__(self, speed: list[float]) -> None:
        self.speed = speed  # seconds of a unit of work, by rows at once
        self.queue: list[tuple[float, int]] = []
        self.clock = self.since = self.busy = self.area = 0.0
        self.stamp = 0

    def advance(self, now: float) -> None:
        inside = len(self.queue)
        if inside:
            passed = now - self.since
            self.clock += passed / self.speed[inside]
            self.busy += passed
            self.area += passed * inside
        self.since = now

    def next_end(self) -> float:
        return self.since + (self.queue[0][0] - self.clock) * self.speed[len(self.queue)]


class _Plant:
    """All replicas of all stations, and the rows that go from one to the next."""

    def __init__(
        self,
        services: dict[str, Service],
        replicas: dict[str, int],
        routes: list[_Route],
        random: np.random.Generator,
    ) -> None:
        most = len(routes) + 1
        speeds = {name: service.seconds(np.arange(most)).tolist() for name, service in services.items()}
        self.stations = {name: [_Replica(speeds[name]) for _ in range(replicas[name])] for name in services}
        self.replicas = [replica for station in self.stations.values() for replica in station]
        self.first = dict(zip(services, accumulate((replicas[name] for name in services), initial=0), strict=False))
        self.hosts, self.random, self.routes = replicas["host"], random, routes
        self.homes: list[dict[str, int]] = [{} for _ in routes]
        self.held = [{name: [0] * replicas[name] for name in services} for _ in range(self.hosts)]
        self.place = [0] * len(routes)
        self.events: list[tuple[float, int, int]] = []

    def run(self, rows_in_flight: int) -> _Done:
        """Simulate all rows, in order, so many in flight."""
        rows, events, replicas = len(self.routes), self.events, self.replicas
        begun, ended = [0.0] * rows, [0.0] * rows
        admitted = min(rows, rows_in_flight)
        for row in range(admitted):
            self._enter(row, 0.0)
        now, used = 0.0, None
        while events:
            now, number, stamp = heappop(events)
            replica = replicas[number]
            if stamp != replica.stamp:  # another row came or went since
                continue
            replica.advance(now)
            row = heappop(replica.queue)[1]
            self._expect(number, replica)
            self.place[row] += 1
            if self.place[row] < len(self.routes[row]):
                self._enter(row, now)
                continue
            ended[row] = now
            self._release(row)
            if admitted < rows:
                begun[admitted] = now
                self._enter(admitted, now)
                admitted += 1
                used = self._used(now) if admitted == rows else None
        return _Done(np.array(begun), np.array(ended), *(used or self._used(now)))

    def _enter(self, row: int, now: float) -> None:
        """Let a row enter its next replica."""
        station, work = self.routes[row][self.place[row]]
        number = self.first[station] + self._home(row, station)
        replica = self.replicas[number]
        replica.advance(now)
        heappush(replica.queue, (replica.clock + work, row))
        self._expect(number, replica)

    def _home(self, row: int, station: str) -> int:
        """Return which replica serves a row: hosts take turns, of models it is one with the fewest of its host."""
        if station == "host":
            return row % self.hosts
        homes, held = self.homes[row], self.held[row % self.hosts][station]
        if station not in homes:
            fewest = min(held)
            equal = [at for at, rows in enumerate(held) if rows == fewest]
            homes[station] = equal[int(self.random.integers(len(equal)))]
            held[homes[station]] += 1
        return homes[station]

    def _release(self, row: int) -> None:
        for station, at in self.homes[row].items():
            self.held[row % self.hosts][station][at] -= 1

    def _expect(self, number: int, replica: _Replica) -> None:
        """Note when the next row leaves a replica, if none comes or goes before."""
        replica.stamp += 1
        if replica.queue:
            heappush(self.events, (replica.next_end(), number, replica.stamp))

    def _used(self, now: float) -> tuple[dict[str, float], dict[str, float]]:
        """Return the share of the time for which replicas had work, and how many rows they served, on average."""
        for replica in self.replicas:
            replica.advance(now)
        passed = max(now, 1e-9)
        mean = {
            name: np.mean([(one.busy, one.area) for one in station], axis=0) / passed
            for name, station in self.stations.items()
        }
        return {n: float(pair[0]) for n, pair in mean.items()}, {n: float(pair[1]) for n, pair in mean.items()}
