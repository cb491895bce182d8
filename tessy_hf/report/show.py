"""Show a finished row, its text colored by author: in a terminal, or as HTML in a notebook.

Text of prompts and models is data: markup in it is escaped, and so are control characters, which drive terminals.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console, ConsoleOptions
from rich.text import Text

from tessy_hf.report.tables import percent
from tessy_hf.report.viewer import prompt_turns, row_id, shown

STYLES = {"teacher": "black on sky_blue1", "student": "black on light_salmon1", "": "dim"}
"""How text is shown in a terminal, by author; markers around the thinking have none."""

_AUTHORS = ("teacher", "student", "", "")
_TINTS = {"teacher": "background:#0b69a82b;border-bottom:2px solid #0b69a8", "": "opacity:.6"}
_TINTS["student"] = "background:#d9731a2b;border-bottom:2px dotted #d9731a"
_HIDDEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    r"""Return text with control and direction characters spelled out, such as ``\x1b``; line ends and tabs stay."""
    return _HIDDEN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class ShownRow:
    """A row to look at: ``print`` it, or let a notebook show it.

    Where there are no colors (``NO_COLOR``, a file, a pipe), the teacher's text stands in guillemets.

    Args:
        row: A finished row, with ``messages`` and ``spans``.
        number: Names the row where it has no id.
    """

    def __init__(self, row: Mapping[str, Any], number: int | None = None) -> None:
        self.row, self._number = row, number

    @property
    def heading(self) -> str:
        """The row's id, and how it ended."""
        row = self.row
        tokens = sum(row.get(f"{author}_tokens") or 0 for author in ("teacher", "student"))
        share, name = row.get("teacher_token_ratio"), row_id(row)
        name = str(self._number) if name is None and self._number is not None else name
        facts = [
            f"row {name}" if name is not None else "",
            str(row.get("finish_reason") or "unfinished"),
            f"{tokens:,} tokens" if tokens else "",
            f"teacher {percent(share)}" if share is not None else "",
            f"verdict {row['verdict']:g}" if row.get("verdict") is not None else "",
        ]
        return visible(" · ".join(filter(None, facts)))

    def spans(self) -> Iterator[tuple[str, int, str]]:
        """Iterate over author (empty for markers), tokens and text of the assistant's turn."""
        for author, _, tokens, text in shown(self.row):
            yield _AUTHORS[author], tokens, visible(text)

    def prompt(self) -> list[tuple[str, str]]:
        """Return role and text of the messages before."""
        return [(visible(role), visible(text)) for role, text in prompt_turns(self.row)]

    def text(self, *, colored: bool) -> Text:
        """Return the row for a terminal, or without colors."""
        text = Text().append(f"{self.heading}\n", "bold")
        for role, said in self.prompt():
            text.append(f"{role}: ", style="bold").append(f"{said}\n")
        text.append("\n")
        for author, _, said in self.spans():
            text.append(
                f"«{said}»" if author == "teacher" and not colored else said, STYLES[author] if colored else ""
            )
        if self.row.get("error"):
            text.append(f"\nerror: {visible(str(self.row['error']))}", "bold red")
        return text.append("\n")

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        yield self.text(colored=console.is_terminal and not console.no_color)

    def __repr__(self) -> str:
        console = Console(force_jupyter=False)
        with console.capture() as captured:
            console.print(self, soft_wrap=True)
        return captured.get().rstrip("\n")

    def _repr_html_(self) -> str:
        from markupsafe import Markup

        span = Markup('<span style="{}" title="{}">{}</span>')
        asked = [Markup("<b>{}</b> {}\n").format(role, said) for role, said in self.prompt()]
        wrote = [span.format(_TINTS[a], f"{a}, {n} tokens" if n else a, said) for a, n, said in self.spans()]
        error = Markup("\n<b>error</b> {}").format(visible(str(self.row["error"]))) if self.row.get("error") else ""
        legend = Markup(" ").join(span.format(_TINTS[author], author, author) for author in ("teacher", "student"))
        return Markup(
            '<div dir="auto" style="white-space:pre-wrap;overflow-wrap:anywhere;max-width:52em;line-height:1.5">'
            "<small>{} · {}</small>\n{}\n{}{}</div>"
        ).format(self.heading, legend, Markup("").join(asked), Markup("").join(wrote), error)


def show(row: Mapping[str, Any]) -> ShownRow:
    """Show a finished row colored by author, in a notebook or with ``print``."""
    return ShownRow(row)


def legend(*, colored: bool) -> Text:
    """Say how the authors are told apart."""
    text = Text()
    for author in ("teacher", "student"):
        mark = f"«{author}»" if author == "teacher" and not colored else author
        text.append(f" {mark} " if colored else f"{mark} ", STYLES[author] if colored else "").append(" ")
    return text
