"""Every private name of `datasets` that this package needs, checked against the installed version.

Also lets `rows.push_to_hub(...)` and `rows.to_parquet(...)` of `datasets` work on streams of our rows. Turning a
mapped stream into Arrow, `datasets` infers the types from one row at a time and ignores the features that the map
declares, so that a row with an error beside one without ends in ``ArrowInvalid`` (huggingface/datasets#7872). While a
transform is open, streams with it in them are converted by their declared features; all other streams are left to
`datasets`.
"""

from __future__ import annotations

import importlib
import inspect
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from itertools import islice
from typing import TYPE_CHECKING, Any

from tessy_hf.errors import DatasetError, SettingsError

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset, Features, IterableDataset

_NAMES = {
    "datasets.features.features": ("cast_to_python_objects", "Features._to_yaml_list", "Features._from_yaml_list"),
    "datasets.iterable_dataset": ("_convert_to_arrow", "IterableDataset._resolve_features"),
    "datasets.utils": ("tqdm._instances",),
    "datasets.utils._dill": ("pklregister",),
    "datasets.utils.py_utils": ("convert_file_size_to_int",),
}
_CONVERSION = ["iterable", "batch_size", "drop_last_batch"]
"""The arguments of ``_convert_to_arrow``."""


@cache
def check() -> None:
    """Check that the installed `datasets` has all that is used of it.

    Raises:
        SettingsError: A release changed some of it.
    """
    import datasets
    from datasets import iterable_dataset as streams

    missing = [f"{module}.{name}" for module, names in _NAMES.items() for name in names if not _has(module, name)]
    if not missing and list(inspect.signature(streams._convert_to_arrow).parameters) != _CONVERSION:
        missing = [f"datasets.iterable_dataset._convert_to_arrow({', '.join(_CONVERSION)})"]
    rows = datasets.Dataset.from_dict({"a": [1]})
    missing += [] if hasattr(rows, "_fingerprint") else ["Dataset._fingerprint"]
    # Asked of the code that sets it: making a stream imports torch, a second for those who ask servers.
    kept = datasets.IterableDataset.__init__.__code__.co_names
    missing += [] if "_ex_iterable" in kept else ["IterableDataset._ex_iterable"]
    if missing:
        raise SettingsError(
            f"datasets {datasets.__version__} has no {', '.join(missing)}. This version of tessy_hf was made for "
            'datasets 5.2; upgrade tessy_hf, or run: pip install "datasets==5.2.*"'
        )


def _has(module: str, name: str) -> bool:
    try:
        found: Any = importlib.import_module(module)
    except ImportError:
        return False
    for part in name.split("."):
        if not hasattr(found, part):
            return False
        found = getattr(found, part)
    return True


# --- schemas, cards and fingerprints


def table(rows: Iterable[Mapping[str, Any]], features: Features) -> pa.Table:
    """Return rows as a table of exactly these types, whatever is empty or missing in them."""
    import pyarrow as pa
    from datasets.features.features import cast_to_python_objects

    encoded = [features.encode_example(cast_to_python_objects(row)) for row in rows]
    schema = features.arrow_schema
    stored = pa.schema([(field.name, _stored(field.type)) for field in schema])
    built = pa.Table.from_pylist(encoded or [{}], schema=stored).cast(schema)
    return built if encoded else built.slice(0, 0)


def _stored(kind: pa.DataType) -> pa.DataType:
    """Return the type in which pyarrow can build values of a type: it builds no JSON (pyarrow 25)."""
    import pyarrow as pa

    if isinstance(kind, pa.BaseExtensionType):
        return kind.storage_type
    if pa.types.is_struct(kind):
        return pa.struct([(field.name, _stored(field.type)) for field in kind])
    return pa.list_(_stored(kind.value_type)) if pa.types.is_list(kind) else kind


def features_of(dataset: Dataset | IterableDataset) -> Features:
    """Return columns and types; of a stream without a schema, those of its first rows, which are read.

    Raises:
        DatasetError: It is no dataset, or these rows fit no schema.
    """
    import pyarrow as pa
    from datasets import Dataset, IterableDataset

    if not isinstance(dataset, (Dataset, IterableDataset)):
        raise DatasetError(
            f"A {type(dataset).__name__} cannot be mapped. Expected is a Dataset, IterableDataset or DatasetDict: "
            "make one, for instance with Dataset.from_list() or Dataset.from_pandas()."
        )
    try:
        return dataset.features if dataset.features is not None else dataset._resolve_features().features
    except (pa.ArrowException, UnicodeError, StopIteration) as error:
        raise DatasetError(
            f"The stream has no schema and its first rows fit none: {str(error) or 'it has no rows'}. Cast it to "
            "features, with Json() for columns of mixed values, or call stream.map(transform, batched=True) without "
            "features=."
        ) from error


