"""Run a boundary predictor with torch, in batches.

In: windows of token ids. Out: which of their tokens are style. Knows nothing of label conventions or texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tessy_hf.boundary.batches import Batches

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class TorchReader:
    """A loaded classifier with one worker thread."""

    def __init__(self, network: PreTrainedModel, style_label: int, device: str | None, window: int) -> None:
        import torch

        from tessy_hf.boundary.window_cache import WindowCache, can_cache
        from tessy_hf.engines.devices import pick_device, share_cores

        self._torch = torch
        self._style_label = style_label
        self._device = pick_device(device)
        # Half precision is slow on a CPU, and its rounding depends on the batch.
        self._network = (network.float() if self._device == "cpu" else network.to(self._device)).eval()
        self._network.config.use_cache = False
        causal = [module.is_causal for module in network.modules() if hasattr(module, "is_causal")]
        self._needs_mask = not (causal and all(causal))  # in a causal model no token sees the padding on its right
        cached = self._device == "cpu" and not self._needs_mask and can_cache(network)  # a GPU reads them whole faster
        self._cache = WindowCache(self._network, window) if cached else None
        self._batches = Batches(lambda *batch: self.read(*batch), initializer=share_cores)
        self.submit = self._batches.submit

    def read(self, windows: Sequence[Sequence[int]], since: Sequence[int]) -> list[list[bool]]:
        """Return, for each id of each window from an index on, whether its label says style."""
        if self._cache is not None:
            return [[label == self._style_label for label in own] for own in self._cache.read(windows, since)]
        style = (self._logits(windows).argmax(-1) == self._style_label).cpu().tolist()
        return [own[begin : len(window)] for own, begin, window in zip(style, since, windows, strict=True)]

    def probabilities(self, windows: Sequence[Sequence[int]]) -> list[list[float]]:
        """Return, for each id of each window, the probability that its label says style."""
        style = self._logits(windows).float().softmax(-1)[..., self._style_label].cpu().tolist()
        return [shares[: len(window)] for shares, window in zip(style, windows, strict=True)]

    def _logits(self, windows: Sequence[Sequence[int]]) -> Any:
        """Run the classifier over windows right-padded to one batch; logits of shape (windows, tokens, labels)."""
        torch = self._torch
        lengths = np.array([len(window) for window in windows])
        mask = np.arange(lengths.max()) < lengths[:, None]
        ids = np.zeros(mask.shape, dtype=np.int64)
        ids[mask] = np.concatenate([np.asarray(window, dtype=np.int64) for window in windows])
        with torch.inference_mode():
            masked = {"attention_mask": torch.from_numpy(mask).long().to(self._device)} if self._needs_mask else {}
            return self._network(input_ids=torch.from_numpy(ids).to(self._device), **masked).logits

    def close(self) -> None:
        """End the worker thread."""
        self._batches.close()
