"""What vLLM's process needs to take in one more request of a row, and for the step of one token after it.

By the length of the row's text so far, all of which is in vLLM's cache: processor microseconds, medians. `of a row`
asks in the row's name, whose block hashes are kept, `of a new row` for the same text in a new name each time::

    python benchmarks/chunk.py [--lengths 100 1000 10000 40000] [--repeats 30]
"""

import argparse
import json
import os
import random
import statistics
import sys
import time
from array import array
from itertools import count
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from tessy_hf import demo
from tessy_hf.engines import vllm_worker
from tessy_hf.engines.vllm_internals import BlockHashes
from tessy_hf.engines.vllm_process import DEFAULTS, Submit

TURN = 5
"""Tokens that a row grows by from request to request."""


NAMES = map(str, count())


def ask(engine, hashes, row, ids):
    """Ask for a token. Returns the processor microseconds until the request is taken in, and until it is answered."""
    submit = Submit(next(NAMES), row, "complete", array("i", ids), {"max_tokens": 1, "temperature": 0.0}, 0)
    begin = time.process_time()
    refusal = vllm_worker._add(engine, hashes, submit)
    added = time.process_time()
    assert refusal is None, refusal
    outputs = []
    while not outputs:
        outputs = engine.step()
    (output,) = outputs
    return 1e6 * (added - begin), 1e6 * (time.process_time() - added), output.num_cached_tokens


def measure(engine, hashes, length, repeats):
    """Return the medians at a length, in turns."""
    ids = random.Random(length).choices(range(10, 200), k=length)
    seen = {"row": [], "new row": []}
    ask(engine, hashes, f"{length}", ids)
    for number in range(repeats):
        ids += random.Random(len(ids)).choices(range(10, 200), k=TURN)
        for row, name in (("row", f"{length}"), ("new row", f"{length}-{number}")):
            *times, cached = ask(engine, hashes, name, ids)
            assert cached > len(ids) - 64 - TURN, (cached, len(ids))
            seen[row].append(times)
    return {
        f"{part} of a {row}": round(statistics.median(times))
        for row, both in seen.items()
        for part, times in zip(("taking in", "step"), zip(*both, strict=True), strict=True)
    }


def main():
    """Print the figures of each length, then all as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[100, 1_000, 10_000, 40_000])
    parser.add_argument("--repeats", type=int, default=30)
    arguments = parser.parse_args()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    longest = max(arguments.lengths) + TURN * arguments.repeats + 8
    given = {"dtype": "float32", "max_model_len": longest, "hf_overrides": {"max_position_embeddings": longest}}
    engine = vllm_worker._start({**DEFAULTS, "model": str(demo.STUDENT), **given})
    hashes = BlockHashes(engine)
    told = {}
    for length in arguments.lengths:
        told[length] = measure(engine, hashes, length, arguments.repeats)
        print(length, told[length], flush=True)
    print(json.dumps(told))


if __name__ == "__main__":
    main()
