"""What a rule of who writes next is: an author's words go in, the first word that the other is to write comes out."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from pydantic import BaseModel, ConfigDict

from tessy_hf.engines.base import Measure
from tessy_hf.errors import SettingsError
from tessy_hf.method.chunk import LOOKBACK, Chunk
from tessy_hf.method.judging import Judge
from tessy_hf.method.row import Row
from tessy_hf.plan import Plan
from tessy_hf.trajectory import Author

if TYPE_CHECKING:
    from tessy_hf.method.turn import Turn


class Word(NamedTuple):
    """A word that an author wrote.

    Attributes:
        author: Who wrote it.
        text: The word, with the whitespace before it.
        place: Its place in the author's turn, from 0.
        before: The last 256 characters of the thinking before it.
        logprob: The log-probability that its author gave it, where the rule needs it.
        entropy: The largest entropy in nats among its tokens' distributions, where the rule needs it.
    """

    author: Author
    text: str
    place: int
    before: str
    logprob: float | None = None
    entropy: float | None = None


class Rule(BaseModel):
    """A rule and its numbers, which are its fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: ClassVar[str]
    number: ClassVar[str] = ""
    """The field that ``{name: value}`` sets."""
    reads_predictors: ClassVar[bool] = False
    """Whether both authors need a boundary predictor."""
    keeps_a_word: ClassVar[bool] = True
    """Whether an author that took over keeps at least one word."""

    def needs(self, author: Author) -> frozenset[Measure]:
        """Return what the author's engine must measure."""
        return frozenset()

    def check(self, plan: Plan) -> None:
        """Refuse a plan by which the rule cannot work.

        Raises:
            SettingsError: It cannot.
        """
        if not plan.alternates:
            raise SettingsError(
                f"switch={self.name!r} says when authors take turns, which they do not by the method {plan.method!r}. "
                'Pass method="tessy" or "tessy-teacher-answer", or leave switch out.'
            )

    def judge(self, author: Author, row: Row) -> Judge | None:
        """Return the rule at work on an author of a row; ``None`` where that author never hands over."""
        return WordJudge(author, row, self.hands_over)

    def hands_over(self, word: Word) -> bool:
        """Return whether the other author is to write this word."""
        raise NotImplementedError

    async def write(self, turn: Turn, author: Author, row: Row) -> Chunk:
        """Let an author write on; return all of its text that is not settled yet."""
        return await turn.go_on()


class WordJudge(Judge):
    """Judges each word, once it is complete, by a function of that word."""

    def __init__(self, author: Author, row: Row, hands_over: Callable[[Word], bool]) -> None:
        super().__init__()
        self._author, self._row, self._hands_over = author, row, hands_over

    async def first_of_other_kind(self, chunk: Chunk) -> int | None:
        """Return the first word, of those not judged yet, that the other author is to write."""
        asked = self._next(chunk.complete)
        return next((word for word in asked if self._hands_over(self._word(chunk, word))), None)

    def _word(self, chunk: Chunk, word: int) -> Word:
        row, tokens = self._row.trajectory, chunk.tokens(word)
        before = (row.last_text(LOOKBACK) + chunk.upto(word))[-LOOKBACK:]
        logprob = sum(chunk.logprobs[tokens]) if chunk.logprobs else None
        entropy = max(chunk.entropies[tokens]) if chunk.entropies else None
        return Word(self._author, chunk.word(word), row.turn_words + word, before, logprob, entropy)
