"""One policy, one set of statuses: what is tried again, how often, after which pauses."""

import asyncio
import errno
import socket
import ssl
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import httpx2
import pytest
from huggingface_hub.errors import HfHubHTTPError

from tessy_hf.errors import EngineDeadError, RequestError
from tessy_hf.retries import (
    LONGEST_ASKED_PAUSE,
    TRANSIENT_STATUSES,
    Failures,
    RetryPolicy,
    TransientError,
    first_words,
    is_transient,
    own_words,
    retry_after,
    status_of,
)
from tests.engines import virtual_time

AT_ONCE = {"first_pause": 0.0}


def http_error(status, **headers):
    request = httpx2.Request("GET", "http://h")
    response = httpx2.Response(status, headers={k.replace("_", "-"): v for k, v in headers.items()}, request=request)
    return HfHubHTTPError("refused", response=response)


def caused(error, cause):
    error.__cause__ = cause
    return error


# --- what is transient


@pytest.mark.parametrize("status", [408, 409, 425, 429, 500, 502, 503, 504, 507, *range(520, 531), 598])
def test_these_statuses_are_transient(status):
    assert status in TRANSIENT_STATUSES and is_transient(http_error(status))


@pytest.mark.parametrize("status", [400, 401, 402, 403, 404, 405, 410, 412, 413, 422, 451, 501, 505, 508, 511])
def test_these_statuses_last(status):
    assert status not in TRANSIENT_STATUSES and not is_transient(http_error(status))


@pytest.mark.parametrize(
    ("error", "transient"),
    [
        (TransientError("busy"), True),
        (RequestError("busy", retryable=True), True),
        (RequestError("too long"), False),
        (EngineDeadError("gone"), False),
        (httpx2.ConnectError("refused"), True),
        (httpx2.ReadTimeout("slow"), True),
        (httpx2.RemoteProtocolError("cut"), True),
        (httpx2.UnsupportedProtocol("ftp"), False),
        (caused(httpx2.ConnectError("tls"), ssl.SSLCertVerificationError("self-signed")), False),
        (caused(RuntimeError("upload failed"), http_error(503)), True),
        (caused(RuntimeError("upload failed"), http_error(404)), False),
        (socket.gaierror(socket.EAI_AGAIN, "try again"), True),
        (ConnectionResetError("reset"), True),
        (TimeoutError("slow"), True),
        (OSError(errno.EIO, "input/output"), True),
        (OSError(errno.ENOSPC, "no space left"), False),
        (FileNotFoundError("none"), False),
        (PermissionError("denied"), False),
        (ValueError("wrong"), False),
        (KeyboardInterrupt(), False),
    ],
    ids=repr,
)
def test_errors_are_transient_or_lasting_by_what_caused_them(error, transient):
    assert is_transient(error) == transient


def test_the_status_of_an_error_is_found_in_its_causes():
    assert status_of(caused(RuntimeError("x"), http_error(507))) == 507
    assert status_of(ValueError("x")) is None


# --- how long to wait


def test_pauses_double_up_to_the_longest_with_jitter():
    policy = RetryPolicy(first_pause=1.0, longest_pause=10.0)
    for failures, longest in [(1, 1), (2, 2), (3, 4), (4, 8), (5, 10), (5000, 10)]:
        pauses = {policy.pause(failures) for _ in range(50)}
        assert len(pauses) > 1 and longest / 2 <= min(pauses) <= max(pauses) <= longest


def in_seconds(seconds):
    return format_datetime(datetime.now(UTC) + timedelta(seconds=seconds), usegmt=True)


def test_retry_after_is_read_as_seconds_or_as_a_date():
    assert retry_after({"Retry-After": "7"}) == 7
    assert retry_after({"Retry-After": "0.5"}) == 0.5
    assert 3500 < retry_after({"Retry-After": in_seconds(3600)}) <= 3600
    local = (datetime.now(UTC) + timedelta(hours=1)).strftime("%a, %d %b %Y %H:%M:%S -0000")
    assert 3500 < retry_after({"Retry-After": local}) <= 3600


@pytest.mark.parametrize(
    "said",
    ["0", "-5", "nan", "inf", "1e999", "soon", "", "Fri, 31 Dec 1999 23:59:59 GMT", "Fri, 99 Dec 1999", "9" * 400],
)
def test_a_retry_after_that_says_no_time_is_ignored(said):
    assert retry_after({"Retry-After": said}) is None


def test_a_rate_limit_is_waited_for_once_nothing_is_left():
    assert retry_after({"RateLimit": '"api";r=0;t=9'}) == 9
    assert retry_after({"RateLimit": '"api";r=3;t=9'}) is None
    assert retry_after({"RateLimit": '"api";r=0;t=9', "Retry-After": "20"}) == 20


