"""Train the small boundary predictor that is shipped in `tessy_hf/boundary/small`.

In: segments with marked style spans, and whole traces of thinking. Out: a folder with a stock token classifier.

    python recipes/boundary/small/train.py --traces traces_*.jsonl --out output/small

The predictor may read forwards only, but who marked the spans saw both sides. So teachers that read both ways judge
whole traces for it:

1. a byte-level BPE from the traces;
2. a small language model on the traces;
3. a lexical teacher (`lexical.py`) learns from the marked segments and judges the traces;
4. the student: the language model learns from these judgements and from the marked segments;
5. a second teacher, the student under a layer that reads both ways, learns from the marked segments and judges too;
6. the student goes on, with their judgements and the marked segments.

The held-out problems take part in none of it.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from base import train_tokenizer
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from lexical import LexicalTeacher
from tokenizers import processors
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoModelForTokenClassification,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3ForTokenClassification,
)

from tessy_hf.boundary.predictor import BoundaryPredictor
from tessy_hf.boundary_training.fit import LABELS
from tessy_hf.boundary_training.metrics import Evaluation, evaluate
from tessy_hf.boundary_training.segments import UNKNOWN, Segment, read_segments, span_starts, token_kinds
from tessy_hf.text.traces import thinking
from tessy_hf.text.vocabulary import Vocabulary, words

log = logging.getLogger("small")

HERE = Path(__file__).parent
MARKED, HELD_OUT = HERE.parents[2] / "dataset_cards" / "style-spans" / "train.jsonl", HERE / "held_out.jsonl"
PRE_TOKENS = (
    r"'(?:s|t|re|ve|m|ll|d)(?!\p{L})|’(?:s|t|re|ve|m|ll|d)(?!\p{L})| ?\p{L}+| ?\p{N}|[ ]?[^\s\p{L}\p{N}]+|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
VOCABULARY = 4096
BIAS = 0.7  # added to the log-odds of style, for a better F1; chosen on folds 0 and 1
WINDOW = 128  # tokens the predictor reads at most, and the length of a training sequence
TRACE_WEIGHT = {"gpt-oss-120b": 2.0, "gpt-oss-20b": 1.4, "Qwen3-8B": 0.8}  # passes over a trace in one epoch


@dataclass(frozen=True)
class Trace:
    """A whole thinking."""

    text: str
    problem: str
    source_model: str


def read_traces(paths: Sequence[Path], held_out: set[str]) -> list[Trace]:
    """Read the thinking of JSONL traces, without that on held-out problems."""
    rows = [json.loads(line) for path in paths for line in path.read_text(encoding="utf-8").splitlines()]
    traces = [Trace(thinking(row) or "", row["problem_id"], row["source_model"]) for row in rows]
    return [trace for trace in traces if trace.text and trace.problem not in held_out]


# --- 1. tokenizer


def make_tokenizer(traces: Sequence[Trace]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE: words with the space before them, single digits, runs of signs, line ends."""
    times = {"gpt-oss-120b": 3, "gpt-oss-20b": 2}  # their traces are shorter
    texts = (trace.text for trace in traces for _ in range(times.get(trace.source_model, 1)))
    tokenizer = train_tokenizer(texts, VOCABULARY, PRE_TOKENS)
    # So that the spans of a stock pipeline begin at a letter.
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=True)
    return tokenizer


# --- 2. language model


