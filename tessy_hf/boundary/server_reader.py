"""Run a boundary predictor behind vLLM pooling servers: for those too large for a CPU where all GPUs are taken."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from tessy_hf.boundary.batches import Batches
from tessy_hf.engines.pooling import PoolingClient
from tessy_hf.errors import BoundaryError

AT_ONCE = 4
"""Requests at once: the servers batch them again, and read one while another is on its way."""


class ServerReader:
    """A token classifier behind HTTP; ``options`` are those of :class:`tessy_hf.engines.pooling.PoolingClient`.

    Raises:
        BoundaryError: The options are not known.
    """

    def __init__(self, model: str, style_label: int, window: int, options: dict[str, Any]) -> None:
        try:
            self._client = PoolingClient(model, **options)
        except TypeError as error:
            raise BoundaryError(f'BoundaryPredictor(engine="server") got unknown options: {error}.') from error
        self._style_label, self._window = style_label, window
        self._checking, self._checked = threading.Lock(), False
        self._batches = Batches(self._read, AT_ONCE)
        self.submit = self._batches.submit

    def start(self) -> None:
        """Check the servers, once.

        Raises:
            EngineDeadError: One does not offer the classifier, or cannot be reached.
        """
        with self._checking:
            if not self._checked:
                self._client.start(self._window)
                self._client.logits([[0, 0]])
                self._checked = True

    def _read(self, windows: Sequence[Sequence[int]], since: Sequence[int]) -> list[list[bool]]:
        logits = self._client.logits(windows)
        return [
            (own.argmax(-1)[begin:] == self._style_label).tolist() for own, begin in zip(logits, since, strict=True)
        ]

    def close(self) -> None:
        """Close the connections, and so end what is waited for; then the threads."""
        self._client.close()
        self._batches.close()
