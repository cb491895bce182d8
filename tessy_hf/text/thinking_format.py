"""Thinking formats of model families, and prompts rendered with the thinking left open.

Messages go in, the text of an open assistant turn comes out. Families are told apart by tokenizer and chat template,
never by a model's name; newlines and the message key are those of the template. Knows nothing of engines or of how
text is generated.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from os.path import commonprefix
from typing import Any

from tessy_hf.errors import PromptError, TemplateError
from tessy_hf.text.vocabulary import Vocabulary
from tessy_hf.trajectory import Message


@dataclass(frozen=True)
class ThinkingFormat:
    """How a model marks its thinking.

    Attributes:
        open: What stands before the thinking in an open assistant turn.
        close: What ends the thinking and opens the final answer; contains ``end_marker``.
        end_marker: The text by which the model ends its thinking. Empty for a model that does not think: its whole
            answer counts as thinking, up to ``final_answer`` where that is given.
        key: The key of a message under which the thinking stands without markers; ``None`` for ``content``, with them.
        final_answer: A regular expression for the mark of the final answer in a chain of thought. What follows it is
            the answer; the mark itself is the end of the thinking.
        name: The family; see :data:`FAMILIES`.
        prompted: What of ``open`` the template's generation prompt says already. Read from the template.
    """

    open: str = ""
    close: str = ""
    end_marker: str = ""
    key: str | None = None
    final_answer: str | None = None
    name: str = "own"
    prompted: str = ""

    @property
    def thinks(self) -> bool:
        """Whether the model marks its thinking."""
        return bool(self.end_marker)

    @property
    def row_marks(self) -> tuple[str, str]:
        """What opens and closes the thinking in the text that spans cover: nothing where a key tells it from the rest.

        Harmony's rows keep theirs.
        """
        return (self.open, self.close) if self.key is None or self.name == "harmony" else ("", "")

    def assistant_message(self, thinking: str, answer: str, closed: bool = True) -> dict[str, str]:
        """Return the assistant message of a finished row, to train on.

        Args:
            thinking: The thinking, without markers.
            answer: The final answer.
            closed: Whether the thinking ended; else the end marker is left out.
        """
        if self.key is not None:
            return {"role": "assistant", self.key: thinking, "content": answer}
        return {"role": "assistant", "content": self.open + thinking + (self.close if closed else "") + answer}


THINK_TAGS = ThinkingFormat("<think>\n", "\n</think>\n\n", "</think>", name="think-tags")
HARMONY = ThinkingFormat(
    "<|channel|>analysis<|message|>",
    "<|end|><|start|>assistant<|channel|>final<|message|>",
    "<|end|>",
    key="thinking",
    name="harmony",
)
NONE = ThinkingFormat(name="none")

FAMILIES = {
    one.name: one
    for one in (
        HARMONY,  # gpt-oss
        ThinkingFormat("<|channel>thought\n", "\n<channel|>", "<channel|>", name="gemma-channels"),  # Gemma 4
        ThinkingFormat("<seed:think>", "</seed:think>", "</seed:think>", name="seed-think"),  # Seed-OSS
        ThinkingFormat("[THINK]", "[/THINK]", "[/THINK]", name="mistral-think"),  # Magistral
        ThinkingFormat("<thought>\n", "\n</thought>\n\n", "</thought>", name="thought-tags"),  # EXAONE Deep
        ThinkingFormat(  # Granite 3
            "Here is my thought process:\n", "\n\nHere is my response:\n", "Here is my response:", name="granite-words"
        ),
        THINK_TAGS,  # Qwen3, DeepSeek-R1, GLM-4.5, Olmo 3, Kimi-K2-Thinking and most others
        NONE,  # instruct models
    )
}
"""The families that are told from a tokenizer, by name. The first that fits is taken."""

_log = logging.getLogger("tessy_hf")

KEYS = ("reasoning_content", "thinking", "reasoning")
"""Keys of thinking to prefer where a template reads several."""

_KEY = re.compile(r"\b\w*(?:reason|think|thought)\w*\b")

SWITCHES = ("enable_thinking", "thinking")
"""Options by which templates switch thinking on."""

_ALL_TOKENS = {"harmony": ("<|channel|>", "<|message|>", "<|start|>", "<|end|>")}
_USER = [{"role": "user", "content": "How many?"}]
_THINKING, _ANSWER = "Okay, so I count.\n\nThat makes three.", "Three."
_SAMPLE = {"thinking": _THINKING, "answer": _ANSWER}


# --- telling families apart


def detect(vocabulary: Vocabulary, given: ThinkingFormat | None = None, /, **options: Any) -> ThinkingFormat:
    """Detect a model's thinking format, with the newlines and the key of its chat template.

    Args:
        vocabulary: The model's vocabulary.
        given: The format or family that the user chose, where one was.
        **options: Passed to the chat template.
    """
    template = str(vocabulary.tokenizer.chat_template or "")
    family = given or next(one for one in FAMILIES.values() if _fits(one, vocabulary, template))
    if not template or not family.thinks:
        return family
    try:
        prompted = _opened_by_template(vocabulary, family, **options)
    except PromptError:  # check_templates tells why
        return family
    if family not in FAMILIES.values():  # the user's own, taken as it is
        return replace(family, prompted=prompted)
    draft = replace(family, open=prompted or family.open, prompted=prompted)
    read = _KEY.findall(template)
    for key in dict.fromkeys((family.key, None, *(key for key in KEYS if key in read), *read)):
        with suppress(PromptError):  # the next key may be the one that it accepts
            found = _read_template(vocabulary, replace(draft, key=key), **options)
            if found and misfit(vocabulary, found, _USER, _THINKING, _ANSWER, **options) is None:
                return family if found == family else found
    return draft


def _fits(family: ThinkingFormat, vocabulary: Vocabulary, template: str) -> bool:
    tokens = _ALL_TOKENS.get(family.name, (family.end_marker,))
    known = family.thinks and all(vocabulary.token_id(token) is not None for token in tokens)
    return known or family.open.strip() in template


def _opened_by_template(vocabulary: Vocabulary, family: ThinkingFormat, /, **options: Any) -> str:
    """Return how the template's generation prompt opens the thinking; empty where it does not."""
    prompt, start = _generation_prompt(vocabulary, **options), family.open.strip()
    before, found, after = prompt.rpartition(start)
    return found + after if start and not after.strip() else ""


