"""Each data recipe writes what it says, and what is written beside the rows is counted, told and never lost."""

import asyncio
import threading
from collections import Counter

import pytest
from datasets import Dataset, concatenate_datasets
from hypothesis import given, settings
from hypothesis import strategies as st

from tessy_hf import Script, ScriptedEngine, Speaker, TessyTransform, demo
from tessy_hf.engines.base import derive_seed
from tessy_hf.errors import DatasetError, EngineDeadError, RequestError, SettingsError
from tessy_hf.method.methods import best, read_score
from tessy_hf.run.journal import Journal
from tessy_hf.settings import Method, Settings
from tessy_hf.trajectory import Candidate, Draft, Span, Trajectory

METHODS = Method.__args__


class Cast:
    """A scripted teacher and student. What each is asked is kept, by the key of the request."""

    def __init__(self, teacher, student, **settings):
        self.asked, self.faults = {}, {}
        self.settings = {"id_column": "id", "journal": None, "method": "student-only", **settings}
        self.teacher = Speaker(ScriptedEngine(teacher, fault=self.seen("teacher"), name="teacher"))
        self.student = Speaker(ScriptedEngine(student, fault=self.seen("student"), name="student"))

    def seen(self, author):
        def fault(request):
            text = getattr(self, author).vocabulary.decode(request.prompt_ids)
            self.asked.setdefault((author, request.row, request.part), []).append(text)
            return self.faults.get((author, request.row, request.part))

        return fault

    def keys(self, author, part="answer"):
        return [key for who, key, which in self.asked if (who, which) == (author, part)]

    def rows(self, prompts):
        with TessyTransform(teacher=self.teacher, student=self.student, **self.settings) as transform:
            mapped = prompts.map(
                transform, batched=True, features=transform.features(prompts), load_from_cache_file=False
            )
            return list(mapped)

    def row(self, **columns):
        prompts = Dataset.from_dict(
            {"id": ["r0"], "prompt": ["What is 1 + 1?"]} | {k: [v] for k, v in columns.items()}
        )
        return self.rows(prompts)[0]


def play(**answers):
    """Answers by the end of a request's key: ``_2`` stands for ``r0#2``, ``score_2`` for ``r0#score#2``."""

    def script(key):
        name = key.removeprefix("r0").removeprefix("#").replace("#", "_")
        name = f"_{name}" if name.isdigit() else name or "_1"
        return Script(f"okay so this is {name}", answers[name])

    return script


# --- teacher-reference


def test_the_student_is_shown_the_reference_and_the_training_prompt_is_not():
    cast = Cast(play(reference="it is 2 ."), play(_1="two"), method="teacher-reference")
    row = cast.row()
    assert row["teacher_reference"] == "it is 2 ." and row["answer"] == "two"
    [student] = cast.asked["student", "r0", "thinking"]
    assert "What is 1 + 1?" in student and "it is 2 ." in student
    assert "it is 2 ." not in cast.asked["teacher", "r0#reference", "thinking"][0]
    assert row["messages"][0] == {"role": "user", "content": "What is 1 + 1?"}
    assert "it is 2 ." not in str(row["messages"])
    assert {span["author"] for span in row["spans"]} == {"student"}
    assert (row["candidates"], row["verdict"], row["teacher_score"]) == ([], None, None)
    assert row["generated_teacher_tokens"] > 0 and row["generated_student_tokens"] == row["student_tokens"]


def test_other_messages_of_the_chat_stay_as_they_are():
    cast = Cast(play(reference="2"), play(_1="two"), method="teacher-reference", system_prompt="Be brief.")
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
    prompts = Dataset.from_list([{"id": "r0", "prompt": [*chat, {"role": "user", "content": "1 + 1?"}]}])
    [row] = cast.rows(prompts)
    assert [message["content"] for message in row["messages"][:4]] == ["Be brief.", "Hi", "Yes?", "1 + 1?"]
    assert "Be brief." in cast.asked["student", "r0", "thinking"][0]


