"""Rows of every family of thinking formats: what is trained is what was prompted and written."""

import copy
import sys
from pathlib import Path

import pytest
from datasets import Dataset

from tessy_hf import Script, ScriptedEngine, Speaker, TessyTransform
from tessy_hf.errors import SettingsError, TemplateError
from tessy_hf.rows.columns import assistant_text, pieces
from tessy_hf.text.thinking_format import ThinkingFormat
from tests.families import FAMILIES, tokenizer
from tests.rules import RulePredictor, by_first_letter

PROMPTS = Dataset.from_dict({"prompt": ["What does </think> or [THINK] mean?", "<think>"]})
TEACHER = [" Stop Please be so", " Take care"]
STUDENT = ["hello all Zebra one", " go Now", " it"]
WROTE = "hello all Stop Please go Take it"


def speaker(name, thinking, answer="It is 3.", **options):
    """A scripted speaker of a family."""
    engine = ScriptedEngine(lambda row: Script(thinking, answer), tokenizer=tokenizer(name), name=name)
    boundary = RulePredictor(by_first_letter)
    return Speaker(engine, boundary, template_options=FAMILIES[name].options, **options)


def rows_of(teacher, student, method, prompts=PROMPTS, **settings):
    settings = {"journal": None, "temperature": 0, **settings}
    with TessyTransform(teacher=teacher, student=student, method=method, **settings) as tessy:
        return list(prompts.map(tessy, batched=True, features=tessy.features(prompts)))


def trained(name, row, **options):
    """A row as a trainer renders it: `datasets` gives the keys of one message to all."""
    messages = [{key: value for key, value in turn.items() if value is not None} for turn in row["messages"]]
    return tokenizer(name).apply_chat_template(messages, tokenize=False, **FAMILIES[name].options, **options)


def check_row(name, row, student):
    """The row's text as it is prompted, trained and cut into spans."""
    prompt = [turn for turn in row["messages"] if turn["role"] == "user"]
    prompted = student.vocabulary.decode(student.open_turn(prompt)[0])
    assert prompted.endswith(FAMILIES[name].prompted)
    assert trained(name, row).startswith(prompted + row["thinking"] + FAMILIES[name].between + row["answer"])
    whole = assistant_text(row)
    assert "".join(whole[span["start"] : span["end"]] for span in row["spans"]) == whole
    for part in ("thinking", "answer"):
        assert "".join(piece.text for piece in pieces(row) if piece.part == part) == row[part]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_student_alone_trains_on_what_it_wrote(name):
    student = speaker(name, "Okay, so I count.\n\n  Then 2 + 3 = 5 </b>.")
    for row in rows_of(student, student, "student-only"):
        assert (row["finish_reason"], row["error"]) == ("stop", None)
        assert row["thinking"] == "Okay, so I count.\n\n  Then 2 + 3 = 5 </b>."
        assert row["answer"] == ("" if name == "instruct" else "It is 3.")
        check_row(name, row, student)


@pytest.mark.parametrize("teacher", ["gpt-oss", "Qwen3", "instruct"])
@pytest.mark.parametrize("name", FAMILIES)
def test_any_teacher_writes_with_a_student_of_any_family(name, teacher):
    student = speaker(name, STUDENT)
    for row in rows_of(speaker(teacher, TEACHER), student, "tessy"):
        assert (row["finish_reason"], row["thinking"]) == ("stop", WROTE)
        assert {piece.author for piece in pieces(row)} == {"teacher", "student"}
        check_row(name, row, student)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_loss_by_author_finds_every_span_in_the_trained_text(name, monkeypatch):
    pytest.importorskip("trl")
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "recipes" / "sft"))
    from author_weights import locate

    monkeypatch.delitem(sys.modules, "author_weights")
    (row, _) = rows_of(speaker("gpt-oss", TEACHER), speaker(name, STUDENT), "tessy")
    text = trained(name, row)
    start, ends = locate(row, text)
    spans = [text[begin:end].strip() for begin, end in zip([start, *ends], ends, strict=False)]
    bare = [span.removeprefix(FAMILIES[name].between.strip()).strip() for span in spans]
    assert all(piece.text.strip() in span for piece, span in zip(pieces(row), bare, strict=True))


