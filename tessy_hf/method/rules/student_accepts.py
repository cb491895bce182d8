"""The teacher's words stand where the student finds them likely (reverse speculative decoding, arXiv 2509.22230)."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar

from pydantic import Field

from tessy_hf.engines.base import Measure
from tessy_hf.method.chunk import Chunk
from tessy_hf.method.judging import Judge
from tessy_hf.method.likelihood import Likelihood
from tessy_hf.method.row import Row
from tessy_hf.method.rules.base import Rule, Word, WordJudge
from tessy_hf.trajectory import Author


class StudentAccepts(Rule):
    """The teacher proposes; a word that the student finds less likely than ``p`` is written by the student instead.

    So is the end of the thinking.

    Attributes:
        p: The least probability of a word that stands. At 0 all stand, above 1 none.
    """

    name: ClassVar[str] = "student-accepts"
    number: ClassVar[str] = "p"
    keeps_a_word: ClassVar[bool] = False
    p: Annotated[float, Field(ge=0)]

    def needs(self, author: Author) -> frozenset[Measure]:
        """Return what the student's engine must measure."""
        return frozenset(("score",) if author == "student" and 0 < self.p <= 1 else ())

    def judge(self, author: Author, row: Row) -> Judge:
        """Return the rule at work: the student reads the teacher's words, and writes one itself."""
        return _Reader(author, row, self) if author == "teacher" else WordJudge(author, row, self.hands_over)

    def hands_over(self, word: Word) -> bool:
        """Return whether the student has written its word."""
        return word.place >= 1


class _Reader(WordJudge):
    def __init__(self, author: Author, row: Row, rule: StudentAccepts) -> None:
        super().__init__(author, row, rule.hands_over)
        self._p, self._likelihood = rule.p, Likelihood(row)

    async def first_of_other_kind(self, chunk: Chunk) -> int | None:
        """Return the first word that the student refuses, or the place after the last one where it refuses the end."""
        asked = self._next(chunk.complete)
        if not 0 < self._p <= 1:
            return None if self._p == 0 or not (asked or chunk.closed) else asked.start
        least = math.log(self._p)
        for word, logprob in zip(asked, await self._likelihood.words(chunk, asked) if asked else (), strict=True):
            if logprob < least:
                return word
        return chunk.complete if chunk.closed and await self._likelihood.end(chunk) < least else None
