"""Of several candidates for each turn of the teacher, keep the one that the student finds likeliest (Gen-SSD)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from tessy_hf.engines.base import Measure
from tessy_hf.errors import SettingsError
from tessy_hf.method.chunk import Chunk
from tessy_hf.method.likelihood import Likelihood
from tessy_hf.method.row import Row
from tessy_hf.method.rules.every import Count, Every
from tessy_hf.plan import Plan
from tessy_hf.trajectory import Author

if TYPE_CHECKING:
    from tessy_hf.method.turn import Turn


class Likeliest(Every):
    """Turns of some words, as by ``every``; the teacher writes each of its turns several times.

    Attributes:
        candidates: How many times.
        words: How many words a turn has, of both authors or of each.
    """

    name: ClassVar[str] = "likeliest"
    number: ClassVar[str] = "candidates"
    candidates: Annotated[int, Field(ge=2)] = 4
    words: Count | Annotated[dict[Author, Count], Field(min_length=2)] = 20

    def needs(self, author: Author) -> frozenset[Measure]:
        """Return what the student's engine must measure."""
        return frozenset(("score",) if author == "student" else ())

    def check(self, plan: Plan) -> None:
        """Refuse greedy decoding, by which all candidates would be the same."""
        super().check(plan)
        if not plan.sampling["teacher"].temperature:
            raise SettingsError(
                f"At the teacher's temperature=0 all {self.candidates} candidates of switch='likeliest' would be the "
                "same. Pass a higher temperature, for instance temperature=0.6, or another rule."
            )

    async def write(self, turn: Turn, author: Author, row: Row) -> Chunk:
        """Let the teacher write its turn several times; return the candidate that the student finds likeliest."""
        if author == "student":
            return await turn.go_on()
        words, likelihood = self.turn_words(author), Likelihood(row)
        tried = [await turn.candidate(number, words) for number in range(self.candidates)]
        means = [await likelihood.mean(chunk, min(words, chunk.complete)) for chunk, _ in tried]
        chunk, ids = tried[means.index(max(means))]
        turn.choose(ids, sum(len(other) for _, other in tried) - len(ids))
        return chunk
