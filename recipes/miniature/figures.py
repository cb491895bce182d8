"""Write PAPER.md: units of `paper.py` go in; claims, what was seen, small figures and verdicts come out.

A figure whose units are not all there says how many are missing, and nothing else. The rule of the verdicts was fixed
before the first run. Knows nothing of how units are done.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

import results
from claims import CLAIMS, HEAD, Claim
from plots import Series, draw_bars, draw_clouds, draw_lines, draw_points, picture, spread

WORDS = 12
"""Words that are shown of those typical of the sets."""
AGREES, DIFFERS, OPEN = "agrees", "does not agree", "cannot be judged here"


@dataclass
class Seen:
    """What a figure shows: a table, the differences that the claim is about, and how it is drawn."""

    table: str
    differences: dict[str, list[float]] = field(default_factory=dict)
    """Each is above 0 where the claim holds; one number for each student."""
    draw: Callable[[Any], None] | None = None
    note: str = ""


class Found:
    """The units that are there, by name."""

    def __init__(self, out: Path) -> None:
        self.units = {file.stem: json.loads(file.read_text()) for file in sorted((out / "units").glob("*.json"))}

    def examined(self, name: str) -> results.Domains:
        """Return a student's right answers in %, in-domain and out-of-domain."""
        return results.domains(self.units[name]["examined"])

    def change(self, name: str) -> results.Domains:
        """Return by how many points a student changed."""
        unit = self.units[name]
        return results.subtract(self.examined(name), self.examined(f"student-{unit['level']}-{unit['seed']}"))


# ---------------------------------------------------------------------------------------------------------------------
# What each figure shows
# ---------------------------------------------------------------------------------------------------------------------


def bars(found: Found, names: Sequence[str], claim: Claim) -> Seen:
    """Compare fine-tuned students: the change of each, or its right answers."""
    values: dict[str, list[results.Domains]] = {}
    read = found.examined if claim.absolute else found.change
    for name in names:
        unit = found.units[name]
        values.setdefault(label(unit), []).append(read(name))
        if claim.absolute:
            untuned = f"student-{unit['level']}-{unit['seed']}"
            if len(values.setdefault(f"{unit['level']}: none", [])) < len(values[label(unit)]):
                values[f"{unit['level']}: none"].append(found.examined(untuned))
    sign = "" if claim.absolute else "+"
    rows = [
        [name, *(results.spread((one[at] for one in each), sign) for at in (0, 1))] for name, each in values.items()
    ]
    known = {"": [(0.0, 0.0)] * max(map(len, values.values())), **values}
    differences = {
        f"{above or 'no training'} above {below or 'no training'}": [
            one[0] - other[0] for one, other in zip(known[above], known[below], strict=True)
        ]
        for above, below in claim.pairs
    }
    what = "right answers in %" if claim.absolute else "change in points"
    heads = ["student: trained on", f"in-domain, {what}", f"out-of-domain, {what}"]
    return Seen(results.table(heads, rows), differences, lambda axes: draw_bars(axes, values, what))


def label(unit: Mapping[str, Any]) -> str:
    """Name a fine-tuned student: who was trained, on what and how."""
    how = {"tune": "", "lora": ", LoRA", "system": ", system prompt"}.get(unit["kind"], "")
    method = unit["method"] or ""
    if unit["kind"] == "distill":
        method = f"{method}, then on-policy" if method else "on-policy alone"
    return f"{unit['level']}: {method}{how}"


def by_limit(found: Found, names: Sequence[str], claim: Claim) -> Seen:
    """Show the share of right rows by the limit of thinking tokens."""
    methods = dict.fromkeys(found.units[name]["method"] for name in names)
    series: Series = {}
    for method in methods:
        each = [found.units[name]["by_limit"] for name in names if found.units[name]["method"] == method]
        series[method] = [(float(at), *spread([100 * one[at] for one in each])) for at in each[0]]
    tessy = [found.units[name]["by_limit"] for name in names if found.units[name]["method"] == "tessy"]
    teacher = next(found.units[name]["by_limit"] for name in names if found.units[name]["method"] == "teacher-only")
    differences = {
        f"tessy above teacher-only at {at} tokens": [100 * (one[at] - teacher[at]) for one in tessy]
        for at in ("40", "48")
    }
    most = list(teacher)[-1]
    differences[f"teacher-only above tessy at {most} tokens"] = [100 * (teacher[most] - one[most]) for one in tessy]
    return lined(series, "thinking tokens at most", "right rows in %", differences)


