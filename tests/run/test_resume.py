"""Nothing finished is lost or done twice: the journal in the transform. Sudden deaths are in `test_kills.py`."""

import contextlib
import os
from collections import Counter

import pytest
from datasets import Dataset

from tessy_hf import Script, ScriptedEngine, Speaker, TessyTransform
from tessy_hf.errors import DatasetError, EngineDeadError, JournalError, RequestError
from tessy_hf.run.finished import Rows
from tessy_hf.run.journal import Journal
from tests.run.test_journal import empty, foreign, header_gone, newer, pages_gone, text_file, truncated
from tests.test_transform import prompts, scripted


def run(dataset, transform, **options):
    with transform:
        rows = list(dataset.map(transform, batched=True, load_from_cache_file=False, **options))
    return rows, transform.student.engine.requests


def test_a_rerun_is_a_look_up(tmp_path):
    journal = str(tmp_path / "rows.journal")
    first, requests = run(prompts(30), scripted(journal=journal), batch_size=10)
    assert requests == 60  # thinking and answer of each row
    again, requests = run(prompts(30), scripted(journal=journal, rows_in_flight=3), batch_size=7)
    assert requests == 0 and again == first


def test_rows_of_a_journal_from_before_a_column_read_as_null(tmp_path):
    path, old = tmp_path / "rows.journal", tmp_path / "old.journal"
    transform = scripted(journal=str(path))
    run(prompts(2), transform)
    new = Journal(path, transform.run_fingerprint)
    with contextlib.closing(Journal(old, transform.run_fingerprint)) as before:
        for key, _ in new.keys():
            before.claim(key)
            before.finish(key, {name: value for name, value in new.row(key).items() if name != "exhausted_budget"})
    rows, requests = run(prompts(2), scripted(journal=str(old)))
    assert requests == 0 and [row["exhausted_budget"] for row in rows] == [None, None]
    assert Rows(old).dataset()["exhausted_budget"][:] == [None, None]


def test_only_what_is_new_is_written_when_rows_are_added_and_shuffled(tmp_path):
    journal = str(tmp_path / "rows.journal")
    run(prompts(20), scripted(journal=journal))
    more, requests = run(prompts(25).shuffle(seed=1), scripted(journal=journal), batch_size=4)
    assert requests == 2 * 5
    assert {row["id"]: row["answer"] for row in more} == {f"r{i}": f"the answer is r{i} ." for i in range(25)}


def test_the_plan_is_told_before_any_work(tmp_path, capfd):
    journal = str(tmp_path / "rows.journal")
    assert scripted(journal=journal).plan(prompts(4)) == (0, 0, 4, 0)
    assert not os.path.exists(journal), "asking for the plan made a journal"
    run(prompts(3), scripted(journal=journal))
    assert scripted(journal=journal).plan(prompts(5).to_iterable_dataset()) == (3, 0, 2, 0)
    assert scripted(journal=None).plan(prompts(5)) == (0, 0, 5, 0)
    assert scripted(journal=journal, id_column=None).plan(prompts(5)) == (0, 0, 5, 0)
    capfd.readouterr()
    run(prompts(5), scripted(journal=journal))
    told = [line for line in capfd.readouterr().err.splitlines() if "failed before" in line]
    assert len(told) == 1
    assert told[0].endswith(
        f"TESSY: 3 rows done, 0 to continue, 0 failed before, all others to do (journal: {journal})."
    )


def test_the_plan_counts_rows_that_cannot_be_written_as_to_do(tmp_path):
    journal = str(tmp_path / "rows.journal")
    bad = Dataset.from_dict({"id": ["a", "b", "b"], "prompt": ["x", "", "y"]})
    assert scripted(journal=journal).plan(bad) == (0, 0, 3, 0)
    with pytest.raises(DatasetError, match="prompt"):
        scripted(journal=journal).plan(bad.rename_column("prompt", "question"))


def test_workers_of_num_proc_share_a_journal(tmp_path):
    journal = str(tmp_path / "rows.journal")
    plain, _ = run(prompts(20), scripted(journal=journal), batch_size=5, num_proc=2)
    again, requests = run(prompts(20), scripted(journal=journal), batch_size=5)
    assert requests == 0 and again == plain


def test_another_setting_is_another_run_in_the_same_file(tmp_path):
    journal = str(tmp_path / "rows.journal")
    run(prompts(4), scripted(journal=journal))
    assert run(prompts(4), scripted(journal=journal, temperature=0.1))[1] == 8
    assert run(prompts(4), scripted(journal=journal))[1] == 0


