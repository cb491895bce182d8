"""How close TESSY comes to the raw engines: both in one process, in turns, on the miniature models.

For each engine mode: the **bound** is plain generation, by the same engines, of just the tokens that the teacher and
the student contributed, with the same rows in flight (one request per row and author, no boundaries, no hand-over),
in the order of the prompts, and once more with the longest prompts first, as TESSY begins them; **tessy** is `ds.map`;
**lockstep** is the released protocol (`lockstep.py`) on vLLM servers. Everything is greedy in float32, so the rows of
all modes must be the same, which is asserted.

    make bench
    make bench ARGS="--json --modes vllm-chunks --repeats 5"
    make bench ARGS="--modes vllm-chunks --compile"
"""

import argparse
import asyncio
import contextlib
import gc
import json
import logging
import os
import signal
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
from datasets import disable_progress_bars
from lockstep import LockStep
from transformers.utils.logging import disable_progress_bar

sys.path.insert(0, str(Path(__file__).parent.parent))  # for `tests`, which start the servers here as well

from tessy_hf import BoundaryPredictor, ServerEngine, Speaker, TessyTransform, TransformersEngine, VLLMEngine, demo
from tessy_hf.engines.base import Request

MODES = {
    "transformers-chunks": ("transformers", "transformers", False),
    "transformers-stream": ("transformers", "transformers", True),
    "vllm-chunks": ("vllm", "transformers", False),
    "vllm-stream": ("vllm", "transformers", True),
    "vllm-chunks-vllm-predictor": ("vllm", "vllm", False),
    "vllm-stream-vllm-predictor": ("vllm", "vllm", True),
    "server-chunks": ("server", "transformers", False),
    "server-stream": ("server", "transformers", True),
    "deltas-chunks": ("deltas", "transformers", False),
    "deltas-stream": ("deltas", "transformers", True),
}
"""By name: the engine, what runs the predictors, whether turns are streams."""

BUDGET = {"max_thinking_tokens": 160, "max_answer_tokens": 32}


def processor_seconds():
    """Return the processor time of this process and all its children so far."""
    this = psutil.Process()
    times = [each.cpu_times() for each in (this, *this.children(recursive=True))]
    return sum(each.user + each.system for each in times)


def predictor_seconds():
    """Return the processor time of the threads in which predictors read."""
    threads = (thread for thread in threading.enumerate() if thread.name.startswith("tessy-boundary"))
    return sum(time.clock_gettime(time.pthread_getcpuclockid(thread.ident)) for thread in threads)


class Busy:
    """How long at least one call was under way."""

    def __init__(self):
        self.seconds, self._inside, self._since = 0.0, 0, 0.0

    def __enter__(self):
        if not self._inside:
            self._since = time.perf_counter()
        self._inside += 1

    def __exit__(self, *_):
        self._inside -= 1
        if not self._inside:
            self.seconds += time.perf_counter() - self._since


class Meter:
    """An engine that counts what is asked of it."""

    def __init__(self, engine):
        self.engine = engine
        self.reset()

    def reset(self):
        self.requests = self.generated = 0
        self.read = None  # until the engine tells, which not all servers do
        self.busy, self.begun = Busy(), {}

    def __getattr__(self, name):
        return getattr(self.engine, name)

    def _count(self, completion):
        self.generated += len(completion.token_ids)
        if completion.uncached_prompt_tokens is not None:
            self.read = (self.read or 0) + completion.uncached_prompt_tokens
        return completion

    def _note(self, request):
        self.requests += 1
        self.begun.setdefault(request.row, time.perf_counter())

    async def complete(self, request):
        self._note(request)
        with self.busy:
            return self._count(await self.engine.complete(request))

    async def stream(self, request):
        self._note(request)
        async with contextlib.aclosing(self.engine.stream(request)) as pieces:
            while True:
                with self.busy:
                    piece = await anext(pieces, None)
                if piece is None:
                    return
                yield self._count(piece)


