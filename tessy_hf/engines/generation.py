"""Batched generation: read what is new of each row, then continue all rows token by token.

In: requests. Out: completions. The only caller of the network. Knows no event loop, threads or streams.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel

from tessy_hf.engines.base import Completion, Request, Scores
from tessy_hf.engines.forward import forward
from tessy_hf.engines.kv_pool import Batch, KVPool, Row
from tessy_hf.engines.network import sample_cache
from tessy_hf.engines.sampling import Sampler

PASS_TOKENS = 512
"""Fixed cost of a forward pass, in tokens read."""

CACHE_SHARE = 0.2
"""Share of the memory that one engine plans for keys and values."""

SCORED_TOKENS = 2048
"""Most tokens of all rows scored in one forward pass, which bounds the memory for logits."""


class Given(NamedTuple):
    """Ids to score: those of a row from index ``begin`` on."""

    row: str
    order: int
    ids: array[int]
    begin: int


@dataclass
class _Writing:
    """A request, its row as it grows, and the stop id that ended it."""

    request: Request
    row: Row
    stop_id: int | None = None
    logprobs: list[float] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)

    @property
    def written(self) -> array[int]:
        return self.row.ids[len(self.request.prompt_ids) :]

    @property
    def done(self) -> bool:
        missing = len(self.request.prompt_ids) + self.request.max_tokens - len(self.row.ids)
        return self.stop_id is not None or missing <= 0

    def take(self, token: int, *measured: float) -> None:
        """Append a token, unless all is written or it ends the row; with its log-probability and entropy."""
        if self.done:
            return
        if token in self.request.stop_ids:
            self.stop_id = token
            return
        self.row.ids.append(token)
        if measured:
            self.logprobs.append(measured[0])
            self.entropies.append(measured[1])

    def completion(self, uncached: int) -> Completion:
        """Return what was written."""
        asked = self.request
        logprobs, entropies = self.logprobs if asked.logprobs else None, self.entropies if asked.entropies else None
        return Completion(self.written, self.stop_id, uncached, logprobs, entropies)


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
        measures = any(request.logprobs or request.entropies for request in requests)
        writings = [_Writing(request, row) for request, row in zip(requests, rows, strict=True)]
        for step in range(max(request.max_tokens for request in requests)):
            logits = self._read(batch)[:, -1]
            tokens = sampler(logits, step)
            columns = [tokens.tolist(), *(_measure(logits, tokens) if measures else ())]
            for writing, *drawn in zip(writings, *columns, strict=True):
                writing.take(*drawn)
            if all(writing.done for writing in writings):
                break
            batch.append(tokens)
        self._pool.store(batch)
        return [writing.completion(count) for writing, count in zip(writings, uncached, strict=True)]

    @torch.inference_mode()
    def score(self, given: Sequence[Given], released: Sequence[str] = ()) -> list[Scores]:
        """Score ids of rows as one batch, a stretch after another.

        Args:
            given: Ids of different rows.
            released: Rows that have ended, to be forgotten first.
        """
        for key in released:
            self._pool.release(key)
        rows = [self._pool.open(one.row, one.ids) for one in given]
        for row, one in zip(rows, given, strict=True):
            row.kept = min(row.kept, one.begin - 1)  # the id before the first scored one is read again
        found, stretch = [Scores([], []) for _ in given], max(1, SCORED_TOKENS // len(given))
        if far := [(row, one) for row, one in zip(rows, given, strict=True) if one.begin - 1 - row.kept > stretch]:
            batch = self._pool.batch([row for row, _ in far], [one.begin - 1 for _, one in far])
            self._read(batch)
            self._pool.store(batch)
        while left := [at for at, row in enumerate(rows) if row.kept < len(row.ids) - 1]:
            starts = [max(rows[at].kept, given[at].begin - 1) for at in left]
            ends = [min(start + stretch, len(rows[at].ids) - 1) for at, start in zip(left, starts, strict=True)]
            batch = self._pool.batch([rows[at] for at in left], ends)
            logits = self._read(batch, max(end - start for start, end in zip(starts, ends, strict=True)))
            self._pool.store(batch)
            for line, at, start, end in zip(logits, left, starts, ends, strict=True):
                logprobs, ranks = _score(line[start - end :], rows[at].ids[start + 1 : end + 1])
                found[at].logprobs.extend(logprobs)
                found[at].ranks.extend(ranks)
        return found

    def _read(self, batch: Batch, keep: int = 1) -> torch.Tensor:
        """Run the network on a batch's next ids; return the logits after the last ``keep`` ids of each row."""
        logits, _ = forward(
            self._network,
            batch.ids,
            batch.cache,
            attention_mask=batch.mask,
            position_ids=batch.positions,
            logits_to_keep=keep,
        )
        return logits

    def _read_long_prompts(self, rows: Sequence[Row]) -> None:
        """Read long prompts, all but their last id, in a pass of their own.

        All rows of a batch read as many ids as the one with the most new ones.
        """
        while len(first := read_first(np.array([len(row.ids) - row.kept for row in rows]))):
            long = [rows[at] for at in first]
            batch = self._pool.batch(long, [len(row.ids) - 1 for row in long])
            self._read(batch)
            self._pool.store(batch)


def _measure(logits: torch.Tensor, tokens: torch.Tensor) -> tuple[list[float], list[float]]:
    """Return the log-probability of each row's token, and the entropy of its distribution."""
    scores = logits.float().log_softmax(-1)
    entropies = torch.special.entr(scores.exp()).sum(-1)
    return scores.gather(-1, tokens[:, None])[:, 0].tolist(), entropies.tolist()


def _score(logits: torch.Tensor, ids: Sequence[int]) -> Scores:
    """Return log-probabilities and ranks of ids, from the logits before each."""
    scores = logits.float().log_softmax(-1)
    own = scores.gather(-1, torch.tensor(ids, device=logits.device)[:, None])
    return Scores(own[:, 0].tolist(), (scores >= own).sum(-1).tolist())


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
