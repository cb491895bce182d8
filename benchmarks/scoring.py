"""What vLLM takes to score given ids: as part of a prompt (`prompt_logprobs`) against forced decoding, one by one.

A model of one layer, the prompt in the prefix cache. The script stops if the log-probabilities differ. Forced decoding
asks for one token with only the given id allowed, then again with that id in the prompt::

    python benchmarks/scoring.py [--ids 20 200] [--prompt 1000] [--repeats 3]
"""

import argparse
import asyncio
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from random import Random

import psutil

sys.path.insert(0, str(Path(__file__).parent.parent))

from middleware import long_model

from tessy_hf.engines.vllm import VLLMEngine

GREEDY = {"max_tokens": 1, "temperature": 0.0, "logprobs": 0}
SCORED = 1_000
"""Ids that are scored between two readings of the clocks; that of processor time ticks every 10 ms."""


def seconds():
    """Return the time, and the processor time of this process and vLLM's."""
    own = psutil.Process()
    cpu = sum(sum(each.cpu_times()[:2]) for each in (own, *own.children(recursive=True)))
    return {"wall": time.perf_counter(), "cpu": cpu}


async def as_prompt(engine, row, prompt, ids):
    """Score ids by one request."""
    return (await engine.score(prompt, ids, row=row)).logprobs


async def one_by_one(engine, row, prompt, ids):
    """Score ids by a request for each, of which vLLM draws the one id that is allowed."""
    found = []
    for at, token in enumerate(ids):
        params = {**GREEDY, "allowed_token_ids": [token]}
        output = await engine._ask(row, "complete", [*prompt, *ids[:at]], params, 0)
        assert list(output.token_ids) == [token]
        found += output.logprobs
    return found


WAYS = {"prompt_logprobs": as_prompt, "forced decoding": one_by_one}


async def measure(engine, way, texts, label):
    """Score texts, each a prompt and ids; return milliseconds an id, and the log-probabilities."""
    for at, (prompt, _) in enumerate(texts):
        await engine._ask(f"{label} {at}", "complete", prompt, GREEDY, 0)  # its cache is kept from here on
    begin, found = seconds(), []
    for at, (prompt, ids) in enumerate(texts):
        found += await WAYS[way](engine, f"{label} {at}", prompt, ids)
    return {of: 1e3 * (value - begin[of]) / len(found) for of, value in seconds().items()}, found


async def run(model, arguments):
    """Print a line for each number of ids and each kind of time."""
    engine = VLLMEngine(model, dtype="float32", max_model_len=arguments.prompt + max(arguments.ids) + 8)
    await engine.start()
    draw = Random(0)
    for count in arguments.ids:
        spent = {way: [] for way in WAYS}
        for repeat in range(arguments.repeats + 1):  # the first warms up, and holds one way against the other
            for way in sorted(WAYS, reverse=bool(repeat % 2)):
                lengths = arguments.prompt, count
                texts = [[draw.choices(range(300), k=n) for n in lengths] for _ in range(SCORED // count)]
                took, found = await measure(engine, way, texts, f"{count} {repeat} {way}")
                spent[way] += [took] if repeat else []
                if not repeat:
                    other = next(name for name in WAYS if name != way)
                    _, told = await measure(engine, other, texts, f"{count} {repeat} {way}")
                    assert max(abs(a - b) for a, b in zip(told, found, strict=True)) < 1e-3
        for of in seconds():
            ours, forced = ([each[of] for each in spent[way]] for way in WAYS)
            low, *_, high = ratios = sorted(b / a for a, b in zip(ours, forced, strict=True))
            print(f"{count} ids after {arguments.prompt:,}, {of}: {statistics.median(ours):.3f} and "
                  f"{statistics.median(forced):.3f} ms an id, {statistics.median(ratios):.1f} times as much by force "
                  f"({low:.1f}-{high:.1f})", flush=True)  # fmt: skip
    await engine.close()


def main():
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ids", type=int, nargs="+", default=[20, 200], help="how many ids are scored")
    parser.add_argument("--prompt", type=int, default=1_000, help="tokens of the prompt")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    given = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "ERROR"}
    os.environ.update({"OMP_NUM_THREADS": "1", **given})
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(run(long_model(Path(folder)), arguments))


if __name__ == "__main__":
    main()
