"""One row's text so far, as each model sees it: growing token lists with exact seams between vocabularies.

Text goes in as words are accepted; each list's ids come out ready for its engine. A list is only ever appended to or
cut back at its end, never rebuilt, so a chunk costs the same however long the row is. Knows nothing of authors,
boundaries or engines.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tessy_hf.text.growing_ids import GrowingIds
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
        ends: Where each of them ends in the new text, in characters (below 0 for the tail before it).
    """

    ids: GrowingIds
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
    """What a list's model has written since another author last did.

    Attributes:
        begin: The index of its first id.
        tail: The text before it that a token may join with it.
        tail_tokens: How many ids the tail has.
        text: The committed text of the turn.
        trimmed: Whether whitespace that its ids begin with is not part of the text.
    """

    begin: int
    tail: str
    tail_tokens: int
    text: str = ""
    trimmed: bool = False


class TokenList:
    """The token ids of one growing text in one vocabulary.

    The list is committed ids followed by tentative ids: those that the model generated and that may be rolled back.
    Text of others is encoded together with the list's tail, its last word or two, so that the ids equal an encoding of
    the whole text. The ids that the model itself generated stay as they are.

    Args:
        vocabulary: The vocabulary of the model that reads the list.
        ids: The ids of the rendered prompt.
        tail: The end of the rendered prompt, which a tokenizer may join with the first word
            (:meth:`Vocabulary.encode_open`).
    """

    __slots__ = ("_tail", "_tail_tokens", "_tentative", "ids", "start", "turn", "vocabulary")

    def __init__(self, vocabulary: Vocabulary, ids: Sequence[int] = (), tail: str = "") -> None:
        self.vocabulary = vocabulary
        self.ids = GrowingIds(ids)
        self.start = len(self.ids)
        self._tentative = 0
        self._tail, self._tail_tokens = "", 0
        spaces = tail[len(tail.rstrip()) :]
        if not self._open_at(tail) and spaces != tail:
            self._open_at(spaces)
        self._begin_turn()

    def _open_at(self, tail: str) -> bool:
        """Let the tail begin in the prompt's end, if that has the ids of an encoding of it."""
        before = len(self.ids) - len(self.vocabulary.encode(tail).ids)
        encoded = self._encode(tail, max(before, 0))
        exact = bool(encoded.ids) and list(self.ids[-len(encoded.ids) :]) == encoded.ids
        if exact:
            self._move_seam(tail, encoded)
        return exact

    def _encode(self, text: str, begin: int) -> Encoding:
        """Encode the text from an index of the list on."""
        return self.vocabulary.encode(text, self.ids[begin - 1] if begin else None)

    def _begin_turn(self) -> None:
        self.turn = Turn(self.committed, self._tail, self._tail_tokens)

    @property
    def committed(self) -> int:
        """How many ids are committed, the prompt's included."""
        return len(self.ids) - self._tentative

    @property
    def length(self) -> int:
        """How many ids the committed text has, without the prompt's."""
        return self.committed - self.start

    @property
    def turn_tokens(self) -> int:
        """How many ids the model has generated since another author last wrote, tentative ones included."""
        return len(self.ids) - self.turn.begin

    @property
    def tentative_tokens(self) -> int:
        """How many ids are tentative."""
        return self._tentative

    # --- what others wrote

    def append(self, text: str) -> None:
        """Commit ``text`` that another author wrote."""
        if text:
            begin, text = len(self.ids) - self._tail_tokens, self._tail + text
            encoded = self._encode(text, begin)
            self.ids.cut(begin)
            self.ids.extend(encoded.ids)
            self._move_seam(text, encoded)
        self._begin_turn()

    def preview(self, text: str) -> Preview:
        """Return what the list would hold after :meth:`append`, without changing it."""
        shift, begin = len(self._tail), self.committed - self._tail_tokens
        encoded = self._encode(self._tail + text, begin)
        ends = [end - shift for _, end in encoded.offsets]
        return Preview(self.ids, begin, encoded.ids, ends)

    def copy_from(self, other: TokenList, turn: Turn) -> None:
        """Commit the ids of another list's turn: authors of one vocabulary hand over ids, not text.

        Args:
            other: A list of the same vocabulary.
            turn: The turn that ended on it.
        """
        before = slice(turn.begin - turn.tail_tokens, turn.begin)
        if other.ids[before] == self.ids[len(self.ids) - turn.tail_tokens :]:
            self.turn.text = turn.text
            self.ids.extend(other.ids[turn.begin : other.committed])
            self._freeze(self.turn)
            self._begin_turn()
        else:  # ids before the turn changed, too: they may be the prompt's, which is another one here
            self.append(turn.text)

    # --- what the model itself wrote

    def push(self, ids: Sequence[int]) -> None:
        """Add ids that the model just generated, as tentative."""
        self.ids.extend(ids)
        self._tentative += len(ids)

    def tentative(self) -> tuple[str, list[int]]:
        """Return the text of the tentative ids and where each id's text ends in it."""
        return self.vocabulary.read(self.ids[self.committed :])

    def commit(self, ends: Sequence[int], end: int, text: str) -> None:
        """Commit the tentative ids up to a character and leave those after it tentative.

        While the model's turn lasts its ids stay as generated, so that what it writes next does not depend on how
        often its text is committed.

        Args:
            ends: Where each tentative id's text ends, from :meth:`tentative`.
            end: The character; one of ``ends``.
            text: The tentative text up to there, without whitespace that the row begins with.
        """
        self._tentative -= sum(each <= end for each in ends)
        self.turn.text += text
        self.turn.trimmed |= len(text) < end

    def cut(self, ends: Sequence[int], end: int, text: str) -> int:
        """Commit the tentative text up to a character, drop the rest, end the model's turn.

        Args:
            ends: Where each tentative id's text ends, from :meth:`tentative`.
            end: The character, which may be inside a token.
            text: The tentative text up to there, without whitespace that the row begins with.

        Returns:
            How many ids were dropped.
        """
        count = sum(each <= end for each in ends)
        aligned = ends[count - 1] if count else 0
        dropped, turn = self._tentative - count, self.turn
        if turn.trimmed or len(text) < end:
            turn.text += text
            self.ids.cut(turn.begin)
            self._tentative, self._tail, self._tail_tokens = 0, turn.tail, turn.tail_tokens
            self.append(turn.text)
        else:
            self.commit(ends, aligned, text[:aligned])
            self.drop()
            self._freeze(turn)
            turn.text += text[aligned:]
            self.append(text[aligned:])  # the part of a token that is kept has ids of its own
        self._begin_turn()
        return dropped

    def drop(self) -> int:
        """Drop all tentative ids and return how many there were."""
        count = self._tentative
        if count:
            self.ids.cut(len(self.ids) - count)
        self._tentative = 0
        return count

    # --- the seam

    def _freeze(self, turn: Turn) -> None:
        """Move the seam into the ids that the model generated in its turn, where they are an encoding of its text."""
        begin, text = turn.begin - turn.tail_tokens, turn.tail + turn.text
        encoded = self._encode(text, begin)
        if list(self.ids[begin:]) == encoded.ids:
            self._move_seam(text, encoded)
        elif turn.text:  # sampled ids need not be the tokenizer's choice: they stay, and the tail is empty
            self._tail, self._tail_tokens = "", 0

    def _move_seam(self, text: str, encoded: Encoding) -> None:
        """Let the tail begin at the last place that no token can span, whatever text follows."""
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
        """Return the list of those who read the thinking in ``vocabulary``."""
        return self._readers[vocabulary.fingerprint]

    def preview(self, reader: Author, writer: Author, text: str) -> tuple[Preview, int]:
        """Return one author's list with more text of the other's turn after it, and how much of the turn is before.

        Authors of one vocabulary hand over their ids when a turn ends, so the reader lacks the whole turn until then.
        """
        own, view = self.views[writer], self.views[reader]
        before = own.turn.text if own.vocabulary.fingerprint == view.vocabulary.fingerprint else ""
        return view.preview(before + text), len(before)

    def restore(self, text: str) -> None:
        """Commit text of an earlier attempt, in all lists."""
        for token_list in (*self.views.values(), *self._readers.values()):
            token_list.append(text)

    def commit(self, author: Author, ends: Sequence[int], end: int, text: str) -> None:
        """Commit an author's tentative text up to a character, in all lists. See :meth:`TokenList.commit`."""
        self.views[author].commit(ends, end, text)
        self._share(author, text)

    def cut(self, author: Author, ends: Sequence[int], end: int, text: str) -> int:
        """Commit an author's text up to a character in all lists, drop the rest. See :meth:`TokenList.cut`."""
        own = self.views[author]
        turn = own.turn
        dropped = own.cut(ends, end, text)
        self._share(author, text)
        for view in self.views.values():
            if view is not own and view.vocabulary.fingerprint == own.vocabulary.fingerprint:
                view.copy_from(own, turn)
        return dropped

    def _share(self, author: Author, text: str) -> None:
        """Append the text that ``author`` wrote to the lists of other vocabularies and of readers."""
        own = self.views[author]
        for view in self.views.values():
            if view.vocabulary.fingerprint != own.vocabulary.fingerprint:
                view.append(text)
        for reader in self._readers.values():
            reader.append(text)
