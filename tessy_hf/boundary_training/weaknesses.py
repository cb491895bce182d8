"""What a predictor gets wrong: style by kind of phrase, and the worst segments as a page.

Segments and what was read of them go in. The page quotes the segments, so it is for local use where their text may not
be published.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

import numpy as np

from tessy_hf.boundary_training.segments import Mask, Segment

KINDS = {
    "lead-in": r".*:\W*$",
    "verdict": r".*\b(correct|right|good|sense|wrong|perfect|great|fine|okay|ok|done|unexpected|interesting)\W*$",
    "hedge": r".*\b(maybe|perhaps|likely|probably|hmm+|i think|i guess|i believe|seems?|not sure|possibly)\b",
    "opener": r"((so|but|now|then|and|also|okay|wait|first|alternatively|thus|hmm)\W+)*"
    r"(let\b|let's|i\b|i'm|i'll|we\b|we'll|we're|need to|the (user|question|problem)|they)",
    "connective": r"(so|but|and|or|then|now|also|thus|hence|therefore|however|first|next|finally|wait|since|because|"
    r"alternatively|similarly|actually|indeed|instead|again|given|of course|in|for|as|to|on|that|this)\b",
}
"""Kinds of style by their words, the first that fits; what fits none is ``other``."""

_KINDS = {kind: re.compile(pattern, re.IGNORECASE | re.DOTALL) for kind, pattern in KINDS.items()}


def kind_of(text: str) -> str:
    """Return which kind of style a span is, by its words."""
    plain = text.strip().replace("\u2019", "'")
    return next((kind for kind, pattern in _KINDS.items() if pattern.match(plain)), "other")


def by_kind(segments: Sequence[Segment], predicted: Sequence[Mask]) -> dict[str, tuple[int, int, int, int]]:
    """Count characters by the kind of the span that they stand in.

    Returns:
        Of each kind: marked and predicted, all marked; predicted and marked, all predicted.
    """
    counts = {kind: np.zeros(4, dtype=int) for kind in (*KINDS, "other")}
    for segment, said in zip(segments, predicted, strict=True):
        marked = segment.style()
        for column, spans, other in ((0, segment.spans, said), (2, runs(said), marked)):
            for start, end in spans:
                kind = kind_of(segment.text[start:end])
                counts[kind][column : column + 2] += [int(other[start:end].sum()), end - start]
    return {kind: (int(a), int(b), int(c), int(d)) for kind, (a, b, c, d) in counts.items() if b or d}


def runs(mask: Mask) -> list[tuple[int, int]]:
    """Return start and end of each run of true values."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], mask, [False])).astype(np.int8)))
    return [(int(start), int(end)) for start, end in edges.reshape(-1, 2)]


def worst_page(segments: Sequence[Segment], predicted: Sequence[Mask], most: int = 20) -> str:
    """Return an HTML page with the segments in which most characters are wrong: marked green, predicted underlined."""
    wrong = [int((segment.style() ^ said).sum()) for segment, said in zip(segments, predicted, strict=True)]
    order = sorted(range(len(segments)), key=lambda i: -wrong[i])[:most]
    blocks = (
        f"<h2>{html.escape(' · '.join(filter(None, _about(segments[i]))))}: {wrong[i]} characters wrong</h2>"
        f"<p>{_shown(segments[i], predicted[i])}</p>"
        for i in order
    )
    style = "body{font:15px sans-serif;max-width:60em;margin:2em auto}h2{font-size:1em}p{white-space:pre-wrap}"
    style += "mark{background:#bfe8bf}u{text-decoration:underline 3px #d33}"
    head = f"<!doctype html><meta charset=utf-8><title>Worst segments</title><style>{style}</style>"
    return f"{head}<h1>Worst segments</h1><p><mark>marked as style</mark>, <u>predicted</u></p>{''.join(blocks)}\n"


def _about(segment: Segment) -> tuple[str, ...]:
    return segment.key, segment.domain, segment.source_model


def _shown(segment: Segment, said: Mask) -> str:
    """Return the text as HTML."""
    marked = segment.style()
    edges = np.flatnonzero(np.diff(2 * marked.astype(np.int8) + said)) + 1
    shown = []
    for start, end in zip([0, *edges], [*edges, len(segment.text)], strict=True):
        text = html.escape(segment.text[start:end])
        text = f"<u>{text}</u>" if end > start and said[start] else text
        shown.append(f"<mark>{text}</mark>" if end > start and marked[start] else text)
    return "".join(shown)
