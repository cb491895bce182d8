"""The folder that an annotation writes: answers as they come, and the dataset of the accepted ones.

Each answer is on disk before it counts, so a killed run resumes. Knows nothing of models.

* ``style_spans.jsonl``: the accepted segments; ``load_dataset(folder)`` reads it.
* ``answers.jsonl``: every answer, also the rejected ones. Appended to, never rewritten.
* ``annotation.json``: the annotator, instruction, settings and counts. ``README.md``: the same as a dataset card.
"""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from random import Random
from typing import IO, Any

from tessy_hf.boundary_training.agreement import agreement, majority
from tessy_hf.boundary_training.answers import Rejected, locate, parse
from tessy_hf.boundary_training.sampling import Drawn
from tessy_hf.boundary_training.segments import Segment, span_starts
from tessy_hf.boundary_training.settings import AnnotationSettings
from tessy_hf.errors import BoundaryError
from tessy_hf.text.vocabulary import words

log = logging.getLogger(__name__)

PROVENANCE = "annotation.json"
CARD = Path(__file__).with_name("annotation_card.jinja")

_FIELDS = {*Drawn.__dataclass_fields__, "order", "answer", "finished", "error"}


class AnswerLog:
    """All answers, in a JSONL file and by segment. A last line torn by a kill is dropped and asked again.

    Raises:
        BoundaryError: A line before the last is broken.
    """

    def __init__(self, path: Path) -> None:
        self.rows: dict[str, dict[str, Any]] = {}
        lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
        whole = 0
        for number, line in enumerate(lines, 1):
            row = _complete_row(line)
            if row is not None:
                self.rows[row["id"]] = row
                whole += len(line)
            elif number < len(lines):
                raise BoundaryError(
                    f"Line {number} of {path} is broken. Only the last line may be incomplete. Fix or remove the line "
                    "and run again."
                )
        self._file: IO[bytes] = path.open("ab")
        self._file.truncate(whole)

    def __contains__(self, key: str) -> bool:
        """Return whether a segment has an answer; failed requests are asked again."""
        return key in self.rows and self.rows[key]["error"] is None

    def add(self, segment: Drawn, order: int, *, answer: str | None, finished: bool, error: str | None) -> None:
        """Append an answer; it is on disk when this returns."""
        row = {**asdict(segment), "order": order, "answer": answer, "finished": finished, "error": error}
        self._file.write(json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.rows[segment.id] = row
        if len(self.rows) % 100 == 0:
            log.info("%d answers", len(self.rows))

    def close(self) -> None:
        """Close the file; the answers stay readable."""
        self._file.close()


def _complete_row(line: bytes) -> dict[str, Any] | None:
    try:
        row: dict[str, Any] = json.loads(line)
    except ValueError:
        return None
    return row if line.endswith(b"\n") and _FIELDS <= row.keys() else None


def claim(folder: Path, provenance: dict[str, Any]) -> None:
    """Record the annotator, instruction and settings of a folder, or check that they equal those recorded.

    Raises:
        BoundaryError: The folder holds answers of another run.
    """
    provenance = json.loads(json.dumps(provenance, default=str))
    if not (folder / PROVENANCE).is_file():
        _replace(folder / PROVENANCE, json.dumps(provenance, indent=1, ensure_ascii=False) + "\n")
    earlier = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))
    for name, value in provenance.items():
        if earlier.get(name) != value:
            raise BoundaryError(
                f"{folder} holds answers of a run with another {name}: {str(earlier.get(name))[:200]!r}, while this "
                f"run has {str(value)[:200]!r}. Use the same {name} or another folder."
            )


def ballots(drawn: Iterable[Drawn], votes: int) -> Iterator[Drawn]:
    """Repeat each segment for several votes, each with an id of its own."""
    for segment in drawn:
        yield from (replace(segment, id=f"{segment.id}#{n}") for n in range(votes)) if votes > 1 else (segment,)


