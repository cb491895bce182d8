"""An event loop whose clock jumps to the next timer: what is about seconds is exact, and takes none."""

import asyncio
import selectors


class _Jumping(selectors.DefaultSelector):
    def __init__(self, loop):
        super().__init__()
        self.loop = loop

    def select(self, timeout=None):
        """Return what is ready; instead of waiting for a timer, set the clock forward."""
        if not timeout:
            return super().select(timeout)
        self.loop.seconds += timeout
        return super().select(0)


class _Loop(asyncio.SelectorEventLoop):
    def __init__(self):
        self.seconds = 0.0
        super().__init__(_Jumping(self))

    def time(self):
        return self.seconds


def run(coroutine):
    """Like ``asyncio.run``, with a clock that starts at 0 and jumps."""
    with asyncio.Runner(loop_factory=_Loop) as runner:
        return runner.run(coroutine)