def test_a_chat_of_several_turns_trains_on_what_was_prompted():
    chat = [{"role": "user", "content": "2 + 1?"}, {"role": "assistant", "content": "3"}, *PROMPT_OF_TWO]
    student = speaker("Qwen3", "okay so 5 .")
    (row,) = rows_of(student, student, "student-only", Dataset.from_dict({"prompt": [chat]}))
    assert row["finish_reason"] == "stop"


PROMPT_OF_TWO = [{"role": "user", "content": "And 2 more?"}]


# --- markers as text


@pytest.mark.parametrize(
    ("name", "thinking", "answer"),
    [
        ("Qwen3", "okay so a <think> tag begins it .", "Yes ."),
        ("Qwen3", "okay so the </think> tag ends it .", "Yes ."),
        ("Qwen3", "okay so they ask .", "Put <think> before and </think> after ."),
        ("GLM-4.5", "okay so the </think> tag ends it .", "Yes ."),
        ("GLM-4.5", "okay so they ask .", "Put </think> after ."),
        ("Qwen3.8", "okay so the </think> tag ends it .", "Yes ."),
        ("gpt-oss", "okay so <|end|> ends it .", "Yes ."),
        ("Gemma-4", "okay so they ask .", "Put <channel|> after ."),
    ],
)
def test_a_row_that_the_template_would_cut_ends_as_an_error_for_good(name, thinking, answer, tmp_path):
    asked = []
    engine = ScriptedEngine(
        lambda row: Script(thinking, answer), tokenizer=tokenizer(name), fault=lambda request: asked.append(request)
    )
    student = Speaker(engine, template_options=FAMILIES[name].options)
    settings = {"journal": str(tmp_path / "rows.journal"), "prompts": PROMPTS.select([1])}
    first = rows_of(student, student, "student-only", **settings)
    requests = len(asked)
    again = rows_of(student, student, "student-only", **settings)
    assert len(asked) == requests > 0
    for (row,) in (first, again):
        assert row["finish_reason"] == "error"
        assert "would be trained on other text than was written" in row["error"]
        assert any(mark in row["error"] for mark in ("<think>", "</think>", "<|end|>", "<channel|>"))


@pytest.mark.parametrize("name", ["Qwen3.8", "gpt-oss", "Kimi-K2-Thinking"])
def test_an_answer_with_markers_is_kept_where_the_template_keeps_it(name):
    student = speaker(name, "okay so they ask .", "Put <think> before and </think> after .")
    (row, _) = rows_of(student, student, "student-only")
    assert row["finish_reason"] == "stop"
    check_row(name, row, student)


def test_a_marker_of_two_authors_words_ends_the_row_as_an_error():
    marker = "here is my Response:"
    student = speaker("instruct", ["here is my Zoo", " go"], thinking_format=ThinkingFormat("Now:\n", marker, marker))
    (row, _) = rows_of(speaker("gpt-oss", [" Response: so", " Take"]), student, "tessy")
    assert row["finish_reason"] == "error"
    assert f"the thinking contains its own end marker {marker!r}" in row["error"]


@pytest.mark.parametrize("k", [1, 3, 20, "auto"])
def test_a_marker_of_several_words_ends_the_thinking_wherever_chunks_end(k):
    student = speaker("Granite-3", "okay so here is my response: no, Here is my response:\n\nThree.")
    for method in ("student-only", "tessy"):
        (row, _) = rows_of(speaker("gpt-oss", [" Stop"]), student, method, chunk_tokens=k)
        if method == "student-only":
            assert row["thinking"] == "okay so here is my response: no,"
        check_row("Granite-3", row, student)


# --- formats of the user's own


@pytest.mark.parametrize(
    "given",
    [
        ThinkingFormat("<reason>\n", "\n</reason>\n", "</reason>"),
        {"open": "<reason>\n", "close": "\n</reason>\n", "end_marker": "</reason>"},
    ],
)
def test_a_format_of_ones_own(given):
    student = speaker("instruct", "okay so 3 .", thinking_format=given)
    (row, _) = rows_of(student, student, "student-only")
    assert row["messages"][-1]["content"] == "<reason>\nokay so 3 .\n</reason>\nIt is 3."
    assert pieces(row)[0].text == "okay so 3 ."


