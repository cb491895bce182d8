"""Ask servers which model is behind the name they serve: the ``root`` in `/v1/models` of vLLM and SGLang."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress

from tessy_hf.engines import completions_api as api
from tessy_hf.engines.addresses import Addresses
from tessy_hf.engines.connections import Connections, read_key
from tessy_hf.errors import EngineDeadError, TessyError
from tessy_hf.retries import TransientError

SECONDS = 1.0
"""How long servers may take to answer. Without an answer the run asks again once they are up."""

logger = logging.getLogger(__name__)


class ServedModel:
    """What servers say is behind the name of a model. Asked once; :meth:`check` holds it against those that started.

    Args:
        model: The name under which it is served.
        addresses: Where.
        api_key_env: The environment variable that holds the key.
    """

    def __init__(self, model: str, addresses: Addresses, api_key_env: str) -> None:
        self._given = model, addresses, api_key_env
        self._root: str | None = None
        self._asked = False

    @property
    def is_known(self) -> bool:
        """Whether a server has said it."""
        return self._root is not None

    @property
    def root(self) -> str | None:
        """The folder or Hub id, or the name where that is not told; ``None`` where no server answers soon."""
        if not self._asked:
            with ThreadPoolExecutor(1) as thread:  # the caller's may run a loop
                self._root, self._asked = thread.submit(asyncio.run, _ask(*self._given)).result(), True
        return self._root

    def check(self, roots: Sequence[str]) -> None:
        """Keep what the servers say when they are started.

        Raises:
            EngineDeadError: It is not what they said before: rows of this run may be by that model.
        """
        self._root, self._asked = self._root or roots[0], True
        if self._root not in roots:
            raise EngineDeadError(
                f"The servers of {self._given[0]!r} serve {roots[0]!r} now, and served {self._root!r} when this run "
                "was made. One model for a run is expected; make a new ServerEngine for the new one."
            )
        if len(different := dict.fromkeys(roots)) > 1:
            logger.warning(
                "The servers of %r serve several models under this name: %s. One is expected, or rows are by "
                "different models; serve the same one everywhere, from the same path.",
                self._given[0],
                ", ".join(different),
            )


async def _ask(model: str, addresses: Addresses, api_key_env: str) -> str | None:
    with suppress(TimeoutError, OSError, TessyError):
        async with asyncio.timeout(SECONDS), _connections(api_key_env) as connections:
            for server in await addresses.read():
                with suppress(TessyError, TransientError, api.AnswerError):
                    async with connections.request(server, "GET", server + "/models") as reply:
                        roots = api.roots(api.parse(await reply.content()))
                    if model in roots:
                        return roots[model]
    return None


@asynccontextmanager
async def _connections(api_key_env: str) -> AsyncIterator[Connections]:
    connections = Connections(read_key(api_key_env), SECONDS)
    try:
        yield connections
    finally:
        await connections.close()
