"""How close any driver that asks for chunks could come to the raw engines: one that knows where each span ends.

It asks once for each span of a finished row, and has no text to handle, no rollback and no provenance; what it still
pays is that alternation is short requests, and that each author reads what the other wrote. It begins rows as TESSY
does, the longest prompts first and an empty window by halves. Three of them, taken in turns with the bound and with
TESSY of `speed.py`:

- **knows** asks for just a span's tokens;
- **sees** for one more, the one at which a predictor can see that the span is over;
- **reads** as well has the author's predictor read the text once for each span.

    python benchmarks/oracle.py --repeats 5 --json
"""

import argparse
import asyncio
import json
import logging
import os
import statistics
import sys
import time
from typing import NamedTuple

from datasets import disable_progress_bars
from speed import bound, longest_first, make, processor_seconds, tessy

from tessy_hf import Speaker, demo
from tessy_hf.boundary.predictor import window_start
from tessy_hf.engines.base import Request
from tessy_hf.run.window import Window


class Span(NamedTuple):
    """A span of a finished row: what its author reads and writes, and what its predictor reads."""

    speaker: Speaker
    ids: list[int]
    tokens: int
    window: list[int] | None


def spans(transform, prompts, rows):
    """Return the spans of each row, in their order, for the rows with the longest prompts first."""
    speakers = {"teacher": transform.teacher, "student": transform.student}
    return [list(row_spans(speakers, prompts[row]["prompt"], rows[row])) for row in longest_first(prompts)]


def row_spans(speakers, prompt, row):
    """Iterate over one row's spans; the last is the answer, after the end of thinking."""
    opened = {
        author: speaker.open_turn([{"role": "user", "content": prompt}])[0] for author, speaker in speakers.items()
    }
    content, text = row["messages"][-1]["content"], ""
    first = content.index(row["thinking"])  # spans hold the marks around the thinking, too
    for span in row["spans"]:
        speaker = speakers[span["author"]]
        own = content[max(first, span["start"]) : min(first + len(row["thinking"]), span["end"])]
        ids = [*opened[span["author"]], *speaker.vocabulary.encode(text).ids]
        if span["part"] == "answer":
            ids += speaker.vocabulary.encode_template(speaker.dialect.close)
            yield Span(speaker, ids, len(speaker.vocabulary.encode(row["answer"]).ids), None)
            return
        text += own
        read = speaker.boundary.vocabulary.encode(text).ids
        window = list(read[window_start(len(read) - 1, speaker.boundary.window) :])
        yield Span(speaker, ids, len(speaker.vocabulary.encode(own).ids), window)


async def write(planned, in_flight, extra, reads):
    """Ask for all spans, those of the thinking with `extra` tokens more, and read each where that is wanted."""
    window = Window(in_flight, guess=0)

    async def one(number, row):
        for speaker, ids, tokens, read in row:
            wanted = tokens + extra * (read is not None)
            await speaker.engine.complete(
                Request(str(number), number, "thinking", ids, wanted, 0.0, 1.0, 0, frozenset())
            )
            if reads and read is not None:
                await speaker.boundary.labels(read, max(0, len(read) - tokens))
            window.part()
        for engine in {span.speaker.engine for span in row}:
            engine.release(str(number))
        window.leave()

    async with asyncio.TaskGroup() as rows:
        for number, row in enumerate(planned):
            await window.enter()
            rows.create_task(one(number, row))


ORACLES = {"knows": (0, False), "sees": (1, False), "reads": (1, True)}


def main():
    """Print the shares of the bound that the oracles and TESSY reach."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", default="vllm-chunks")
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--in-flight", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="let vLLM compile the models")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    disable_progress_bars()
    prompts = demo.prompts(arguments.rows, seed=77)
    with make(arguments.mode, {}, argparse.Namespace(**vars(arguments), chunk_tokens="auto")) as transform:
        rows, _ = tessy(transform, prompts)  # warms up
        accepted = sum(row["teacher_tokens"] + row["student_tokens"] for row in rows)
        planned = spans(transform, prompts, rows)
        asked = sum(span.tokens for row in planned for span in row)
        assert abs(asked / accepted - 1) < 0.01, f"the spans have {asked} tokens, the rows {accepted}"

        def once():
            limit, cpu = bound(transform, prompts, range(len(rows)), rows, arguments.in_flight)
            figure = {"bound_tokens_per_second": limit, "bound_cpu_us_per_token": cpu}
            for name, (extra, reads) in ORACLES.items():
                begin, before = time.perf_counter(), processor_seconds()
                transform._run()._run(write(planned, arguments.in_flight, extra, reads)).result()
                figure[f"{name}_of_bound"] = accepted / (time.perf_counter() - begin) / limit
                figure[f"{name}_of_bound_by_cpu"] = cpu * accepted / (1e6 * (processor_seconds() - before))
            for name, free in (("tessy", False), ("tessy_predictor_free", True)):
                seen = tessy(transform, prompts, free=free)[1]
                figure[f"{name}_of_bound"] = seen["accepted_tokens_per_second"] / limit
                figure[f"{name}_of_bound_by_cpu"] = cpu / seen["cpu_us_per_accepted"]
            print({name: round(value, 3) for name, value in figure.items()}, file=sys.stderr, flush=True)
            return figure

        figures = [once() for _ in range(arguments.repeats)]
    medians = {name: round(statistics.median(figure[name] for figure in figures), 4) for name in figures[0]}
    for name, value in medians.items():
        print(f"  {name:34} {value:.4g}", flush=True)
    if arguments.json:
        requests = round(1000 * sum(map(len, planned)) / accepted)
        print(json.dumps({**vars(arguments), "oracle_requests_per_1000_accepted": requests, **medians}))


if __name__ == "__main__":
    main()
