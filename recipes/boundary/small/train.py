"""Train the small boundary predictor that is shipped in `tessy_hf/boundary/small`.

In: segments with marked style spans, and whole traces of thinking. Out: a folder with a stock token classifier.

    python recipes/boundary/small/train.py --segments style_spans_v2.jsonl --traces traces_*.jsonl --out output/small

The predictor reads forwards only, but who marked the spans saw both sides. So a teacher that reads both ways judges
whole traces for it:

1. a byte-level BPE from the traces;
2. a small language model on the traces, its embeddings begun with those of a pretrained model;
3. the teacher, the language model under a layer that reads both ways, learns from the marked segments and judges the
   traces;
4. the student, the language model under one layer for each look-ahead, learns from both.

The problems of `held_out_problems.txt` take part in none of it.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from base import train_tokenizer
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from network import LOOKAHEADS, WIDTH, WINDOW, Judged, Stretch, Student, Teacher, judge, train, train_language_model
from pretrained_teacher import PretrainedTeacher
from tokenizers import processors
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen3ForTokenClassification,
)

from tessy_hf.boundary.predictor import BoundaryPredictor
from tessy_hf.boundary_training.fit import LABELS
from tessy_hf.boundary_training.metrics import Evaluation, evaluate
from tessy_hf.boundary_training.segments import Segment, read_segments
from tessy_hf.errors import DatasetError
from tessy_hf.text.traces import thinking
from tessy_hf.text.vocabulary import Vocabulary

log = logging.getLogger("small")

HERE = Path(__file__).parent
SHIPPABLE = HERE.parents[2] / "dataset_cards" / "style-spans" / "train.jsonl"
HELD_OUT_PROBLEMS = HERE / "held_out_problems.txt"
PRE_TOKENS = (
    r"'(?:s|t|re|ve|m|ll|d)(?!\p{L})|’(?:s|t|re|ve|m|ll|d)(?!\p{L})| ?\p{L}+| ?\p{N}|[ ]?[^\s\p{L}\p{N}]+|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
VOCABULARY = 6144
LOOKAHEAD = 2
"""The look-ahead that is shipped, in words."""
BIAS = 0.0
"""Added to the log-odds of style, for a better F1."""
PASSES = {"gpt-oss-120b": 1.3, "gpt-oss-20b": 1.2, "Qwen3-8B": 0.5}
"""How often a trace comes in one epoch of the language model, where not once."""
JUDGED = 4_000_000
"""Characters of the traces that the teacher judges."""
JUDGED_BY_PRETRAINED = 800_000
"""Characters of the first that a pretrained teacher judges, too, where it takes part."""

TEACHER = Stretch(epochs=6, rate=4e-4, head_rate=2e-3)
STUDENT = Stretch(epochs=1, rate=1e-3, head_rate=2e-3, copies=3, batch=24)


@dataclass(frozen=True)
class Trace:
    """A whole thinking."""

    text: str
    problem: str
    source_model: str


def read_traces(paths: Sequence[Path], held_out: set[str]) -> list[Trace]:
    """Read the thinking of JSONL traces, without that on held-out problems."""
    rows = [json.loads(line) for path in sorted(paths) for line in path.read_text(encoding="utf-8").splitlines()]
    traces = [Trace(thinking(row) or "", row["problem_id"], row["source_model"]) for row in rows]
    return [trace for trace in traces if trace.text and trace.problem not in held_out]


def read_all_segments(paths: Sequence[Path]) -> list[Segment]:
    """Read the segments of all files, of a later one those whose text no earlier one has.

    Raises:
        DatasetError: Two files mark a text differently, so that their order would decide.
    """
    found: list[Segment] = []
    for path in paths:
        known, new = {segment.text: segment for segment in found}, read_segments(path)
        other = [one for one in new if one.text in known and one.spans != known[one.text].spans]
        if other:
            raise DatasetError(
                f"{path} marks {len(other)} texts otherwise than the files before it, the first is {other[0].key!r}. "
                "Give --segments only the file whose marks are to be learnt."
            )
        found += [segment for segment in new if segment.text not in known]
    return found


# --- 1. tokenizer


def make_tokenizer(traces: Sequence[Trace]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE: words with the space before them, single digits, runs of signs, line ends."""
    tokenizer = train_tokenizer((trace.text for trace in traces), VOCABULARY, PRE_TOKENS)
    # So that the spans of a stock pipeline begin at a letter.
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=True)
    return tokenizer


