"""Let a model mark style spans: reasoning traces go in, segments with marked spans come out, as a dataset on disk.

Segments are drawn from the thinking of traces, any engine is asked for the style spans in each (the paper's table 2),
and what it answers is read strictly: an answer that is not a JSON array of stretches of the segment, verbatim and in
order, is counted by its fault and rejected. Each answer is on disk before the next counts, so a killed run goes on
where it stopped.

In the folder that is written:

* ``style_spans.jsonl``: the accepted segments; ``load_dataset(folder)`` reads it.
* ``answers.jsonl``: every answer as it came, also the rejected ones. Appended to, never rewritten.
* ``annotation.json``: who was asked what and how, and the counts. ``README.md``: the same as a dataset card.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import threading
from collections import Counter
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from random import Random
from typing import IO, Any, NamedTuple

from jinja2 import Environment, StrictUndefined, TemplateError
from pydantic import Field, ValidationError

from tessy_hf.boundary_training.answers import Rejected, locate, parse
from tessy_hf.boundary_training.sampling import Drawing, Drawn, digest, draw
from tessy_hf.boundary_training.segments import Segment, span_starts
from tessy_hf.dialects import Dialect, detect
from tessy_hf.engines.base import Request, derive_seed
from tessy_hf.errors import BoundaryError, RequestError, SettingsError
from tessy_hf.errors import TemplateError as ChatTemplateError
from tessy_hf.method.alternation import synthesize
from tessy_hf.method.speaker import Speaker
from tessy_hf.plan import Plan
from tessy_hf.trajectory import Message, Prompt
from tessy_hf.vocabulary import Vocabulary, words

log = logging.getLogger(__name__)

PROMPT = Path(__file__).with_name("annotation_prompt.jinja")
CARD = Path(__file__).with_name("annotation_card.jinja")


class AnnotationSettings(Drawing):
    """What is drawn from the traces and how the annotator is asked."""

    temperature: float = Field(default=0.0, ge=0)
    """The annotator's sampling temperature."""
    max_thinking_tokens: int = Field(default=4096, ge=1)
    """How long an annotator that thinks may think."""
    max_answer_tokens: int = Field(default=1024, ge=1)
    """How long its answer may be."""
    prompt: str | None = None
    """A Jinja file with another instruction, in which ``text`` stands for the segment."""

    rows_in_flight: int = Field(default=64, ge=1)
    """Segments asked at the same time. A rerun may change it."""

    @classmethod
    def check(cls, **given: Any) -> AnnotationSettings:
        """Check settings given by name.

        Raises:
            SettingsError: A name is unknown or a value is out of range.
        """
        try:
            return cls(**given)
        except ValidationError as error:
            fault = error.errors()[0]
            raise SettingsError(
                f"The annotation setting {fault['loc'][0]}={fault['input']!r} cannot be used: {fault['msg'].lower()}. "
                f"Known settings: {', '.join(cls.model_fields)}."
            ) from error


class Annotations(NamedTuple):
    """What :func:`annotate` wrote.

    Attributes:
        folder: The dataset.
        rows: The accepted segments, as rows of the dataset; :func:`tessy_hf.boundary_training.train.train_boundary` takes them.
        counts: How many answers were ``accepted``, or rejected for which fault.
    """

    folder: Path
    rows: list[dict[str, Any]]
    counts: dict[str, int]


