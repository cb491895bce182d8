"""Real small models on a CPU: TESSY against its bound and the released protocol, by each engine, as one table.

SmolLM2-135M is teacher and student, on word problems (`speed.py` does so with miniature models, and says what bound
and protocol are). In each repeat, each mode's bound and TESSY are measured one after the other, and the released
protocol on the same servers. `make test-real` fetches the model::

    python benchmarks/real.py                                            # all, some 40 minutes on two idle cores
    python benchmarks/real.py --modes server deltas --tokens 64 --repeats 3

    python benchmarks/real.py --random-weights Qwen3-8B --rows 64 --in-flight 64 --repeats 2     # on a GPU of 80 GB

`--random-weights` makes a model of a real shape, which needs no download; its authors take turns after ten words each,
since what it writes has no boundaries. Only `transformers` runs it.
`vllm` and servers need vLLM; `deltas` are servers with the middleware of :mod:`tessy_hf.vllm_middleware`.
"""

import argparse
import asyncio
import contextlib
import logging
import os
import shutil
import statistics
import sys
import tempfile
import time
from operator import eq
from pathlib import Path

import torch
from datasets import Dataset, disable_progress_bars
from lockstep import LockStep
from speed import Meter, MeteredPredictor, bound, tessy, texts
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, Qwen3Config, Qwen3MoeConfig
from transformers.utils.logging import disable_progress_bar

sys.path.insert(0, str(Path(__file__).parent.parent))

import tessy_hf
from tessy_hf import BoundaryPredictor, ServerEngine, Speaker, TessyTransform, TransformersEngine, VLLMEngine, demo
from tessy_hf.boundary.predictor import SHIPPED
from tests import real_models, real_pair

MODES = {
    "transformers": ("transformers", False),
    "vllm": ("vllm", False),
    "vllm-stream": ("vllm", True),
    "server": ("servers", False),
    "server-stream": ("servers", True),
    "deltas": ("servers", False),
    "deltas-stream": ("servers", True),
}
"""By name: what runs the models, and whether turns are streams."""

SHOWN = {
    "accepted_tokens_per_second": "kept tokens a second",
    "bound_tokens_per_second": "bound: tokens a second",
    "of_bound": "of the bound, by the clock",
    "of_bound_by_cpu": "of the bound, by CPU time of all processes",
    "times_released": "times the released protocol",
    "generated_per_accepted": "generated per kept token",
    "host_cpu_us_per_accepted": "client: CPU us per kept token",
    "predictor_cpu_us_per_accepted": "predictor: CPU us per kept token",
    "rows_as_the_first_mode": "rows equal to those of the first mode",
}
AUTHORS = ("teacher", "student")
SHAPES = {
    "miniature": Qwen3Config(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=16, vocab_size=2_000, tie_word_embeddings=False,
    ),
    "Qwen3-8B": Qwen3Config(
        hidden_size=4096, intermediate_size=12_288, num_hidden_layers=36, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, vocab_size=151_936, tie_word_embeddings=False,
    ),
    "Qwen3-30B-A3B": Qwen3MoeConfig(
        hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768, num_hidden_layers=48,
        num_attention_heads=32, num_key_value_heads=4, head_dim=128, num_experts=128, num_experts_per_tok=8,
        norm_topk_prob=True, vocab_size=151_936, tie_word_embeddings=False,
    ),
}  # fmt: skip
"""Shapes of models for random weights."""


def prompts(count):
    """Return word problems, repeated with other numbers."""
    given = real_pair.prompts()["prompt"]
    numbered = (f"{given[i % len(given)]} Then double it {i // len(given) + 2} times." for i in range(count))
    return Dataset.from_list([{"id": str(i), "prompt": text} for i, text in enumerate(numbered)])


def random_model(shape, folder):
    """Save a model of a shape that writes tokens of the miniature models' tokenizer; greedily, no others."""
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(SHAPES[shape], dtype=torch.bfloat16)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(demo.STUDENT / file, folder)
    known = len(TransformersEngine(str(demo.STUDENT)).tokenizer)
    with torch.no_grad():
        model.lm_head.weight[known:] = 0
    model.save_pretrained(folder)


@contextlib.contextmanager
def written(shape):
    """Yield the folder of a random model, on the disk or in memory, where there is more room."""
    places = filter(os.path.isdir, (tempfile.gettempdir(), "/dev/shm"))
    roomy = max(places, key=lambda place: shutil.disk_usage(place).free)
    with tempfile.TemporaryDirectory(dir=roomy) as folder:
        random_model(shape, folder)
        torch.cuda.empty_cache()  # of the model that was saved
        yield folder


