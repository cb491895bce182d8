"""A stand-in for the session of the HTTP client that asks a function: no sockets, so that time may be virtual."""

import json
from types import SimpleNamespace
from urllib.parse import urlsplit

import aiohttp
from multidict import CIMultiDict


class Answer:
    """A response of a status, with JSON as its body."""

    def __init__(self, status, value=None, headers=None):
        self.status, self.headers, self._value = status, CIMultiDict(headers or {}), value

    async def read(self):
        return json.dumps(self._value).encode()

    def close(self):
        pass


class Session:
    """Asks ``handle`` with a path and the JSON of a body; it returns an :class:`Answer`, or raises."""

    def __init__(self, handle):
        self._handle = handle

    async def request(self, method, url, *, data=None, **options):
        return await self._handle(urlsplit(url).path, None if data is None else json.loads(data))

    async def ws_connect(self, url, **options):
        raise aiohttp.WSServerHandshakeError(None, (), status=404, message="Not Found")

    async def close(self):
        pass


def refused():
    """Return what the HTTP library raises where nobody listens."""
    cause = ConnectionRefusedError(111, "Connection refused")
    error = aiohttp.ClientConnectorError(SimpleNamespace(host="server", port=80, ssl=False), cause)
    error.__cause__ = cause
    return error
