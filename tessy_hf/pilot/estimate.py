"""Estimate what a run costs from a short pilot: tokens, requests, hours, GPU-hours, and the bottleneck.

A transform and its prompts go in, an :class:`Estimate` comes out. The pilot's rows are discarded, or kept in the run's
journal. Its rates hold for as many rows in flight as it had, so it should have a few times more rows than the window.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from fractions import Fraction
from itertools import islice
from typing import TYPE_CHECKING, Any

from tessy_hf.errors import DatasetError, SettingsError
from tessy_hf.run.metering import Load
from tessy_hf.run.stores import undone

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

    from tessy_hf.transform import TessyTransform

MOST_REPLICAS = 8
"""The largest number in a recommended ratio of replicas."""

AUTHORS = ("teacher", "student")


@dataclass(frozen=True)
class AuthorCost:
    """One model's part of a run.

    Attributes:
        kept_tokens: Tokens of the finished rows that it wrote.
        generated_tokens: Tokens that it generates for them, including those rolled back.
        requests: Requests sent to it.
        hours: Hours during which it is busy, on the hardware of the pilot.
        gpu_hours: ``hours`` times its GPUs.
    """

    kept_tokens: int
    generated_tokens: int
    requests: int
    hours: float
    gpu_hours: float


@dataclass(frozen=True)
class Estimate:
    """What a whole run would cost.

    Attributes:
        prompts: How many prompts the run has.
        pilot_rows: How many rows the pilot wrote.
        pilot_failed: How many of them failed; they are left out of all means.
        hours: Hours that the run takes on the hardware of the pilot.
        teacher: The teacher's part.
        student: The student's part.
        waiting: Share of the rows' waiting time by what they waited for: ``teacher``, ``student``, ``predictors``.
        bottleneck: What rows waited for longest.
        replicas: A ratio of teacher to student replicas at which both have about the same work.
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


def estimate(
    transform: TessyTransform,
    prompts: Dataset | IterableDataset,
    total: int | None = None,
    rows: int = 64,
    gpus: Mapping[str, int] | None = None,
    *,
    keep: bool = False,
) -> Estimate:
    """Run a pilot and scale its costs up.

    Args:
        transform: The run. It is used with its own engines; with its journal only where rows are kept.
        prompts: The prompts; the first ``rows`` are the pilot's.
        total: How many prompts the whole run has; by default as many as ``prompts``.
        rows: How many rows the pilot writes.
        gpus: GPUs of ``teacher`` and ``student`` in the pilot, 1 each by default.
        keep: Whether the run keeps the pilot's rows, which are those of its first prompts that have none yet.

    Raises:
        DatasetError: There are no prompts, their number is unknown, or every row of the pilot failed.
        SettingsError: ``gpus`` names another model, ``rows`` is below 1, or there is no place to keep rows.
    """
    gpus = {"teacher": 1, "student": 1, **(gpus or {})}
    if set(gpus) != set(AUTHORS) or rows < 1:
        raise SettingsError(
            f"Cannot run a pilot of rows={rows} with gpus={gpus}. Expected are at least one row, and GPUs of teacher "
            "and student, for instance rows=64, gpus={'teacher': 8, 'student': 1}."
        )
    total = len(prompts) if total is None and hasattr(prompts, "__len__") else total
    if total is None:
        raise DatasetError("The number of prompts in a stream is unknown. Pass total= with the number to plan for.")
    run, first = _pilot(transform, prompts, rows, keep)
    written, seconds, loads = _run_pilot(run, first, keep)
    good = [row for row in written if row["finish_reason"] != "error"]
    if not good:
        raise DatasetError(
            f"All {len(written)} rows of the pilot failed; the first with: {written[0]['error']} Fix that first."
        )
    scale = total / len(good)
    costs = {author: _cost(author, good, loads.get(author, Load()), scale, gpus[author]) for author in AUTHORS}
    waited = sum(load.waited for load in loads.values())
    return Estimate(
        prompts=total,
        pilot_rows=len(written),
        pilot_failed=len(written) - len(good),
        hours=scale * seconds / 3600,
        **costs,
        waiting={name: load.waited / waited for name, load in loads.items()} if waited else {},
        bottleneck=max(loads, key=lambda name: loads[name].waited),
        replicas=_replicas(costs["teacher"].hours, costs["student"].hours),
    )


def _pilot(transform: TessyTransform, prompts: Any, rows: int, keep: bool) -> tuple[TessyTransform, Dataset]:
    """Return the pilot's transform and prompts; of rows that are kept one more, as the first one is not measured."""
    if not keep:
        return transform.with_settings(journal=None, parts=None), _first(prompts, rows, prompts.features)
    settings = transform.settings
    if settings.journal is None and settings.parts is None:
        raise SettingsError("The pilot's rows cannot be kept without a journal. Pass journal='auto', or a path.")
    first = _first(undone(prompts, settings, transform.run_fingerprint), rows + 1, prompts.features)
    if len(first) < 2:
        raise DatasetError(
            "Only one prompt has no row yet. A pilot that keeps its rows needs two, as the first loads the models. "
            "Run it without --keep."
        )
    return transform, first


def _run_pilot(
    run: TessyTransform, prompts: Dataset, keep: bool
) -> tuple[list[dict[str, Any]], float, dict[str, Load]]:
    """Write the rows of the pilot; return them, the seconds it took, and what they waited for."""
    with run:
        next(iter(prompts.select([0]).map(run, batched=True, load_from_cache_file=False)))  # loads the models
        prompts = prompts.select(range(1, len(prompts))) if keep else prompts  # the first is found in the journal
        before, begin = run.loads(), time.monotonic()
        written = list(prompts.map(run, batched=True, load_from_cache_file=False, keep_in_memory=True))
        seconds, after = time.monotonic() - begin, run.loads()
    return written, seconds, {name: load - before.get(name, Load()) for name, load in after.items()}


def _cost(author: str, rows: list[dict[str, Any]], load: Load, scale: float, gpus: int) -> AuthorCost:
    """Scale up one model's part of the pilot's rows."""
    hours = scale * load.busy / 3600
    return AuthorCost(
        kept_tokens=round(scale * sum(row[f"{author}_tokens"] for row in rows)),
        generated_tokens=round(scale * sum(row[f"generated_{author}_tokens"] for row in rows)),
        requests=round(scale * load.times),
        hours=hours,
        gpu_hours=hours * gpus,
    )


def _first(prompts: Iterable[Any], rows: int, features: Any) -> Dataset:
    from datasets import Dataset

    first = list(islice(prompts, rows))
    if not first:
        raise DatasetError(
            "There are no prompts to write. A pilot needs at least one; check the file and the split, or run without "
            "--keep if all rows are written."
        )
    return Dataset.from_list(first, features=features)


def _replicas(teacher: float, student: float) -> dict[str, int]:
    """Return small numbers of replicas that balance these hours of work."""
    if not teacher or not student:
        return {"teacher": int(teacher > 0), "student": int(student > 0)}
    ratio = teacher / student
    part = Fraction(ratio if ratio <= 1 else 1 / ratio).limit_denominator(MOST_REPLICAS)
    few, many = max(part.numerator, 1), max(part.denominator, 1)
    return {"teacher": many, "student": few} if ratio > 1 else {"teacher": few, "student": many}
