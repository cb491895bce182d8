"""Tools and tool calls as datasets keep them: JSON schemas, JSON strings, or structs that Arrow filled with nulls.

What comes out is plain JSON, which the prompts are rendered with and the rows are stored with, so that training
renders the same text.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tessy_hf.errors import PromptError
from tessy_hf.trajectory import Message

TOOLS = "tools"
"""The column that chat templates and trainers read tools from."""

SOURCE_TOOLS = f"source_{TOOLS}"
"""The column that keeps the tools as the prompts had them."""

CALL_KEYS = ("tool_calls", "tool_call_id")
"""Keys by which chats with tool calls are known. Their tools' results may have a ``name``, too."""


def read_tools(value: Any) -> list[dict[str, Any]] | None:
    """Read a row's tools: a list of JSON schemas, or that list as a JSON string; ``None`` where there are none.

    Raises:
        PromptError: It is neither.
    """
    return _mappings(value, f"column {TOOLS!r}") or None


def asked_message(message: Message) -> dict[str, Any]:
    """Return what of a message templates read: role, content, and where there are any calls or whose result it is."""
    keys = (*CALL_KEYS, "name") if message["role"] == "tool" else CALL_KEYS
    calls = {key: message[key] for key in keys if message.get(key) is not None}
    return {"role": message["role"], "content": message["content"], **calls}


def has_calls(messages: Iterable[Message]) -> bool:
    """Return whether a chat has tool calls, or results of them."""
    return any(message.get(key) is not None for message in messages for key in CALL_KEYS)


def read_calls(value: Any, number: int) -> list[dict[str, Any]]:
    """Read the ``tool_calls`` of a message: a list of calls, or that list as a JSON string.

    Raises:
        PromptError: It is neither.
    """
    return _mappings(value, f"tool_calls of message {number}")


def are_shown(prompt: Any) -> bool:
    """Return whether tools are shown beside a prompt: beside chats, not beside text, as with TRL 1.16."""
    return not isinstance(prompt, str)


def tool_columns(prompts: Sequence[Any], tools: Sequence[Any]) -> dict[str, list[Any]]:
    """Return the columns of finished rows with the tools that the models were shown, and as the prompts had them."""
    shown = [stored_tools(one) if are_shown(prompt) else None for prompt, one in zip(prompts, tools, strict=True)]
    return {TOOLS: shown, SOURCE_TOOLS: list(tools)}


def with_tools(row: Mapping[str, Any], prompt_column: str) -> dict[str, Any]:
    """Return a prompt's columns with :func:`tool_columns`, where it has tools."""
    if TOOLS not in row or prompt_column == TOOLS:
        return dict(row)
    return {**row, **{name: one for name, (one,) in tool_columns([row[prompt_column]], [row[TOOLS]]).items()}}


def stored_tools(value: Any) -> str | None:
    """Return a row's tools as its finished row has them: a JSON string, which trainers read, or null for none."""
    try:
        tools = read_tools(value)
    except PromptError:  # the row itself says why
        return str(value)
    return json.dumps(tools) if tools else None


def decoded(messages: list[Any]) -> list[Message]:
    """Return messages as Arrow has them: those with tool calls are stored as JSON."""
    return [json.loads(message) if isinstance(message, str) else message for message in messages]


def _read(value: Any, where: str) -> Any:
    """Return a value as plain JSON. Nulls in structs go, since Arrow fills in all keys; those in JSON strings stay."""
    value = value.tolist() if hasattr(value, "tolist") else value
    try:
        read = json.loads(value or "null") if isinstance(value, str) else without_nulls(value)
        text = json.dumps(read, ensure_ascii=False)
    except (ValueError, TypeError, RecursionError) as error:
        raise PromptError(f"{where} cannot be read as JSON: {error}") from None
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise PromptError(f"{where} has half of a surrogate pair, which is not valid Unicode")
    return read


def _mappings(value: Any, where: str) -> list[dict[str, Any]]:
    read = _read(value, where) or []
    each: list[Any] = read if isinstance(read, list) else [read]
    each = [_read(one, where) if isinstance(one, str) else one for one in each]
    if not isinstance(read, list) or not all(isinstance(one, dict) for one in each):
        raise PromptError(f"{where} is {str(read)[:60]!r}, and a list of JSON objects is expected")
    return each


def without_nulls(value: Any) -> Any:
    """Return a value in one form, whichever table it came from: Arrow fills in missing keys, formats make arrays."""
    if isinstance(value, Mapping):
        return {str(key): without_nulls(one) for key, one in value.items() if one is not None}
    if isinstance(value, (list, tuple)):
        return [without_nulls(one) for one in value]
    return without_nulls(value.tolist()) if hasattr(value, "tolist") else value
