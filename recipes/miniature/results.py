"""What the units of `reproduce.py` found: their JSON files go in; tables in a Markdown file and a figure come out.

The file's own words, before the mark, are kept. Knows nothing of how the units were done.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

MARK = "<!-- All below is written by reproduce.py. -->"
LEVELS = {
    "M": "never saw the teacher's style",
    "C": "saw the teacher's style in 2% of what it learned from",
    "B": "saw the teacher's style in 25% of what it learned from",
}
WANTED = (10.0, 5.0)
"""By how many points tessy is to be above teacher-only, in-domain and out-of-domain."""

Units = list[dict[str, Any]]
Domains = tuple[float, float]


def write(out: Path, path: Path, main: int) -> None:
    """Write the tables, and the figure next to them.

    Args:
        out: The folder of the run.
        path: The file to write.
        main: The size of the sets of the main table.
    """
    units: Units = [json.loads(file.read_text()) for file in sorted((out / "units").glob("*.json"))]
    found = Found(units)
    parts = [MARK, *(level_table(found, level, main) for level in found.levels), difference_table(found)]
    if len(found.sizes) > 1:
        parts.append(size_table(found))
    parts += [
        family_table(found, main),
        judge_note(units),
        run_table(units, json.loads((out / "scale.json").read_text())),
    ]
    words = path.read_text().partition(MARK)[0] if path.exists() else "# The main table in miniature\n\n"
    path.write_text(words + "\n\n".join(part for part in parts if part) + "\n")
    draw(path, main)


def domains(examined: Mapping[str, Mapping[str, float]]) -> Domains:
    """Return the share of right answers in %, in-domain (calc) and out-of-domain (the mean of the other families)."""
    others = [told["accuracy"] for family, told in examined.items() if family != "calc"]
    return 100 * examined["calc"]["accuracy"], 100 * mean(others)


class Found:
    """The examinations, by level, method and size, each with that of the student before it was fine-tuned."""

    def __init__(self, units: Units) -> None:
        self.base = {(one["level"], one["seed"]): one for one in units if one["kind"] == "student"}
        self.tuned: dict[tuple[str, str, int], Units] = defaultdict(list)
        for one in units:
            if one["kind"] == "tune":
                self.tuned[one["level"], one["method"], one["n"]].append(one)
        self.levels = [level for level in LEVELS if any(level == key[0] for key in self.tuned)]
        self.sizes = sorted({n for _, _, n in self.tuned})

    def methods(self, level: str, n: int) -> list[str]:
        """Return the methods tried there, the best in-domain first."""
        tried = [method for at, method, size in self.tuned if (at, size) == (level, n)]
        return sorted(tried, key=lambda method: -mean([one[0] for one in self.changes(level, method, n)] or [-1e9]))

    def examined(self, level: str, method: str, n: int) -> Units:
        """Return the units that could be examined; a set without a complete row cannot be trained on."""
        return [one for one in self.tuned.get((level, method, n), []) if "examined" in one]

    def changes(self, level: str, method: str, n: int) -> list[Domains]:
        """Return by how many points each student changed, in-domain and out-of-domain."""
        return [
            subtract(domains(one["examined"]), domains(self.base[level, one["seed"]]["examined"]))
            for one in self.examined(level, method, n)
        ]

    def differences(self, level: str, n: int) -> list[Domains]:
        """Return by how many points tessy is above teacher-only, student by student."""
        others = {one["seed"]: one for one in self.examined(level, "teacher-only", n)}
        return [
            subtract(domains(one["examined"]), domains(others[one["seed"]]["examined"]))
            for one in self.examined(level, "tessy", n)
            if one["seed"] in others
        ]


def subtract(left: Domains, right: Domains) -> Domains:
    """Return the difference, in-domain and out-of-domain."""
    return left[0] - right[0], left[1] - right[1]


def spread(values: Iterable[float], sign: str = "", digits: int = 1) -> str:
    """Show mean and standard deviation."""
    numbers = list(values)
    if not numbers:
        return "–"
    shown = f"{mean(numbers):{sign}.{digits}f}"
    return f"{shown} ± {stdev(numbers):.{digits}f}" if len(numbers) > 1 else shown


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


# --- the tables


def level_table(found: Found, level: str, main: int) -> str:
    """Compare the methods at one level: right answers, changes, and what the sets were like."""
    base = [domains(one["examined"]) for (at, _), one in found.base.items() if at == level]
    rows = [["none", spread(one[0] for one in base), "", spread(one[1] for one in base), "", "", "", "", "", ""]]
    for method in found.methods(level, main):
        units, changes = found.examined(level, method, main), found.changes(level, method, main)
        absolute = [domains(one["examined"]) for one in units]
        told = [one["set"] for one in found.tuned[level, method, main]]
        figures = [
            f"{100 * mean(one['right'] for one in told):.1f}",
            f"{100 * mean(one['complete'] for one in told):.1f}",
            f"{mean(one['tokens'] for one in told):.1f}",
            f"{100 * mean(one['teacher_share'] for one in told):.1f}",
            f"{mean(one['nll'] for one in told):.2f}",
        ]
        pairs = [
            text
            for at in (0, 1)
            for text in (spread(one[at] for one in absolute), spread((one[at] for one in changes), "+"))
        ]
        rows.append([f"**{method}**" if method == "tessy" else method, *pairs, *figures])
    seeds = ", ".join(str(seed) for at, seed in sorted(found.base) if at == level)
    heads = ["trained on", "in-domain", "change", "out-of-domain", "change", "right", "complete", "tokens"]
    title = f"## Level {level}, n = {main}: the student {LEVELS[level]} (students {seeds})"
    return title + "\n\n" + table([*heads, "teacher's share", "NLL"], rows)


def difference_table(found: Found) -> str:
    """Tell by how much tessy is above teacher-only, and where that is not as much as wanted."""
    rows = []
    for level in found.levels:
        for n in found.sizes:
            ahead = found.differences(level, n)
            if ahead:
                holds = all(mean(one[at] for one in ahead) >= WANTED[at] for at in (0, 1))
                shown = [spread((one[at] for one in ahead), "+") for at in (0, 1)]
                rows.append([level, str(n), str(len(ahead)), *shown, "yes" if holds else "no"])
    heads = ["level", "n", "students", "in-domain", "out-of-domain", f"≥ {WANTED[0]:.0f} and ≥ {WANTED[1]:.0f}"]
    return "## tessy less teacher-only, student by student\n\n" + table(heads, rows)


def size_table(found: Found) -> str:
    """Show the changes over the size of the set."""
    rows = []
    for level, method in dict.fromkeys((level, method) for level, method, _ in sorted(found.tuned)):
        sizes = [n for n in found.sizes if (level, method, n) in found.tuned]
        for n in sizes if len(sizes) > 1 else ():
            changes = found.changes(level, method, n)
            steps = found.tuned[level, method, n][0].get("steps", 0)
            rows.append([level, method, str(n), str(steps), *(spread((c[at] for c in changes), "+") for at in (0, 1))])
    heads = ["level", "trained on", "n", "steps", "in-domain", "out-of-domain"]
    return "## Change over the size of the set\n\n" + table(heads, rows)


def family_table(found: Found, main: int) -> str:
    """Show the right answers by family."""
    rows, heads = [], ["level", "trained on"]
    for level in found.levels:
        told = {"none": [one for (at, _), one in found.base.items() if at == level]}
        told |= {method: found.examined(level, method, main) for method in found.methods(level, main)}
        for method, units in told.items():
            families = list(units[0]["examined"]) if units else []
            heads[2:] = families or heads[2:]
            rows.append(
                [
                    level,
                    method,
                    *(spread(100 * u["examined"][family]["accuracy"] for u in units) for family in families),
                ]
            )
    return f"## By family, n = {main}\n\n" + table(heads, rows)


def judge_note(units: Units) -> str:
    """Tell what came of teacher-score."""
    return "\n\n".join(
        f"## teacher-score\n\nOf {one['judgements']} judgements of five candidates for each of {one['rows']} prompts "
        f"(level {one['level']}, student {one['seed']}), {one['scores']} were a score that can be read. "
        f"{one['as_student_only']} of the {one['rows']} rows are those of student-only, word for word."
        for one in units
        if one["kind"] == "judge"
    )


def run_table(units: Units, scale: Mapping[str, int]) -> str:
    """Tell when, by what and for how long it was run."""
    kinds = Counter[str]()
    for one in units:
        kinds[one["kind"]] += one["processor_seconds"]
    spent = ", ".join(f"{kind} {seconds / 60:.0f}" for kind, seconds in kinds.most_common())
    each = sorted({", ".join(f"{name} {number}" for name, number in one["versions"].items()) for one in units})
    ended = sorted(one["ended"] for one in units)
    rows = [
        ["ended", f"from {ended[0]} to {ended[-1]}"],
        ["commit", ", ".join(sorted({one["commit"] for one in units}))],
        ["versions", "; ".join(each)],
        ["student seeds", ", ".join(map(str, sorted({one["seed"] for one in units if one["kind"] == "student"})))],
        ["units", f"{len(units)}"],
        ["processor time", f"{sum(kinds.values()) / 60:.0f} minutes ({spent})"],
        *([name.replace("_", " "), str(number)] for name, number in scale.items()),
    ]
    return "## The run\n\n" + table(["", ""], rows)


# --- the figure

_CHANGE = re.compile(r"([+-]?[\d.]+)(?: ± ([\d.]+))?")
COLORS = {"in-domain": "#0e8a66", "out-of-domain": "#7b4fc9"}


def draw(path: Path, main: int) -> None:
    """Draw the changes from the tables of a written file: a panel for each level, a line for each data recipe."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = {level: read_changes(path.read_text(), level, main) for level in LEVELS}
    panels = {level: lines for level, lines in panels.items() if lines}
    if not panels:  # trial runs may have nothing to compare yet
        return
    figure = Figure(
        figsize=(9, 0.27 * sum(map(len, panels.values())) + 0.62 * len(panels) + 0.5), layout="constrained"
    )
    FigureCanvasAgg(figure)
    ratios = [len(lines) + 0.8 for lines in panels.values()]
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=ratios)[:, 0]
    for panel, (level, lines) in zip(axes, panels.items(), strict=True):
        panel.axvline(0, color="#57606a", linewidth=1, zorder=1)
        for at, (name, color) in enumerate(COLORS.items()):
            means, deviations = zip(*(changes[at] for _, *changes in lines), strict=True)
            places = [place + 0.22 * at - 0.11 for place in range(len(lines))]
            look = {"color": color, "markersize": 7, "capsize": 2.5, "elinewidth": 1.2, "label": name}
            panel.errorbar(means, places, xerr=deviations, fmt="os"[at], **look)
        panel.set_yticks(range(len(lines)), [method for method, *_ in lines])
        for label in panel.get_yticklabels():
            label.set_fontweight("bold" if label.get_text() == "tessy" else "normal")
        panel.set_ylim(len(lines) - 0.45, -0.55)
        panel.set_title(f"The student {LEVELS[level]}", loc="left", fontsize=10.5, fontweight="bold")
        panel.tick_params(length=0)
        panel.grid(axis="x", color="#e3e7ec", linewidth=0.8)
        panel.spines[:].set_visible(False)
    axes[-1].set_xlabel(
        "change of right answers after fine-tuning (percentage points; mean and deviation of 3 students)"
    )
    axes[0].legend(loc="lower right", bbox_to_anchor=(1, 1.0), ncols=2, frameon=False, borderaxespad=0.1)
    figure.savefig(path.with_name("results.png"), dpi=110)


def read_changes(text: str, level: str, main: int) -> list[tuple[str, tuple[float, float], tuple[float, float]]]:
    """Read one level's table: each method with its changes in-domain and out-of-domain, mean and deviation."""
    _, _, found = text.partition(f"## Level {level}, n = {main}:")
    lines = []
    for line in found.partition("\n## ")[0].splitlines():
        cells = [cell.strip(" *") for cell in line.split("|")]
        changes = [_CHANGE.fullmatch(cells[at]) for at in (3, 5)] if len(cells) > 5 else [None]
        if all(changes):
            one, other = ((float(change[1]), float(change[2] or 0)) for change in changes)  # one student: no deviation
            lines.append((cells[1], one, other))
    return lines


if __name__ == "__main__":  # draw the figure anew
    draw(Path(__file__).with_name("RESULTS.md"), 500)
