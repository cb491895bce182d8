"""Lets `rows.push_to_hub(...)` and `rows.to_parquet(...)` of `datasets` work on streams of our rows.

Turning a mapped stream into Arrow, `datasets` infers the types from one row at a time and takes no account of the
features that the map declares, so that a row with an error beside one without ends in ``ArrowInvalid``
(huggingface/datasets#7872). Streams with a ``TessyTransform`` in them are converted by their declared features; all
other streams are left to `datasets`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any


def install(is_ours: Callable[[Any], bool]) -> None:
    """Convert streams by their features where a function mapped over them is ours.

    Args:
        is_ours: Tells such a function.
    """
    from datasets import iterable_dataset as streams

    infer = getattr(streams, "_convert_to_arrow", None)
    if infer is None:  # a later release does it in another way
        return

    def convert(iterable: Any, batch_size: int, drop_last_batch: bool = False) -> Iterator[tuple[Any, Any]]:
        typed = getattr(iterable, "features", None) is not None and any(map(is_ours, functions(iterable)))
        yield from (_typed if typed else infer)(iterable, batch_size, drop_last_batch)

    streams._convert_to_arrow = convert


def functions(step: Any) -> Iterator[Any]:
    """Iterate over the functions mapped over a stream, last first. `datasets` has no public way to ask.

    Args:
        step: What an ``IterableDataset`` keeps as ``_ex_iterable``.
    """
    steps = [step]
    for step in steps:
        if step is not None:
            yield from filter(None, [getattr(step, "function", None)])
            steps += [getattr(step, "ex_iterable", None), *(getattr(step, "ex_iterables", None) or [])]


def _typed(iterable: Any, batch_size: int, drop_last_batch: bool) -> Iterator[tuple[Any, Any]]:
    import pyarrow as pa
    from datasets.features.features import cast_to_python_objects

    features, examples = iterable.features, iter(iterable)
    size = batch_size if batch_size and batch_size > 0 else None
    while batch := list(islice(examples, size)):
        if drop_last_batch and size is not None and len(batch) < size:
            return
        encoded = [features.encode_example(cast_to_python_objects(example)) for _, example in batch]
        yield _key(key for key, _ in batch), pa.Table.from_pylist(encoded, schema=features.arrow_schema)


def _key(keys: Iterable[Any]) -> str:
    return "_".join(map(str, keys))
