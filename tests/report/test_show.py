"""Rows in terminals and notebooks: colored by author, and nothing in their text is markup or drives the terminal."""

import io
import re

import pytest
from rich.console import Console

from tessy_hf import show
from tessy_hf.report.show import visible


def row(**changes):
    spans = [("student", "<think>\nokay "), ("teacher", "2 & 3 = 4\n</think>\n\n"), ("student", "so [bold]4[/].")]
    text, laid = "", []
    for author, said in spans:
        part = "answer" if said.startswith("so") else "thinking"
        laid.append({"author": author, "part": part, "start": len(text), "end": len(text + said), "tokens": 2})
        text += said
    messages = [{"role": "user", "content": "<b>What</b> is [red]2 & 3?"}, {"role": "assistant", "content": text}]
    return {
        "id": "q1", "messages": messages, "thinking": "okay 2 & 3 = 4", "answer": "so [bold]4[/].", "spans": laid,
        "teacher_tokens": 2, "student_tokens": 4, "teacher_token_ratio": 1 / 3, "finish_reason": "stop", "error": None,
        "verdict": 1.0, **changes,
    }  # fmt: skip


def printed(one, **options):
    console = Console(file=io.StringIO(), width=200, **options)
    console.print(show(one))
    return console.file.getvalue()


PLAIN = """row q1 · stop · 6 tokens · teacher 33.3% · verdict 1
user: <b>What</b> is [red]2 & 3?

<think>
okay «2 & 3 = 4»
</think>

so [bold]4[/].
"""


def test_without_colors_the_teachers_text_stands_in_guillemets():
    assert printed(row()) == PLAIN + "\n"
    assert repr(show(row())) == PLAIN.rstrip("\n")
    assert "«2 & 3 = 4»" in printed(row(), force_terminal=True, no_color=True)  # as NO_COLOR sets it


def test_a_terminal_shows_the_authors_by_color():
    text = printed(row(), force_terminal=True, color_system="truecolor", no_color=False)
    assert "«" not in text and re.search(r"\x1b\[30;[\d;]+m2 & 3 = 4\x1b\[0m", text)


def test_a_notebook_gets_escaped_html_with_author_and_tokens():
    html = show(row())._repr_html_()
    assert "&lt;b&gt;What&lt;/b&gt;" in html and "<b>What" not in html and "&lt;think&gt;" in html
    assert 'title="teacher, 2 tokens">2 &amp; 3 = 4</span>' in html and 'dir="auto"' in html


HOSTILE = "a\x1b[2J\x07b\r\x9bc\u202ed\u2028\ud800<img src=x onerror=alert(1)>\tz"


CHANGES = {
    "content": {
        "messages": [{"role": role, "content": HOSTILE} for role in ("user", "assistant")],
        **{"spans": [], "thinking": "", "answer": HOSTILE},
    },
    "error": {"error": HOSTILE},
    "id": {"id": HOSTILE},
}


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_control_characters_are_spelled_out(changes):
    given = row(**changes)
    html = show(given)._repr_html_()
    for text in (printed(given, force_terminal=True, color_system=None), html):
        assert not set(text) & set("\x1b\x07\r\x9b\u202e\u2028\ud800") and r"a\x1b[2J\x07b\r\x9bc" in text
    assert "<img" not in html


def test_line_ends_tabs_and_letters_stay():
    assert visible("ä\n\t漢字 🙂 ﷽") == "ä\n\t漢字 🙂 ﷽"


@pytest.mark.parametrize("bare", [{"messages": []}, {"messages": [{"role": "user", "content": "hi"}]}])
def test_rows_of_other_origin_are_shown_as_they_are(bare):
    assert "unfinished" in printed(bare) and show(bare)._repr_html_()
