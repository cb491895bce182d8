"""How long a replica takes for one request, by its size and by how many it serves at once, from a pilot.

A replica works on all of its requests together, the more of them the slower on each. A request of ``tokens`` new
tokens and ``read`` prompt tokens is ``work(tokens, read)`` units of work, 1 on average, and a unit takes
``seconds(rows)`` while ``rows`` requests are served: a line that may bend upwards (flat until the replica is full,
steeper then). Beyond what the pilot saw, its last slope goes on. Knows nothing of engines.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

_KNOTS = np.array([0, 1 / 8, 1 / 4, 1 / 2, 3 / 4])
"""Where the line may bend, as shares of the most rows at once in the pilot."""

_PASSES = 6

_FAR_MORE = 1.25
"""By this factor more rows at once than ever after, the pilot's beginning counts: it alone may tell where a replica
that has little to do later is full."""

_LEAST = 0.05
"""Times below this share of the mean scatter no less."""


@dataclass(frozen=True)
class Service:
    """One replica's speed.

    Attributes:
        weights: Work of a request as such, of a token that is generated and of a prompt token that is read.
        base: Seconds of a unit of work with no rows at all; the line's height at 0.
        bends: Pairs of rows at once and of the seconds that the line rises by from there on for each row more.
        most: The most rows at once that the pilot saw, at one replica, for more than a hundredth of the requests.
        floor: Seconds of a unit of work for each row that is served, at the least.
    """

    weights: tuple[float, float, float]
    base: float
    bends: tuple[tuple[float, float], ...]
    most: float
    floor: float = 0.0

    def seconds(self, rows: ArrayLike) -> Floats:
        """Return the seconds that a unit of work takes while so many rows are served."""
        given = np.asarray(rows, dtype=float)
        line = self.base + sum(slope * np.maximum(0.0, given - knot) for knot, slope in self.bends)
        seconds: Floats = np.maximum(np.maximum(line, self.floor * given), 1e-9)
        return seconds

    def work(self, tokens: ArrayLike, read: ArrayLike) -> Floats:
        """Return the units of work of requests."""
        once, each, prompt = self.weights
        work: Floats = once + each * np.asarray(tokens, dtype=float) + prompt * np.asarray(read, dtype=float)
        return work


def at_once(begin: Floats, end: Floats) -> Floats:
    """Return, for each of some requests, how many were under way: when it began and while it lasted, in equal parts.

    What works on all requests together is as slow as the mean while one lasts; what has a queue, or works in rounds,
    makes a request wait for those that it finds. Engines do both, and this told their speeds best.
    """
    times, steps = np.concatenate([begin, end]), np.concatenate([np.ones(len(begin)), -np.ones(len(end))])
    order = np.argsort(times, kind="stable")
    times, counts = times[order], np.cumsum(steps[order])
    area = np.concatenate([[0.0], np.cumsum(counts[:-1] * np.diff(times))])
    lasting = (np.interp(end, times, area) - np.interp(begin, times, area)) / np.maximum(end - begin, 1e-9)
    found = np.searchsorted(np.sort(begin), begin, "right") - np.searchsorted(np.sort(end), begin, "right")
    mean: Floats = (np.maximum(1.0, found) + np.maximum(1.0, lasting)) / 2
    return mean


def fit(
    begin: Floats,
    end: Floats,
    tokens: Floats,
    read: Floats,
    *,
    replicas: int = 1,
    since: float = 0.0,
    floor: float = 0.0,
) -> Service:
    """Fit a replica's speed to requests.

    Times scatter in proportion to their length, so it is shares of them that the fit may be off by: else the speed at
    few rows would be what is left over by the many.

    Args:
        begin: When each request was made, in seconds.
        end: When it was answered.
        tokens: How many tokens it generated.
        read: How many prompt tokens were new to the engine.
        replicas: Among how many replicas the requests were spread.
        since: Requests that began earlier are fitted only if far more rows were served at once than ever after;
            they count as served.
        floor: See :class:`Service`.
    """
    rows, took = np.maximum(1.0, at_once(begin, end) / replicas), end - begin
    late = begin >= since if (begin >= since).sum() >= 20 else np.ones(len(begin), dtype=bool)
    late |= rows > _FAR_MORE * np.quantile(rows[late], 0.99)
    rows, took = rows[late], took[late]
    if not took.any():
        return Service((1.0, 0.0, 0.0), 0.0, (), float(rows.max()), floor)
    sizes = np.stack([np.ones(len(took)), tokens[late], read[late]], axis=1)
    most = float(np.quantile(rows, 0.99))
    knots = most * _KNOTS
    basis = np.stack([np.ones(len(took)), *(np.maximum(0.0, rows - knot) for knot in knots)], axis=1)
    speed, told = np.full(len(took), took.mean()), took.mean()
    for _ in range(_PASSES):  # the two factors of a request's time, in turns
        share = 1 / np.maximum(told, _LEAST * took.mean())
        weights = _least_squares(sizes * (share * speed)[:, None], share * took)
        weights /= (sizes @ weights).mean()
        heights = _least_squares(basis * (share * (sizes @ weights))[:, None], share * took)
        speed = basis @ heights
        told = speed * (sizes @ weights)
    bends = tuple((float(knot), float(rise)) for knot, rise in zip(knots, heights[1:], strict=True) if rise)
    once, each, prompt = map(float, weights)
    return Service((once, each, prompt), float(heights[0]), bends, most, floor)


def _least_squares(columns: Floats, wanted: Floats) -> Floats:
    """Return weights of the columns, none below 0, that come closest; columns that help little get none.

    All sets of columns are tried, as there are few, and judged by Schwarz's criterion.
    """
    count, width = columns.shape
    products, aims, total = columns.T @ columns, columns.T @ wanted, float(wanted @ wanted)
    best, found = np.inf, np.zeros(width)
    for size in range(1, width + 1):
        for chosen in map(list, combinations(range(width), size)):
            weights = np.linalg.lstsq(products[np.ix_(chosen, chosen)], aims[chosen], rcond=None)[0]
            if (weights < 0).any() or not weights.any():
                continue
            error = (total - float(aims[chosen] @ weights)) / total  # what is left of the squares
            score = count * np.log(max(error, 1e-12)) + size * np.log(count)
            if score < best:
                best, found = score, np.zeros(width)
                found[chosen] = weights
    return found