def test_a_format_of_ones_own_under_a_key():
    format_ = {"open": "<think>\n", "close": "\n</think>\n\n", "end_marker": "</think>", "key": "reasoning_content"}
    student = speaker("Qwen3", "okay so 3 .", thinking_format=format_)
    (row, _) = rows_of(student, student, "student-only")
    assert row["messages"][-1] == {"role": "assistant", "content": "It is 3.", "reasoning_content": "okay so 3 ."}
    check_row("Qwen3", row, student)


def test_a_format_decides_the_fingerprint_only_where_it_is_given():
    plain, none = speaker("Qwen3", "a"), speaker("Qwen3", "a", thinking_format="none")
    assert "thinking_format" not in plain.identity
    assert none.identity["thinking_format"]["name"] == "none"


def test_the_manifest_tells_the_formats_as_the_templates_have_them():
    student = speaker("GLM-4.5", "a")
    with TessyTransform(teacher=student, student=student, method="student-only", journal=None) as tessy:
        tessy.features(PROMPTS)
        told = tessy.record().student.thinking_format
    assert (told["name"], told["open"], told["close"]) == ("think-tags", "\n<think>", "</think>\n")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("thinky", "Expected is one of harmony"),
        ({"open": "<a>", "end": "</a>"}, "unexpected keyword"),
        ({"open": "<a>", "close": "</a>", "end_marker": "</b>"}, "`close` must contain `end_marker`"),
        ({"open": "<a>"}, "has `open` and `end_marker`"),
        ({"final_answer": "("}, "unterminated subpattern"),
        (3, "is not a thinking format"),
    ],
)
def test_what_is_no_format_is_refused(given, told):
    with pytest.raises(SettingsError, match="thinking_format=") as caught:
        speaker("instruct", "a", thinking_format=given)
    assert told in str(caught.value)


# --- models that do not think


def test_an_instruct_pair_alternates_the_whole_answer():
    teacher, student = speaker("instruct", TEACHER), speaker("instruct", STUDENT)
    (row, _) = rows_of(teacher, student, "tessy")
    assert (row["finish_reason"], row["thinking"], row["answer"]) == ("stop", WROTE, "")
    assert row["messages"][-1]["content"] == WROTE


@pytest.mark.parametrize("k", [1, 3, 20, "auto"])
@pytest.mark.parametrize("stream", [False, True])
def test_the_mark_of_the_final_answer_hands_it_to_the_student(k, stream):
    mark = {"final_answer": r"(Final )?answer:"}
    teacher = speaker("instruct", [" Stop Please be so", " Total The answer: 4, Or so"])
    student = speaker("instruct", ["hello all Zebra one", " go Now"], " 3, I think.", thinking_format=mark)
    settings = {"chunk_tokens": k, "stream": stream}
    (row, _) = rows_of(teacher, student, "tessy", **settings)
    # The teacher's "answer:" is style by the rule of these tests, so the student takes over before it.
    assert row["thinking"].startswith("hello all Stop Please go Total The")
    student = speaker("instruct", ["hello all answer: 5", " go Now"], " 3, I think.", thinking_format=mark)
    (row, _) = rows_of(teacher, student, "tessy", **settings)
    assert (row["thinking"], row["answer"]) == ("hello all answer:", " 3, I think.")
    assert row["messages"][-1]["content"] == "hello all answer: 3, I think."
    assert [piece.part for piece in pieces(row)] == ["thinking", "answer"]


def test_a_mark_may_lie_in_the_spans_of_two_authors():
    mark = {"final_answer": "all Total:"}
    teacher, student = speaker("instruct", [" Total: 4"]), speaker("instruct", ["hello all Zebra"], " 3.")
    student.given_format = ThinkingFormat(**mark)
    (row, _) = rows_of(teacher, student, "tessy")
    assert [(piece.author, piece.text) for piece in pieces(row)] == [
        ("student", "hello all"),
        ("teacher", " Total:"),
        ("student", " 3."),
    ]


