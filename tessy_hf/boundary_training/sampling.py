"""Draw segments from reasoning traces: rows in, pieces of their thinking out, to be marked by an annotator.

What is drawn from a trace depends on the trace and the seed alone, so a rerun draws the same. Lone surrogates, which
no tokenizer and no dataset can hold, become question marks. Knows nothing of models.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from tessy_hf.boundary.traces import thinking
from tessy_hf.vocabulary import words

FEWEST_WORDS = 10
"""Traces with fewer words are passed over."""


class Drawing(BaseModel):
    """What is drawn from the traces."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    words: int = Field(default=60, ge=FEWEST_WORDS)
    """Words in a segment."""
    per_trace: int = Field(default=1, ge=1)
    """Most segments of one trace."""
    aligned_share: float = Field(default=0.5, ge=0, le=1)
    """Share of the segments that shall begin at a span start. The annotator is shown half a segment more of these,
    and the segment is cut to begin at one of the spans marked in it."""
    seed: int = 0
    """Of the draw and of sampling."""
    limit: int | None = Field(default=None, ge=1)
    """Most segments altogether. A rerun may change it."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """A segment drawn from a trace, before anyone marked it.

    Attributes:
        id: Made of the trace and the place in it.
        text: What the annotator is shown.
        aligned: Whether the segment is to be cut to begin at a span start.
        trace_id: The trace.
        problem_id: What the trace is about.
        source_model: The model that wrote it.
        family: That model's family.
    """

    id: str
    text: str
    aligned: bool
    trace_id: str
    problem_id: str
    source_model: str
    family: str


def draw(
    traces: Iterable[Mapping[str, Any]], settings: Drawing, source_model: str = "", family: str = ""
) -> Iterator[Drawn]:
    """Draw segments; ``source_model`` and ``family`` are those of the traces, where the rows do not say."""
    count = 0
    for row in traces:
        text = _unicode(thinking(row) or "")
        places = words(text)
        if len(places) < FEWEST_WORDS:
            continue
        trace = _unicode(row.get("id") or digest(text))
        about = {
            "trace_id": trace,
            "problem_id": _unicode(_problem(row) or trace),
            "source_model": _unicode(row.get("source_model") or source_model),
            "family": _unicode(row.get("family") or family),
        }
        random = Random(f"{settings.seed} {trace}")
        for first, last, aligned in _places(len(places), settings, random):
            if settings.limit is not None and count >= settings.limit:
                return
            count += 1
            start, end = places[first][1] - len(text[slice(*places[first])].lstrip()), places[last - 1][1]
            yield Drawn(f"{trace}:{first}-{last}", text[start:end], aligned, **about)


def _places(length: int, settings: Drawing, random: Random) -> Iterator[tuple[int, int, bool]]:
    """Choose first and last word of the segments of one trace, without overlap."""
    slot = settings.words + settings.words // 2
    slots = list(range(random.randint(0, max(0, min(slot, length - slot))), max(1, length - slot + 1), slot))
    for first in sorted(random.sample(slots, min(settings.per_trace, len(slots)))):
        aligned = random.random() < settings.aligned_share
        shift = 0 if aligned else random.randint(0, max(0, min(slot, length - first) - settings.words))
        first += shift
        yield first, min(length, first + (slot if aligned else settings.words)), aligned


def _problem(row: Mapping[str, Any]) -> str:
    """Return what names the row's problem: its id, or a hash of the question."""
    if row.get("problem_id"):
        return str(row["problem_id"])
    turns = row.get("messages") or row.get("conversations") or []
    asked = [
        turn.get("content", turn.get("value")) for turn in turns if turn.get("role", turn.get("from")) != "system"
    ]
    question = next((row[key] for key in ("problem", "question", "prompt") if row.get(key)), asked[:1])
    return digest(json.dumps(question, sort_keys=True, ensure_ascii=False)) if question else ""


def digest(text: str) -> str:
    """Return a short hash."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _unicode(value: Any) -> str:
    return str(value).encode("utf-8", "replace").decode()