@contextlib.contextmanager
def servers(wanted, model):
    """Start a vLLM server for each author, where they are wanted. Yields their addresses."""
    if not wanted:
        yield {}
        return
    from tests.engines.servers import processes, vllm

    options = [
        "--enable-scale-out",
        "--max-model-len",
        "1024",
        "--dtype",
        "bfloat16",
        "--scheduling-policy",
        "priority",
    ]
    options += ["--middleware", "tessy_hf.vllm_middleware.Deltas"]
    described = [vllm(*options, "--served-model-name", author, model=model) for author in AUTHORS]
    with tempfile.TemporaryDirectory() as logs, processes(*described, logs=Path(logs), health="/health") as running:
        yield dict(zip(AUTHORS, (url for url, _ in running), strict=True))


def engine(mode, author, model, urls):
    """Return an author's engine."""
    if MODES[mode][0] == "transformers":
        return TransformersEngine(model, dtype="bfloat16", context_length=1024)
    if MODES[mode][0] == "vllm":
        return VLLMEngine(model, dtype="bfloat16", max_model_len=1024, enforce_eager=True)
    made = ServerEngine(author, base_url=urls[author], tokenizer=model)
    made.protocols = ("deltas",) if mode.startswith("deltas") else ("generate",)
    return made


def transform(mode, model, template, urls, arguments):
    """Return a mode's transform."""
    speakers = {
        author: Speaker(Meter(engine(mode, author, model, urls)), MeteredPredictor(SHIPPED), chat_template=template)
        for author in AUTHORS
    }
    return TessyTransform(
        **speakers,
        id_column="id",
        temperature=0,
        stream=MODES[mode][1],
        journal=None,
        rows_in_flight=arguments.in_flight,
        max_thinking_tokens=arguments.tokens,
        max_answer_tokens=arguments.tokens // 4,
        **({"switch": {"every": 10}} if arguments.random_weights else {}),
    )


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


def once(made, data, arguments):
    """Return rows and figures of one pass: the bound, and TESSY."""
    rows, figures = tessy(made, data)
    limit, cpu = bound(made, data, range(len(rows)), rows, arguments.in_flight)
    figures["bound_tokens_per_second"] = limit
    figures["of_bound"] = figures["accepted_tokens_per_second"] / limit
    figures["of_bound_by_cpu"] = cpu / figures["cpu_us_per_accepted"]
    return texts(rows), figures


def measure(modes, data, urls, arguments, reference, model, template):
    """Return the figures of each pass by mode, all of them in turns, and the rows of the first mode."""
    found = {mode: [] for mode in modes}
    with contextlib.ExitStack() as stack:
        made = {mode: stack.enter_context(transform(mode, model, template, urls, arguments)) for mode in modes}
        for each in made.values():
            tessy(each, data.select(range(2)))  # warms up
        for repeat in range(arguments.repeats):
            passes = {}
            for mode, each in made.items():
                written, passes[mode] = once(each, data, arguments)
                reference = reference or written
                passes[mode]["rows_as_the_first_mode"] = sum(map(eq, written, reference))
            if urls and repeat < arguments.lockstep:
                released = lockstep(data, urls, model, template, arguments)
                for figures in passes.values():
                    figures["times_released"] = figures["accepted_tokens_per_second"] / released
            for mode, figures in passes.items():
                found[mode].append(figures)
                print(mode, {name: round(value, 3) for name, value in figures.items()}, file=sys.stderr, flush=True)
    return found, reference


def table(found):
    """Return the figures in Markdown: medians, with the lowest and highest where there are several."""
    lines = [["", *found], ["---"] * (len(found) + 1)]
    for name, words in SHOWN.items():
        line = [words]
        for passes in found.values():
            values = sorted(figures[name] for figures in passes if name in figures)
            spread = f" ({values[0]:.3g}-{values[-1]:.3g})" if len(values) > 1 else ""
            line.append(f"{statistics.median(values):.3g}{spread}" if values else "")
        lines.append(line)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main():
    """Print each pass as it is measured, and a table of medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--rows", type=int, default=24)
    parser.add_argument("--in-flight", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=128, help="of thinking; a quarter of it for the answer")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--lockstep", type=int, default=1, help="in how many repeats the released protocol is measured"
    )
    parser.add_argument("--random-weights", choices=SHAPES, help="instead of SmolLM2-135M; by transformers alone")
    arguments = parser.parse_args()
    if arguments.random_weights:
        arguments.modes = ["transformers"]
    logging.disable(logging.WARNING)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    disable_progress_bars()
    disable_progress_bar()
    if arguments.random_weights:
        with written(arguments.random_weights) as model:
            found, _ = measure(
                ["transformers"], demo.prompts(arguments.rows, seed=77), {}, arguments, None, model, None
            )
        print(table(found))
        return
    model, template = str(real_models.model("smollm2")), real_pair.transform().student.chat_template
    data, reference, found = prompts(arguments.rows), None, {}
    behind = [mode for mode in arguments.modes if MODES[mode][0] == "servers"]
    groups = [[mode] for mode in arguments.modes if mode not in behind]
    for modes in [*groups, behind] if behind else groups:
        with servers(modes is behind, model) as urls:
            figures, reference = measure(modes, data, urls, arguments, reference, model, template)
        found |= figures
    print(table(found))


if __name__ == "__main__":
    main()
