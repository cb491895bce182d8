"""Run the README's Python blocks that do not need the Hub, as a newcomer would. Called by `make test-readme`."""

import re
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"
BLOCK = re.compile(r"(<!-- not run[^\n]*-->\n)?```python\n(.*?)```", re.DOTALL)


def runnable_blocks():
    """The README's Python blocks without those marked as not run."""
    blocks = [code for skipped, code in BLOCK.findall(README.read_text(encoding="utf-8")) if not skipped]
    assert blocks, "README.md has no Python block to run."
    return blocks


def main():
    blocks = runnable_blocks()
    for code in blocks:
        exec(compile(code, str(README), "exec"), {"__name__": "__main__"})
    print(f"README.md: {len(blocks)} block(s) ran.")


if __name__ == "__main__":
    main()
