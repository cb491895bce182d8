"""Real small models on a CPU: TESSY against its bound and the released protocol, by each engine.

SmolLM2-135M is teacher and student, on word problems, in one run (`speed.py` does so with miniature models, and says
what bound and protocol are). `make test-real` fetches the model::

    python benchmarks/real.py --modes transformers vllm server deltas --rows 24

`vllm`, `server` and `deltas` need vLLM; `deltas` are servers with the middleware of :mod:`tessy_hf.vllm_middleware`.
"""

import argparse
import asyncio
import contextlib
import json
import logging
import sys
import tempfile
import time
from pathlib import Path

from datasets import Dataset, disable_progress_bars
from lockstep import LockStep
from speed import Meter, MeteredPredictor, bound, tessy, texts
from transformers import AutoModelForTokenClassification
from transformers.utils.logging import disable_progress_bar

sys.path.insert(0, str(Path(__file__).parent.parent))

import tessy_hf
from tessy_hf import BoundaryPredictor, ServerEngine, Speaker, TessyTransform, TransformersEngine, VLLMEngine
from tessy_hf.boundary.predictor import SHIPPED
from tests import real_models, real_pair

MODES = ("transformers", "vllm", "server", "deltas")
AUTHORS = ("teacher", "student")


def prompts(count):
    """Return word problems, repeated with other numbers."""
    given = real_pair.prompts()["prompt"]
    numbered = (f"{given[i % len(given)]} Then double it {i // len(given) + 2} times." for i in range(count))
    return Dataset.from_list([{"id": str(i), "prompt": text} for i, text in enumerate(numbered)])


# --- real models


@contextlib.contextmanager
def engines(mode, model):
    """Yield teacher and student, and the addresses of servers by author."""
    if mode == "transformers":
        yield [TransformersEngine(model, dtype="bfloat16", context_length=1024) for _ in range(2)], {}
    elif mode == "vllm":
        yield [VLLMEngine(model, dtype="bfloat16", max_model_len=1024, enforce_eager=True) for _ in range(2)], {}
    else:
        from tests.engines.servers import processes, vllm

        options = ["--enable-scale-out", "--max-model-len", "1024", "--dtype", "bfloat16"]
        options += ["--middleware", "tessy_hf.vllm_middleware.Deltas"] if mode == "deltas" else []
        described = [vllm(*options, "--served-model-name", author, model=model) for author in AUTHORS]
        with (
            tempfile.TemporaryDirectory() as logs,
            processes(*described, logs=Path(logs), health="/health") as running,
        ):
            urls = dict(zip(AUTHORS, (url for url, _ in running), strict=True))
            yield [ServerEngine(author, base_url=url, tokenizer=model) for author, url in urls.items()], urls


def lockstep(data, urls, model, template, arguments):
    """Return tokens per second of the released protocol."""
    speakers = {name: Speaker(TransformersEngine(model), chat_template=template) for name in AUTHORS}
    network = AutoModelForTokenClassification.from_pretrained(Path(tessy_hf.__file__).parent / "boundary" / "small")
    classifier = network.eval(), BoundaryPredictor(SHIPPED).vocabulary
    writer = LockStep(speakers, urls, dict.fromkeys(AUTHORS, classifier), arguments.tokens)
    given = [(i, [{"role": "user", "content": prompt}]) for i, prompt in enumerate(data["prompt"])]
    begin = time.perf_counter()
    rows = asyncio.run(writer.write(given, arguments.in_flight))
    return sum(row["teacher_tokens"] + row["student_tokens"] for row in rows) / (time.perf_counter() - begin)


def measure(mode, data, arguments, reference):
    """Return rows and figures of a mode: the bound before and after TESSY, since machines are shared."""
    model, template = str(real_models.model("smollm2")), real_pair.transform().student.chat_template
    settings = {"max_thinking_tokens": arguments.tokens, "max_answer_tokens": arguments.tokens // 4}
    with engines(mode, model) as (pair, urls):
        teacher, student = (
            Speaker(Meter(engine), MeteredPredictor(SHIPPED), chat_template=template) for engine in pair
        )
        made = TessyTransform(
            teacher=teacher, student=student, id_column="id", temperature=0, stream=arguments.stream, journal=None,
            rows_in_flight=arguments.in_flight, **settings,
        )  # fmt: skip
        with made:
            tessy(made, data.select(range(2)))  # warms up
            rows, figures = tessy(made, data)
            limits = [bound(made, data, range(len(rows)), rows, arguments.in_flight) for _ in range(2)]
        if urls and arguments.lockstep:
            released = lockstep(data, urls, model, template, arguments)
            figures["times_released_protocol"] = figures["accepted_tokens_per_second"] / released
    figures["bound_tokens_per_second"] = sum(limit for limit, _ in limits) / 2
    figures["of_bound"] = figures["accepted_tokens_per_second"] / figures["bound_tokens_per_second"]
    figures["of_bound_by_cpu"] = sum(cpu for _, cpu in limits) / 2 / figures["cpu_us_per_accepted"]
    written = texts(rows)
    figures["rows_as_the_first_mode"] = sum(a == b for a, b in zip(written, reference or written, strict=True))
    return written, figures


def main():
    """Print the figures as JSON, one line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modes", nargs="*", choices=MODES, default=list(MODES[:-1]))
    parser.add_argument("--rows", type=int, default=24)
    parser.add_argument("--in-flight", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=128, help="of thinking; a quarter of it for the answer")
    parser.add_argument("--no-lockstep", dest="lockstep", action="store_false")
    parser.add_argument("--stream", action="store_true")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    disable_progress_bars()
    disable_progress_bar()
    data, reference = prompts(arguments.rows), None
    for mode in arguments.modes:
        written, figures = measure(mode, data, arguments, reference)
        reference = reference or written
        print(json.dumps({"mode": mode, **{name: round(value, 3) for name, value in figures.items()}}), flush=True)


if __name__ == "__main__":
    main()
