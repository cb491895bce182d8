"""Extract the thinking from a row of a dataset or an answer of a server, in any of the common shapes.

A row goes in, its thinking comes out as plain text. Knows nothing of models.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from tessy_hf.text.thinking_format import FAMILIES

COLUMNS = ("thinking", "reasoning", "reasoning_content")
"""Keys under which thinking stands by itself: datasets' own, and those of OpenAI-compatible servers."""

TAGGED = ("text", "content", "response", "completion", "output", "generation")
"""Keys under which thinking may stand, marked, before the answer."""


def _tags(start: str, end: str) -> re.Pattern[str]:
    begun = f"(?:{start})?" if end.startswith("</") else start  # R1's completions lack the opening tag
    return re.compile(rf"^\s*{begun}(?P<thinking>.*?){end}|^\s*{start}(?P<open>.*)", re.DOTALL)


_TAGS = [_tags(*map(re.escape, (one.open.strip(), one.end_marker))) for one in FAMILIES.values() if one.thinks]
_ANALYSIS = re.compile(
    r"<\|channel\|>analysis(?:[^<]*<\|constrain\|>[^<]*)?<\|message\|>(.*?)(?=<\|(?:end|return|call|start|channel)\|>|\Z)",
    re.DOTALL,
)


def thinking(row: Mapping[str, Any]) -> str | None:
    """Return the thinking of a row, or ``None`` where it has none.

    Read are, in this order: a column ``thinking``, ``reasoning`` or ``reasoning_content``; the last assistant message
    of ``messages`` or ``conversations``, by these keys or in its content; and a column with a whole answer. In
    content, thinking is what stands between the marks of a known family
    (:data:`tessy_hf.text.thinking_format.FAMILIES`); an opening tag may be missing, as in R1's completions.
    """
    for key in COLUMNS:
        if isinstance(row.get(key), str) and row[key].strip():
            return strip_marks(str(row[key]))
    for key in ("messages", "conversations"):
        turns = [turn for turn in row.get(key) or [] if turn.get("role", turn.get("from")) in ("assistant", "gpt")]
        if turns:
            content = turns[-1].get("content", turns[-1].get("value"))
            return thinking({**turns[-1], "content": content, "messages": None, "conversations": None})
    marked = (find_thinking(row[key]) for key in TAGGED if isinstance(row.get(key), str))
    return next((text for text in marked if text), None)


def find_thinking(text: str) -> str | None:
    """Return what is marked as thinking in an assistant message, or ``None``."""
    if "<|channel|>" in text:
        parts = [part.strip() for part in _ANALYSIS.findall(text)]
        return "\n\n".join(part for part in parts if part) or None
    found = next(filter(None, (tags.match(text) for tags in _TAGS)), None)
    if found is None:
        return None
    return (found["thinking"] if found["thinking"] is not None else found["open"]).strip() or None


def strip_marks(text: str) -> str:
    """Return thinking without the markers that some datasets leave around it."""
    return find_thinking(text) or text.strip()
