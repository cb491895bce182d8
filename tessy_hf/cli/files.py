"""Files that commands read and write. Knows no models."""

from __future__ import annotations

import sys
from typing import Any


def load(
    data: str, split: str, config: str | None = None, *, streaming: bool = True, line_column: str = "text"
) -> Any:
    """Load prompts, traces or rows by name, see :func:`tessy_hf.rows.loading.load`; in a log file without a bar."""
    import datasets

    from tessy_hf.rows import loading

    silent = not sys.stderr.isatty() and datasets.is_progress_bar_enabled()
    if silent:
        datasets.disable_progress_bars()
    try:
        return loading.load(data, split, config, streaming=streaming, line_column=line_column)
    finally:
        if silent:
            datasets.enable_progress_bars()
