"""Files that commands read and write. Knows no models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from tessy_hf.errors import DatasetError, TessyError

if TYPE_CHECKING:
    pass


KINDS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
"""File endings and the `datasets` builders that read them."""


def load(data: str, split: str, config: str | None = None, *, streaming: bool = True) -> Any:
    """Load prompts, traces or rows: a file, or a dataset on the Hub as ``user/name`` or ``user/name@revision``."""
    from datasets import load_dataset

    kind = KINDS.get(Path(data).suffix)
    if kind is None:
        name, _, revision = data.partition("@")
        return load_dataset(name, config, split=split, revision=revision or None, streaming=streaming)
    if not any(mark in data for mark in ("://", "*")) and not Path(data).is_file():
        raise DatasetError(f"There is no file {data!r}. Check the path, or name a dataset on the Hub.")
    return load_dataset(kind, data_files=data, split=split, streaming=streaming)


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
