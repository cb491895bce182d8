"""What a run would cost, from a short pilot of it: tokens, requests, hours, GPU-hours, and where it is slow.

A transform and some of its prompts go in. The pilot's rows are thrown away; its rates hold for as many rows in flight
as it had, so it should be a few times longer than the window.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from fractions import Fraction
from itertools import islice
from typing import TYPE_CHECKING, Any

from tessy_hf.errors import DatasetError, SettingsError

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

    from tessy_hf.run.metering import Load
    from tessy_hf.transform import TessyTransform

MOST_REPLICAS = 8
"""The largest number in a recommended ratio of replicas."""

AUTHORS = ("teacher", "student")


@dataclass(frozen=True)
class AuthorCost:
    """One model's part of a run.

    Attributes:
        kept_tokens: Tokens of the finished rows that it wrote.
        generated_tokens: Tokens that it generates for them, rolled back ones included.
        requests: How often it is asked.
        hours: Hours for which it has work, on the hardware of the pilot.
        gpu_hours: The same, times its GPUs.
    """

    kept_tokens: int
    generated_tokens: int
    requests: int
    hours: float
    gpu_hours: float


@dataclass(frozen=True)
class Estimate:
    """What a run of ``prompts`` prompts would cost.

    Attributes:
        prompts: How many prompts the run has.
        pilot_rows: How many rows the pilot wrote.
        pilot_failed: How many of them failed; they are left out of all means.
        hours: Hours that the run takes as the pilot was run.
        teacher: The teacher's part.
        student: The student's part.
        waiting: For what rows waited, as shares: ``teacher``, ``student``, ``predictors``.
        bottleneck: For what they waited longest.
        replicas: Replicas of teacher and student that would have work for the same time.
    """

    prompts: int
    pilot_rows: int
    pilot_failed: int
    hours: float
    teacher: AuthorCost
    student: AuthorCost
    waiting: dict[str, float]
    bottleneck: str
    replicas: dict[str, int]

    def as_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Pilot:
    """A pilot that was run.

    Attributes:
        prompts: How many prompts the whole run has.
        rows: The rows it wrote, failed ones included.
        seconds: How long it took for them.
        loads: For what they waited.
        gpus: GPUs of ``teacher`` and ``student``.
    """

    prompts: int
    rows: list[dict[str, Any]]
    seconds: float
    loads: dict[str, Load]
    gpus: dict[str, int]

    @property
    def good(self) -> list[dict[str, Any]]:
        """The rows that did not fail."""
        return [row for row in self.rows if row["finish_reason"] != "error"]


def estimate(
    transform: TessyTransform,
    prompts: Dataset | IterableDataset,
    total: int | None = None,
    rows: int = 64,
    gpus: Mapping[str, int] | None = None,
) -> Estimate:
    """Run a pilot and scale it up.

    Args:
        transform: The run. It is used with its own engines, without its journal.
        prompts: The prompts; the first ``rows`` are the pilot's.
        total: How many prompts the whole run has; by default as many as ``prompts``.
        rows: How many rows the pilot writes.
        gpus: GPUs of ``teacher`` and ``student`` in the pilot, 1 each by default.

    Raises:
        DatasetError: There is no prompt, the number of prompts is not known, or every pilot row failed.
        SettingsError: ``gpus`` names another model, or ``rows`` is below 1.
    """
    return scale_up(run_pilot(transform, prompts, total, rows, gpus))


def run_pilot(
    transform: TessyTransform,
    prompts: Dataset | IterableDataset,
    total: int | None = None,
    rows: int = 64,
    gpus: Mapping[str, int] | None = None,
) -> Pilot:
    """Run a pilot; see :func:`estimate`."""
    gpus = {"teacher": 1, "student": 1, **(gpus or {})}
    if set(gpus) != set(AUTHORS) or rows < 1:
        raise SettingsError(
            f"A pilot of rows={rows} with gpus={gpus} cannot be run. At least one row and GPUs of teacher and student "
            "are expected, for instance rows=64, gpus={'teacher': 8, 'student': 1}."
        )
    total = len(prompts) if total is None and hasattr(prompts, "__len__") else total
    if total is None:
        raise DatasetError("A stream does not tell how many prompts it has. Pass total= with the number to plan for.")
    first, run = _first(prompts, rows), transform.without_journal()
    with run:
        next(iter(first.select([0]).map(run, batched=True, load_from_cache_file=False)))  # loads the models
        before, begin = run.loads(), time.monotonic()
        written = list(first.map(run, batched=True, load_from_cache_file=False, keep_in_memory=True))
        seconds, after = time.monotonic() - begin, run.loads()
    loads = {name: load - before[name] if name in before else load for name, load in after.items()}
    pilot = Pilot(total, written, seconds, loads, gpus)
    if not pilot.good:
        raise DatasetError(
            f"All {len(written)} rows of the pilot failed; the first with: {written[0]['error']} Mend that first."
        )
    return pilot


def scale_up(pilot: Pilot) -> Estimate:
    """Return what the whole run would cost."""
    good, loads, costs = pilot.good, pilot.loads, {}
    waited = sum(load.waited for load in loads.values())
    scale = pilot.prompts / len(good)
    for author in AUTHORS:
        load = loads.get(author)
        hours = scale * load.busy / 3600 if load else 0.0
        costs[author] = AuthorCost(
            kept_tokens=round(scale * sum(row[f"{author}_tokens"] for row in good)),
            generated_tokens=round(scale * sum(row[f"generated_{author}_tokens"] for row in good)),
            requests=round(scale * load.times) if load else 0,
            hours=hours,
            gpu_hours=hours * pilot.gpus[author],
        )
    return Estimate(
        prompts=pilot.prompts,
        pilot_rows=len(pilot.rows),
        pilot_failed=len(pilot.rows) - len(good),
        hours=scale * pilot.seconds / 3600,
        **costs,
        waiting={name: load.waited / waited for name, load in loads.items()} if waited else {},
        bottleneck=max(loads, key=lambda name: loads[name].waited),
        replicas=_replicas(costs["teacher"].hours, costs["student"].hours),
    )


def _first(prompts: Dataset | IterableDataset, rows: int) -> Dataset:
    from datasets import Dataset

    first = list(islice(prompts, rows))
    if not first:
        raise DatasetError("There are no prompts. A pilot needs at least one; look at the file or the split.")
    return Dataset.from_list(first, features=prompts.features)


def _replicas(teacher: float, student: float) -> dict[str, int]:
    """Return small numbers of replicas with about the same work for each."""
    if not teacher or not student:
        return {"teacher": int(teacher > 0), "student": int(student > 0)}
    ratio = teacher / student
    part = Fraction(ratio if ratio <= 1 else 1 / ratio).limit_denominator(MOST_REPLICAS)
    few, many = max(part.numerator, 1), max(part.denominator, 1)
    return {"teacher": many, "student": few} if ratio > 1 else {"teacher": few, "student": many}
