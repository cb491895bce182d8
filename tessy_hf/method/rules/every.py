"""Hand over every n words: the control that shows what another rule is worth."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from tessy_hf.method.rules.base import Rule, Word
from tessy_hf.trajectory import Author

Count = Annotated[int, Field(ge=1)]


class Every(Rule):
    """Hand over after a number of words.

    Attributes:
        words: How many words a turn has, of both authors or of each: ``{"teacher": 20, "student": 5}``.
    """

    name: ClassVar[str] = "every"
    number: ClassVar[str] = "words"
    words: Count | Annotated[dict[Author, Count], Field(min_length=2)]

    def turn_words(self, author: Author) -> int:
        """Return how many words an author's turn has."""
        return self.words if isinstance(self.words, int) else self.words[author]

    def hands_over(self, word: Word) -> bool:
        """Return whether the turn has all its words."""
        return word.place >= self.turn_words(word.author)
