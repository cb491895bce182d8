"""Check that a chat template renders tools, their calls and their results, since templates drop what they do not know.

A piece is rendered if the text changes once the piece is changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from tessy_hf.errors import PromptError
from tessy_hf.trajectory import Message

Tools = Sequence[Mapping[str, Any]] | None


def check_tools(
    render: Callable[[Sequence[Message], Tools], str], text: str, messages: Sequence[Message], tools: Tools, name: str
) -> None:
    """Refuse a prompt of which the template leaves something out.

    Args:
        render: Renders messages and tools.
        text: The rendered prompt.
        messages: The chat.
        tools: Its tools.
        name: The model.

    Raises:
        PromptError: A piece is left out.
    """
    for piece, other_messages, other_tools in _changed(messages, tools):
        try:
            same = render(other_messages, other_tools) == text
        except PromptError:  # the template reads it
            continue
        if same:
            raise PromptError(
                f"The chat template of {name!r} does not render {piece}. A template that renders tools is expected "
                "for both models; pass one with Speaker(..., chat_template=...), or leave such rows out."
            )


def _changed(messages: Sequence[Message], tools: Tools) -> Iterator[tuple[str, Sequence[Message], Tools]]:
    """Iterate over the pieces that tools bring, each with the prompt as it would be without that piece."""
    if tools:
        yield "the column 'tools'", messages, None
    for number, message in enumerate(messages):
        before, after = messages[:number], messages[number + 1 :]
        if calls := message.get("tool_calls"):
            other = {**message, "tool_calls": [*calls[:-1], _renamed(calls[-1])]}
            yield f"the tool_calls of message {number}", [*before, other, *after], tools
        if message["role"] == "tool":
            other = {**message, "content": f"{message['content']}x"}
            yield f"the tool's result in message {number}", [*before, other, *after], tools


def _renamed(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    if isinstance(function, Mapping):
        return {**call, "function": {**function, "name": f"{function.get('name')}x"}}
    return {**call, "name": f"{call.get('name')}x"}