@pytest.mark.parametrize(("answer", "limit", "ended"), [("it is 2 . " * 50, 20, "'length'"), ("", 20, "'stop'")])
def test_a_reference_that_is_none_is_told_and_not_shown(answer, limit, ended):
    cast = Cast(play(reference=answer), play(_1="two"), method="teacher-reference", max_answer_tokens=limit)
    row = cast.row()
    assert row["finish_reason"] == "error" and ended in row["error"] and "reference" in row["error"]
    assert row["spans"] == [] and not cast.keys("student", "thinking")
    assert row["generated_teacher_tokens"] > 0


@pytest.mark.slow
def test_the_reference_is_the_answer_of_teacher_only():
    prompts = demo.prompts(4, seed=4)

    def write(method):
        with demo.transform(method=method, journal=None) as transform:
            return list(prompts.map(transform, batched=True, load_from_cache_file=False))

    assert [row["teacher_reference"] for row in write("teacher-reference")] == [
        row["answer"] for row in write("teacher-only")
    ]


# --- teacher-score

NUMBERS = ["", "_2", "_3", "_4", "_5"]
STUDENT = {"_1": "one", "_2": "two", "_3": "three", "_4": "four", "_5": "five"}


def scores(*said):
    return play(**{f"score_{n}" if n > 1 else "score": text for n, text in enumerate(said, 1)})


@pytest.mark.parametrize(
    ("said", "kept", "score"),
    [
        (["Score: 3", "Score: 9", "Score: 10", "Score: 9", "Score: 0"], "three", 10),
        (["Score: 3", "Score: 7", "Score: 7", "Score: 7", "Score: 0"], "two", 7),  # of equals the first
        (["Score: 11", "Score: 9.5", "I say Score: 9", "score: 8", "Score: 1"], "five", 1),
        (["good", "bad", "", "Score: -1", "Score: 1\nScore: 2"], "one", None),
    ],
)
def test_the_candidate_with_the_best_score_is_kept_and_what_is_no_score_is_not_guessed(said, kept, score):
    cast = Cast(scores(*said), play(**STUDENT), method="teacher-score")
    row = cast.row()
    assert (row["answer"], row["teacher_score"]) == (kept, score)
    assert [one["judgement"] for one in row["candidates"]] == said
    assert [one["score"] for one in row["candidates"]] == [read_score(text) for text in said]
    assert [one["answer"] for one in row["candidates"]] == list(STUDENT.values())
    assert [one["answer"] for one in row["candidates"] if one["chosen"]] == [kept]
    assert len({one["seed"] for one in row["candidates"]}) == 5
    asked = cast.asked["teacher", "r0#score#2", "thinking"][0]
    assert "What is 1 + 1?" in asked and "two" in asked
    assert {span["author"] for span in row["spans"]} == {"student"}
    tokens = cast.student.vocabulary.encode
    students = "".join(f"okay so this is {name}|{answer}|" for name, answer in STUDENT.items()).split("|")
    teachers = "".join(f"okay so this is score{n}|{text}|" for n, text in zip(NUMBERS, said, strict=True)).split("|")
    assert row["generated_student_tokens"] == sum(len(tokens(text).ids) for text in students)
    assert row["generated_teacher_tokens"] == sum(len(tokens(text).ids) for text in teachers)


def test_a_candidate_without_end_is_not_scored_nor_kept():
    student = play(_1="one " * 30, _2="two")
    cast = Cast(scores("Score: 10", "Score: 1"), student, method="teacher-score", best_of=2, max_answer_tokens=9)
    row = cast.row()
    assert (row["answer"], row["finish_reason"]) == ("two", "stop")
    assert [(one["finish_reason"], one["judgement"]) for one in row["candidates"]] == [
        ("length", None),
        ("stop", "Score: 1"),
    ]


@pytest.mark.slow
def test_all_candidates_of_a_seed_repeat_themselves():
    def write(seed):
        with demo.transform(method="teacher-score", best_of=2, seed=seed, journal=None) as transform:
            return list(demo.prompts(2, seed=4).map(transform, batched=True, load_from_cache_file=False))

    first = write(0)
    assert write(0) == first
    assert [row["candidates"] for row in write(1)] != [row["candidates"] for row in first]
    assert all(row["candidates"][0]["seed"] == row["seed"] for row in first)


