"""How likely the student finds what the teacher is writing: words go in, natural logarithms of probabilities come out.

A word is read in the text up to its end, in the student's own tokens, so that its probability does not depend on how
the text was cut into chunks; it is the product over the tokens that hold a part of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from tessy_hf.method.chunk import Chunk, covering
from tessy_hf.method.row import Row
from tessy_hf.text.transcript import Preview


class Likelihood:
    """The student as a reader of the teacher's text in one row."""

    def __init__(self, row: Row) -> None:
        self._row, self._student = row, row.speakers["student"]

    async def words(self, chunk: Chunk, asked: range) -> list[float]:
        """Return the log-probability of each of some words of the teacher's chunk."""
        last, found = asked[-1], []
        shared, lead = self._read(chunk.upto(last + 1))
        begin = covering(shared.ends, lead + chunk.size(asked[0]), lead + chunk.size(last + 1)).start
        logprobs, token_ends = await self._score(shared, begin), set(shared.ends)
        for word in asked:
            start, end = lead + chunk.size(word), lead + chunk.size(word + 1)
            if word == last or end in token_ends:
                own = covering(shared.ends, start, end)
                found.append(sum(logprobs[own.start - begin : own.stop - begin]))
            else:  # what comes after it is in its last token, so it is read alone
                alone, _ = self._read(chunk.upto(word + 1))
                found.append(sum(await self._score(alone, covering(alone.ends, start, end).start)))
        return found

    async def end(self, chunk: Chunk) -> float:
        """Return the log-probability that the thinking ends after all words of the teacher's chunk."""
        text, (before, marker) = chunk.upto(len(chunk.words)), self._student.closing
        preview, lead = self._read(text + before)
        begin = covering(preview.ends, lead + len(text), lead + len(text) + len(before)).start
        return sum(await self._score(preview, begin if before else len(preview.new), marker[:1]))

    async def mean(self, chunk: Chunk, count: int) -> float:
        """Return the mean log-probability of the student's tokens for a chunk's first words, its end included."""
        ended = chunk.closed and count == len(chunk.words)
        before, marker = self._student.closing if ended else ("", [])
        preview, lead = self._read(chunk.upto(count) + before)
        begin = covering(preview.ends, lead, lead + 1).start if preview.ends and preview.ends[-1] > lead else None
        logprobs = await self._score(preview, len(preview.new) if begin is None else begin, marker[:1])
        return sum(logprobs) / len(logprobs) if logprobs else -math.inf

    def _read(self, text: str) -> tuple[Preview, int]:
        return self._row.transcript.preview("student", "teacher", text)

    async def _score(self, preview: Preview, begin: int, more: Sequence[int] = ()) -> list[float]:
        """Return log-probabilities of a preview's new ids from an index on, and of more ids after them."""
        ids = [*preview.new[begin:], *more]
        if not ids:
            return []
        before, prompt = preview.window(0, preview.begin + begin), self._row.prompt
        scores = await self._student.engine.score(before, ids, row=prompt.key, order=prompt.order)
        return scores.logprobs