def by_epoch(found: Found, names: Sequence[str], claim: Claim) -> Seen:
    """Show the change in-domain over the epochs; each point is of fewer prompts than the final examination."""
    series: Series = {}
    gains: dict[str, list[float]] = {}
    for method in ("tessy", "teacher-only"):
        each = [found.units[name] for name in names if found.units[name]["method"] == method]
        start = [found.examined(f"fewer-{one['level']}-{one['seed']}")[0] for one in each]
        lines = [{e: results.domains(x)[0] for e, x in one["by_epoch"].items()} for one in each]
        series[method] = [(0.0, *spread(start))]
        series[method] += [(float(epoch), *spread([line[epoch] for line in lines])) for epoch in lines[0]]
        if method == "tessy":
            last = max(lines[0], key=int)
            gains["epoch 9 above epoch 1"] = [line[last] - line["1"] for line in lines]
            gains["epoch 9 above no training"] = [line[last] - one for line, one in zip(lines, start, strict=True)]
    return lined(series, "epoch", "right answers in %, in-domain", gains)


def losses(found: Found, names: Sequence[str], claim: Claim) -> Seen:
    """Show the training loss over the epochs."""
    curves: dict[str, list[list[list[float]]]] = {}
    for name in names:
        curves.setdefault(label(found.units[name]), []).append(found.units[name]["loss"])
    series = {
        who: [(at[0][0], *spread([point[1] for point in at])) for at in zip(*each, strict=True)]
        for who, each in curves.items()
    }
    means = {who: [mean(point[1] for point in curve) for curve in each] for who, each in curves.items()}
    differences = {
        f"{below} below {above}": [a - b for a, b in zip(means[above], means[below], strict=True)]
        for above, below in claim.pairs
    }
    heads = ["student: trained on", "first", "mean", "last"]
    rows = [
        [who, f"{line[0][1]:.3f}", results.spread(means[who], digits=3), f"{line[-1][1]:.3f}"]
        for who, line in series.items()
    ]
    return Seen(results.table(heads, rows), differences, lambda axes: draw_lines(axes, series, "epoch", "loss"))


def lined(series: Series, x: str, y: str, differences: dict[str, list[float]]) -> Seen:
    """Show lines as a table and a figure."""
    places = [point[0] for point in next(iter(series.values()))]
    rows = [[name, *(f"{m:.1f} ± {s:.1f}" for _, m, s in line)] for name, line in series.items()]
    shown = results.table([x, *(f"{place:g}" for place in places)], rows)
    return Seen(shown, differences, lambda axes: draw_lines(axes, series, x, y))


def compared(found: Found, names: Sequence[str]) -> list[dict[str, Any]]:
    """Return what `analyze` found, of each unit of a comparison."""
    return [found.units[name]["compared"] for name in names]


def lengths(found: Found, names: Sequence[str], claim: Claim) -> Seen:
    """Compare the mean lengths of rows."""
    each = compared(found, names)
    tokens = {who: [one["tokens"][who]["row"]["mean"] for one in each] for who in each[0]["names"]}
    differences = {
        f"tessy shorter than {who}": [a - b for a, b in zip(tokens[who], tokens["tessy"], strict=True)]
        for who in ("teacher-only", "student-only")
    }
    values = {who: [(value, 0.0) for value in some] for who, some in tokens.items()}
    shown = results.table(["set", "tokens a row"], [[who, results.spread(some)] for who, some in tokens.items()])
    return Seen(shown, differences, lambda axes: draw_bars(axes, values, "tokens a row", ("tokens",)))


def similarities(found: Found, names: Sequence[str], claim: Claim) -> Seen:
    """Compare how near teacher-only and tessy rows are to the student's own."""
    rows, differences = [], {}
    by_teacher: dict[str, list[dict[str, Any]]] = {}
    for name, one in zip(names, compared(found, names), strict=True):
        by_teacher.setdefault(found.units[name]["method"] or "shipped", []).append(one)
    for teacher, each in by_teacher.items():
        nearness = {
            who: [next(s["mean"] for s in one["similarity"] if set(s["of"]) == {who, "student-only"}) for one in each]
            for who in ("teacher-only", "tessy")
        }
        rows.append([teacher, *(results.spread(values, digits=3) for values in nearness.values())])
        differences[f"{teacher}: tessy nearer than teacher-only"] = [
            a - b for a, b in zip(nearness["tessy"], nearness["teacher-only"], strict=True)
        ]
    firsts = {teacher: each[0] for teacher, each in by_teacher.items()}
    heads = ["teacher", "similarity of teacher-only and student-only", "of tessy and student-only"]
    return Seen(results.table(heads, rows), differences, lambda axes: draw_clouds(axes, firsts))


