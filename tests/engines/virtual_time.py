"""Virtual time: an event loop that jumps to its next timer instead of waiting, for code that pauses and times out.

Nothing in it may wait for a real socket, thread or process.
"""

import asyncio
import selectors
import time

import pytest


class _Selector(selectors.SelectSelector):
    """Waits by moving the clock."""

    now = 1000.0

    def select(self, timeout=None):
        ready = super().select(0)
        if not ready:
            assert timeout is not None, "nothing will ever happen: a deadlock"
            self.now += max(timeout, 1e-6)
        return ready


def run(work):
    """Run a coroutine in virtual time.

    ``time.monotonic()`` is the virtual clock meanwhile; it begins at 1000.
    """
    with pytest.MonkeyPatch.context() as patch:
        selector = _Selector()
        patch.setattr(time, "monotonic", lambda: selector.now)
        with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selector)) as runner:
            return runner.run(work)
