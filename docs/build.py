"""Build the documentation site into build/docs/site. A warning of any kind fails the build. Called by `make docs`.

Pages under docs/, README.md, CHANGELOG.md, CONTRIBUTING.md and the recipes go in; reference pages for settings and the
command line are made from the code. Links to files that are not on the site become plain paths.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import griffe
import nbformat
import typer
from roles import plain

from tessy_hf.cli.main import app
from tessy_hf.settings import Method, Settings

ROOT = Path(__file__).parents[1]
WORK = ROOT / "build" / "docs"
PAGES = WORK / "pages"
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")
EXTERNAL = ("http://", "https://", "mailto:", "#")

SECTIONS = {
    "Tutorials": ("tutorials", ["first-rows", "own-models", "verified-code", "train", "release"]),
    "Guides": ("guides", ["large-runs", "servers", "serve", "clusters", "hub", "resume", "methods", "rules"]),
    "Reference": ("reference", ["api", "settings", "columns", "command-line"]),
    "Explanation": ("explanation", ["method", "guarantees", "identity"]),
}
"""Folders of pages, and the pages that come first in them; others follow by name."""

TYPES = {
    "Method": " | ".join(map(repr, get_args(Method))),
    "PerAuthor": "by author",
    "TokenCount": "int",
    "Temperature": "float",
    "Share": "float",
    "Penalty": "float",
    "_Path": "path",
}
"""Words for the names of types in the reference of settings."""

ALSO = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
"""Pages from elsewhere in the repository, and their places on the site."""


def sources() -> dict[str, str]:
    """Return the site's path of each file that is copied, by its path in the repository."""
    found = {path.relative_to(ROOT): path.relative_to(ROOT / "docs") for path in (ROOT / "docs").rglob("*.*")}
    found |= {path.relative_to(ROOT): "reference" / path.relative_to(ROOT) for path in (ROOT / "recipes").rglob("*.*")}
    found |= {path.relative_to(ROOT): path.relative_to(ROOT) for path in (ROOT / "examples").glob("*.ipynb")}
    kept = {
        str(old): str(new) for old, new in found.items() if old.suffix in (".md", ".png", ".css", ".yaml", ".ipynb")
    }
    return ALSO | {old: re.sub(r"README\.md$", "index.md", new) for old, new in kept.items()}


def copy(old: str, published: dict[str, str]) -> None:
    """Copy one file; pages with their links turned to where things are on the site."""
    target = PAGES / published[old]
    target.parent.mkdir(parents=True, exist_ok=True)
    if old.endswith(".ipynb"):
        target.with_suffix(".md").write_text(notebook_page(ROOT / old), encoding="utf-8")
    if not old.endswith(".md"):
        shutil.copy(ROOT / old, target)
        return

    def turned(found: re.Match[str]) -> str:
        picture, words, link = found.groups()
        if link.startswith(EXTERNAL):
            return found[0]
        path, _, anchor = link.partition("#")
        place = os.path.normpath(os.path.join(os.path.dirname(old), path))
        place = f"{place}/README.md" if f"{place}/README.md" in published else place
        if place not in published:
            if not (ROOT / place).exists():
                raise SystemExit(f"{old}: the link to {link!r} leads nowhere.")
            return words if "`" in words else f"{words} (`{place}`)"
        there = os.path.relpath(published[place], os.path.dirname(published[old]))
        there = there.replace(".ipynb", ".md") + (f"#{anchor}" if anchor else "")
        return f"{picture}[{words}]({there})"

    target.write_text(LINK.sub(turned, (ROOT / old).read_text(encoding="utf-8")), encoding="utf-8")


def notebook_page(path: Path) -> str:
    """Return a notebook as a page: its text, and its code in fences."""
    cells = nbformat.read(path, as_version=4).cells
    shown = [cell.source if cell.cell_type == "markdown" else f"```python\n{cell.source}\n```" for cell in cells]
    return "\n\n".join([*shown, f"[Download the notebook]({path.name})"]) + "\n"


def settings_page() -> str:
    """Return the reference of settings, from their types, defaults and docstrings."""
    documented = griffe.load("tessy_hf.settings", search_paths=[ROOT])["Settings"]
    names = re.compile(rf"\b({'|'.join(TYPES)})\b")
    lines = ["# Settings", "", (ROOT / "docs/reference/settings.txt").read_text(encoding="utf-8")]
    for name, field in Settings.model_fields.items():
        words = plain(field.description or "")
        kind = names.sub(lambda found: TYPES[found[1]], str(documented[name].annotation))
        kind = re.sub(r"Annotated\[Any, .*\]|^Any$", "name | mapping | function", kind)
        kind = re.sub(r"Annotated\[(\w+), .*?\)\]", r"\1", re.sub(r"Literal\[(.+?)\]", r"\1", kind))
        kind = re.sub(r"by author\[(\w+)\]", r"{teacher: \1, student: \1}", kind)
        lines += [f"## `{name}`", "", f"`{kind}`, by default `{field.default!r}`", "", words, ""]
    return "\n".join(lines)


