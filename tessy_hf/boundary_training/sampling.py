"""Draw segments from reasoning traces: rows go in, pieces of their thinking come out, for an annotator to mark.

What is drawn from a trace depends on the trace and the seed alone, so a rerun draws the same. Lone surrogates, which
neither tokenizers nor datasets can hold, become question marks. Knows nothing of models.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

from tessy_hf.boundary_training.settings import FEWEST_WORDS, AnnotationSettings
from tessy_hf.text.traces import Trace, read
from tessy_hf.text.vocabulary import words


@dataclass(frozen=True, slots=True)
class Drawn:
    """A segment drawn from a trace, not marked yet.

    Attributes:
        id: The trace's id and the segment's words in it.
        text: The text that the annotator is shown.
        aligned: Whether the segment will be cut to begin at a span start.
        trace_id: The trace.
        problem_id: The problem that the trace is about.
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
    traces: Iterable[Mapping[str, Any]], settings: AnnotationSettings, source_model: str = "", family: str = ""
) -> Iterator[Drawn]:
    """Draw segments; ``source_model`` and ``family`` hold for traces whose rows do not state them.

    Raises:
        DatasetError: The rows are of no known format.
    """
    count = 0
    for row in traces:
        found = read(row)
        text = _unicode(found.thinking)
        places = words(text)
        if len(places) < FEWEST_WORDS:
            continue
        trace = _unicode(row.get("id") or row.get("id_ddm") or digest(text))
        about = {
            "trace_id": trace,
            "problem_id": _unicode(_problem(row, found) or trace),
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


def _places(length: int, settings: AnnotationSettings, random: Random) -> Iterator[tuple[int, int, bool]]:
    """Choose the first and last words of one trace's segments, without overlap, and whether each is aligned."""
    slot = settings.words + settings.words // 2
    slots = list(range(random.randint(0, max(0, min(slot, length - slot))), max(1, length - slot + 1), slot))
    for first in sorted(random.sample(slots, min(settings.per_trace, len(slots)))):
        aligned = random.random() < settings.aligned_share
        shift = 0 if aligned else random.randint(0, max(0, min(slot, length - first) - settings.words))
        first += shift
        yield first, min(length, first + (slot if aligned else settings.words)), aligned


def _problem(row: Mapping[str, Any], trace: Trace) -> str:
    """Return the id of the row's problem, or a hash of its question."""
    return str(row.get("problem_id") or (digest(trace.question) if trace.question else ""))


def digest(text: str) -> str:
    """Return a short hash."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _unicode(value: Any) -> str:
    return str(value).encode("utf-8", "replace").decode()
