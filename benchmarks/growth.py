"""Ten times the rows: ten times the time, and the same memory. The miniature models through `ds.map`, with a journal.

Each run is a process of its own, the short and the long one in turns. With ``--whole`` the rows of a run are one
batch, as those of the short run are anyway: rows are begun longest first within a batch, and where batches meet, short
ones are written beside long ones, which costs more::

    python benchmarks/growth.py [--rows 400] [--times 10] [--repeats 5] [--whole] [--engine vllm]
"""

import argparse
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


def one(rows, batch_size, engine):
    """Write rows; return seconds and the growth of the process's peak memory since its models were loaded."""
    disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        prompts = demo.prompts(rows, seed=77)
        settings = {"temperature": 0, "rows_in_flight": 100, "journal": str(Path(folder) / "rows.journal")}
        with demo.transform(engine, **settings) as transform:
            options = {"batched": True, "batch_size": batch_size, "load_from_cache_file": False}
            demo.prompts(100, seed=78).map(transform, cache_file_name=f"{folder}/warm.arrow", **options)
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            begin, cpu = time.perf_counter(), processor_seconds()
            done = prompts.map(transform, cache_file_name=f"{folder}/rows.arrow", **options)
            wall, cpu = time.perf_counter() - begin, processor_seconds() - cpu
        assert len(done) == rows
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return {"seconds": wall, "cpu_seconds": cpu, "peak_mib": peak / 1024, "grown_mib": (peak - before) / 1024}


def apart(rows, whole, engine):
    """Run :func:`one` in a process of its own."""
    command = [sys.executable, __file__, "--one", "--rows", str(rows), "--engine", engine]
    command += ["--whole"] if whole else []
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
    print(rows, done, file=sys.stderr, flush=True)
    return json.loads(done)


def main():
    """Print the ratios of the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--whole", action="store_true", help="make each run one batch")
    parser.add_argument("--engine", choices=("transformers", "vllm"), default="transformers")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(one(arguments.rows, None if arguments.whole else 1_000, arguments.engine)))
        return
    sizes = (arguments.rows, arguments.rows * arguments.times)
    runs = [tuple(apart(rows, arguments.whole, arguments.engine) for rows in sizes) for _ in range(arguments.repeats)]
    few, many = ({name: statistics.median(run[at][name] for run in runs) for name in runs[0][at]} for at in (0, 1))
    ratios = {f"{name}_ratio": round(many[name] / few[name], 3) for name in ("seconds", "cpu_seconds", "peak_mib")}
    print(json.dumps({"rows": arguments.rows, "times": arguments.times, **ratios, "few": few, "many": many}))


if __name__ == "__main__":
    main()
