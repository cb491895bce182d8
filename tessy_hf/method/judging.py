"""Where an author's kind of text ends: words go in, the first word of the other kind comes out.

A word is judged by the token that holds its first letter, in the text up to the author's token with this letter:
nothing that is written later can change that, so the result does not depend on how the text was cut into chunks. A
predictor with ``label_shift=1`` judges by the token before, which half a word may spell in another way, so it waits
until the word is complete. One with ``lookahead`` judges by the first letter of the word so many words beyond, or by
end tokens where the author wrote no such word before it ended the thinking.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from tessy_hf.boundary.predictor import BoundaryPredictor, windows
from tessy_hf.method.chunk import Chunk
from tessy_hf.text.transcript import Preview, TokenList


class Judge:
    """A rule of who writes next at work on one author of one row. Each word of the author's text is judged once."""

    def __init__(self) -> None:
        self._judged = 0  # words of the author's text that are known to be its own to write

    @property
    def waits(self) -> bool:
        """Whether a word is judged only when it is complete."""
        return True

    @property
    def lookahead(self) -> int:
        """How many words beyond a word must have begun before it is judged."""
        return 0

    async def first_of_other_kind(self, chunk: Chunk) -> int | None:
        """Return the index of the first word, of those not judged yet, that the other author is to write."""
        raise NotImplementedError

    def settle(self, count: int) -> None:
        """Forget the first ``count`` words of the text: they are settled."""
        self._judged = max(0, self._judged - count)

    def restart(self) -> None:
        """Judge the author's text from its first word on."""
        self._judged = 0

    def _next(self, stop: int) -> range:
        """Return the words before ``stop`` that are to be judged now."""
        asked = range(self._judged, max(self._judged, stop))
        self._judged = asked.stop
        return asked


class PredictorJudge(Judge):
    """One author's boundary predictor at work on one row.

    Args:
        predictor: The author's predictor.
        reader: The row's text as the predictor reads it.
        own_kind: Whether the author's kind is style.
    """

    def __init__(self, predictor: BoundaryPredictor, reader: TokenList, *, own_kind: bool) -> None:
        super().__init__()
        self._predictor, self._reader, self._own_kind = predictor, reader, own_kind

    @property
    def waits(self) -> bool:
        """Whether a word is judged only when it is complete."""
        return bool(self._predictor.label_shift or self.lookahead)

    @property
    def lookahead(self) -> int:
        """How many words beyond a word must have begun before it is judged."""
        return self._predictor.lookahead

    async def first_of_other_kind(self, chunk: Chunk) -> int | None:
        """Return the index of the first word, of those not judged yet, that is not the author's kind of text."""
        asked = self._next(chunk.complete if self.waits else chunk.begun)
        if not asked:
            return None
        followed = range(asked.start, min(asked.stop, len(chunk.words) - self.lookahead))
        first, *more = [*self._inputs(chunk, followed), *self._last_inputs(chunk, asked[len(followed) :])]
        if more:  # all at once, for one forward pass
            kinds = await asyncio.gather(*(self._kinds(*one) for one in (first, *more)))
        else:
            kinds = [await self._kinds(*first)]
        return min((word for kind in kinds for word, style in kind.items() if style != self._own_kind), default=None)

    def _inputs(self, chunk: Chunk, asked: range) -> list[tuple[Preview, dict[int, int]]]:
        """Build predictor inputs for words that enough words follow: ``(text, {word: token index})``.

        Words share the text of the last one where a token of that text ends just where the word's own text would;
        else what comes after the word could make a difference, and it gets a text of its own.
        """
        if not asked:
            return []
        shift, ahead = self._predictor.label_shift, self.lookahead
        last = asked[-1] + ahead
        beyond = range(asked.start + ahead, last + 1)
        parts = {i: chunk.upto(i + 1)[chunk.size(i) :] if shift else chunk.opening(i) for i in beyond}
        shared = self._reader.preview(chunk.upto(last) + parts[last])
        token_ends = set(shared.ends)
        inputs: list[tuple[Preview, dict[int, int]]] = [(shared, {})]
        for i, part in parts.items():
            letter = chunk.size(i) + len(part) - len(part.lstrip())
            if i == last or chunk.size(i) + len(part) in token_ends:
                preview, places = inputs[0]
            else:
                preview, places = self._reader.preview(chunk.upto(i) + part), {}
                inputs.append((preview, places))
            places[i - ahead] = preview.token_at(letter) - shift
        return inputs

    def _last_inputs(self, chunk: Chunk, asked: range) -> list[tuple[Preview, dict[int, int]]]:
        """Build the predictor input for the last words of the thinking, judged at end tokens."""
        if not asked:
            return []
        preview = self._reader.preview(chunk.upto(len(chunk.words)))
        end = preview.length - len(chunk.words)
        ended = preview._replace(new=[*preview.new, *[self._predictor.end_id] * self.lookahead])
        return [(ended, {i: end + i + self.lookahead for i in asked})]

    async def _kinds(self, preview: Preview, places: Mapping[int, int]) -> dict[int, bool]:
        """Return whether words are style, from their tokens. Nothing is known of a word that no token precedes."""
        style: dict[int, bool] = {}
        asked = sorted({place for place in places.values() if place >= 0})
        for start, inside in windows(asked, self._predictor.window):
            labels = await self._predictor.labels(preview.window(start, inside[-1] + 1), inside[0] - start)
            style.update((place, labels[place - inside[0]]) for place in inside)
        return {word: style[place] for word, place in places.items() if place >= 0}
