"""A boundary predictor that runs in vLLM: windows whose beginning it has read before are read on from there.

Logits come back only for tokens that were not in the prefix cache; windows are anchored, so these are the newest ones.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

from tessy_hf.engines.vllm import Core
from tessy_hf.engines.vllm_worker import Ask
from tessy_hf.errors import BoundaryError


class VLLMReader:
    """A token classifier in vLLM.

    Args:
        model: Hub id or folder.
        revision: Branch, tag or commit on the Hub.
        style_label: The label that means style.
        window: Most tokens of a window.
        options: For ``vllm.EngineArgs``.

    Raises:
        EngineDeadError: vLLM is not installed or cannot run the model.
    """

    def __init__(self, model: str, revision: str | None, style_label: int, window: int, options: dict[str, Any]):
        given = {"max_model_len": window + 1, "max_num_seqs": 256, "stream_interval": 1, **options}
        self._core = Core(model, {"runner": "pooling", "revision": revision, **given})
        try:
            self._core.start()
        except BaseException:
            self._core.close()
            raise
        self._style_label = style_label

    async def submit(self, window: Sequence[int], since: int) -> Sequence[bool]:
        """Return whether each token of ``window`` from ``since`` on is style."""
        wanted = len(window) - since
        logits = await self._logits(window, fresh=False)
        if len(logits) < wanted:
            logits = await self._logits(window, fresh=True)
        if len(logits) < wanted:
            raise BoundaryError(
                f"vLLM gave {len(logits)} labels for {wanted} tokens with {self._core.model!r}. A token classifier is "
                "expected, one label a token; look at its log."
            )
        style: list[bool] = (logits[-wanted:].argmax(-1) == self._style_label).tolist()
        return style

    async def _logits(self, window: Sequence[int], *, fresh: bool) -> Any:
        params = {"task": "token_classify", "use_activation": False, "skip_reading_prefix_cache": fresh}
        asked = Ask(self._core.name("boundary"), "classify", array("i", window), params)
        return (await self._core.ask(asked)).logits

    def close(self) -> None:
        """Stop vLLM."""
        self._core.close()