def test_the_pause_a_server_asks_for_is_kept_up_to_a_limit():
    policy = RetryPolicy(first_pause=1.0)
    assert policy.pause(1, http_error(429, Retry_After="7")) == 7
    assert policy.pause(1, TransientError("busy", retry_after=3.0)) == 3
    assert policy.pause(9, TransientError("moved", retry_after=0.0)) == 0
    assert policy.pause(1, http_error(429, Retry_After="86400")) == LONGEST_ASKED_PAUSE
    assert policy.pause(1, http_error(429)) <= 1


# --- how often


class Failing:
    """Fails with these errors, then returns."""

    def __init__(self, *errors):
        self.errors, self.calls = list(errors), 0

    def __call__(self):
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return "done"

    async def later(self):
        return self()


def sync(policy, failing, **options):
    return policy.call(failing, **options)


def asynchronous(policy, failing, **options):
    return asyncio.run(policy.call_async(failing.later, **options))


both = pytest.mark.parametrize("call", [sync, asynchronous])


@both
def test_a_call_is_repeated_until_it_returns(call):
    failing = Failing(TransientError("1"), TransientError("2"))
    assert call(RetryPolicy(**AT_ONCE), failing) == "done" and failing.calls == 3


@both
def test_a_lasting_error_is_raised_at_once(call):
    for errors in ([ValueError("wrong")], [TransientError("1"), ValueError("wrong")]):
        failing = Failing(*errors)
        with pytest.raises(ValueError, match="wrong"):
            call(RetryPolicy(**AT_ONCE), failing)
        assert failing.calls == len(errors)


@both
def test_the_last_error_is_raised_once_attempts_are_used_up(call):
    failing = Failing(*(TransientError(str(number)) for number in range(9)))
    with pytest.raises(TransientError, match="2"):
        call(RetryPolicy(attempts=3, **AT_ONCE), failing)
    assert failing.calls == 3


@both
def test_a_pause_beyond_the_timeout_is_not_begun(call):
    failing = Failing(TransientError("busy", retry_after=50.0))
    with pytest.raises(TransientError, match="busy"):
        call(RetryPolicy(timeout=5.0), failing)


def test_the_last_attempt_is_at_the_end_of_the_time():
    times = []

    async def attempt():
        times.append(time.monotonic())
        raise TransientError("busy")

    with pytest.raises(TransientError):
        virtual_time.run(RetryPolicy(timeout=16.0, first_pause=10.0).call_async(attempt))
    assert 16 <= times[-1] - times[0] < 16.1


def test_a_cancelled_call_is_not_repeated():
    async def attempt():
        attempts.append(1)
        if len(attempts) == 1:
            raise TransientError("busy")
        second.set()
        await asyncio.Event().wait()

    async def session():
        call = asyncio.ensure_future(RetryPolicy(**AT_ONCE).call_async(attempt, retry_on=lambda error: True))
        await second.wait()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call

    attempts, second = [], asyncio.Event()
    asyncio.run(session())
    assert len(attempts) == 2


@both
def test_what_to_retry_and_when_to_stop_can_be_told(call):
    failing, told = Failing(KeyError("a"), KeyError("b"), KeyError("c")), []
    with pytest.raises(KeyError, match="c"):
        call(
            RetryPolicy(**AT_ONCE),
            failing,
            retry_on=lambda error: isinstance(error, KeyError),
            stop=lambda failures: failures.count == 3,
            notify=lambda failures: told.append((str(failures.error), failures.count, failures.pause)),
        )
    assert told == [("'a'", 1, 0.0), ("'b'", 2, 0.0)]


def test_the_timeout_counts_from_the_first_failure():
    policy, error = RetryPolicy(timeout=60.0), TransientError("x")
    assert not policy.exhausted(Failures(error, 1, elapsed=0.0, pause=30.0))
    assert policy.exhausted(Failures(error, 1, elapsed=0.0, pause=61.0))
    assert policy.exhausted(Failures(error, 5, elapsed=55.0, pause=10.0))
    assert not RetryPolicy().exhausted(Failures(error, 10**6, elapsed=10.0**6, pause=10.0))


# --- what is said


def test_first_words_are_one_short_line():
    assert first_words(" Rate limit\n  exceeded\t") == "Rate limit exceeded"
    assert first_words("word " * 1000).endswith(" ...") and len(first_words("word " * 1000)) < 320
    assert first_words("") == ""


def test_the_innermost_cause_speaks():
    inner = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    assert "Name or service not known" in own_words(caused(httpx2.ConnectError("failed"), inner))
    group = ExceptionGroup("several", [ConnectionRefusedError(111, "refused"), OSError("other")])
    assert own_words(caused(OSError("All failed"), group)) == "[Errno 111] refused"
    assert own_words(TimeoutError()) == "TimeoutError"
