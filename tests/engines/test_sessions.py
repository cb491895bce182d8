"""Session headers keep a row where its cache is, tell nothing of the row, and are never another row's."""

import re

import pytest

from tessy_hf import ServerEngine
from tessy_hf.engines.sessions import SESSION_HEADERS, SessionHeaders
from tessy_hf.errors import SettingsError
from tests.engines.contract import request
from tests.engines.servers import FakeServer, is_row
from tests.engines.test_server import chunks, engine, run, stream, whole

ODD_ROWS = ["r0", "alice@example.com", "line\nbreak: x", "naïve 🙂", "\ud800", "a" * 10_000, ""]


def test_a_row_has_a_value_of_its_own_that_any_header_can_carry():
    sessions = SessionHeaders(SESSION_HEADERS)
    values = {row: set(sessions.of("http://a/v1", row).values()) for row in ODD_ROWS}
    assert all(len(each) == 1 and re.fullmatch("[0-9a-f]{32}", *each) for each in values.values())
    assert len(set.union(*values.values())) == len(ODD_ROWS)
    assert sessions.of("http://a/v1", "r0") == sessions.of("http://b/v1", "r0")


def test_a_value_does_not_tell_its_row_to_who_knows_all_rows():
    one, other = (SessionHeaders(["x-session-id"]).of("http://a/v1", "r0") for _ in range(2))
    assert one != other


@pytest.mark.parametrize(
    ("options", "sent"),
    [
        ({}, SESSION_HEADERS),
        ({"session_headers": "X-User-Id"}, ["x-user-id"]),
        ({"session_headers": ["a", "b"]}, ["a", "b"]),
    ],
)
def test_all_requests_of_a_row_have_one_value(options, sent):
    with FakeServer() as server:
        texts = run(engine(server, **options), then=chunks(4))
        asked = [headers for path, body, headers in server.requests if is_row(path, body)]
    assert texts == [whole(i) for i in range(4)]
    values = [{headers[name] for name in sent} for headers in asked]
    assert len(asked) == 12 and all(len(each) == 1 for each in values) and len(set.union(*values)) == 4


def test_streams_have_it_and_none_is_sent_where_none_is_wanted():
    with FakeServer() as server:
        stream(engine(server), request("r", tokens=9))
        run(engine(server, session_headers=[]), request("r"))
        streamed, plain = (headers for path, body, headers in server.requests if is_row(path, body))
    assert set(SESSION_HEADERS) <= streamed.keys() and not set(SESSION_HEADERS) & plain.keys()


@pytest.mark.parametrize("name", ["", "two words", "x:y", "naïve", "Authorization", "content-type", "a\nb"])
def test_a_name_that_is_no_header_of_sessions_is_refused(name):
    with pytest.raises(SettingsError, match="x-session-id") as refused:
        ServerEngine("student", base_url="http://one/v1", session_headers=["x-session-id", name])
    assert repr(name.lower()) in str(refused.value)


# --- what a router answers


class Router(FakeServer):
    """Answers each request with a token and cookies that say which session it belongs to."""

    def __init__(self):
        super().__init__(paths={"/inference/v1/generate": self.place})

    @staticmethod
    def place(handler, body):
        session, end = handler.headers.get("x-session-id"), handler.end_headers

        def with_session():
            handler.send_header("x-session-token", f"to-{session}")
            handler.send_header("Set-Cookie", f"pod={session}; Expires=Wed, 09 Jun 2100 10:18:14 GMT; HttpOnly")
            handler.send_header("Set-Cookie", "lang=en")
            end()

        handler.end_headers = with_session
        handler.answer(body)
        del handler.end_headers

    def seen(self):
        return [headers for path, body, headers in self.requests if is_row(path, body)]


def test_what_a_router_answered_to_a_row_goes_back_with_that_row_only():
    with Router() as router:
        run(engine(router), then=chunks(6))
        seen = router.seen()
    returned = [headers for headers in seen if "x-session-token" in headers]
    assert len(seen) == 18 and len(returned) == 12  # not with the first of each row
    for headers in returned:
        session = headers["x-session-id"]
        assert headers["x-session-token"] == f"to-{session}" and headers["cookie"] == f"pod={session}; lang=en"
    assert all("cookie" not in headers for headers in seen if headers not in returned)


def test_it_does_not_go_to_another_server_nor_outlive_the_row():
    sessions = SessionHeaders(["x-session-id"])
    sessions.keep("http://a/v1", "r", {"x-session-token": "t"}, ["pod=1; Path=/"])
    assert sessions.of("http://a/v1", "r").items() >= {"x-session-token": "t", "cookie": "pod=1"}.items()
    assert sessions.of("http://b/v1", "r").keys() == sessions.of("http://a/v1", "s").keys() == {"x-session-id"}
    sessions.release("r")
    assert sessions.of("http://a/v1", "r").keys() == {"x-session-id"}
