"""Detect how a model marks its thinking, and render prompts with the thinking left open.

Messages go in, the text of an open assistant turn comes out. Model families are told apart by their tokenizer's tokens
and chat template, never by a model's name. Knows nothing of engines or of how text is generated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tessy_hf.errors import PromptError, TemplateError
from tessy_hf.text.vocabulary import Vocabulary
from tessy_hf.trajectory import Message


@dataclass(frozen=True)
class ThinkingFormat:
    """How one model family marks its thinking.

    Attributes:
        name: ``think-tags`` (Qwen3, DeepSeek-R1 and others) or ``harmony`` (gpt-oss).
        open: What stands before the thinking in an open assistant turn.
        close: What ends the thinking and opens the final answer; contains ``end_marker``.
        end_marker: The text by which the model ends its thinking.
        marks_in_content: Whether thinking and markers are in the message's ``content``, not under a key of their own.
    """

    name: str
    open: str
    close: str
    end_marker: str
    marks_in_content: bool

    def assistant_message(self, thinking: str, answer: str, closed: bool = True) -> dict[str, str]:
        """Return the assistant message of a finished row, to train on.

        Args:
            thinking: The thinking, without markers.
            answer: The final answer.
            closed: Whether the thinking ended; else the end marker is left out.
        """
        if not self.marks_in_content:
            return {"role": "assistant", "thinking": thinking, "content": answer}
        return {"role": "assistant", "content": self.open + thinking + (self.close if closed else "") + answer}


THINK_TAGS = ThinkingFormat("think-tags", "<think>\n", "\n</think>\n\n", "</think>", marks_in_content=True)
HARMONY = ThinkingFormat(
    "harmony",
    "<|channel|>analysis<|message|>",
    "<|end|><|start|>assistant<|channel|>final<|message|>",
    "<|end|>",
    marks_in_content=False,
)


def detect(vocabulary: Vocabulary) -> ThinkingFormat:
    """Detect the thinking format of a model from its tokenizer.

    Raises:
        TemplateError: Neither thinking tags nor harmony channels are known to the tokenizer or its chat template.
    """
    template = str(vocabulary.tokenizer.chat_template or "")
    if all(vocabulary.token_id(token) is not None for token in ("<|channel|>", "<|message|>", "<|start|>", "<|end|>")):
        return HARMONY
    if vocabulary.token_id("</think>") is not None or "<think>" in template:
        return THINK_TAGS
    raise TemplateError(
        f"No thinking format was found for {vocabulary.name!r}: its tokenizer has no </think> token, its chat "
        "template no <think>, and there are no harmony channels. A reasoning model is expected on both sides. Use "
        "one, or pass a chat template that contains <think> with Speaker(..., chat_template=...)."
    )


def end_ids(thinking_format: ThinkingFormat, vocabulary: Vocabulary) -> frozenset[int]:
    """Return the ids that end thinking: the end marker where it is one token, and every special token.

    Special tokens must not become text of the thinking, so each of them ends it as an end of sequence does.
    """
    marker = vocabulary.token_id(thinking_format.end_marker)
    return vocabulary.special_ids | (frozenset() if marker is None else frozenset({marker}))


def render(
    vocabulary: Vocabulary, thinking_format: ThinkingFormat, messages: Sequence[Message], **options: Any
) -> str:
    """Render ``messages`` through the model's own chat template, with the assistant's thinking left open.

    Args:
        vocabulary: The model's vocabulary.
        thinking_format: The model's thinking format.
        messages: The chat, ending in the user's turn or a tool's result.
        **options: Passed to the chat template, for instance ``reasoning_effort="high"`` or ``tools=``.

    Raises:
        PromptError: The template refuses the messages.
    """
    from jinja2 import TemplateError as JinjaError

    try:
        text = vocabulary.chat_text(messages, add_generation_prompt=True, **options)
    except (JinjaError, TypeError, KeyError, ValueError) as error:
        roles = [message.get("role") for message in messages]
        raise PromptError(
            f"The chat template of {vocabulary.name!r} refused the messages (roles {roles}): {error}. "
            "Messages that the template accepts are expected; check the roles and their order."
        ) from error
    return text if text.rstrip().endswith(thinking_format.open.rstrip()) else text + thinking_format.open


def check_templates(vocabulary: Vocabulary, thinking_format: ThinkingFormat, *, student: bool, **options: Any) -> None:
    """Render a sample row and refuse a template that would lose the thinking or not leave it open.

    Args:
        vocabulary: The model's vocabulary.
        thinking_format: The model's thinking format.
        student: Whether rows are written in this model's format, so that its template must keep finished thinking.
        **options: Passed to the chat template.

    Raises:
        TemplateError: The open turn is not open, or the student's template drops the thinking of a finished row.
    """
    if not vocabulary.tokenizer.chat_template:
        raise TemplateError(
            f"The tokenizer of {vocabulary.name!r} has no chat template. One is needed to render prompts; "
            "pass it with Speaker(..., chat_template=...)."
        )
    user = [{"role": "user", "content": "How many?"}]
    try:
        opened = render(vocabulary, thinking_format, user, **options)
    except PromptError as error:
        raise TemplateError(str(error)) from error
    generation_prompt = opened.removeprefix(vocabulary.chat_text(user, add_generation_prompt=False, **options))
    if thinking_format.end_marker in generation_prompt:
        raise TemplateError(
            f"The chat template of {vocabulary.name!r} does not leave the thinking open; it ends in {opened[-60:]!r}. "
            f"It must end in {thinking_format.open!r}. Pass the option that switches thinking on, for instance "
            'Speaker(..., template_options={"enable_thinking": True}).'
        )
    if not student:
        return
    thinking, answer = "Okay, so I count three.", "Three."
    row = [*user, thinking_format.assistant_message(thinking, answer)]
    rendered = vocabulary.chat_text(row, **options)
    if thinking not in rendered or answer not in rendered:
        lost = "thinking" if thinking not in rendered else "answer"
        raise TemplateError(
            f"The chat template of the student {vocabulary.name!r} drops the {lost} of a finished row: training would "
            f"never see it. It rendered {rendered[-120:]!r}. Pass a template that keeps the assistant's whole "
            "content with Speaker(..., chat_template=...)."
        )