def annotate(
    traces: Iterable[Mapping[str, Any]],
    annotator: Speaker,
    out: str | Path,
    *,
    source_model: str = "",
    family: str = "",
    **settings: Any,
) -> Annotations:
    """Draw segments from traces and let a model mark the style spans in them.

    Args:
        traces: Rows with thinking (:func:`tessy_hf.boundary.traces.thinking` says where it is looked for), for
            instance a streaming dataset. ``id``, ``problem_id``, ``source_model`` and ``family`` are kept.
        annotator: The model to ask; its engine is started here, and closed at the end. If its chat template leaves
            thinking open it may think first, else it is asked for the answer directly.
        out: The folder to write. A folder of an earlier run with the same settings is continued.
        source_model: The model that wrote the traces, where the rows do not say.
        family: That model's family, where the rows do not say.
        **settings: See :class:`AnnotationSettings`.

    Raises:
        SettingsError: A setting is unknown or out of range, or the prompt file cannot be used.
        BoundaryError: The folder holds a run with other settings, or a broken file.
        EngineDeadError: The engine is gone; what was answered is kept.
    """
    chosen = AnnotationSettings.check(**settings)
    instruction = _instruction(chosen)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    _claim(folder, _provenance(annotator, chosen, instruction))
    drawn = draw(traces, chosen, source_model, family)
    answers = _Answers(folder / "answers.jsonl")
    try:
        _run(_ask_all(drawn, annotator, instruction, chosen, answers))
    finally:
        answers.close()
        rows, counts = _collect(answers, chosen)
        _write(folder, rows, counts)
    return Annotations(folder, rows, counts)


# --- asking


def _instruction(settings: AnnotationSettings) -> str:
    path = Path(settings.prompt) if settings.prompt else PROMPT
    try:
        source = path.read_text(encoding="utf-8")
        probe = _render(source, "PROBE")
    except (OSError, UnicodeDecodeError, TemplateError) as error:
        raise SettingsError(f"The prompt {str(path)!r} cannot be used: {error}. A Jinja file is expected.") from error
    if "PROBE" not in probe:
        raise SettingsError(f"The prompt {str(path)!r} never shows the segment. Write {{{{ text }}}} where it goes.")
    return source


def _render(instruction: str, text: str) -> str:
    return Environment(undefined=StrictUndefined, autoescape=False).from_string(instruction).render(text=text)


async def _ask_all(
    drawn: Iterable[Drawn], annotator: Speaker, instruction: str, settings: AnnotationSettings, answers: _Answers
) -> None:
    """Ask for all segments that have no answer yet, some at a time; each answer is kept as it comes."""
    waiting: set[asyncio.Task[None]] = set()
    await annotator.engine.start()
    try:
        for order, segment in enumerate(drawn):
            if segment.id in answers:
                continue
            if len(waiting) >= settings.rows_in_flight:
                done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
            asked = [{"role": "user", "content": _render(instruction, segment.text)}]
            prompt = Prompt(segment.id, asked, seed=derive_seed(settings.seed, segment.id), order=order)
            waiting.add(asyncio.create_task(_keep(segment, prompt, annotator, settings, answers)))
        await asyncio.gather(*waiting)
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        await annotator.engine.close()


async def _keep(
    segment: Drawn, prompt: Prompt, annotator: Speaker, settings: AnnotationSettings, answers: _Answers
) -> None:
    try:
        answer, finished = await ask(annotator, prompt, settings)
        answers.add(segment, prompt.order, {"answer": answer, "finished": finished, "error": None})
    except RequestError as error:
        answers.add(segment, prompt.order, {"answer": None, "finished": False, "error": str(error)})
    finally:
        annotator.engine.release(prompt.key)


async def ask(annotator: Speaker, prompt: Prompt, settings: AnnotationSettings) -> tuple[str, bool]:
    """Ask a model; return its answer, without thinking, and whether it came to an end.

    Raises:
        RequestError: The engine failed for good at this request.
        EngineDeadError: The engine is gone.
    """
    engine = annotator.engine
    vocabulary, dialect = _tongue(annotator, prompt.messages)
    if dialect is not None:
        plan = Plan(
            thinking="teacher",
            answer="teacher",
            temperature=settings.temperature,
            max_thinking_tokens=settings.max_thinking_tokens,
            max_answer_tokens=settings.max_answer_tokens,
        )
        row = await synthesize(prompt, annotator, annotator, plan)
        if row.finish_reason == "error":
            raise RequestError(str(row.error))
        return row.text("answer"), row.finish_reason == "stop"
    text = vocabulary.chat_text(prompt.messages, add_generation_prompt=True, **annotator.template_options)
    ids = vocabulary.encode_template(text)
    completion = await engine.complete(
        Request(
            row=prompt.key,
            order=prompt.order,
            part="answer",
            prompt_ids=ids,
            max_tokens=max(1, min(settings.max_answer_tokens, engine.context_length - len(ids))),
            temperature=settings.temperature,
            top_p=1.0,
            seed=prompt.seed,
            stop_ids=vocabulary.special_ids,
        )
    )
    return vocabulary.decode(completion.token_ids).strip(), completion.stop_id is not None


