"""Read windows that grow without reading them again: only tokens that are new to a window go through the network.

In: windows of token ids, and from which index on their labels are wanted. Out: those labels. Knows no event loop.
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache

from tessy_hf.boundary.qwen3 import small_qwen3
from tessy_hf.engines.forward import CACHE_ARGUMENTS, cache_argument, takes
from tessy_hf.engines.kv_pool import KVPool, Row, common_prefix

if TYPE_CHECKING:
    from transformers import PreTrainedModel

KEY_IDS = 24
"""Windows with the same first ids, so many, are taken for the same one that grew. What is kept is compared whole."""

CACHE_BYTES = 2**30
"""Most memory for keys and values, those of one forward pass and those kept."""

LEAST_WIDTH = 32
"""A forward pass costs as much as reading about so many tokens more."""


class WindowCache:
    """Keys and values of recent windows of a causal token classifier on a CPU.

    Args:
        network: The classifier.
        window: Most tokens of a window.
    """

    def __init__(self, network: PreTrainedModel, window: int) -> None:
        model_class: Any = type(network)
        self._network, self._argument, self._window = network, cache_argument(model_class), window
        sample, zero = DynamicCache(), torch.zeros((1, 1), dtype=torch.long)
        self._labels(zero, zero + 1, zero, sample)
        self._pool = KVPool(sample, room=window // 4)
        self._most = max(1, CACHE_BYTES // (self._pool.token_bytes * window))  # windows
        self._recent: OrderedDict[str, None] = OrderedDict()
        self._small = small_qwen3(network, window)
        self._grown: dict[str, tuple[array[int], torch.Tensor]] = {}  # for it

    @torch.inference_mode()
    def read(self, windows: Sequence[Sequence[int]], since: Sequence[int]) -> list[list[int]]:
        """Return the labels of each window from an index on."""
        keys, found = _keys(windows), list[list[int]]()
        fits = self._small is not None and max(map(len, windows)) <= self._window
        read = self._read_small if fits else self._read_padded
        for at in range(0, len(keys), self._most):
            part = slice(at, at + self._most)
            found += read(keys[part], windows[part], since[part])
            self._keep(keys[part])
        return found

    def _read_small(
        self, keys: Sequence[str], windows: Sequence[Sequence[int]], since: Sequence[int]
    ) -> list[list[int]]:
        assert self._small is not None
        own, spans, new = [], [], array("i")
        for key, window, begin in zip(keys, (array("i", window) for window in windows), since, strict=True):
            held, states = self._grown.pop(key) if key in self._grown else (array("i"), self._small.room(self._window))
            kept = min(common_prefix(held, window), begin)
            own.append((window, states))
            spans.append((kept, len(window)))
            new += window[kept:]
        logits = self._small(torch.frombuffer(new, dtype=torch.int32), spans, [states for _, states in own])
        self._grown.update(zip(keys, own, strict=True))
        labels = torch.split(logits.argmax(-1), [end - kept for kept, end in spans])
        return [each[begin - kept :].tolist() for each, begin, (kept, _) in zip(labels, since, spans, strict=True)]

    def _read_padded(
        self, keys: Sequence[str], windows: Sequence[Sequence[int]], since: Sequence[int]
    ) -> list[list[int]]:
        rows = list(map(self._open, keys, windows, since))
        found: dict[int, list[int]] = {}
        for group in _groups([len(row.ids) - row.kept for row in rows], self._most):
            batch = self._pool.batch([rows[i] for i in group], [len(rows[i].ids) for i in group])
            labels = self._labels(batch.ids, batch.mask, batch.positions, batch.cache)
            for i, own in zip(group, labels, strict=True):
                found[i] = own[len(own) - len(windows[i]) + since[i] :]
            self._pool.store(batch)
        return [found[i] for i in range(len(windows))]

    def _open(self, key: str, window: Sequence[int], since: int) -> Row:
        row = self._pool.open(key, window)
        row.kept = min(row.kept, since)
        return row

    def _labels(
        self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: object
    ) -> list[list[int]]:
        inputs = {"attention_mask": mask, "position_ids": positions, "use_cache": True, self._argument: cache}
        labels: list[list[int]] = self._network(input_ids=ids, **inputs).logits.argmax(-1).tolist()
        return labels

    def _keep(self, keys: Sequence[str]) -> None:
        """Note the use of windows, and forget those used longest ago."""
        for key in keys:
            self._recent[key] = None
            self._recent.move_to_end(key)
        while len(self._recent) > self._most:
            key, _ = self._recent.popitem(last=False)
            self._pool.release(key)
            self._grown.pop(key, None)


def can_cache(network: PreTrainedModel) -> bool:
    """Return whether a causal classifier keeps a key and a value per token and nothing else."""
    types = set(getattr(network.config.get_text_config(), "layer_types", None) or ())
    model_class = type(network)
    known = types <= {"full_attention", "sliding_attention"} and takes(model_class, "position_ids")
    return known and any(takes(model_class, name) for name in CACHE_ARGUMENTS)


def _keys(windows: Sequence[Sequence[int]]) -> list[str]:
    """Return a key for each window: its first ids, numbered where several begin alike."""
    seen: Counter[bytes] = Counter()
    keys = []
    for window in windows:
        first = array("i", window[:KEY_IDS]).tobytes()
        keys.append(f"{first.hex()} {seen[first]}")
        seen[first] += 1
    return keys


def _groups(news: Sequence[int], most: int) -> Iterator[list[int]]:
    """Yield the windows to read together: at most so many, and none with less than half the new tokens of another."""
    group: list[int] = []
    for i in sorted(range(len(news)), key=news.__getitem__, reverse=True):
        if group and (len(group) == most or news[i] <= news[group[0]] // 2 >= LEAST_WIDTH // 2):
            yield group
            group = []
        group.append(i)
    yield group
