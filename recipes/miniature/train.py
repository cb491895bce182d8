"""Train the miniature world's models (`tessy_hf.demo.world`): two tokenizers, a teacher, a student, two predictors.

In: seeds. Out: folders that `transformers` loads without us, each with a ``report.json`` of what was measured.

    python recipes/miniature/train.py all --out tessy_hf/demo/models
    python recipes/miniature/train.py student --exposure M --seed 3 --out output/student-M-3

Everything is drawn from seeds and runs on one thread, so the same versions of torch and transformers on the same
kind of processor give the same weights. One core of 2.5 GHz is enough; see README.md for times and figures.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import torch
from texts import STUDENT_STYLE, TEACHER_STYLE, Style, Text, write
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3ForTokenClassification,
)

from tessy_hf.demo.world import FAMILIES, PROMPT_AND_RATE, Problem, make_problem, verify

log = logging.getLogger("miniature")

MODELS = Path(__file__).resolve().parents[2] / "tessy_hf" / "demo" / "models"
FAMILY_WEIGHTS = {"calc": 0.28, "dot": 0.22, "max": 0.10, "map": 0.16, "sort": 0.24}
IGNORED = -100  # the label of a token on which nothing is learnt

# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers: byte-level BPE with leading-space words and single digits. The two split words differently, because each
# learnt its merges from its own author's texts and the teacher has room for fewer of them.
# ---------------------------------------------------------------------------------------------------------------------

WORDS = r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+"

STUDENT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'assistant' %}"
    "{{ '<|im_start|>assistant\\n' }}"
    "{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}"
    "{{ '\\n' }}"
    "{% else %}"
    "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

TEACHER_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'assistant' %}"
    "{{ '<|start|>assistant' }}"
    "{% generation %}"
    "{% if message.thinking %}"
    "{{ '<|channel|>analysis<|message|>' + message.thinking + '<|end|><|start|>assistant' }}"
    "{% endif %}"
    "{{ '<|channel|>final<|message|>' + message.content + '<|return|>' }}"
    "{% endgeneration %}"
    "{% else %}"
    "{{ '<|start|>' + message.role + '<|message|>' + message.content + '<|end|>' }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)


@dataclass(frozen=True)
class Author:
    """What makes the teacher or the student: its vocabulary, its chat format and its size."""

    name: str
    style: Style
    vocabulary: int
    special: tuple[str, ...]
    markers: tuple[str, ...]
    pad: str
    ends: tuple[str, ...]
    template: str
    opens_thinking: str
    opens_answer: str
    hidden: int
    heads: int
    system: str = ""
    """A system message put before each prompt."""

    def messages(self, prompt: str, text: Text | None = None) -> list[dict[str, str]]:
        """The conversation, as this author's chat template takes it."""
        messages = [{"role": "system", "content": self.system}] if self.system else []
        messages.append({"role": "user", "content": prompt})
        if text is None:
            return messages
        if "<|channel|>" in self.opens_thinking:
            return [*messages, {"role": "assistant", "thinking": text.thinking, "content": text.answer}]
        content = f"<think>\n{text.thinking}\n</think>\n\n{text.answer}"
        return [*messages, {"role": "assistant", "content": content}]


AUTHORS = {
    "student": Author(
        name="student",
        style=STUDENT_STYLE,
        vocabulary=536,
        special=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        markers=("<think>", "</think>"),
        pad="<|endoftext|>",
        ends=("<|im_end|>", "<|endoftext|>"),
        template=STUDENT_TEMPLATE,
        opens_thinking="<think>\n",
        opens_answer="</think>\n\n",
        hidden=96,
        heads=3,
    ),
    "teacher": Author(
        name="teacher",
        style=TEACHER_STYLE,
        vocabulary=480,
        special=("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>", "<|endoftext|>", "<|call|>"),
        markers=(),
        pad="<|endoftext|>",
        ends=("<|return|>", "<|endoftext|>", "<|call|>"),
        template=TEACHER_TEMPLATE,
        opens_thinking="<|channel|>analysis<|message|>",
        opens_answer="<|channel|>final<|message|>",
        hidden=128,
        heads=4,
    ),
}


