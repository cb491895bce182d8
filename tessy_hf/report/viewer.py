"""The viewer of ``tessy report``: datasets go in, one self-contained HTML file with rows colored by author comes out.

Texts of prompts and models are stored deflated and in base64, so that nothing in them can end the element that holds
them; the page's script shows them as text nodes only. Knows nothing of where datasets come from.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from tessy_hf.report import figures
from tessy_hf.report.html import inline, render
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
_HIDDEN = {"messages", "thinking", "answer", "spans", "error", "finish_reason"}  # have their own places
_IDS = ("id", "key", "row_id", "problem_id")

Shown = tuple[int, int, int, str]
"""Author, part, tokens and text of a span or a marker, as the page's script reads them."""


def write(
    out: Path, title: str, rows: Iterable[tuple[int, Mapping[str, Any]]], summary: dict[str, Any],
    *, against: tuple[str, Dataset] | None = None, head: Mapping[str, Any],
) -> None:  # fmt: skip
    """Write the report.

    Args:
        out: The HTML file.
        title: The dataset's name.
        rows: The rows to show, each with its index in the dataset, with the columns of :mod:`tessy_hf.rows.columns`.
        summary: The statistics of the whole dataset, from which the figures are drawn.
        against: Name and rows of a second dataset; rows of the same prompt are shown side by side.
        head: Further fields of the template: ``subtitle``, ``tiles``, ``tables``.
    """
    partner = _partners(against[1]) if against else None
    index = Index([title, against[0] if against else None])
    texts = list(_packed_chunks(rows, index, partner))
    drawn = [
        {"svg": inline(figures.image(name, summary)), "description": figures.describe(name, summary), "wide": False}
        for name in figures.NAMES
    ]
    page = render("viewer.html", script="viewer.js", title=title, index=_pack(index.columns()), figures=drawn, **head)
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", encoding="utf-8") as file:
        file.write(page)
        _write_chunks(file, texts)
        file.write("</body>\n</html>\n")


class Index:
    """The columns that the page's list, search and filters need of every row."""

    def __init__(self, names: Sequence[str | None]) -> None:
        self.names = list(names)
        self.reasons: dict[str, int] = {}
        self.chunks: list[int] = []
        self.rows: list[tuple[Any, ...]] = []

    def add(self, number: int, row: Mapping[str, Any], prompt: str) -> None:
        """Add a row."""
        reason = self.reasons.setdefault(str(row.get("finish_reason") or "unknown"), len(self.reasons))
        name = next((str(row[column]) for column in _IDS if row.get(column) is not None), None)
        self.rows.append((number, name, " ".join(prompt.split())[:SNIPPET], reason, _permille(row), _tokens(row)))

    def columns(self) -> dict[str, Any]:
        """Return the index as the page's script reads it."""
        numbers, names, prompts, reasons, shares, tokens = zip(*self.rows, strict=True) if self.rows else ((),) * 6
        return {
            "names": self.names,
            "reasons": list(self.reasons),
            "chunks": self.chunks,
            "number": numbers,
            "id": names if all(name is not None for name in names) and names else None,
            "prompt": prompts,
            "reason": reasons,
            "share": shares,
            "tokens": tokens,
        }


def _packed_chunks(
    rows: Iterable[tuple[int, Mapping[str, Any]]], index: Index, partner: Callable[[str], Any] | None
) -> Iterator[str]:
    """Yield the packed texts of the rows, many rows in a chunk, and fill the index."""
    chunk: list[Any] = []
    size = 0
    for number, row in rows:
        turns = _prompt(row)
        if not chunk:
            index.chunks.append(len(index.rows))
        index.add(number, row, turns[-1][1] if turns else "")
        shown = _shown(row)
        other = partner(_key(turns)) if partner else None
        chunk.append([turns, shown, row.get("error"), _details(row, turns), other])
        size += sum(len(text) for _, text in turns)
        size += sum(len(text) for *_, text in [*shown, *(other[0] if other else [])])
        if size > CHUNK_CHARACTERS:
            yield _pack(chunk)
            chunk, size = [], 0
    if chunk:
        yield _pack(chunk)


def _write_chunks(file: TextIO, texts: Iterable[str]) -> None:
    for at, text in enumerate(texts):
        file.write(f'<script type="text/plain" id="rows-{at}">{text}</script>\n')


def _pack(value: Any) -> str:
    return base64.b64encode(zlib.compress(json.dumps(value, separators=(",", ":")).encode(), 6)).decode()


# --- what is shown of a row


def _prompt(row: Mapping[str, Any]) -> list[tuple[str, str]]:
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
        places.setdefault(_key(_prompt(row)), deque()).append(place)

    def partner(key: str) -> Any:
        left = places.get(key)
        if not left:
            return None
        row = dataset[left.popleft()]
        return [_shown(row), row.get("error"), _permille(row), _tokens(row), row.get("finish_reason")]

    return partner


def _shown(row: Mapping[str, Any]) -> list[Shown]:
    """Return the spans of a row with the markers around the thinking apart; text that no spans cover has no author."""
    shown: list[Shown] = []
    for piece in pieces(row):
        part = PARTS.index(piece.part)
        shown += [(_MARK, part, 0, piece.before)] if piece.before else []
        shown.append((_AUTHORS.get(piece.author, _UNKNOWN), part, piece.tokens, piece.text))
        shown += [(_MARK, part, 0, piece.after)] if piece.after else []
    if shown:
        return shown
    whole, _ = assistant_text(row)
    return [(_UNKNOWN, PARTS.index("answer"), 0, whole)] if whole else []


def _details(row: Mapping[str, Any], turns: Sequence[tuple[str, str]]) -> dict[str, str]:
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
