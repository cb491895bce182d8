"""How the network fails, what of it is told, which connections are shared, and where the key goes."""

import asyncio
import logging
import shutil
import ssl
import subprocess

import pytest

from tessy_hf.engines.connections import Connections, ReplicaError, read_key
from tessy_hf.errors import EngineDeadError
from tests.engines import servers
from tests.engines.servers import FakeServer, free_ports, status

SECRET = "sk-planted-0123456789abcdef"
BODY = b'{"model": "student", "prompt": [1]}'


def use(work, *, key="", timeout=30.0):
    """Open connections, do some work with them, close them."""

    async def session():
        connections = Connections(key, timeout)
        try:
            return await work(connections)
        finally:
            await connections.close()

    return asyncio.run(asyncio.wait_for(session(), 120))


async def get(connections, server, path="/models"):
    url = getattr(server, "url", server)
    async with connections.request(url, "GET", url + path) as reply:
        return reply.status, (await reply.content()).decode()


def failure(server, *, timeout=30.0):
    with pytest.raises((ReplicaError, EngineDeadError)) as caught:
        use(lambda connections: get(connections, server), timeout=timeout)
    return caught.value


def test_status_headers_and_text_are_handed_on_whatever_they_are():
    teapot = status(418, "müde", X_Color="brown")
    with FakeServer(paths={"/v1/models": teapot}) as server:

        async def work(connections):
            async with connections.request(server.url, "POST", server.url + "/models", BODY) as reply:
                return reply.status, reply.headers["X-Color"], (await reply.content()).decode()

        code, color, text = use(work)
    assert (code, color) == (418, "brown") and "de" in text
    assert server.requests[0][2]["Content-Type"] == "application/json"


def test_redirects_are_not_followed():
    with FakeServer() as other, FakeServer(paths={"/v1/models": status(307, Location="/")}) as server:
        code, _ = use(lambda connections: get(connections, server))
        assert code == 307 and not other.requests


# --- failures


def test_a_port_where_nobody_listens_is_down_in_the_systems_words():
    error = failure(f"http://127.0.0.1:{free_ports(1)[0]}/v1")
    assert error.kind == "down" and "cannot be reached: [Errno 111]" in str(error)


def test_an_unknown_host_is_down_in_the_resolvers_words():
    error = failure("http://no-such-host.invalid:8000/v1")
    assert error.kind == "down" and "no-such-host.invalid" in str(error)
    assert "not known" in str(error) or "name resolution" in str(error)


@pytest.mark.parametrize("mishap", [servers.hang, servers.trickle], ids=["hangs", "sends drop by drop"])
def test_an_answer_that_takes_too_long_is_lost(mishap):
    with FakeServer(paths={"/v1/models": mishap}) as server:
        error = failure(server, timeout=0.3)
    assert error.kind == "lost" and "did not answer within 0.3 s" in str(error)


def test_an_answer_that_breaks_off_is_lost():
    with FakeServer(paths={"/v1/models": servers.cut}) as server:
        error = failure(server)
    assert error.kind == "lost" and "broke the connection off: " in str(error)


@pytest.fixture
def own_certificate(tmp_path):
    """A certificate for 127.0.0.1 that nobody signed, and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("needs the openssl command")
    command = "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=IP:127.0.0.1"
    files = ["-keyout", str(tmp_path / "key"), "-out", str(tmp_path / "certificate")]
    subprocess.run(["openssl", *command.split(), *files], check=True, capture_output=True)
    return tmp_path / "certificate", tmp_path / "key"


def test_a_certificate_that_is_not_trusted_ends_it_at_once_in_openssls_words(own_certificate, monkeypatch):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*own_certificate)
    with FakeServer(tls=context) as server:
        error = failure(server)
        assert isinstance(error, EngineDeadError)
        assert "certificate verify failed: self-signed certificate" in str(error) and "SSL_CERT_FILE" in str(error)
        monkeypatch.setenv("SSL_CERT_FILE", str(own_certificate[0]))
        code, _ = use(lambda connections: get(connections, server))
        assert code == 200


def test_plain_http_behind_an_https_address_is_told():
    with FakeServer() as server:
        error = failure(server.url.replace("http", "https"))
    assert error.kind == "down" and "SSL" in str(error)


# --- streams


def test_events_that_arrive_together_come_in_one_list():
    def mixed(handler, body):
        content = b': ping\n\ndata: {"a": 1}\n\nevent: x\ndata:{"b": 2}\r\n\r\ndata: [DONE]\n\ndata: half'
        handler.reply(content)

    async def work(connections):
        async with connections.request(server.url, "POST", server.url + "/completions", BODY) as reply:
            return [events async for events in reply.events()]

    with FakeServer(paths={"/v1/completions": mixed}) as server:
        assert use(work) == [[b'{"a": 1}', b'{"b": 2}']]


# --- connections that are shared


def test_connections_are_used_again():
    async def work(connections):
        for _ in range(10):
            await get(connections, server)

    with FakeServer() as server:
        use(work)
        assert server.accepted == 1


def test_connections_of_many_requests_at_once_are_used_again():
    many = 20

    async def work(connections):
        for _ in range(3):
            await asyncio.gather(*(get(connections, server) for _ in range(many)))

    with FakeServer() as server:
        use(work)
        assert len(server.requests) == 3 * many and server.accepted <= many


# --- the key


def test_the_key_is_sent_and_taken_out_of_what_comes_back():
    def echo(handler, body):
        handler.reply({"said": handler.headers["Authorization"]})

    async def work(connections):
        return (await get(connections, server))[1], connections.redact(f"x{SECRET}x".encode())

    with FakeServer(paths={"/v1/models": echo}) as server:
        assert use(work, key=SECRET) == ('{"said": "Bearer [key]"}', b"x[key]x")
    assert server.requests[0][2]["Authorization"] == f"Bearer {SECRET}"


def test_no_key_sends_none():
    with FakeServer() as server:
        use(lambda connections: get(connections, server))
        assert "Authorization" not in server.requests[0][2]


def test_the_key_is_not_logged(caplog):
    def echo(handler, body):
        handler.reply({}, X_Key=SECRET, Set_Cookie=f"{SECRET}={SECRET}; {SECRET}")

    caplog.set_level(logging.DEBUG)
    with FakeServer(paths={"/v1/models": echo}) as server:
        use(lambda connections: get(connections, server), key=SECRET)
    assert SECRET not in caplog.text


@pytest.mark.parametrize(("variable", "accepted"), [("http_proxy", 1), ("no_proxy", 0)])
def test_the_proxy_of_the_environment_is_used(monkeypatch, variable, accepted):
    with FakeServer() as server, FakeServer() as proxy:
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.port}")
        monkeypatch.setenv("no_proxy", "127.0.0.1" if variable == "no_proxy" else "")
        use(lambda connections: get(connections, server))
        assert (proxy.accepted, server.accepted) == (accepted, 1 - accepted)


def test_a_key_is_read_without_the_line_end_of_its_file(monkeypatch):
    monkeypatch.setenv("MY_KEY", SECRET + "\n")
    assert read_key("MY_KEY") == SECRET and read_key("NO_SUCH_KEY") == ""


@pytest.mark.parametrize("odd", ["\n", "…"])
def test_a_key_that_no_header_can_carry_is_not_shown(monkeypatch, odd):
    monkeypatch.setenv("MY_KEY", SECRET + odd + SECRET)
    with pytest.raises(EngineDeadError, match="MY_KEY.*ASCII") as caught:
        read_key("MY_KEY")
    assert SECRET not in str(caught.value)
