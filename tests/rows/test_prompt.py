"""Prompts as public datasets have them: read, or refused by name; one row never ends the others."""

import numpy as np
import pytest
from datasets import Dataset, Features, Json
from hypothesis import given
from hypothesis import strategies as st

from tessy_hf import Settings
from tessy_hf.errors import PromptError
from tessy_hf.rows.prompt import PromptReader, finished_prompt_hash, prompt_hash
from tests.test_transform import rows_of, scripted

USER = {"role": "user", "content": "What is 1+1?"}
TEXT = {"type": "text", "text": "What is "}
CALL = [{"type": "function", "function": {"name": "add", "arguments": "{}"}}]


def read(prompt, **columns):
    settings = Settings.check(id_column="id")
    return PromptReader(settings, ["id", "prompt", *columns]).read({"id": "a", "prompt": prompt, **columns})


READ = {
    "text": "What is 1+1?",
    "messages": [USER],
    "a tuple": (USER,),
    "an array": np.array([USER], dtype=object),
    "other keys": [{**USER, "name": None, "weight": 1, "tool_calls": None}],
    "an empty system message": [{"role": "system", "content": ""}, USER],
    "a system message of null": [{"role": "system", "content": None}, USER],
    "a system message of white space": [{"role": "system", "content": " \n"}, USER],
    "one part": [{"role": "user", "content": [{"type": "text", "text": "What is 1+1?"}]}],
    "parts": [{"role": "user", "content": [TEXT, {"type": "text", "text": "1+1?", "image": None}]}],
    "parts as plain text": [{"role": "user", "content": ["What is ", "1+1?"]}],
    "parts without a type": [{"role": "user", "content": [{"text": "What is 1+1?"}]}],
    "from and value": [{"from": "human", "value": "What is 1+1?"}],
    "from and value with a system": [{"from": "system", "value": ""}, {"from": "human", "value": "What is 1+1?"}],
}


@pytest.mark.parametrize("kind", READ)
def test_one_question_in_many_forms_is_one_prompt(kind):
    assert read(READ[kind]).messages == [USER] and read(READ[kind]).row_key == read("What is 1+1?").row_key


def test_roles_and_order_are_kept():
    turns = [("system", "Be kind."), ("human", "Hi"), ("gpt", "Hello."), ("human", "What is 1+1?")]
    chat = read([{"from": role, "value": text} for role, text in turns]).messages
    assert chat == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
        USER,
    ]


@pytest.mark.parametrize("answer", [{"role": "assistant", "content": "two"}, {"from": "gpt", "value": "<think>"}])
def test_the_answer_that_a_chat_of_others_ends_in_is_left_out_and_told(answer):
    with pytest.warns(UserWarning, match="column 'prompt' end in an answer of the assistant: it is left out"):
        assert read([USER, answer]).row_key == read([USER]).row_key


REFUSED = [
    (None, "None (NoneType) is not a prompt"),
    ("", "message 0, by 'user', is empty"),
    ("  \n", "message 0, by 'user', is empty"),
    (7, "7 (int) is not a prompt"),
    ([], "[] (list) is not a prompt"),
    (["What is 1+1?"], "message 0 is 'What is 1+1?' (str)"),
    ([{"content": "You are kind."}, USER], "message 0 has no role, only 'content'"),
    ([USER, {"role": None, "content": "Hi"}], "message 1 has no role"),
    ([{"role": "assistant", "content": "two"}], "the last message is by 'assistant'"),
    ([{"role": "half \ud83d", "content": "Hi"}, USER], "the role of message 0 has half of a surrogate pair"),
    ([{"role": "user", "content": [{"text": ["Hi"]}]}], "message 0 has a part whose text is ['Hi'] (list)"),
    ([{"role": "user", "content": [TEXT, 7]}], "message 0 has a part whose text is 7 (int)"),
    ([{"role": "system", "content": ""}], "the last message is by nobody"),
    ([{"role": "user", "content": [TEXT, {"type": "image", "url": "x"}]}], "message 0 has a part of type 'image'"),
    ([{"role": "user", "content": []}], "message 0, by 'user', is empty"),
    ([{"role": "user", "content": {"text": "Hi"}}], "the content of message 0 is {'text': 'Hi'} (dict)"),
    ([USER, {"role": "assistant", "content": None, "tool_calls": CALL}], "the last message is by 'assistant'"),
    ([USER, {"role": "assistant", "content": "Hm", "tool_calls": [7]}, USER], "a list of JSON objects is expected"),
    (
        [USER, {"role": "assistant", "content": "Hm", "tool_calls": "x"}, USER],
        "tool_calls of message 1 cannot be read",
    ),
    ([USER, {"role": "assistant", "content": "Hm", "function_call": CALL[0]}, USER], "message 1 has 'function_call'"),
    ([{"role": "tool", "content": None}], "message 0, by 'tool', is empty"),
    ("half \ud83d of it", "message 0 has half of a surrogate pair"),
]


