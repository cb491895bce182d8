"""Keys and values of the rows under way, and batches made of them.

In: rows of token ids, and a cache of `transformers` after the network has read a batch. Out: the next batch, with the
keys and values that are kept of each row. A row's longest known beginning is found by its ids, so a rollback needs no
call. Knows no network, request, sampling or event loop.

Rows of a batch are aligned at their last id, with padding in front and nowhere else: distances between columns are
distances between positions, which sliding windows and chunks of attention count. All rows read as many ids as the one
with the most new ones; the others read some of their kept ids again, in place of padding.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

ROOM = 256
"""A row's tensor grows by this many tokens, or by a quarter."""


@dataclass
class Row:
    """A row while it is read and written.

    Attributes:
        key: Its name.
        ids: All its ids.
        kept: How many of them, from the first, the pool has keys and values of.
    """

    key: str
    ids: array[int]
    kept: int


@dataclass
class Batch:
    """Rows laid out for the network.

    Attributes:
        rows: The rows.
        begins: The column of each row's first id.
        ids: What is to be read next, of shape (rows, width).
        positions: Places of those ids in their rows, of the same shape.
        mask: Which columns are not padding, of shape (rows, columns up to the last of ``ids``).
        cache: Keys and values of the columns before ``ids``; a forward pass appends its own.
    """

    rows: Sequence[Row]
    begins: Sequence[int]
    ids: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor
    cache: Any

    def append(self, tokens: torch.Tensor) -> None:
        """Make one token of each row, of shape (rows,), what is to be read next."""
        self.ids = tokens[:, None]
        self.positions = self.positions[:, -1:] + 1
        self.mask = torch.cat([self.mask, torch.ones_like(self.ids)], 1)


@dataclass
class _Kept:
    """Ids of a row, and their keys and values in all layers: (room for tokens, values per token)."""

    ids: array[int]
    states: torch.Tensor


class KVPool:
    """What is kept of each row. A row's keys and values of all layers lie side by side in one tensor.

    Args:
        sample: A cache with one token of one row, which says what each layer keeps of a token.
    """

    def __init__(self, sample: Any) -> None:
        tensors = _tensors(sample)
        self._shapes = [(tensor.shape[1], tensor.shape[3]) for tensor in tensors]
        self._widths = [heads * size for heads, size in self._shapes]
        self._none = tensors[0].new_empty((0, sum(self._widths)))
        self._rows: dict[str, _Kept] = {}

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values."""
        return int(self._none.shape[1] * self._none.itemsize)

    def open(self, key: str, ids: Sequence[int]) -> Row:
        """Return a row with the number of its ids that are kept; at least one is left to read."""
        own = array("i", ids)
        return Row(key, own, _common(self._rows[key].ids, own) if key in self._rows else 0)

    def release(self, key: str) -> None:
        """Forget a row, if it is known."""
        self._rows.pop(key, None)

    def batch(self, rows: Sequence[Row], ends: Sequence[int]) -> Batch:
        """Lay out rows so that each row's ids up to its end are read, those that are not kept among them."""
        width = max(end - row.kept for row, end in zip(rows, ends, strict=True))
        cached = [max(end - width, 0) for end in ends]
        longest = max(cached)
        columns, begins = np.arange(longest + width), longest + width - np.array(ends)
        ids: Any = np.zeros((len(rows), width), dtype=np.int64)
        for line, row, start, end in zip(ids, rows, cached, ends, strict=True):
            line[width - (end - start) :] = row.ids[start:end]
        positions: Any = np.maximum(columns[longest:] - begins[:, None], 0)
        mask: Any = (columns >= begins[:, None]).astype(np.int64)
        ids, positions, mask = (torch.from_numpy(each).to(self._none.device) for each in (ids, positions, mask))
        return Batch(rows, begins.tolist(), ids, positions, mask, self._cache(rows, cached))

    def _cache(self, rows: Sequence[Row], counts: Sequence[int]) -> Any:
        """Return a cache with the first so many tokens of each row, aligned at the right."""
        cache, longest = DynamicCache(), max(counts)
        if not longest:
            return cache
        states = self._none.new_zeros((len(rows), longest, self._none.shape[1]))
        for own, row, count in zip(states, rows, counts, strict=True):
            if count:
                own[longest - count :] = self._rows[row.key].states[:count]
        split = zip(torch.split(states, self._widths, -1), self._shapes, strict=True)
        parts = [part.reshape(len(rows), longest, *shape).transpose(1, 2) for part, shape in split]
        for layer, (keys, values) in enumerate(zip(parts[::2], parts[1::2], strict=True)):
            cache.update(keys, values, layer)
        return cache

    def store(self, batch: Batch) -> None:
        """Keep the keys and values that the network computed of each row's ids."""
        columns = batch.cache.get_seq_length()
        since = min(begin + row.kept for row, begin in zip(batch.rows, batch.begins, strict=True))
        new = [tensor[:, :, since:].transpose(1, 2).flatten(2) for tensor in _tensors(batch.cache)]
        for row, begin, states in zip(batch.rows, batch.begins, torch.cat(new, -1), strict=True):
            end = min(len(row.ids), columns - begin)
            kept = self._room(row, end)
            kept.states[row.kept : end] = states[begin + row.kept - since : begin + end - since]
            kept.ids, row.kept = row.ids[:end], end

    def _room(self, row: Row, tokens: int) -> _Kept:
        """Return what is kept of a row, with room for so many tokens."""
        kept = self._rows.setdefault(row.key, _Kept(array("i"), self._none))
        if len(kept.states) < tokens:
            larger = self._none.new_empty((max(tokens + ROOM, tokens * 5 // 4), self._none.shape[1]))
            larger[: row.kept] = kept.states[: row.kept]
            kept.states = larger
        return kept


def _tensors(cache: Any) -> list[torch.Tensor]:
    """Return keys and values of each layer in turn, of shape (rows, heads, columns, head size)."""
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


def _common(held: array[int], ids: array[int]) -> int:
    """Return how many leading ids agree, leaving at least one to read."""
    length = min(len(held), len(ids) - 1)
    if length <= 0 or held[:length] == ids[:length]:
        return max(length, 0)
    differ = np.frombuffer(held, np.int32, length) != np.frombuffer(ids, np.int32, length)
    return int(differ.argmax())
