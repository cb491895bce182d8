"""In which order rows are best begun: how long real traces would take, each token as long as any other.

Rows begun last decide when a run ends. Held against each other: any order (the mean of twenty random ones), the
longest prompt first, which is what a run does within a batch, and the longest row first, which nobody knows::

    python benchmarks/order.py traces_gsm8k.jsonl traces_frames.jsonl

A trace is a JSON line with `problem_id`, `problem` and `thinking`. What the ids begin with tells sets of problems
apart.
"""

import argparse
import heapq
import json
from itertools import groupby
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr


def makespan(lengths, in_flight):
    """Return when the last row ends, if a row is begun whenever another has ended."""
    ends = [0.0] * in_flight
    for length in lengths:
        heapq.heapreplace(ends, ends[0] + length)
    return max(ends)


def main():
    """Print a line for each set of problems and number of rows in flight."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", nargs="+", type=Path)
    parser.add_argument("--in-flight", nargs="+", type=int, default=[4, 16], help="rows, of which one is in flight")
    arguments = parser.parse_args()
    print(f"{'':40} {'rows':>5} {'in flight':>9} {'rank corr.':>10} {'any order':>9} {'prompt':>7} {'row':>6}")
    for path in arguments.traces:
        traces = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        for name, rows in groupby(traces, lambda trace: trace["problem_id"].split("-")[0]):
            prompts, lengths = np.array([(len(row["problem"]), len(row["thinking"])) for row in rows], dtype=float).T
            related = spearmanr(prompts, lengths).statistic
            for part in arguments.in_flight:
                in_flight = max(1, len(lengths) // part)
                ideal, random = lengths.sum() / in_flight, np.random.default_rng(0)
                drawn = [makespan(random.permutation(lengths), in_flight) for _ in range(20)]
                prompt, row = (
                    makespan(lengths[np.argsort(-by, kind="stable")], in_flight) for by in (prompts, lengths)
                )
                took = "".join(
                    f"{took / ideal:{width}.2f}" for took, width in ((np.mean(drawn), 10), (prompt, 8), (row, 7))
                )
                print(f"{path.stem + ' ' + name:40} {len(lengths):5} {in_flight:9} {related:10.2f}{took}")


if __name__ == "__main__":
    main()
