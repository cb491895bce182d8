"""How close the window of rows in flight comes to the best schedule: no batch barrier, no tail but the last rows'.

Scripted rows with lognormal latencies go through `map` with the default batch size. The best schedule hands each row,
in order, to the first of `rows_in_flight` free places; the ratio to it is what counts.
"""

import argparse
import heapq
import json
import time

import numpy as np
from datasets import Dataset, disable_progress_bars

from tessy_hf import Script, ScriptedEngine, Speaker, TessyTransform


def best_schedule(seconds, places):
    """Return when the last row ends where each goes to the first free place, in order."""
    free = [0.0] * places
    for duration in seconds:
        heapq.heappush(free, heapq.heappop(free) + duration)
    return max(free)


def measure(rows, in_flight, mean, cap, seed, streaming):
    """Return the wall time of a map over scripted rows, and the best schedule's."""
    generator = np.random.default_rng(seed)
    sigma = 1.0
    seconds = np.minimum(generator.lognormal(np.log(mean) - sigma**2 / 2, sigma, rows), cap)
    script = Script(thinking="okay so 1 + 1 = 2", answer="the answer is 2 .")
    engine = ScriptedEngine(lambda row: script, latency=lambda request: seconds[int(request.row)] / 2)
    dataset = Dataset.from_dict({"id": [str(i) for i in range(rows)], "prompt": [f"calc {i}" for i in range(rows)]})
    if streaming:
        dataset = dataset.to_iterable_dataset()
    speaker = Speaker(engine)
    settings = {"method": "student-only", "id_column": "id", "rows_in_flight": in_flight, "journal": None}
    with TessyTransform(teacher=speaker, student=speaker, **settings) as transform:
        features = transform.features(dataset)
        begin = time.monotonic()
        finished = sum(
            row["finish_reason"] == "stop" for row in dataset.map(transform, batched=True, features=features)
        )
        wall = time.monotonic() - begin
    assert finished == rows, f"{finished} of {rows} rows finished"
    return wall, best_schedule(seconds, in_flight)


def main():
    """Print wall time over the best schedule, for Dataset and IterableDataset."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--in-flight", type=int, default=200)
    parser.add_argument("--mean", type=float, default=0.3, help="seconds a row takes")
    parser.add_argument("--cap", type=float, default=6.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    disable_progress_bars()
    figures = {}
    for kind, streaming in (("dataset", False), ("iterable_dataset", True)):
        wall, best = measure(
            arguments.rows, arguments.in_flight, arguments.mean, arguments.cap, arguments.seed, streaming
        )
        figures[kind] = {"wall_over_best": round(wall / best, 3), "wall_s": round(wall, 2), "best_s": round(best, 2)}
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