def authors(found: Found, names: Sequence[str], claim: Claim) -> Seen:
    """Show who wrote the tokens of tessy rows, and the words typical of each set."""
    each = compared(found, names)
    shares = [100 * one["authors"]["tessy"]["teacher"] / sum(one["authors"]["tessy"].values()) for one in each]
    words, per = each[0]["words"]["words"], each[0]["words"]["per_thousand"]
    heads = ["word (per thousand words)", *each[0]["names"]]
    most = sorted(range(len(words)), key=lambda at: -max(line[at] for line in per))[:WORDS]
    rows = [[words[at], *(f"{line[at]:.1f}" for line in per)] for at in most]
    values = {"teacher": [(share, 0.0) for share in shares], "student": [(100 - share, 0.0) for share in shares]}
    note = f"The teacher wrote {results.spread(shares)}% of tessy's tokens. **{OPEN.capitalize()}**: words and share "
    return Seen(
        results.table(heads, rows),
        draw=lambda axes: draw_bars(axes, values, "share of tessy's tokens in %", ("share",)),
        note=note + "follow from how the two styles were made.",
    )


def answers(found: Found, names: Sequence[str], claim: Claim) -> Seen:
    """Compare who writes the answer, here and in RESULTS.md."""
    seen = bars(found, names, claim)
    told = main_table()
    by = ("tessy", "tessy-teacher-answer", "teacher-only")
    cost, still = (results.subtract(told[one], told[other]) for one, other in pairwise(by))
    seen.note = (
        f"Means in [RESULTS.md](RESULTS.md): answers of the teacher cost {cost[0]:.1f} points in-domain and "
        f"{cost[1]:.1f} out-of-domain, and are still {still[0]:.1f} and {still[1]:.1f} above teacher-only."
    )
    return seen


def starts(found: Found, names: Sequence[str], claim: Claim) -> Seen:
    """Compare students after on-policy distillation, and tell where they stood before it."""
    seen = bars(found, names, claim)
    before: dict[str, list[float]] = {}
    for name in names:
        begun = next(iter(found.units[name]["needs"]))
        if found.units[name]["kind"] == "distill" and begun.startswith("tune"):
            before.setdefault(found.units[begun]["method"], []).append(found.change(begun)[0])
    told = ", ".join(f"{results.spread(gains, '+')} after {method}" for method, gains in before.items())
    seen.note = f"The starts alone, before distillation (change in-domain): {told}."
    return seen


def main_table() -> dict[str, results.Domains]:
    """Return the mean changes at level C that RESULTS.md tells, by method."""
    told = results.read_changes(Path(__file__).with_name("RESULTS.md").read_text(), "C", 500)
    return {method: (inside[0], outside[0]) for method, inside, outside in told}


def ratios(found: Found, names: Sequence[str], claim: Claim) -> Seen:
    """Correlate the sets' Rank-Surprisal Ratio with what their students learned."""
    from scipy.stats import spearmanr

    sets: dict[str, list[tuple[float, float]]] = {}
    told = main_table()
    for name in names:
        unit = found.units[name]
        learned = found.change(name)[0] if unit["kind"] == "tune" else told[unit["method"]][0]
        sets.setdefault(unit["method"], []).append((unit["surprise"]["rsr"], learned))
    points = {name: tuple(mean(one[at] for one in each) for at in (0, 1)) for name, each in sets.items()}
    rho = float(spearmanr(*zip(*points.values(), strict=True)).statistic)
    rows = [[name, f"{rsr:.2f}", f"{gain:+.1f}"] for name, (rsr, gain) in sorted(points.items(), key=lambda p: p[1])]
    verdict = AGREES if rho <= -0.5 else DIFFERS if rho >= 0 else OPEN
    return Seen(
        results.table(["set", "RSR", "change in-domain"], rows),
        draw=lambda axes: draw_points(axes, points, "RSR of the set under the student", "change in-domain"),
        note=f"Spearman's rank correlation over {len(points)} sets: {rho:+.2f}. **{verdict.capitalize()}.**",
    )


LOOKS: dict[str, Callable[[Found, Sequence[str], Claim], Seen]] = {
    "figure 6": by_limit,
    "figures 8, 14": similarities,
    "figure 9": answers,
    "figure 11": by_epoch,
    "figure 12": lengths,
    "figure 15": losses,
    "on-policy": starts,
    "figures 16, 17": authors,
    "RSR": ratios,
}
"""How figures are shown that are not bars alone."""

# ---------------------------------------------------------------------------------------------------------------------
# The page
# ---------------------------------------------------------------------------------------------------------------------


