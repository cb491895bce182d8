"""Load rows by name: a file, a folder or a dataset on the Hub goes in, a dataset of `datasets` comes out.

Local files are read whole before :func:`load` returns, so that a broken line is reported before a run starts. Knows
nothing of what the columns mean.
"""

from __future__ import annotations

import json
import re
import zlib
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyarrow.lib import ArrowException

from tessy_hf.errors import DatasetError
from tessy_hf.rows import columns, foreign
from tessy_hf.text.thinking_format import THINK_TAGS, ThinkingFormat

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

    from tessy_hf.text.vocabulary import Vocabulary

_STRICT = {"encoding": "utf-8-sig"}  # checks the bytes, which plain "utf-8" of the JSON builder does not; drops a BOM

FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    ".parquet": ("parquet", {}),
    ".jsonl": ("json", _STRICT),
    ".ndjson": ("json", _STRICT),
    ".json": ("json", _STRICT),
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
    ".txt": ("text", _STRICT),
}
"""For each ending of a file the builder of `datasets` that reads it, with its options."""

COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")

_REPO = re.compile(r"(?P<repo>[\w.-]+(/[\w.-]+)?)(@(?P<revision>[\w./-]+))?")
_FAULTS = (ArrowException, EOFError, ImportError, LookupError, OSError, StopIteration, ValueError, zlib.error)
_EMPTY = ("StopIteration", "EmptyDataError", "SchemaInferenceError")  # what builders raise for an empty file


def load(
    source: str,
    split: str = "train",
    config_name: str | None = None,
    *,
    streaming: bool = False,
    line_column: str = "text",
) -> Any:
    """Load the rows of a file, a folder or a dataset on the Hub.

    Args:
        source: A file with one of the endings in :data:`FORMATS`, in any case, perhaps compressed
            (:data:`COMPRESSIONS`); a pattern (``data/*.jsonl``) or URL of such files; a folder that ``save_to_disk``
            wrote or that holds data files; or a dataset on the Hub, ``me/data`` or ``me/data@v1.0.0``.
        split: Which split, where there are several; slices as in ``train[:20]`` work everywhere.
        config_name: Which configuration of a dataset on the Hub.
        streaming: Whether to return an ``IterableDataset``, which does not download what is on the Hub first.
        line_column: The column that holds the lines of a ``.txt`` file, empty lines left out.

    Returns:
        A ``Dataset``, or an ``IterableDataset`` if ``streaming``.

    Raises:
        DatasetError: There is no such source, or it cannot be read.
    """
    from datasets import IterableDataset
    from datasets.exceptions import DatasetsError

    try:
        dataset = _load(source, split, config_name, streaming and "[" not in split, line_column)
    except (*_FAULTS, DatasetsError) as error:
        raise DatasetError(
            f"{source!r} cannot be read: {_reason(source, error)}. Expected is a file ({', '.join(FORMATS)}, also "
            "compressed), a folder that save_to_disk wrote, or a dataset on the Hub such as me/data@v1.0.0, with a "
            f"split {split!r}. Check the name, the split and HF_TOKEN."
        ) from error
    return dataset.to_iterable_dataset() if streaming and not isinstance(dataset, IterableDataset) else dataset


def load_finished(
    source: str,
    split: str = "train",
    config_name: str | None = None,
    *,
    thinking_format: ThinkingFormat = THINK_TAGS,
    vocabulary: Vocabulary | None = None,
) -> Dataset:
    """Load finished rows, those of a run or others' (:func:`tessy_hf.rows.foreign.finished`); see :func:`load`.

    Raises:
        DatasetError: They cannot be read, or are of no known format.
    """
    dataset: Dataset = load(source, split, config_name)
    if {"messages", "spans"} <= set(dataset.column_names):
        return dataset
    return foreign.finished(dataset, thinking_format, vocabulary)


