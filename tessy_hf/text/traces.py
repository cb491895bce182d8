"""Read reasoning traces in any of the common formats: a row of a dataset or an answer of a server goes in.

Out come the messages it answers, its thinking and its answer, as plain text. Knows nothing of models.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tessy_hf.errors import DatasetError
from tessy_hf.text.thinking_format import FAMILIES

COLUMNS = ("thinking", "reasoning", "reasoning_content")
"""Keys under which thinking stands by itself: datasets' own, and those of OpenAI-compatible servers."""


@dataclass(frozen=True)
class TraceFormat:
    """Where the rows of a kind of dataset keep their text: columns by field, of which the first with text is read.

    Attributes:
        name: The format's name, in errors.
        chat: A chat that ends in the assistant's turn.
        asked: The prompt: text, or a chat without the assistant's turn.
        thinking: The thinking by itself.
        answer: The answer, which may begin with marked thinking; of a list, the first.
    """

    name: str
    chat: tuple[str, ...] = ()
    asked: tuple[str, ...] = ()
    thinking: tuple[str, ...] = ()
    answer: tuple[str, ...] = ()

    def names(self) -> Iterator[str]:
        """Yield the columns that rows of this format are known by."""
        yield from (*self.chat, *self.thinking, *self.answer)


FORMATS = (
    TraceFormat("messages (TRL, Open-R1, Nemotron)", chat=("messages",)),
    TraceFormat("dialogs (TESSY)", chat=("dialogs",)),
    TraceFormat("conversations (OpenThoughts, ShareGPT)", chat=("conversations",)),
    TraceFormat("input, output (Llama-Nemotron)", asked=("input",), answer=("output",)),
    TraceFormat("problem, generations (OpenR1-Math)", asked=("problem",), answer=("generations",)),
    TraceFormat(
        "problem, deepseek_reasoning, deepseek_solution (OpenThoughts metadata)",
        asked=("problem",),
        thinking=("deepseek_reasoning",),
        answer=("deepseek_solution",),
    ),
    TraceFormat(
        "a column for each of prompt, thinking and answer",
        asked=("messages", "prompt", "source_prompt", "problem", "question", "instruction"),
        thinking=COLUMNS,
        answer=("response", "completion", "output", "generation", "content", "answer", "solution", "text"),
    ),
)
"""The formats that are read, the first that fits a row."""

ROLES = {"human": "user", "gpt": "assistant"}
"""Names of roles in chats with ``from`` and ``value``."""

_SWITCHES = ("on", "off")  # Nemotron's `reasoning` says whether there is any


@dataclass(frozen=True)
class Trace:
    """One row: the ``messages`` before the assistant's last turn, as ``role`` and ``content``; its two parts."""

    messages: Sequence[Mapping[str, Any]]
    thinking: str
    answer: str

    @property
    def question(self) -> str:
        """The user's last turn."""
        turns = (turn["content"] for turn in reversed(self.messages) if turn["role"] == "user")
        return next(turns, "").strip()


def read(row: Mapping[str, Any]) -> Trace:
    """Read a row. What it lacks is empty.

    Raises:
        DatasetError: Its columns are of no known format.
    """
    check(row)
    return next(filter(None, (_read(row, one) for one in FORMATS)), None) or Trace(_asked(row.get("messages")), "", "")


def check(names: Iterable[str]) -> None:
    """Raise a :class:`DatasetError` where columns are of none of :data:`FORMATS`."""
    names = list(names)
    if not any(name in names for one in FORMATS for name in one.names()):
        raise DatasetError(
            f"The rows have the columns {', '.join(names)}, which are of no known format. Known are: "
            f"{'; '.join(one.name for one in FORMATS)}. Rename the columns."
        )


def thinking(row: Mapping[str, Any]) -> str | None:
    """Return the thinking of a row or a server's answer, or ``None`` where it has none; see :func:`read`."""
    found = (_read(row, one) for one in FORMATS)
    return next((trace.thinking for trace in found if trace is not None), None) or None