# --- 2. language model


def borrow_embeddings(tokenizer: PreTrainedTokenizerFast, pretrained: str) -> Tensor:
    """Return embeddings to begin with: the main components of a pretrained model's, of the pieces of each token."""
    network, pieces = AutoModelForCausalLM.from_pretrained(pretrained), AutoTokenizer.from_pretrained(pretrained)
    weights = network.get_input_embeddings().weight.detach().float()
    weights = weights - weights.mean(0)
    _, _, directions = torch.linalg.svd(weights[:30_000], full_matrices=False)
    small = weights @ directions[:WIDTH].T
    texts = [tokenizer.decode([i]) for i in range(VOCABULARY)]
    ids = [pieces.encode(text, add_special_tokens=False) for text in texts]
    found = torch.stack([small[each].mean(0) if each else torch.zeros(WIDTH) for each in ids])
    return found / found.std() * 0.1


def make_base(traces: Sequence[Trace], pretrained: str, steps: int, seed: int, folder: Path) -> None:
    """Train tokenizer and language model, unless the folder has them."""
    if (folder / "config.json").is_file():
        return
    tokenizer = make_tokenizer(traces)
    vocabulary = Vocabulary(tokenizer, "new")
    encoded = [vocabulary.encode(trace.text).ids for trace in traces]
    passes = [PASSES.get(trace.source_model, 1.0) for trace in traces]
    network = train_language_model(encoded, passes, borrow_embeddings(tokenizer, pretrained), steps, seed)
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# --- 3. what the teacher judges


def pick(traces: Sequence[Trace], characters: int, seed: int) -> list[Trace]:
    """Draw traces, at first one of each source model, then again, until there are so many characters."""
    random = np.random.default_rng(seed)
    left: dict[str, list[Trace]] = {}
    for i in random.permutation(len(traces)):
        left.setdefault(traces[i].source_model, []).append(traces[i])
    chosen: list[Trace] = []
    sizes = dict.fromkeys(left, 0)
    while characters > sum(sizes.values()) and any(left.values()):
        model = min((name for name in left if left[name]), key=lambda name: (sizes[name], name))
        chosen.append(left[model].pop())
        sizes[model] += len(chosen[-1].text)
    return chosen


def prefix(traces: Sequence[Trace], characters: int) -> Sequence[Trace]:
    """Return the first traces, with so many characters."""
    sizes = np.cumsum([len(trace.text) for trace in traces])
    return traces[: int(np.searchsorted(sizes, characters)) + 1]


# --- all of it


def build(args: argparse.Namespace) -> Evaluation:
    """Run all stages; measure the predictor on the held-out segments and write its card."""
    kept_back = set(HELD_OUT_PROBLEMS.read_text(encoding="utf-8").split())
    segments = read_all_segments(args.segments)
    segments_in = [segment for segment in segments if segment.problem not in kept_back]
    held_out = [segment for segment in segments if segment.problem in kept_back]
    traces = read_traces(args.traces, kept_back)
    base = args.work / f"base-{args.steps}-{args.seed}"
    make_base(traces, args.pretrained, args.steps, args.seed, base)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    vocabulary = Vocabulary(tokenizer, str(base))
    torch.manual_seed(args.seed)
    random = np.random.default_rng(args.seed)
    student = Student(base)
    teacher = Teacher(student.body)
    train(teacher, TEACHER, segments_in, (), vocabulary, random)
    read = pick(traces, JUDGED, args.seed)
    log.info("the teacher learnt from %d segments and judges %d traces", len(segments_in), len(read))
    judged = judge(teacher, [trace.text for trace in read], vocabulary)
    if args.pretrained_teacher:
        judged = also_judge(judged, read, segments_in, args)
    train(student, STUDENT, segments_in, judged, vocabulary, random)
    for ahead in LOOKAHEADS:
        folder = args.out if ahead == LOOKAHEAD else args.work / f"lookahead-{ahead}"
        save(student, ahead, tokenizer, folder)
        log.info("look-ahead %d: %s", ahead, measure(folder, held_out).model_dump_json(include=SHOWN))
    shipped = {segment.key for segment in read_segments(SHIPPABLE)}
    found, found_all = (measure(args.out, of) for of in ([s for s in held_out if s.key in shipped], held_out))
    write_card(args.out, found, found_all, learnt=len(segments_in), traces=len(traces))
    return found_all


