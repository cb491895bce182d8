"""Benchmarks that speak our own protocols still speak them; their figures are not tested."""

import asyncio

import pytest

from benchmarks import middleware as benchmark
from tessy_hf.vllm_middleware import frames, middleware
from tessy_hf.vllm_middleware.frames import OUT_OF_TOKENS, Piece


@pytest.fixture
def instrumented(monkeypatch):
    """The middleware while its time is counted; as it was afterwards."""
    for owner, name in (
        (frames.Rows, "prompt"),
        (frames, "join"),
        (middleware, "split"),
        (middleware._Connection, "take"),
        (middleware._Connection, "_answer"),
    ):
        monkeypatch.setattr(owner, name, getattr(owner, name))
    benchmark.instrument_middleware()


@pytest.mark.usefixtures("instrumented")
def test_the_client_of_the_middleware_s_benchmark_is_answered_by_the_endpoint():
    prompts, rows = [], []

    async def generate(engine, prompt, sampling, ask):
        prompts.append(prompt)
        yield Piece(ask.number, OUT_OF_TOKENS, 0, 0, [7] * ask.max_tokens)

    async def run():
        client = benchmark.Client(None, generate)
        found = await benchmark.measure(client, 600, 2, rows)
        client.close()
        await client.serving
        return found

    found = asyncio.run(run())
    assert sorted(map(len, prompts)) == [600] * benchmark.ROWS + [602] * benchmark.ROWS + [604] * benchmark.ROWS
    assert all(row[600:].tolist() == [7] * 6 for row, _ in rows)
    assert found["rows"] > 0 and found["middleware"] > 0 and found["scan"] == 0
