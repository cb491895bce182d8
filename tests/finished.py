"""Finished rows, made without models: any shape a run may leave behind, in the columns and types of a run."""

import random

from datasets import Dataset, Features, Value

from tessy_hf.rows import columns
from tessy_hf.text.thinking_format import THINK_TAGS
from tessy_hf.trajectory import Span, Trajectory
from tests.rules import vocabulary

STYLE = ["Okay, so", "Hmm, wait.", "Let me check:", "So far so good,", "Größe 🙂 — maybe"]
WORK = ["2 + 3 = 5", "`f(x) = x^2`", "the sum of primes is 129", "f(10) == 45", "你好 is 3 x 4"]
FEATURES = Features({"id": Value("string"), "prompt": Value("string"), **columns.schema()})


def trajectory(draw, turns):
    """A row of so many turns that ends in one of the ways a row can end."""
    row = Trajectory("row", seed=draw.getrandbits(40))
    row.finish_reason = draw.choices(["stop", "length", "repetition", "error"], [80, 10, 4, 6])[0]
    row.closed = row.finish_reason == "stop" or draw.random() < 0.3
    if row.finish_reason == "error":
        row.error = f"Row 'r{draw.randrange(9999)}': the engine answered HTTP {draw.choice([500, 503])}."
    if row.finish_reason != "error" or draw.random() < 0.5:
        for turn in range(turns):
            author, words = ("student", STYLE) if turn % 2 == 0 else ("teacher", WORK)
            text = " ".join(draw.choices(words, k=1 + draw.randrange(4)))
            row.spans.append(Span(author, "thinking", (" " if turn else "") + text))
    if row.closed and row.spans:
        row.spans.append(Span("student", "answer", "The answer is **5**."))
    row.discarded = {"teacher": draw.randrange(50), "student": draw.randrange(90)}
    return row


def finished_row(number, seed=0, turns=None):
    """One finished row."""
    draw = random.Random(f"{seed}-{number}")
    prompt = f"Problem {number}: what is {draw.randrange(99)} + {draw.randrange(99)}?"
    row = columns.row(
        trajectory(draw, draw.randrange(1, 9) if turns is None else turns),
        [{"role": "user", "content": prompt}],
        vocabulary("qwen"),
        THINK_TAGS,
        method="tessy",
        run_fingerprint="0123456789abcdef",
    )
    return {"id": f"r{number}", "prompt": prompt, **row}


def finished(rows, seed=0, **options):
    """A dataset of finished rows."""
    return Dataset.from_list([finished_row(number, seed, **options) for number in range(rows)], features=FEATURES)