def train_language_model(
    traces: Sequence[Trace], vocabulary: Vocabulary, steps: int, seed: int, batch: int = 24, rate: float = 5e-3
) -> Qwen3ForCausalLM:
    """Train a causal language model on the traces; the learning rate falls to nothing over the second half."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=160,
        num_hidden_layers=4,
        intermediate_size=432,
        num_attention_heads=5,
        num_key_value_heads=5,
        head_dim=32,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    network = Qwen3ForCausalLM(config)
    matrices = [p for n, p in network.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in network.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers = [
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw", ns_steps=4),
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    blocks = _blocks(traces, vocabulary, np.random.default_rng(seed))
    begun = time.monotonic()
    for step in range(steps):
        pace = min(1.0, (step + 1) / 60) * (1 if 2 * step < steps else 0.03 + 0.97 * 2 * (1 - step / steps))
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = rate * pace
        ids = torch.from_numpy(np.stack([next(blocks) for _ in range(batch)]))
        logits = network(input_ids=ids[:, :-1], use_cache=False).logits
        loss = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if (step + 1) % 50 == 0:
            log.info("language model, step %d: loss %.3f, %.0f s", step + 1, loss.item(), time.monotonic() - begun)
    return network


def _blocks(traces: Sequence[Trace], vocabulary: Vocabulary, random: np.random.Generator) -> Iterator[np.ndarray]:
    """Yield blocks of ``WINDOW`` tokens without end, cut at random from the traces laid end to end."""
    encoded = [vocabulary.encode(trace.text).ids for trace in traces]
    passes = [TRACE_WEIGHT.get(trace.source_model, 1.0) for trace in traces]
    laid: list[int] = []
    while True:
        for i in random.permutation(len(encoded)):
            for _ in range(int(passes[i]) + (random.random() < passes[i] % 1)):
                laid += [*encoded[i], 0]
            if len(laid) >= 200_000:
                cut = np.array(laid[int(random.integers(WINDOW)) :])
                whole = len(cut) // WINDOW
                yield from cut[: whole * WINDOW].reshape(whole, WINDOW)[random.permutation(whole)]
                laid = []


# --- 3. and 5. what teachers say of the traces


@dataclass(frozen=True)
class Judged:
    """Tokens, and how probable it is that each is style; not a number where nothing is to be learnt."""

    ids: np.ndarray
    style: np.ndarray


def judge_words(teacher: LexicalTeacher, texts: Sequence[str], vocabulary: Vocabulary) -> list[Judged]:
    """Let the lexical teacher judge texts; a token gets the probability of its word, whitespace alone none."""
    judged = []
    for text, said in zip(texts, teacher.probabilities(texts), strict=True):
        encoding = vocabulary.encode(text)
        ends = np.array([end for _, end in words(text)])
        last = np.array([end - 1 for _, end in encoding.offsets])
        owner = np.minimum(np.searchsorted(ends, last, side="right"), len(ends) - 1)
        blank = np.array([text[start:end].isspace() for start, end in encoding.offsets])
        judged.append(Judged(np.array(encoding.ids), np.where(blank, np.nan, said[owner]).astype(np.float32)))
    return judged


def judge_again(teacher: Teacher, judged: Sequence[Judged], lexical: float = 0.3, margin: int = 24) -> list[Judged]:
    """Let the second teacher judge, in overlapping windows, and mix in what the lexical one said."""
    windows = []
    for text, trace in enumerate(judged):
        last = max(0, len(trace.ids) - 2 * margin - 1)
        windows += [(text, start) for start in range(0, last + 1, WINDOW - 2 * margin)]
    said = [np.zeros(len(trace.ids), dtype=np.float32) for trace in judged]
    with torch.inference_mode():
        for begin in range(0, len(windows), 48):
            batch = windows[begin : begin + 48]
            ids, lengths = _padded([judged[text].ids[start : start + WINDOW] for text, start in batch])
            style = teacher(ids, lengths).softmax(-1)[..., 1].numpy()
            for row, (text, start) in enumerate(batch):
                first = margin if start else 0
                said[text][start + first : start + WINDOW] = style[row, first : lengths[row]]
    return [
        Judged(trace.ids, (1 - lexical) * new + lexical * trace.style) for trace, new in zip(judged, said, strict=True)
    ]


# --- 4. to 6. learning from marked segments and judged traces


@dataclass(frozen=True)
class Stretch:
    """One stretch of a network's training, at a rate that rises shortly and falls to nearly nothing.

    Attributes:
        epochs: Passes over everything.
        rate: Peak learning rate.
        head_rate: That of the layers on top of the language model.
        marked: How often a marked segment comes in an epoch.
        batch: Segments and windows a step.
        hidden: Share of the tokens that cannot be read.
    """

    epochs: int
    rate: float
    head_rate: float
    marked: int = 1
    batch: int = 16
    hidden: float = 0.05


FIRST = Stretch(epochs=1, rate=1e-3, head_rate=2e-3, marked=3, batch=24)
TEACHER = Stretch(epochs=6, rate=4e-4, head_rate=2e-3)
SECOND = Stretch(epochs=1, rate=6e-4, head_rate=6e-4, marked=2, batch=24, hidden=0.03)


class Student(nn.Module):
    """The language model under a linear layer: what is shipped."""

    def __init__(self, base: Path) -> None:
        super().__init__()
        names = {"id2label": LABELS, "label2id": {name: i for i, name in LABELS.items()}}
        self.network = Qwen3ForTokenClassification.from_pretrained(base, num_labels=2, **names)
        self.network.dropout = nn.Dropout(0.1)
        self.body, self.head = self.network.model, self.network.score

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """Return logits; each looks back only, so tokens after the end of a text need no mask."""
        return self.network(input_ids=ids, use_cache=False).logits


class Teacher(nn.Module):
    """A student's body under a recurrent layer that reads both ways."""

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.body = copy.deepcopy(student.body)
        width = self.body.config.hidden_size
        self.both = nn.GRU(width, 96, bidirectional=True, batch_first=True)
        self.out = nn.Linear(2 * 96 + width, 2)
        self.head = nn.ModuleList([self.both, self.out])
        self.dropout = nn.Dropout(0.25)

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """Return logits that know what follows."""
        hidden = self.dropout(self.body(input_ids=ids, use_cache=False).last_hidden_state)
        packed = nn.utils.rnn.pack_padded_sequence(hidden, lengths, batch_first=True, enforce_sorted=False)
        read, _ = nn.utils.rnn.pad_packed_sequence(self.both(packed)[0], batch_first=True, total_length=ids.shape[1])
        return self.out(torch.cat([self.dropout(read), hidden], dim=-1))