def _tongue(annotator: Speaker, messages: Sequence[Message]) -> tuple[Vocabulary, Dialect | None]:
    """Return the annotator's vocabulary, and its dialect if its chat template leaves thinking open."""
    tokenizer = annotator.engine.tokenizer
    if annotator.chat_template is not None:
        tokenizer.chat_template = annotator.chat_template
    vocabulary = Vocabulary(tokenizer, annotator.engine.model)
    try:
        dialect = detect(vocabulary)
    except ChatTemplateError:
        return vocabulary, None
    options = annotator.template_options
    closed = vocabulary.chat_text(messages, add_generation_prompt=False, **options)
    opened = vocabulary.chat_text(messages, add_generation_prompt=True, **options).removeprefix(closed)
    return vocabulary, None if dialect.end_marker in opened else dialect


def _run(work: Coroutine[Any, Any, None]) -> None:
    """Run to the end, also where this thread's event loop runs already (notebooks)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        asyncio.run(work)
        return
    failed: list[BaseException] = []

    def there() -> None:
        try:
            asyncio.run(work)
        except BaseException as error:  # noqa: BLE001 - carried over to the caller
            failed.append(error)

    thread = threading.Thread(target=there, name="tessy-annotate")
    thread.start()
    thread.join()
    if failed:
        raise failed[0]


def _align(segment: Segment, drawn: Mapping[str, Any], settings: AnnotationSettings) -> tuple[Segment, str]:
    """Cut a segment to its length, beginning at a span start if it is to; return it and how it begins."""
    start, begins = 0, "random"
    if drawn["aligned"]:
        places = words(segment.text)
        room = places[-settings.words][1] if len(places) > settings.words else 0
        starts = [place for place in span_starts(segment) if place < room]
        if starts:
            start, begins = Random(f"{settings.seed} {drawn['id']}").choice(starts), "span"
    ends = [start + end for _, end in words(segment.text[start:])]
    end = ends[min(settings.words, len(ends)) - 1] if ends else len(segment.text)  # white space has no words
    return segment.part(start, end), begins


# --- the folder


_FIELDS = {*Drawn.__dataclass_fields__, "order", "answer", "finished", "error"}


class _Answers:
    """The answers so far, on disk. A last line torn by a kill is dropped; its segment is asked again."""

    def __init__(self, path: Path) -> None:
        self.rows: dict[str, dict[str, Any]] = {}
        whole = 0
        content = path.read_bytes() if path.is_file() else b""
        for number, line in enumerate(content.splitlines(keepends=True), 1):
            row = self._read(line)
            if row is None and whole + len(line) < len(content):
                raise BoundaryError(
                    f"Line {number} of {path} is broken, and lines follow it. Only the last line may be torn; "
                    "mend or remove the line, and run again."
                )
            if row is None:
                break
            whole += len(line)
            self.rows[row["id"]] = row
        self._file: IO[bytes] = path.open("r+b" if content else "wb")
        self._file.truncate(whole)
        self._file.seek(whole)

    @staticmethod
    def _read(line: bytes) -> dict[str, Any] | None:
        try:
            row: dict[str, Any] = json.loads(line)
        except ValueError:
            return None
        whole = line.endswith(b"\n") and _FIELDS <= row.keys()
        return row if whole else None

    def __contains__(self, key: str) -> bool:
        return key in self.rows and self.rows[key]["error"] is None

    def add(self, segment: Drawn, order: int, answer: dict[str, Any]) -> None:
        """Keep an answer; it is on disk when this returns."""
        row = {**asdict(segment), "order": order, **answer}
        self._file.write(json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.rows[segment.id] = row
        if len(self.rows) % 100 == 0:
            log.info("%d answers", len(self.rows))

    def close(self) -> None:
        self._file.close()


def _provenance(annotator: Speaker, settings: AnnotationSettings, instruction: str) -> dict[str, Any]:
    return {
        "annotator": annotator.engine.identity,
        "chat_template": annotator.chat_template and digest(annotator.chat_template),
        "template_options": annotator.template_options,
        "settings": settings.model_dump(exclude={"limit", "rows_in_flight", "prompt"}),
        "instruction": instruction,
    }


def _claim(folder: Path, provenance: dict[str, Any]) -> None:
    """Write what the folder's answers are to, or check that it is the same.

    Raises:
        BoundaryError: It is not.
    """
    path = folder / "annotation.json"
    provenance = json.loads(json.dumps(provenance, default=str))
    if not path.is_file():
        _replace(path, json.dumps(provenance, indent=1, ensure_ascii=False) + "\n")
        return
    earlier = json.loads(path.read_text(encoding="utf-8"))
    for name, value in provenance.items():
        if earlier.get(name) != value:
            raise BoundaryError(
                f"{folder} holds answers of a run with another {name}: {str(earlier.get(name))[:200]!r} where this "
                f"one has {str(value)[:200]!r}. Use the same, or another folder."
            )


def _collect(answers: _Answers, settings: AnnotationSettings) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Read all answers; return the rows of the dataset and how many were accepted or rejected for which fault."""
    rows, counts = [], Counter[str]()
    for answer in sorted(answers.rows.values(), key=lambda answer: int(answer["order"])):
        try:
            rows.append(_row(answer, settings))
            counts["accepted"] += 1
        except Rejected as rejected:
            counts[rejected.fault] += 1
    return rows, dict(counts)