def features_to_yaml(features: Features) -> list[Any]:
    """Return columns and types as in a dataset card's ``dataset_info``."""
    return features._to_yaml_list()  # type: ignore[no-any-return]


def features_from_yaml(listed: list[Any]) -> Features:
    """Return the columns and types that a dataset card's ``dataset_info`` states."""
    from datasets import Features

    return Features._from_yaml_list(listed)


def fingerprint(dataset: Dataset) -> str:
    """Return the hash by which `datasets` identifies the rows of a dataset."""
    return dataset._fingerprint  # type: ignore[no-any-return]


def bytes_of(size: int | str) -> int:
    """Read a size such as ``"500MB"``.

    Raises:
        ValueError: It is not a size.
    """
    from datasets.utils.py_utils import convert_file_size_to_int

    return int(convert_file_size_to_int(size))


def hash_as(kind: type, text: Callable[[Any], str]) -> None:
    """Let the fingerprints of `datasets` see a text in place of objects of this type. Live handles would be random."""
    from datasets.utils._dill import pklregister

    @pklregister(kind)  # type: ignore[untyped-decorator]
    def _save(pickler: Any, obj: Any) -> None:
        pickler.save_reduce(str, (text(obj),), obj=obj)


def close_bars() -> None:
    """Close the bars that `datasets` draws for the rows of a ``map`` under way; it then draws them no more.

    A bar that counts batches of a thousand rows stands still while rows are written, beside a status line that does
    not. No other bar is touched, nor the switch that turns all of them off.
    """
    from datasets.utils import tqdm

    for bar in list(tqdm._instances):
        if isinstance(bar, tqdm) and bar.unit == " examples":
            bar.leave, bar.total = False, None  # a notebook marks a bar red that ends before its total
            bar.close()


# --- streams


def stream_steps(stream: IterableDataset) -> Iterator[Any]:
    """Iterate over the steps a stream is made of, last first. `datasets` has no public way to ask."""
    yield from _steps(stream._ex_iterable)


def _steps(last: Any) -> Iterator[Any]:
    steps = [last]
    for step in steps:
        if step is not None:
            yield step
            steps += [getattr(step, "ex_iterable", None), *(getattr(step, "ex_iterables", None) or [])]


class TypedStreams:
    """Converts streams by their declared features while functions that are mapped over them are open.

    Args:
        kind: The type of such functions.
    """

    def __init__(self, kind: type) -> None:
        self._kind = kind
        self._open: weakref.WeakSet[Any] = weakref.WeakSet()
        self._infer: Any = None  # the conversion of `datasets`, while ours is in its place

    def open(self, function: Any) -> None:
        """Convert streams with this function in them by their features, until it is closed or collected.

        Raises:
            SettingsError: The installed `datasets` does not have what is needed.
        """
        if function in self._open:
            return
        check()
        from datasets import iterable_dataset as streams

        self._open.add(function)
        weakref.finalize(function, self._restore).atexit = False
        if self._infer is None:
            self._infer, streams._convert_to_arrow = streams._convert_to_arrow, self._convert

    def close(self, function: Any) -> None:
        """Leave streams to `datasets` again, where this was the last function."""
        self._open.discard(function)
        self._restore()

    def _restore(self) -> None:
        if self._infer is not None and not list(self._open):  # those that are being collected are not listed
            from datasets import iterable_dataset as streams

            streams._convert_to_arrow, self._infer = self._infer, None

    def _convert(self, iterable: Any, batch_size: int, drop_last_batch: bool = False) -> Iterator[tuple[Any, Any]]:
        from datasets import iterable_dataset as streams

        functions = (getattr(step, "function", None) for step in _steps(iterable))
        is_ours = any(isinstance(function, self._kind) for function in functions)
        typed = is_ours and getattr(iterable, "features", None) is not None
        convert = _typed if typed else self._infer or streams._convert_to_arrow
        yield from convert(iterable, batch_size, drop_last_batch)


def _typed(iterable: Any, batch_size: int, drop_last_batch: bool) -> Iterator[tuple[Any, Any]]:
    examples, size = iter(iterable), batch_size if batch_size and batch_size > 0 else None
    while batch := list(islice(examples, size)):
        if drop_last_batch and size is not None and len(batch) < size:
            return
        yield "_".join(str(key) for key, _ in batch), table([example for _, example in batch], iterable.features)
