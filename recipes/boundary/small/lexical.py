"""The lexical teacher: a logistic regression that says of each word, from the words around it, if it is style.

It reads both ways, as those who marked the spans did, and learns in seconds. Texts go in, one probability a word comes
out. Knows nothing of tokens and networks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import numpy as np
import scipy.sparse as sparse
from numpy.typing import NDArray
from sklearn.feature_extraction import FeatureHasher
from sklearn.linear_model import LogisticRegression

from tessy_hf.boundary_training.segments import Segment, word_kinds
from tessy_hf.text.vocabulary import words

Probabilities = NDArray[np.float64]

SENTENCE_END = re.compile(r"""[.?!:]["')\]]*$""")
HASHER = FeatureHasher(2**20, input_type="string", alternate_sign=False)
PIECE, MARGIN = 60, 10  # words: long texts are read in such pieces, of which the margins are thrown away
PARTS = 4  # for the second step's features, each part is read by a model that did not learn from it
NEAR = 4  # words before and after whose probabilities the second step sees


class LexicalTeacher:
    """Two steps: words around a word, then these and what the first step says of the neighbours.

    Args:
        both_ways: Whether the words after a word are read too.
    """

    def __init__(self, both_ways: bool = True) -> None:
        self._both_ways = both_ways
        self._first, self._second = _regression(3.0), _regression(1.0)

    def fit(self, segments: Sequence[Segment]) -> LexicalTeacher:
        """Learn from marked segments."""
        features = [self._features(segment.text) for segment in segments]
        kinds = [np.array(word_kinds(segment)) for segment in segments]
        problems = sorted({segment.problem for segment in segments})
        part = {problem: i % PARTS for i, problem in enumerate(problems)}
        said: list[Probabilities] = [np.empty(0)] * len(segments)
        for k in range(PARTS):
            inside = [i for i, segment in enumerate(segments) if part[segment.problem] == k]
            outside = [i for i, segment in enumerate(segments) if part[segment.problem] != k]
            model = _regression(3.0).fit(*_stacked(features, kinds, outside))
            for i in inside:
                said[i] = model.predict_proba(features[i])[:, 1]
        everything, truth = _stacked(features, kinds, range(len(segments)))
        self._first.fit(everything, truth)
        self._second.fit(_second_step(everything, said), truth)
        return self

    def probabilities(self, texts: Sequence[str]) -> list[Probabilities]:
        """Return, for each word of each text, how probable it is that it is style."""
        return [self._read_long(text) for text in texts]

    def _read_long(self, text: str) -> Probabilities:
        places = words(text)
        said = np.zeros(len(places))
        for start in range(0, max(1, len(places) - 2 * MARGIN), PIECE - 2 * MARGIN):
            stop = min(start + PIECE, len(places))
            if start == stop:
                continue
            first = start + MARGIN if start else 0
            said[first:stop] = self._read(text[places[start][0] : places[stop - 1][1]].lstrip())[first - start :]
        return said

    def _read(self, text: str) -> Probabilities:
        features = self._features(text)
        first = self._first.predict_proba(features)[:, 1]
        second = self._second.predict_proba(_second_step(features, [first]))[:, 1]
        return np.asarray((first + second) / 2)

    def _features(self, text: str) -> sparse.csr_matrix:
        rows = _Words(text).features(self._both_ways)
        return HASHER.transform(list(rows))