def also_judge(
    judged: Sequence[Judged], read: Sequence[Trace], segments: Sequence[Segment], args: argparse.Namespace
) -> list[Judged]:
    """Let a pretrained teacher judge the first of the traces, too; of two judgements the mean counts."""
    first = prefix(read, JUDGED_BY_PRETRAINED)
    teacher = PretrainedTeacher(args.pretrained).fit(segments, np.random.default_rng(args.seed))
    again = teacher.judge([trace.text for trace in first])
    return [*(one.mixed(style) for one, style in zip(judged, again, strict=False)), *judged[len(first) :]]


SHOWN = {"char_f1", "char_f1_by_family", "span_f1", "boundary_within_1_word"}


def measure(folder: Path, segments: Sequence[Segment]) -> Evaluation:
    """Evaluate a saved predictor."""
    predictor = BoundaryPredictor.from_pretrained(folder, device="cpu")
    found = evaluate(predictor, segments)
    predictor.close()
    return found


def save(student: Student, lookahead: int, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write a stock token classifier with one of the heads, which states how its labels are to be read."""
    config = student.body.config
    config.num_labels, config.id2label = len(LABELS), LABELS
    config.label2id = {name: i for i, name in LABELS.items()}
    for name, value in {"label_shift": 0, "lookahead": lookahead, "window": WINDOW, "author": "any"}.items():
        setattr(config, name, value)
    network = Qwen3ForTokenClassification(config)
    rows = slice(2 * LOOKAHEADS.index(lookahead), 2 * LOOKAHEADS.index(lookahead) + 2)
    network.model.load_state_dict(student.body.state_dict())
    with torch.no_grad():
        network.score.weight.copy_(student.head.weight[rows])
        network.score.bias.copy_(student.head.bias[rows] + torch.tensor([-BIAS / 2, BIAS / 2]))
    network.save_pretrained(out)
    tokenizer.save_pretrained(out)


def write_card(folder: Path, found: Evaluation, found_all: Evaluation, **facts: int) -> None:
    """Write the model card, all figures of which come from the evaluations."""
    results = [
        EvalResult(
            task_type="token-classification",
            task_name="Style spans in reasoning",
            dataset_type="style-spans",
            dataset_name="held-out segments",
            dataset_split="test",
            metric_type=kind,
            metric_name=name if group == "" else f"{name} ({group})",
            metric_value=round(value, 4),
        )
        for group, of in {"": found.overall, **found.by_family}.items()
        for kind, name, value in (
            ("f1", "Character F1 of style", of.char.f1),
            ("f1", "Span F1 of style", of.span.f1),
            ("accuracy", "First boundary within one word", of.boundary_words.within_1),
        )
    ]
    data = ModelCardData(
        model_name="tessy-hf-boundary-small",
        eval_results=results,
        language="en",
        license="apache-2.0",
        library_name="transformers",
        pipeline_tag="token-classification",
        tags=["tessy", "boundary-predictor", "reasoning"],
    )
    parameters = AutoModelForTokenClassification.from_pretrained(folder).num_parameters()
    facts = {"parameters": parameters, "window": WINDOW, "lookahead": LOOKAHEAD, "vocabulary": VOCABULARY, **facts}
    card = ModelCard.from_template(
        data, template_path=str(HERE / "card.jinja"), found=found, found_all=found_all, **facts
    )
    card.save(folder / "README.md")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--segments", type=Path, nargs="+", default=[SHIPPABLE], help="JSONL files of marked segments")
    parser.add_argument("--traces", type=Path, nargs="+", required=True, help="JSONL files of thinking traces")
    parser.add_argument("--pretrained", default="HuggingFaceTB/SmolLM2-135M", help="whose embeddings to begin with")
    parser.add_argument(
        "--pretrained-teacher", action="store_true", help="let its lower layers learn and judge some traces, too"
    )
    parser.add_argument("--out", type=Path, default=Path("output/small"), help="the folder to write")
    parser.add_argument("--work", type=Path, default=Path("output/small-work"), help="for the base and other heads")
    parser.add_argument("--seed", type=int, default=0, help="of everything")
    parser.add_argument("--steps", type=int, default=600, help="of the language model")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)
    try:
        print(build(args).model_dump_json(include=SHOWN))
    except DatasetError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
