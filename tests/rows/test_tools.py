"""Tools and tool calls: both models see them and training renders what they saw, or the row says why not."""

import json

import pytest
from datasets import Dataset, Features, Json, List, Value, load_dataset
from transformers import AutoTokenizer

from tessy_hf import Script, ScriptedEngine, Speaker, TessyTransform, demo
from tessy_hf.cluster.merge import Merge
from tessy_hf.errors import PromptError
from tessy_hf.rows.prompt import finished_prompt_hash, prompt_hash
from tessy_hf.rows.tools import read_calls, read_tools, stored_tools
from tessy_hf.run.finished import Rows
from tests.test_transform import rows_of

CALC = {"type": "function", "function": {"name": "calc", "parameters": {"x": {"type": "integer"}}}}
SEARCH = {"type": "function", "function": {"name": "search", "parameters": {"query": {"type": "string"}}}}
CALL = [{"type": "function", "function": {"name": "calc", "arguments": {"x": 1}}}]
USER = {"role": "user", "content": "What is 1+1?"}
RESULT = {"role": "tool", "content": "2", "name": "calc"}
CHAT = [USER, {"role": "assistant", "content": None, "tool_calls": CALL}, RESULT]

TEMPLATE = (
    "{% if tools %}<|im_start|>system\nTOOLS {{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}{{ ' ' + m.name if 'name' in m else '' }}\n"
    "{{ m.content if m.content is not none else '' }}"
    "{% if 'tool_calls' in m %}{% for c in m.tool_calls %}CALL {{ c | tojson }}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WITHOUT = TEMPLATE.replace("tools", "nothing")
WITHOUT_CALLS = TEMPLATE.replace("tool_calls", "nothing")
WITHOUT_RESULTS = TEMPLATE.replace("m.content is", "m.role != 'tool' and m.content is")


class Watched(ScriptedEngine):
    """Keeps the prompts that it is asked with."""

    def __init__(self, template):
        tokenizer = AutoTokenizer.from_pretrained(demo.STUDENT)
        tokenizer.chat_template = template
        super().__init__(lambda row: Script("okay so 1 + 1 = 2", "two ."), tokenizer=tokenizer)
        self.prompts = {}

    async def complete(self, request):
        self.prompts.setdefault(request.row, self.tokenizer.decode(request.prompt_ids))
        return await super().complete(request)


def transform(student=TEMPLATE, teacher=TEMPLATE, **settings):
    speakers = {"student": Speaker(Watched(student)), "teacher": Speaker(Watched(teacher))}
    return TessyTransform(**speakers, **{"method": "student-only", "id_column": "id", "journal": None, **settings})


def asked(prompts, tools, features=None):
    ids = [f"r{number}" for number in range(len(prompts))]
    return Dataset.from_dict({"id": ids, "prompt": prompts, "tools": tools}, features=features)


def as_json(tools):
    return Features({"id": Value("string"), "prompt": List(Json()), "tools": tools})


DATASETS = {
    "structs that Arrow fills in": asked([CHAT, [USER], CHAT], [[CALC, SEARCH], [SEARCH], None]),
    "JSON": asked([CHAT, [USER], CHAT], [[CALC, SEARCH], [], None], as_json(Json())),
    "lists of JSON": asked([CHAT, [USER], CHAT], [[CALC, SEARCH], [], None], as_json(List(Json()))),
    "JSON strings": asked([[USER], [USER]], [json.dumps([CALC, SEARCH]), ""]),
}


def check_trained(rows, engine, names):
    """Check that what a trainer renders of the rows begins with what the models were asked."""
    for row, name in zip(rows, names, strict=True):
        tools = json.loads(row["tools"]) if row["tools"] is not None else None
        trained = engine.tokenizer.apply_chat_template(row["messages"], tools=tools, tokenize=False)
        assert trained.startswith(engine.prompts[name]) and trained.rstrip().endswith("two .<|im_end|>")


@pytest.mark.parametrize("form", [None, "arrow", "stream"])
@pytest.mark.parametrize("kind", DATASETS)
def test_training_renders_the_tools_that_the_models_saw(kind, form, tmp_path):
    prompts = DATASETS[kind]
    given = prompts.to_iterable_dataset() if form == "stream" else prompts.with_format(form)
    with transform(journal=str(tmp_path / "rows.journal")) as tessy:
        mapped = given.map(tessy, batched=True, features=tessy.features(given))
        mapped.to_parquet(tmp_path / "rows.parquet")
        engine = tessy.student.engine
    assert "TOOLS" in engine.prompts["r0"] and '"calc"' in engine.prompts["r0"] and "null" not in engine.prompts["r0"]
    rows = load_dataset("parquet", data_files=str(tmp_path / "rows.parquet"), split="train", cache_dir=str(tmp_path))
    check_trained(rows, engine, prompts["id"])
    check_trained(Rows(rows).dataset().select_columns(["messages", "tools"]), engine, prompts["id"])
    check_trained(Rows(tmp_path / "rows.journal").dataset(), engine, prompts["id"])
    assert all(message.get("tool_calls") in (None, CALL) for row in rows for message in row["messages"])


@pytest.mark.parametrize("place", ["parts", "journal"])
def test_rows_with_tools_are_found_again_and_merged(place, tmp_path):
    prompts = DATASETS["structs that Arrow fills in"]
    settings = {place: str(tmp_path / "kept")}
    first = rows_of(prompts, transform(**settings))
    tessy = transform(**settings)
    assert rows_of(prompts, tessy) == first and not tessy.student.engine.prompts
    merged = Merge([tmp_path / "kept"], prompts, settings=transform().settings)
    assert list(merged.rows()) == first
    merged.write(tmp_path / "merged.parquet")
    again = Merge([tmp_path / "merged.parquet"], prompts, settings=transform().settings)
    assert not again.report.missing and list(again.rows()) == first


REFUSED = {
    "tools": (WITHOUT, [USER], "does not render the column 'tools'"),
    "calls": (WITHOUT_CALLS, CHAT, "does not render the tool_calls of message 1"),
    "results": (WITHOUT_RESULTS, CHAT, "does not render the tool's result in message 2"),
    "unnamed": (
        TEMPLATE.replace("c | tojson", "c.name"),
        [*CHAT, USER],
        "does not render the tool_calls of message 1",
    ),
    "raising": ("{{ raise_exception('no tools') if tools }}" + TEMPLATE, [USER], "no tools"),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize(
    ("method", "other"),
    [
        ("student-only", "student"),
        ("teacher-only", "student"),
        ("teacher-think", "teacher"),
        ("teacher-answer", "teacher"),
    ],
)
def test_a_template_that_drops_tools_refuses_the_row_and_no_other(kind, method, other):
    template, chat, reason = REFUSED[kind]
    prompts = asked([chat, [USER]], [[CALC], None])
    refused, plain = rows_of(prompts, transform(method=method, **{other: template}))
    assert refused["finish_reason"] == "error" and reason in refused["error"]
    assert plain["finish_reason"] == "stop" and plain["tools"] is None


def test_tools_beside_text_are_kept_out_of_training_and_said(capfd):
    prompts = asked(["What is 1+1?"], [json.dumps([CALC])])
    tessy = transform()
    [row] = rows_of(prompts, tessy)
    assert row["tools"] is None and row["source_tools"] == json.dumps([CALC])
    check_trained([row], tessy.student.engine, ["r0"])
    assert "tools are not shown beside prompts that are text" in capfd.readouterr().err


def test_a_methods_own_question_needs_the_users():
    row, *_ = rows_of(asked([CHAT], [None]), transform(method="teacher-reference"))
    assert row["finish_reason"] == "error" and "the last message is str by 'tool'" in row["error"]


def test_tools_stay_where_the_prompts_columns_are_removed():
    prompts = asked([[USER]], [[CALC]])
    with transform() as tessy:
        rows = tessy.map(prompts, remove_columns=prompts.column_names)
    assert json.loads(rows["tools"][0]) == [CALC] and "id" not in rows.column_names


def test_columns_that_trainers_read_and_the_student_did_not_see_are_renamed():
    prompts = asked([[USER]], [[CALC]]).add_column("chat_template_kwargs", [{"enable_thinking": False}])
    with transform() as tessy:
        rows = prompts.map(tessy, batched=True, features=tessy.features(prompts))
    released = Rows(rows).features
    assert released["source_tools"] == prompts.features["tools"] and released["tools"] == Value("string")
    assert "source_chat_template_kwargs" in released
    unseen = rows.remove_columns(["tools", "source_tools"]).add_column("tools", [[CALC]])
    assert "source_tools" in Rows(unseen).features and "tools" not in Rows(unseen).features


# --- reading


def test_tools_in_any_form_are_one_question():
    filled = [{**CALC, "strict": None}, SEARCH]
    for form in ([CALC, SEARCH], filled, json.dumps([CALC, SEARCH], indent=1), [json.dumps(CALC), json.dumps(SEARCH)]):
        assert read_tools(form) == json.loads(stored_tools(form)) == [CALC, SEARCH]
        assert prompt_hash([USER], {"tools": form}) == prompt_hash([USER], {"tools": stored_tools(filled)})
    assert prompt_hash([USER], {"tools": [CALC]}) != prompt_hash([USER], {"tools": [SEARCH]})
    for nothing in (None, [], "", "[]", "null"):
        assert read_tools(nothing) is None and stored_tools(nothing) is None


@pytest.mark.parametrize("value", ["calc", [1], {"name": "calc"}, "{}x", ["calc"], [b"calc"], '["\\ud83d"]', 7])
def test_what_is_no_list_of_schemas_is_refused_and_kept(value):
    with pytest.raises(PromptError, match="column 'tools'"):
        read_tools(value)
    assert isinstance(stored_tools(value), str)


def test_nulls_in_json_strings_are_arguments():
    call = {"function": {"name": "calc", "arguments": {"x": None}}}
    assert read_calls(json.dumps([call]), 0) == [call]
    assert read_calls([call], 0) == [{"function": {"name": "calc", "arguments": {}}}]


def test_a_finished_row_says_what_it_answers():
    finished = [{"name": None, "tool_call_id": None, "tool_calls": None, **message} for message in CHAT]
    assert finished_prompt_hash([*finished, {"role": "assistant", "content": "two"}]) == prompt_hash(CHAT)
