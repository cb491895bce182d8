"""Files that commands read and write. Knows no models."""

from __future__ import annotations

from typing import Any


def load(
    data: str, split: str, config: str | None = None, *, streaming: bool = True, line_column: str = "text"
) -> Any:
    """Load prompts, traces or rows by name, see :func:`tessy_hf.rows.loading.load`."""
    from tessy_hf.rows import loading

    return loading.load(data, split, config, streaming=streaming, line_column=line_column)
