"""Ten times the rows: ten times the time, and the same memory. The miniature models through `ds.map`, with a journal.

The long run's time is held against short ones before and after it in the same process, as the machine's own speed
changes by the minute; its peak memory against that of a process that writes a short one only. With ``--whole`` the
rows of a run are one batch, as those of the short run are anyway: rows are begun longest first within a batch, and
where batches meet, short ones are written beside long ones::

    python benchmarks/growth.py [--rows 400] [--times 10] [--repeats 5] [--whole] [--engine vllm]
"""

import argparse
import itertools
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from datasets import disable_progress_bars
from speed import processor_seconds

from tessy_hf import demo


def one(sizes, whole, engine):
    """Write rows in one process, so many in each run; return the runs' seconds and the process's peak memory."""
    disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        prompts, runs = demo.prompts(sum(sizes), seed=77), []
        settings = {"temperature": 0, "rows_in_flight": 100, "journal": str(Path(folder) / "rows.journal")}
        with demo.transform(engine, **settings) as transform:
            options = {"batched": True, "batch_size": None if whole else 1_000, "load_from_cache_file": False}
            demo.prompts(100, seed=78).map(transform, cache_file_name=f"{folder}/warm.arrow", **options)
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            for number, last in enumerate(itertools.accumulate(sizes)):
                asked = prompts.select(range(last - sizes[number], last))
                begin, cpu = time.perf_counter(), processor_seconds()
                done = asked.map(transform, cache_file_name=f"{folder}/{number}.arrow", **options)
                runs.append((time.perf_counter() - begin, processor_seconds() - cpu))
                assert len(done) == sizes[number]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        seconds, cpu_seconds = zip(*runs, strict=True)
        mib = {"peak_mib": peak / 1024, "grown_mib": (peak - before) / 1024}
        return {"seconds": seconds, "cpu_seconds": cpu_seconds, **mib}


def apart(sizes, arguments):
    """Run :func:`one` in a process of its own."""
    command = [sys.executable, __file__, "--one", *map(str, sizes), "--engine", arguments.engine]
    command += ["--whole"] if arguments.whole else []
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
    print(sizes, done, file=sys.stderr, flush=True)
    return json.loads(done)


def compared(arguments):
    """Return the ratios of a long run to short ones: of its time to that of its neighbours, of memory to one alone."""
    few, many = arguments.rows, arguments.rows * arguments.times
    alone, between = apart([few], arguments), apart([few, many, few], arguments)

    def ratio(seconds):
        before, long, after = seconds
        return long / statistics.mean((before, after))

    return {
        "seconds_ratio": ratio(between["seconds"]),
        "cpu_seconds_ratio": ratio(between["cpu_seconds"]),
        "peak_mib_ratio": between["peak_mib"] / alone["peak_mib"],
        "grown_mib": between["grown_mib"],
    }


def main():
    """Print the medians of the ratios, with the lowest and the highest."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--whole", action="store_true", help="make each run one batch")
    parser.add_argument("--engine", choices=("transformers", "vllm"), default="transformers")
    parser.add_argument("--one", type=int, nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(one(arguments.one, arguments.whole, arguments.engine)))
        return
    seen = [compared(arguments) for _ in range(arguments.repeats)]
    told = {"rows": arguments.rows, "times": arguments.times}
    for name in seen[0]:
        values = sorted(figures[name] for figures in seen)
        told[name] = [round(value, 3) for value in (statistics.median(values), values[0], values[-1])]
    print(json.dumps(told))


if __name__ == "__main__":
    main()
