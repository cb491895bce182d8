"""Run a boundary predictor in vLLM: windows that grow are read from the prefix cache, only new tokens are computed.

vLLM returns logits only for tokens that were not in the prefix cache. Windows start at fixed positions, so these are
the window's last tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tessy_hf.engines.vllm_process import VLLMProcess
from tessy_hf.errors import BoundaryError


class VLLMReader:
    """A token classifier in vLLM, in a process of its own.

    Args:
        model: Hub id or folder.
        revision: Branch, tag or commit on the Hub.
        style_label: The label number that means style.
        window: Most tokens of a window.
        options: For ``vllm.EngineArgs``.

    Raises:
        EngineDeadError: vLLM is not installed or cannot run the model.
    """

    def __init__(self, model: str, revision: str | None, style_label: int, window: int, options: dict[str, Any]):
        defaults = {"max_model_len": window + 1, "max_num_seqs": 256, "stream_interval": 1}
        self._process = VLLMProcess(model, {"runner": "pooling", "revision": revision, **defaults, **options})
        try:
            self._process.start()
        except BaseException:
            self._process.close()
            raise
        self._style_label = style_label

    async def submit(self, window: Sequence[int], since: int) -> Sequence[bool]:
        """Return whether each token of ``window`` from ``since`` on is style.

        Raises:
            BoundaryError: vLLM returned too few labels.
            RequestError: vLLM refuses the window.
            EngineDeadError: vLLM died.
        """
        wanted = len(window) - since
        logits = await self._logits(window, use_cache=True)
        if len(logits) < wanted:
            logits = await self._logits(window, use_cache=False)
        if len(logits) < wanted:
            raise BoundaryError(
                f"vLLM returned {len(logits)} labels for {wanted} tokens with {self._process.model!r}. Expected a "
                "token classifier, with one label per token; look at its log."
            )
        style: list[bool] = (logits[-wanted:].argmax(-1) == self._style_label).tolist()
        return style

    async def _logits(self, window: Sequence[int], *, use_cache: bool) -> Any:
        """Return logits of shape (tokens, labels): of all tokens, or of those that are not in the cache."""
        params = {"task": "token_classify", "use_activation": False, "skip_reading_prefix_cache": not use_cache}
        return (await self._process.ask("boundary", "classify", window, params)).logits

    def close(self) -> None:
        """Stop vLLM."""
        self._process.close()
