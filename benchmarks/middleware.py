"""Where a request by deltas spends processor time in a vLLM server: middleware, `generate`, hand-over, engine core.

A model of one layer, four rows at once, two new tokens a request, every token of the prompt cached. vLLM's own methods
are timed in the process that runs them; what is not listed is the loop, the threads of ZeroMQ and the metrics::

    python benchmarks/middleware.py [--tokens 1000 40000] [--block-sizes 32 128] [--hashes sha256 xxhash]
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import logging
import os
import shutil
import statistics
import sys
import tempfile
import time
from array import array
from collections import Counter
from pathlib import Path
from random import Random
from types import SimpleNamespace

import psutil

sys.path.insert(0, str(Path(__file__).parent.parent))

from tessy_hf import demo
from tessy_hf.vllm_middleware import frames, middleware
from tessy_hf.vllm_middleware.frames import HEAD, PROFILE, Ask, HashedIds, Piece, Rows, join, split

ROWS, NEW = 4, 2
STAGES = {
    "rows": "middleware: row, checksum, copy of the ids",
    "middleware": "middleware: the rest",
    "generate": "vLLM's generate: the rest",
    "scan": "vLLM's generate: looks for unknown ids",
    "handover": "vLLM's generate: encodes the ids and hands them over",
    "other": "API server: loop, threads, answers, metrics",
    "core": "engine core",
}
SUMS = {
    "without": "API server but for the hand-over",
    "neither": "API server but for the hand-over and the look for unknown ids",
}
spent = Counter()


# --- timing


def timed(function, stage):
    """Count the processor time of a function's calls."""

    def call(*given, **options):
        begin = time.thread_time()
        try:
            return function(*given, **options)
        finally:
            spent[stage] += time.thread_time() - begin

    return call


class Timed:
    """An awaitable that counts the processor time of its steps."""

    def __init__(self, awaited, stage):
        self._awaited, self._stage = awaited, stage

    def __await__(self):
        steps = self._awaited.__await__()
        while True:
            begin = time.thread_time()
            try:
                waited = steps.send(None)
            except StopIteration as end:
                return end.value
            finally:
                spent[self._stage] += time.thread_time() - begin
            yield waited


def instrument(engine):
    """Count the time of vLLM's methods."""
    engine.input_processor.renderer.validate_token_ids = timed(engine.renderer.validate_token_ids, "scan")
    engine.engine_core._send_input = timed(engine.engine_core._send_input, "handover")
    generate = engine.generate

    async def steps(*given, **options):
        outputs = generate(*given, **options)
        with contextlib.suppress(StopAsyncIteration):
            while True:
                yield await Timed(anext(outputs), "in generate")

    engine.generate = steps


def instrument_middleware():
    """Count the time of our methods."""
    Rows.prompt = timed(Rows.prompt, "rows")
    connection, answer = middleware._Connection, middleware._Connection._answer
    connection.take = timed(connection.take, "in middleware")
    middleware.split = timed(middleware.split, "in middleware")
    frames.join = timed(frames.join, "in middleware")

    async def answered(*given):
        return await Timed(answer(*given), "in middleware")

    connection._answer = answered


# --- client and server in one process


class Client:
    """Speaks to the endpoint without a network."""

    def __init__(self, engine, generate=middleware.generate):
        self._to, self._answers, self._numbers = asyncio.Queue(), {}, itertools.count()
        scope = {"app": SimpleNamespace(state=SimpleNamespace(engine_client=engine))}
        endpoint = middleware.Endpoint(generate, 1 << 30)
        self.serving = asyncio.create_task(endpoint(scope, self._to.get, self._receive))
        self._send({"type": "websocket.connect"})
        self._send_bytes(HEAD.pack(PROFILE, 0, 0) + json.dumps({"temperature": 0.0}).encode())

    def _send(self, message):
        self._to.put_nowait(message)

    def _send_bytes(self, frame):
        self._send({"type": "websocket.receive", "bytes": join([frame])})

    async def _receive(self, message):
        begin = time.thread_time()
        for piece in map(Piece.decode, split(message.get("bytes") or b"")):
            self._answers[piece.number].set_result(piece)
        spent["client"] += time.thread_time() - begin

    async def write(self, slot, row, known, steps):
        """Ask for two tokens, so many times."""
        for _ in range(steps):
            begin = time.thread_time()
            number = next(self._numbers)
            answer = self._answers[number] = asyncio.get_running_loop().create_future()
            at = len(known.ids)
            known.replace(at, new := row[at:])
            ask = Ask(number, 0, NEW, -1, 0, False, slot, at, known.checksum(), new)
            self._send_bytes(ask.encode())
            spent["client"] += time.thread_time() - begin
            row.extend((await answer).ids)
            del self._answers[number]

    def close(self):
        self._send({"type": "websocket.disconnect"})