Collected = tuple[list[dict[str, Any]], dict[str, int], dict[str, float]]


def collect(answers: AnswerLog, settings: AnnotationSettings) -> Collected:
    """Return the marked segments as rows of the dataset, the number of answers by outcome, and their agreement."""
    drawn: dict[str, Mapping[str, Any]] = {}
    votes: dict[str, list[Segment]] = {}
    counts = Counter[str]()
    for answer in sorted(answers.rows.values(), key=lambda answer: int(answer["order"])):
        key = str(answer["id"]).rpartition("#")[0] if settings.votes > 1 else str(answer["id"])
        drawn.setdefault(key, {**answer, "id": key})
        try:
            votes.setdefault(key, []).append(_vote(answer))
            counts["accepted"] += 1
        except Rejected as rejected:
            counts[rejected.fault] += 1
    rows = [_row(drawn[key], said, settings) for key, said in votes.items() if 2 * len(said) > settings.votes]
    agreed = agreement([[vote.style() for vote in said] for said in votes.values()]) if settings.votes > 1 else {}
    return rows, dict(counts), agreed


def _vote(answer: Mapping[str, Any]) -> Segment:
    if answer["error"] is not None:
        raise Rejected("failed")
    if not answer["finished"]:
        raise Rejected("unfinished")
    return Segment(answer["text"], tuple(locate(answer["text"], parse(answer["answer"]))))


def _row(drawn: Mapping[str, Any], votes: Sequence[Segment], settings: AnnotationSettings) -> dict[str, Any]:
    about = {key: drawn[key] for key in ("source_model", "family", "problem_id", "trace_id", "id")}
    spans = majority([vote.style() for vote in votes]) if len(votes) > 1 else votes[0].spans
    segment, begins = _align(Segment(drawn["text"], tuple(spans)), drawn, settings)
    return {**about, "text": segment.text, "style_spans": segment.marked(), "begins": begins}


def write(
    folder: Path, rows: Sequence[dict[str, Any]], counts: Mapping[str, int], agreed: Mapping[str, float]
) -> None:
    """Write the dataset, its counts and its card."""
    from huggingface_hub import DatasetCard, DatasetCardData

    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    _replace(folder / "style_spans.jsonl", "".join(lines))
    provenance = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))
    provenance |= {"counts": dict(counts), "agreement": dict(agreed), "tessy_hf": version("tessy-hf")}
    _replace(folder / PROVENANCE, json.dumps(provenance, indent=1, ensure_ascii=False) + "\n")
    data = DatasetCardData(
        task_categories=["token-classification"],
        tags=["tessy", "boundary-predictor", "reasoning"],
        configs=[{"config_name": "default", "data_files": "style_spans.jsonl"}],
    )
    models = sorted({row["source_model"] for row in rows} - {""})
    card = DatasetCard.from_template(data, template_path=str(CARD), rows=rows, models=models, **provenance)
    _replace(folder / "README.md", str(card))


def _replace(path: Path, text: str) -> None:
    """Write a file completely or not at all."""
    whole = path.with_name(path.name + ".part")
    whole.write_text(text, encoding="utf-8")
    whole.replace(path)


def _align(segment: Segment, drawn: Mapping[str, Any], settings: AnnotationSettings) -> tuple[Segment, str]:
    """Cut a segment to its length, at a span start if it was drawn for that; return it and how it begins."""
    start, begins = 0, "random"
    if drawn["aligned"]:
        places = words(segment.text)
        room = places[-settings.words][1] if len(places) > settings.words else 0
        starts = [place for place in span_starts(segment) if place < room]
        if starts:
            start, begins = Random(f"{settings.seed} {drawn['id']}").choice(starts), "span"
    ends = [start + end for _, end in words(segment.text[start:])]
    end = ends[min(settings.words, len(ends)) - 1] if ends else len(segment.text)  # whitespace has no words
    return segment.part(start, end), begins
