"""The middleware's WebSocket, with scripted engines and servers."""

import asyncio
import gc
import sys
from types import SimpleNamespace

import pytest

from tessy_hf.vllm_middleware.frames import (
    ERROR,
    GOES_ON,
    HEAD,
    OUT_OF_TOKENS,
    PROFILE,
    STOPPED,
    Ask,
    HashedIds,
    Piece,
    join,
    split,
)
from tessy_hf.vllm_middleware.middleware import Endpoint, generate


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


@pytest.fixture
def vllm(monkeypatch):
    """What the middleware takes from vLLM, as plain values, and an engine that notes what it is asked."""
    kinds = SimpleNamespace(DELTA="delta", FINAL_ONLY="final")
    for name, module in {
        "vllm": SimpleNamespace(SamplingParams=dict),
        "vllm.inputs": SimpleNamespace(tokens_input=list),
        "vllm.sampling_params": SimpleNamespace(RequestOutputKind=kinds),
    }.items():
        monkeypatch.setitem(sys.modules, name, module)
    return StubEngine()


class StubEngine:
    def __init__(self):
        scheduler = SimpleNamespace(policy="fcfs")
        self.vllm_config = SimpleNamespace(scheduler_config=scheduler, model_config=SimpleNamespace(max_model_len=9))
        self.asked = []

    async def generate(self, prompt, params, request_id, priority):
        self.asked.append((prompt, params, priority))
        for ids, reason in ([5, 6], None), ([7], "stop"):
            choice = SimpleNamespace(token_ids=ids, finish_reason=reason)
            yield SimpleNamespace(outputs=[choice], num_cached_tokens=1)


def engine_answers(engine, ids, **options):
    """Return the frames that a request gets from vLLM's engine."""
    sent = []

    async def send(message):
        sent.extend(split(message.get("bytes") or b""))

    assert not serve(Endpoint(generate, 1000), *request(ids, **options), send=send, engine=engine)
    return sent


@pytest.mark.parametrize(("policy", "priority"), [("fcfs", 0), ("priority", 7)])
@pytest.mark.parametrize(("seed", "meant"), [(-1, None), (0, 0)])
def test_the_engine_is_asked_as_the_client_meant(policy, priority, seed, meant, vllm):
    vllm.vllm_config.scheduler_config.policy = policy
    pieces = [Piece.decode(each) for each in engine_answers(vllm, [1, 2], priority=7, seed=seed, stream=True)]
    assert pieces == [Piece(0, GOES_ON, 0, 1, [5, 6]), Piece(0, STOPPED, 2, 1, [7])]
    params = {"max_tokens": 1, "seed": meant, "detokenize": False, "output_kind": "delta"}
    assert vllm.asked == [([1, 2], params, priority)]


def test_a_prompt_that_fills_the_context_is_refused(vllm):
    (answer,) = engine_answers(vllm, [1] * 9)
    assert HEAD.unpack_from(answer) == (ERROR, 400, 0)
    assert answer[HEAD.size :] == b"the prompt has 9 tokens, and the context of the model holds 9" and not vllm.asked
