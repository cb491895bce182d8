"""The middleware's WebSocket, with scripted engines and servers."""

import asyncio
import gc
from types import SimpleNamespace

import pytest

from tessy_hf.vllm_middleware.frames import OUT_OF_TOKENS, PROFILE, Ask, HashedIds, Piece, join
from tessy_hf.vllm_middleware.middleware import HEAD, Endpoint


def request(ids, **options):
    """Return the frames of a request by a client that has sent nothing before."""
    hashed = HashedIds()
    hashed.replace(0, ids)
    settings = {"number": 0, "profile": 0, "max_tokens": 1, "seed": -1, "priority": 0, "stream": False, "slot": 0}
    asked = Ask(**settings | options, begin=0, checksum=hashed.checksum(), new=hashed.ids)
    return HEAD.pack(PROFILE, 0, 0) + b"{}", asked.encode()


def serve(endpoint, *frames, send, engine=None):
    """Send frames to an endpoint and close the connection; return what the event loop complains of."""
    complaints, arrives = [], asyncio.Queue()
    for message in ({"type": "websocket.connect"}, {"type": "websocket.receive", "bytes": join(frames)}):
        arrives.put_nowait(message)
    app = SimpleNamespace(state=SimpleNamespace(engine_client=engine))

    async def session():
        asyncio.get_running_loop().set_exception_handler(lambda _, told: complaints.append(told["exception"]))
        serving = asyncio.create_task(endpoint({"type": "websocket", "app": app}, arrives.get, send))
        for _ in range(30):  # until all is answered
            await asyncio.sleep(0)
        arrives.put_nowait({"type": "websocket.disconnect"})
        await serving

    asyncio.run(session())
    gc.collect()  # tasks complain of what was not read once they go
    return complaints


@pytest.mark.parametrize(
    ("error", "complains"),
    [
        (OSError(), False),
        (RuntimeError("Unexpected ASGI message 'websocket.send', after sending 'websocket.close'."), False),
        (RuntimeError('Cannot call "send" once a close message has been sent.'), False),
        (RuntimeError("another"), True),
    ],
)
def test_nothing_is_complained_of_where_the_client_is_gone(error, complains):
    async def generate(engine, prompt, sampling, ask):
        yield Piece(ask.number, OUT_OF_TOKENS, 0, -1, [5])

    async def send(message):
        if message["type"] == "websocket.send":
            raise error

    assert serve(Endpoint(generate, 1000), *request([1, 2]), send=send) == ([error] if complains else [])
