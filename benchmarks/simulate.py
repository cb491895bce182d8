"""How far the simulation of `tessy plan --simulate` is off: pilots with one window foretell runs with others.

The miniature models run for real, in this process or behind vLLM servers. Before and after each run with another
window, or with other numbers of servers, is a pilot on one of each. The run is foretold from both, and the mean is
held against it, so that a machine that is slower at one time than at another, as shared ones are, is not taken for an
error; by how much the pilots themselves differ is printed beside it (`drift`), and how well each pilot tells itself.
Errors are shares of what was seen.

The simulation is of replicas with hardware of their own. Where there are fewer cores than servers and this process
want, `--parts` gives a part of a core to each server and to this process (`cores.py`).

    python benchmarks/simulate.py --engine transformers
    python benchmarks/simulate.py --engine server --rows 512 --windows 16 64 128 --json
    python benchmarks/simulate.py --engine server --replicas 1:1 1:2 --windows 16 64 --parts 0.35 0.75
"""

import argparse
import json
import logging
import os
import statistics
import tempfile
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
from cores import parts
from datasets import disable_progress_bars
from speed import engines

from tessy_hf import Speaker, TessyTransform, demo
from tessy_hf.recording import Recorder
from tessy_hf.simulate import measure, simulate

FIGURES = ("rows_per_hour", "tail_seconds", "row_seconds_p50", "row_seconds_p99")


@contextmanager
def servers(teachers, students, given):
    """Start vLLM servers, and give them and this process the parts of a core that are ``given``, if any.

    Yields a function that returns the addresses of so many teachers and students.
    """
    from tests.engines.servers import processes, vllm

    options = ("--enable-scale-out", "--scheduling-policy", "priority", "--max-model-len", "1024")
    authors = ["teacher"] * teachers + ["student"] * students
    described = [vllm(*options, author=author) for author in authors]
    with tempfile.TemporaryDirectory() as logs, processes(*described, logs=Path(logs), health="/health") as running:
        urls = [url for url, _ in running]
        wanted = [*((process.pid, given[0]) for _, process in running), (os.getpid(), given[1])] if given else []
        with parts(wanted) if wanted else nullcontext():
            yield lambda t, s: {"teacher": urls[:t], "student": urls[teachers : teachers + s]}


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


def foretell(measured, plan, rows, seeds):
    """Return the simulation's figures, as means over the seeds."""
    runs = [simulate(measured, **plan, prompts=rows, seed=seed).as_dict() for seed in range(seeds)]
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
    parser.add_argument("--replicas", nargs="+", default=["1:1"], help="teachers:students of the runs, servers only")
    parser.add_argument("--parts", type=float, nargs=2, metavar=("SERVER", "SELF"), help="of a core: cores.py")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=5, help="seeds of the simulation")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    disable_progress_bars()
    prompts = demo.prompts(arguments.rows, seed=5)
    ratios = [tuple(map(int, ratio.split(":"))) for ratio in arguments.replicas]
    results, started = [], nullcontext(lambda *_: {})
    if arguments.engine == "server":
        started = servers(*map(max, zip(*ratios, strict=True)), arguments.parts)
    with started as urls:

        def run(teachers=1, students=1, window=arguments.pilot):
            return real(arguments.engine, urls(teachers, students), window, prompts)

        def tell(what, notes, found, drift, *place):
            plan = dict(zip(("teachers", "students", "rows_in_flight"), place or (1, 1, arguments.pilot), strict=True))
            error = errors([foretell(one, plan, arguments.rows, arguments.seeds) for one in notes], found)
            results.append({"what": what, **plan, "run": found, "error": error, "drift": drift})
            speed = f"{found['rows_per_hour'] / 3600:6.2f} rows/s"
            print("{teachers}:{students} {rows_in_flight:4}".format(**plan), what, speed, error, drift, flush=True)

        run()  # warms up
        before, seen = run()
        tell("itself", [before], seen, 0.0)
        for place in [(*ratio, window) for ratio in ratios for window in arguments.windows] * arguments.repeats:
            found = run(*place)[1]
            after, again = run()
            drift = round(again["rows_per_hour"] / seen["rows_per_hour"] - 1, 3)
            tell("foretold", [before, after], found, drift, *place)
            tell("itself", [after], again, 0.0)
            before, seen = after, again
    if arguments.json:
        print(json.dumps({"cores": len(os.sched_getaffinity(0)), **vars(arguments), "results": results}))


if __name__ == "__main__":
    main()
