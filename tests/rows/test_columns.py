"""A trajectory becomes columns whose spans lie end to end over the assistant's text, and none of it is lost."""

import pytest
from datasets import Dataset, Features, IterableDataset, List, Value
from hypothesis import given, settings
from hypothesis import strategies as st

from tessy_hf.errors import DatasetError
from tessy_hf.rows import columns
from tessy_hf.text.thinking_format import HARMONY, THINK_TAGS
from tessy_hf.trajectory import Span, Trajectory
from tests.rules import ids_of, vocabulary

USER = [{"role": "user", "content": "How many?"}]
THOUGHT = [("student", "Okay, so"), ("teacher", " 2 + 3 = 5"), ("student", "\nHmm, 你好 🙂"), ("teacher", " is 5.")]


def trajectory(thinking=THOUGHT, answer=(("student", "It is **5**."),), **given):
    """A finished row."""
    row = Trajectory("row-1", **{"closed": True, "seed": 2**62 + 1, **given})
    row.spans = [Span(author, "thinking", text) for author, text in thinking]
    row.spans += [Span(author, "answer", text) for author, text in answer]
    return row


def as_row(row, kind="qwen", thinking_format=THINK_TAGS, messages=USER):
    """The columns of a row."""
    return columns.row(row, messages, vocabulary(kind), thinking_format, method="tessy", run_fingerprint="abc")


def span_texts(row):
    """What the offsets of the spans point at."""
    content = row["messages"][-1]["content"]
    return [content[span["start"] : span["end"]] for span in row["spans"]]


# --- spans over the assistant's text


def test_span_offsets_point_into_the_assistants_content():
    row = as_row(trajectory())
    assert row["messages"] == [
        *USER,
        {
            "role": "assistant",
            "content": "<think>\nOkay, so 2 + 3 = 5\nHmm, 你好 🙂 is 5.\n</think>\n\nIt is **5**.",
        },
    ]
    assert span_texts(row) == [
        "<think>\nOkay, so",
        " 2 + 3 = 5",
        "\nHmm, 你好 🙂",
        " is 5.\n</think>\n\n",
        "It is **5**.",
    ]
    assert [(span["author"], span["part"]) for span in row["spans"]] == [
        ("student", "thinking"),
        ("teacher", "thinking"),
        ("student", "thinking"),
        ("teacher", "thinking"),
        ("student", "answer"),
    ]
    assert (row["thinking"], row["answer"]) == ("Okay, so 2 + 3 = 5\nHmm, 你好 🙂 is 5.", "It is **5**.")


def test_a_harmony_students_message_keeps_the_thinking_apart():
    row = as_row(trajectory(), "harmony", HARMONY)
    message = row["messages"][-1]
    assert message == {"role": "assistant", "thinking": row["thinking"], "content": row["answer"]}
    whole = HARMONY.open + row["thinking"] + HARMONY.close + row["answer"]
    texts = [whole[span["start"] : span["end"]] for span in row["spans"]]
    assert texts[0] == HARMONY.open + "Okay, so" and texts[-2:] == [" is 5." + HARMONY.close, "It is **5**."]
    assert "".join(texts) == whole


@pytest.mark.parametrize("thinking_format", [THINK_TAGS, HARMONY])
@settings(max_examples=60)
@given(
    thinking=st.lists(st.tuples(st.sampled_from(["teacher", "student"]), st.text(min_size=1, max_size=9)), max_size=5),
    answer=st.lists(st.tuples(st.just("student"), st.text(min_size=1, max_size=9)), max_size=1),
    closed=st.booleans(),
)
def test_spans_lie_end_to_end_over_the_whole_text(thinking_format, thinking, answer, closed):
    row = as_row(trajectory(thinking, answer if closed else [], closed=closed), thinking_format=thinking_format)
    laid = [(span["start"], span["end"]) for span in row["spans"]]
    assert len(laid) == len(thinking) + (len(answer) if closed else 0)
    if not laid:
        assert row["messages"] == USER  # no assistant who says nothing
        return
    thought, said = "".join(text for _, text in thinking), row["answer"]
    whole = thinking_format.open + thought + (thinking_format.close if closed else "") + said
    assert [start for start, _ in laid] == [0, *(end for _, end in laid[:-1])]
    assert laid[-1][1] == len(whole)
    texts = [whole[start:end] for start, end in laid]
    assert all(text in shown for (_, text), shown in zip([*thinking, *answer], texts, strict=False))
    if thinking_format.key is None:
        assert row["messages"][-1]["content"] == whole
        assert "".join(span_texts(row)) == whole
    cut = columns.pieces(row)
    assert "".join(piece.before + piece.text + piece.after for piece in cut) == whole
    assert [(piece.author, piece.text) for piece in cut] == [*thinking, *(answer if closed else [])]


def test_a_text_that_the_spans_do_not_cover_is_not_cut():
    row = as_row(trajectory())
    edited = [*USER, {"role": "assistant", "content": "edited"}]
    for other in ({**row, "messages": edited}, {**row, "spans": None}, {**row, "messages": USER}):
        assert columns.pieces(other) == []


