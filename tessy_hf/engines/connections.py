"""HTTP connections to servers: a request goes in, status, headers and text come out, without the key in them.

Knows no replicas' states, JSON or retries; what the network does wrong is told apart in :class:`ReplicaError`.
"""

from __future__ import annotations

import asyncio
import logging
import os
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Literal

import httpx2

from tessy_hf.errors import EngineDeadError
from tessy_hf.retries import TransientError, causes, own_words

Kind = Literal["down", "busy", "lost", "invalid"]

POOL = 8
"""Requests that share a pool of connections: httpcore2 looks at each idle connection of a pool for each request."""

CONNECT_SECONDS = 10.0
"""Most seconds to wait for a connection."""


class ReplicaError(TransientError):
    """A server failed a request that may succeed later, or at another server.

    Args:
        message: What was seen.
        kind: ``down``: nothing serves there now; ``busy``: it wants fewer requests; ``lost``: the answer did not
            arrive; ``invalid``: the answer cannot be used.
        retry_after: Seconds the server asked to wait, or ``None``.
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
        self._connections, self._server, self._response = connections, server, response

    async def text(self) -> str:
        """Read the whole body."""
        async with self._connections.limits(self._server):
            await self._response.aread()
        return self._connections.redact(self._response.text)

    async def events(self) -> AsyncGenerator[list[str], None]:
        """Yield the data of server-sent events, of those that arrive together in one list."""
        batches = self._batches()
        while True:
            async with self._connections.limits(self._server):
                batch = await anext(batches, None)
            if batch is None:
                return
            yield batch

    async def _batches(self) -> AsyncGenerator[list[str], None]:
        rest = ""
        async for text in self._response.aiter_text():
            *lines, rest = (rest + text).split("\n")
            data = [line.removeprefix("data:").strip() for line in lines if line.startswith("data:")]
            if events := [self._connections.redact(event) for event in data if event != "[DONE]"]:
                yield events


@dataclass
class _Pool:
    client: httpx2.AsyncClient
    requests: int = 0


class Connections:
    """Connection pools for any number of servers, used by one event loop.

    Args:
        key: Sent as a bearer token and kept out of all that is read, raised and logged; may be empty.
        timeout: Seconds until the headers of an answer, until its body, and between two pieces of a stream.
    """

    def __init__(self, key: str, timeout: float) -> None:
        self._key, self._timeout = key, timeout
        self._log_filter = _KeyFilter(key)
        self._ssl = httpx2.create_ssl_context()
        self._pools: list[_Pool] = []

    @asynccontextmanager
    async def request(self, server: str, method: str, url: str, content: bytes | None = None) -> AsyncIterator[Reply]:
        """Send a request and wait for the headers of the answer; redirects are not followed.

        Args:
            server: The server's address, for messages.
            method: ``GET`` or ``POST``.
            url: Where to.
            content: The JSON to post.

        Raises:
            ReplicaError: No answer arrived: kind ``down`` or ``lost``.
            EngineDeadError: The server's certificate is not trusted.
        """
        headers = {} if content is None else {"Content-Type": "application/json"}
        with self._client() as client:
            async with self.limits(server):
                request = client.build_request(method, url, content=content, headers=headers)
                response = await client.send(request, stream=True)
            try:
                yield Reply(self, server, response)
            finally:
                await response.aclose()

    def redact(self, text: str) -> str:
        """Return a text without the key: servers and proxies may send it back."""
        return text.replace(self._key, "[key]") if self._key else text

    async def close(self) -> None:
        """Close all connections."""
        for pool in self._pools:
            await pool.client.aclose()
        self._log_filter.remove()

    @contextmanager
    def _client(self) -> Iterator[httpx2.AsyncClient]:
        """Lend the client of the first pool that has room, until the answer has been read."""
        pool = next((pool for pool in self._pools if pool.requests < POOL), None)
        if pool is None:
            pool = _Pool(self._open())
            self._pools.append(pool)
        pool.requests += 1
        try:
            yield pool.client
        finally:
            pool.requests -= 1

    def _open(self) -> httpx2.AsyncClient:
        return httpx2.AsyncClient(  # httpx 0.28 looks through all connections, squared, for each request
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            timeout=httpx2.Timeout(self._timeout, connect=min(CONNECT_SECONDS, self._timeout)),
            # uvicorn closes idle connections after 5 s: a request must not cross with that
            limits=httpx2.Limits(max_keepalive_connections=None, keepalive_expiry=3.0),
            verify=self._ssl,
        )

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


class _KeyFilter(logging.Filter):
    """Takes the key out of what the HTTP library logs: a server may send it back in its headers."""

    _LOGGERS = ("httpx2", *(f"httpcore2.{part}" for part in ("connection", "http11", "http2", "proxy", "socks")))

    def __init__(self, key: str) -> None:
        super().__init__()
        self._key = key
        for name in self._LOGGERS if key else ():
            logging.getLogger(name).addFilter(self)

    def remove(self) -> None:
        for name in self._LOGGERS:
            logging.getLogger(name).removeFilter(self)

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        if self._key in message:
            record.msg, record.args = message.replace(self._key, "[key]"), ()
        return True


def read_key(variable: str) -> str:
    """Read a key from an environment variable; empty where there is none.

    Raises:
        EngineDeadError: No HTTP header can carry it.
    """
    key = os.environ.get(variable, "").strip()
    if not key.isascii() or not key.isprintable():
        raise EngineDeadError(
            f"The key in the environment variable {variable} has characters that no HTTP header can carry. "
            "A line of ASCII is expected; set it again."
        )
    return key