def test_equal_prompts_are_written_once_without_ids_and_apart_with_them(tmp_path):
    same = Dataset.from_dict({"id": ["a", "b"], "prompt": ["x", "x"]})
    script = {"journal": str(tmp_path / "rows.journal"), "script": one_answer}
    assert run(same, scripted(id_column=None, **script))[1] == 2
    assert run(same, scripted(**script))[1] == 4


def one_answer(row):
    return Script("okay", "fine")


def test_a_row_whose_engine_fails_is_tried_so_often_over_all_runs(tmp_path):
    tried = Counter()

    def fault(request):
        if request.part == "answer":
            tried[request.row] += 1
            return RequestError("The server is busy.") if request.row == "r1" and tried["r1"] < 3 else None
        return None

    settings = {"journal": str(tmp_path / "rows.journal"), "fault": fault, "max_attempts": 3}
    for run_number, expected in enumerate(["error", "error", "stop", "stop"], start=1):
        rows, _ = run(prompts(3), scripted(**settings))
        assert [row["finish_reason"] for row in rows] == ["stop", expected, "stop"], f"run {run_number}"
    assert tried == {"r0": 1, "r1": 3, "r2": 1}


def test_a_retry_goes_on_after_what_was_kept(tmp_path):
    """The thinking is not written again when only the answer failed."""
    for journal in (None, str(tmp_path / "rows.journal")):
        asked = Counter()

        def fault(request, asked=asked):
            asked[request.part] += 1
            return RequestError("Busy.", retryable=True) if request.part == "answer" and asked["answer"] == 1 else None

        rows, _ = run(prompts(1), scripted(fault=fault, journal=journal))
        assert rows[0]["answer"] == "the answer is r0 ." and rows[0]["error"] is None
        assert asked == {"thinking": 1, "answer": 2}


def test_what_was_finished_before_an_engine_died_is_kept(tmp_path):
    dead = {"r7"}

    def fault(request):
        return EngineDeadError("gone") if request.row in dead else None

    settings = {"journal": str(tmp_path / "rows.journal"), "fault": fault, "rows_in_flight": 1}
    with scripted(**settings) as transform, pytest.raises(EngineDeadError):
        prompts(10).map(transform, batched=True, batch_size=5)
    dead.clear()
    rows, requests = run(prompts(10), scripted(**settings))
    assert requests <= 2 * 3 and {row["finish_reason"] for row in rows} == {"stop"}


@pytest.mark.parametrize("damage", [foreign, truncated, header_gone, pages_gone, text_file, empty, newer])
def test_a_journal_that_cannot_be_used_stops_the_run_before_anything_is_written(tmp_path, damage):
    path = tmp_path / "rows.journal"
    damage(path)
    before = path.read_bytes()
    with scripted(journal=str(path)) as transform:
        with pytest.raises(JournalError, match=r"rows\.journal .*(expected|reads format)"):
            prompts(3).map(transform, batched=True)
        assert transform.student.engine.requests == 0
    assert path.read_bytes() == before


def test_an_unfinished_row_goes_on_at_its_last_kept_span(tmp_path):
    """The student's second turn fails; the rerun asks for nothing that was kept."""
    journal = str(tmp_path / "rows.journal")
    broken = [True]
    begun = []

    def fault(request):
        begun.append(len(request.prompt_ids))
        return EngineDeadError("gone") if broken[0] and len(begun) > 3 else None

    from tests.rules import RulePredictor, by_first_letter

    def make():
        student = Speaker(ScriptedEngine(student_turns, fault=fault), boundary=RulePredictor(by_first_letter, "qwen"))
        teacher = Speaker(ScriptedEngine(teacher_turns, fault=fault), boundary=RulePredictor(by_first_letter, "qwen"))
        return TessyTransform(teacher=teacher, student=student, id_column="id", journal=journal, chunk_tokens=4)

    with make() as transform, pytest.raises(EngineDeadError):
        transform(prompts(1)[:])
    reached, broken[0] = max(begun), False
    begun.clear()
    with make() as transform:
        transform(prompts(1)[:])
    assert begun[0] >= reached - 4  # it does not start over at the prompt


def student_turns(row):
    return ["an apple and another", " an axe", " all"]


def teacher_turns(row):
    return [" zebra zoo zone zip", " xylem yes you", " zed"]
