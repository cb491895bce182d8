"""A model family's way to think is told from its tokenizer, and prompts are rendered with the thinking left open."""

import copy
from dataclasses import replace

import pytest

from tessy_hf.errors import PromptError, TemplateError
from tessy_hf.text.thinking_format import HARMONY, NONE, THINK_TAGS, check_templates, detect, end_ids, render
from tessy_hf.text.vocabulary import Vocabulary
from tests.rules import vocabulary
from tests.worlds import CHATML, HARMONY_SYSTEM, R1, R1_KEEPS, make_tokenizer

USER = [{"role": "user", "content": "How many?"}]
ROW = [*USER, {"role": "assistant", "content": "<think>\nOkay, three.\n</think>\n\nThree."}]


def with_template(kind, template):
    """One kind of test tokenizer with another chat template."""
    tokenizer = copy.deepcopy(make_tokenizer(kind))
    tokenizer.chat_template = template
    return Vocabulary(tokenizer, f"my/{kind}")


# --- telling families apart


@pytest.mark.parametrize(
    ("kind", "thinking_format"), [("qwen", THINK_TAGS), ("r1", THINK_TAGS), ("gpt2", THINK_TAGS), ("harmony", HARMONY)]
)
def test_a_thinking_format_is_told_from_the_tokenizer_whatever_the_model_is_called(kind, thinking_format):
    for name in ("gpt-oss-20b", "Qwen/Qwen3-8B", "my/finetune"):
        found = detect(Vocabulary(make_tokenizer(kind), name))
        assert replace(found, prompted="") == thinking_format
        assert found.prompted == ("<think>\n" if kind == "r1" else "")  # its template opens the thinking itself


def test_thinking_tags_in_the_vocabulary_are_enough():
    assert detect(with_template("qwen", CHATML)) is THINK_TAGS


def test_a_model_without_thinking_marks_writes_plain_text():
    assert detect(with_template("gpt2", CHATML)) is NONE
    assert NONE.assistant_message("First 3. ", "Then 4.") == {"role": "assistant", "content": "First 3. Then 4."}


@pytest.mark.parametrize("kind", ["qwen", "r1", "gpt2", "harmony"])
def test_every_special_token_and_the_end_marker_end_the_thinking(kind):
    known = vocabulary(kind)
    ends = end_ids(detect(known), known)
    assert known.special_ids <= ends and known.tokenizer.eos_token_id in ends
    assert (known.token_id(detect(known).end_marker) in ends) == (kind != "gpt2")
    assert len(ends - known.special_ids) == {"qwen": 1, "r1": 1, "gpt2": 0, "harmony": 0}[kind]


# --- rendering an open turn


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("qwen", "<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n<think>\n"),
        ("gpt2", "<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n<think>\n"),
        ("r1", "<｜begin▁of▁sentence｜><｜User｜>How many?<｜Assistant｜><think>\n"),
        (
            "harmony",
            HARMONY_SYSTEM
            + "<|start|>user<|message|>How many?<|end|><|start|>assistant<|channel|>analysis<|message|>",
        ),
    ],
)
def test_prompts_are_rendered_with_the_thinking_left_open_once(kind, expected):
    assert render(vocabulary(kind), detect(vocabulary(kind)), USER) == expected


def test_template_options_reach_the_template():
    template = "{{ effort }}{% for m in messages %}{{ m.content }}{% endfor %}"
    assert render(with_template("qwen", template), THINK_TAGS, USER, effort="high") == "highHow many?<think>\n"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].content + 1 }}", "str"),
        ("{{ messages[7].content }}", "messages"),
    ],
)
def test_messages_that_a_template_refuses_are_told_with_their_roles(template, reason):
    with pytest.raises(PromptError) as caught:
        render(with_template("qwen", template), THINK_TAGS, USER)
    for shown in ("'my/qwen'", "['user']", reason, "check the roles"):
        assert shown in str(caught.value)


# --- finished rows


