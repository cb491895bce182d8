"""A chunk: an author's text that is not settled yet, word by word. Knows nothing of engines, kinds or limits."""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tessy_hf.text.vocabulary import words

LOOKBACK = 256
"""Characters of kept text in which the mark of a final answer may begin."""


@dataclass(frozen=True)
class Marks:
    """What ends the thinking of a row as text.

    Attributes:
        ends: End markers that are not tokens of their own; they are not kept.
        final_answer: The mark of the final answer, which is kept.
    """

    ends: tuple[str, ...] = ()
    final_answer: re.Pattern[str] | None = None

    def find(self, text: str, kept: str, stopped: bool) -> int | None:
        """Return how many characters of an author's text are thinking where it has a mark, else ``None``.

        A mark of the final answer counts once a character follows it: it might become longer.
        """
        found = [at for at in map(text.find, self.ends) if at >= 0]
        if self.final_answer is not None:
            before = kept[-LOOKBACK:]
            whole = before + text
            ends = (match.end() for match in self.final_answer.finditer(whole))
            found += [end - len(before) for end in ends if len(before) < end < len(whole) + stopped]
        return min(found, default=None)

    def begun(self, text: str) -> int:
        """Return how many characters at the end of a text may be the beginning of an end marker of several words."""
        several = [mark for mark in self.ends if " " in mark]
        return max((n for mark in several for n in range(len(mark)) if text.endswith(mark[:n])), default=0)


def covering(ends: Sequence[int], start: int, end: int) -> slice:
    """Return the places of the tokens that hold a part of ``text[start:end]``, from where each one's text ends."""
    return slice(bisect_right(ends, start), max(bisect_right(ends, end), bisect_left(ends, end) + 1))


class Chunk(NamedTuple):
    """All that an author wrote and that is neither settled nor rolled back.

    Attributes:
        text: The text, up to the end of thinking.
        ends: Where each token's text ends in it, in characters.
        words: Where each word begins and ends, leading whitespace included.
        begins: The token that holds each word's first letter.
        lead: Characters of whitespace before the row's first word, which are not kept.
        closed: Whether the author ended the thinking after it.
        whole: Whether the author ended its whole answer after it, having no mark for the end of thinking.
        full: Whether the author's context is full, so that it can write no more.
        lookahead: How many words beyond a word must have begun before it is judged; those not judged are held.
        logprobs: The log-probability of each token, where the rule of who writes next needs it.
        entropies: The entropy of the distribution of each token, likewise.
    """

    text: str = ""
    ends: Sequence[int] = ()
    words: Sequence[tuple[int, int]] = ()
    begins: Sequence[int] = ()
    lead: int = 0
    closed: bool = False
    whole: bool = False
    full: bool = False
    lookahead: int = 0
    logprobs: Sequence[float] = ()
    entropies: Sequence[float] = ()

    @classmethod
    def read(
        cls,
        text: str,
        ends: Sequence[int],
        marks: Marks,
        *,
        kept: str,
        stopped: bool,
        whole: bool = False,
        lookahead: int = 0,
    ) -> Chunk:
        """Read generated text.

        Args:
            text: The text of the tokens.
            ends: Where each token's text ends in it.
            marks: What ends the thinking as text.
            kept: The row's text before it; its end is enough.
            stopped: Whether a special token ended the thinking.
            whole: Whether that ends the whole answer.
            lookahead: Words that the author's predictor reads beyond a word.
        """
        cut = marks.find(text, kept, stopped)
        if cut is not None:
            text, stopped, whole = text[:cut], True, False
        elif not stopped:
            text = text.rstrip("\ufffd")  # the last character may lack some of its bytes
            text = text[: len(text) - marks.begun(text)]
        spans = words(text)
        letters = (end - len(text[start:end].lstrip()) for start, end in spans)
        begins = [bisect_right(ends, letter) for letter in letters]
        lead = len(text) - len(text.lstrip()) if not kept and spans else 0
        return cls(text, ends, spans, begins, lead, stopped, stopped and whole, lookahead=lookahead)

    @property
    def complete(self) -> int:
        """How many words have ended: those that whitespace or another word follows, and all at the end of thinking.

        With look-ahead, those that enough words follow.
        """
        if self.lookahead and not self.closed:
            return max(0, self.begun - self.lookahead)
        ended = self.closed or (bool(self.words) and self.words[-1][1] < len(self.text))
        return len(self.words) if ended else max(0, len(self.words) - 1)

    @property
    def begun(self) -> int:
        """How many words have their first letter, in a token that ends in the text."""
        last = len(self.words) - 1
        return last + (last < 0 or self.closed or self.ends[self.begins[last]] <= len(self.text))

    def end(self, count: int) -> int:
        """Return where the first ``count`` words end, in characters of :attr:`text`."""
        return self.words[count - 1][1] if count else 0

    def upto(self, count: int) -> str:
        """Return the text of the first ``count`` words as it is kept."""
        return self.text[self.lead : self.end(count)]

    def size(self, count: int) -> int:
        """Return how many characters :meth:`upto` has."""
        return max(0, self.end(count) - self.lead)

    def word(self, index: int) -> str:
        """Return a word with the whitespace before it; nothing if there is no such word."""
        start = max(self.lead, self.end(index))
        return self.text[start : self.end(index + 1)] if index < len(self.words) else ""

    def space(self, index: int) -> str:
        """Return the white space before a word, or after the last one."""
        text = self.text[self.end(index) :]
        return text[: len(text) - len(text.lstrip())]

    def tokens(self, word: int) -> slice:
        """Return the places of the tokens that hold a part of a word."""
        return covering(self.ends, *self.words[word])

    def opening(self, word: int) -> str:
        """Return a word up to the end of the token with its first letter, which may hold more than the word."""
        return self.text[max(self.lead, self.words[word][0]) : self.ends[self.begins[word]]]

    def tokens_after(self, word: int) -> int:
        """Return how many tokens come after the one with a word's first letter; 0 where there is no such word."""
        return max(0, len(self.ends) - self.begins[word] - 1) if word < len(self.words) else 0

    def aligned(self, count: int) -> int:
        """Return how many of the first ``count`` words can be settled: up to a word end that is a token end too."""
        token_ends = set(self.ends)
        return next((n for n in range(count, 0, -1) if self.words[n - 1][1] in token_ends), 0)