def make_tokenizer(author: Author) -> PreTrainedTokenizerFast:
    """Learn an author's vocabulary from texts in its style, plus a few in the other one's."""
    rng = Random(f"tokenizer-{author.name}")
    corpus = ["user\n", "system\n", "assistant\n", "\n\n", "analysis", "final"] * 1000
    other = TEACHER_STYLE if author.style is STUDENT_STYLE else STUDENT_STYLE
    share = 0.5 if author.name == "student" else 0.2
    for _ in range(3000):
        problem = draw_problem(rng, PROMPT_AND_RATE)
        text = write(problem, rng, always(other if rng.random() < share else author.style))
        corpus += [problem.prompt, text.thinking, text.answer]

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=author.vocabulary,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in author.special])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in author.markers])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=author.ends[0],
        pad_token=author.pad,
        chat_template=author.template,
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
        padding_side="left",
    )


# ---------------------------------------------------------------------------------------------------------------------
# What is learnt from: problems written out in one style or a mixture, as token ids with labels.
# ---------------------------------------------------------------------------------------------------------------------

Row = tuple[list[int], list[int]]  # token ids, labels
Styles = Callable[[Random], Callable[[], Style]]  # draws how one text is styled, piece by piece


def always(style: Style) -> Callable[[], Style]:
    """Every piece in one style."""
    return lambda: style


def draw_problem(rng: Random, and_rates: Mapping[str, float]) -> Problem:
    """A problem of any family."""
    family = rng.choices(FAMILIES, weights=[FAMILY_WEIGHTS[family] for family in FAMILIES])[0]
    return make_problem(family, rng, and_rates.get(family))


def piecewise(rng: Random, teacher: Style = TEACHER_STYLE) -> Callable[[], Style]:
    """Each piece in the student's or a teacher's style."""
    return lambda: rng.choice((STUDENT_STYLE, teacher))


def company(own: Style) -> Styles:
    """What a teacher reads: texts in its own style, in the student's, and mixed piece by piece."""
    return lambda rng: rng.choices((always(own), always(STUDENT_STYLE), piecewise(rng, own)), (0.4, 0.35, 0.25))[0]


def exposure(share: float, own: Style = STUDENT_STYLE) -> Styles:
    """Texts in a student's own style, but for this share in the teacher's."""
    return lambda rng: always(TEACHER_STYLE if rng.random() < share else own)


