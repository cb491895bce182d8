"""What the options of a vLLM server change for TESSY: processor time of all its processes, as ratios to the default.

Each option's server runs beside one with the defaults, and both do the same work in turns. *Short rows*: the
miniature student is teacher and student of calc prompts, by `ds.map`. *Long rows*: rows of 10,000 tokens, all in
flight, of which each request keeps 14 of 20 new tokens. All by deltas::

    python benchmarks/settings.py [--options xxhash block-size-128] [--repeats 3]
"""

import argparse
import asyncio
import json
import logging
import statistics
import sys
import tempfile
import time
from array import array
from pathlib import Path
from random import Random

import psutil
from datasets import disable_progress_bars

sys.path.insert(0, str(Path(__file__).parent.parent))  # for `tests`, which start the servers here as well

from tessy_hf import ServerEngine, Speaker, TessyTransform, demo
from tessy_hf.engines.base import Request
from tests.engines.servers import processes, vllm_serve

OPTIONS = {
    "block-size-16": ["--block-size", "16"],
    "block-size-64": ["--block-size", "64"],
    "block-size-128": ["--block-size", "128"],
    "xxhash": ["--prefix-caching-hash-algo", "xxhash"],
    "sha256_cbor": ["--prefix-caching-hash-algo", "sha256_cbor"],
    "max-num-seqs-16": ["--max-num-seqs", "16"],
    "max-num-seqs-1024": ["--max-num-seqs", "1024"],
    "async-scheduling": ["--async-scheduling"],
    "no-async-scheduling": ["--no-async-scheduling"],
    "priority": ["--scheduling-policy", "priority"],
    "api-server-count-2": ["--api-server-count", "2"],
}
"""By name; the default has blocks of 32 tokens (CPUs take multiples of 32) and sha256."""

CONTEXT, LONG, KEPT, ASKED = 16384, 10_000, 14, 20
OWN = [
    *("--enable-scale-out", "--middleware", "tessy_hf.vllm_middleware.Deltas", "--max-model-len", str(CONTEXT)),
    *("--hf-overrides", json.dumps({"max_position_embeddings": CONTEXT})),
]


def server_seconds(process):
    """Return the processor time of a server's processes so far."""
    first = psutil.Process(process.pid)
    return sum(sum(each.cpu_times()[:2]) for each in (first, *first.children(recursive=True)))


def engine(url):
    """Return the engine of a server."""
    made = ServerEngine("student", base_url=url, tokenizer=str(demo.STUDENT))
    made.protocols = ("deltas",)
    return made


def short_rows(url, arguments):
    """Write rows by TESSY; return how many tokens were kept."""
    speakers = {
        "teacher": Speaker(engine(url), str(demo.BOUNDARY_TEACHER)),
        "student": Speaker(engine(url), str(demo.BOUNDARY_STUDENT)),
    }
    given = {"id_column": "id", "temperature": 0, "journal": None, "rows_in_flight": arguments.rows}
    prompts = demo.prompts(arguments.rows, seed=77)
    with TessyTransform(**speakers, max_thinking_tokens=160, max_answer_tokens=32, **given) as made:
        rows = prompts.map(made, batched=True, load_from_cache_file=False, keep_in_memory=True)
    return sum(row["teacher_tokens"] + row["student_tokens"] for row in rows)


def long_rows(url, arguments):
    """Let long rows grow; return how many tokens were kept."""
    live, draw = engine(url), Random(0)
    rows = [array("i", draw.choices(range(300), k=LONG)) for _ in range(arguments.long_rows)]

    async def write(number, ids):
        for _ in range(arguments.steps):
            asked = Request(f"long {number}", number, "thinking", ids, ASKED, 0.0, 1.0, 0, frozenset())
            ids.extend((await live.complete(asked)).token_ids[:KEPT])

    async def all_rows():
        await live.start()
        await asyncio.gather(*(write(number, ids) for number, ids in enumerate(rows)))
        await live.close()

    asyncio.run(all_rows())
    return KEPT * arguments.steps * arguments.long_rows


WORK = {"short": short_rows, "long": long_rows}


def compare(options, arguments):
    """Return the ratios of an option's server to the default one by kind of work: of processor time and of time."""
    described = [vllm_serve(*OWN, *more) for more in ([], options)]
    found = {(work, of): [] for work in WORK for of in ("cpu", "wall")}
    with tempfile.TemporaryDirectory() as logs, processes(*described, logs=Path(logs), health="/health") as running:
        for repeat in range(arguments.repeats + 1):  # the first warms up
            for work, do in WORK.items():
                figures = []
                for url, process in running if repeat % 2 else running[::-1]:
                    begin, cpu = time.perf_counter(), server_seconds(process)
                    kept = do(url, arguments)
                    figures.append(((server_seconds(process) - cpu) / kept, (time.perf_counter() - begin) / kept))
                default, other = figures if repeat % 2 else figures[::-1]
                if repeat:
                    found[work, "cpu"].append(other[0] / default[0])
                    found[work, "wall"].append(other[1] / default[1])
    return found


def main():
    """Print the ratios as JSON, one line for each option."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--options", nargs="+", choices=OPTIONS, default=list(OPTIONS))
    parser.add_argument("--rows", type=int, default=60)
    parser.add_argument("--long-rows", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20, help="requests of each long row")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    disable_progress_bars()
    for name in arguments.options:
        line = {"option": name}
        try:
            for (work, of), ratios in compare(OPTIONS[name], arguments).items():
                line[f"{work}_{of}"] = [round(value, 2) for value in (statistics.median(ratios), *sorted(ratios))]
        except AssertionError as error:  # the server did not start
            line["refused"] = str(error)[-300:]
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
