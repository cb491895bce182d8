"""The miniature reproduction runs, goes on where it was killed, and its tables say what its units found."""

import importlib
import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from random import Random

import pytest
import torch

from tessy_hf import demo
from tessy_hf.demo.world import FAMILIES, make_problem
from tessy_hf.errors import SettingsError

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "recipes" / "miniature"


@pytest.fixture(scope="module")
def recipe():
    """The modules of recipes/miniature, imported as a script in that folder imports them."""
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module("reproduce"), importlib.import_module("results")
    sys.path.remove(str(FOLDER))
    for name in ("reproduce", "results", "texts", "train"):
        del sys.modules[name]


def start(out):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, str(FOLDER / "reproduce.py"), "--quick", "--out", str(out)],
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment, start_new_session=True,
    )  # fmt: skip


def records(out):
    return {path.stem: path.read_text() for path in (out / "units").glob("*.json")}


@pytest.mark.timeout(900)  # a minute and a half on an idle machine
def test_a_killed_run_goes_on_and_every_kind_of_unit_is_done(recipe, tmp_path):
    reproduce, _ = recipe
    killed = start(tmp_path)
    for line in killed.stderr:
        if "5 to go" in line:
            break
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    before = records(tmp_path)
    assert 3 <= len(before) < 8
    again = start(tmp_path)
    said = again.communicate()[1]
    assert again.returncode == 0, said
    assert f"{8 - len(before)} of 8 units to do" in said
    after = records(tmp_path)
    assert set(after) == {unit.name for unit in reproduce.quick()}
    assert before.items() <= after.items()
    units = {name: json.loads(text) for name, text in after.items()}
    assert {one["kind"] for one in units.values()} == set(reproduce.DO)
    tessy, teacher = (units[f"tune-C-0-{method}-8"]["set"] for method in ("tessy", "teacher-only"))
    assert tessy["complete"] == teacher["complete"] == teacher["teacher_share"] == 1
    assert 0.2 < tessy["teacher_share"] < 0.7 and tessy["tokens"] < teacher["tokens"] and tessy["nll"] < teacher["nll"]
    judged = units["judge-C-0-teacher-score"]
    assert judged["judgements"] == 10 and judged["as_student_only"] + judged["scores"] >= judged["rows"] == 2
    report = (tmp_path / "RESULTS.md").read_text()
    assert "| none |" in report and "| **tessy** |" in report and "| teacher-only |" in report
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")


def test_units_of_another_scale_are_not_mixed_in(recipe, tmp_path):
    reproduce, _ = recipe
    reproduce.keep_scale(reproduce.Scale(), tmp_path)
    reproduce.keep_scale(reproduce.Scale(), tmp_path)
    with pytest.raises(SettingsError, match="units of another scale"):
        reproduce.keep_scale(reproduce.Scale(epochs=1), tmp_path)


def test_the_plan_has_each_unit_once_after_those_it_needs(recipe):
    reproduce, _ = recipe
    units = reproduce.plan(reproduce.LEVELS, [0, 1, 2], [125, 250, 500, 2000], [])
    names = [unit.name for unit in units]
    assert len(names) == len(set(names)) and all(set(unit.needs) < set(names) for unit in units)
    tried = {(unit.level, unit.method) for unit in units if unit.kind == "tune" and unit.n == 500}
    assert {method for level, method in tried if level == "C"} == set(reproduce.METHODS)
    assert {level for level, method in tried if method == "tessy"} == {"M", "C", "B"}
    assert names.count("rows-teacher-only-2000") == 1 and not any(
        name.startswith("rows-C-0-teacher-only") for name in names
    )
    few = reproduce.plan(["M"], [1], [500], ["tessy", "teacher-only"])
    parts = ("student-M-1", "rows-M-1-tessy", "tune-M-1-tessy", "rows-teacher-only", "tune-M-1-teacher-only")
    assert [unit.name.removesuffix("-500") for unit in few] == list(parts)


def test_no_prompt_of_the_examination_is_written_for(recipe):
    reproduce, _ = recipe
    problems = reproduce.examination(reproduce.Scale())
    assert {family: len(some) for family, some in problems.items()} == dict.fromkeys(FAMILIES, 200) | {"calc": 400}
    asked = [problem.prompt for some in problems.values() for problem in some]
    written_for = set(demo.prompts(2000, seed=reproduce.SYNTHESIS)["prompt"])
    assert len(set(asked)) == len(asked) and written_for.isdisjoint(asked)
    met = {
        make_problem("calc", Random(f"prompts-calc-{reproduce.EVALUATION}-{number}")).prompt for number in range(400)
    }
    assert met & written_for  # which is why they are left out


