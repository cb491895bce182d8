"""Files that commands read and write. Knows no models."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tessy_hf.errors import OutputError


def load(
    data: str, split: str, config: str | None = None, *, streaming: bool = True, line_column: str = "text"
) -> Any:
    """Load prompts, traces or rows by name, see :func:`tessy_hf.rows.loading.load`."""
    from tessy_hf.rows import loading

    with quiet():
        return loading.load(data, split, config, streaming=streaming, line_column=line_column)


def check_page(out: Path) -> None:
    """Refuse to write a page over rows.

    Raises:
        OutputError: The name does not end as a page's does.
    """
    if out.suffix.lower() not in (".html", ".htm"):
        raise OutputError(f"{out} would be overwritten with a page. A name that ends in .html is expected; pass one.")


@contextmanager
def quiet() -> Iterator[None]:
    """Draw no bars of `datasets` where they cannot be drawn over, as in a log file."""
    import datasets

    silent = not sys.stderr.isatty() and datasets.is_progress_bar_enabled()
    if silent:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if silent:
            datasets.enable_progress_bars()
