"""The addresses of a model's servers: a fixed list, or a file or DNS name that is read again during a run.

The ``base_url`` of an engine goes in; the current list of ``http://host:port/v1`` comes out. Knows nothing of what is
sent there.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from tessy_hf.errors import SettingsError

FILE, DNS = "file://", "dns+http://"


class Addresses:
    """The addresses of a model's servers.

    Given is ``http://host:port/v1`` or a list of such, which is fixed; ``file:///path``, a text file with one address
    a line (``#`` begins a comment); or ``dns+http://host:port/v1``, all hosts the name resolves to. An address that
    cannot be used is a :class:`SettingsError`.
    """

    def __init__(self, given: str | Sequence[str]) -> None:
        self.fixed: list[str] = []  # empty where the addresses may change
        self._file: Path | None = None
        self._name: str | None = None
        if isinstance(given, str) and given.startswith(FILE):
            self._file = Path(given.removeprefix(FILE))
            if not self._file.is_absolute():
                raise SettingsError(
                    f"base_url={given!r} has no absolute path. One is expected, such as file:///shared/servers.txt."
                )
        elif isinstance(given, str) and given.startswith(DNS):
            self._name = check_url(given.removeprefix("dns+"))
        else:
            self.fixed = list(dict.fromkeys(map(check_url, [given] if isinstance(given, str) else given)))
            if not self.fixed:
                raise SettingsError(
                    'ServerEngine got no address. Pass base_url="http://127.0.0.1:8000/v1" or a list of addresses.'
                )

    @property
    def dynamic(self) -> bool:
        """Whether the addresses may change during a run."""
        return not self.fixed

    async def read(self) -> list[str]:
        """Return the current addresses, each once, if any; an ``OSError`` means that they cannot be read now."""
        if self._file is not None:
            text = await asyncio.to_thread(self._file.read_text, encoding="utf-8")
            lines = (line.partition("#")[0].strip() for line in text.splitlines())
            return list(dict.fromkeys(check_url(line) for line in lines if line))
        if self._name is not None:
            parts = urlsplit(self._name)
            found = await asyncio.get_running_loop().getaddrinfo(
                parts.hostname, parts.port or 80, type=socket.SOCK_STREAM
            )
            hosts = sorted({str(address[0]) for *_, address in found})
            shown = (f"[{host}]" if ":" in host else host for host in hosts)
            return [f"http://{host}:{parts.port or 80}{parts.path}" for host in shown]
        return self.fixed

    def __repr__(self) -> str:
        if self._file is not None:
            return repr(f"{FILE}{self._file}")
        return repr(f"dns+{self._name}") if self._name is not None else repr(self.fixed)


def check_url(url: str) -> str:
    """Return an http(s) address without its last slash; refuse one without a host, or with what may be a secret."""
    shown = str(url).rpartition("@")[2].partition("?")[0].partition("#")[0]
    expected = "An address such as http://127.0.0.1:8000/v1 is expected."
    if "@" in str(url) or "?" in str(url) or "#" in str(url):
        raise SettingsError(
            f"The address of {shown!r} contains a user, a query or a fragment, which would end up in logs. {expected} "
            "Put the key into the environment variable that api_key_env names (OPENAI_API_KEY by default)."
        )
    try:
        parts = urlsplit(str(url))
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        usable = False
    if not usable or not shown.isprintable() or " " in shown:
        raise SettingsError(f"base_url={shown!r} cannot be used. {expected} Correct it, or pass a list of addresses.")
    return shown.rstrip("/")