def train(
    network: Student | Teacher,
    stretch: Stretch,
    segments: Sequence[Segment],
    judged: Sequence[Judged],
    vocabulary: Vocabulary,
    random: np.random.Generator,
) -> None:
    """Train a network for one stretch on marked segments and judged traces."""
    network.train()
    copies = [segment for segment in segments for _ in range(stretch.marked)]
    heads = {"params": network.head.parameters(), "lr": stretch.head_rate}
    bodies = {"params": network.body.parameters(), "lr": stretch.rate}
    optimizer = torch.optim.AdamW([bodies, heads], betas=(0.9, 0.98), weight_decay=0.01)
    steps = stretch.epochs * -(-(len(copies) + len(_cut(judged, random))) // stretch.batch)
    pace = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / (0.05 * steps)) * max(0.02, 1 - step / steps)
    )
    for epoch in range(stretch.epochs):
        examples = [*(_marked(_crop(segment, random), vocabulary) for segment in copies), *_cut(judged, random)]
        losses = []
        for batch in _batches(examples, stretch.batch, random):
            losses.append(_learn(network, batch, stretch.hidden))
            optimizer.step()
            pace.step()
            optimizer.zero_grad()
        log.info("%s, epoch %d: loss %.4f", type(network).__name__, epoch + 1, np.mean(losses))
    network.eval()


def _learn(network: Student | Teacher, batch: Sequence[Judged], hidden: float) -> float:
    """Take the gradient of the cross-entropy with the probabilities; whitespace alone is nobody's."""
    ids, lengths = _padded([example.ids for example in batch])
    style = np.full(ids.shape, np.nan, dtype=np.float32)
    for row, example in enumerate(batch):
        style[row, : len(example.ids)] = example.style
    counts, share = torch.from_numpy(~np.isnan(style)), torch.from_numpy(np.nan_to_num(style))
    odds = network(torch.where(torch.rand(ids.shape) < hidden, 0, ids), lengths).log_softmax(-1)
    losses = -(share * odds[..., 1] + (1 - share) * odds[..., 0])
    loss = losses[counts].mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    return float(loss.item())