class MeteredPredictor(BoundaryPredictor):
    """A predictor that counts its time; with ``free`` it answers from memory what it was asked before."""

    def __init__(self, *given, **options):
        super().__init__(*given, **options)
        self.busy, self.free, self._known = Busy(), False, {}

    async def labels(self, window, since):
        key = (tuple(window), since)
        if self.free and key in self._known:
            return self._known[key]
        with self.busy:
            found = self._known[key] = await super().labels(window, since)
        return found


def engines(kind, urls, compiled=False):
    """Return teacher and student."""
    if kind == "transformers":
        return [TransformersEngine(model, max_batch=128) for model in (demo.TEACHER, demo.STUDENT)]
    if kind == "vllm":
        given = {"dtype": "float32", "max_model_len": 1024, "enforce_eager": not compiled}
        return [VLLMEngine(model, **given) for model in (demo.TEACHER, demo.STUDENT)]
    models = {"teacher": demo.TEACHER, "student": demo.STUDENT}
    found = [ServerEngine(name, base_url=urls[name], tokenizer=str(model)) for name, model in models.items()]
    for engine in found:
        engine.protocols = ("deltas",) if kind == "deltas" else ("generate",)
    return found


def make(mode, urls, arguments):
    """Return the transform of a mode. Journals are measured by `journal.py`."""
    kind, reader, stream = MODES[mode]
    given = {"gpu_memory_utilization": 0.1} if reader == "vllm" else {}
    teacher, student = map(Meter, engines(kind, urls, arguments.compile))
    return TessyTransform(
        teacher=Speaker(teacher, MeteredPredictor(str(demo.BOUNDARY_TEACHER), engine=reader, **given)),
        student=Speaker(student, MeteredPredictor(str(demo.BOUNDARY_STUDENT), engine=reader, **given)),
        id_column="id",
        temperature=0,
        stream=stream,
        chunk_tokens=arguments.chunk_tokens,
        rows_in_flight=arguments.in_flight,
        journal=None,
        **BUDGET,
    )


def tessy(transform, prompts, free=False):
    """Map the transform over the prompts. Returns its rows and figures."""
    speakers = {"teacher": transform.teacher, "student": transform.student}
    for speaker in speakers.values():
        speaker.engine.reset()
        speaker.boundary.busy, speaker.boundary.free = Busy(), free
    thread = transform.run()._thread
    clock = time.pthread_getcpuclockid(thread.ident)
    begin, cpu, all_cpu = time.perf_counter(), time.clock_gettime(clock), processor_seconds()
    reading = predictor_seconds()
    done = prompts.map(transform, batched=True, load_from_cache_file=False, keep_in_memory=True)
    wall, cpu = time.perf_counter() - begin, time.clock_gettime(clock) - cpu
    all_cpu, reading = processor_seconds() - all_cpu, predictor_seconds() - reading
    for speaker in speakers.values():
        speaker.boundary.free = False  # whoever asks next is to have it read
    rows = list(done)  # for the comparison with other modes' rows
    meters = [speaker.engine for speaker in speakers.values()]
    accepted = sum(row["teacher_tokens"] + row["student_tokens"] for row in rows)
    last = max(meters[1].begun.values())
    told = all(meter.read is not None for meter in meters)
    read = {"prompt_tokens_read_per_accepted": sum(meter.read for meter in meters) / accepted} if told else {}
    return rows, {
        "cpu_us_per_accepted": 1e6 * all_cpu / accepted,
        "accepted_tokens_per_second": accepted / wall,
        "generated_per_accepted": sum(meter.generated for meter in meters) / accepted,
        "requests_per_1000_accepted": 1000 * sum(meter.requests for meter in meters) / accepted,
        **read,
        "predictor_share": max(speaker.boundary.busy.seconds for speaker in speakers.values()) / wall,
        "host_cpu_us_per_accepted": 1e6 * cpu / accepted,
        "predictor_cpu_us_per_accepted": 1e6 * reading / accepted,
        "teacher_idle_share": 1 - meters[0].busy.seconds / wall,
        "student_idle_share": 1 - meters[1].busy.seconds / wall,
        "tail_share": (begin + wall - last) / wall,
    }


