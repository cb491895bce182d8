"""Compare datasets of the same prompts: their rows go in, similarity, lengths, authors and typical words come out.

Follows the paper's section 4.6 and figures 8, 12, 14, 16 and 17, and measures how unlikely a student finds the texts.
Knows nothing of models (a scorer is passed in), files, figures or pages. Needs scikit-learn
(``pip install "tessy-hf[report]"``).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain, combinations
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tessy_hf.errors import DatasetError, SettingsError, TessyError
from tessy_hf.report.statistics import AUTHORS, evenly
from tessy_hf.rows.columns import pieces
from tessy_hf.text import traces
from tessy_hf.text.thinking_format import detect, render
from tessy_hf.text.vocabulary import owners

if TYPE_CHECKING:
    from tessy_hf.text.vocabulary import Vocabulary

QUANTILES = (0.05, 0.5, 0.95)
WORDS = 12
"""How many typical words are reported for each dataset."""

_WORD = re.compile(r"[^\W\d_]{2,}(?:['’][^\W\d_]+)?")
Numbers = npt.NDArray[Any]

Scorer = Callable[[Sequence[int], int], Sequence[float]]
"""Takes token ids and an index; returns the negative log-likelihood in nats of each id from that index on."""


@dataclass(frozen=True)
class Text:
    """One dataset's text for one prompt. Each piece is ``(author, part, text)``; an unknown author is ``""``."""

    prompt: str
    pieces: tuple[tuple[str, str, str], ...]

    def part(self, name: str) -> str:
        """Return the text of one part."""
        return "".join(text for _, part, text in self.pieces if part == name)

    def tokens(self, name: str, vocabulary: Vocabulary) -> tuple[list[int], list[str]]:
        """Return the token ids of one part, and the author of each."""
        own = [(author, len(text)) for author, part, text in self.pieces if part == name]
        encoded = vocabulary.encode(self.part(name))
        places = owners(encoded.offsets, list(accumulate(length for _, length in own)))
        return encoded.ids, [own[at][0] for at in places]


@dataclass
class Side:
    """One dataset's texts in the order of the common prompts, with their token counts."""

    name: str
    texts: list[Text]
    lengths: dict[str, list[int]] = field(default_factory=lambda: {"thinking": [], "answer": []})
    """For each part the number of tokens of each text."""
    authors: Counter[str] = field(default_factory=Counter)
    """Tokens by author."""

    @property
    def by_author(self) -> dict[str, int] | None:
        """The tokens of each author (figure 17), or ``None`` if the author of some is unknown."""
        return None if self.authors[""] else {author: self.authors[author] for author in AUTHORS}

    def tokenize(self, vocabulary: Vocabulary) -> Iterator[list[int]]:
        """Yield the token ids of each text, which are not kept, and count them."""
        for text in self.texts:
            whole: list[int] = []
            for part, lengths in self.lengths.items():
                ids, authors = text.tokens(part, vocabulary)
                lengths.append(len(ids))
                self.authors.update(authors)
                whole += ids
            yield whole


def read(row: Mapping[str, Any]) -> Text | None:
    """Return a row's text, or ``None`` if it has no prompt or no text.

    Rows of the same prompt share the user's last turn, whatever their system prompt. Reads tessy rows and those of
    :data:`tessy_hf.text.traces.FORMATS`.
    """
    trace = traces.read(row)
    spans = pieces(row) if row.get("spans") else []
    cut = tuple((piece.author, piece.part, piece.text) for piece in spans)
    cut = cut or (("", "thinking", trace.thinking), ("", "answer", trace.answer))
    return Text(trace.question, cut) if trace.question and any(text for *_, text in cut) else None