@pytest.mark.parametrize(
    ("teacher", "content"),
    [("Qwen3", "Stop Please It is 3."), ("gpt-oss", "Stop Please It is 3."), ("instruct", "Stop Please")],
)
def test_a_teachers_thinking_becomes_an_instruct_students_chain_of_thought(teacher, content):
    student = speaker("instruct", "s", " It is 3.")
    (row, _) = rows_of(
        speaker(teacher, "Stop Please"), student, "teacher-think" if teacher != "instruct" else "teacher-only"
    )
    assert row["messages"][-1]["content"] == content
    check_row("instruct", row, student)


def test_a_teachers_own_answer_is_a_paragraph_of_its_own():
    student = speaker("instruct", "s")
    (row, _) = rows_of(speaker("Qwen3", "Stop Please", "It is 4."), student, "teacher-only")
    assert row["messages"][-1]["content"] == "Stop Please\n\nIt is 4."
    check_row("instruct", row, student)


def test_a_verifier_reads_the_whole_text_of_a_model_that_does_not_think():
    student = speaker("instruct", "so it is 3 .")
    prompts = PROMPTS.add_column("expected", ["3", "4"])
    verifier = {"name": "number", "column": "expected"}
    rows = rows_of(student, student, "student-only", prompts, verifier=verifier)
    assert [row["verdict"] for row in rows] == [1.0, 0.0]


def test_a_hybrid_model_can_be_used_without_thinking():
    engine = ScriptedEngine(lambda row: Script("so 3 .", ""), tokenizer=tokenizer("Qwen3"))
    student = Speaker(engine, thinking_format="none", template_options={"enable_thinking": False})
    (row, _) = rows_of(student, student, "student-only")
    assert row["messages"][-1]["content"] == "so 3 ."


@pytest.mark.parametrize(
    ("teacher", "student", "method"),
    [
        ("instruct", "instruct", "teacher-think"),
        ("instruct", "instruct", "teacher-answer"),
        ("Qwen3", "instruct", "teacher-answer"),
        ("instruct", "Qwen3", "teacher-only"),
        ("instruct", "Qwen3", "teacher-mix"),
        ("instruct", "Qwen3", "tessy-teacher-answer"),
    ],
)
def test_methods_that_need_an_answer_apart_are_refused(teacher, student, method):
    with pytest.raises(SettingsError, match="no one marks where the chain of thought ends"):
        rows_of(speaker(teacher, "a"), speaker(student, "a"), method)


# --- refusals


@pytest.mark.parametrize(
    ("name", "template", "told"),
    [
        ("EXAONE-Deep, kept", "{{ m.content.split('</thought>')[-1] }}", "drops the thinking"),
        ("Olmo-3", "{{ m.content.split('</think>')[-1] }}", "drops the thinking"),
        ("Magistral", "{{ m.content | upper }}", "thinking_format=ThinkingFormat("),
    ],
)
def test_a_template_that_fits_no_format_is_refused_with_what_fits_its_family(name, template, told):
    engine = ScriptedEngine(lambda row: "a", tokenizer=copy.deepcopy(tokenizer(name)))
    student = Speaker(engine, chat_template=FAMILIES[name].template.replace("{{ m.content }}", template, 1))
    with pytest.raises(TemplateError) as caught:
        student.check_templates(student=True)
    for shown in (told, FAMILIES[name].between.strip(), "Speaker(..., chat_template=...)"):
        assert shown in str(caught.value)


@pytest.mark.parametrize(("name", "option"), [("Granite-3", "thinking"), ("Gemma-4", "enable_thinking")])
def test_a_model_whose_thinking_is_not_switched_on_is_refused(name, option):
    engine = ScriptedEngine(lambda row: "a", tokenizer=tokenizer(name))
    with pytest.raises(TemplateError) as caught:
        Speaker(engine).check_templates(student=False)
    assert f'template_options={{"{option}": True}}' in str(caught.value)
