"""Write out the problems of the miniature world (`tessy_hf.demo.world`) in a teacher's or a student's style.

In: a problem and a source of choices. Out: a text cut into labelled pieces. The pieces are ground truth: which words
are style and which are capability is known by construction. Knows nothing of tokenizers, models or training.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Literal

from tessy_hf.demo.world import Problem


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of thinking text of one kind. Every piece but the first opens with its leading space."""

    kind: Literal["style", "capability"]
    text: str


@dataclass(frozen=True, slots=True)
class Style:
    """The phrases with which an author surrounds the steps, in each slot from the most to the least frequent.

    The phrase of rank r has weight 1/r, so that greedy decoding has a clear winner. No phrase is the beginning of
    another one that can stand in its place: where a phrase ends is never in doubt.
    """

    opens: tuple[str, ...]
    """Before the first step."""
    connectives: tuple[str, ...]
    """Before each later step; ``{i}`` is the number of that step, from 2."""
    closes: tuple[str, ...]
    """After the last step."""
    answer: str
    """The final answer; ``{answer}`` stands for its numbers."""


STUDENT_STYLE = Style(
    opens=(
        "okay so",
        "hmm let me see here",
        "alright first",
        "okay let me think about this one",
        "well let us try",
    ),
    connectives=(
        "okay good , and then",
        "wait is that right ? yes so",
        "hmm now",
        "alright checked , so",
        "so next",
        "now we go on with",
    ),
    closes=("okay that is all", "so we are done", "and that looks good to me"),
    answer="the answer is {answer} .",
)

TEACHER_STYLE = Style(
    opens=(
        "we need to compute . ( 1 )",
        "the task requires a direct evaluation . ( 1 )",
        "given the input , proceed stepwise . ( 1 ) we obtain",
    ),
    connectives=(
        ". therefore ( {i} ) we get",
        ". hence , by definition , ( {i} )",
        ". continuing with ( {i} ) gives",
        ". consequently ( {i} ) we obtain",
    ),
    closes=(". this completes the derivation", ". all steps verified", ". no further steps remain"),
    answer="** final : {answer} **",
)


@dataclass(frozen=True, slots=True)
class Text:
    """A solved problem: the thinking as labelled pieces, and the final answer."""

    pieces: tuple[Piece, ...]
    answer: str

    @property
    def thinking(self) -> str:
        """The pieces' texts, concatenated."""
        return "".join(piece.text for piece in self.pieces)


def write(problem: Problem, rng: Random, style: Callable[[], Style] = lambda: STUDENT_STYLE) -> Text:
    """Write the solution of a problem, with correct steps.

    Args:
        problem: What is solved.
        rng: Picks the phrases.
        style: Called once for each style piece and once for the answer; a constant gives a text of one author, a
            random choice a mixed one.
    """
    pieces = [Piece("style", _phrase(style().opens, rng))]
    for number, step in enumerate(problem.steps, start=1):
        if number > 1:
            pieces.append(Piece("style", " " + _phrase(style().connectives, rng).format(i=number)))
        pieces.append(Piece("capability", " " + step))
    pieces.append(Piece("style", " " + _phrase(style().closes, rng)))
    return Text(tuple(pieces), style().answer.format(answer=problem.reference_answer))


def _phrase(phrases: tuple[str, ...], rng: Random) -> str:
    return rng.choices(phrases, weights=[1 / rank for rank in range(1, len(phrases) + 1)])[0]
