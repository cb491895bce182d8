"""HTTP connections to servers: a request goes in, status, headers and text come out, without the key in them.

Knows no replicas' states, JSON or retries; what the network does wrong is told apart in :class:`ReplicaError`.
"""

from __future__ import annotations

import asyncio
import os
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from functools import lru_cache
from types import MappingProxyType
from typing import Literal
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp
import httpx2

from tessy_hf.errors import EngineDeadError
from tessy_hf.retries import TransientError, causes, own_words

Kind = Literal["down", "busy", "lost", "invalid"]

CONNECT_SECONDS = 10.0
"""Most seconds to wait for a connection."""

NO_HEADERS: Mapping[str, str] = MappingProxyType({})

KEEP_ALIVE_SECONDS = 3.0
"""How long an idle connection is kept: uvicorn closes it after 5 s, and a request must not cross with that."""

HEARTBEAT_SECONDS = 120.0
"""How often a WebSocket that rests is tried; a server that is busy has half of it to answer."""


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

    def __init__(self, connections: Connections, server: str, response: aiohttp.ClientResponse) -> None:
        self.status: int = response.status
        self.headers: Mapping[str, str] = response.headers
        self.cookies = response.headers.getall("Set-Cookie", [])
        self._connections, self._server, self._response = connections, server, response

    async def content(self) -> bytes:
        """Read the whole body."""
        async with self._connections.limits(self._server):
            return self._connections.redact(await self._response.read())

    async def events(self) -> AsyncGenerator[list[bytes], None]:
        """Yield the data of server-sent events, of those that arrive together in one list."""
        rest = b""
        while True:
            events: list[bytes] = []
            async with self._connections.limits(self._server):
                while not events:
                    if not (content := await self._response.content.readany()):
                        return
                    *lines, rest = (rest + content).split(b"\n")
                    data = [line.removeprefix(b"data:").strip() for line in lines if line.startswith(b"data:")]
                    events = [self._connections.redact(event) for event in data if event != b"[DONE]"]
            yield events


class Connections:
    """Connections to any number of servers, used by one event loop, which must be running.

    Args:
        key: Sent as a bearer token and kept out of all that is read and raised; may be empty.
        timeout: Seconds until the headers of an answer, until its body, and between two pieces of a stream.
    """

    def __init__(self, key: str, timeout: float) -> None:
        self._key, self._timeout = key.encode(), timeout
        self._proxy = lru_cache(maxsize=64)(_proxy)
        self._session = aiohttp.ClientSession(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=min(CONNECT_SECONDS, timeout)),
            connector=aiohttp.TCPConnector(
                limit=0, keepalive_timeout=KEEP_ALIVE_SECONDS, ssl=httpx2.create_ssl_context()
            ),
            cookie_jar=aiohttp.DummyCookieJar(),
        )

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
        async with self.limits(server):
            response = await self._session.request(
                method, url, data=content, headers=headers, allow_redirects=False, proxy=self._proxy(server)
            )
        try:
            yield Reply(self, server, response)
        finally:
            response.close()  # a connection whose answer is read is used again

    async def websocket(self, server: str, url: str) -> aiohttp.ClientWebSocketResponse:
        """Open a WebSocket.

        Raises:
            aiohttp.WSServerHandshakeError: The server refuses it.
            ReplicaError: There is no server now.
            EngineDeadError: The server's certificate is not trusted.
        """
        refused: aiohttp.WSServerHandshakeError | None = None
        async with self.limits(server):
            try:
                return await self._session.ws_connect(
                    url, proxy=self._proxy(server), heartbeat=HEARTBEAT_SECONDS, max_msg_size=0
                )
            except aiohttp.WSServerHandshakeError as error:
                refused = error
        raise refused

    def redact(self, content: bytes) -> bytes:
        """Return what arrived without the key: servers and proxies may send it back."""
        return content.replace(self._key, b"[key]") if self._key else content

    async def close(self) -> None:
        """Close all connections."""
        await self._session.close()

    @asynccontextmanager
    async def limits(self, server: str) -> AsyncIterator[None]:
        """Limit the time of a step, and raise what goes wrong in it as errors of ours, in the library's own words."""
        try:
            async with asyncio.timeout(self._timeout):
                yield
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            raise self._unreachable(server, error) from error
        except TimeoutError as error:
            raise ReplicaError(f"The server at {server} did not answer within {self._timeout} s.", "lost") from error
        except aiohttp.ClientError as error:
            words = self.redact(own_words(error).encode()).decode()
            raise ReplicaError(
                f"The server at {server} broke the connection off: {type(error).__name__}: {words}.", "lost"
            ) from error

    def _unreachable(self, server: str, error: aiohttp.ClientError) -> ReplicaError | EngineDeadError:
        words = own_words(error)
        if any(isinstance(cause, ssl.SSLCertVerificationError) for cause in causes(error)):
            return EngineDeadError(
                f"The certificate of the server at {server} is not trusted: {words}. Correct base_url, or name the "
                "file of its certificate authority in the environment variable SSL_CERT_FILE."
            )
        if isinstance(error, aiohttp.ConnectionTimeoutError):
            words = f"no connection within {min(CONNECT_SECONDS, self._timeout):g} s"
        return ReplicaError(f"The server at {server} cannot be reached: {words}.", "down")


def _proxy(server: str) -> str | None:
    """Return the proxy that the environment names for a server (``HTTPS_PROXY``, ``NO_PROXY``)."""
    parts = urlsplit(server)
    return None if proxy_bypass(parts.netloc) else getproxies().get(parts.scheme)


def read_key(variable: str) -> str:
    """Read a key from an environment variable, empty where there is none; refuse one that no HTTP header can carry."""
    key = os.environ.get(variable, "").strip()
    if not key.isascii() or not key.isprintable():
        raise EngineDeadError(
            f"The key in the environment variable {variable} has characters that no HTTP header can carry. "
            "A line of ASCII is expected; set it again."
        )
    return key
