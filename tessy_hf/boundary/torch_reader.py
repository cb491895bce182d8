"""Run a boundary predictor with torch, its calls batched: those that arrive during a forward pass form the next batch.

In: windows of token ids. Out: which of their tokens are style. Knows nothing of label conventions or texts.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from tessy_hf.errors import BoundaryError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MAX_BATCH = 256
"""The most windows in one forward pass."""


class TorchReader:
    """A loaded classifier with one worker thread; calls that arrive during a forward pass form the next batch."""

    def __init__(self, network: PreTrainedModel, style_label: int, device: str | None) -> None:
        import torch

        from tessy_hf.engines.devices import pick_device, share_cores

        self._torch = torch
        self._style_label = style_label
        self._device = pick_device(device)
        # Half precision is slow on a CPU, and its rounding depends on the batch.
        self._network = (network.float() if self._device == "cpu" else network.to(self._device)).eval()
        self._network.config.use_cache = False
        causal = [module.is_causal for module in network.modules() if hasattr(module, "is_causal")]
        self._needs_mask = not (causal and all(causal))  # in a causal model no token sees the padding on its right
        self._waiting: list[tuple[Sequence[int], asyncio.Future[Sequence[bool]]]] = []
        self._busy = False
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="tessy-boundary", initializer=share_cores)

    async def submit(self, window: Sequence[int], since: int) -> Sequence[bool]:
        """Return whether each token of ``window`` from ``since`` on is style."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Sequence[bool]] = loop.create_future()
        self._waiting.append((window, future))
        if not self._busy:
            self._busy = True
            loop.call_soon(self._next_batch, loop)  # after calls that are ready in this iteration of the loop
        return (await future)[since:]

    def _next_batch(self, loop: asyncio.AbstractEventLoop) -> None:
        batch, self._waiting = self._waiting[:MAX_BATCH], self._waiting[MAX_BATCH:]
        if not batch:
            self._busy = False
            return
        forward = loop.run_in_executor(self._worker, self.read, [window for window, _ in batch])
        forward.add_done_callback(lambda done: self._deliver(loop, batch, done))

    def _deliver(
        self,
        loop: asyncio.AbstractEventLoop,
        batch: list[tuple[Sequence[int], asyncio.Future[Sequence[bool]]]],
        done: asyncio.Future[list[list[bool]]],
    ) -> None:
        error = done.exception()
        for index, (_, future) in enumerate(batch):
            if future.done():
                continue
            if error is not None:
                future.set_exception(BoundaryError(f"The boundary predictor failed: {error!r}."))
            else:
                future.set_result(done.result()[index])
        self._next_batch(loop)

    def read(self, windows: Sequence[Sequence[int]]) -> list[list[bool]]:
        """Return, for each id of each window, whether its label says style."""
        style = (self._logits(windows).argmax(-1) == self._style_label).cpu().tolist()
        return [labels[: len(window)] for labels, window in zip(style, windows, strict=True)]

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
        self._worker.shutdown(wait=True, cancel_futures=True)
