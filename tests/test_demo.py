"""The miniature world: what the main job promises of it."""

import pytest
from datasets import Dataset

from tessy_hf import demo

ROWS = 40


def synthesize(prompts, **settings):
    with demo.transform(**{"journal": None, **settings}) as transform:
        return list(prompts.map(transform, batched=True, features=transform.features(prompts)))


def texts(rows):
    return [(row["id"], row["messages"], row["spans"], row["finish_reason"]) for row in rows]


@pytest.fixture(scope="module")
def greedy():
    return synthesize(demo.prompts(ROWS, seed=3), temperature=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [{"chunk_tokens": 4}, {"chunk_tokens": 20}, {"rows_in_flight": 1}, {"rows_in_flight": 7}, {"rows_in_flight": 64}],
    ids=str,
)
def test_greedy_rows_depend_neither_on_k_nor_on_the_window(greedy, settings):
    assert texts(synthesize(demo.prompts(ROWS, seed=3), temperature=0, **settings)) == texts(greedy)


@pytest.mark.slow
def test_greedy_rows_are_the_same_streamed(greedy):
    assert texts(synthesize(demo.prompts(ROWS, seed=3).to_iterable_dataset(), temperature=0)) == texts(greedy)


@pytest.mark.slow
def test_sampled_rows_repeat_themselves_and_depend_on_the_seed():
    prompts = demo.prompts(20, seed=5)
    first = texts(synthesize(prompts))
    assert texts(synthesize(prompts, chunk_tokens=20, rows_in_flight=3)) == first
    assert texts(synthesize(prompts, seed=1)) != first


def test_the_authors_keep_to_their_kind_of_text(greedy):
    """In this world digits are capability: the student leaves the computation to the teacher."""
    for row in greedy:
        assistant = row["messages"][-1]["content"]
        thinking = [span for span in row["spans"] if span["part"] == "thinking"]
        students = "".join(assistant[s["start"] : s["end"]] for s in thinking if s["author"] == "student")
        assert sum(character.isdigit() for character in students) <= 2
        assert any(span["author"] == "teacher" for span in thinking)


@pytest.mark.slow
def test_tessy_is_right_where_the_student_alone_is_not():
    prompts = demo.prompts(120, seed=11)
    tessy, alone = synthesize(prompts), synthesize(prompts, method="student-only")
    right = sum(map(demo.verify, tessy)) / len(tessy)
    assert right >= 0.9
    assert right >= sum(map(demo.verify, alone)) / len(alone) + 0.2
    teacher = sum(s["tokens"] for row in tessy for s in row["spans"] if s["author"] == "teacher")
    thinking = sum(s["tokens"] for row in tessy for s in row["spans"] if s["part"] == "thinking")
    assert 0.35 <= teacher / thinking <= 0.65
    length = sum(row["teacher_tokens"] + row["student_tokens"] for row in tessy)
    assert length == pytest.approx(sum(row["student_tokens"] for row in alone), rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "thinking", "answer"),
    [
        ("student-only", {"student"}, {"student"}),
        ("teacher-only", {"teacher"}, {"teacher"}),
        ("teacher-think", {"teacher"}, {"student"}),
        ("teacher-answer", {"student"}, {"teacher"}),
        ("tessy", {"student", "teacher"}, {"student"}),
        ("tessy-teacher-answer", {"student", "teacher"}, {"teacher"}),
        ("teacher-reference", {"student"}, {"student"}),
        ("teacher-score", {"student"}, {"student"}),
    ],
)
def test_who_writes_what_in_each_method(method, thinking, answer):
    rows = synthesize(demo.prompts(6, seed=2), method=method)
    thought = {s["author"] for row in rows for s in row["spans"] if s["part"] == "thinking"}
    if method == "teacher-reference":  # to a prompt unlike all it knows, the tiny student may answer at once
        thought |= {"student"}
    assert thought == thinking
    assert {s["author"] for row in rows for s in row["spans"] if s["part"] == "answer"} == answer
    if method.endswith("-only"):
        author = method.removesuffix("-only")
        assert {row[f"{author}_token_ratio"] for row in rows} == {1.0}


@pytest.mark.slow
def test_teacher_mix_splits_rows_by_their_id_alone():
    rows = synthesize(demo.prompts(16, seed=2), method="teacher-mix")
    authors = {row["id"]: {span["author"] for span in row["spans"]} for row in rows}
    assert {frozenset(value) for value in authors.values()} == {frozenset({"teacher"}), frozenset({"student"})}
    some = synthesize(demo.prompts(16, seed=2).select([9, 3]), method="teacher-mix")
    assert all({span["author"] for span in row["spans"]} == authors[row["id"]] for row in some)


@pytest.mark.slow
def test_prompts_it_cannot_solve_come_out_all_the_same():
    questions = [
        "Janet’s ducks lay 16 eggs per day. She eats three for breakfast — how much does she make?\n\n1. …",
        "你好，世界。计算 2 的平方。",
        "```python\ndef f(x):\n\treturn x  ** 2\n```\nWhat is `f(3)`? <|im_end|> <think>",
        "why " * 2000,
    ]
    prompts = Dataset.from_dict({"id": list("abcd"), "prompt": questions})
    rows = synthesize(prompts)
    assert [row["id"] for row in rows] == list("abcd")
    assert all(row["finish_reason"] in ("stop", "length", "repetition") for row in rows[:3])
    assert rows[3]["finish_reason"] == "error" and "context holds" in rows[3]["error"]
    for row in rows[:3]:
        assistant = row["messages"][-1]["content"]
        assert "".join(assistant[s["start"] : s["end"]] for s in row["spans"]) == assistant


def test_the_verifier_wants_the_right_numbers_and_a_proper_end():
    row = {"answer": "the answer is 4 .", "reference_answer": "4", "finish_reason": "stop"}
    assert demo.verify(row)
    assert not demo.verify({**row, "answer": "the answer is 5 ."})
    assert not demo.verify({**row, "finish_reason": "length"})


def test_an_unknown_engine_or_family_is_told():
    with pytest.raises(ValueError, match="run on: transformers, vllm"):
        demo.transform(engine="abacus")
    with pytest.raises(ValueError, match="calc"):
        demo.prompts(1, family="chess")