def write(out: Path, path: Path, plan: Mapping[str, Sequence[str]]) -> None:
    """Write the page and its figures.

    Args:
        out: The folder of the units.
        path: The page; figures go into the folder ``paper`` beside it.
        plan: For each figure the names of the units that it shows.
    """
    found = Found(out)
    sections, verdicts = [], []
    for name, units in plan.items():
        section, verdict = show(found, path, name, units)
        sections.append(section)
        verdicts.append([f"[{name}](#{anchor(name)})", CLAIMS[name].title, verdict])
    complete = not any(verdict.startswith("not run yet") for *_, verdict in verdicts)
    parts = [HEAD, *(other_run(found) if complete else []), results.table(["", "", "here"], verdicts), *sections]
    scale = json.loads((out / "scale.json").read_text())
    scale.pop("judged")  # no unit here judges anything
    parts += [results.run_table(list(found.units.values()), scale)] if found.units else []
    path.write_text("\n\n".join(parts) + "\n")


def other_run(found: Found) -> list[str]:
    """Say how the students of this run did beside those of RESULTS.md, if there are some of C."""
    names = [name for name, one in found.units.items() if (one["kind"], one["level"]) == ("student", "C")]
    tuned = [f"{name.replace('student', 'tune')}-tessy-500" for name in names]
    if not names or not found.units.keys() >= set(tuned):
        return []
    table = Path(__file__).with_name("RESULTS.md").read_text().partition("## Level C")[2]
    untuned, after = re.search(r"\| none \| ([^|]+) \|.*?\| \*\*tessy\*\* \|[^|]+\| ([^|]+) \|", table, re.S).groups()
    here = results.spread(found.examined(name)[0] for name in names)
    gain = results.spread((found.change(name)[0] for name in tuned), "+")
    return [
        f"**The two runs.** In-domain these students are right on {here}% untrained ({untuned} in RESULTS.md) and "
        f"change by {gain} points on tessy ({after} there). Only student 0 is the same, the shipped one; the rest was "
        "done again, with other versions of the libraries, and deviations of three students are rough. Changes from "
        "RESULTS.md stand in figure 9 beside those of this run, outside its verdict, and in RSR for five sets."
    ]


def anchor(name: str) -> str:
    """Return the anchor of a figure's heading, as GitHub makes it."""
    return "".join(c for c in f"{name} {CLAIMS[name].title}".lower().replace(" ", "-") if c.isalnum() or c == "-")


def show(found: Found, path: Path, name: str, units: Sequence[str]) -> tuple[str, str]:
    """Return a figure's section, and its verdict in a word."""
    claim = CLAIMS[name]
    parts = [f"## {name.capitalize() if name[0] == 'f' else name}: {claim.title}", f"**The paper:** {claim.paper}"]
    needed = [*units, *(f"student-{level}-{seed}" for level, seed in map(who, units) if level)]
    there = sum(unit in found.units for unit in set(needed))
    if there < len(set(needed)):
        said = f"not run yet: {there} of {len(set(needed))} units"
        return "\n\n".join([*parts, f"**Here:** {said}."]), said
    seen = LOOKS.get(name, bars)(found, units, claim)
    parts += [f"**Here:** {claim.here}", seen.table]
    if seen.draw:
        file = path.parent / "paper" / f"{name.replace(' ', '-').replace(',', '')}.png"
        picture(file, seen.draw, 3 if name == "figures 8, 14" else 1)
        parts.append(f"![{name}: {claim.title}](paper/{file.name})")
    said, verdict = judge(seen.differences)
    parts += [line for line in (said, seen.note) if line]
    verdict = verdict or next((word for word in (DIFFERS, OPEN, AGREES) if word in seen.note.lower()), OPEN)
    return "\n\n".join(parts), verdict


def who(unit: str) -> tuple[str, str]:
    """Return the student whose examination before fine-tuning a unit is compared with."""
    kind, level, seed, *_ = [*unit.split("-"), "", ""]
    return (level, seed) if kind in ("tune", "lora", "system", "distill") else ("", "")


def judge(differences: Mapping[str, Sequence[float]]) -> tuple[str, str]:
    """Say of each difference whether it is beyond the students' spread, and what follows for the claim."""
    if not differences:
        return "", ""
    judged = {}
    for what, values in differences.items():
        middle, deviation = spread(values)
        judged[what] = AGREES if middle > deviation else DIFFERS if middle < -deviation else OPEN
    words = set(judged.values())
    verdict = DIFFERS if DIFFERS in words else OPEN if OPEN in words else AGREES
    digits = 2 if max(abs(mean(values)) for values in differences.values()) >= 1 else 3
    said = "; ".join(
        f"{what}: {results.spread(values, '+', digits)} ({judged[what]})" for what, values in differences.items()
    )
    return f"{said}. **{verdict.capitalize()}.**", verdict