# --- tokens and ratios


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen", "harmony", "r1", "gpt2"])
@settings(max_examples=40)
@given(
    thinking=st.lists(
        st.tuples(st.sampled_from(["teacher", "student"]), st.text(min_size=1, max_size=12)), max_size=6
    ),
    answer=st.text(max_size=12),
)
def test_tokens_add_up_to_a_tokenisation_of_the_thinking_and_the_answer(kind, thinking, answer):
    row = as_row(trajectory(thinking, [("student", answer)] if answer else []), kind)
    counted = {(part, author): 0 for part in ("thinking", "answer") for author in ("teacher", "student")}
    for span in row["spans"]:
        assert span["tokens"] >= 0
        counted[span["part"], span["author"]] += span["tokens"]
    assert sum(n for (part, _), n in counted.items() if part == "thinking") == len(ids_of(row["thinking"], kind))
    assert sum(n for (part, _), n in counted.items() if part == "answer") == len(ids_of(answer, kind))
    assert row["teacher_tokens"] == counted["thinking", "teacher"] + counted["answer", "teacher"]
    assert row["student_tokens"] == counted["thinking", "student"] + counted["answer", "student"]


def test_ratios_are_shares_of_kept_tokens():
    teacher, student, answer = len(ids_of(" Zoo Zoo")), len(ids_of("all")), len(ids_of("is 5"))
    row = as_row(trajectory([("student", "all"), ("teacher", " Zoo Zoo")], [("student", "is 5")]))
    total = teacher + student + answer
    assert (row["teacher_tokens"], row["student_tokens"]) == (teacher, student + answer)
    assert row["teacher_token_ratio"] == pytest.approx(teacher / total)
    assert row["student_token_ratio"] == pytest.approx((student + answer) / total)
    assert row["thinking_teacher_token_ratio"] == pytest.approx(teacher / (teacher + student))


def test_a_teachers_answer_counts_for_the_teacher():
    row = as_row(trajectory([("student", "all")], [("teacher", "is 5")]))
    assert (row["teacher_tokens"], row["student_tokens"]) == (len(ids_of("is 5")), len(ids_of("all")))
    assert row["thinking_teacher_token_ratio"] == 0
    assert row["teacher_token_ratio"] > 0


def test_discarded_tokens_finish_and_identity_are_carried_over():
    given = {"discarded": {"teacher": 7, "student": 9}, "finish_reason": "length", "closed": False}
    row = as_row(trajectory(answer=(), **given))
    assert (row["discarded_teacher_tokens"], row["discarded_student_tokens"]) == (7, 9)
    assert (row["method"], row["run_fingerprint"], row["seed"]) == ("tessy", "abc", 2**62 + 1)
    assert (row["finish_reason"], row["error"]) == ("length", None)


# --- rows that did not finish


def test_a_row_out_of_budget_keeps_its_thinking_open():
    row = as_row(trajectory(answer=(), closed=False, finish_reason="length"))
    assert row["messages"][-1]["content"] == "<think>\n" + row["thinking"]
    assert "".join(span_texts(row)) == "<think>\n" + row["thinking"]
    assert (row["answer"], row["finish_reason"]) == ("", "length")


def test_a_row_whose_answer_was_cut_keeps_its_thinking_closed():
    row = as_row(trajectory(answer=(("student", "It is"),), finish_reason="length"))
    assert row["messages"][-1]["content"].endswith(" is 5.\n</think>\n\nIt is")
    assert "".join(span_texts(row)) == row["messages"][-1]["content"]


def test_a_failed_row_has_no_assistant_but_its_prompt_and_the_reason():
    row = as_row(trajectory((), (), closed=False, finish_reason="error", error="Row 'row-1': too long."))
    assert row["messages"] == USER and row["spans"] == []
    assert (row["thinking"], row["answer"], row["error"]) == ("", "", "Row 'row-1': too long.")
    assert (row["teacher_tokens"], row["student_tokens"]) == (0, 0)
    for ratio in ("teacher_token_ratio", "student_token_ratio", "thinking_teacher_token_ratio"):
        assert row[ratio] is None  # not 0, which would be a share


def test_a_row_that_failed_half_way_keeps_what_was_written():
    row = as_row(trajectory(answer=(), closed=False, finish_reason="error", error="HTTP 500"))
    assert "".join(span_texts(row)) == "<think>\n" + row["thinking"] != "<think>\n"


def test_empty_thinking_leaves_the_marks_to_the_answer():
    row = as_row(trajectory(()))
    assert row["messages"][-1]["content"] == "<think>\n\n</think>\n\nIt is **5**."
    assert span_texts(row) == ["<think>\n\n</think>\n\nIt is **5**."]
    assert row["spans"][0]["tokens"] == len(ids_of("It is **5**."))
    assert row["thinking_teacher_token_ratio"] is None and row["student_token_ratio"] == 1


def test_keys_of_messages_other_than_role_and_content_are_left_out():
    messages = [{"role": "system", "content": "Brief.", "name": "x"}, {"role": "user", "content": "Hi", "id": 3}]
    row = as_row(trajectory(), messages=messages)
    assert row["messages"][:2] == [{"role": "system", "content": "Brief."}, {"role": "user", "content": "Hi"}]