def match(datasets: Mapping[str, Iterable[Mapping[str, Any]]], limit: int) -> list[Side]:
    """Return the texts of the prompts that all datasets have, at most ``limit`` of them, evenly spaced.

    If a prompt has several rows, the first one is taken.

    Raises:
        DatasetError: A dataset has no texts, or the datasets share too few prompts to compare.
    """
    found: dict[str, dict[str, Text]] = {}
    for name, rows in datasets.items():
        texts = found[name] = {}
        for text in filter(None, map(read, rows)):
            texts.setdefault(text.prompt, text)
        if not texts:
            raise DatasetError(
                f"No row of {name!r} has a prompt and a text. Expected are tessy rows, or rows in one of these "
                f"formats: {'; '.join(one.name for one in traces.FORMATS)}. Rename its columns."
            )
    first, *others = found.values()
    shared = [prompt for prompt in first if all(prompt in texts for texts in others)]
    if len(shared) < 3:
        counts = ", ".join(f"{len(texts)} in {name!r}" for name, texts in found.items())
        raise DatasetError(
            f"The datasets share {len(shared)} prompts ({counts}). At least 3 identical prompts are expected. Compare "
            "datasets that were made from the same prompts."
        )
    kept = [shared[at] for at in evenly(len(shared), limit)]
    return [Side(name, [texts[prompt] for prompt in kept]) for name, texts in found.items()]


def analyze(
    datasets: Mapping[str, Iterable[Mapping[str, Any]]], vocabulary: Vocabulary, *, limit: int = 10_000,
    scorer: Scorer | None = None, nll_rows: int = 200, nll_tokens: int = 4096,
) -> dict[str, Any]:  # fmt: skip
    """Compare datasets of the same prompts.

    Args:
        datasets: Two or three datasets by name.
        vocabulary: The student's vocabulary, in whose tokens texts are counted.
        limit: The most prompts to compare (the paper: 10,000).
        scorer: Measures how unlikely the student finds the texts; without one that is left out.
        nll_rows: How many rows of each dataset are scored.
        nll_tokens: How many tokens of prompt and text are scored at most.

    Returns:
        Plain values, ready for JSON. Similarities are cosines of TF-IDF vectors over token counts.

    Raises:
        DatasetError: The datasets share too few prompts, or hold no texts.
        SettingsError: There are not two or three datasets, or a limit is below 3.
        TessyError: scikit-learn is not installed.
    """
    if len(datasets) not in (2, 3) or min(limit, nll_rows, nll_tokens) < 3:
        raise SettingsError(
            f"Got {len(datasets)} datasets with limits {limit}, {nll_rows} and {nll_tokens}. Expected are two or "
            "three datasets with different names, and limits of at least 3."
        )
    sides = match(datasets, limit)
    vectors = tf_idf(sides, vocabulary)
    found: dict[str, Any] = {
        "names": [side.name for side in sides],
        "prompts": len(sides[0].texts),
        "tokenizer": vocabulary.name,
        "similarity": similarities(sides, vectors),
        "pca": principal_components(vectors, len(sides)),
        "tokens": {side.name: _lengths(side) for side in sides},
        "authors": {side.name: side.by_author for side in sides},
        "words": typical_words(sides),
        "nll": None,
    }
    if scorer is not None:
        found["nll"] = {side.name: likelihood(side, vocabulary, scorer, nll_rows, nll_tokens) for side in sides}
    return found


# --- bags of tokens


def tf_idf(sides: Sequence[Side], vocabulary: Vocabulary) -> Any:
    """Return the token counts of all texts as TF-IDF rows of unit length, those of one dataset after the other.

    Raises:
        TessyError: scikit-learn is not installed.
    """
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
    except ImportError as error:
        raise TessyError(
            'Texts are compared with scikit-learn, which is not installed. Run: pip install "tessy-hf[report]"'
        ) from error
    texts = chain.from_iterable(side.tokenize(vocabulary) for side in sides)
    return TfidfVectorizer(analyzer=list).fit_transform(texts).tocsr()


def _by_side(rows: Any, sides: int) -> list[Any]:
    """Cut the rows of all texts into those of each dataset."""
    size = rows.shape[0] // sides
    return [rows[at * size : (at + 1) * size] for at in range(sides)]


def similarities(sides: Sequence[Side], vectors: Any) -> list[dict[str, Any]]:
    """Return for each pair of datasets the mean cosine of texts of the same prompt (appendix A.6) and of others."""
    found = []
    for (left, ours), (right, theirs) in combinations(zip(sides, _by_side(vectors, len(sides)), strict=True), 2):
        same = _cosines(ours, theirs)
        other = _cosines(ours, theirs[np.roll(np.arange(len(same)), 1)])
        names = [left.name, right.name]
        means = {"mean": float(same.mean()), "other_prompts": float(other.mean())}
        found.append({"of": names, **means, "sd": float(same.std())})
    return found


