"""Read texts with a boundary predictor: texts go in, the probability of style of each token comes out.

Each token is read from the window that the method would read it from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tessy_hf.boundary.predictor import BoundaryPredictor, windows
from tessy_hf.text.vocabulary import Encoding, owners, words

Probabilities = NDArray[np.float64]

UNJUDGED = np.nan
"""The probability of a token without a label: the first one, for predictors with ``label_shift=1``."""


@dataclass(frozen=True, slots=True)
class Reading:
    """A predictor's output for a text.

    Attributes:
        offsets: ``(start, end)`` character offsets of each token.
        style: The probability that each token is style, or :data:`UNJUDGED`.
    """

    offsets: list[tuple[int, int]]
    style: Probabilities

    def words(self, text: str, own_kind: bool) -> list[bool]:
        """Return whether each word is read as style; ``own_kind`` is taken for words that are not judged."""
        shares = (self.style[token] for token in first_tokens(text, self.offsets))
        return [own_kind if np.isnan(share) else bool(share > 0.5) for share in shares]


def first_tokens(text: str, offsets: Sequence[tuple[int, int]]) -> list[int]:
    """Return the index of the token with each word's first letter."""
    ends = np.array([end for _, end in offsets])
    letters = [end - len(text[start:end].lstrip()) for start, end in words(text)]
    return [min(int(at), len(ends) - 1) for at in np.searchsorted(ends, letters, side="right")]


def attribute(text: str, encoding: Encoding, said: Probabilities, label_shift: int, lookahead: int) -> Reading:
    """Attribute the probability at each token, and at ``lookahead`` end tokens, to the tokens that it is about."""
    offsets, ends = encoding.offsets, [end for _, end in words(text)]
    if not lookahead or not ends:
        return Reading(offsets, np.concatenate(([UNJUDGED] * label_shift, said[: len(offsets) - label_shift])))
    places = [*first_tokens(text, offsets), *range(len(offsets), len(offsets) + lookahead)][lookahead:]
    return Reading(offsets, said[[places[min(word, len(ends) - 1)] for word in owners(offsets, ends)]])


def read(predictor: BoundaryPredictor, texts: Sequence[str], batch_size: int = 32) -> list[Reading]:
    """Read texts as the method does, each token from the window that belongs to its position."""
    ahead, end = predictor.lookahead, [predictor.end_id] * predictor.lookahead
    encodings = [predictor.vocabulary.encode(text) for text in texts]
    asked = [
        (text, start, positions[-1] + 1, positions)
        for text, encoding in enumerate(encodings)
        for start, positions in windows(range(len(encoding.ids) + ahead), predictor.window)
    ]
    asked.sort(key=lambda window: window[1] - window[2])  # longest first, so that a batch needs little padding
    said = [np.full(len(encoding.ids) + ahead, UNJUDGED) for encoding in encodings]
    for begin in range(0, len(asked), batch_size):
        batch = asked[begin : begin + batch_size]
        answers = predictor.probabilities([[*encodings[text].ids, *end][start:stop] for text, start, stop, _ in batch])
        for (text, start, _, positions), answer in zip(batch, answers, strict=True):
            said[text][positions] = [answer[p - start] for p in positions]
    return [attribute(*one, predictor.label_shift, ahead) for one in zip(texts, encodings, said, strict=True)]


def is_causal(predictor: BoundaryPredictor, text: str) -> bool:
    """Return whether the labels of the first half of a text are independent of the second half."""
    ids = predictor.vocabulary.encode(text).ids[: predictor.window]
    half = (len(ids) + 1) // 2
    other = [*ids[:half], *ids[:half][: len(ids) - half]]
    said, of_other = (predictor.probabilities([one])[0][:half] for one in (ids, other))
    return bool(np.allclose(said, of_other, rtol=0, atol=1e-5))
