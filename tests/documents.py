"""The documentation's pages, their links, and their blocks of code. Run as a module it executes all blocks.

Each page is tried as a reader would, top to bottom, in a folder of its own that sees the checkout's recipes and data,
and has some ``prompts.jsonl``.
A block after ``<!-- not run: why -->`` is left out. Called by ``make test-readme``.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from markdown_it import MarkdownIt

from tessy_hf import demo

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "recipes").rglob("README.md")),
]
ELSEWHERE = {"boundary-predictors", "first-rows", "hub", "rules", "serve", "servers"}
"""Guides whose commands need models, servers or the Hub, or run in the tests of what they are about."""

RUN = [ROOT / "README.md", *(page for page in sorted((ROOT / "docs").rglob("*.md")) if page.stem not in ELSEWHERE)]
"""Pages whose blocks are executed."""

_SKIPPED = re.compile(r"<!-- not run: .+ -->")
_SEEN = ("recipes", "tests", "dataset_cards", "tessy_hf")


class Block(NamedTuple):
    """One block of code: its language, its text, the line it begins at, and whether it is executed."""

    language: str
    code: str
    line: int
    runs: bool


def blocks(page: Path) -> Iterator[Block]:
    """Yield the blocks of Python and of the shell in a page; sessions (``console``) are not executed here."""
    before = ""
    for token in MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8")):
        if token.type == "fence" and token.info in ("python", "bash", "console"):
            runs = token.info != "console" and not _SKIPPED.fullmatch(before)
            yield Block(token.info, token.content, token.map[0] + 1, runs)
        if token.type in ("fence", "html_block", "inline"):
            before = token.content.strip()


def run(page: Path) -> int:
    """Execute a page's blocks in their order. Blocks of Python share one process's names, those of the shell a folder.

    Returns:
        How many were executed.

    Raises:
        SystemExit: One failed.
    """
    script, count = [], 0
    for block in blocks(page):
        if block.runs:
            count += 1
            end = f"BLOCK_{count}"
            name = f"{count}.{'py' if block.language == 'python' else 'sh'}"
            script.append(f"cat > .blocks/{name} <<'{end}'\n{block.code}{end}")
            if block.language == "bash":
                script.append(f". .blocks/{name}")
            else:  # names of earlier blocks are there
                script.append(f"cat .blocks/{name} >> .blocks/page.py; echo >> .blocks/page.py")
    if not count:
        return 0
    script.append("if [ -f .blocks/page.py ]; then python .blocks/page.py; fi")
    with tempfile.TemporaryDirectory() as folder:
        for name in _SEEN:
            (Path(folder) / name).symlink_to(ROOT / name)
        (Path(folder) / ".blocks").mkdir()
        demo.prompts(4, seed=29).to_json(Path(folder) / "prompts.jsonl")
        environment = {
            **os.environ,
            "PATH": os.pathsep.join([f"{folder}/.blocks", str(Path(sys.executable).parent), os.environ["PATH"]]),
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "HF_HOME": f"{folder}/.hf",
            "HF_HUB_OFFLINE": "1",
        }
        _command(Path(folder) / ".blocks" / "tessy", f'exec "{sys.executable}" -m tessy_hf.cli.main "$@"')
        _command(Path(folder) / ".blocks" / "python", f'exec "{sys.executable}" "$@"')
        _command(Path(folder) / ".blocks" / "pip", "true")  # nothing is installed by a test
        shell = ["bash", "-euo", "pipefail", "-c", "\n".join(script)]
        done = subprocess.run(shell, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{page.relative_to(ROOT)}: a block failed.\n{done.stdout[-3000:]}\n{done.stderr[-5000:]}")
    return count


def _command(path: Path, line: str) -> None:
    path.write_text(f"#!/usr/bin/env bash\n{line}\n")
    path.chmod(0o755)


def main() -> None:
    """Execute the pages that are named, or all, two at a time."""
    pages = [Path(name).resolve() for name in sys.argv[1:]] or RUN

    def timed(page: Path) -> str:
        begin = time.monotonic()
        return f"{page.relative_to(ROOT)}: {run(page)} block(s) ran in {time.monotonic() - begin:.0f} s."

    with ThreadPoolExecutor(2) as both:
        for line in both.map(timed, pages):
            print(line, flush=True)


if __name__ == "__main__":
    main()