def load_rows(source: str) -> Dataset:
    """Load finished rows from files, with the types of a run, whatever is empty in them; see :func:`load`."""
    dataset: Dataset = load(source)
    message = getattr(dataset.features.get("messages"), "feature", {})
    types = columns.schema(columns.thinking_key(message))
    typed = {name: kind for name, kind in types.items() if name in dataset.features}
    return dataset.cast(type(dataset.features)({**dataset.features, **typed}))


def ending(source: str) -> str | None:
    """Return which of :data:`FORMATS` a name ends in, in small letters and without a compression's own ending."""
    suffixes = [suffix.lower() for suffix in Path(source).suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in FORMATS else None


def short_names(sources: list[str]) -> list[str]:
    """Name datasets for people: by the ends of their paths, or by whole paths where the ends are the same."""
    short = [Path(source).name if Path(source).exists() else source for source in sources]
    return short if len(set(short)) == len(short) else sources


def _load(source: str, split: str, config_name: str | None, streaming: bool, line_column: str) -> Any:
    from datasets import load_dataset, load_from_disk

    path, kind = Path(source), ending(source)
    if kind and (path.is_file() or "*" in source or "://" in source):
        return _load_files(source, kind, split, streaming and "://" in source, line_column)
    if path.is_dir():
        try:
            return _take(load_from_disk(source), split)
        except FileNotFoundError:  # not from save_to_disk: a folder of data files
            return load_dataset(source, config_name, split=split)
    repo = _REPO.fullmatch(source)
    if path.exists():
        raise ValueError("its ending is not known")
    if kind or repo is None:
        raise FileNotFoundError("there is no such file or folder")
    return load_dataset(repo["repo"], config_name, split=split, revision=repo["revision"], streaming=streaming)


def _load_files(source: str, kind: str, split: str, streaming: bool, line_column: str) -> Any:
    from datasets import load_dataset

    if source.lower().endswith(".zst") and find_spec("zstandard") is None:
        raise ImportError("it needs zstandard, which is not installed; run: pip install zstandard")
    if re.split(r"\W", split)[0] != "train":
        raise ValueError("a file has one split, 'train'")
    builder, options = FORMATS[kind]
    dataset = load_dataset(builder, data_files={"train": source}, split=split, streaming=streaming, **options)
    if builder != "text":
        return dataset
    lines = dataset.filter(lambda line: bool(line.strip()), input_columns="text")
    return lines if line_column == "text" else lines.rename_column("text", line_column)


def _take(saved: Dataset | DatasetDict, split: str) -> Dataset:
    """Return a split, or a slice of one, of what ``save_to_disk`` wrote."""
    from datasets import DatasetDict, ReadInstruction, concatenate_datasets

    splits = saved if isinstance(saved, DatasetDict) else {str(saved.split or "train"): saved}
    slices = ReadInstruction.from_spec(split).to_absolute({name: len(rows) for name, rows in splits.items()})
    return concatenate_datasets([splits[part.splitname].select(range(part.from_, part.to)) for part in slices])


def _reason(source: str, error: BaseException) -> str:
    """Say in a few words why a source cannot be read, with the line where one is broken."""
    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    if {type(one).__name__ for one in chain} & set(_EMPTY):
        return "it is empty"
    if ending(source) in (".jsonl", ".ndjson") and (line := _broken_line(source)):
        return line
    return (str(chain[-1]).splitlines() or [type(chain[-1]).__name__])[0].rstrip(".!")


def _broken_line(source: str) -> str | None:
    """Name the first line that is not JSON, if there is one."""
    import fsspec

    try:
        with fsspec.open(source, "rt", encoding="utf-8", compression="infer") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    json.loads(line.strip() or "null")
                except json.JSONDecodeError as error:
                    return f"line {number} is not JSON: {error.msg}, at character {error.pos + 1}"
    except _FAULTS:
        return None  # the fault is not in a line, and the builder has named it
    return None
