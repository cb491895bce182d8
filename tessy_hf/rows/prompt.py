"""A dataset row's prompt, checked: the values of its columns go in, its key and its chat messages come out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from tessy_hf.errors import PromptError
from tessy_hf.settings import Settings
from tessy_hf.trajectory import Message


def read(given: Any, prompt: Any, settings: Settings, seen: set[str]) -> tuple[str, list[Message]]:
    """Read one row.

    Args:
        given: The value of the id column; ignored where there is none.
        prompt: The value of the prompt column.
        settings: Which columns these are, and the system prompt.
        seen: The ids seen before in this pass; the row's is added.

    Returns:
        The row's key and its messages.

    Raises:
        PromptError: The prompt is no prompt, or the id is missing or was seen before.
    """
    messages = _messages(prompt, given, settings.prompt_column)
    if settings.system_prompt is not None:
        messages = [{"role": "system", "content": settings.system_prompt}, *messages]
    if settings.id_column is None:
        text = json.dumps(messages, sort_keys=True, ensure_ascii=False, default=str)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32], messages
    if given is None or given == "":
        raise PromptError(
            f"A row has no id: column {settings.id_column!r} is {given!r}. "
            "Each row needs its own; fill the column or choose another with id_column=."
        )
    key = str(given)
    if key in seen:
        raise PromptError(
            f"Row {key!r}: another row has the same {settings.id_column!r}. Ids must be unique, else two rows "
            "would be taken for one; make them so, or pass id_column=None to tell rows apart by their prompts."
        )
    seen.add(key)
    return key, messages


def length(messages: Sequence[Message]) -> int:
    """Return how many characters a prompt has."""
    return sum(len(str(message["content"])) for message in messages)


def _messages(prompt: Any, row: Any, column: str) -> list[Message]:
    """Read a prompt as chat messages.

    Raises:
        PromptError: It is neither text nor messages ending in the user's turn.
    """
    name = "A row" if row is None else f"Row {str(row)!r}"
    if isinstance(prompt, str) and prompt.strip():
        return [{"role": "user", "content": prompt}]
    if isinstance(prompt, list) and prompt and all(isinstance(m, Mapping) and m.get("content") for m in prompt):
        if prompt[-1].get("role") == "user":
            return [{"role": m["role"], "content": m["content"]} for m in prompt]
        raise PromptError(
            f"{name}: the last message in {column!r} is by {prompt[-1].get('role')!r}. A prompt ends in the user's "
            "turn; drop the messages after it."
        )
    shown = repr(prompt) if len(repr(prompt)) <= 60 else repr(prompt)[:57] + "..."
    raise PromptError(
        f"{name}: column {column!r} is {shown} ({type(prompt).__name__}). A non-empty string or a list of chat "
        "messages is expected; filter such rows or pass prompt_column= with another column."
    )
