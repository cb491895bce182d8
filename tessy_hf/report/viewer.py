"""Pack the rows of a report's page: rows go in; an index and texts, by author, come out for the page's script.

Texts of prompts and models are stored deflated and in base64, so that nothing in them can end the element that holds
them; the script shows them as text nodes only. Knows nothing of where rows come from.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tessy_hf.report import heat
from tessy_hf.report.statistics import AUTHORS, PARTS
from tessy_hf.rows.columns import assistant_text, content_text, pieces

if TYPE_CHECKING:
    from datasets import Dataset

CHUNK_CHARACTERS = 400_000
"""About how much text is packed together; the page unpacks one such chunk at a time."""
SNIPPET = 180
"""Characters of the prompt shown in the list of rows."""
DETAIL = 2_000
"""Characters shown of the value of another column."""

_TEACHER, _STUDENT, _MARK, _UNKNOWN = range(4)
_AUTHORS = {"teacher": _TEACHER, "student": _STUDENT}
_HIDDEN = {"messages", "thinking", "answer", "spans", "error", "finish_reason", heat.WORDS}  # have their own places
_IDS = ("id", "key", "row_id", "problem_id")

Shown = tuple[int, int, int, str]
"""Author, part, tokens and text of a span or a marker, as the page's script reads them."""


def pack(
    rows: Iterable[tuple[int, Mapping[str, Any]]], names: Sequence[str], against: Dataset | None = None
) -> tuple[str, list[str]]:
    """Pack rows for the page's script.

    Args:
        rows: The rows to show, each with its index in the dataset, with the columns of :mod:`tessy_hf.rows.columns`.
        names: The name of the dataset, and of the second one where there is one.
        against: The second one's rows; those of the same prompt are shown side by side.

    Returns:
        The index of the rows, and their texts in chunks.
    """
    index: dict[str, Any] = {"names": [*names, None][:2], "reasons": [], "chunks": [], "heat": False}
    columns: dict[str, list[Any]] = {
        name: [] for name in ("number", "id", "prompt", "reason", "share", "tokens", "verdict", "score")
    }
    partner = _partners(against) if against is not None else lambda key: None
    texts, chunk, size = list[str](), list[Any](), 0
    for number, row in rows:
        turns, spans = prompt_turns(row), shown(row)
        other = partner(_key(turns))
        if not chunk:
            index["chunks"].append(len(columns["number"]))
        for column, value in zip(columns.values(), _entry(number, row, turns, index["reasons"]), strict=True):
            column.append(value)
        warmth = warmth_of(row, spans)
        index["heat"] = index["heat"] or bool(warmth)
        chunk.append([turns, spans, row.get("error"), details(row, turns), other, warmth])
        size += sum(len(text) for *_, text in [*turns, *spans, *(other[0] if other else [])])
        if size > CHUNK_CHARACTERS:
            texts.append(_packed(chunk))
            chunk, size = [], 0
    texts += [_packed(chunk)] if chunk else []
    named = bool(columns["id"]) and None not in columns["id"]
    return _packed({**index, **columns, "id": columns["id"] if named else None}), texts


def _entry(number: int, row: Mapping[str, Any], turns: Sequence[tuple[str, str]], reasons: list[str]) -> list[Any]:
    """Return what the page's list, search and filters need of a row, see :func:`pack`."""
    reason = str(row.get("finish_reason") or "unknown")
    if reason not in reasons:
        reasons.append(reason)
    prompt = " ".join(turns[-1][1].split())[:SNIPPET] if turns else ""
    judged = [row.get("verdict"), row.get("teacher_score")]
    return [number, row_id(row), prompt, reasons.index(reason), _permille(row), _tokens(row), *judged]


def row_id(row: Mapping[str, Any]) -> str | None:
    """Return a row's id, where one of the usual columns has it."""
    return next((str(row[column]) for column in _IDS if row.get(column) is not None), None)


def _packed(value: Any) -> str:
    return base64.b64encode(zlib.compress(json.dumps(value, separators=(",", ":")).encode(), 6)).decode()


# --- what is shown of a row


def prompt_turns(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return role and text of the messages before the assistant's finished turn."""
    messages = row["messages"] or []
    if messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    texts = [filter(None, map(content_text, (m["content"], m.get("tool_calls")))) for m in messages]
    return [(str(message["role"]), "\n".join(text)) for message, text in zip(messages, texts, strict=True)]


def _key(turns: Sequence[tuple[str, str]]) -> str:
    """Return a key that rows of the same prompt share, whatever their system prompt."""
    return json.dumps([turn for turn in turns if turn[0] != "system"])


def _partners(dataset: Dataset) -> Callable[[str], Any]:
    """Return a function from a prompt's key to its row; of several rows of a prompt it returns each once."""
    places: dict[str, deque[int]] = {}
    for place, row in enumerate(dataset.select_columns("messages")):
        places.setdefault(_key(prompt_turns(row)), deque()).append(place)

    def partner(key: str) -> Any:
        left = places.get(key)
        if not left:
            return None
        row = dataset[left.popleft()]
        spans = shown(row)
        told = [row.get("error"), _permille(row), _tokens(row), row.get("finish_reason")]
        return [spans, *told, warmth_of(row, spans)]

    return partner


def shown(row: Mapping[str, Any]) -> list[Shown]:
    """Return the spans of a row with the markers around the thinking apart; text that no spans cover has no author."""
    found: list[Shown] = []
    for piece in pieces(row):
        part = PARTS.index(piece.part)
        found += [(_MARK, part, 0, piece.before)] if piece.before else []
        found.append((_AUTHORS.get(piece.author, _UNKNOWN), part, piece.tokens, piece.text))
        found += [(_MARK, part, 0, piece.after)] if piece.after else []
    whole = assistant_text(row)
    return found or ([(_UNKNOWN, PARTS.index("answer"), 0, whole)] if whole else [])


def warmth_of(row: Mapping[str, Any], spans: Sequence[Shown]) -> list[list[heat.Segment]] | None:
    """Return for each of the spans shown its words' lengths and surprise, where the row says so."""
    each = iter(heat.segments(row))
    found = [next(each, []) if span[0] in (_TEACHER, _STUDENT) else [] for span in spans]
    return found if any(found) else None


def details(row: Mapping[str, Any], turns: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Return the other columns as text, without those that repeat the prompt."""
    prompts = {text for _, text in turns}
    details = {}
    for name, value in row.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
        if name in _HIDDEN or value is None or value == [] or text in prompts:
            continue
        details[name] = text if len(text) <= DETAIL else text[:DETAIL] + " …"
    return details


def _permille(row: Mapping[str, Any]) -> float | None:
    share = row.get("teacher_token_ratio")
    return None if share is None else round(1000 * share, 1)


def _tokens(row: Mapping[str, Any]) -> int:
    return sum(row.get(f"{author}_tokens") or 0 for author in AUTHORS)