def longest_first(prompts):
    """Return the numbers of the prompts, the longest first, as TESSY begins them."""
    return sorted(range(len(prompts)), key=lambda row: len(prompts[row]["prompt"]), reverse=True)


def bound(transform, prompts, order, rows, in_flight):
    """Generate the same tokens plainly, with the same engines and rows in flight. Returns tokens per second."""
    window = asyncio.Semaphore(in_flight)
    speakers = (transform.student, transform.teacher)

    async def one(number, messages, wanted):
        async with window:
            turns = list(zip(speakers, wanted, strict=True))
            for speaker, tokens in turns if number % 2 else turns[::-1]:  # so that both engines are busy
                ids = list(speaker.open_turn(messages)[0])
                key = f"bound {number}"
                while tokens > 0:
                    asked = Request(key, number, "thinking", ids, tokens, 0.0, 1.0, 0, frozenset())
                    completion = await speaker.engine.complete(asked)
                    tokens -= max(1, len(completion.token_ids) + (completion.stop_id is not None))
                    ids.extend(completion.token_ids)
                speaker.engine.release(key)

    async def all_rows():
        await asyncio.gather(
            *(
                one(
                    number,
                    [{"role": "user", "content": prompts[row]["prompt"]}],
                    (rows[row]["student_tokens"], rows[row]["teacher_tokens"]),
                )
                for number, row in enumerate(order)
            )
        )

    begin, cpu = time.perf_counter(), processor_seconds()
    asyncio.run_coroutine_threadsafe(all_rows(), transform.run()._loop).result()
    tokens = sum(row["teacher_tokens"] + row["student_tokens"] for row in rows)
    return tokens / (time.perf_counter() - begin), 1e6 * (processor_seconds() - cpu) / tokens


def lockstep(prompts, urls, in_flight):
    """Write the rows by the released protocol. Returns tokens per second."""
    from transformers import AutoModelForTokenClassification

    folders = {"teacher": (demo.TEACHER, demo.BOUNDARY_TEACHER), "student": (demo.STUDENT, demo.BOUNDARY_STUDENT)}
    speakers = {name: Speaker(TransformersEngine(model)) for name, (model, _) in folders.items()}
    classifiers = {
        name: (
            AutoModelForTokenClassification.from_pretrained(str(folder)).eval(),
            BoundaryPredictor(str(folder)).vocabulary,
        )
        for name, (_, folder) in folders.items()
    }
    writer = LockStep(speakers, urls, classifiers, BUDGET["max_thinking_tokens"])
    given = [(number, [{"role": "user", "content": prompt["prompt"]}]) for number, prompt in enumerate(prompts)]
    begin = time.perf_counter()
    rows = asyncio.run(writer.write(given, in_flight))
    wall = time.perf_counter() - begin
    right = sum(demo.verify({**prompt, **row}) for prompt, row in zip(prompts, rows, strict=True))
    return sum(row["teacher_tokens"] + row["student_tokens"] for row in rows) / wall, right / len(rows)


def texts(rows):
    """Return what must be equal in all modes."""
    return [(row["thinking"], row["answer"]) for row in rows]


@contextlib.contextmanager
def paused(groups):
    """Stop groups of processes for a while: two servers that only wait take 4 % of a core from those who work."""
    for group in groups:
        os.killpg(group, signal.SIGSTOP)
    try:
        yield
    finally:
        for group in groups:
            os.killpg(group, signal.SIGCONT)


