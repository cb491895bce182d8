"""What the method itself costs as rows grow: scripted engines without latency, and a predictor that is a table.

Prints, for rows of 1k, 10k and 40k tokens, the processor time per accepted token of all but engines and predictors,
and the memory that a further row under way takes per token. Neither is to depend on how long the row is. What a run
takes besides its rows, once, is told apart::

    python benchmarks/host.py [--tokens 1000 10000 40000]
"""

import argparse
import asyncio
import gc
import json
import time
import tracemalloc
from functools import cached_property, partial
from random import Random

import numpy as np
from datasets import Dataset, disable_progress_bars

from tessy_hf import Script, ScriptedEngine, Speaker, TessyTransform, demo
from tessy_hf.boundary.predictor import BoundaryPredictor

STYLE = "okay so good and then wait is that right yes all".split()
CAPABILITY = [str(n) for n in range(10)] + list("+-*=")
SPAN = {"student": (2, 8), "teacher": (5, 40)}
BEYOND = 12  # words that an author goes on with behind its own


class Timed:
    """Processor time spent inside, on one thread."""

    def __init__(self):
        self.seconds = 0.0

    def __enter__(self):
        self._since = time.thread_time()

    def __exit__(self, *_):
        self.seconds += time.thread_time() - self._since


class TimedEngine(ScriptedEngine):
    """A scripted engine whose time is told apart."""

    def __init__(self, script, clock, seen, **options):
        super().__init__(script, **options)
        self.clock, self.seen = clock, seen

    async def complete(self, request):
        if self.seen is not None:
            self.seen(request)
        await asyncio.sleep(0)  # as engines do
        with self.clock:
            return await super().complete(request)


class Table(BoundaryPredictor):
    """Knows style by the word."""

    def __init__(self, clock):
        super().__init__(str(demo.BOUNDARY_STUDENT))
        self.clock = clock

    @cached_property
    def is_style(self):
        """By id."""
        words = [self.vocabulary.decode([i]).strip() for i in range(len(self.vocabulary.tokenizer))]
        return np.array([any(word and style.startswith(word) for style in STYLE) for word in words])

    async def labels(self, window, since=0):
        with self.clock:
            return self.is_style[window[since:]].tolist()


def script(author, tokens, seed):
    """Return what an author writes of a row: its own kind of words, and on into the other's."""
    draw, texts, words = Random(f"{author}-{seed}"), [], 0
    own, other = (STYLE, CAPABILITY) if author == "student" else (CAPABILITY, STYLE)
    while words < tokens:
        length = draw.randint(*SPAN[author])
        texts.append(" " + " ".join([*draw.choices(own, k=length), *draw.choices(other, k=BEYOND)]))
        words += length
    return Script(texts, "done")


def run(tokens, rows, seen=None):
    """Write rows of a length; ``seen`` is called at each request for text. Returns them and the seconds they took."""
    clock = Timed()
    speakers = {
        author: Speaker(TimedEngine(partial(script, author, tokens), clock, seen, name=author), Table(clock))
        for author in ("teacher", "student")
    }
    prompts = Dataset.from_dict({"id": [str(i) for i in range(rows)], "prompt": ["go on"] * rows})
    settings = {"id_column": "id", "max_thinking_tokens": tokens, "journal": None, "temperature": 0}
    with TessyTransform(**speakers, **settings) as transform:
        list(prompts.select([0]).map(transform, batched=True))  # loads what is loaded once
        clock.seconds = 0.0
        thread = time.pthread_getcpuclockid(transform.run()._thread.ident)
        begin = time.clock_gettime(thread)
        finished = list(prompts.map(transform, batched=True, load_from_cache_file=False))
        seconds = time.clock_gettime(thread) - begin - clock.seconds
    assert all(row["finish_reason"] == "length" for row in finished), "a row ended early"
    return finished, seconds


def memory(tokens, rows):
    """Return the bytes that a run takes when its rows are near their end, scripts left out, and the rows' tokens."""
    lengths, requests, found = {}, 0, (0, 0)

    def count(request):
        nonlocal requests
        requests += 1

    def seen(request):
        nonlocal requests, found
        lengths[request.order] = len(request.prompt_ids)
        requests -= 1
        if requests == last:
            own = tracemalloc.take_snapshot().filter_traces(
                [tracemalloc.Filter(False, f"*{name}", all_frames=True) for name in ("scripted.py", "tracemalloc.py")]
            )
            under_way = sorted(lengths)[-rows:]  # not the row that loads what is loaded once
            found = sum(trace.size for trace in own.traces), sum(lengths[order] for order in under_way)

    run(tokens, rows, count)
    last = requests // 20
    gc.collect()
    tracemalloc.start(6)
    run(tokens, rows, seen)
    tracemalloc.stop()
    return found


def measure(tokens, rows):
    """Return the figures of rows of a length."""
    finished, seconds = run(tokens, rows)
    accepted = sum(row["teacher_tokens"] + row["student_tokens"] for row in finished)
    (few, few_tokens), (many, many_tokens) = memory(tokens, 1), memory(tokens, 3)
    each = (many - few) / (many_tokens - few_tokens)
    return {
        "tokens_per_row": accepted // rows,
        "spans_per_row": len(finished[0]["spans"]),
        "host_cpu_us_per_accepted": 1e6 * seconds / accepted,
        "bytes_per_token_in_flight": each,
        "kib_of_the_run": (few - each * few_tokens) / 1024,
    }


def main():
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1_000, 10_000, 40_000])
    arguments = parser.parse_args()
    disable_progress_bars()
    for tokens in arguments.tokens:
        print(json.dumps(measure(tokens, max(2, 80_000 // tokens))), flush=True)


if __name__ == "__main__":
    main()
