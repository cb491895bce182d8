"""How far the simulation of `tessy plan --simulate` is off: a pilot with one window predicts runs with others.

The miniature models run for real, in this process or behind vLLM servers. The pilot's first run gives the statistics;
then the same prompts are run with each window, in turns with others, and are predicted from the pilot alone. All
errors are printed, of throughput (of the simulation against the run), of the tail and of the rows' times.

    python benchmarks/simulate.py --engine transformers
    python benchmarks/simulate.py --engine server --rows 512 --windows 16 32 64 128 --json
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


def compare(measured, window, rows, found, seeds):
    """Return the simulation's figures over those of the run, less 1, as means over the seeds."""
    runs = [
        simulate(measured, teachers=1, students=1, rows_in_flight=window, prompts=rows, seed=seed).as_dict()
        for seed in range(seeds)
    ]
    names = ("rows_per_hour", "tail_seconds", "row_seconds_p50", "row_seconds_p99")
    errors = {name: round(statistics.mean(run[name] for run in runs) / found[name] - 1, 3) for name in names}
    return {**errors, "sd": round(float(np.std([run["rows_per_hour"] / found["rows_per_hour"] for run in runs])), 3)}


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
        for repeat in range(arguments.repeats):
            measured, seen = real(arguments.engine, urls, arguments.pilot, prompts)
            runs = [(arguments.pilot, seen)]
            for window in [*arguments.windows, arguments.pilot]:
                runs.append((window, real(arguments.engine, urls, window, prompts)[1]))
            for number, (window, found) in enumerate(runs):
                what = "itself" if number == 0 else "again" if window == arguments.pilot else "predicted"
                error = compare(measured, window, arguments.rows, found, arguments.seeds)
                results.append({"repeat": repeat, "window": window, "what": what, "run": found, "error": error})
                print(window, what, f"{found['rows_per_hour'] / 3600:.2f} rows/s", error, flush=True)
    if arguments.json:
        print(json.dumps({"cores": len(os.sched_getaffinity(0)), **vars(arguments), "results": results}))


if __name__ == "__main__":
    main()