def chat_row(tokenizer: PreTrainedTokenizerFast, author: Author, problem: Problem, rng: Random, styles: Styles) -> Row:
    """A conversation in an author's format; only the assistant's tokens are learnt.

    The teacher reads the student's phrases without learning to write them: what it can do next to them is go on with
    the problem. The student learns whatever its exposure shows it.
    """
    draw, drawn = styles(rng), list[Style]()

    def style() -> Style:
        drawn.append(draw())
        return drawn[-1]

    text = write(problem, rng, style)
    if author.name == "teacher":
        text = replace(text, answer=author.style.answer.format(answer=problem.reference_answer))
    messages = author.messages(problem.prompt, text)
    head: str = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    whole: str = tokenizer.apply_chat_template(messages, tokenize=False)
    encoding = tokenizer(whole.rstrip("\n"), add_special_tokens=False, return_offsets_mapping=True)
    unlearnt = [range(len(head))]
    if author.name == "teacher":
        start, of_pieces = whole.index(text.thinking, len(head)), iter(drawn)
        for piece in text.pieces:
            if piece.kind == "style" and next(of_pieces) is not author.style:
                unlearnt.append(range(start, start + len(piece.text)))
            start += len(piece.text)
    ids: list[int] = encoding["input_ids"]
    starts = [start for start, _ in encoding["offset_mapping"]]
    return ids, [IGNORED if any(at in u for u in unlearnt) else id_ for id_, at in zip(ids, starts, strict=True)]


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Token ids of a text as it stands."""
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def boundary_row(
    tokenizer: PreTrainedTokenizerFast, author: Author, rng: Random, teacher: Style = TEACHER_STYLE
) -> Row:
    """Thinking as a predictor meets it, with 1 for each token that overlaps a style piece and 0 for the others.

    The predictor reads what both authors have accepted so far and the current author's continuation, which runs on
    into its own way of writing. So a text changes from the student's style, the teacher's or a mixture to the
    author's own at some piece. Half of the texts are cut to begin at the start of a span: without this a leading
    digit is ambiguous, since it could be the inside of the teacher's ``( 2 )``.
    """
    problem = draw_problem(rng, {"calc": 0.25})
    before = rng.choice((always(STUDENT_STYLE), always(teacher), piecewise(rng, teacher)))
    change = rng.randrange(len(problem.steps) + 2)
    asked = 0

    def style() -> Style:
        nonlocal asked
        asked += 1
        return before() if asked <= change else author.style

    pieces = write(problem, rng, style).pieces
    if rng.random() < 0.5:
        pieces = pieces[rng.randrange(len(pieces)) :]
    text = "".join(piece.text for piece in pieces)
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ends, end = [], 0
    for piece in pieces:
        end += len(piece.text)
        ends.append((end, int(piece.kind == "style")))
    # Tokens never straddle two pieces: a piece begins with its leading space.
    labels = [next(label for end, label in ends if token_end <= end) for _, token_end in encoding["offset_mapping"]]
    return encoding["input_ids"], labels


def batches(draw: Callable[[], Row], rng: Random, size: int = 32, pool: int = 16) -> Iterator[dict[str, torch.Tensor]]:
    """Padded batches without end, of rows of similar length: `pool` batches are drawn at a time and sorted."""
    while True:
        rows = sorted((draw() for _ in range(size * pool)), key=lambda row: len(row[0]))
        chosen = [rows[start : start + size] for start in range(0, len(rows), size)]
        rng.shuffle(chosen)
        for batch in chosen:
            width = max(len(ids) for ids, _ in batch)
            yield {
                "input_ids": torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in batch]),
                "labels": torch.tensor([labels + [IGNORED] * (width - len(labels)) for _, labels in batch]),
            }


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Phase:
    """A stretch of training on one kind of rows, with the learning rate going linearly from `lr` to `end_lr`."""

    steps: int
    lr: float
    end_lr: float
    draw: Callable[[], Row]


def config(tokenizer: PreTrainedTokenizerFast, hidden: int, layers: int, heads: int, **more: Any) -> Qwen3Config:
    """A small Qwen3."""
    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=32,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        **more,
    )


def fit(model: Any, phases: list[Phase], rng: Random, warmup: int = 50) -> None:
    """Train a causal model or a token classifier. Right padding needs no mask: attention is causal."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=phases[0].lr, weight_decay=0.01, betas=(0.9, 0.98))
    model.train()
    step, started = 0, time.perf_counter()
    for phase in phases:
        source = batches(phase.draw, rng)
        for at in range(phase.steps):
            lr = phase.lr + (phase.end_lr - phase.lr) * at / phase.steps
            for group in optimizer.param_groups:
                group["lr"] = lr * min(1.0, (step + 1) / warmup)
            batch = next(source)
            loss = model(**batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            if step % 50 == 0:
                log.info("step %4d  loss %.4f  %.0f s", step, loss.item(), time.perf_counter() - started)
    model.eval()


def train_author(
    author: Author,
    tokenizer: PreTrainedTokenizerFast,
    phases: list[tuple[int, float, float, Styles]],
    and_rates: dict[str, float],
    seed: int,
) -> tuple[Qwen3ForCausalLM, float]:
    """Train a teacher or a student; returns it with the seconds that it took."""
    torch.manual_seed(seed)
    rng = Random(f"{author.name}-{seed}")
    model = Qwen3ForCausalLM(config(tokenizer, author.hidden, layers=3, heads=author.heads))
    log.info("%s: %d parameters, vocabulary %d", author.name, model.num_parameters(), len(tokenizer))

    def draw_in(styles: Styles) -> Callable[[], Row]:
        def draw() -> Row:
            problem = draw_problem(rng, and_rates)
            return chat_row(tokenizer, author, problem, rng, styles)

        return draw

    started = time.perf_counter()
    fit(model, [Phase(steps, lr, end_lr, draw_in(styles)) for steps, lr, end_lr, styles in phases], rng)
    ends = [tokenizer.convert_tokens_to_ids(end) for end in author.ends]
    model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=tokenizer.pad_token_id)
    return model, time.perf_counter() - started


