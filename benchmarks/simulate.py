"""How far the simulation of `tessy plan --simulate` is off: pilots with one window foretell runs with others.

The miniature models run for real, in this process or behind vLLM servers. Before and after each run with another
window is a pilot. The run is foretold from both, and the mean is held against it, so that a machine that is slower at
one time than at another, as shared ones are, is not taken for an error; by how much the pilots themselves differ is
printed beside it (`drift`), and how well each pilot tells itself. Errors are shares of what was seen.

    python benchmarks/simulate.py --engine transformers
    python benchmarks/simulate.py --engine server --rows 512 --windows 16 64 128 --json
"""

import argparse
import json
import logging
import os
import statistics
import time

import numpy as np
from datasets import disable_progress_bars
from speed import engines, servers

from tessy_hf import Speaker, TessyTransform, demo
from tessy_hf.recording import Recorder
from tessy_hf.simulate import measure, simulate

FIGURES = ("rows_per_hour", "tail_seconds", "row_seconds_p50", "row_seconds_p99")


def transform(kind, urls, window):
    """Return the transform, and the recorder that watches its engines."""
    teacher, student = engines(kind, urls)
    recorder = Recorder()
    speakers = recorder.watch(Speaker(teacher, demo.BOUNDARY_TEACHER), Speaker(student, demo.BOUNDARY_STUDENT))
    settings = {"id_column": "id", "chunk_tokens": "auto", "max_thinking_tokens": 160, "max_answer_tokens": 32}
    made = TessyTransform(
        teacher=speakers[0], student=speakers[1], rows_in_flight=window, journal=None, temperature=0, **settings
    )
    return made, recorder


def real(kind, urls, window, prompts):
    """Run the prompts. Returns what the simulation takes, and what it has to find."""
    made, recorder = transform(kind, urls, window)
    with made as run:
        list(prompts.select([0]).map(run, batched=True, load_from_cache_file=False))  # loads the models
        recorder.clear()
        begin = time.monotonic()
        rows = list(prompts.map(run, batched=True, load_from_cache_file=False, keep_in_memory=True))
        seconds = time.monotonic() - begin
    kept = {place: row["teacher_tokens"] + row["student_tokens"] for place, row in enumerate(rows, start=2)}
    begun, ended = {}, {}
    for visit in sorted(recorder.visits, key=lambda visit: visit.begin):
        begun.setdefault(visit.order, visit.begin)
        ended[visit.order] = visit.end
    took = [ended[row] - begun[row] for row in begun]
    figures = {
        "seconds": seconds,
        "rows_per_hour": 3600 * len(rows) / seconds,
        "tokens_per_second": sum(kept.values()) / seconds,
        "tail_seconds": max(ended.values()) - max(begun.values()),
        "row_seconds_p50": float(np.quantile(took, 0.5)),
        "row_seconds_p99": float(np.quantile(took, 0.99)),
    }
    return measure(recorder, kept, window), figures


def foretell(measured, window, rows, seeds):
    """Return the simulation's figures, as means over the seeds."""
    runs = [
        simulate(measured, teachers=1, students=1, rows_in_flight=window, prompts=rows, seed=seed).as_dict()
        for seed in range(seeds)
    ]
    return {name: statistics.mean(run[name] for run in runs) for name in FIGURES}


def errors(told, found):
    """Return by how much the mean of what was foretold is off."""
    return {name: round(statistics.mean(one[name] for one in told) / found[name] - 1, 3) for name in FIGURES}


def main():
    """Print the errors of each prediction, and the simulation of the pilot itself."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=("transformers", "vllm", "server"), default="transformers")
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--pilot", type=int, default=32, help="rows in flight in the pilot")
    parser.add_argument("--windows", type=int, nargs="+", default=[16, 64, 128])
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=5, help="seeds of the simulation")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    disable_progress_bars()
    prompts = demo.prompts(arguments.rows, seed=5)
    results = []
    with servers(arguments.engine == "server") as urls:

        def run(window):
            return real(arguments.engine, urls, window, prompts)

        def tell(what, window, notes, found, drift):
            told = [foretell(one, window, arguments.rows, arguments.seeds) for one in notes]
            error = errors(told, found)
            results.append({"what": what, "window": window, "run": found, "error": error, "drift": drift})
            print(f"{window:4} {what:9} {found['rows_per_hour'] / 3600:6.2f} rows/s {error} drift {drift}", flush=True)

        run(arguments.pilot)  # warms up
        before, seen = run(arguments.pilot)
        tell("itself", arguments.pilot, [before], seen, 0.0)
        for window in arguments.windows * arguments.repeats:
            found = run(window)[1]
            after, again = run(arguments.pilot)
            drift = round(again["rows_per_hour"] / seen["rows_per_hour"] - 1, 3)
            tell("foretold", window, [before, after], found, drift)
            tell("itself", arguments.pilot, [after], again, 0.0)
            before, seen = after, again
    if arguments.json:
        print(json.dumps({"cores": len(os.sched_getaffinity(0)), **vars(arguments), "results": results}))


if __name__ == "__main__":
    main()