@pytest.mark.slow
def test_what_the_student_writes_first_is_what_it_writes_alone():
    prompts = demo.prompts(6, seed=4)
    with demo.transform(method="student-only", journal=None) as transform:
        alone = [row["answer"] for row in prompts.map(transform, batched=True)]
    with demo.transform(method="teacher-score", best_of=2, journal=None) as transform:
        rows = list(prompts.map(transform, batched=True))
    assert [row["candidates"][0]["answer"] for row in rows] == alone
    assert [row["candidates"][1]["seed"] for row in rows] == [derive_seed(row["seed"], "candidate", 1) for row in rows]


# --- verifiers and best of n


def test_candidates_are_written_until_one_is_right():
    cast = Cast(play(), play(**STUDENT), verifier={"name": "exact", "column": "expected"}, best_of=4)
    row = cast.row(expected="three")
    assert (row["answer"], row["verdict"]) == ("three", 1.0)
    assert [one["verdict"] for one in row["candidates"]] == [0.0, 0.0, 1.0]
    assert cast.keys("student") == ["r0", "r0#2", "r0#3"]


@pytest.mark.parametrize(
    ("verdicts", "kept", "tries"),
    [([0.2, 0.7, 0.7, 0.1], "two", 4), ([False] * 4, "one", 4), ([0.5, True], "two", 2), ([0, 3], "two", 2)],
)
def test_where_none_is_right_the_best_is_kept(verdicts, kept, tries):
    left = list(verdicts)
    row = Cast(play(), play(**STUDENT), verifier=lambda row: left.pop(0), best_of=4).row()
    assert row["answer"] == kept and [one["verdict"] for one in row["candidates"]] == list(map(float, verdicts))
    assert len(row["candidates"]) == tries


def test_a_lone_candidate_is_verified_too():
    row = Cast(play(), play(**STUDENT), verifier=lambda row: False).row()
    assert (row["answer"], row["verdict"], len(row["candidates"])) == ("one", 0.0, 1)


def test_the_verifier_sees_the_row_and_runs_off_the_loop():
    seen = []

    def verifier(row):
        seen.append((dict(row), threading.current_thread().name, _loop()))
        return True

    Cast(play(), play(**STUDENT), verifier=verifier).row(expected="one")
    [(row, thread, loop)] = seen
    assert row["expected"] == "one" and row["prompt"] == "What is 1 + 1?"
    assert (row["thinking"], row["answer"], row["finish_reason"]) == ("okay so this is _1", "one", "stop")
    assert thread != "tessy" and loop is None


def _loop():
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def test_what_did_not_end_is_not_verified():
    cast = Cast(play(), play(_1="one " * 30, _2="two"), verifier=lambda row: 0.1, best_of=2, max_answer_tokens=9)
    row = cast.row()
    assert (row["answer"], [one["verdict"] for one in row["candidates"]]) == ("two", [None, 0.1])


@pytest.mark.parametrize("answer", ["yes", None, float("nan"), [1]])
def test_a_verdict_that_is_none_fails_the_row_with_its_text_kept(answer):
    row = Cast(play(), play(**STUDENT), verifier=lambda row: answer).row()
    assert row["finish_reason"] == "error" and repr(answer) in row["error"]
    assert row["answer"] == "one" and row["verdict"] is None


def test_a_verifier_that_raises_fails_its_row_and_no_other():
    def verifier(row):
        return {"r1": True}[row["id"]]

    cast = Cast(play(), lambda key: Script("okay", "fine"), verifier=verifier)
    rows = cast.rows(Dataset.from_dict({"id": ["r0", "r1"], "prompt": ["x", "y"]}))
    assert [row["finish_reason"] for row in rows] == ["error", "stop"]
    assert "raised KeyError" in rows[0]["error"]


def test_a_missing_column_is_told_before_anything_is_written():
    cast = Cast(play(), play(**STUDENT), verifier={"name": "number", "column": "expected"})
    with pytest.raises(DatasetError, match=r"no column 'expected'\. Columns: id, prompt\. Pass verifier="):
        cast.row()
    assert not cast.asked


def test_the_teacher_s_score_decides_between_what_the_verifier_finds_equal():
    cast = Cast(
        scores("Score: 9", "Score: 2", "Score: 3"),
        play(**STUDENT),
        method="teacher-score",
        best_of=3,
        verifier=lambda row: row["answer"] != "one",
    )
    row = cast.row()
    assert (row["answer"], row["verdict"], row["teacher_score"]) == ("three", 1.0, 3.0)


