"""A batch as `datasets` or Ray hand it to a mapped function, in any of their formats, and what is to be returned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tessy_hf.errors import DatasetError
from tessy_hf.rows import columns
from tessy_hf.rows.datasets_internals import table

if TYPE_CHECKING:
    import pyarrow as pa

Columns = Mapping[str, Sequence[Any]]


@dataclass(frozen=True)
class Batch:
    """A batch.

    Attributes:
        columns: Its columns, of Python values.
        source: The Arrow table that it was given as, or was made of; ``None`` where it was given as columns.
    """

    columns: Columns
    source: pa.Table | None = None

    @classmethod
    def read(cls, given: Any, extra: Sequence[Any] = ()) -> Batch:
        """Read a batch.

        Args:
            given: A mapping, an Arrow table, or a pandas or Polars data frame.
            extra: What else the function was given.

        Raises:
            DatasetError: It is none of these, or ``map`` was called with options that pass something else.
        """
        import pyarrow as pa

        if isinstance(given, Mapping) and not extra:
            return cls(given)
        if isinstance(given, pa.Table) and not extra:
            return cls(decoded(given), given)
        if hasattr(given, "to_arrow") and not extra:  # Polars
            return cls.read(given.to_arrow())
        if hasattr(given, "to_dict") and not extra:  # pandas
            return cls.read(pa.Table.from_pandas(given, preserve_index=False))
        more = f" and {len(extra)} more arguments" if extra else ""
        raise DatasetError(
            f"The transform got a {type(given).__name__}{more}. One batch with all columns is expected: call "
            "map(transform, batched=True) without input_columns=, with_indices= and with_rank=."
        )

    def returned(self, written: dict[str, list[Any]], prompt_column: str, thinking_key: str | None) -> Any:
        """Return what a mapped function returns: the new columns, or for tables one that has its own columns too.

        Args:
            written: The new columns.
            prompt_column: The column with the prompts.
            thinking_key: See :func:`tessy_hf.rows.columns.schema`.
        """
        if self.source is None:
            return written
        from datasets import Features

        merged = {**self.columns, **written}
        rows = (dict(zip(merged, values, strict=True)) for values in zip(*merged.values(), strict=True))
        given = Features.from_arrow_schema(self.source.schema)
        return table(rows, columns.finished(given, prompt_column, thinking_key))


def decoded(given: pa.Table) -> dict[str, list[Any]]:
    """Return a table's columns as Python values, JSON as what it says."""
    from datasets import Features, Json

    features, columns = Features.from_arrow_schema(given.schema), given.to_pydict()
    stored = {name: kind for name, kind in features.items() if isinstance(getattr(kind, "feature", kind), Json)}
    return {**columns, **Features(stored).decode_batch({name: columns[name] for name in stored})}


def rows_of(batch: Columns, names: Sequence[str], prompt_column: str) -> list[dict[str, Any]]:
    """Return a batch row by row.

    Args:
        batch: The columns.
        names: Which of them.
        prompt_column: The one with the prompts.

    Raises:
        DatasetError: It is a single row.
    """
    if isinstance(batch[prompt_column], str) or batch[prompt_column] is None:
        raise DatasetError("The transform got a single row. A batch is expected: call map(transform, batched=True).")
    read = [batch[name] for name in names]
    return [dict(zip(names, values, strict=True)) for values in zip(*read, strict=True)]