def _padded(texts: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Pad on the right; return ids and lengths."""
    lengths = torch.tensor([len(text) for text in texts])
    ids = torch.zeros((len(texts), int(lengths.max())), dtype=torch.int64)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = torch.from_numpy(text)
    return ids, lengths


def _marked(segment: Segment, vocabulary: Vocabulary) -> Judged:
    encoding = vocabulary.encode(segment.text)
    kinds = token_kinds(segment, encoding.offsets)
    return Judged(np.array(encoding.ids), np.where(kinds == UNKNOWN, np.nan, kinds).astype(np.float32))


def _crop(segment: Segment, random: np.random.Generator) -> Segment:
    """Let one segment in five begin at a span start, and one in five at any word, with or without the space before."""
    chance = random.random()
    if chance >= 0.4:
        return segment
    places = [start for start, _ in words(segment.text)][:-8]
    starts = [0, *span_starts(segment)] if chance < 0.2 else [p + 1 for p in places[1:]]
    start = int(random.choice(starts or [0]))
    return segment.part(max(0, start - int(random.integers(2))))


def _cut(judged: Sequence[Judged], random: np.random.Generator) -> list[Judged]:
    """Cut the judged traces into windows, elsewhere in each epoch."""
    windows = []
    for trace in judged:
        first = -int(random.integers(WINDOW)) if len(trace.ids) > WINDOW else 0
        for start in range(first, len(trace.ids), WINDOW):
            ids, style = (part[max(0, start) : start + WINDOW] for part in (trace.ids, trace.style))
            if len(ids) >= 8:
                windows.append(Judged(ids, style))
    return windows


def _batches(examples: Sequence[Judged], size: int, random: np.random.Generator) -> Iterator[list[Judged]]:
    """Yield batches of examples of like length, in random order."""
    order = random.permutation(len(examples))
    batches = []
    for begin in range(0, len(order), size * 16):
        alike = sorted(order[begin : begin + size * 16], key=lambda i: len(examples[i].ids))
        batches += [alike[i : i + size] for i in range(0, len(alike), size)]
    for i in random.permutation(len(batches)):
        yield [examples[j] for j in batches[i]]


# --- all of it


def build(args: argparse.Namespace) -> Evaluation:
    """Run all stages and measure the predictor on the segments that took no part."""
    held_out = read_segments(HELD_OUT)
    kept_back = {segment.problem for segment in held_out}
    marked = [segment for segment in read_segments(MARKED) if segment.problem not in kept_back]
    traces = read_traces(args.traces, kept_back)
    if args.fold is not None:
        held_out = [segment for segment in marked if fold_of(segment.problem) in args.fold]
        marked = [segment for segment in marked if fold_of(segment.problem) not in args.fold]
    base = args.work / f"base-{args.steps}"
    if not (base / "tokenizer.json").is_file():
        tokenizer = make_tokenizer(traces)
        train_language_model(traces, Vocabulary(tokenizer, "new"), args.steps, seed=0).save_pretrained(base)
        tokenizer.save_pretrained(base)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    vocabulary = Vocabulary(tokenizer, str(base))
    read = pick(traces)
    log.info("the teacher learns from %d segments and judges %d traces", len(marked), len(read))
    torch.manual_seed(args.seed)
    random = np.random.default_rng(args.seed)
    judged = judge_words(LexicalTeacher().fit(marked), [trace.text for trace in read], vocabulary)
    student = Student(base)
    train(student, FIRST, marked, judged, vocabulary, random)
    teacher = Teacher(student)
    train(teacher, TEACHER, marked, (), vocabulary, random)
    judged = judge_again(teacher, [trace for trace in judged if random.random() < 0.7])
    train(student, SECOND, marked, judged, vocabulary, random)
    save(student.network, tokenizer, args.out)
    predictor = BoundaryPredictor.from_pretrained(args.out)
    found = evaluate(predictor, held_out)
    predictor.close()
    return found


def fold_of(problem: str) -> int:
    """Return in which of five folds a problem is."""
    return int(hashlib.sha256(f"cv/{problem}".encode()).hexdigest(), 16) % 5


def pick(traces: Sequence[Trace], share: float = 0.5) -> list[Trace]:
    """Leave out some of Qwen3's traces, of which there is twice as much text as of gpt-oss's."""
    random = np.random.default_rng(11)
    return [trace for trace in traces if trace.source_model != "Qwen3-8B" or random.random() <= share]


def save(network: Qwen3ForTokenClassification, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write a stock token classifier that states how its labels are to be read."""
    with torch.no_grad():
        network.score.bias += torch.tensor([-BIAS / 2, BIAS / 2])
    for name, value in {"label_shift": 0, "window": WINDOW, "author": "any"}.items():
        setattr(network.config, name, value)
    network.save_pretrained(out)
    tokenizer.save_pretrained(out)


def write_card(folder: Path, found: Evaluation) -> None:
    """Write the model card, all figures of which come from ``found``."""
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
    card = ModelCard.from_template(
        data, template_path=str(HERE / "card.jinja"), found=found, parameters=parameters, window=WINDOW
    )
    card.save(folder / "README.md")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--traces", type=Path, nargs="+", required=True, help="JSONL files of thinking traces")
    parser.add_argument("--out", type=Path, default=Path("output/small"), help="the folder to write")
    parser.add_argument("--work", type=Path, default=Path("output/small-work"), help="where the base model is kept")
    parser.add_argument(
        "--fold", type=int, nargs="+", help="hold out these folds (0-4) of the training segments instead"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the student")
    parser.add_argument("--steps", type=int, default=1150, help="of the language model")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    found = build(args)
    write_card(args.out, found)
    print(found.model_dump_json(include={"char_f1", "char_f1_by_family", "span_f1", "boundary_within_1_word"}))


if __name__ == "__main__":
    main()