def test_the_likelihood_is_that_of_what_is_trained_on(recipe):
    reproduce, _ = recipe
    model, tokenizer = reproduce.load(demo.STUDENT)
    author, texts = reproduce.miniature.AUTHORS["student"], []
    for number in range(3):
        problem = make_problem("calc", Random(number))
        written = reproduce.miniature.write(problem, Random(number))
        texts.append(author.messages(problem.prompt, written))
    total = count = 0
    for text in texts:
        head = tokenizer.apply_chat_template(text[:1], add_generation_prompt=True, tokenize=False)
        whole = tokenizer.apply_chat_template(text, tokenize=False).rstrip("\n")
        start = len(tokenizer(head)["input_ids"])
        ids = torch.tensor([tokenizer(whole)["input_ids"]])
        labels = ids.clone()
        labels[:, :start] = -100
        with torch.no_grad():
            total += float(model(ids, labels=labels).loss) * (ids.shape[1] - start)
        count += ids.shape[1] - start
    assert reproduce.likelihood(texts, model, tokenizer, size=2) == pytest.approx(total / count, rel=1e-4)


def unit(kind, level="C", seed=0, method="", n=0, calc=None, other=None, **more):
    told = {"kind": kind, "level": level, "seed": seed, "method": method, "n": n, "processor_seconds": 60, **more}
    told |= {"ended": "2026-01-01T00:00:00+00:00", "commit": "abc", "versions": {"torch": "2"}}
    if calc is not None:
        told["examined"] = {f: {"accuracy": calc if f == "calc" else other, "tokens": 9} for f in FAMILIES}
    if kind == "tune":
        told["set"] = {"right": 1, "complete": 1, "tokens": 40, "teacher_share": 0.4, "nll": 0.25}
    return told


def tables(recipe, path, units, main=500):
    reproduce, results = recipe
    (path / "units").mkdir(parents=True)
    for number, one in enumerate(units):
        (path / "units" / f"{number}.json").write_text(json.dumps(one))
    (path / "scale.json").write_text(json.dumps(asdict(reproduce.Scale())))
    results.write(path, path / "RESULTS.md", main)
    return (path / "RESULTS.md").read_text()


def test_the_tables_say_what_was_found_and_where_it_was_not(recipe, tmp_path):
    units = []
    for seed, start_at in enumerate((0.5, 0.6)):
        units += [unit("student", level, seed, calc=start_at, other=0.9) for level in "CB"]
        units.append(unit("tune", "C", seed, "tessy", 500, start_at + 0.2 + seed / 50, 0.9))
        units.append(unit("tune", "C", seed, "teacher-only", 500, start_at + 0.05, 0.6))
        units += [unit("tune", "B", seed, method, 500, start_at + 0.2, 0.9) for method in ("tessy", "teacher-only")]
    units.append(unit("tune", "C", 0, "teacher-reference", 500))  # nothing to train on
    units.append(unit("judge", judgements=10, scores=0, rows=2, as_student_only=2))
    report = tables(recipe, tmp_path / "a", units)
    lines = report.splitlines()
    assert "| none | 55.0 ± 7.1 |  | 90.0 ± 0.0 |  |  |  |  |  |  |" in lines
    tessy = "| **tessy** | 76.0 ± 8.5 | +21.0 ± 1.4 | 90.0 ± 0.0 | +0.0 ± 0.0 | 100.0 | 100.0 | 40.0 | 40.0 | 0.25 |"
    assert tessy in lines
    assert any(line.startswith("| teacher-reference | – | – | – | – |") for line in lines)
    assert "| C | 500 | 2 | +16.0 ± 1.4 | +30.0 ± 0.0 | yes |" in lines
    assert "| B | 500 | 2 | +0.0 ± 0.0 | +0.0 ± 0.0 | no |" in lines
    assert "0 were a score" in report and "2 of the 2 rows" in report


def test_own_words_before_the_tables_stay(recipe, tmp_path):
    _, results = recipe
    units = [unit("student", calc=0.5, other=0.9)]
    units += [
        unit("tune", method=method, n=n, calc=0.6, other=0.9)
        for method in ("tessy", "teacher-only")
        for n in (125, 500)
    ]
    first = tables(recipe, tmp_path / "a", units)
    assert first.startswith("# The main table in miniature\n") and "## Change over the size of the set" in first
    path = tmp_path / "a" / "RESULTS.md"
    path.write_text(f"# Ours\n\nWhat is seen.\n\n{results.MARK}\n\nold\n")
    results.write(tmp_path / "a", path, 500)
    assert path.read_text() == first.replace("# The main table in miniature", "# Ours\n\nWhat is seen.")


def test_another_student_of_the_world_can_take_part():
    assert demo.transform(student=demo.TEACHER, journal=None).student.engine.model == str(demo.TEACHER)