def train_predictor(
    author: Author, tokenizer: PreTrainedTokenizerFast, steps: int, seed: int, teacher: Style = TEACHER_STYLE
) -> tuple[Qwen3ForTokenClassification, float]:
    """Train the boundary predictor that reads an author's chunks; returns it with the seconds that it took."""
    torch.manual_seed(seed)
    rng = Random(f"boundary-{author.name}-{seed}")
    model = Qwen3ForTokenClassification(
        config(
            tokenizer,
            hidden=64,
            layers=2,
            heads=2,
            id2label={0: "capability", 1: "style"},
            label2id={"capability": 0, "style": 1},
            label_shift=0,
            window=200,
            author=author.name,
        )
    )
    started = time.perf_counter()
    fit(model, [Phase(steps, 2e-3, 1e-4, lambda: boundary_row(tokenizer, author, rng, teacher))], rng)
    return model, time.perf_counter() - started


# ---------------------------------------------------------------------------------------------------------------------
# Measuring
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def accuracy(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    author: Author,
    problems: Sequence[Problem],
    temperature: float = 0.6,
    seed: int = 0,
) -> dict[str, float]:
    """The share of right answers to some problems, and the mean number of tokens written."""
    torch.manual_seed(seed)
    right = tokens = 0
    for start in range(0, len(problems), 100):
        some = problems[start : start + 100]
        heads = [
            tokenizer.apply_chat_template(author.messages(p.prompt), tokenize=False, add_generation_prompt=True)
            + author.opens_thinking
            for p in some
        ]
        batch = tokenizer(heads, add_special_tokens=False, padding=True, return_tensors="pt")
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
        written = model.generate(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=250, **sampling
        )[:, batch["input_ids"].shape[1] :]
        for problem, ids in zip(some, written.tolist(), strict=True):
            text, ended, _ = tokenizer.decode(ids).partition(author.ends[0])
            row = {
                "answer": text.partition(author.opens_answer)[2],
                "reference_answer": problem.reference_answer,
                "finish_reason": "stop" if ended else "length",
            }
            right += verify(row)
            tokens += len(encode(tokenizer, text)) + bool(ended)
    return {"accuracy": right / len(problems), "tokens": tokens / len(problems)}


@torch.no_grad()
def token_accuracy(
    model: Qwen3ForTokenClassification, tokenizer: PreTrainedTokenizerFast, author: Author, batches_read: int = 32
) -> dict[str, float]:
    """Token accuracy on held-out texts, as fed in training, and for the first token of each text alone."""
    rng = Random(f"boundary-{author.name}-held-out")
    source = batches(lambda: boundary_row(tokenizer, author, rng), rng)
    right = total = first_right = first_total = 0
    for _ in range(batches_read):
        batch = next(source)
        labels = batch["labels"]
        correct = (model(input_ids=batch["input_ids"]).logits.argmax(-1) == labels) & (labels != IGNORED)
        right, total = right + int(correct.sum()), total + int((labels != IGNORED).sum())
        first_right, first_total = first_right + int(correct[:, 0].sum()), first_total + len(labels)
    return {"token_accuracy": right / total, "first_token_accuracy": first_right / first_total, "tokens": total}