def _generation_prompt(vocabulary: Vocabulary, /, **options: Any) -> str:
    both = [_rendered(vocabulary, _USER, generate, **options) for generate in (True, False)]
    return both[0][len(commonprefix(both)) :]


def _read_template(vocabulary: Vocabulary, draft: ThinkingFormat, /, **options: Any) -> ThinkingFormat | None:
    """Return the format with what the template renders around a finished row's thinking, ``None`` if it loses it."""
    row = [*_USER, draft.assistant_message(_THINKING, _ANSWER)]
    before, thought, rest = _rendered(vocabulary, row, False, **options).partition(_THINKING)
    close, answered, _ = rest.partition(_ANSWER)
    prompt = _as_trained(_rendered(vocabulary, _USER, True, **options).removesuffix(draft.prompted), before)
    opened = before[len(prompt) :]
    fits = thought and answered and before.startswith(prompt) and opened.strip() == draft.open.strip()
    return replace(draft, open=opened, close=close) if fits and close.count(draft.end_marker) == 1 else None


# --- rendering


def _rendered(vocabulary: Vocabulary, messages: Sequence[Message], generate: bool, /, **options: Any) -> str:
    """Render messages, with the prompt for the assistant's next turn or without.

    Raises:
        PromptError: The template refuses the messages.
    """
    from jinja2 import TemplateError as JinjaError

    try:
        return vocabulary.chat_text(messages, add_generation_prompt=generate, **options)
    except (JinjaError, TypeError, KeyError, ValueError) as error:
        roles = [message.get("role") for message in messages]
        raise PromptError(
            f"The chat template of {vocabulary.name!r} refused the messages (roles {roles}): {error}. "
            "Messages that the template accepts are expected; check the roles and their order."
        ) from error


def render(
    vocabulary: Vocabulary, thinking_format: ThinkingFormat, messages: Sequence[Message], /, **options: Any
) -> str:
    """Render ``messages`` through the model's own chat template, with the assistant's thinking left open.

    Args:
        vocabulary: The model's vocabulary.
        thinking_format: The model's thinking format, from :func:`detect`.
        messages: The chat, ending in the user's turn or a tool's result.
        **options: Passed to the chat template, for instance ``reasoning_effort="high"`` or ``tools=``.

    Raises:
        PromptError: The template refuses the messages.
    """
    text = _rendered(vocabulary, messages, True, **options)
    return text.removesuffix(thinking_format.prompted) + thinking_format.open


def end_ids(thinking_format: ThinkingFormat, vocabulary: Vocabulary) -> frozenset[int]:
    """Return the ids that end thinking: the end marker where it is one token, and every special token.

    Special tokens must not become text of the thinking, so each of them ends it as an end of sequence does.
    """
    marker = vocabulary.token_id(thinking_format.end_marker) if thinking_format.thinks else None
    return vocabulary.special_ids | (frozenset() if marker is None else frozenset({marker}))


# --- trained text is prompted text


