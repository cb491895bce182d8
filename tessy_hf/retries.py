"""One retry policy and one set of transient HTTP statuses, for engines, the Hub, shared storage and rows.

A function goes in; its result, or its last error, comes out. Knows nothing of what the function does. Built on
tenacity.

Shared storage, a number of attempts; an engine, asynchronous and with its own rule for when to give up; a row, whose
loop also looks it up in the journal, only the pause::

    table = RetryPolicy(attempts=6, first_pause=0.2, longest_pause=5).call(lambda: read(path))
    answer = await RetryPolicy(timeout=retry_timeout).call_async(attempt, stop=self.gives_up)
    await asyncio.sleep(RetryPolicy(first_pause=0.2).pause(attempt))
"""

from __future__ import annotations

import errno
import math
import random
import re
import ssl
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, TypedDict, TypeVar, Unpack

import httpx2
import tenacity

T = TypeVar("T")

TRANSIENT_STATUSES = frozenset({408, 409, 425, 429, *range(500, 600)} - {501, 505, 506, 508, 510, 511})
"""HTTP statuses after which the same request may succeed later: timeouts, conflicts, rate limits, and what servers and
gateways (Cloudflare's 520 to 530 among them) answer while something behind them is broken, full or restarting."""

LONGEST_ASKED_PAUSE = 60.0
"""Most seconds to pause because a server asked for it; then it is tried again."""

_LASTING_FILE_ERRORS = (
    FileNotFoundError,
    FileExistsError,
    IsADirectoryError,
    NotADirectoryError,
    PermissionError,
    ssl.SSLCertVerificationError,
)
_LASTING_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENAMETOOLONG}
_NOTHING_LEFT = re.compile(r";\s*r\s*=\s*0\s*;\s*t\s*=\s*(?P<reset>\d+)")  # RateLimit: 0 remain, for t seconds
_WORDS = 300


class TransientError(Exception):
    """A failure after which the same call may succeed in ``retry_after`` seconds; ``None`` leaves it to the policy."""

    retryable = True

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


@dataclass(frozen=True, slots=True)
class Failures:
    """The failures of one call so far."""

    error: BaseException  # the last one
    count: int
    elapsed: float  # seconds from the first to the last
    pause: float  # seconds until the next attempt


class Rules(TypedDict, total=False):
    """What one call does otherwise than its policy says."""

    retry_on: Callable[[BaseException], bool]  # which errors to try again after; by default is_transient
    notify: Callable[[Failures], Any]  # called before each pause
    stop: Callable[[Failures], bool]  # when to give up; by default RetryPolicy.exhausted
    ended: threading.Event  # once it is set a pause ends, and with it the call


@dataclass(frozen=True)
class RetryPolicy:
    """How often and how long a call is tried again: exponential pauses with jitter, or as long as the server asks."""

    timeout: float = math.inf  # seconds from the first failure in which a further attempt may begin
    attempts: float = math.inf
    first_pause: float = 0.1  # seconds before the second attempt; each further pause is twice as long
    longest_pause: float = 30.0  # most seconds of a pause that no server asked for

    def pause(self, failures: int, error: BaseException | None = None) -> float:
        """Return the seconds to wait after so many failures, of which ``error`` was the last."""
        asked = None if error is None else _asked_pause(error)
        if asked is not None:
            return min(asked, LONGEST_ASKED_PAUSE)
        pause = min(self.first_pause * 2.0 ** min(failures - 1, 60), self.longest_pause)
        return random.uniform(pause / 2, pause)

    def exhausted(self, failures: Failures) -> bool:
        """Return whether no further attempt is to be made."""
        late = failures.elapsed + failures.pause > self.timeout + 1e-6
        return late or failures.count >= self.attempts

    def call(self, function: Callable[[], T], **rules: Unpack[Rules]) -> T:
        """Call a function until it returns or fails for good; then its last error is raised.

        Args:
            function: May be called several times.
            **rules: What to try again after, what to do before each pause, and when to give up.
        """
        return tenacity.Retrying(**self._hooks(**rules))(function)

    async def call_async(self, function: Callable[[], Awaitable[T]], **rules: Unpack[Rules]) -> T:
        """Await a function until it returns or fails for good; see :meth:`call`."""
        try:
            return await function()  # most calls succeed, and tenacity costs more than some of them
        except Exception as error:  # noqa: BLE001 - it is raised again, by tenacity where it is not transient
            failed = [error]

        async def again() -> T:
            if failed:
                raise failed.pop()
            return await function()

        return await tenacity.AsyncRetrying(**self._hooks(**rules))(again)

    def _hooks(self, **rules: Unpack[Rules]) -> dict[str, Any]:
        """Return tenacity's hooks for one call; its own clock begins with the call, ours with the first failure."""
        retry_on, stop = rules.get("retry_on", is_transient), rules.get("stop", self.exhausted)
        began = 0.0
        failures: Failures

        def wait(state: tenacity.RetryCallState) -> float:
            nonlocal began, failures
            error = state.outcome.exception() if state.outcome is not None else None
            assert error is not None, "tenacity waits after failures only"
            began = began or time.monotonic()
            elapsed, pause = time.monotonic() - began, self.pause(state.attempt_number, error)
            if _asked_pause(error) is None:  # the last attempt is at the end of the time
                pause = min(pause, max(0.0, self.timeout - elapsed))
            failures = Failures(error, state.attempt_number, elapsed, pause)
            return pause

        ended = rules.get("ended")
        wake = {} if ended is None else {"sleep": tenacity.sleep_using_event(ended)}
        return wake | {
            "retry": tenacity.retry_if_exception(lambda error: isinstance(error, Exception) and retry_on(error)),
            "wait": wait,
            "stop": lambda _: stop(failures) or (ended is not None and ended.is_set()),
            "before_sleep": lambda _: "notify" in rules and rules["notify"](failures),
            "reraise": True,
        }


