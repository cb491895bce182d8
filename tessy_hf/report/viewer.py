"""The coloured viewer of rows: datasets go in, one HTML file that needs nothing else comes out.

Texts of prompts and models lie in the file deflated and in base64, so that nothing in them can end the element that
holds them; the page's script puts them on the page as text. A policy in the page lets no other script run and nothing
be fetched. Knows nothing of where datasets come from.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from tessy_hf.report import figures
from tessy_hf.report.statistics import AUTHORS, PARTS
from tessy_hf.rows.columns import assistant_text, content_text

if TYPE_CHECKING:
    from datasets import Dataset

CHUNK_CHARACTERS = 400_000
"""About so much text is packed together; the viewer unpacks one such piece at a time."""
SNIPPET = 180
"""Characters of the prompt in the list of rows."""
DETAIL = 2_000
"""Characters of another column's value."""

_TEACHER, _STUDENT, _MARK, _UNKNOWN = range(4)
_AUTHORS = {"teacher": _TEACHER, "student": _STUDENT}
_HIDDEN = {"messages", "thinking", "answer", "spans", "error", "finish_reason"}  # shown in their own places
_IDS = ("id", "key", "row_id", "problem_id")

Piece = tuple[int, int, int, str]
"""Author, part, tokens and text of a stretch of a row."""


def write(
    out: Path, title: str, rows: Iterable[tuple[int, Mapping[str, Any]]], summary: dict[str, Any],
    *, against: tuple[str, Dataset] | None = None, head: Mapping[str, Any],
) -> None:  # fmt: skip
    """Write the report.

    Args:
        out: The HTML file.
        title: The dataset's name.
        rows: The rows to show, each with its place in the dataset, with the columns of :mod:`tessy_hf.rows.columns`.
        summary: The numbers of the whole dataset, from which the figures are drawn.
        against: Name and rows of a second dataset; a row stands beside the one with the same prompt.
        head: What else the template shows: ``subtitle``, ``tiles``, ``tables``.
    """
    partner = _partners(against[1]) if against else None
    index = Index([title, against[0] if against else None])
    texts = list(_packed_chunks(rows, index, partner))
    page = _page(title=title, index=_pack(index.columns()), summary=summary, **head)
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", encoding="utf-8") as file:
        file.write(page)
        _write_chunks(file, texts)
        file.write("</body>\n</html>\n")


class Index:
    """What the list, the search and the filters need of every row, column by column."""

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
    """Pack the texts of the rows, many together, and fill the index."""
    chunk: list[Any] = []
    size = 0
    for number, row in rows:
        turns = _prompt(row)
        if not chunk:
            index.chunks.append(len(index.rows))
        index.add(number, row, turns[-1][1] if turns else "")
        pieces = _pieces(row)
        other = partner(_key(turns)) if partner else None
        chunk.append([turns, pieces, row.get("error"), _details(row, turns), other])
        size += sum(len(text) for _, text in turns) + sum(len(piece[3]) for piece in pieces)
        size += sum(len(piece[3]) for piece in other[0]) if other else 0
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
    """Return role and text of the messages before the finished turn."""
    messages = row["messages"] or []
    if messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    return [(str(message["role"]), content_text(message["content"])) for message in messages]


def _key(turns: Sequence[tuple[str, str]]) -> str:
    """Return what rows of the same prompt have in common, whatever their system prompt."""
    return json.dumps([turn for turn in turns if turn[0] != "system"])


def _partners(dataset: Dataset) -> Callable[[str], Any]:
    """Return what gives the row with a prompt, each of several rows once."""
    places: dict[str, deque[int]] = {}
    for place, row in enumerate(dataset.select_columns("messages")):
        places.setdefault(_key(_prompt(row)), deque()).append(place)

    def partner(key: str) -> Any:
        left = places.get(key)
        if not left:
            return None
        row = dataset[left.popleft()]
        return [_pieces(row), row.get("error"), _permille(row), _tokens(row), row.get("finish_reason")]

    return partner


def _pieces(row: Mapping[str, Any]) -> list[Piece]:
    """Cut the assistant's text at its spans, and the markers around the thinking off them.

    Where the spans do not cover the text (rows of other origin, edited rows), nobody is said to have written it.
    """
    whole, dialect = assistant_text(row)
    spans = row.get("spans") or []
    if not whole or not spans or spans[0]["start"] != 0 or spans[-1]["end"] != len(whole):
        return [(_UNKNOWN, PARTS.index("answer"), 0, whole)] if whole else []
    thinking = [at for at, span in enumerate(spans) if span["part"] == "thinking"]
    pieces: list[Piece] = []
    for at, span in enumerate(spans):
        author, part = _AUTHORS.get(span["author"], _UNKNOWN), PARTS.index(span["part"])
        text, before, after = whole[span["start"] : span["end"]], "", ""
        if at == 0 and text.startswith(dialect.open):
            before, text = dialect.open, text[len(dialect.open) :]
        if thinking and at == thinking[-1] and text.endswith(dialect.close):
            after, text = dialect.close, text[: -len(dialect.close)]
        pieces += [(_MARK, part, 0, before)] if before else []
        pieces.append((author, part, span["tokens"], text))
        pieces += [(_MARK, part, 0, after)] if after else []
    return pieces


def _details(row: Mapping[str, Any], turns: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Return the other columns as text, without the prompt once more."""
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


# --- the page


def _page(*, title: str, index: str, summary: dict[str, Any], **head: Any) -> str:
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    here = resources.files(__package__)
    script, style = ((here / f"viewer.{kind}").read_text("utf-8") for kind in ("js", "css"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    drawn = [
        {"svg": Markup(svg(figures.image(name, summary))), "description": figures.describe(name, summary)}  # noqa: S704 - our own
        for name in figures.NAMES
    ]
    template = Environment(autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True).from_string(
        (here / "viewer.html").read_text("utf-8")
    )
    ours = {name: Markup(text) for name, text in {"script": script, "style": style, "policy": policy}.items()}  # noqa: S704
    return template.render(title=title, index=index, figures=drawn, **ours, **head)


def svg(image: bytes) -> str:
    """Return a light figure with the colours and letters of the page around it, light or dark."""
    drawn = image.decode()
    drawn = drawn[drawn.index("<svg") :]
    light = figures.THEMES["light"]
    colours = {
        light.text: "text", light.muted: "muted", light.line: "line", light.teacher: "teacher",
        light.student: "student-fill", light.third: "third",
    }  # fmt: skip
    for colour, variable in colours.items():
        drawn = drawn.replace(colour, f"var(--{variable})")
    return re.sub(r"'DejaVu Sans'", "inherit", drawn)