class _Words:
    """The words of a text, and what is said of each."""

    def __init__(self, text: str) -> None:
        raw = [text[start:end] for start, end in words(text)]
        self.shown = [word.strip() for word in raw]
        self.lines = [word[: len(word) - len(word.lstrip())].count("\n") for word in raw]
        self.plain = [re.sub(r"\d+", "0", word.lower().replace("\u2019", "'")) for word in self.shown]
        self.core = [re.sub(r"^\W+|\W+$", "", word) or word for word in self.plain]
        ends = [bool(SENTENCE_END.search(word)) for word in self.plain]
        starts = [i for i in range(len(raw)) if not i or ends[i - 1] or self.lines[i]]
        self.sentences = [pair for pair in zip(starts, [*starts[1:], len(raw)], strict=True) for _ in range(*pair)]

    def features(self, both_ways: bool) -> Iterator[list[str]]:
        for i, (start, end) in enumerate(self.sentences):
            found = [*self._around(i, both_ways), *self._before(i, start)]
            yield [*found, *self._after(i, start, end)] if both_ways else found

    def _around(self, i: int, both_ways: bool) -> Iterator[str]:
        """Single words, pairs and triples by their distance, with and without their punctuation."""
        last = 5 if both_ways else 0
        for name, kind in (("p", self.plain), ("c", self.core)):
            near = [kind[j] if 0 <= j < len(kind) else "<>" for j in range(i - 4, i + 6)]
            for at in range(-4, last + 1):
                yield f"{name}{at}:{near[at + 4]}"
            for at in range(-3, min(3, last) + 1):
                yield f"{name}{at}:{near[at + 3]} {near[at + 4]}"
        for at in range(-2, min(1, last - 2) + 1):
            yield f"t{at}:{near[at + 4]} {near[at + 5]} {near[at + 6]}"

    def _before(self, i: int, start: int) -> Iterator[str]:
        """How sentence and clause began, and the word's own shape."""
        core, word = self.core, self.shown[i]
        comma = next((j + 1 for j in range(i - 1, start - 1, -1) if self.plain[j].endswith(",")), start)
        yield f"position {min(i - start, 12)}"
        yield f"sentence {' '.join(core[start : i + 1][:6])}"
        yield f"clause {' '.join(core[comma : i + 1][:6])}"
        yield f"clause begins {core[comma]}"
        for length in range(1, 4):
            yield f"begins {' '.join(core[start : start + length]) if i >= start + length - 1 else ''}"
        yield f"{core[i]} after {core[start]}"
        yield f"capital {word[:1].isupper()} {i == start}"
        yield f"lines {min(2, self.lines[start])} {i == start}"
        yield f"digits {any(map(str.isdigit, word))} {i > 0 and any(map(str.isdigit, self.shown[i - 1]))}"
        yield from (f"before {other}" for other in sorted(set(core[start:i])))

    def _after(self, i: int, start: int, end: int) -> Iterator[str]:
        """How the sentence goes on."""
        core, length = self.core, min(15, end - start)
        comma = next((j - i for j in range(i, end) if self.plain[j].endswith(",")), -1)
        yield f"length {length}"
        yield f"length {length} {core[start]}"
        yield f"ends {self.plain[end - 1][-1]}"
        yield f"last {core[end - 1]}"
        yield f"numbers {any(any(map(str.isdigit, word)) for word in self.shown[start:end])}"
        yield f"names {min(3, sum(word[:1].isupper() for word in self.shown[start + 1 : end]))}"
        yield f"comma {min(9, comma)}"
        yield f"whole {' '.join(core[start:end]) if length < 11 else ''}"
        yield from (f"after {other}" for other in sorted(set(core[i + 1 : end])))


def _regression(inverse_penalty: float) -> LogisticRegression:
    return LogisticRegression(C=inverse_penalty, solver="liblinear", dual=True, tol=1e-2, max_iter=60, random_state=0)


def _stacked(
    features: Sequence[sparse.csr_matrix], kinds: Sequence[NDArray[np.bool_]], chosen: Sequence[int]
) -> tuple[sparse.csr_matrix, NDArray[np.bool_]]:
    return sparse.vstack([features[i] for i in chosen]).tocsr(), np.concatenate([kinds[i] for i in chosen])


def _second_step(features: sparse.csr_matrix, said: Sequence[Probabilities]) -> sparse.csr_matrix:
    """Add the log-odds that the first step gives a word and its neighbours."""
    return sparse.hstack([features * 0.5, sparse.csr_matrix(np.vstack([_neighbours(p) for p in said]))]).tocsr()


def _neighbours(said: Probabilities) -> NDArray[np.float64]:
    share = np.clip(said, 1e-3, 1 - 1e-3)
    odds = np.pad(np.log(share / (1 - share)), NEAR, constant_values=-4)
    near = np.stack([odds[at : at + len(said)] for at in range(2 * NEAR + 1)], axis=1)
    before, here, after = near[:, NEAR - 1], near[:, NEAR], near[:, NEAR + 1]
    joint = [here * before / 4, here * after / 4, np.minimum(here, before), np.minimum(here, after)]
    both = [np.maximum(before, after), np.minimum(before, after)]
    return np.column_stack([near, *joint, *both]) / 2
