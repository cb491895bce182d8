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
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tessy_hf.engines.scoring import surprise
from tessy_hf.errors import DatasetError, SettingsError, TessyError
from tessy_hf.report import heat
from tessy_hf.report.statistics import AUTHORS, evenly
from tessy_hf.report.surprise import markers_by_method, of_set
from tessy_hf.rows.columns import pieces
from tessy_hf.text import traces
from tessy_hf.text.thinking_format import detect, render
from tessy_hf.text.vocabulary import owners

if TYPE_CHECKING:
    from datasets import Dataset

    from tessy_hf.text.vocabulary import Vocabulary

QUANTILES = (0.05, 0.5, 0.95)
WORDS = 12
"""How many typical words are reported for each dataset."""

NLL_TOKENS = 4096
"""The most tokens of prompt and text that are scored, unless one says; what is behind them has no figures."""

_WORD = re.compile(r"[^\W\d_]{2,}(?:['’][^\W\d_]+)?")
Numbers = npt.NDArray[Any]

Scorer = Callable[[Sequence[tuple[Sequence[int], int]]], Sequence[tuple[Sequence[float], Sequence[int]]]]
"""Takes texts, as ids and an index; returns log-probabilities and ranks of the ids of each from that index on."""


@dataclass(frozen=True)
class Text:
    """One dataset's text for one prompt. Each piece is ``(author, part, text)``; an unknown author is ``""``."""

    prompt: str
    pieces: tuple[tuple[str, str, str], ...]
    method: str = ""

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
    found = trace.question and any(text for *_, text in cut)
    return Text(trace.question, cut, row.get("method") or "") if found else None


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
    scorer: Scorer | None = None, nll_rows: int = 200, nll_tokens: int = NLL_TOKENS,
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
        Plain values, ready for JSON. Similarities are cosines of TF-IDF vectors over token counts. ``cut`` in
        ``surprise`` is how many of the scored rows are longer than ``nll_tokens``.

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
        "markers": {side.name: _markers(side) for side in sides},
        "nll": None,
        "surprise": None,
    }
    if scorer is not None:
        scored = {side.name: score(side, vocabulary, scorer, nll_rows, nll_tokens) for side in sides}
        found["nll"] = {name: likelihood(texts) for name, texts in scored.items()}
        found["surprise"] = {name: _surprise(texts) for name, texts in scored.items()}
    return found


def _markers(side: Side) -> dict[str, dict[str, float]]:
    texts: dict[str, list[str]] = {}
    for text in side.texts:
        texts.setdefault(text.method, []).append("".join(piece for *_, piece in text.pieces))
    return markers_by_method(texts)


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


class Scored(NamedTuple):
    """A text under the student: the prompt, and for each token log-probability, rank, and author and part.

    ``cut`` says whether tokens at the end were not scored, because there are too many.
    """

    prompt: str
    logprobs: Sequence[float]
    ranks: Sequence[int]
    wrote: list[str]
    cut: bool


def score(side: Side, vocabulary: Vocabulary, scorer: Scorer, rows: int, most: int) -> list[Scored]:
    """Score evenly spaced texts, each after its prompt in the student's own format, as it would be trained on."""
    texts = [side.texts[at] for at in evenly(len(side.texts), rows)]
    laid = [_as_trained(text, vocabulary) for text in texts]
    scores = scorer([(ids[:most], begins) for ids, begins, _ in laid])
    return [
        Scored(text.prompt, logprobs, ranks, wrote, len(ids) > most)
        for text, (logprobs, ranks), (ids, _, wrote) in zip(texts, scores, laid, strict=True)
    ]


def likelihood(texts: Iterable[Scored]) -> dict[str, dict[str, float]]:
    """Return the negative log-likelihood in nats per token, over all texts and by author and part."""
    losses: dict[str, list[float]] = {}
    for text in texts:
        for owner, logprob in zip(text.wrote, text.logprobs, strict=False):
            for kind in {"all", owner} - {""}:
                losses.setdefault(kind, []).append(-logprob)
    return {kind: {"nll": sum(nlls) / len(nlls), "tokens": len(nlls)} for kind, nlls in sorted(losses.items())}


def _surprise(texts: Sequence[Scored]) -> dict[str, Any]:
    """Return the set's Rank-Surprisal Ratio, how many texts were cut, and ratio, surprisal and rank of each text."""
    each = [(text.prompt, surprise(text.logprobs, text.ranks)) for text in texts]
    rows = [{"prompt": prompt, "rsr": one.rsr, **one._asdict()} for prompt, one in each if one is not None]
    return {**of_set(one for _, one in each), "cut": sum(text.cut for text in texts), "rows": rows}


def with_surprise(
    rows: Dataset, vocabulary: Vocabulary, scorer: Scorer, most: int = NLL_TOKENS
) -> tuple[Dataset, int]:
    """Return a dataset with the columns :data:`tessy_hf.report.heat.COLUMNS` anew, null where a row has no text.

    With it comes the number of rows of which only the first ``most`` tokens, prompt included, were scored.
    """
    texts = list(map(read, rows))
    laid = [_as_trained(text, vocabulary)[:2] if text else ([], 0) for text in texts]
    scores = scorer([(ids[:most], begins) for ids, begins in laid])
    found = [surprise(*one) for one in scores]
    rows = rows.remove_columns([name for name in rows.column_names if name in heat.COLUMNS])
    for name in ("surprisal", "rank", "rsr"):
        rows = rows.add_column(f"student_{name}", [one and getattr(one, name) for one in found])
    each = zip(texts, scores, strict=True)
    rows = rows.add_column(heat.WORDS, [text and _by_word(text, vocabulary, logprobs) for text, (logprobs, _) in each])
    return rows, sum(len(ids) > most for ids, _ in laid)


def _by_word(text: Text, vocabulary: Vocabulary, logprobs: Sequence[float]) -> list[float]:
    found, at = list[float](), 0
    for part, after in _parts(vocabulary):
        encoded = vocabulary.encode(text.part(part))
        found += heat.by_word(text.part(part), encoded.offsets, logprobs[at : at + len(encoded.ids)])
        at += len(encoded.ids) + len(vocabulary.encode_template(after))
    return found


def _parts(vocabulary: Vocabulary) -> tuple[tuple[str, str], ...]:
    """Return the parts of a text, each with the marker that comes after it in training."""
    return ("thinking", detect(vocabulary).close), ("answer", "")


def _as_trained(text: Text, vocabulary: Vocabulary) -> tuple[list[int], int, list[str]]:
    """Return the ids of prompt and text, the index at which the text begins, and the author and part of each token.

    A marker's tokens have the author ``""``.
    """
    thinking_format = detect(vocabulary)
    ids = vocabulary.encode_template(render(vocabulary, thinking_format, [{"role": "user", "content": text.prompt}]))
    begins, wrote = len(ids), list[str]()
    for part, after in _parts(vocabulary):
        own, authors = text.tokens(part, vocabulary)
        marks = vocabulary.encode_template(after)
        ids += own + marks
        wrote += [f"{author}'s {part}" if author else part for author in authors] + [""] * len(marks)
    return ids, begins, wrote
