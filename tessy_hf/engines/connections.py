"""HTTP connections to servers: a request goes in, status, headers and text come out, without the key in them.

Knows no replicas' states, JSON or retries; what the network does wrong is told apart in :class:`ReplicaError`.
"""

from __future__ import annotations

import asyncio
import logging
import os
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from http.cookiejar import CookieJar, DefaultCookiePolicy
from types import MappingProxyType
from typing import Literal

import httpx2

from tessy_hf.errors import EngineDeadError
from tessy_hf.retries import TransientError, causes, own_words

Kind = Literal["down", "busy", "lost", "invalid"]

CONNECT_SECONDS = 10.0
"""Most seconds to wait for a connection."""

NO_HEADERS: Mapping[str, str] = MappingProxyType({})

_LOGGERS = [
    logging.getLogger(name)
    for name in ("httpx2", *(f"httpcore2.{part}" for part in ("connection", "http11", "http2", "proxy", "socks")))
]


class ReplicaError(TransientError):
    """A server failed a request that may succeed later, or at another server.

    Its ``kind`` is ``down``: nothing serves there now; ``busy``: it wants fewer requests; ``lost``: the answer did not
    arrive; or ``invalid``: the answer cannot be used.
    """

    def __init__(self, message: str, kind: Kind, retry_after: float | None = None) -> None:
        super().__init__(message, retry_after)
        self.kind = kind


class Reply:
    """An HTTP response whose body is still to be read."""

    def __init__(self, connections: Connections, server: str, response: httpx2.Response) -> None:
        response.encoding = "utf-8"  # as JSON is, whatever the server calls it
        self.status: int = response.status_code
        self.headers: Mapping[str, str] = response.headers
        self.cookies = response.headers.get_list("set-cookie")
        self._connections, self._server, self._response = connections, server, response

    async def text(self) -> str:
        """Read the whole body."""
        async with self._connections.limits(self._server):
            await self._response.aread()
        return self._connections.redact(self._response.text)

    async def events(self) -> AsyncGenerator[list[str], None]:
        """Yield the data of server-sent events, of those that arrive together in one list."""
        texts, rest = self._response.aiter_text(), ""
        while True:
            events: list[str] = []
            async with self._connections.limits(self._server):
                while not events:
                    if (text := await anext(texts, None)) is None:
                        return
                    *lines, rest = (rest + text).split("\n")
                    data = [line.removeprefix("data:").strip() for line in lines if line.startswith("data:")]
                    events = [self._connections.redact(event) for event in data if event != "[DONE]"]
            yield events


class Connections:
    """Connections to any number of servers, used by one event loop.

    Args:
        key: Sent as a bearer token and kept out of all that is read, raised and logged; may be empty.
        timeout: Seconds until the headers of an answer, until its body, and between two pieces of a stream.
    """

    def __init__(self, key: str, timeout: float) -> None:
        self._key, self._timeout = key, timeout
        self._ssl = httpx2.create_ssl_context()
        self._clients: list[httpx2.AsyncClient] = []
        self._idle: list[httpx2.AsyncClient] = []
        for logger in _LOGGERS if key else ():
            logger.addFilter(self._redact_record)

    @asynccontextmanager
    async def request(
        self, server: str, method: str, url: str, content: bytes | None = None, headers: Mapping[str, str] = NO_HEADERS
    ) -> AsyncIterator[Reply]:
        """Send a request and wait for the headers of the answer; redirects are not followed, cookies are not kept.

        Raises:
            ReplicaError: No answer arrived: kind ``down`` or ``lost``.
            EngineDeadError: The server's certificate is not trusted.
        """
        headers = headers if content is None else {"Content-Type": "application/json", **headers}
        client = self._idle.pop() if self._idle else self._open()
        try:
            async with self.limits(server):
                request = client.build_request(method, url, content=content, headers=headers)
                response = await client.send(request, stream=True)
            try:
                yield Reply(self, server, response)
            finally:
                await response.aclose()
        finally:
            self._idle.append(client)

    def redact(self, text: str) -> str:
        """Return a text without the key: servers and proxies may send it back."""
        return text.replace(self._key, "[key]") if self._key else text

    async def close(self) -> None:
        """Close all connections."""
        for client in self._clients:
            await client.aclose()
        for logger in _LOGGERS:
            logger.removeFilter(self._redact_record)

    def _open(self) -> httpx2.AsyncClient:
        """Open a client for one request at a time: httpcore2 looks through all idle connections for each request."""
        client = httpx2.AsyncClient(
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            timeout=httpx2.Timeout(self._timeout, connect=min(CONNECT_SECONDS, self._timeout)),
            # uvicorn closes idle connections after 5 s: a request must not cross with that
            limits=httpx2.Limits(max_keepalive_connections=None, keepalive_expiry=3.0),
            verify=self._ssl,
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),  # they would be those of another row
        )
        self._clients.append(client)
        return client

    @asynccontextmanager
    async def limits(self, server: str) -> AsyncIterator[None]:
        """Limit the time of a step, and raise what goes wrong in it as errors of ours, in the library's own words."""
        try:
            async with asyncio.timeout(self._timeout):  # httpx2's own limit is on each read
                yield
        except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
            raise self._unreachable(server, error) from error
        except (TimeoutError, httpx2.TimeoutException) as error:
            raise ReplicaError(f"The server at {server} did not answer within {self._timeout} s.", "lost") from error
        except httpx2.RequestError as error:
            raise ReplicaError(
                f"The server at {server} broke the connection off: {type(error).__name__}: {own_words(error)}.", "lost"
            ) from error

    def _unreachable(self, server: str, error: httpx2.TransportError) -> ReplicaError | EngineDeadError:
        words = own_words(error)
        if any(isinstance(cause, ssl.SSLCertVerificationError) for cause in causes(error)):
            return EngineDeadError(
                f"The certificate of the server at {server} is not trusted: {words}. Correct base_url, or name the "
                "file of its certificate authority in the environment variable SSL_CERT_FILE."
            )
        if isinstance(error, httpx2.ConnectTimeout):
            words = f"no connection within {min(CONNECT_SECONDS, self._timeout):g} s"
        return ReplicaError(f"The server at {server} cannot be reached: {words}.", "down")

    def _redact_record(self, record: logging.LogRecord) -> bool:
        """Take the key out of what the HTTP library logs: a server may send it back in its headers."""
        message = record.getMessage()
        if self._key in message:
            record.msg, record.args = self.redact(message), ()
        return True


def read_key(variable: str) -> str:
    """Read a key from an environment variable, empty where there is none; refuse one that no HTTP header can carry."""
    key = os.environ.get(variable, "").strip()
    if not key.isascii() or not key.isprintable():
        raise EngineDeadError(
            f"The key in the environment variable {variable} has characters that no HTTP header can carry. "
            "A line of ASCII is expected; set it again."
        )
    return key
