"""Session headers, by which a router in front of several servers keeps a row where its cache is.

A row's key goes in; headers come out, without the key in them. What a router answered to a row (a session token, a
cookie) goes back to the same router with the row's next request, and with no other row's.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from hashlib import blake2b

from tessy_hf.errors import SettingsError

SESSION_HEADERS = (
    "x-session-id",  # vLLM's router and production stack, llm-d, proxies that hash a header
    "x-smg-routing-key",  # SGLang's router
    "x-dynamo-session-id",  # NVIDIA Dynamo
)
"""Headers that are sent by default, all with the same value."""

TOKEN = "x-session-token"
"""What llm-d's router answers and expects back."""

_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110, section 5.6.2
_TAKEN = frozenset({"authorization", "connection", "content-length", "content-type", "cookie", "host"})


class SessionHeaders:
    """The session headers of rows. Values are hashes with a key of their own, so nobody can look up a row by them."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names, self._key = names, secrets.token_bytes(16)
        self._answered: dict[str, tuple[str, dict[str, str]]] = {}

    def of(self, server: str, row: str) -> dict[str, str]:
        """Return what to send with a row's request to a server."""
        if not self._names:
            return {}
        digest = blake2b(row.encode("utf-8", "surrogatepass"), digest_size=16, key=self._key)
        there, answered = self._answered.get(row, ("", {}))
        return dict.fromkeys(self._names, digest.hexdigest()) | (answered if there == server else {})

    def keep(self, server: str, row: str, headers: Mapping[str, str], cookies: Sequence[str]) -> None:
        """Keep what a router answered to a row; ``cookies`` are its ``Set-Cookie`` headers."""
        if cookies or TOKEN in headers:
            token = {TOKEN: headers[TOKEN]} if TOKEN in headers else {}
            cookie = "; ".join(each.partition(";")[0].strip() for each in cookies)
            self._answered[row] = server, token | ({"cookie": cookie} if cookie else {})

    def release(self, row: str) -> None:
        """Forget what a row was answered."""
        self._answered.pop(row, None)


def check_names(names: str | Sequence[str]) -> tuple[str, ...]:
    """Return the names of headers, in lower case.

    Raises:
        SettingsError: One of them is not a header's name, or a header that says something else.
    """
    found = tuple(str(name).lower() for name in ([names] if isinstance(names, str) else names))
    if wrong := [name for name in found if not _NAME.fullmatch(name) or name in _TAKEN]:
        raise SettingsError(
            f"session_headers has {wrong[0]!r}, which cannot be a session header. The name of the header by which a "
            f"router keeps sessions is expected, such as {SESSION_HEADERS[0]}, or [] for none."
        )
    return found
