"""A scripted server with the middleware's WebSocket: aiohttp carries it, a script writes instead of vLLM."""

import asyncio
import threading
from types import SimpleNamespace

from aiohttp import WSMsgType, web

from tessy_hf.vllm_middleware.frames import GOES_ON, OUT_OF_TOKENS, PATH, STOPPED, Piece, join, split
from tessy_hf.vllm_middleware.middleware import Endpoint
from tests.engines.contract import VOCABULARY
from tests.engines.servers import THINK, go_on

MOST_BYTES = 16 << 20
"""The longest message that uvicorn takes by default, as under vLLM."""


async def carry(endpoint, asked, received=None, copies=lambda: 1, longest=MOST_BYTES):
    """Serve a WebSocket of aiohttp by an endpoint, which speaks ASGI.

    ``received`` gets the lengths of the frames that came; ``copies`` says how often a frame to the client is sent;
    a message of more than ``longest`` bytes closes the connection.
    """
    socket = web.WebSocketResponse(compress=False, max_msg_size=longest)
    await socket.prepare(asked)
    connect = iter([{"type": "websocket.connect"}])

    async def receive():
        if (first := next(connect, None)) is not None:
            return first
        message = await socket.receive()
        if message.type is not WSMsgType.BINARY:
            return {"type": "websocket.disconnect"}
        if received is not None:
            received.extend(map(len, split(message.data)))
        return {"type": "websocket.receive", "bytes": message.data}

    async def send(message):
        if message["type"] == "websocket.send":
            frames = [frame for frame in split(message["bytes"]) for _ in range(copies())]
            if frames:
                await socket.send_bytes(join(frames))

    app = SimpleNamespace(state=SimpleNamespace(engine_client=None))
    await endpoint({"type": "websocket", "app": app}, receive, send)
    return socket


class DeltaServer:
    """Answers by deltas alone, with the text of :func:`tests.engines.servers.go_on`.

    Args:
        most_bytes: The memory for rows.
        copies: Turns the number of a frame to a client into how often it is sent: 0 for a frame that is lost.
        port: Where to listen; by default at any free port.
        longest: The longest message that it takes, in bytes.
        failures: To how many of the first connections it answers 503.

    Attributes:
        prompts: What the engine was asked to continue, rows only.
        received: The lengths of the frames that came.
        connections: The connections that were made.
        refusal: Why the engine refuses all requests, if it does.
    """

    def __init__(self, *, most_bytes=1 << 30, copies=lambda number: 1, port=0, longest=MOST_BYTES, failures=0):
        self._endpoint, self._copies, self._sent = Endpoint(self._generate, most_bytes), copies, 0
        self._longest, self._failures = longest, failures
        self.prompts, self.received, self.refusal = [], [], None
        self._loop, started = asyncio.new_event_loop(), threading.Event()
        self._thread = threading.Thread(target=lambda: self._loop.run_until_complete(self._serve(port, started)))
        self._thread.start()
        started.wait()
        self.url = f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()

    def kill(self):
        """Cut all connections and stop."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._end.set)
            self._thread.join()

    async def _serve(self, port, started):
        self._end, self.connections = asyncio.Event(), set()
        app = web.Application()
        app.router.add_get("/v1/models", self._models)
        app.router.add_get(PATH, self._socket)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        await (site := web.TCPSite(runner, "127.0.0.1", port)).start()
        self.port = site._server.sockets[0].getsockname()[1]
        started.set()
        await self._end.wait()
        for transport in self.connections:
            transport.abort()
        await runner.cleanup()

    async def _models(self, _):
        return web.json_response({"data": [{"id": "student", "max_model_len": 2048}]})

    async def _socket(self, asked):
        if self._failures:
            self._failures -= 1
            return web.Response(status=503)
        self.connections.add(asked.transport)
        return await carry(self._endpoint, asked, self.received, self._next_copies, self._longest)

    def _next_copies(self):
        self._sent += 1
        return self._copies(self._sent)

    async def _generate(self, engine, prompt, sampling, ask):
        if self.refusal is not None:
            raise ValueError(self.refusal)
        if THINK in prompt:
            self.prompts.append(prompt)
        else:  # an engine finds out how to ask
            prompt = [*VOCABULARY.encode("0 ").ids, THINK]
        ids, reason = go_on(prompt, ask.max_tokens)
        pieces = [ids[at : at + 3] for at in range(0, len(ids), 3)] if ask.stream else [ids]
        for number, piece in enumerate(pieces[:-1]):
            yield Piece(ask.number, GOES_ON, 3 * number, -1, piece)
            await asyncio.sleep(0.002)
        yield Piece(
            ask.number, STOPPED if reason == "stop" else OUT_OF_TOKENS, len(ids) - len(pieces[-1]), 3, pieces[-1]
        )