def is_transient(error: BaseException) -> bool:
    """Return whether the same call may succeed later, by the error or what caused it.

    Decided by the first of: an attribute ``retryable``; an HTTP status; no answer at all (of httpx, or an
    ``OSError``). Missing files, lacking rights, a full disk and untrusted certificates last.
    """
    chain = list(causes(error))
    for one in chain:
        if isinstance(retryable := getattr(one, "retryable", None), bool):
            return retryable
    status = status_of(error)
    if status is not None:
        return status in TRANSIENT_STATUSES
    if any(isinstance(one, httpx2.TransportError) for one in chain):
        lasting = (httpx2.UnsupportedProtocol, ssl.SSLCertVerificationError)
        return not any(isinstance(one, lasting) for one in chain)
    lasts = isinstance(error, _LASTING_FILE_ERRORS) or getattr(error, "errno", None) in _LASTING_ERRNOS
    return isinstance(error, OSError) and not lasts


def status_of(error: BaseException) -> int | None:
    """Return the HTTP status that an error of an HTTP client, or what caused it, is about."""
    response = _response_of(error)
    return None if response is None else int(response.status_code)


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds a server asks to wait by ``Retry-After`` (seconds or a date) or ``RateLimit``, if any."""
    said, limit = headers.get("Retry-After"), _NOTHING_LEFT.search(headers.get("RateLimit", ""))
    seconds = None if said is None else _seconds(said)
    if limit is None:
        return seconds
    return max(float(limit["reset"]), seconds or 0.0)


def first_words(text: str) -> str:
    """Return the beginning of what a server said, in one line, for a message."""
    words = " ".join(text[: 4 * _WORDS].split())
    return words if len(words) <= _WORDS else words[:_WORDS] + " ..."


def own_words(error: BaseException) -> str:
    """Return what the innermost cause of an error says: "certificate verify failed", "Name or service not known"."""
    *_, innermost = causes(error)
    return first_words(str(innermost)) or type(innermost).__name__


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error, what it came from, what that came from."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        inner = error.exceptions[0] if isinstance(error, BaseExceptionGroup) else None
        error = inner or error.__cause__ or error.__context__  # also where httpcore suppresses it


def _response_of(error: BaseException) -> Any:
    for one in causes(error):
        response = getattr(one, "response", None)
        if isinstance(getattr(response, "status_code", None), int):
            return response
    return None


def _asked_pause(error: BaseException) -> float | None:
    if isinstance(error, TransientError):
        return error.retry_after
    response = _response_of(error)
    return None if response is None else retry_after(response.headers)


def _seconds(said: str) -> float | None:
    """Read the value of ``Retry-After`` (RFC 9110, section 10.2.3)."""
    seconds = math.nan
    with suppress(ValueError):
        seconds = float(said)
    with suppress(ValueError, TypeError, OverflowError):
        date = parsedate_to_datetime(said)
        date = date if date.tzinfo is not None else date.replace(tzinfo=UTC)
        seconds = (date - datetime.now(UTC)).total_seconds()
    return seconds if math.isfinite(seconds) and seconds > 0 else None