def test_a_finished_row_is_written_in_the_students_own_format():
    assert THINK_TAGS.assistant_message("Okay, three.", "Three.") == ROW[1]
    assert THINK_TAGS.assistant_message("Okay", "", closed=False) == {"role": "assistant", "content": "<think>\nOkay"}
    message = {"role": "assistant", "thinking": "Okay, three.", "content": "Three."}
    assert HARMONY.assistant_message("Okay, three.", "Three.") == message


def test_open_and_close_frame_the_thinking_as_the_harmony_template_does():
    message = HARMONY.assistant_message("Okay.", "Three.")
    rendered = vocabulary("harmony").chat_text([*USER, message])
    framed = f"<|start|>assistant{HARMONY.open}Okay.{HARMONY.close}Three.<|return|>"
    assert rendered.endswith(framed)


# --- checks before a run starts


@pytest.mark.parametrize("kind", ["qwen", "gpt2", "harmony"])
@pytest.mark.parametrize("student", [True, False])
def test_templates_that_keep_the_thinking_pass(kind, student):
    assert check_templates(vocabulary(kind), detect(vocabulary(kind)), student=student) is None


def test_a_tokenizer_without_a_template_is_refused():
    with pytest.raises(TemplateError, match=r"'my/qwen' has no chat template.*Speaker\(\.\.\., chat_template"):
        check_templates(with_template("qwen", None), THINK_TAGS, student=False)


def test_a_students_template_that_drops_finished_thinking_is_refused():
    with pytest.raises(TemplateError) as caught:
        check_templates(vocabulary("r1"), THINK_TAGS, student=True)
    for shown in (
        "student 'r1'",
        "drops the thinking",
        "the chat template renders",
        "Speaker(..., chat_template=...)",
    ):
        assert shown in str(caught.value)
    check_templates(vocabulary("r1"), detect(vocabulary("r1")), student=False)  # a teacher's rows are never written
    keeps = with_template("r1", R1_KEEPS)
    check_templates(keeps, detect(keeps), student=True)


def test_a_students_template_that_drops_the_answer_is_refused():
    template = CHATML.replace("{{ m.content }}", "{{ m.content.split('</think>')[0] }}")
    with pytest.raises(TemplateError, match="drops the answer"):
        check_templates(with_template("qwen", template), THINK_TAGS, student=True)


SWITCHED = CHATML.replace(
    "<|im_start|>assistant\n{% endif %}",
    "<|im_start|>assistant\n{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}",
)


def test_a_template_that_closes_the_thinking_is_refused_until_it_is_switched_on():
    assert "enable_thinking" in SWITCHED
    known = with_template("qwen", SWITCHED)
    for options in ({}, {"enable_thinking": False}):
        with pytest.raises(TemplateError) as caught:
            check_templates(known, THINK_TAGS, student=False, **options)
        for shown in ("'my/qwen'", "does not leave the thinking open", "'<think>\\n'", 'template_options={"enable_'):
            assert shown in str(caught.value)
    on = {"enable_thinking": True}
    check_templates(known, detect(known, **on), student=True, **on)


def test_a_template_that_drops_the_prompt_is_refused():
    with pytest.raises(TemplateError, match="drops the prompt; it renders 'chat.jinja"):
        check_templates(with_template("qwen", "chat.jinja"), THINK_TAGS, student=False)


def test_another_name_of_the_assistants_role_in_finished_turns_is_told(caplog):
    known = with_template("qwen", CHATML.replace("<|im_start|>assistant", "<|im_start|>model"))
    check_templates(known, detect(known), student=True)
    assert "names the assistant otherwise" in caplog.text


def test_a_template_that_refuses_any_prompt_is_refused():
    with pytest.raises(TemplateError, match="not today"):
        check_templates(with_template("qwen", "{{ raise_exception('not today') }}"), THINK_TAGS, student=False)


def test_the_r1_template_opens_the_thinking_itself():
    assert R1.endswith("<think>\n{% endif %}")
    assert render(vocabulary("r1"), detect(vocabulary("r1")), USER).count("<think>") == 1
