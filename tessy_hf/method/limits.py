"""Budgets and degenerate loops: how much of a chunk may be kept, and how the row ends if that is all.

Words go in, a number of words and an ending come out. What is decided depends on the text alone, wherever
chunks end. Knows nothing of engines or predictors.
"""

from __future__ import annotations

from collections import deque
from functools import cache
from math import inf

from tessy_hf.method.chunk import Chunk
from tessy_hf.text.transcript import TokenList
from tessy_hf.text.vocabulary import words
from tessy_hf.trajectory import Ending

WINDOW = 256
"""Words that must repeat for a loop, and how often the text is looked at."""

LONGEST_PERIOD = 64
"""The longest loop that is looked for, in words: it must come round four times."""

LONGEST_WORD = 8_192
"""Characters without the end of a word after which a text counts as a degenerate loop."""

PIECE = 16
"""Characters of the pieces in which a long word is counted: so its count never falls as the word grows."""

SLACK = 8
"""Tokens by which a word in pieces may pass the budget: it has fewer as a whole."""

_MOST_TOKENS_PER_CHARACTER = 4


class LoopDetector:
    """Detect a degenerate loop in one growing text: the last :data:`WINDOW` words only repeat themselves."""

    def __init__(self) -> None:
        self._last: deque[str] = deque(maxlen=WINDOW)
        self._count = 0

    def feed(self, text: str) -> int | None:
        """Read on; return how many characters of ``text`` to keep where a loop is found, else ``None``."""
        for start, end in words(text):
            self._last.append(text[start:end])
            self._count += 1
            if self._count % WINDOW == 0 and _is_loop(list(self._last)):
                return end
        return None


def _is_loop(last: list[str]) -> bool:
    return any(last[period:] == last[:-period] for period in range(1, LONGEST_PERIOD + 1))


class Limits:
    """The limits of one row's thinking.

    Args:
        budget: The most tokens of thinking.
        counter: The row's thinking in the student's tokens.
    """

    def __init__(self, budget: int, counter: TokenList) -> None:
        self._budget, self._counter = budget, counter
        self._loops = LoopDetector()
        self._seen = 0  # words of the author's text that the loop detector has read

    @property
    def tokens_left(self) -> int:
        """How many tokens of the budget are not used by settled text."""
        return self._budget - self._counter.length

    def restore(self, text: str) -> None:
        """Read text that was written before."""
        self._loops.feed(text)

    def settle(self, count: int | None) -> None:
        """Forget the first ``count`` words of the author's text: they are settled. ``None``: the turn is over."""
        self._seen = 0 if count is None else self._seen - count

    def apply(
        self, chunk: Chunk, boundary: int | None, *, waits: bool = False, must_keep: bool = False
    ) -> tuple[int, Ending | None]:
        """Apply loop detector and budget to the words before a boundary.

        Args:
            chunk: The author's text.
            boundary: The first word that is not the author's to write; ``None`` where all are.
            waits: Whether words are judged only when they are complete.
            must_keep: Whether the word before the boundary is the one that made it, and is kept all the same.

        Returns:
            How many words may be kept, and how the row ends if that is all; ``None`` where it goes on.
        """
        if chunk.full:
            return 0, Ending("length", "context")
        kept = chunk.complete if boundary is None else boundary
        seen, self._seen = min(self._seen, kept), kept
        looped = self._loops.feed(chunk.upto(kept)[chunk.size(seen) :])
        if looped is not None:
            stop = chunk.size(seen) + looped
            kept = max(n for n in range(seen, kept + 1) if chunk.size(n) <= stop)
            return self._within_budget(chunk, kept, _stages(chunk, kept - 1), Ending("repetition"))
        if boundary is None:
            judged = chunk.begun - chunk.lookahead if chunk.lookahead else chunk.complete
            return self._within_budget(chunk, kept, _stages(chunk, judged), None)
        at_start = not (waits or must_keep)
        return self._within_budget(chunk, kept, _stages(chunk, boundary - must_keep, at_start=at_start), None)

    def _within_budget(self, chunk: Chunk, kept: int, stages: int, ending: Ending | None) -> tuple[int, Ending | None]:
        """Return how many words fit. The row also ends at a word too long to fit, whoever writes it.

        The text is read in the order in which it was written, so that the chunks make no difference. A word counts
        once it is judged. One that is held or half written ends the row where it cannot fit behind all before it.
        """
        far = self.tokens_left >= _MOST_TOKENS_PER_CHARACTER * len(chunk.text)
        if far and len(chunk.text) <= LONGEST_WORD:
            return kept, ending  # spares the exact count

        @cache
        def left(count: int) -> float:
            if far or not count:
                return inf if far else self.tokens_left
            return self._budget - self._counter.preview(chunk.upto(count)).length

        for stage in range(stages):
            word, begun = divmod(stage, 2)
            judged = max(0, word - chunk.lookahead + (begun and chunk.lookahead > 0))
            if judged and left(judged) < 0:
                return judged - 1, Ending("length", "thinking")
            misfit = self._misfit(chunk.word(word) if begun else chunk.space(word), left(word))
            if misfit is not None:
                return judged, misfit
        over = next((count for count in range(kept) if left(count + 1) < 0), None)
        return (kept, ending) if over is None else (over, Ending("length", "thinking"))

    def _misfit(self, text: str, left: float) -> Ending | None:
        """Return how the row ends at a word, or at white space, that is too long."""
        if text and left < inf and self._pieces(text[:LONGEST_WORD]) > left + SLACK:
            return Ending("length", "word")
        return Ending("repetition") if len(text) > LONGEST_WORD else None

    def _pieces(self, word: str) -> int:
        """Count the tokens of a word's whole pieces."""
        starts = range(0, len(word) - PIECE + 1, PIECE)
        return sum(len(self._counter.vocabulary.encode(word[start : start + PIECE]).ids) for start in starts)


def _stages(chunk: Chunk, word: int, *, at_start: bool = False) -> int:
    """Return how much was written when a word could be judged, as twice a number of words.

    The white space before a word is a stage, and so is the word.

    Args:
        chunk: The author's text.
        word: Which word.
        at_start: Whether, without look-ahead, it is judged by its first letter and not when it is complete.
    """
    if chunk.lookahead:  # until the word so far ahead begins, or the thinking ends
        return 2 * min(word + chunk.lookahead, len(chunk.words)) + 1
    return 2 * word + (1 if at_start else 2)
