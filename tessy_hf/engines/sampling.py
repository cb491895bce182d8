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
    """Greedy decoding, temperature and nucleus sampling, per row.

    Args:
        requests: One for each row of the batch.
        lengths: How many ids each row has before the first draw.
        device: Where the logits are.
    """

    def __init__(self, requests: Sequence[Request], lengths: Sequence[int], device: torch.device) -> None:
        self._seeds = np.array([request.seed for request in requests], dtype=np.uint64)
        self._lengths = np.array(lengths, dtype=np.uint64)
        temperature = torch.tensor([request.temperature for request in requests], dtype=torch.float32, device=device)[
            :, None
        ]
        self._greedy = temperature[:, 0] == 0
        self._temperature = torch.where(temperature == 0, 1.0, temperature)
        self._top_p = torch.tensor([request.top_p for request in requests], dtype=torch.float32, device=device)[
            :, None
        ]
        self._all_greedy = all(request.temperature == 0 for request in requests)
        self._any_nucleus = any(request.top_p < 1 for request in requests)

    def __call__(self, logits: torch.Tensor, step: int) -> torch.Tensor:
        """Return a token for each row.

        Args:
            logits: Of shape (rows, vocabulary).
            step: How many tokens were drawn before.
        """
        best = logits.argmax(-1)
        if self._all_greedy:
            return best
        probabilities = torch.softmax(logits.float() / self._temperature, -1)
        drawn = self._draw(probabilities, step)
        if self._any_nucleus:
            drawn = torch.where(self._top_p[:, 0] < 1, self._nucleus(probabilities, step), drawn)
        return torch.where(self._greedy, best, drawn)

    def _nucleus(self, probabilities: torch.Tensor, step: int) -> torch.Tensor:
        """Draw from the most probable tokens that together have a mass of ``top_p``."""
        probabilities, order = probabilities.sort(-1, descending=True)
        before = probabilities.cumsum(-1) - probabilities
        place = self._draw(probabilities.masked_fill(before >= self._top_p, 0.0), step)
        return order.gather(-1, place[:, None])[:, 0]

    def _draw(self, probabilities: torch.Tensor, step: int) -> torch.Tensor:
        mass = probabilities.cumsum(-1)
        number = torch.from_numpy(uniform(self._seeds, self._lengths + np.uint64(step))).to(mass.device)
        target = number[:, None].float() * mass[:, -1:]
        return torch.searchsorted(mass, target, right=True)[:, 0].clamp_(max=mass.shape[-1] - 1)


def uniform(seeds: npt.NDArray[np.uint64], positions: npt.NDArray[np.uint64]) -> npt.NDArray[np.float64]:
    """Hash seeds and positions to numbers in [0, 1) (the finalizer of SplitMix64)."""
    x: Any = seeds + (positions + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return (x ^ (x >> np.uint64(31))) / np.float64(2**64)  # type: ignore[no-any-return]