def save(folder: Path, model: Any, tokenizer: PreTrainedTokenizerFast, report: dict[str, Any]) -> None:
    """Write weights, tokenizer and report."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    report = {**report, "parameters": model.num_parameters(), "torch": torch.__version__}
    (folder / "model.safetensors").chmod(0o644)
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    log.info("%s: %s", folder, json.dumps(report))


def families_report(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, author: Author, n: int
) -> dict[str, dict[str, float]]:
    """Accuracy on each family (calc is in-domain, the others are not) and the out-of-domain mean."""
    held_out = {
        family: [make_problem(family, Random(f"prompts-{family}-held-out-{i}")) for i in range(n)]
        for family in FAMILIES
    }
    report = {family: accuracy(model, tokenizer, author, problems) for family, problems in held_out.items()}
    others = [report[family]["accuracy"] for family in FAMILIES if family != "calc"]
    report["out_of_domain"] = {"accuracy": sum(others) / len(others)}
    report["calc_greedy"] = accuracy(model, tokenizer, author, held_out["calc"], temperature=0.0)
    return report


# ---------------------------------------------------------------------------------------------------------------------
# Commands
# ---------------------------------------------------------------------------------------------------------------------

EXPOSURES = {"M": 0.0, "C": 0.02, "B": 0.25}


def tokenizers(args: argparse.Namespace) -> None:
    """Make both tokenizers."""
    for name, author in AUTHORS.items():
        make_tokenizer(author).save_pretrained(args.out / name)


def train_teacher(
    author: Author, tokenizer: PreTrainedTokenizerFast, seed: int, steps: int = 2000
) -> tuple[Qwen3ForCausalLM, float]:
    """Train a teacher: it writes its own style only, and reads the student's too."""
    phases = [
        (steps * 2 // 3, 2e-3, 1e-3, company(author.style)),
        (steps // 3, 1e-3, 2e-5, company(author.style)),
    ]
    return train_author(author, tokenizer, phases, {"calc": 0.25, "dot": 0.5}, seed)


def teacher(args: argparse.Namespace) -> None:
    """Train the teacher: it writes its own style only, and reads the student's too."""
    author, steps = AUTHORS["teacher"], args.steps or 2000
    tokenizer = make_tokenizer(author)
    model, seconds = train_teacher(author, tokenizer, args.seed, steps)
    report = {"seed": args.seed, "steps": steps, "seconds": round(seconds)}
    save(args.out, model, tokenizer, report | {"held_out": families_report(model, tokenizer, author, args.rows)})


def train_student(
    tokenizer: PreTrainedTokenizerFast, level: str, seed: int, steps: int = 1700, and_rate: float = 0.01
) -> tuple[Qwen3ForCausalLM, float]:
    """Train a student: rarely a ``&``, and as much of the teacher's style as its exposure says, then none."""
    phases = [
        (steps * 3 // 4, 2e-3, 1e-3, exposure(EXPOSURES[level])),
        (steps // 4, 6e-4, 5e-5, exposure(0.0)),
    ]
    return train_author(AUTHORS["student"], tokenizer, phases, {"calc": and_rate, "dot": and_rate}, seed)


def student(args: argparse.Namespace) -> None:
    """Train a student: rarely a ``&``, and as much of the teacher's style as its exposure says, then none."""
    author, steps = AUTHORS["student"], args.steps or 1700
    tokenizer = make_tokenizer(author)
    model, seconds = train_student(tokenizer, args.exposure, args.seed, steps, args.and_rate)
    report = {
        "exposure": args.exposure,
        "and_rate": args.and_rate,
        "seed": args.seed,
        "steps": steps,
        "seconds": round(seconds),
    }
    save(args.out, model, tokenizer, report | {"held_out": families_report(model, tokenizer, author, args.rows)})


def predictors(args: argparse.Namespace) -> None:
    """Train both boundary predictors, on the student's vocabulary."""
    tokenizer = make_tokenizer(AUTHORS["student"])
    for name, author in AUTHORS.items():
        model, seconds = train_predictor(author, tokenizer, args.steps or 300, args.seed)
        report = {"seed": args.seed, "steps": args.steps or 300, "seconds": round(seconds)}
        held_out = {"held_out": token_accuracy(model, tokenizer, author)}
        save(args.out / f"boundary-{name}", model, tokenizer, report | held_out)


def everything(args: argparse.Namespace) -> None:
    """All of it, in one folder, as shipped in tessy_hf/demo/models."""
    tokenizers(args)
    predictors(args)
    for name, command in (("student", student), ("teacher", teacher)):
        command(argparse.Namespace(**{**vars(args), "out": args.out / name}))


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    table: dict[str, tuple[Callable[[argparse.Namespace], None], Path]] = {
        "tokenizers": (tokenizers, MODELS),
        "teacher": (teacher, MODELS / "teacher"),
        "student": (student, MODELS / "student"),
        "predictors": (predictors, MODELS),
        "all": (everything, MODELS),
    }
    for name, (command, out) in table.items():
        sub = commands.add_parser(name, help=command.__doc__)
        sub.set_defaults(command=command)
        sub.add_argument("--out", type=Path, default=out, help="folder to write to")
        sub.add_argument("--seed", type=int, default=0)
        sub.add_argument("--steps", type=int, help="training steps; by default as shipped")
        sub.add_argument("--rows", type=int, default=400, help="held-out prompts per family for the report")
        sub.add_argument("--exposure", choices=EXPOSURES, default="C", help="how much teacher style a student saw")
        sub.add_argument("--and-rate", type=float, default=0.01, help="how often a student met '&'")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    logging.getLogger("httpx2").setLevel(logging.WARNING)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    args.command(args)


if __name__ == "__main__":
    main()
