"""Files that commands read and write. Knows no models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from tessy_hf.errors import TessyError


def load(
    data: str, split: str, config: str | None = None, *, streaming: bool = True, line_column: str = "text"
) -> Any:
    """Load prompts, traces or rows by name, see :func:`tessy_hf.rows.loading.load`."""
    from tessy_hf.rows import loading

    return loading.load(data, split, config, streaming=streaming, line_column=line_column)


def check_output(out: Path) -> str:
    """Return the ending of an output file, refusing those that cannot be written."""
    if out.suffix not in (".parquet", ".jsonl"):
        raise TessyError(
            f"The output {str(out)!r} is neither .parquet nor .jsonl. Pass a path with one of these endings."
        )
    return out.suffix


def write(dataset: Any, out: Path) -> None:
    """Write finished rows to a file and say so."""
    out.parent.mkdir(parents=True, exist_ok=True)
    (dataset.to_parquet if check_output(out) == ".parquet" else dataset.to_json)(str(out))
    Console().print(f"{len(dataset)} rows in {out}", soft_wrap=True)