@pytest.mark.slow
def test_the_best_of_four_is_right_more_often_than_one():
    """With real models: the student guesses what it does not know."""
    prompts = demo.prompts(60, seed=11)

    def right(**given):
        with demo.transform(method="student-only", verifier=demo.verify, journal=None, **given) as transform:
            rows = list(prompts.map(transform, batched=True, load_from_cache_file=False))
        assert all(row["verdict"] == float(demo.verify(row)) for row in rows)
        assert all((row["verdict"] == 1) or len(row["candidates"]) == given["best_of"] for row in rows)
        return sum(map(demo.verify, rows)) / len(rows)

    assert right(best_of=4) >= right(best_of=1) + 0.1


def test_of_equals_the_first_is_best_and_what_did_not_end_is_last():
    def candidate(finish="stop", **judged):
        return Candidate(Trajectory("r", finish_reason=finish), done=True, **judged)

    first, second = candidate(score=3.0), candidate(score=3.0)
    assert best([first, second]) is first and best([candidate(), first]) is first
    assert best([candidate("length", score=9.0), candidate()]).trajectory.finish_reason == "stop"
    assert best([candidate(verdict=0.0, score=9.0), second_right := candidate(verdict=1.0)]) is second_right


# --- deaths


def journaled(tmp_path, **settings):
    teacher = scores("Score: 3", "Score: 9", "Score: 4", "Score: 5", "Score: 6")
    return Cast(teacher, play(**STUDENT), method="teacher-score", journal=str(tmp_path / "rows.journal"), **settings)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dies", "repeated"),
    [
        (("student", "r0#4", "thinking"), ["r0#4", "r0#5"]),
        (("student", "r0#4", "answer"), ["r0#4", "r0#5"]),
        (("teacher", "r0#score#3", "answer"), ["r0#4", "r0#5"]),
    ],
)
def test_no_finished_candidate_and_no_judgement_is_written_again(tmp_path, dies, repeated):
    whole = journaled(tmp_path / "whole").row()
    broken = journaled(tmp_path)
    broken.faults[dies] = EngineDeadError("gone")
    with pytest.raises(EngineDeadError):
        broken.row()
    rerun = journaled(tmp_path)
    row = rerun.row()
    assert rerun.keys("student") == repeated
    assert ("r0#score#3" in rerun.keys("teacher")) == (dies[0] == "teacher")
    assert "r0#score#2" not in rerun.keys("teacher")
    assert row == whole
    assert dies != ("student", "r0#4", "answer") or not rerun.asked.get(("student", "r0#4", "thinking"))


def test_a_reference_is_not_written_again(tmp_path):
    def make():
        return Cast(
            play(reference="it is 2 ."),
            play(_1="two"),
            method="teacher-reference",
            journal=str(tmp_path / "rows.journal"),
        )

    broken = make()
    broken.faults["student", "r0", "answer"] = EngineDeadError("gone")
    with pytest.raises(EngineDeadError):
        broken.row()
    rerun = make()
    row = rerun.row()
    assert not rerun.keys("teacher") and not rerun.keys("student", "thinking")
    assert (row["teacher_reference"], row["answer"]) == ("it is 2 .", "two")
    assert row["generated_teacher_tokens"] > 0


def test_a_request_that_fails_for_now_is_tried_again_after_what_there_is():
    tried = Counter()
    cast = Cast(scores("Score: 3", "Score: 9"), play(**STUDENT), method="teacher-score", best_of=2)
    seen = cast.teacher.engine._fault

    def fault(request):
        seen(request)
        tried[request.row, request.part] += 1
        busy = (request.row, request.part) == ("r0#score#2", "answer") and tried["r0#score#2", "answer"] == 1
        return RequestError("Busy.", retryable=True) if busy else None

    cast.teacher.engine._fault = fault
    row = cast.row()
    assert row["answer"] == "two" and row["error"] is None
    assert tried["r0#score", "answer"] == 1 and tried["r0#score#2", "thinking"] == 2
    assert len(cast.asked["student", "r0", "answer"]) == 1


SPANS = st.lists(
    st.builds(
        Span,
        st.sampled_from(["teacher", "student"]),
        st.sampled_from(["thinking", "answer"]),
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=5),
    ),
    max_size=4,
)


