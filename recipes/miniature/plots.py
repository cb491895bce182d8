"""Draw small figures: numbers by name go in, files come out. Knows nothing of units, claims or pages."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

Series = dict[str, list[tuple[float, float, float]]]
"""For each line its points: x, mean, standard deviation."""
COLORS = ("#0e8a66", "#7b4fc9", "#c2571a", "#1f6fb2", "#8a6d0e", "#57606a")


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Return mean and standard deviation; of one value the latter is 0."""
    return mean(values), stdev(values) if len(values) > 1 else 0.0


def picture(path: Path, draw: Callable[[Any], None], panels: int) -> None:
    """Draw a small figure of one or more panels beside each other."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    path.parent.mkdir(exist_ok=True)
    figure = Figure(figsize=(6.4, 3.0 if panels == 1 else 2.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for panel in axes:
        panel.grid(color="#e3e7ec", linewidth=0.8)
        panel.spines[:].set_visible(False)
        panel.tick_params(length=0, labelsize=8)
    draw(axes if panels > 1 else axes[0])
    figure.savefig(path, dpi=90, metadata={"Software": None})


def draw_bars(axes: Any, values: Mapping[str, Sequence[Sequence[float]]], x: str, names: Sequence[str] = ()) -> None:
    """Draw a line for each condition, with mean and deviation of each number."""
    for at, name in enumerate(names or ("in-domain", "out-of-domain")):
        middles, deviations = zip(*(spread([one[at] for one in each]) for each in values.values()), strict=True)
        places = [place + 0.2 * at - 0.1 * (not names) for place in range(len(values))]
        look = {"color": COLORS[at], "markersize": 6, "capsize": 2.5, "elinewidth": 1.2, "label": name}
        axes.errorbar(middles, places, xerr=deviations, fmt="os"[at], **look)
    axes.set_yticks(range(len(values)), list(values))
    axes.set_ylim(len(values) - 0.5, -0.6)
    axes.set_xlabel(x, fontsize=8)
    if not names:
        axes.legend(fontsize=7, frameon=False)


def draw_lines(axes: Any, series: Series, x: str, y: str) -> None:
    """Draw lines with the deviation as a band."""
    for (name, line), color in zip(series.items(), COLORS, strict=False):
        places, middles, deviations = zip(*line, strict=True)
        axes.plot(places, middles, color=color, label=name, marker="o" if len(line) < 12 else None, markersize=4)
        low, high = zip(*((m - s, m + s) for m, s in zip(middles, deviations, strict=True)), strict=True)
        axes.fill_between(places, low, high, color=color, alpha=0.15, linewidth=0)
    axes.set_xlabel(x, fontsize=8)
    axes.set_ylabel(y, fontsize=8)
    axes.legend(fontsize=7, frameon=False)


def draw_points(axes: Any, points: Mapping[str, Sequence[float]], x: str, y: str) -> None:
    """Draw named points; a name that would lie over another one is moved up."""
    width, height = (max(values) - min(values) or 1 for values in zip(*points.values(), strict=True))
    line = {"arrowstyle": "-", "linewidth": 0.5, "color": COLORS[5], "shrinkA": 0, "shrinkB": 0}
    placed: list[tuple[float, float]] = []
    for name, (across, up) in sorted(points.items(), key=lambda point: point[1][1]):
        place = up
        while any(abs(across - x) < width / 4 and abs(place - y) < height / 18 for x, y in placed):
            place += height / 100
        placed.append((across, place))
        edge = max(x for x, _ in points.values() if across <= x < across + width / 15)  # right of the points beside it
        look = {"fontsize": 7, "verticalalignment": "center", "arrowprops": line}
        axes.annotate(name, (across, up), xytext=(edge + width / 40, place), **look)
        axes.plot([across], [up], "o", color=COLORS[0], markersize=5)
    axes.set_xlabel(x, fontsize=8)
    axes.set_ylabel(y, fontsize=8)


def draw_clouds(axes: Sequence[Any], firsts: Mapping[str, Mapping[str, Any]]) -> None:
    """Draw the first two principal components of the sets of one student, a panel for each teacher."""
    for panel, (teacher, one) in zip(axes, firsts.items(), strict=False):
        for name, points, color in zip(one["names"], one["pca"]["points"], COLORS, strict=False):
            panel.plot(*zip(*points, strict=True), "o", color=color, markersize=2, alpha=0.5, label=name)
        panel.set_title(f"teacher: {teacher}", fontsize=8)
    axes[0].legend(fontsize=6, frameon=False, markerscale=2)
