"""Ask servers which model is behind the name they serve: the ``root`` in `/v1/models` of vLLM and SGLang."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress

from tessy_hf.engines import completions_api as api
from tessy_hf.engines.addresses import Addresses
from tessy_hf.engines.connections import Connections, read_key
from tessy_hf.errors import TessyError
from tessy_hf.retries import TransientError

SECONDS = 3.0
"""How long servers may take to answer. Without an answer the run asks again once they are up."""


def ask_root(model: str, addresses: Addresses, api_key_env: str) -> str | None:
    """Return what :func:`root` does, from threads with a running loop as well."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, root(model, addresses, api_key_env)).result()


async def root(model: str, addresses: Addresses, api_key_env: str) -> str | None:
    """Return the folder or Hub id that is served under a name, the name itself where that is not told.

    ``None`` where no server answers: starting the engine says why.
    """
    with suppress(TimeoutError, OSError, TessyError):
        async with asyncio.timeout(SECONDS), _connections(api_key_env) as connections:
            for server in await addresses.read():
                with suppress(TessyError, TransientError, api.AnswerError):
                    async with connections.request(server, "GET", server + "/models") as reply:
                        roots = api.roots(api.parse(await reply.text()))
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
