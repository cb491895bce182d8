"""What a run would cost, from a pilot whose costs are known."""

import json

import pytest
from datasets import Dataset
from typer.testing import CliRunner

from tessy_hf import Script, ScriptedEngine, Speaker, TessyTransform, demo
from tessy_hf.cli.main import app
from tessy_hf.errors import DatasetError, SettingsError
from tessy_hf.pilot.estimate import estimate

PROMPTS = Dataset.from_dict({"prompt": [f"calc {n}" for n in range(12)]})
THINKING, ANSWER = "okay so 1 + 1 = 2", "the answer is 2 ."


def transform(teacher_seconds, student_seconds, rows_in_flight=4, **settings):
    """A teacher that thinks and a student that answers: one request each."""
    script = Script(thinking=THINKING, answer=ANSWER)
    teacher = ScriptedEngine(lambda row: script, latency=teacher_seconds, name="t")
    student = ScriptedEngine(lambda row: script, latency=student_seconds, name="s")
    settings = {"method": "teacher-think", "max_attempts": 1, **settings}
    return TessyTransform(
        teacher=Speaker(teacher), student=Speaker(student), rows_in_flight=rows_in_flight, **settings
    )


def test_tokens_and_requests_are_scaled_up_exactly():
    with transform(0.01, 0.01, journal=None) as run:
        found = estimate(run, PROMPTS, total=1200, rows=12)
        rows = list(PROMPTS.map(run, batched=True))
    for author, cost in (("teacher", found.teacher), ("student", found.student)):
        assert cost.kept_tokens == 100 * sum(row[f"{author}_tokens"] for row in rows) > 0
        assert cost.generated_tokens == 100 * sum(row[f"generated_{author}_tokens"] for row in rows) > 0
        assert cost.requests == 1200
    assert (found.prompts, found.pilot_rows, found.pilot_failed) == (1200, 12, 0)


@pytest.mark.slow
def test_time_goes_where_the_latency_is():
    """One row at a time, so both engines' times add up; their latencies are the least they can take."""
    with transform(0.36, 0.12, rows_in_flight=1, journal=None) as run:
        found = estimate(run, PROMPTS, rows=6, gpus={"teacher": 8})
    assert found.bottleneck == "teacher" and found.waiting["teacher"] > found.waiting["student"] > 0
    assert found.teacher.hours * 3600 >= 12 * 0.36 and found.student.hours * 3600 >= 12 * 0.12
    assert found.teacher.gpu_hours == 8 * found.teacher.hours and found.student.gpu_hours == found.student.hours
    assert found.hours >= found.teacher.hours + found.student.hours
    ratio = found.replicas["teacher"] / found.replicas["student"]
    assert ratio == pytest.approx(found.teacher.hours / found.student.hours, rel=0.1)  # the best with numbers up to 8


def test_a_stream_of_prompts_has_to_be_counted_by_the_user():
    with transform(0, 0, journal=None) as run:
        with pytest.raises(DatasetError, match="total="):
            estimate(run, PROMPTS.to_iterable_dataset())
        assert estimate(run, PROMPTS.to_iterable_dataset(), total=24, rows=6).prompts == 24


def test_failed_rows_are_told_and_left_out():
    bad = Dataset.from_dict({"prompt": ["calc 1", *[""] * 3]})
    with transform(0, 0, journal=None) as run:
        found = estimate(run, bad, total=3, rows=4)
    assert (found.pilot_rows, found.pilot_failed, found.teacher.requests) == (4, 3, 3)


def test_a_pilot_that_fails_as_a_whole_says_why():
    with transform(0, 0, journal=None) as run, pytest.raises(DatasetError, match=r"All 2 rows .* first with: .+"):
        estimate(run, Dataset.from_dict({"prompt": ["", ""]}))
    with transform(0, 0, journal=None) as run, pytest.raises(DatasetError, match="no prompts to write"):
        estimate(run, PROMPTS.select([]), total=5)


@pytest.mark.parametrize("wrong", [{"gpus": {"judge": 1}}, {"rows": 0}])
def test_a_pilot_that_cannot_be_is_refused(wrong):
    with transform(0, 0, journal=None) as run, pytest.raises(SettingsError, match="Expected are at least one row"):
        estimate(run, PROMPTS, **wrong)


def test_the_pilot_leaves_the_journal_alone(tmp_path):
    with transform(0, 0, journal=str(tmp_path / "journal")) as run:
        estimate(run, PROMPTS, rows=3)
        assert not (tmp_path / "journal").exists()
        assert run.plan(PROMPTS).to_do == 12


@pytest.mark.slow
def test_the_command_prints_one_object(tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    demo.prompts(5, seed=1).to_json(prompts)
    arguments = ["plan", "recipes/miniature/tessy.yaml", str(prompts), "--rows", "2", "--prompts", "500"]
    result = CliRunner().invoke(app, [*arguments, "--json"])
    found = json.loads(result.stdout)
    assert (found["prompts"], found["pilot_rows"]) == (500, 2)
    assert found["teacher"]["generated_tokens"] > found["teacher"]["kept_tokens"] > 0
    assert found["bottleneck"] in ("teacher", "student", "predictors")
    table = CliRunner().invoke(app, arguments).stdout
    assert "500 prompts, from a pilot of 2 (0 failed)" in table and "-bound" in table and "replicas" in table


def test_rows_of_a_pilot_can_be_kept_and_the_next_pilot_writes_others(tmp_path):
    with transform(0, 0, journal=str(tmp_path / "journal")) as run:
        assert estimate(run, PROMPTS, rows=3, keep=True).pilot_rows == 3
        assert run.plan(PROMPTS)[:3] == (4, 0, 8)  # and the row with which the models were loaded
        assert estimate(run, PROMPTS, rows=20, keep=True).pilot_rows == 7
        assert run.plan(PROMPTS).done == 12
        one_more = Dataset.from_dict({"prompt": [*PROMPTS["prompt"], "calc 99"]})
        with pytest.raises(DatasetError, match="Only one prompt has no row yet"):  # it would be found, at no cost
            estimate(run, one_more, rows=3, keep=True)
        with pytest.raises(DatasetError, match="run without --keep if all rows are written"):
            estimate(run, PROMPTS, rows=3, keep=True)
    with transform(0, 0, journal=None) as run, pytest.raises(SettingsError, match="cannot be kept without a journal"):
        estimate(run, PROMPTS, rows=3, keep=True)