async def measure(client, tokens, steps, rows):
    """Return microseconds a request by stage."""
    core = psutil.Process().children(recursive=True)
    if not rows:
        draw = Random(tokens)
        rows += [(array("i", draw.choices(range(300), k=tokens)), HashedIds()) for _ in range(ROWS)]
    slots = [tokens * ROWS + i for i in range(ROWS)]
    await asyncio.gather(*(client.write(slot, *row, 1) for slot, row in zip(slots, rows, strict=True)))
    spent.clear()
    begin, own = time.process_time(), sum(sum(each.cpu_times()[:2]) for each in core)
    await asyncio.gather(*(client.write(slot, *row, steps) for slot, row in zip(slots, rows, strict=True)))
    whole, own = time.process_time() - begin, sum(sum(each.cpu_times()[:2]) for each in core) - own
    spent["core"] = own
    spent["middleware"] = spent["in middleware"] - spent["in generate"] - spent["rows"]
    spent["generate"] = spent["in generate"] - spent["scan"] - spent["handover"]
    spent["other"] = whole - spent["client"] - spent["in middleware"]
    spent["without"] = whole - spent["client"] - spent["handover"]
    spent["neither"] = spent["without"] - spent["scan"]
    return {stage: 1e6 * spent[stage] / steps / ROWS for stage in (*STAGES, *SUMS)}


def long_model(folder):
    """Save a model of one layer with a context of 65,536 tokens."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 32}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "tie_word_embeddings": True}
    Qwen3ForCausalLM(Qwen3Config(vocab_size=528, max_position_embeddings=1 << 16, **shape, **heads)).save_pretrained(
        folder
    )
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo.STUDENT / file, folder)
    return str(folder)


async def run(model, block_size, algorithm, arguments):
    """Measure one setting, lengths in turns; return medians by length."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    executor = "vllm.v1.executor.uniproc_executor.UniProcExecutor"
    engine = AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            model=model, dtype="float32", enforce_eager=True, block_size=block_size, max_num_batched_tokens=16384,
            prefix_caching_hash_algo=algorithm, distributed_executor_backend=executor,
        )
    )  # fmt: skip
    instrument(engine)
    client, rows = Client(engine), {tokens: [] for tokens in arguments.tokens}
    found = {tokens: [] for tokens in arguments.tokens}
    for _ in range(arguments.repeats):
        for tokens in arguments.tokens:
            found[tokens].append(await measure(client, tokens, arguments.steps, rows[tokens]))
    client.close()
    await client.serving
    engine.shutdown()
    return {
        tokens: {stage: statistics.median(each[stage] for each in figures) for stage in (*STAGES, *SUMS)}
        for tokens, figures in found.items()
    }


def main():
    """Print a table for each setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1_000, 40_000])
    parser.add_argument("--block-sizes", type=int, nargs="+", default=[32])
    parser.add_argument("--hashes", nargs="+", default=["sha256"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=30)
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    instrument_middleware()
    given = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "ERROR"}
    os.environ.update({"OMP_NUM_THREADS": "1", **given})
    with tempfile.TemporaryDirectory() as folder:
        model = long_model(Path(folder))
        for block_size, algorithm in itertools.product(arguments.block_sizes, arguments.hashes):
            found = asyncio.run(run(model, block_size, algorithm, arguments))
            print(f"\nblocks of {block_size}, {algorithm}: CPU us a request, by tokens of the row", arguments.tokens)
            for stage, words in {**STAGES, **SUMS}.items():
                print(f"| {words} |", *(f"{round(figures[stage]):,} |" for figures in found.values()), flush=True)


if __name__ == "__main__":
    main()
