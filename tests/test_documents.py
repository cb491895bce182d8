"""What the documentation says is there: links, anchors, commands and options, columns, settings."""

import ast
import re
import shlex
from itertools import pairwise

import pytest
import typer
from markdown_it import MarkdownIt

from tessy_hf.cli.main import app
from tessy_hf.rows.columns import COLUMNS
from tests.documents import PAGES, ROOT, RUN, blocks

MARKDOWN = MarkdownIt("commonmark").enable("table")


def name_of(page):
    return str(page.relative_to(ROOT))


def anchors(page):
    """The anchors of a page's headings, as GitHub and the site make them."""
    tokens = MARKDOWN.parse(page.read_text(encoding="utf-8"))
    titles = [after.content for token, after in pairwise(tokens) if token.type == "heading_open"]
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def links(page):
    for token in MARKDOWN.parse(page.read_text(encoding="utf-8")):
        for child in token.children or ():
            target = child.attrs.get("href") or child.attrs.get("src")
            if target and not target.startswith(("http://", "https://", "mailto:")):
                yield target


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_files_and_anchors(page):
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{link!r} leads nowhere"
        if anchor and target.suffix == ".md" and target.name != "api.md":  # the site makes that page's anchors
            assert anchor in anchors(target), f"{link!r}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_blocks_compile_and_commands_exist(page):
    for block in blocks(page):
        if block.language == "python":
            ast.parse(block.code, filename=f"{page.name}:{block.line}")
        else:
            for words in commands(block.code):
                check_command(words)


def commands(code):
    """The uses of `tessy` in a block of the shell, as words."""
    for line in code.replace("\\\n", " ").replace("$ tessy", "tessy").splitlines():
        if not line.startswith("tessy "):
            continue
        lexer = shlex.shlex(line, posix=True, punctuation_chars="();|&<>")
        lexer.whitespace_split = True
        words = list(lexer)
        ends = [at for at, word in enumerate(words) if set(word) <= set("();|&<>")]
        yield words[1 : min(ends, default=len(words))]


def check_command(words):
    """Parse the arguments as the command does, and call nothing."""
    root = typer.main.get_command(app)
    assert words and words[0] in root.commands, f"there is no `tessy {words[0] if words else ''}`"
    root.commands[words[0]].make_context(words[0], words[1:])


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_in_the_text_exist(page):
    """Words such as `tessy plan --rows 8` within a sentence, where arguments are left out."""
    commands = typer.main.get_command(app).commands
    text = page.read_text(encoding="utf-8")
    for name, words in re.findall(r"(?<!`)`tessy ([a-z][a-z-]*)([^`]*)`(?!`)", text):
        assert name in commands, f"there is no `tessy {name}`"
        known = {option for one in commands[name].params for option in [*one.opts, *one.secondary_opts]}
        assert set(re.findall(r"--[a-z][a-z-]*", words)) <= known | {"--help"}, f"tessy {name}{words}"


def test_each_column_is_in_the_reference():
    text = (ROOT / "docs" / "reference" / "columns.md").read_text(encoding="utf-8")
    assert [name for name in COLUMNS if f"`{name}`" not in text] == []


def test_the_readme_fits_on_two_hundred_lines_and_runs_something():
    readme = ROOT / "README.md"
    assert len(readme.read_text(encoding="utf-8").splitlines()) <= 200
    assert {block.language for block in blocks(readme) if block.runs} == {"python", "bash"} and readme in RUN


def test_quoted_errors_are_in_the_code():
    """Headings of the page on troubleshooting quote messages, which the code may cut at any place."""
    code = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tessy_hf").rglob("*.py"))
    joined = re.sub(r'"\s*\n\s*f?"', "", code)
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = [words for line in re.findall(r"^### .*", page, re.MULTILINE) for words in re.findall("`(.+?)`", line)]
    assert len(quoted) > 15 and [words for words in quoted if words not in joined] == []
