"""Hand over to the teacher where the student is uncertain (as R2R, Co-LLM and entropy routers do)."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from tessy_hf.engines.base import Measure
from tessy_hf.method.rules.base import Rule, Word
from tessy_hf.trajectory import Author


class Entropy(Rule):
    """The student writes until it is uncertain of a word; the teacher goes on for some words.

    Attributes:
        threshold: The uncertainty in nats above which the student hands over.
        words: How many words the teacher then writes.
        measure: ``entropy``, the largest among the word's tokens, over the whole vocabulary; or ``surprise``, the
            negative log-probability of the word, which vLLM's servers tell too.
    """

    name: ClassVar[str] = "entropy"
    number: ClassVar[str] = "threshold"
    threshold: Annotated[float, Field(ge=0)]
    words: Annotated[int, Field(ge=1)] = 10
    measure: Literal["entropy", "surprise"] = "entropy"

    def needs(self, author: Author) -> frozenset[Measure]:
        """Return what the student's engine must measure."""
        needed: Measure = "entropies" if self.measure == "entropy" else "logprobs"
        return frozenset({needed} if author == "student" else ())

    def hands_over(self, word: Word) -> bool:
        """Return whether the student is uncertain, or the teacher's turn is over."""
        if word.author == "teacher":
            return word.place >= self.words
        measured = word.entropy if self.measure == "entropy" else word.logprob
        assert measured is not None, "the engine measures it"
        return abs(measured) > self.threshold