def _cosines(left: Any, right: Any) -> Numbers:
    return np.asarray(left.multiply(right).sum(axis=1)).ravel()


def principal_components(vectors: Any, sides: int) -> dict[str, Any]:
    """Return each text's coordinates on the first two principal components of all texts (figure 8)."""
    from sklearn.decomposition import PCA

    pca = PCA(2, svd_solver="arpack", random_state=0)
    with np.errstate(divide="ignore", invalid="ignore"):  # identical texts have no variance
        places = pca.fit_transform(vectors).round(5)
    explained = np.nan_to_num(pca.explained_variance_ratio_, posinf=0.0)
    points = _by_side(places, sides)
    return {
        "explained": explained.tolist(),
        "points": [side.tolist() for side in points],
        "centres": [side.mean(axis=0).tolist() for side in points],
    }


# --- tokens, authors, words


def _lengths(side: Side) -> dict[str, Any]:
    parts = {part: np.array(lengths) for part, lengths in side.lengths.items()}
    parts["row"] = parts["thinking"] + parts["answer"]
    return {
        part: {"mean": float(lengths.mean()), **{str(q): float(np.quantile(lengths, q)) for q in QUANTILES}}
        for part, lengths in parts.items()
    }


def typical_words(sides: Sequence[Side]) -> dict[str, Any]:
    """Return words typical of each dataset, with their frequency in all of them per thousand words (figure 16).

    The most typical words are those that add most to the Kullback-Leibler divergence from the other datasets.
    """
    from sklearn.feature_extraction.text import CountVectorizer

    counter = CountVectorizer(analyzer=_words)
    per = counter.fit_transform(sides).toarray()
    known = counter.get_feature_names_out()
    smooth = (per + 0.5) / (per + 0.5).sum(axis=1, keepdims=True)
    chosen: list[int] = []
    for at in range(len(sides)):
        others = np.delete(smooth, at, axis=0).mean(axis=0)
        order = np.argsort(-smooth[at] * np.log(smooth[at] / others), kind="stable")
        chosen += [int(place) for place in order if place not in chosen][:WORDS]
    rates = 1000 * per / np.maximum(per.sum(axis=1, keepdims=True), 1)
    return {"words": [known[place] for place in chosen], "per_thousand": rates[:, chosen].round(4).tolist()}


def _words(side: Side) -> Iterable[str]:
    for text in side.texts:
        for part in ("thinking", "answer"):
            yield from (word.group().lower() for word in _WORD.finditer(text.part(part)))


# --- how likely the student finds a text


def likelihood(
    side: Side, vocabulary: Vocabulary, scorer: Scorer, rows: int, most: int
) -> dict[str, dict[str, float]]:
    """Return the negative log-likelihood in nats per token, over all texts and by author and part.

    Each text follows its prompt in the student's own format, as it would be trained on.
    """
    losses: dict[str, list[float]] = {}
    for at in evenly(len(side.texts), rows):
        ids, begins, wrote = _as_trained(side.texts[at], vocabulary)
        for owner, loss in zip(wrote, scorer(ids[:most], begins), strict=False):
            for kind in {"all", owner} - {""}:
                losses.setdefault(kind, []).append(loss)
    return {kind: {"nll": sum(nlls) / len(nlls), "tokens": len(nlls)} for kind, nlls in sorted(losses.items())}


def _as_trained(text: Text, vocabulary: Vocabulary) -> tuple[list[int], int, list[str]]:
    """Return the ids of prompt and text, the index at which the text begins, and the author and part of each token.

    A marker's tokens have the author ``""``.
    """
    thinking_format = detect(vocabulary)
    ids = vocabulary.encode_template(render(vocabulary, thinking_format, [{"role": "user", "content": text.prompt}]))
    begins, wrote = len(ids), list[str]()
    for part, after in (("thinking", thinking_format.close), ("answer", "")):
        own, authors = text.tokens(part, vocabulary)
        marks = vocabulary.encode_template(after)
        ids += own + marks
        wrote += [f"{author}'s {part}" if author else part for author in authors] + [""] * len(marks)
    return ids, begins, wrote