@pytest.mark.parametrize(("prompt", "seen"), REFUSED, ids=[seen for _, seen in REFUSED])
def test_what_cannot_be_used_is_refused_by_name(prompt, seen):
    with pytest.raises(PromptError) as caught:
        read(prompt)
    message = str(caught.value)
    assert message.startswith("Row 'a': column 'prompt': ") and seen in message and "is expected" in message


READ_CHATS = [
    [USER, {"role": "assistant", "content": None, "tool_calls": CALL}, {"role": "tool", "content": ""}],
    [USER, {"role": "assistant", "content": "", "tool_calls": CALL}, {"role": "tool", "content": "2", "name": "add"}],
    [USER, {"role": "assistant", "content": "Hm", "tool_calls": CALL}, {"role": "tool", "content": "2"}, USER],
    [USER, {"role": "tool", "content": "2", "tool_call_id": "7"}],
]


@pytest.mark.parametrize("chat", READ_CHATS)
def test_tool_calls_and_their_results_are_read_as_they_are(chat):
    assert read(chat).messages == chat
    nulls = {"name": None, "tool_calls": None, "tool_call_id": None}
    assert read([{**nulls, **message} for message in chat]).row_key == read(chat).row_key


KEYS = st.sampled_from(["role", "content", "from", "value", "type", "text", "tool_calls"])
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary()


@pytest.mark.slow
@given(st.recursive(LEAVES, lambda inner: st.lists(inner) | st.dictionaries(KEYS, inner)))
def test_whatever_stands_in_the_column_gives_messages_or_a_reason(value):
    for prompt in (value, [value], [{"role": "user", "content": value}]):
        try:
            prompt = read(prompt)
        except PromptError:
            continue
        assert all(isinstance(m["content"], str) or m["tool_calls"] for m in prompt.messages)


def test_a_finished_row_says_what_it_answers():
    chat = [{"role": "system", "content": "Be kind."}, USER]
    finished = [{**message, "thinking": None} for message in chat] + [{"role": "assistant", "content": "two"}]
    assert finished_prompt_hash(finished) == finished_prompt_hash(chat) == prompt_hash(chat) == read(chat).prompt_hash
    assert finished_prompt_hash(finished, {"gold": 2}) != finished_prompt_hash(finished)


def test_what_is_hashed_does_not_depend_on_the_format_of_the_table():
    plain = {"tests": [{"input": "1", "output": "2"}], "weights": [0.5, 1.0], "level": 3}
    arrow = {
        "level": np.int64(3),
        "weights": np.array([0.5, 1.0]),
        "tests": ({"input": "1", "output": "2", "x": None},),
    }
    assert prompt_hash([USER], plain) == prompt_hash([USER], arrow)
    assert prompt_hash([USER], {**plain, "level": 4}) != prompt_hash([USER], plain)
    assert prompt_hash([USER], {"image": b"1"}) != prompt_hash([USER], {"image": b"2"})
    assert prompt_hash([USER], {"many": np.arange(5000)}) != prompt_hash([USER], {"many": np.arange(5000) // 2})


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("features", [None, Features({"prompt": Json()})])
def test_odd_rows_are_rows_beside_the_others(features, stream, tmp_path):
    chats = [[USER], [{"role": "user", "content": None}], [{"role": "system", "content": None}, USER]]
    if features is not None:
        chats += [[{"role": "user", "content": [TEXT]}], [{"content": "Hi"}], "What is 1+1?"]
    dataset = Dataset.from_list([{"prompt": chat} for chat in chats], features=features)
    expected = ["stop", "error", "stop", "stop", "error", "stop"][: len(chats)]
    given = dataset.to_iterable_dataset() if stream else dataset
    rows = rows_of(given, scripted(id_column=None))
    assert [row["finish_reason"] for row in rows] == expected
    with scripted(id_column=None) as transform:
        given.map(transform, batched=True, features=transform.features(given)).to_parquet(tmp_path / "rows.parquet")
    assert Dataset.from_parquet(str(tmp_path / "rows.parquet"))["finish_reason"][:] == expected


@pytest.mark.parametrize(
    ("id", "seen"), [(None, "no id"), ("", "no id"), (float("nan"), "no id"), ("half \ud83d", "half of a surrogate")]
)
def test_an_id_that_names_no_row_is_refused(id, seen):
    reader = PromptReader(Settings.check(id_column="id"), ["id", "prompt"])
    with pytest.raises(PromptError, match=seen):
        reader.read({"id": id, "prompt": "Hi"})
