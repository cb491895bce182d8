"""Where prompts come from: a dataset or a stream goes in, its record for the manifest comes out. Reads no row."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tessy_hf.manifest import SourceRecord
from tessy_hf.rows import datasets_internals

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

_CACHED = re.compile(r"(?:([^/]+)___)?([^/]+)/([^/]+)/[^/]+/([0-9a-f]{40})/[^/]+\.arrow$")
_STREAMED = re.compile(r"hf://datasets/([^/@]+/[^/@]+)@([0-9a-f]{40})/")

Chain = list[tuple[str, list[Any]]]
"""The steps of a stream, the last first, each with the plain values it was given."""


def source(dataset: Dataset | IterableDataset) -> SourceRecord:
    """Describe a dataset of prompts: its id on the Hub, the commit, and the fingerprint of its rows."""
    from datasets import Dataset

    split = str(dataset.split) if dataset.split is not None else None
    if isinstance(dataset, Dataset):
        return _source_of_files(dataset, split)
    chain = _chain(dataset)
    values = [value for _, given in chain for value in given]
    base = next((value for value in values if isinstance(value, Dataset)), None)
    if base is not None:
        return _source_of_files(base, split).model_copy(update={"fingerprint": _hash(chain)})
    found = next(filter(None, (_STREAMED.match(value) for value in values if isinstance(value, str))), None)
    if found is None:  # paths, generators: nothing says whether they give the same rows again
        return SourceRecord(config=dataset.config_name, split=split)
    return SourceRecord(
        id=found[1], config=dataset.config_name, split=split, revision=found[2], fingerprint=_hash(chain)
    )


def _source_of_files(dataset: Dataset, split: str | None) -> SourceRecord:
    files = [Path(file["filename"]).as_posix() for file in dataset.cache_files]
    found = next(filter(None, map(_CACHED.search, files)), None)
    name = "/".join(filter(None, found.groups()[:2])) if found else None
    config, revision = (found[3], found[4]) if found else (dataset.config_name, None)
    fingerprint = datasets_internals.fingerprint(dataset)
    return SourceRecord(id=name, config=config, split=split, revision=revision, fingerprint=fingerprint)


def _chain(stream: IterableDataset) -> Chain:
    """Return the steps of a stream; what cannot be read of them is left out."""
    return [
        (type(step).__name__, list(_plain({**vars(step), **(getattr(step, "kwargs", None) or {})})))
        for step in datasets_internals.stream_steps(stream)
    ]


def _plain(values: Any) -> Iterator[Any]:
    from datasets import Dataset

    if isinstance(values, dict):
        for name, value in values.items():
            yield from () if str(name).startswith("_") else _plain(value)
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _plain(value)
    elif isinstance(values, (str, int, float, Dataset)):
        yield values


def _hash(chain: Chain) -> str:
    from datasets import Dataset

    values = [
        [name, [datasets_internals.fingerprint(value) if isinstance(value, Dataset) else value for value in given]]
        for name, given in chain
    ]
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]