def _row(answer: Mapping[str, Any], settings: AnnotationSettings) -> dict[str, Any]:
    """Turn an answer into a row of the dataset.

    Raises:
        Rejected: It cannot be used.
    """
    if answer["error"] is not None:
        raise Rejected("failed")
    if not answer["finished"]:
        raise Rejected("unfinished")
    spans = locate(answer["text"], parse(answer["answer"]))
    about = {key: answer[key] for key in ("source_model", "family", "problem_id", "trace_id")}
    segment, begins = _align(Segment(answer["text"], tuple(spans), key=answer["id"]), answer, settings)
    return {**about, "id": answer["id"], "text": segment.text, "style_spans": segment.marked(), "begins": begins}


def _write(folder: Path, rows: Sequence[dict[str, Any]], counts: Mapping[str, int]) -> None:
    """Write the dataset, its counts and its card."""
    from huggingface_hub import DatasetCard, DatasetCardData

    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    _replace(folder / "style_spans.jsonl", "".join(lines))
    provenance = json.loads((folder / "annotation.json").read_text(encoding="utf-8"))
    provenance |= {"counts": dict(counts), "tessy_hf": version("tessy-hf")}
    _replace(folder / "annotation.json", json.dumps(provenance, indent=1, ensure_ascii=False) + "\n")
    data = DatasetCardData(
        task_categories=["token-classification"],
        tags=["tessy", "boundary-predictor", "reasoning"],
        configs=[{"config_name": "default", "data_files": "style_spans.jsonl"}],
    )
    models = sorted({row["source_model"] for row in rows} - {""})
    card = DatasetCard.from_template(data, template_path=str(CARD), rows=rows, models=models, **provenance)
    _replace(folder / "README.md", str(card))


def _replace(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    whole = path.with_name(path.name + ".part")
    whole.write_text(text, encoding="utf-8")
    whole.replace(path)