# --- the schema


PROMPTS = {"question": ["a", "b"], "id": [1, 2]}


def stream(rows=PROMPTS):
    """A stream that does not know its schema."""
    keys = list(rows)

    def generate():
        for values in zip(*rows.values(), strict=True):
            yield dict(zip(keys, values, strict=True))

    return IterableDataset.from_generator(generate)


@pytest.mark.parametrize("thinking_format", [THINK_TAGS, HARMONY])
@pytest.mark.parametrize(
    "dataset", [Dataset.from_dict(PROMPTS), Dataset.from_dict(PROMPTS).to_iterable_dataset(), stream()]
)
def test_the_schema_is_the_datasets_own_and_the_new_columns(dataset, thinking_format):
    before = dataset.features
    schema = columns.features(dataset, "question", thinking_format)
    assert isinstance(schema, Features)
    assert list(schema) == ["question", "id", *columns.COLUMNS]
    assert (schema["question"], schema["id"]) == (Value("string"), Value("int64"))
    assert list(schema["messages"].feature) == ["role", "content"] + (
        [] if thinking_format is THINK_TAGS else ["thinking"]
    )
    assert schema["spans"] == List(
        {
            "author": Value("string"),
            "part": Value("string"),
            "start": Value("int32"),
            "end": Value("int32"),
            "tokens": Value("int32"),
        }
    )
    assert dataset.features == before  # looking at the schema changes nothing
    assert [row["question"] for row in dataset] == ["a", "b"]


@pytest.mark.parametrize("kind", ["qwen", "harmony"])
def test_rows_of_every_kind_fit_the_schema(kind):
    thinking_format = {"qwen": THINK_TAGS, "harmony": HARMONY}[kind]
    rows = [
        as_row(trajectory(), kind, thinking_format),
        as_row(trajectory((), (), closed=False, finish_reason="error", error="No."), kind, thinking_format),
        as_row(
            trajectory((), (), closed=False, finish_reason="error", error="No."), kind, thinking_format, messages=[]
        ),
        as_row(trajectory(answer=(), closed=False, finish_reason="length"), kind, thinking_format),
    ]
    prompts = Dataset.from_dict({"question": list("abcd")})

    def write(batch):
        return {name: [rows["abcd".index(q)][name] for q in batch["question"]] for name in columns.COLUMNS}

    schema = columns.features(prompts, "question", thinking_format)
    for written in (
        list(prompts.map(write, batched=True, batch_size=1, features=schema)),
        list(prompts.to_iterable_dataset().map(write, batched=True, batch_size=1, features=schema)),
    ):
        assert [row["seed"] for row in written] == [2**62 + 1] * 4
        assert [row["teacher_token_ratio"] for row in written] == [row["teacher_token_ratio"] for row in rows]
        for made, row in zip(rows, written, strict=True):
            said = [{key: value for key, value in message.items() if value is not None} for message in row["messages"]]
            assert said == made["messages"]  # a key that only some messages have is None in the others, or missing
            assert row["spans"] == made["spans"]


def test_the_columns_of_a_row_are_the_columns_of_the_schema():
    schema = columns.features(Dataset.from_dict({"question": ["a"]}), "question", THINK_TAGS)
    assert list(as_row(trajectory())) == list(columns.COLUMNS) == [name for name in schema if name != "question"]


def test_a_messages_column_of_prompts_becomes_the_finished_chat():
    prompts = Dataset.from_dict({"messages": [[{"role": "user", "content": "a", "name": "x"}]]})
    schema = columns.features(prompts, "messages", THINK_TAGS)
    assert schema["messages"] == List({"role": Value("string"), "content": Value("string")})


@pytest.mark.parametrize("make", [Dataset.from_dict, stream])
def test_a_missing_prompt_column_is_told_with_the_columns_there_are(make):
    with pytest.raises(DatasetError) as caught:
        columns.features(make(PROMPTS), "prompt", THINK_TAGS)
    for shown in ("no column 'prompt'", "Columns: question, id.", 'Pass prompt_column="question".'):
        assert shown in str(caught.value)


def test_a_missing_id_column_is_told_with_its_setting():
    with pytest.raises(DatasetError, match=r"no column 'key'\. Columns: question, id\. Pass id_column="):
        columns.check_columns(["question", "id"], "question", "key")
    assert columns.check_columns(["question", "id"], "question", "id") is None


@pytest.mark.parametrize("name", columns.COLUMNS)
def test_a_column_that_would_be_overwritten_is_told_with_what_to_do(name):
    prompts = Dataset.from_dict({"question": ["a"], name: ["x"]})
    with pytest.raises(DatasetError) as caught:
        columns.features(prompts, "question", THINK_TAGS)
    for shown in (f"already has {name!r}", "would overwrite", f"ds.rename_column({name!r}, 'source_{name}')"):
        assert shown in str(caught.value)


def test_all_columns_that_would_be_overwritten_are_told_at_once():
    with pytest.raises(DatasetError, match="already has 'answer', 'error', which"):
        columns.check_columns(["answer", "prompt", "error"], "prompt")
