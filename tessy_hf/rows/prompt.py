"""Reads prompts: a dataset row's columns go in, its checked chat messages, id and prompt hash come out."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from tessy_hf.errors import PromptError
from tessy_hf.rows import columns
from tessy_hf.rows.tools import (
    SOURCE_TOOLS,
    TOOLS,
    are_shown,
    asked_message,
    has_calls,
    read_calls,
    read_tools,
    stored_tools,
    without_nulls,
)
from tessy_hf.settings import Settings
from tessy_hf.text.traces import ROLES
from tessy_hf.trajectory import Message, Prompt, RowKey
from tessy_hf.verifiers import verifiers

_UNREAD = ("function_call", "tools", "functions")
"""Keys of messages that no chat template reads there."""


class PromptReader:
    """Reads the prompts of one pass over a dataset.

    Args:
        settings: Names the columns of prompts and ids, the verifier and the system prompt.
        names: The dataset's columns.
        seen: The ids read before in this pass; those of the rows read are added.

    Raises:
        DatasetError: A column is missing, or would be overwritten.
    """

    def __init__(self, settings: Settings, names: Sequence[str], seen: set[str] | None = None) -> None:
        verified = verifiers.column(settings.verifier)
        columns.check_columns(names, settings.prompt_column, settings.id_column, verified)
        self._settings = settings
        self._seen = set() if seen is None else seen
        self.hashed_columns = hashed_columns(settings, names)

    @property
    def read_columns(self) -> list[str]:
        """The columns that :meth:`read` needs of a row."""
        own = (self._settings.prompt_column, self._settings.id_column)
        return list(dict.fromkeys(name for name in (*own, *self.hashed_columns) if name is not None))

    def id(self, row: Mapping[str, Any]) -> Any:
        """Return the value of a row's id column; ``None`` where there is no such column."""
        given: Any = row[self._settings.id_column] if self._settings.id_column is not None else None
        return given.tolist() if hasattr(given, "tolist") else given  # of NumPy and torch formats

    def read(self, row: Mapping[str, Any]) -> Prompt:
        """Read one row.

        Raises:
            PromptError: The prompt cannot be used, or the id is missing or was seen before in this pass.
        """
        settings, given = self._settings, self.id(row)
        messages = _messages(row[settings.prompt_column], given, settings.prompt_column)
        if settings.system_prompt is not None:
            messages = [{"role": "system", "content": settings.system_prompt}, *messages]
        try:
            shown = TOOLS in self.hashed_columns and are_shown(row[settings.prompt_column])
            tools = read_tools(row[TOOLS]) if shown else None
        except PromptError as error:
            raise PromptError(f"{_name(given)}: {error}. Fix it, or remove the column.") from None
        key = prompt_hash(messages) if settings.id_column is None else self._checked(given)
        read = {name: tools if name == TOOLS else row[name] for name in self.hashed_columns}
        asked = prompt_hash(messages, read)
        return Prompt(key, messages, prompt_hash=asked, tools=tools)

    def _checked(self, given: Any) -> str:
        column = self._settings.id_column
        if given is None or given == "" or given != given:  # not a number: how some tables write a missing one
            raise PromptError(
                f"A row has no id: column {column!r} is {given!r}. "
                "Each row needs its own; fill the column or choose another with id_column=."
            )
        key = _unicode(str(given), f"Column {column!r}: the id {given!r}")
        if key in self._seen:
            raise PromptError(
                f"Row {key!r}: another row has the same {column!r}. Ids must be unique in a dataset, or its rows "
                "cannot be told apart; make them so, or pass id_column=None to identify rows by their prompts."
            )
        self._seen.add(key)
        return key


def read_prompts(
    prompts: Iterable[Mapping[str, Any]], settings: Settings
) -> Iterator[tuple[RowKey | None, Mapping[str, Any], PromptError | None]]:
    """Iterate over prompts: the key, the row, and what is wrong with it where there is no key."""
    reader: PromptReader | None = None
    for row in prompts:
        reader = reader or PromptReader(settings, list(row))
        try:
            yield reader.read(row).row_key, row, None
        except PromptError as error:
            yield None, row, error


def hashed_columns(settings: Settings, names: Sequence[str]) -> list[str]:
    """Return the columns that decide a row besides its prompt: tools, and what the verifier reads.

    All input columns where the verifier is a function of the user's, since what that reads is not known.
    """
    inputs = [name for name in names if name not in (*columns.COLUMNS, SOURCE_TOOLS, settings.prompt_column)]
    verified = verifiers.column(settings.verifier)
    if settings.verifier is not None and verified is None:
        return inputs
    return [name for name in inputs if name in (TOOLS, verified)]


def prompt_hash(messages: Sequence[Message], read: Mapping[str, Any] | None = None) -> str:
    """Hash all that a row asks: its messages, and the values of the columns that decide it besides."""
    asked = [messages, without_nulls(_with_tools(read))] if read else messages
    text = json.dumps(asked, sort_keys=True, ensure_ascii=False, default=_hash)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def finished_prompt_hash(messages: Sequence[Message], read: Mapping[str, Any] | None = None) -> str:
    """Hash what a finished row answers, from its ``messages``, as :func:`prompt_hash` did before it was written."""
    ends = bool(messages) and messages[-1]["role"] == "assistant"
    asked = messages[:-1] if ends else messages
    return prompt_hash([asked_message(message) for message in asked], read)


