"""Who writes what in a row, and how it is sampled. Made from the settings of a run; read by the method.

Knows nothing of models, text or files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from tessy_hf.trajectory import Author


class Sampling(NamedTuple):
    """How an author's tokens are drawn; what is ``None`` does not restrict them.

    Attributes:
        temperature: 0 is greedy.
        top_p: Nucleus sampling mass.
        top_k: How many of the most probable tokens to draw from.
        min_p: Least probability of a token, as a share of the most probable one's.
        repetition_penalty: Divides positive logits of tokens that are in the text already, prompt included, and
            multiplies negative ones; above 1 against loops.
    """

    temperature: float = 0.6
    top_p: float = 1.0
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None


@dataclass(frozen=True)
class Plan:
    """How one row is written.

    Attributes:
        method: The name of the data recipe, for errors.
        thinking: ``alternate`` for TESSY, else the one author of the thinking.
        answer: Who writes the final answer.
        chunk_tokens: k, the most tokens asked of an author at once while alternating; ``None`` to follow the lengths
            of its spans; or a number for each author.
        stream: Whether a turn is taken as one stream that is closed at its boundary, where the engine can stream.
        sampling: How each author's tokens are drawn.
        max_thinking_tokens: Thinking budget, in the student's tokens.
        max_answer_tokens: Answer budget, in the answering author's tokens.
        max_tokens: Budget of both together; ``None`` for no other than the two.
        max_candidates: The most candidates to write for the row.
        scored: Whether the teacher scores the candidates (``teacher-score``).
        shows_reference: Whether the student is shown the teacher's answer (``teacher-reference``).
    """

    method: str = "tessy"
    thinking: Literal["alternate", "teacher", "student"] = "alternate"
    answer: Author = "student"
    chunk_tokens: int | Mapping[Author, int] | None = 20
    stream: bool = False
    sampling: Mapping[Author, Sampling] = field(default_factory=lambda: dict(teacher=Sampling(), student=Sampling()))
    max_thinking_tokens: int = 32_768
    max_answer_tokens: int = 8_192
    max_tokens: int | None = None
    max_candidates: int = 1
    scored: bool = False
    shows_reference: bool = False

    @property
    def alternates(self) -> bool:
        """Whether the authors take turns in the thinking."""
        return self.thinking == "alternate"

    @property
    def first_author(self) -> Author:
        """Who begins the thinking: the student, unless the teacher thinks alone."""
        return "teacher" if self.thinking == "teacher" else "student"

    @property
    def writers(self) -> frozenset[Author]:
        """The authors whose engines are asked."""
        return frozenset(("teacher", "student")) if self.alternates else frozenset((self.first_author, self.answer))
