"""Sample the next token of each row of a batch: logits in, token ids out.

The token at position p of a row is drawn with a number made of the row's seed and p alone, so that a row depends
neither on how it was cut into requests nor on the rows beside it. Knows no network, cache or stop ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tessy_hf.engines.base import Request


class Sampler:
    """Greedy decoding, temperature, top-k, min-p, nucleus sampling and repetition penalty, per row.

    Restrictions apply in vLLM's order: penalty, temperature, then top-k and min-p, then the nucleus of what is left.

    Args:
        requests: One for each row of the batch.
        lengths: How many ids each row has before the first draw.
        device: Where the logits are.
    """

    def __init__(self, requests: Sequence[Request], lengths: Sequence[int], device: torch.device) -> None:
        def column(values: Sequence[float | bool], kind: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.tensor(values, dtype=kind, device=device)[:, None]

        self._seeds = np.array([request.seed for request in requests], dtype=np.uint64)
        self._lengths = np.array(lengths, dtype=np.uint64)
        greedy = [_is_greedy(request) for request in requests]
        self._all_greedy, self._greedy = all(greedy), column(greedy, torch.bool)[:, 0]
        self._temperature = column([request.temperature or 1.0 for request in requests])
        restricted = [request for request in requests if _is_restricted(request)]
        self._restricted = column([_is_restricted(request) for request in requests], torch.bool)[:, 0]
        self._top_p = column([request.top_p for request in requests])
        self._top_k = column([request.top_k or 1 << 30 for request in requests], torch.int64)
        self._min_p = column([request.min_p or 0.0 for request in requests])
        self._candidates = max((request.top_k or 1 << 30 for request in restricted), default=0)
        self._penalty = column([request.repetition_penalty or 1.0 for request in requests])
        penalizes = any(request.repetition_penalty for request in requests)
        self._texts = [request.prompt_ids for request in requests] if penalizes else None
        self._seen: torch.Tensor | None = None

    def __call__(self, logits: torch.Tensor, step: int) -> torch.Tensor:
        """Return a token for each row.

        Args:
            logits: Of shape (rows, vocabulary).
            step: How many tokens were drawn before.
        """
        if self._texts is None:
            return self._choose(logits, step)
        if self._seen is None:
            self._seen = torch.zeros_like(logits, dtype=torch.bool)
            for seen, ids in zip(self._seen, self._texts, strict=True):
                seen[torch.tensor(ids, dtype=torch.int64, device=logits.device)] = True
        logits = logits.float()
        penalized = torch.where(logits > 0, logits / self._penalty, logits * self._penalty)
        tokens = self._choose(torch.where(self._seen, penalized, logits), step)
        self._seen.scatter_(1, tokens[:, None], True)
        return tokens

    def _choose(self, logits: torch.Tensor, step: int) -> torch.Tensor:
        best = logits.argmax(-1)
        if self._all_greedy:
            return best
        probabilities = torch.softmax(logits.float() / self._temperature, -1)
        drawn = self._draw(probabilities, step)
        if self._candidates:
            drawn = torch.where(self._restricted, self._draw_restricted(probabilities, step), drawn)
        return torch.where(self._greedy, best, drawn)

    def _draw_restricted(self, probabilities: torch.Tensor, step: int) -> torch.Tensor:
        """Draw from the most probable tokens that top-k, min-p and nucleus leave."""
        if self._candidates < probabilities.shape[-1]:  # sorting a whole vocabulary takes longer than small models
            probabilities, order = probabilities.topk(self._candidates)
        else:
            probabilities, order = probabilities.sort(-1, descending=True)
        out = torch.arange(probabilities.shape[-1], device=order.device) >= self._top_k
        probabilities = probabilities.masked_fill(out | (probabilities < self._min_p * probabilities[:, :1]), 0.0)
        before = probabilities.cumsum(-1) - probabilities
        mass = probabilities.sum(-1, keepdim=True)
        place = self._draw(probabilities.masked_fill(before >= self._top_p * mass, 0.0), step)
        return order.gather(-1, place[:, None])[:, 0]

    def _draw(self, probabilities: torch.Tensor, step: int) -> torch.Tensor:
        mass = probabilities.cumsum(-1)
        drawn = uniform(self._seeds, self._lengths + np.uint64(step))
        number = torch.from_numpy(drawn).float().to(mass.device)  # MPS has no float64
        whole = mass[:, -1:]
        target = torch.minimum(number[:, None] * whole, whole.nextafter(torch.zeros_like(whole)))
        return torch.searchsorted(mass, target, right=True)[:, 0]


def _is_greedy(request: Request) -> bool:
    return request.temperature == 0 or request.top_k == 1 or (request.min_p or 0) >= 1


def _is_restricted(request: Request) -> bool:
    return request.top_p < 1 or request.top_k is not None or bool(request.min_p)


def uniform(seeds: npt.NDArray[np.uint64], positions: npt.NDArray[np.uint64]) -> npt.NDArray[np.float64]:
    """Hash seeds and positions to numbers in [0, 1) (the finalizer of SplitMix64)."""
    x: Any = seeds + (positions + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return (x ^ (x >> np.uint64(31))) / np.float64(2**64)  # type: ignore[no-any-return]
