"""What the units of `reproduce.py` found, as tables: JSON files go in, a Markdown file comes out."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean, stdev
from typing import Any


def domains(examined: dict[str, dict[str, float]]) -> tuple[float, float]:
    """Return the share of right answers in %, in-domain (calc) and out-of-domain (the mean of the other families)."""
    others = [told["accuracy"] for family, told in examined.items() if family != "calc"]
    return 100 * examined["calc"]["accuracy"], 100 * mean(others)


def write(out: Path, path: Path) -> None:
    """Write the changes against the base student, mean and standard deviation over the students."""
    units: list[dict[str, Any]] = [json.loads(file.read_text()) for file in sorted((out / "units").glob("*.json"))]
    base = {(one["level"], one["seed"]): domains(one["examined"]) for one in units if one["kind"] == "student"}
    changes: dict[tuple[str, str, int], list[tuple[float, ...]]] = {}
    for one in units:
        if one["kind"] == "tune" and "examined" in one:
            before = base[one["level"], one["seed"]]
            change = tuple(after - start for after, start in zip(domains(one["examined"]), before, strict=True))
            changes.setdefault((one["level"], one["method"], one["n"]), []).append(change)
    lines = ["| level | method | n | in-domain | out-of-domain |", "|---|---|---|---|---|"]
    for (level, method, n), found in changes.items():
        shown = [f"{mean(one):+.1f} ± {stdev(one) if len(one) > 1 else 0:.1f}" for one in zip(*found, strict=True)]
        lines.append(f"| {level} | {method} | {n} | {' | '.join(shown)} |")
    path.write_text("\n".join(lines) + "\n")
