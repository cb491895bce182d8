"""The paper in miniature: units come once and in order, and the page never looks more complete than it is."""

import importlib
import json
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from tessy_hf.demo.world import FAMILIES

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).parent.parent / "recipes" / "miniature"
MODULES = ("paper", "figures", "claims", "plots", "world", "reproduce", "results", "texts", "train")


@pytest.fixture(scope="module")
def paper():
    """recipes/miniature/paper.py, imported as a script in that folder is."""
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module("paper")
    sys.path.remove(str(FOLDER))
    for name in MODULES:
        sys.modules.pop(name, None)


def test_each_unit_comes_after_those_it_needs_and_each_figure_has_a_claim(paper):
    assert set(paper.FIGURES) == set(paper.figures.CLAIMS)
    for name in paper.FIGURES:
        units, shown = paper.figure_units(name, [0, 1, 2])
        done = set()
        for key, unit in units.items():
            assert key == unit.name and done.issuperset(unit.needs) and unit.kind in paper.DO
            done.add(key)
        assert done.issuperset(shown)


def test_figures_share_their_units(paper):
    each = [paper.figure_units(name, [0])[0] for name in paper.FIGURES]
    together = {key: unit for units in each for key, unit in units.items()}
    assert all(together[key] == unit for units in each for key, unit in units.items())
    assert len(together) < sum(map(len, each)) / 2


def test_what_a_claim_compares_is_among_what_its_figure_shows(paper):
    for name, claim in paper.figures.CLAIMS.items():
        units, shown = paper.figure_units(name, [0])
        labels = {paper.figures.label(asdict(units[key])) for key in shown} | {"", "C: none", "base: none"}
        assert {side for pair in claim.pairs for side in pair} <= labels, name


def test_each_set_is_correlated_once(paper):
    units, shown = paper.figure_units("RSR", [0])
    methods = [units[key].method for key in shown]
    assert len(methods) == len(set(methods)) and "tessy-of-large" in methods


def test_the_readme_tells_how_many_units_there_are(paper):
    units = {key for name in paper.FIGURES for key in paper.figure_units(name, [0, 1, 2])[0]}
    assert f": {len(units)} of them" in (FOLDER / "README.md").read_text()


def unit(paper, key, units, right):
    examined = {family: {"accuracy": right, "tokens": 9} for family in FAMILIES}
    told = {"ended": "2026-01-01T00:00:00+00:00", "commit": "abc", "versions": {"torch": "2"}, "processor_seconds": 60}
    return {**asdict(units[key]), **told, "examined": examined}


def written(paper, out, rights, figure="best-of-n"):
    """The page of a figure whose students have these right answers, by what they were trained on."""
    (out / "units").mkdir(parents=True)
    (out / "scale.json").write_text(json.dumps(asdict(paper.Scale())))
    units, shown = paper.figure_units(figure, [0, 1])
    for key in units:
        method = units[key].method
        if units[key].kind in ("student", "tune") and method in rights:
            value = rights[method][units[key].seed]
            (out / "units" / f"{key}.json").write_text(json.dumps(unit(paper, key, units, value)))
    paper.figures.write(out, out / "PAPER.md", {figure: shown})
    return (out / "PAPER.md").read_text()


@pytest.mark.parametrize(
    ("best", "verdict"),
    [((0.8, 0.9), "Agrees"), ((0.4, 0.5), "Does not agree"), ((0.5, 0.9), "Cannot be judged here")],
)
def test_a_complete_figure_is_judged_by_the_spread_of_its_students(paper, tmp_path, best, verdict):
    page = written(paper, tmp_path, {"": (0.5, 0.6), "tessy": (0.6, 0.75), "tessy-best-of-5": best})
    assert f"**{verdict}.**" in page and verdict.lower() in page.partition("## ")[0]
    assert "| C: tessy | +12.5 ± 3.5 | +12.5 ± 3.5 |" in page
    assert "| judged |" not in page
    assert (tmp_path / "paper" / "best-of-n.png").read_bytes().startswith(b"\x89PNG")


def test_a_figure_that_lacks_a_unit_says_so_and_shows_nothing(paper, tmp_path):
    page = written(paper, tmp_path, {"": (0.5, 0.6), "tessy": (0.6, 0.75)})
    assert "not run yet: 4 of 6 units" in page and page.count("not run yet") == 2
    assert "+12.5" not in page and "grees.**" not in page and not (tmp_path / "paper").exists()


def test_a_student_that_was_not_trained_has_a_name_on_either_side(paper, tmp_path):
    rights = {"": (0.5, 0.6), "tessy": (0.6, 0.75), "teacher-only": (0.4, 0.5)}
    assert "large: tessy above no training: +12.50" in written(paper, tmp_path / "a", rights, "figure 3")
    unchanged = paper.figures.Claim("", "", "", (("", "large: tessy"),))
    shown = paper.figure_units("figure 3", [0, 1])[1]
    seen = paper.figures.bars(paper.figures.Found(tmp_path / "a"), shown, unchanged)
    assert list(seen.differences) == ["no training above large: tessy"]


def test_answers_of_the_teacher_are_judged_by_the_spread_of_its_students(paper, tmp_path):
    rights = {"": (0.5, 0.6), "tessy": (0.6, 0.75), "tessy-teacher-answer": (0.5, 0.7), "teacher-only": (0.6, 0.8)}
    page = written(paper, tmp_path, rights, "figure 9")
    assert "C: tessy above C: tessy-teacher-answer: +7.50 ± 3.54 (agrees)" in page
    assert "C: tessy-teacher-answer above C: teacher-only: -10.00 ± 0.00 (does not agree). **Does not agree.**" in page
    assert "7.1 points in-domain" in page


def test_names_of_points_that_lie_together_are_moved_apart(paper):
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    paper.figures.draw_points(axes, {"a": (1, 1), "b": (1, 1), "c": (9, 1), "d": (5, 5)}, "x", "y")
    heights = {text.get_text(): text.get_position()[1] for text in axes.texts}
    assert heights["a"] == heights["c"] == 1 and heights["b"] > 1.2 and heights["d"] == 5
