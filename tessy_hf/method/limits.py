"""Tell a degenerate loop: a text that only repeats itself. Words go in, the place to stop comes out.

The text is looked at after every 256th word, wherever chunks end, so the answer depends on the text alone.
"""

from __future__ import annotations

from collections import deque

from tessy_hf.vocabulary import words

WINDOW = 256
"""Words that must repeat, and how often the text is looked at."""

LONGEST_PERIOD = 64
"""The longest loop that is looked for, in words: it must come round four times."""


class LoopDetector:
    """Watches one growing text."""

    def __init__(self) -> None:
        self._last: deque[str] = deque(maxlen=WINDOW)
        self._count = 0

    def feed(self, text: str) -> int | None:
        """Read on; return how many characters of ``text`` to keep where a loop is found, else ``None``."""
        for start, end in words(text):
            self._last.append(text[start:end])
            self._count += 1
            if self._count % WINDOW == 0 and _is_loop(list(self._last)):
                return end
        return None


def _is_loop(last: list[str]) -> bool:
    return any(last[period:] == last[:-period] for period in range(1, LONGEST_PERIOD + 1))