def texts(draft):
    return [
        ["".join(s.text for s in c.trajectory.spans), c.done, c.score, c.judgement, c.verdict, c.trajectory.generated]
        for c in draft.candidates
    ]


@pytest.mark.slow
@settings(max_examples=60)
@given(
    done=st.lists(st.tuples(SPANS, st.sampled_from(["stop", "length"]), st.none() | st.just(7.0)), max_size=3),
    last=st.none() | SPANS,
    reference=st.none() | st.text(max_size=4),
)
def test_a_draft_goes_on_from_a_journal_as_it_was(tmp_path_factory, done, last, reference):
    draft = Draft("r", seed=5, judged=True, reference=reference, extra_tokens={"teacher": 3, "student": 0})
    for number, (spans, finish, score) in enumerate(done):
        text = Trajectory("r", spans, finish, seed=number, generated={"teacher": 0, "student": number + 1})
        draft.candidates.append(Candidate(text, True, score, "Score: 7" if score else None, 0.5))
    if last is not None:
        draft.candidates.append(Candidate(Trajectory("r", last, seed=99, turn="student")))
    path = tmp_path_factory.mktemp("journal") / "rows.journal"
    journal = Journal(path, "run")
    journal.claim("r")
    journal.append("r", [s for c in draft.candidates for s in c.trajectory.spans], draft.state())
    journal.close()
    claim = Journal(path, "run").claim("r")
    again = Draft.resume("r", 5, True, claim.spans, claim.state)
    assert texts(again) == texts(draft)
    assert (again.reference, again.extra_tokens, again.seed) == (reference, draft.extra_tokens, 5)
    assert [c.trajectory.seed for c in again.candidates] == [c.trajectory.seed for c in draft.candidates]
    assert again.state() == draft.state()


# --- all of them


@pytest.mark.slow
def test_datasets_of_all_methods_go_together():
    prompts = demo.prompts(2, seed=2)
    parts = []
    for method in METHODS:
        given = {"best_of": 2, "verifier": demo.verify} if method == "tessy" else {}
        with demo.transform(method=method, journal=None, **given) as transform:
            parts.append(prompts.map(transform, batched=True, features=transform.features(prompts)))
    together = concatenate_datasets(parts)
    assert Counter(together["method"]) == dict.fromkeys(METHODS, 2)
    assert set(together["finish_reason"]) <= {"stop", "length", "repetition"}
    for row in together:
        assert bool(row["candidates"]) == (row["verdict"] is not None or row["method"] == "teacher-score")
        assert (row["teacher_reference"] is not None) == (row["method"] == "teacher-reference")
        for author in ("teacher", "student"):
            assert row[f"generated_{author}_tokens"] >= row[f"discarded_{author}_tokens"]


# --- chosen by the student's likelihoods


def test_the_candidate_stands_whose_ratio_under_the_student_is_least(tmp_path):
    """The student finds "three" unlikely and yet of rank 1: that is the least rank for the most surprise."""
    cast = Cast(play(), play(**STUDENT), best_of=5, chosen_by="rsr", temperature=0.6, journal=str(tmp_path / "j"))
    three = set(cast.student.vocabulary.encode("three").ids)
    engine = ScriptedEngine(play(**STUDENT), probability=lambda before, token: 0.02 if token in three else 0.9)
    cast.student = Speaker(engine)
    row = cast.row()
    assert row["answer"] == "three" and row["teacher_score"] is None
    scores = [one["score"] for one in row["candidates"]]
    assert len(scores) == 5 and max(scores) == scores[2] < 0
    assert cast.row() == row  # looked up


def test_engines_that_cannot_score_are_refused_where_the_ratio_chooses():
    with pytest.raises(SettingsError, match="needs score of the student"):
        Cast(play(), play(**STUDENT), best_of=2, chosen_by="rsr", temperature=0.6).row()
    with pytest.raises(SettingsError, match="by the teacher's scores"):
        Settings.check(method="teacher-score", chosen_by="rsr")
    for few in ({}, {"best_of": 1}):
        with pytest.raises(SettingsError, match="nothing to choose from: best_of="):
            Settings.check(chosen_by="rsr", **few)
