"""Servers that join and leave during a run: the current addresses go in, the replicas follow.

A server that came gets rows once it is found to serve the same model; one that went gets no more. Knows no rows.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import suppress

from tessy_hf.engines.addresses import Addresses
from tessy_hf.engines.connections import ReplicaError
from tessy_hf.engines.replicas import Replica, Replicas, Service
from tessy_hf.errors import EngineDeadError, TessyError

LOOK_SECONDS = 10.0
"""How often addresses that may change are read again; besides, whenever a server is found to be down."""

JOIN_SECONDS = 30.0
"""How long a new server may take to be inspected before the addresses are read again."""

logger = logging.getLogger(__name__)


class Membership:
    """Keeps the servers of a model, each with ``most`` requests at once, as the addresses say while a run goes on.

    ``inspect`` finds out what the server at an address offers, and raises where it cannot be used.
    """

    def __init__(
        self,
        model: str,
        addresses: Addresses,
        replicas: Replicas,
        inspect: Callable[[str], Awaitable[Service]],
        most: int,
    ) -> None:
        self._model, self._addresses, self._replicas = model, addresses, replicas
        self._inspect, self._most = inspect, most
        self._refused: dict[str, str] = {}
        self.context_length = 0  # of the servers that were there first

    def start(self, found: Mapping[str, Service]) -> None:
        """Begin with these servers, by address."""
        self.context_length = min(service.context_length for service in found.values())
        self._replicas.change([Replica(url, service, self._most) for url, service in found.items()])

    async def watch(self) -> None:
        """Look again and again, soon where a server is missed."""
        missed = self._replicas.missed
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(missed.wait(), LOOK_SECONDS)
            missed.clear()
            try:
                await self.look()
            except (ReplicaError, TessyError) as error:
                logger.warning("%s: %s The servers known before are used.", self._model, error)
            await asyncio.sleep(LOOK_SECONDS / 10)  # many rows may miss the same server

    async def look(self) -> None:
        """Read the addresses; take in servers that came, drop those that went.

        Raises:
            ReplicaError: There is no server, or none that can be used, at the moment.
            EngineDeadError: There is none yet, and those that are listed serve something else.
            SettingsError: The list holds something else than addresses.
        """
        try:
            urls = await self._addresses.read()
        except (OSError, UnicodeError) as error:
            raise ReplicaError(f"{self._addresses} cannot be read: {error}.", "down") from error
        if not urls:
            raise ReplicaError(f"{self._addresses} lists no server.", "down")
        there = {replica.url: replica for replica in self._replicas}
        new = [url for url in urls if url not in there]
        came: dict[str, Service] = {}
        failed: dict[str, ReplicaError | TessyError] = {}
        for url, result in zip(new, await asyncio.gather(*map(self._join, new)), strict=True):
            if isinstance(result, Service):
                came[url] = result
            else:
                failed[url] = result
        if not came and there.keys().isdisjoint(urls):
            raise next((error for error in failed.values() if isinstance(error, TessyError)), failed[new[0]])
        self._log(came, there.keys() - urls, failed)
        if not there:
            self.start(came)
            return
        kept = [there[url] for url in urls if url in there]
        self._replicas.change([*kept, *(Replica(url, service, self._most) for url, service in came.items())])

    async def _join(self, url: str) -> Service | ReplicaError | TessyError:
        """Inspect a server that came; return what it offers, or why it cannot take part."""
        try:
            service = await asyncio.wait_for(self._inspect(url), JOIN_SECONDS)
        except (ReplicaError, TessyError) as error:
            return error
        except TimeoutError:
            return ReplicaError(f"The server at {url} could not be inspected within {JOIN_SECONDS:g} s.", "down")
        less = service.context_length < self.context_length or self._replicas.exact > service.exact
        if len(self._replicas) and less:
            return EngineDeadError(
                f"The server at {url} takes {service.context_length} tokens, by {service.protocol}. At least the "
                f"{self.context_length} of the others, and ids where they take ids, are expected; start it like them."
            )
        return service

    def _log(self, came: Iterable[str], went: Iterable[str], failed: Mapping[str, Exception]) -> None:
        for url, error in failed.items():
            if self._refused.get(url) != str(error):  # once
                logger.warning("The server at %s is not used yet: %s", url, error)
        self._refused = {url: str(error) for url, error in failed.items()}
        for word, urls in (("joined", came), ("left", went)):
            for url in urls:
                logger.info("%s: the server at %s %s.", self._model, url, word)
