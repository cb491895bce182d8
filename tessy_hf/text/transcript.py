"""One row's text so far, as each model sees it: growing token lists with exact seams between vocabularies.

Text goes in as words are accepted; each list's ids come out ready for its engine. A list is only ever appended to or
cut back at its end, never rebuilt, so a chunk costs the same however long the row is. Knows nothing of authors,
boundaries or engines.
"""

from __future__ import annotations

import re
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tessy_hf.text.vocabulary import CLAUSE_END, Encoding, Vocabulary
from tessy_hf.trajectory import Author

_SEAM = re.compile(rf"(?<=\S)(?=\s+\S)|(?<=\n)(?=[^\S\n]*\S)|(?<=[{CLAUSE_END}])(?=[^\s{CLAUSE_END}])")
"""Where a tail may begin: before or after the line ends before a word, or at a word that no whitespace precedes."""


class Preview(NamedTuple):
    """A token list with more text after it.

    Attributes:
        ids: The list's own ids, of which the first ``begin`` hold.
        begin: The index of the first new id.
        new: The new ids.
        ends: Where each of them ends in the new text (below 0 for the settled word before it).
    """

    ids: array[int]
    begin: int
    new: list[int]
    ends: list[int]

    @property
    def length(self) -> int:
        """How many ids the whole list has."""
        return self.begin + len(self.new)

    def token_at(self, character: int) -> int:
        """Return the index, in the whole list, of the token that holds a character of the new text."""
        return self.begin + min(bisect_right(self.ends, character), len(self.new) - 1)

    def window(self, start: int, stop: int) -> list[int]:
        """Return the ids from ``start`` to ``stop`` of the whole list."""
        old = self.ids[start : min(stop, self.begin)]
        return [*old, *self.new[max(0, start - self.begin) : max(0, stop - self.begin)]]


@dataclass(slots=True)
class Turn:
    """What a list's model has written since others last did.

    Attributes:
        begin: The index of its first id.
        tail: The text before it that a tokenizer may join with it.
        tail_tokens: How many ids the tail has.
        text: What is kept of it.
        respell: Whether that differs from what its ids say.
    """

    begin: int
    tail: str
    tail_tokens: int
    text: str = ""
    respell: bool = False


