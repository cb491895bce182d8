"""How many rows one CPU core carries: windows of a boundary predictor that grow by a span, some at a time.

For the shipped predictor, and for a random model of Qwen3-0.6B's shape (weights do not change the time)::

    python benchmarks/predictor.py [--models small 0.6b] [--at-once 1 8 24]
"""

import argparse
import json
import random
import time

import torch
from transformers import Qwen3Config, Qwen3ForTokenClassification

from tessy_hf import BoundaryPredictor
from tessy_hf.boundary.window_cache import WindowCache

SPAN, PER_SPAN = 14, 2
"""Tokens kept between two questions about a row, and windows asked for a span, as in runs of real models."""


def network(name):
    """Return a classifier and its window."""
    if name == "small":
        live = BoundaryPredictor.from_pretrained(device="cpu").live
        return live.reader._network, live.window
    shape = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "head_dim": 128}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 8}
    config = Qwen3Config(**shape, **heads, vocab_size=1000)  # the embedding is looked up, not multiplied
    return Qwen3ForTokenClassification(config).eval(), 200


def measure(classifier, window, at_once, seconds):
    """Return processor milliseconds a window, and the tokens kept in a second of one core."""
    cache, draw = WindowCache(classifier, window), random.Random(0)
    rows = [draw.choices(range(1000), k=draw.randrange(window // 2, window)) for _ in range(at_once)]
    done, begin = 0, 0.0
    for turn in range(10_000):
        if turn == 2:  # warm
            done, begin = 0, time.process_time()
        for row in rows:
            row += draw.choices(range(1000), k=SPAN)
            if len(row) > window:
                del row[: window // 2]
        cache.read(rows, [len(row) - SPAN for row in rows])
        done += at_once
        if turn > 4 and time.process_time() - begin > seconds:
            break
    each = (time.process_time() - begin) / done
    return {"ms_per_window": round(1e3 * each, 2), "kept_tokens_per_core_second": round(SPAN / PER_SPAN / each)}


def main():
    """Print the figures as JSON, one line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=("small", "0.6b"), default=["small", "0.6b"])
    parser.add_argument("--at-once", type=int, nargs="+", default=[1, 8, 24])
    parser.add_argument("--seconds", type=float, default=5.0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in arguments.models:
        classifier, window = network(name)
        for at_once in arguments.at_once:
            figures = measure(classifier, window, at_once, arguments.seconds)
            print(json.dumps({"model": name, "at_once": at_once, **figures}), flush=True)


if __name__ == "__main__":
    main()
