"""An ASGI middleware that adds a WebSocket to vLLM's server, which takes only the new end of each row's prompt.

Frames go in and out (:mod:`.frames`); vLLM's own engine writes. The WebSocket is a route behind all other middlewares,
so that vLLM's authentication (``--api-key``) and those of the user guard it as they guard vLLM's own routes.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncGenerator, Awaitable, Callable, MutableMapping
from contextlib import aclosing
from typing import Any

from tessy_hf.vllm_middleware.frames import (
    CANCEL,
    ERROR,
    GOES_ON,
    HEAD,
    OUT_OF_TOKENS,
    PATH,
    PROFILE,
    STOPPED,
    UNKNOWN,
    Ask,
    Piece,
    Rows,
    SendQueue,
    split,
)

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Generate = Callable[[Any, list[int], dict[str, Any], Ask], AsyncGenerator[Piece, None]]

MEMORY = "TESSY_DELTAS_MIB"
"""The environment variable for the memory that kept rows may take, in MiB per API server process; 1024 by default."""


class Deltas:
    """The middleware: ``vllm serve MODEL --middleware tessy_hf.vllm_middleware.Deltas``."""

    def __init__(self, app: Callable[[Message, Receive, Send], Awaitable[None]]) -> None:
        self._app, self._added = app, False

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Add the route as the first message comes, and hand everything on."""
        if not self._added and "app" in scope:
            from starlette.routing import WebSocketRoute

            endpoint = Endpoint(generate, int(os.environ.get(MEMORY, 1024)) << 20)
            scope["app"].router.routes.insert(0, WebSocketRoute(PATH, endpoint))
            self._added = True
        await self._app(scope, receive, send)


class Endpoint:
    """The WebSocket: an ASGI application.

    Args:
        generate: Lets an engine (``app.state.engine_client``) continue a prompt.
        most_bytes: The memory that kept rows may take.
    """

    def __init__(self, generate: Generate, most_bytes: int) -> None:
        self._generate, self._rows = generate, Rows(most_bytes)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Serve one connection until it is closed; what it still asks for then is aborted."""
        await receive()
        await send({"type": "websocket.accept"})
        connection = _Connection(self._generate, scope["app"].state.engine_client, self._rows, send)
        try:
            while (message := await receive())["type"] != "websocket.disconnect":
                for frame in split(message.get("bytes") or b""):
                    connection.take(frame)
        finally:
            self._rows.drop(connection)
            connection.close()


class _Connection:
    """One client: its sampling profiles and the requests that are being answered."""

    def __init__(self, generate: Generate, engine: Any, rows: Rows, send: Send) -> None:
        self._generate, self._engine, self._rows, self._send = generate, engine, rows, send
        self._outgoing = SendQueue(self._reply)
        self._profiles: dict[int, dict[str, Any]] = {}
        self._tasks: dict[int, asyncio.Task[None]] = {}

    def take(self, frame: bytes) -> None:
        """Do what a frame says."""
        kind, profile, number = HEAD.unpack_from(frame)
        if kind == PROFILE:
            self._profiles[profile] = json.loads(frame[HEAD.size :])
        elif kind == CANCEL:
            if (task := self._tasks.get(number)) is not None:
                task.cancel()
        elif number in self._tasks:
            return  # it came twice
        elif (prompt := self._rows.prompt(self, ask := Ask.decode(frame))) is None:
            self._outgoing.put(HEAD.pack(UNKNOWN, 0, number))
        else:
            self._tasks[number] = task = asyncio.create_task(self._answer(ask, prompt))
            task.add_done_callback(lambda _: self._tasks.pop(number, None))

    def close(self) -> None:
        """Abort what is being answered."""
        self._outgoing.close()
        for task in self._tasks.values():
            task.cancel()

    async def _answer(self, ask: Ask, prompt: list[int]) -> None:
        try:
            async with aclosing(self._generate(self._engine, prompt, self._profiles[ask.profile], ask)) as pieces:
                async for piece in pieces:
                    self._outgoing.put(piece.encode())
        except Exception as error:  # noqa: BLE001 - whatever the engine says, the client is told
            status = 400 if isinstance(error, ValueError | TypeError) else 500
            self._outgoing.put(HEAD.pack(ERROR, status, ask.number) + str(error).encode())

    async def _reply(self, message: bytes) -> None:
        try:
            await self._send({"type": "websocket.send", "bytes": message})
        except Exception as error:
            if not _says_closed(error):  # else the next receive() says so too
                raise


def _says_closed(error: Exception) -> bool:
    """Whether uvicorn (OSError, RuntimeError) or Starlette, in a middleware between, says that a socket is closed."""
    from starlette.websockets import WebSocketDisconnect

    closed = isinstance(error, RuntimeError) and "close" in str(error)
    return closed or isinstance(error, OSError | WebSocketDisconnect)


async def generate(engine: Any, prompt: list[int], sampling: dict[str, Any], ask: Ask) -> AsyncGenerator[Piece, None]:
    """Let vLLM's engine continue a prompt, by its public API, which would let one beyond the context wait for ever."""
    from vllm import SamplingParams
    from vllm.inputs import tokens_input
    from vllm.sampling_params import RequestOutputKind

    if len(prompt) >= (most := engine.vllm_config.model_config.max_model_len):
        raise ValueError(f"the prompt has {len(prompt)} tokens, and the context of the model holds {most}")
    kind = RequestOutputKind.DELTA if ask.stream else RequestOutputKind.FINAL_ONLY
    seed = ask.seed if ask.seed >= 0 else None
    params = SamplingParams(**sampling, max_tokens=ask.max_tokens, seed=seed, detokenize=False, output_kind=kind)
    by_priority = engine.vllm_config.scheduler_config.policy == "priority"
    outputs = engine.generate(
        tokens_input(prompt), params, f"deltas-{os.urandom(8).hex()}", priority=ask.priority if by_priority else 0
    )
    at = 0
    async with aclosing(outputs):
        async for output in outputs:
            (choice,), cached = output.outputs, output.num_cached_tokens
            if choice.finish_reason not in (None, "stop", "length"):
                raise RuntimeError(f"the engine ended the request: {choice.finish_reason}")
            ending = {None: GOES_ON, "stop": STOPPED, "length": OUT_OF_TOKENS}[choice.finish_reason]
            yield Piece(ask.number, ending, at, -1 if cached is None else len(prompt) - cached, choice.token_ids)
            at += len(choice.token_ids)