class TokenList:
    """The token ids of one growing text in one vocabulary.

    The list is ``settled ids`` followed by ``tentative ids``: what an author generated and nobody has judged yet.
    Foreign text is tokenised together with the last settled word, so that the ids equal a tokenisation of the whole
    text wherever that is defined (an author's own ids stay as generated).

    Args:
        vocabulary: The vocabulary of the model that reads the list.
        ids: The ids of the rendered prompt.
        tail: The whitespace that ends the rendered prompt, which a tokenizer may join with the first word.
    """

    __slots__ = ("_tail", "_tail_tokens", "_tentative", "turn", "ids", "start", "vocabulary")

    def __init__(self, vocabulary: Vocabulary, ids: Sequence[int] = (), tail: str = "") -> None:
        self.vocabulary = vocabulary
        self.ids = array("i", ids)
        self.start = len(self.ids)
        self._tentative = 0
        encoded = vocabulary.encode(tail).ids
        exact = len(encoded) > 0 and list(self.ids[-len(encoded) :]) == encoded
        self._tail, self._tail_tokens = (tail, len(encoded)) if exact else ("", 0)
        self._begin_turn()

    def _encode(self, text: str, tail_begins: int) -> Encoding:
        """Encode a tail, which begins at this index, together with what follows."""
        return self.vocabulary.encode(text, self.ids[tail_begins - 1] if tail_begins else None)

    def _begin_turn(self) -> None:
        self.turn = Turn(self.settled, self._tail, self._tail_tokens)

    @property
    def settled(self) -> int:
        """How many ids are settled, the prompt's included."""
        return len(self.ids) - self._tentative

    @property
    def length(self) -> int:
        """How many ids the settled text has, without the prompt's."""
        return self.settled - self.start

    @property
    def turn_tokens(self) -> int:
        """How many ids the model has written since others last did, tentative ones included."""
        return len(self.ids) - self.turn.begin

    @property
    def tentative_tokens(self) -> int:
        """How many ids are tentative."""
        return self._tentative

    # --- what others wrote

    def append(self, text: str) -> None:
        """Settle ``text`` written by another author."""
        if text:
            begin, text = len(self.ids) - self._tail_tokens, self._tail + text
            encoded = self._encode(text, begin)
            del self.ids[begin:]
            self.ids.extend(encoded.ids)
            self._move_seam(text, encoded)
        self._begin_turn()

    def preview(self, text: str) -> Preview:
        """Return what the list would hold after :meth:`append`, without changing it."""
        shift, begin = len(self._tail), self.settled - self._tail_tokens
        encoded = self._encode(self._tail + text, begin)
        ends = [end - shift for _, end in encoded.offsets]
        return Preview(self.ids, begin, encoded.ids, ends)

    def copy_from(self, other: TokenList, turn: Turn) -> None:
        """Take over the ids that another list of the same vocabulary has of a turn, to hand over the very ids."""
        before = slice(turn.begin - turn.tail_tokens, turn.begin)
        if other.ids[before] == self.ids[len(self.ids) - turn.tail_tokens :]:
            self.turn.text = turn.text
            self.ids.extend(other.ids[turn.begin : other.settled])
            self._freeze(self.turn)
            self._begin_turn()
        else:  # ids from before the turn were made anew, maybe the prompt's, which may differ
            self.append(turn.text)

    # --- what the model itself wrote

    def push(self, ids: Sequence[int]) -> None:
        """Add ids that the model just generated, as tentative."""
        self.ids.extend(ids)
        self._tentative += len(ids)

    def tentative(self) -> tuple[str, list[int]]:
        """Return the text of the tentative ids and where each id's text ends in it."""
        return self.vocabulary.read(self.ids[self.settled :])

    def commit(self, text: str, ends: Sequence[int], kept: int, spelled: str) -> None:
        """Settle the first ``kept`` characters of the tentative ``text`` and leave what follows tentative.

        While the model's turn lasts, its ids stay as it made them, so that what it writes next does not depend on when
        its text is settled.

        Args:
            text: The tentative text, from :meth:`tentative`.
            ends: Where each tentative id's text ends, from :meth:`tentative`.
            kept: How many characters to settle; one of ``ends``.
            spelled: The kept text, without the whitespace that the row's first word may begin with.
        """
        self._tentative -= sum(end <= kept for end in ends)
        self.turn.text += spelled
        self.turn.respell |= spelled != text[:kept]

    def cut(self, text: str, ends: Sequence[int], kept: int, spelled: str) -> int:
        """Settle ``kept`` characters of the tentative text, drop the rest, end the model's turn.

        Where whitespace at the row's beginning is not kept, the ids of the turn are made anew.

        Returns:
            How many ids were dropped.
        """
        count = sum(end <= kept for end in ends)
        aligned = ends[count - 1] if count else 0
        dropped = self._tentative - count
        turn = self.turn
        if turn.respell or spelled != text[:kept]:
            turn.text += spelled
            del self.ids[turn.begin :]
            self._tentative, self._tail, self._tail_tokens = 0, turn.tail, turn.tail_tokens
            self.append(turn.text)
        else:
            self.commit(text, ends, aligned, spelled[:aligned])
            self.drop()
            self._freeze(turn)
            turn.text += spelled[aligned:]
            self.append(spelled[aligned:])  # where the cut falls inside a token, the rest of the word is encoded anew
        self._begin_turn()
        return dropped

    def drop(self) -> int:
        """Take all tentative ids back and return how many there were."""
        count = self._tentative
        if count:
            del self.ids[-count:]
        self._tentative = 0
        return count

    # --- the seam

    def _freeze(self, turn: Turn) -> None:
        """Move the seam over the ids that the model itself made in its turn, seen as a whole."""
        begin, text = turn.begin - turn.tail_tokens, turn.tail + turn.text
        encoded = self._encode(text, begin)
        if list(self.ids[begin:]) == encoded.ids:
            self._move_seam(text, encoded)
        elif turn.text:  # sampled ids need not be the tokenizer's choice: they stay, and the seam is after them
            self._tail, self._tail_tokens = "", 0

    def _move_seam(self, text: str, encoded: Encoding) -> None:
        """Let the tail begin at the last place that no token reaches over, whatever may follow."""
        ids, ends = encoded.ids, [end for _, end in encoded.offsets]
        for place in reversed([found.start() for found in _SEAM.finditer(text)]):
            index = bisect_right(ends, place)
            if not self.vocabulary.joins(text[place - 1], text[place]) and 0 < index < len(ids):
                if self.vocabulary.encode(text[place:], ids[index - 1]).ids == ids[index:]:
                    self._tail, self._tail_tokens = text[place:], len(ids) - index
                    return
        self._tail, self._tail_tokens = text, len(ids)


class Transcript:
    """One row's thinking so far: for each author the ids its engine continues, for each reader the ids it reads.

    Args:
        views: Each author's list, holding its rendered prompt.
        readers: The vocabularies of those who only read: the predictors, and the student's to count tokens with. Equal
            ones share a list.
    """

    __slots__ = ("_readers", "views")

    def __init__(self, views: Mapping[Author, TokenList], readers: Iterable[Vocabulary]) -> None:
        self.views = views
        self._readers = {vocabulary.fingerprint: TokenList(vocabulary) for vocabulary in readers}

    def reader(self, vocabulary: Vocabulary) -> TokenList:
        """Return the thinking as one who reads it with ``vocabulary`` does."""
        return self._readers[vocabulary.fingerprint]

    def restore(self, text: str) -> None:
        """Settle text that was written before, for everyone."""
        for token_list in (*self.views.values(), *self._readers.values()):
            token_list.append(text)

    def commit(self, author: Author, text: str, ends: Sequence[int], kept: int, spelled: str) -> None:
        """Settle an author's tentative text up to ``kept`` for everyone. See :meth:`TokenList.commit`."""
        self.views[author].commit(text, ends, kept, spelled)
        self._share(author, spelled)

    def cut(self, author: Author, text: str, ends: Sequence[int], kept: int, spelled: str) -> int:
        """Settle an author's text up to ``kept`` for everyone, drop the rest. See :meth:`TokenList.cut`."""
        own = self.views[author]
        turn = own.turn
        dropped = own.cut(text, ends, kept, spelled)
        self._share(author, spelled)
        for view in self.views.values():
            if view is not own and view.vocabulary.fingerprint == own.vocabulary.fingerprint:
                view.copy_from(own, turn)  # the very ids that the author made
        return dropped

    def _share(self, author: Author, text: str) -> None:
        """Give the text that ``author`` settled to everyone else."""
        own = self.views[author]
        for view in self.views.values():
            if view.vocabulary.fingerprint != own.vocabulary.fingerprint:
                view.append(text)
        for reader in self._readers.values():
            reader.append(text)