def _read(row: Mapping[str, Any], form: TraceFormat) -> Trace | None:
    for name in form.chat:
        turns = _turns(row.get(name))
        if turns and turns[-1]["role"] == "assistant":
            own = _own(row, COLUMNS) or _own(turns[-1], COLUMNS)
            return Trace(turns[:-1], *_parts(own, turns[-1]["content"]))
    asked = next((row[name] for name in form.asked if row.get(name)), None)
    own, texts = _own(row, form.thinking), [text for name in form.answer if (text := _text(row.get(name)))]
    if not (own or texts) or (asked is None and form is not FORMATS[-1]):
        return None
    marked = next((text for text in texts if split(text)[0]), "")
    return Trace(_asked(asked), *_parts(own, marked or next(iter(texts), "")))


def _parts(own: str, text: str) -> tuple[str, str]:
    """Return thinking and answer: of an assistant's content, and the thinking that stands by itself, if any."""
    marked, answer = split(text)
    if own:
        thought = strip_marks(own)
        return thought, (answer if marked is not None else text.partition(thought)[2] or text).strip()
    return marked or "", answer.strip()


def _own(row: Mapping[str, Any], names: Sequence[str]) -> str:
    texts = (row[name] for name in names if isinstance(row.get(name), str))
    return next((text for text in texts if text.strip() and text.strip() not in _SWITCHES), "")


def _asked(prompt: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else _turns(prompt)


def _turns(chat: Any) -> list[dict[str, Any]]:
    """Return a chat's turns with ``role`` and ``content``, whatever they are called."""
    turns = [turn for turn in chat if isinstance(turn, Mapping)] if isinstance(chat, (list, tuple)) else []
    kept = ({name: value for name, value in turn.items() if name not in ("from", "value")} for turn in turns)
    return [{**rest, "role": _role(turn), "content": _content(turn)} for rest, turn in zip(kept, turns, strict=True)]


def _role(turn: Mapping[str, Any]) -> str:
    role = str(turn.get("role") or turn.get("from"))
    return ROLES.get(role, role)


def _content(turn: Mapping[str, Any]) -> str:
    given = turn["content"] if turn.get("content") is not None else turn.get("value")
    parts = given if isinstance(given, (list, tuple)) else [given]
    return "".join(_text(part.get("text") if isinstance(part, Mapping) else part) for part in parts)


def _text(value: Any) -> str:
    """Return a text, or the first one of a list."""
    value = next(filter(None, value), "") if isinstance(value, (list, tuple)) else value
    return value if isinstance(value, str) and value.strip() else ""


# --- marked thinking


def _tags(start: str, end: str) -> re.Pattern[str]:
    begun = f"(?:{start})?" if end.startswith("</") else start  # R1's completions lack the opening tag
    return re.compile(rf"^\s*{begun}(?P<thinking>.*?){end}|^\s*{start}(?P<open>.*)", re.DOTALL)


_MARKS = [
    *((one.open.strip(), one.end_marker) for one in FAMILIES.values() if one.thinks),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),  # OpenThoughts-114k
]
_TAGS = [_tags(re.escape(start), re.escape(end)) for start, end in _MARKS]
_SOLUTION = re.compile(r"<\|(?:begin|end)_of_solution\|>")
_CHANNEL = re.compile(
    r"<\|channel\|>(analysis|final)(?:[^<]*<\|constrain\|>[^<]*)?<\|message\|>(.*?)"
    r"(?=<\|(?:end|return|call|start|channel)\|>|\Z)",
    re.DOTALL,
)


def split(text: str) -> tuple[str | None, str]:
    """Return what is marked as thinking in an assistant's content, or ``None``, and the rest."""
    if "<|channel|>" in text:
        parts = [(name, part.strip()) for name, part in _CHANNEL.findall(text)]
        thoughts, answers = ([part for name, part in parts if name == kind and part] for kind in ("analysis", "final"))
        return "\n\n".join(thoughts) or None, "\n\n".join(answers)
    found = next(filter(None, (tags.match(text) for tags in _TAGS)), None)
    if found is None:
        return None, text
    thought = (found["thinking"] if found["thinking"] is not None else found["open"]).strip()
    return thought or None, _SOLUTION.sub("", text[found.end() :])


def strip_marks(text: str) -> str:
    """Return thinking without the markers that some datasets leave around it."""
    return split(text)[0] or text.strip()
