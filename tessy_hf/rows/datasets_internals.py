"""Lets `rows.push_to_hub(...)` and `rows.to_parquet(...)` of `datasets` work on streams of our rows.

Turning a mapped stream into Arrow, `datasets` infers the types from one row at a time and takes no account of the
features that the map declares, so that a row with an error beside one without ends in ``ArrowInvalid``
(huggingface/datasets#7872). Streams with a ``TessyTransform`` in them are converted by their declared features; all
other streams are left to `datasets`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Features


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
    examples = iter(iterable)
    size = batch_size if batch_size and batch_size > 0 else None
    while batch := list(islice(examples, size)):
        if drop_last_batch and size is not None and len(batch) < size:
            return
        yield "_".join(str(key) for key, _ in batch), table([example for _, example in batch], iterable.features)


def table(rows: Iterable[Mapping[str, Any]], features: Features) -> pa.Table:
    """Return rows as a table of exactly these types, whatever is empty or missing in them."""
    import pyarrow as pa
    from datasets.features.features import cast_to_python_objects

    encoded = [features.encode_example(cast_to_python_objects(row)) for row in rows]
    return pa.Table.from_pylist(encoded, schema=features.arrow_schema)