def misfit(
    vocabulary: Vocabulary,
    thinking_format: ThinkingFormat,
    messages: Sequence[Message],
    thinking: str,
    answer: str,
    /,
    **options: Any,
) -> str | None:
    """Say where a finished row is trained on other text than was prompted and written; ``None`` if nowhere.

    Raises:
        PromptError: The template refuses the messages.
    """
    if thinking_format.thinks and thinking_format.end_marker in thinking:
        return f"the thinking contains its own end marker {thinking_format.end_marker!r} as text"
    row = [*messages, thinking_format.assistant_message(thinking, answer)]
    trained = _rendered(vocabulary, row, False, **options)
    prompt = _as_trained(render(vocabulary, thinking_format, messages, **options), trained)
    expected = prompt + thinking + thinking_format.close + answer
    if trained.startswith(expected):
        return None
    at = max(0, len(commonprefix([trained, expected])) - 10)
    marks = (mark.strip() for mark in (thinking_format.open, thinking_format.end_marker))
    found = [repr(mark) for mark in marks if mark and mark in thinking + answer]
    cause = f"the text contains {' and '.join(found)}, where the chat template cuts it: " if found else ""
    return f"{cause}{expected[at : at + 50]!r} was written, the chat template renders {trained[at : at + 50]!r}"


def _as_trained(prompt: str, trained: str) -> str:
    """Return a prompt with the assistant's role named as in finished turns: some templates call it otherwise there."""
    begin = len(re.sub(r"\w*$", "", commonprefix([prompt, trained])))
    for role, other in (("model", "assistant"), ("assistant", "model")):
        if prompt.startswith(role, begin) and trained.startswith(other, begin):
            return prompt[:begin] + other + prompt[begin + len(role) :]
    return prompt


def check_templates(vocabulary: Vocabulary, thinking_format: ThinkingFormat, *, student: bool, **options: Any) -> None:
    """Render a sample row and refuse a template that does not leave the thinking open, or trains on other text.

    Args:
        vocabulary: The model's vocabulary.
        thinking_format: The model's thinking format, from :func:`detect`.
        student: Whether rows are written in this model's format, so that its template must keep finished thinking.
        **options: Passed to the chat template.

    Raises:
        TemplateError: What was rendered, what this family needs, and what to pass.
    """
    name, template = vocabulary.name, vocabulary.tokenizer.chat_template
    if not template:
        raise TemplateError(
            f"The tokenizer of {name!r} has no chat template. One is needed to render prompts; "
            "pass it with Speaker(..., chat_template=...)."
        )
    row = [*_USER, thinking_format.assistant_message(_THINKING, _ANSWER)]
    try:
        opened = render(vocabulary, thinking_format, _USER, **options)
        if _USER[0]["content"] not in opened:
            raise TemplateError(
                f"The chat template of {name!r} drops the prompt; it renders {opened[:60]!r}. A Jinja template of the "
                "messages is expected, its text and not the name of a file."
            )
        if thinking_format.thinks:
            _check_open(vocabulary, thinking_format, str(template), **options)
        if not student:
            return
        trained = _rendered(vocabulary, row, False, **options)
        fault = misfit(vocabulary, thinking_format, _USER, _THINKING, _ANSWER, **options)
    except PromptError as error:
        raise TemplateError(str(error)) from error
    if fault is not None:
        lost = next((f"drops the {part}" for part, text in _SAMPLE.items() if text not in trained), "changes the text")
        raise TemplateError(
            f"The chat template of the student {name!r} {lost} of a finished row: {fault}. {_remedy(thinking_format)}"
        )
    if not trained.startswith(opened):
        _log.warning("The chat template of %r names the assistant otherwise in finished turns than in prompts.", name)


def _check_open(vocabulary: Vocabulary, thinking_format: ThinkingFormat, template: str, /, **options: Any) -> None:
    switches = [one for one in SWITCHES if re.search(rf"\b{one}\b", template) and one not in options]
    plain, prompt = _rendered(vocabulary, _USER, True, **options), _generation_prompt(vocabulary, **options)
    off = [one for one in switches if _rendered(vocabulary, _USER, True, **options, **{one: True}) != plain]
    if off or thinking_format.end_marker in prompt:
        raise TemplateError(
            f"The chat template of {vocabulary.name!r} does not leave the thinking open; it ends in {prompt[-60:]!r}. "
            f"Expected is a prompt that lets the model go on from {thinking_format.open!r}. Pass the option that "
            f'switches thinking on, for instance Speaker(..., template_options={{"{[*off, *SWITCHES][0]}": True}}), '
            'or thinking_format="none" to use the model without thinking.'
        )


def _remedy(thinking_format: ThinkingFormat) -> str:
    """Say what fits a family where its template does not."""
    if not thinking_format.thinks:
        return "Pass a template that renders the assistant's content as it is with Speaker(..., chat_template=...)."
    kept = thinking_format.open + "<thinking>" + thinking_format.close + "<answer>"
    return (
        f"For the format {thinking_format.name!r}, a finished turn must be rendered as {kept!r} behind the generation "
        "prompt. Pass a template that keeps the assistant's whole content with Speaker(..., chat_template=...), or, "
        "where the model has other markers or another message key, Speaker(..., thinking_format=ThinkingFormat("
        "open=..., close=..., end_marker=..., key=...))."
    )