def _with_tools(read: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return columns with the tools as rendered, whatever their form, so that rows that did not see them differ."""
    return {**read, TOOLS: None, "rendered_tools": stored_tools(read[TOOLS])} if TOOLS in read else read


def _hash(value: Any) -> str:
    from datasets.fingerprint import Hasher

    return str(Hasher.hash(value))


def length(messages: Sequence[Message]) -> int:
    """Return how many characters a prompt has."""
    return sum(len(str(message["content"] or "")) for message in messages)


def _messages(prompt: Any, row: Any, column: str) -> list[Message]:
    """Read a prompt as chat messages: text, or messages with ``role`` and ``content`` (or ``from`` and ``value``).

    The answer that others' rows end in is left out, with a warning.

    Raises:
        PromptError: It is neither, or a message cannot be used.
    """
    prompt = prompt.tolist() if hasattr(prompt, "tolist") else prompt
    given = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    try:
        if not isinstance(given, (list, tuple)) or not given:
            raise PromptError(f"{_shown(prompt)} is not a prompt")
        messages = [read for number, one in enumerate(_unanswered(given, column)) if (read := _message(one, number))]
        if not messages or messages[-1]["role"] not in ("user", "tool"):
            last = repr(messages[-1]["role"]) if messages else "nobody"
            raise PromptError(
                f"the last message is by {last}, and a prompt ends in the user's turn or a tool's result"
            )
    except PromptError as error:
        raise PromptError(
            f"{_name(row)}: column {column!r}: {error}. A non-empty string or a list of chat messages that ends in "
            "the user's turn is expected; filter such rows or pass prompt_column= with another column."
        ) from None
    return messages if has_calls(messages) else [{"role": m["role"], "content": m["content"]} for m in messages]


def _unanswered(chat: Sequence[Any], column: str) -> Sequence[Any]:
    """Return a chat without the answer that it ends in, where it ends in one."""
    last = chat[-1] if len(chat) > 1 and isinstance(chat[-1], Mapping) else {}
    if ROLES.get(role := str(last.get("role") or last.get("from")), role) != "assistant" or last.get("tool_calls"):
        return chat
    warnings.warn(
        f"Chats in column {column!r} end in an answer of the assistant: it is left out, and what it answers is the "
        "prompt.",
        stacklevel=2,
    )
    return chat[:-1]


def _name(row: Any) -> str:
    return "A row" if row is None else f"Row {str(row)!r}"


def _message(message: Any, number: int) -> Message | None:
    """Read a message; ``None`` for an empty system message, which chat templates drop."""
    if not isinstance(message, Mapping):
        raise PromptError(f"message {number} is {_shown(message)}")
    for key in ("role", "from"):
        _unicode(str(message.get(key)), f"the role of message {number}")
    role = message.get("role") or ROLES.get(str(message.get("from")), message.get("from"))
    if not isinstance(role, str):
        raise PromptError(f"message {number} has no role, only {', '.join(map(repr, message))}")
    for key in _UNREAD:
        if message.get(key) is not None and str(message[key]) not in ("", "[]", "{}"):
            raise PromptError(f"message {number} has {key!r}, and only tool_calls, or a column 'tools', are rendered")
    given = message["content"] if message.get("content") is not None else message.get("value")
    content, calls = _text(given, number), read_calls(message.get("tool_calls"), number)
    if calls:
        return {"role": role, "content": None if given is None else content, "tool_calls": calls}
    if role == "tool" and given is not None:
        names = {key: str(message[key]) for key in ("tool_call_id", "name") if message.get(key)}
        return {"role": role, "content": content, **names}
    if content.strip():
        return {"role": role, "content": content}
    if role == "system":
        return None
    raise PromptError(f"message {number}, by {role!r}, is empty (its content is {_shown(message.get('content'))})")


def _text(content: Any, number: int) -> str:
    """Return a message's content as text: parts of text are joined."""
    if isinstance(content, (list, tuple)):
        kinds = [part.get("type", "text") if isinstance(part, Mapping) else "text" for part in content]
        other = next((kind for kind in kinds if kind != "text"), None)
        if other is not None:
            raise PromptError(f"message {number} has a part of type {other!r}, and only text can be read")
        texts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
        other = next((text for text in texts if text is not None and not isinstance(text, str)), None)
        if other is not None:
            raise PromptError(f"message {number} has a part whose text is {_shown(other)}")
        content = "".join(text or "" for text in texts)
    if content is not None and not isinstance(content, str):
        raise PromptError(f"the content of message {number} is {_shown(content)}")
    return _unicode(content or "", f"message {number}")


def _unicode(text: str, what: str) -> str:
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise PromptError(f"{what} has half of a surrogate pair, which is not valid Unicode")
    return text


def _shown(value: Any) -> str:
    """Return the beginning of a value and its type, for a message."""
    shown = repr(value)
    return f"{shown if len(shown) <= 60 else shown[:57] + '...'} ({type(value).__name__})"
