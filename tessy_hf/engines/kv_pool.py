"""KV cache per row, and the batches laid out from it.

In: rows of token ids, and the cache of a batch after the network has read it. Out: the next batch, with the cached
keys and values of each row. The cached prefix is found by comparing ids, so a rollback needs no call. Knows no
network, request, sampling or event loop.

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
"""A row's tensor grows by this many tokens, or by a quarter if that is more."""


@dataclass
class Row:
    """The ids of a row, and how many of them are cached.

    Attributes:
        key: Its name.
        ids: All its ids.
        kept: How many leading ids have keys and values in the pool.
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
        positions: Positions of those ids in their rows, of the same shape.
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
        """Set the next ids to one new token per row, of shape (rows,)."""
        self.ids = tokens[:, None]
        self.positions = self.positions[:, -1:] + 1
        self.mask = torch.cat([self.mask, torch.ones_like(self.ids)], 1)


@dataclass
class _Kept:
    """Ids of a row, and their keys and values in all layers, of shape (capacity, values per token)."""

    ids: array[int]
    states: torch.Tensor


class KVPool:
    """Keys and values of each row, for all layers in one tensor per row.

    Args:
        sample: A cache with one token of one row, which shows the shapes of each layer.
        room: How many more tokens than it has a row is given room for, at least.
    """

    def __init__(self, sample: Any, room: int = ROOM) -> None:
        self._least_room = room
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
        """Return a row with the length of its cached prefix, which leaves at least one id to read."""
        own = array("i", ids)
        return Row(key, own, common_prefix(self._rows[key].ids, own) if key in self._rows else 0)

    def release(self, key: str) -> None:
        """Forget a row, if it is known."""
        self._rows.pop(key, None)

    def batch(self, rows: Sequence[Row], ends: Sequence[int]) -> Batch:
        """Lay out rows so that the network reads the ids of each up to its end that are not cached."""
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
        """Return a cache with the first ``counts`` tokens of each row, aligned at the right."""
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
        """Store the keys and values that the network computed for the ids of each row."""
        columns = batch.cache.get_seq_length()
        since = min(begin + row.kept for row, begin in zip(batch.rows, batch.begins, strict=True))
        new = [tensor[:, :, since:].transpose(1, 2).flatten(2) for tensor in _tensors(batch.cache)]
        for row, begin, states in zip(batch.rows, batch.begins, torch.cat(new, -1), strict=True):
            end = min(len(row.ids), columns - begin)
            kept = self._room(row, end)
            kept.states[row.kept : end] = states[begin + row.kept - since : begin + end - since]
            kept.ids, row.kept = row.ids[:end], end

    def _room(self, row: Row, tokens: int) -> _Kept:
        """Return the entry of a row, with a capacity of at least ``tokens``."""
        kept = self._rows.setdefault(row.key, _Kept(array("i"), self._none))
        if len(kept.states) < tokens:
            larger = self._none.new_empty((max(tokens + self._least_room, tokens * 5 // 4), self._none.shape[1]))
            larger[: row.kept] = kept.states[: row.kept]
            kept.states = larger
        return kept


def _tensors(cache: Any) -> list[torch.Tensor]:
    """Return keys and values of each layer in turn, of shape (rows, heads, columns, head size)."""
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


def common_prefix(held: array[int], ids: array[int]) -> int:
    """Return how many leading ids agree, leaving at least one to read."""
    length = min(len(held), len(ids) - 1)
    if length <= 0 or held[:length] == ids[:length]:
        return max(length, 0)
    differ = np.frombuffer(held, np.int32, length) != np.frombuffer(ids, np.int32, length)
    return int(differ.argmax())
