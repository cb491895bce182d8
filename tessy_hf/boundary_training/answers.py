"""Parse an annotator's answer: quotes of a text go in, the offsets of its style spans come out, or a fault.

Strict on purpose: a guessed span would teach the predictor a boundary that no annotator marked. Knows nothing of
models or files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Literal

Fault = Literal[
    "unfinished", "empty", "not json", "not an array of strings", "empty span", "not verbatim", "inside a word",
    "out of order", "nested", "failed",
]  # fmt: skip
"""Why an answer was rejected. ``failed`` means that the request failed; the next run asks again."""


class Rejected(Exception):  # noqa: N818 - not an error: the answer is counted and the run continues
    """An answer cannot be used.

    Args:
        fault: Why.
    """

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault)
        self.fault: Fault = fault


_FENCE = re.compile(r"```[A-Za-z]*[ \t]*\n(.*)\n[ \t]*```", re.DOTALL)


def parse(answer: str) -> list[str]:
    """Parse a JSON array of strings, alone or in one code fence.

    Raises:
        Rejected: The answer is anything else.
    """
    answer = answer.strip()
    if not answer:
        raise Rejected("empty")
    fence = _FENCE.fullmatch(answer)
    try:
        quotes = json.loads(fence[1] if fence else answer)
    except (ValueError, RecursionError):  # RecursionError: nested too deeply
        raise Rejected("not json") from None
    if not isinstance(quotes, list) or not all(isinstance(quote, str) for quote in quotes):
        raise Rejected("not an array of strings")
    return quotes


def locate(text: str, quotes: Sequence[str]) -> list[tuple[int, int]]:
    """Find quotes in a text: verbatim, as whole words, in order, without overlap. The first match of each counts.

    Raises:
        Rejected: A quote cannot be found like this.
    """
    spans: list[tuple[int, int]] = []
    for quote in (quote.strip() for quote in quotes):
        if not quote:
            raise Rejected("empty span")
        places = [match.start() for match in re.finditer(f"(?={re.escape(quote)})", text)]
        whole = [place for place in places if _is_whole(text, place, place + len(quote))]
        cursor = spans[-1][1] if spans else 0
        start = next((place for place in whole if place >= cursor), None)
        if start is None:
            raise Rejected(_why_not(places, whole, len(quote), spans))
        spans.append((start, start + len(quote)))
    return spans


def _why_not(places: Sequence[int], whole: Sequence[int], length: int, spans: Sequence[tuple[int, int]]) -> Fault:
    if not places:
        return "not verbatim"
    if not whole:
        return "inside a word"
    overlaps = any(place < end and start < place + length for place in whole for start, end in spans[-1:])
    return "nested" if overlaps else "out of order"


def _is_whole(text: str, start: int, end: int) -> bool:
    """Return whether neither end lies inside a word."""
    return not any(0 < at < len(text) and text[at - 1].isalnum() and text[at].isalnum() for at in (start, end))
