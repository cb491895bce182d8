"""A miniature world in which the method can be tried on one CPU core.

In: a seed. Out: problems of five families (prompt, steps, answer). `recipes/miniature` writes them out as the texts
that its models are trained on.

All arithmetic is modulo 10, so every number is one digit. The operator ``&`` is a fixed random table: it can be known,
but not derived. It is frequent in the prompts and rare in what the student was trained on, which makes a knowledge gap
that only the teacher can fill.

======  ===========================================  ===========================================
family  prompt                                       steps
======  ===========================================  ===========================================
calc    ``calc 9 + 1 & 6``                           ``9 + 1 = 0``, ``0 & 6 = 0``
dot     ``dot * 1 2 | 3 4``                          ``1 * 3 = 3``, ``2 * 4 = 8``, ``3 + 8 = 1``
max     ``max 3 7 2``                                ``3 over 7 = 7``, ``7 over 2 = 7``
map     ``map 3 7 :: 7 1 :: 1 5 :: 5 3 from 7 > 2``  ``hop 7 1``, ``hop 1 5``
sort    ``sort 5 2 9``                               ``take 2 left 5 9``, ``take 5 left 9``
======  ===========================================  ===========================================

Knows nothing of tokenizers, models or training.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset

FAMILIES = ("calc", "dot", "max", "map", "sort")

# Row a, column b: the value of "a & b". Drawn once at random.
AND_TABLE = (
    "8643220542",
    "9542281572",
    "7289593534",
    "9863174091",
    "2290358968",
    "6868506483",
    "3304436962",
    "2841844493",
    "7553600785",
    "3602673664",
)

# How often "&" occurs in prompts: per operator in calc, per problem in dot.
PROMPT_AND_RATE: Mapping[str, float] = {"calc": 0.2, "dot": 0.5}


@dataclass(frozen=True, slots=True)
class Problem:
    """A prompt, the steps that solve it and the numbers of its answer, separated by single spaces."""

    family: str
    prompt: str
    steps: tuple[str, ...]
    reference_answer: str


def make_problem(family: str, rng: Random, and_rate: float | None = None) -> Problem:
    """Draw a problem.

    Args:
        family: One of `FAMILIES`.
        rng: The source of all choices.
        and_rate: How often ``&`` is used (per operator in calc, per problem in dot); by default as in `prompts`.

    Raises:
        ValueError: The family is not one of `FAMILIES`.
    """
    if family not in FAMILIES:
        raise ValueError(f"No problem family {family!r}. Families: {', '.join(FAMILIES)}.")
    if family in PROMPT_AND_RATE:
        draw = {"calc": _calc, "dot": _dot}[family]
        return draw(rng, PROMPT_AND_RATE[family] if and_rate is None else and_rate)
    return {"max": _max, "map": _map, "sort": _sort}[family](rng)


def prompts(n: int, seed: int = 0, family: str = "calc") -> Dataset:
    """Make a dataset of prompts.

    Row i depends only on (family, seed, i): a longer dataset begins with the shorter one.

    Returns:
        A dataset of n rows with the columns ``id``, ``prompt`` and ``reference_answer``.
    """
    from datasets import Dataset

    problems = [make_problem(family, Random(f"prompts-{family}-{seed}-{i}")) for i in range(n)]
    return Dataset.from_dict(
        {
            "id": [f"{family}-{seed}-{i:06d}" for i in range(n)],
            "prompt": [problem.prompt for problem in problems],
            "reference_answer": [problem.reference_answer for problem in problems],
        }
    )


def verify(row: Mapping[str, Any]) -> bool:
    """Return whether a row finished normally and the numbers of its answer are the reference's.

    Args:
        row: Has ``answer``, ``reference_answer`` and ``finish_reason``.
    """
    numbers = re.findall(r"\d+", row["answer"] or "")
    return bool(row["finish_reason"] == "stop" and numbers == row["reference_answer"].split())


def _operate(a: int, operator: str, b: int) -> int:
    if operator == "&":
        return int(AND_TABLE[a][b])
    return {"+": a + b, "-": a - b, "*": a * b}[operator] % 10


def _digits(rng: Random, n: int) -> list[int]:
    return [rng.randrange(10) for _ in range(n)]


def _numbers(values: Iterable[int]) -> str:
    return " ".join(map(str, values))


def _calc(rng: Random, and_rate: float) -> Problem:
    value, *operands = _digits(rng, rng.randint(3, 6))
    prompt = f"calc {value}"
    steps: list[str] = []
    for operand in operands:
        operator = "&" if rng.random() < and_rate else rng.choice("+-*")
        result = _operate(value, operator, operand)
        prompt += f" {operator} {operand}"
        steps.append(f"{value} {operator} {operand} = {result}")
        value = result
    return Problem("calc", prompt, tuple(steps), str(value))


def _dot(rng: Random, and_rate: float) -> Problem:
    operator = "&" if rng.random() < and_rate else "*"
    n = rng.randint(2, 3)
    left, right = _digits(rng, n), _digits(rng, n)
    steps, total = list[str](), 0
    for i, (a, b) in enumerate(zip(left, right, strict=True)):
        product = _operate(a, operator, b)
        steps.append(f"{a} {operator} {b} = {product}")
        if i > 0:
            steps.append(f"{total} + {product} = {_operate(total, '+', product)}")
        total = _operate(total, "+", product)
    return Problem("dot", f"dot {operator} {_numbers(left)} | {_numbers(right)}", tuple(steps), str(total))


def _max(rng: Random) -> Problem:
    numbers = _digits(rng, rng.randint(3, 5))
    steps, best = list[str](), numbers[0]
    for number in numbers[1:]:
        steps.append(f"{best} over {number} = {max(best, number)}")
        best = max(best, number)
    return Problem("max", f"max {_numbers(numbers)}", tuple(steps), str(best))


def _map(rng: Random) -> Problem:
    cycle = rng.sample(range(10), rng.randint(4, 5))
    links = list(zip(cycle, cycle[1:] + cycle[:1], strict=True))
    start, hops = rng.randrange(len(cycle)), rng.randint(2, 3)
    path = [links[(start + hop) % len(cycle)] for hop in range(hops)]
    shuffled = " :: ".join(f"{a} {b}" for a, b in rng.sample(links, len(links)))
    steps = tuple(f"hop {a} {b}" for a, b in path)
    return Problem("map", f"map {shuffled} from {cycle[start]} > {hops}", steps, str(path[-1][1]))


def _sort(rng: Random) -> Problem:
    numbers = _digits(rng, rng.randint(3, 5))
    steps, left = list[str](), list(numbers)
    while len(left) > 1:
        taken = min(left)
        left.remove(taken)
        steps.append(f"take {taken} left {_numbers(left)}")
    return Problem("sort", f"sort {_numbers(numbers)}", tuple(steps), _numbers(sorted(numbers)))
