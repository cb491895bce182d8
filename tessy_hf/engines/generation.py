"""Batched generation: read what is new of each row, then continue all rows token by token.

In: requests. Out: completions. The only caller of the network. Knows no event loop, threads or streams.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel

from tessy_hf.engines.base import Completion, Request
from tessy_hf.engines.forward import forward
from tessy_hf.engines.kv_pool import Batch, KVPool, Row
from tessy_hf.engines.network import sample_cache
from tessy_hf.engines.sampling import Sampler

PASS_TOKENS = 512
"""Fixed cost of a forward pass, in tokens read."""

CACHE_SHARE = 0.2
"""Share of the memory that one engine plans for keys and values."""


@dataclass
class _Writing:
    """A request, its row as it grows, and the stop id that ended it."""

    request: Request
    row: Row
    stop_id: int | None = None

    @property
    def written(self) -> array[int]:
        return self.row.ids[len(self.request.prompt_ids) :]

    @property
    def done(self) -> bool:
        missing = len(self.request.prompt_ids) + self.request.max_tokens - len(self.row.ids)
        return self.stop_id is not None or missing <= 0

    def take(self, token: int) -> None:
        """Append a token, unless all is written or it ends the row."""
        if self.done:
            return
        if token in self.request.stop_ids:
            self.stop_id = token
        else:
            self.row.ids.append(token)


class Generator:
    """A network and the KV pool of its rows. Not thread-safe: one round at a time.

    Args:
        network: A causal language model.

    Attributes:
        cache_tokens: How many tokens of keys and values fit into :data:`CACHE_SHARE` of the memory.

    Raises:
        SettingsError: The model keeps more than keys and values, see :func:`tessy_hf.engines.network.sample_cache`.
    """

    def __init__(self, network: PreTrainedModel) -> None:
        self._network = network
        self._pool = KVPool(sample_cache(network))
        self.cache_tokens = int(CACHE_SHARE * _memory_bytes(network.device) / self._pool.token_bytes)

    @torch.inference_mode()
    def generate(self, requests: Sequence[Request], released: Sequence[str] = ()) -> list[Completion]:
        """Continue rows as one batch.

        Args:
            requests: Of different rows.
            released: Rows that have ended, to be forgotten first.
        """
        for key in released:
            self._pool.release(key)
        rows = [self._pool.open(request.row, request.prompt_ids) for request in requests]
        uncached = [len(row.ids) - row.kept for row in rows]
        self._read_long_prompts(rows)

        lengths = [len(row.ids) for row in rows]
        batch = self._pool.batch(rows, lengths)
        sampler = Sampler(requests, lengths, batch.ids.device)
        writings = [_Writing(request, row) for request, row in zip(requests, rows, strict=True)]
        for step in range(max(request.max_tokens for request in requests)):
            tokens = sampler(self._read(batch), step)
            for writing, token in zip(writings, tokens.tolist(), strict=True):
                writing.take(token)
            if all(writing.done for writing in writings):
                break
            batch.append(tokens)
        self._pool.store(batch)
        return [
            Completion(writing.written, writing.stop_id, count)
            for writing, count in zip(writings, uncached, strict=True)
        ]

    def _read(self, batch: Batch) -> torch.Tensor:
        """Run the network on a batch's next ids; return the logits after each row's last id."""
        logits, _ = forward(
            self._network,
            batch.ids,
            batch.cache,
            attention_mask=batch.mask,
            position_ids=batch.positions,
            logits_to_keep=1,
        )
        return logits[:, -1]

    def _read_long_prompts(self, rows: Sequence[Row]) -> None:
        """Read long prompts, all but their last id, in a pass of their own.

        All rows of a batch read as many ids as the one with the most new ones.
        """
        while len(first := read_first(np.array([len(row.ids) - row.kept for row in rows]))):
            long = [rows[at] for at in first]
            batch = self._pool.batch(long, [len(row.ids) - 1 for row in long])
            self._read(batch)
            self._pool.store(batch)


def _memory_bytes(device: torch.device) -> int:
    """Return the free memory of a GPU, else the whole memory of the machine."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def read_first(unread: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
    """Return which rows to read in a pass of their own, given how many ids each row has to read.

    None are returned where one pass for all costs less.
    """
    order = np.argsort(-unread, kind="stable")
    widths, apart = unread[order], np.arange(len(unread))
    cost = apart * widths[0] + len(unread) * widths + PASS_TOKENS * (apart > 0)
    best: npt.NDArray[Any] = order[: int(cost.argmin())]
    return best