def command_page() -> str:
    """Return the reference of the command line, from its own help."""
    root: Any = typer.main.get_command(app)
    lines = ["# Command line", "", f"{root.help}", ""]
    for name, command in root.commands.items():
        lines += [f"## tessy {name}", "", str(command.help).replace("\b", ""), "", *parameters(name, command)]
    return "\n".join(lines)


def parameters(name: str, command: Any) -> Iterator[str]:
    """Yield the usage of a command, and its arguments and options as a table."""
    context = typer.Context(command, info_name=f"tessy {name}")
    usage = " ".join(command.collect_usage_pieces(context))
    usage = re.sub(r"[{[](\w+)[}\]]", lambda found: found[0].strip("{}").upper(), usage)
    yield from ("```text", f"tessy {name} {usage}", "```", "")
    yield from ("| argument or option | |", "|---|---|")
    for one in command.get_params(context):
        if one.name != "help":
            names = (
                ", ".join([*one.opts, *one.secondary_opts])
                if one.param_type_name == "option"
                else str(one.metavar or one.name).upper()
            )
            default = "" if one.default in (None, False) or one.required else f" By default `{one.default}`."
            yield f"| `{names}` | {(getattr(one, 'help', '') or '').replace('|', chr(92) + '|')}{default} |"
    yield ""


def navigation() -> list[Any]:
    """Return the site's navigation: the known pages in their order, then all others of their folder."""
    nav: list[Any] = [{"Home": "index.md"}]
    for title, (folder, order) in SECTIONS.items():
        found = {path.stem: f"{folder}/{path.name}" for path in sorted((PAGES / folder).glob("*.md"))}
        if folder in ("tutorials", "guides"):  # a tutorial, whatever its folder
            found |= {"first-rows": "guides/first-rows.md"}
        if folder == "guides":
            del found["first-rows"]
        first = [found.pop(name) for name in order if name in found]
        nav.append({title: [*first, *found.values()]})
    recipes = [str(path.relative_to(PAGES)) for path in sorted((PAGES / "reference/recipes").rglob("*.md"))]
    recipes.sort(key=lambda path: path != "reference/recipes/index.md")
    nav[3]["Reference"].append({"Recipes": recipes})
    notebooks = [f"examples/{path.name}" for path in sorted((PAGES / "examples").glob("*.md"))]
    nav[1]["Tutorials"] += [{"Notebooks": notebooks}]
    return [
        *nav,
        {"Troubleshooting": "troubleshooting.md"},
        {"Changelog": "changelog.md"},
        {"Contributing": "contributing.md"},
    ]


def toml(value: Any) -> str:
    """Return the navigation in TOML."""
    if isinstance(value, str):
        return json.dumps(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {toml(one)}" for key, one in value.items()) + "}"
    return "[" + ", ".join(map(toml, value)) + "]"


def main() -> None:
    """Lay out the pages, build the site, and fail if anything was said that needs to be looked at."""
    shutil.rmtree(WORK, ignore_errors=True)
    published = sources()
    for old in published:
        copy(old, published)
    (PAGES / "reference/settings.md").write_text(settings_page(), encoding="utf-8")
    (PAGES / "reference/command-line.md").write_text(command_page(), encoding="utf-8")
    described = (ROOT / "docs/zensical.toml").read_text(encoding="utf-8")
    described = described.replace("[project]\n", f"[project]\nnav = {toml(navigation())}\n", 1)
    (WORK / "zensical.toml").write_text(described, encoding="utf-8")
    command = [sys.executable, "-m", "zensical", "build", "--clean", "--strict"]
    done = subprocess.run(command, cwd=WORK, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout)
    warnings = [
        line for line in done.stdout.splitlines() if line.startswith(("griffe:", "WARNING", "mkdocs_autorefs"))
    ]
    if done.returncode or warnings:
        raise SystemExit(f"The site has {len(warnings)} warnings, see above." if warnings else done.returncode)
    print(f"The site is in {WORK / 'site'}.")


if __name__ == "__main__":
    main()
