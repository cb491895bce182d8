"""A row's token ids as JSON, of which only the new end is encoded."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np

from tessy_hf.text.growing_ids import Watch


class EncodedPrompt:
    """A row's token ids as a JSON list of which only the new end is encoded: rows grow by a span at a time."""

    def __init__(self) -> None:
        self._ids, self._json = array("i"), bytearray()  # a comma before each id
        self._watch = Watch()

    def update(self, ids: Sequence[int], head: bytes = b"", tail: bytes = b"") -> bytes:
        """Return ``head``, the JSON of ``ids``, and ``tail``; only what follows the ids before is encoded."""
        begin, most = self._watch.unchanged(ids), min(len(ids), len(self._ids))
        differ = np.asarray(self._ids)[begin:most] != np.asarray(ids)[begin:most]
        common = begin + int(differ.argmax()) if differ.any() else most
        for _ in range(len(self._ids) - common):
            del self._json[self._json.rfind(b",") :]
        new = array("i", ids[common:])
        self._ids[common:] = new
        self._json += "".join(f",{i}" for i in new).encode()
        return b"".join((head, b"[", memoryview(self._json)[1:], b"]", tail))