def measure(mode, prompts, reference, urls, groups, arguments):
    """Measure one mode: bound, TESSY, TESSY with a predictor that costs nothing, in turns."""
    figures, idle = [], [] if MODES[mode][0] in ("server", "deltas") else groups
    with make(mode, urls, arguments) as transform:
        rows, _ = tessy(transform, prompts)  # warms up
        wrong = sum(a != b for a, b in zip(texts(rows), reference or texts(rows), strict=True))
        assert not wrong, f"{mode}: {wrong} rows differ from those of the first mode"
        for _ in range(arguments.repeats):
            with paused(idle):
                limit, cpu = bound(transform, prompts, range(len(rows)), rows, arguments.in_flight)
                ordered, ordered_cpu = bound(transform, prompts, longest_first(prompts), rows, arguments.in_flight)
                again, figure = tessy(transform, prompts)
                free, without = tessy(transform, prompts, free=True)
            assert texts(again) == texts(free) == texts(rows), f"{mode}: rows differ between two runs"
            figure["bound_tokens_per_second"] = limit
            figure["bound_cpu_us_per_token"] = cpu
            figure["of_bound_by_cpu"] = cpu / figure["cpu_us_per_accepted"]
            figure["of_bound_by_cpu_without_predictor"] = cpu / without["cpu_us_per_accepted"]
            figure["of_bound"] = figure["accepted_tokens_per_second"] / limit
            figure["of_bound_without_predictor"] = without["accepted_tokens_per_second"] / limit
            figure["of_bound_longest_first"] = figure["accepted_tokens_per_second"] / ordered
            figure["of_bound_longest_first_without_predictor"] = without["accepted_tokens_per_second"] / ordered
            figure["of_bound_longest_first_by_cpu"] = ordered_cpu / figure["cpu_us_per_accepted"]
            if urls and arguments.lockstep:
                figure["lockstep_tokens_per_second"], _ = lockstep(prompts, urls, arguments.in_flight)
                figure["times_lockstep"] = figure["accepted_tokens_per_second"] / figure["lockstep_tokens_per_second"]
            figures.append(figure)
            print(mode, {name: round(value, 3) for name, value in figure.items()}, file=sys.stderr, flush=True)
    gc.collect()
    return texts(rows), {name: round(statistics.median(figure[name] for figure in figures), 4) for name in figures[0]}


@contextlib.contextmanager
def servers(wanted, compiled):
    """Start a vLLM server for each author, where they are wanted. Yields their addresses and process groups."""
    if not wanted:
        yield {}, []
        return
    from tests.engines.servers import processes, vllm

    options = (
        "--enable-scale-out",
        "--enable-prompt-tokens-details",
        "--scheduling-policy",
        "priority",
        "--max-model-len",
        "1024",
        "--middleware",
        "tessy_hf.vllm_middleware.Deltas",
    )
    options += ("--no-enforce-eager",) if compiled else ()
    with tempfile.TemporaryDirectory() as logs:
        described = [vllm(*options, author=author) for author in ("teacher", "student")]
        with processes(*described, logs=Path(logs), health="/health") as running:
            urls = dict(zip(("teacher", "student"), (url for url, _ in running), strict=True))
            yield urls, [process.pid for _, process in running]


def main():
    """Measure the modes asked for and print a table, or JSON on the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--in-flight", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--chunk-tokens", default="auto", type=lambda k: k if k == "auto" else int(k))
    parser.add_argument("--compile", action="store_true", help="let all vLLMs compile their models")
    parser.add_argument("--no-lockstep", dest="lockstep", action="store_false")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    disable_progress_bars()
    disable_progress_bar()  # of weights
    prompts = demo.prompts(arguments.rows, seed=77)
    results, reference = {}, None
    with servers(
        arguments.lockstep or any(MODES[mode][0] in ("server", "deltas") for mode in arguments.modes),
        arguments.compile,
    ) as (urls, groups):
        for mode in arguments.modes:
            reference, results[mode] = measure(mode, prompts, reference, urls, groups, arguments)
            print(f"\n{mode}")
            for name, value in results[mode].items():
                print(f"  {name:34} {value:.4g}", flush=True)
    if arguments.json:
        print(json.dumps({"cores": len(os.sched_getaffinity(0)), **vars(arguments), "results": results}))


if __name__ == "__main__":
    main()
