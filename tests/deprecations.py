"""Turn deprecation warnings into errors where our code calls what is deprecated.

A pytest plugin for `make test-newest`. Warning filters know only the module that a warning names as its place, often a
frame inside a library (`torch.nn.Module.__call__`). This plugin looks at the whole stack: who called the code that
warns, past the library's own frames and past code that only passes calls on.
"""

import functools
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OURS = tuple(str(ROOT / folder) + os.sep for folder in ("tessy_hf", "tests"))
PASS_ON = ("contextlib.py", "functools.py", os.path.join("torch", "nn", "modules", "module.py"))
DEPRECATIONS = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)


def package(filename: str) -> str:
    """Return the part of a path that names the installed package a file belongs to."""
    head, _, tail = filename.rpartition("site-packages" + os.sep)
    return tail.split(os.sep)[0] if head else filename


def callers(frame: FrameType | None) -> Iterator[str]:
    """Yield the files of the stack, innermost first, without frames that only pass calls on."""
    while frame is not None:
        if not frame.f_code.co_filename.endswith(PASS_ON):
            yield frame.f_code.co_filename
        frame = frame.f_back


def called_by_us(frame: FrameType | None) -> bool:
    """Return whether the code that warns was called by ours, directly or from within its own package."""
    files = list(callers(frame))
    own = package(files[0]) if files else ""
    caller = next((file for file in files if package(file) != own), "")
    return any(file.startswith(OURS) for file in (caller, *files[:1]))


_warn = warnings.warn


@functools.wraps(_warn)
def warn(message: Any, category: Any = None, stacklevel: int = 1, *args: Any, **options: Any) -> None:
    """Raise a deprecation warning that our code causes; pass on any other."""
    kind = type(message) if isinstance(message, Warning) else category or UserWarning
    if issubclass(kind, DEPRECATIONS) and called_by_us(sys._getframe(1)):
        raise message if isinstance(message, Warning) else kind(message)
    _warn(message, category, stacklevel + 1, *args, **options)


warnings.warn = warn
