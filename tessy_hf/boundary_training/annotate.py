"""Let a model mark style spans: reasoning traces go in, segments with marked spans come out, as a dataset on disk.

Segments are drawn from the thinking of traces, and any engine is asked for the style spans in each (the paper's table
2). Answers are read strictly (:mod:`tessy_hf.boundary_training.answers`) and kept in a folder
(:mod:`tessy_hf.boundary_training.annotation_folder`), so that a killed run resumes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, StrictUndefined, TemplateError

from tessy_hf.boundary_training.annotation_folder import AnswerLog, ballots, claim, collect, write
from tessy_hf.boundary_training.sampling import Drawn, digest, draw
from tessy_hf.boundary_training.settings import AnnotationSettings
from tessy_hf.engines.base import Request, derive_seed
from tessy_hf.errors import RequestError, SettingsError
from tessy_hf.errors import TemplateError as ChatTemplateError
from tessy_hf.method.alternation import synthesize
from tessy_hf.method.speaker import Speaker
from tessy_hf.plan import Plan, Sampling
from tessy_hf.trajectory import Prompt

PROMPTS = {name: Path(__file__).with_name(f"annotation_{name}.jinja") for name in ("rules", "paper")}
"""The instructions in this package: the paper's task with rules for the hard cases, and the task alone."""


class Annotations(NamedTuple):
    """The result of :func:`annotate`.

    Attributes:
        folder: The dataset.
        rows: The accepted segments as rows of the dataset, input for
            :func:`tessy_hf.boundary_training.train.train_boundary`.
        counts: How many answers were ``accepted``, and how many were rejected by fault.
        agreement: With several votes, character F1 and kappa of pairs of answers about one segment.
    """

    folder: Path
    rows: list[dict[str, Any]]
    counts: dict[str, int]
    agreement: dict[str, float]


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
        traces: Rows with thinking as :func:`tessy_hf.text.traces.thinking` finds it, for instance a streaming
            dataset. Columns ``id``, ``problem_id``, ``source_model`` and ``family`` are kept.
        annotator: The model to ask; its engine is started here and closed at the end. It thinks first if its chat
            template leaves thinking open.
        out: The folder to write. A run with the same settings in that folder is resumed.
        source_model: The model that wrote the traces, for rows that do not state it.
        family: That model's family, for rows that do not state it.
        **settings: See :class:`tessy_hf.boundary_training.settings.AnnotationSettings`.

    Raises:
        SettingsError: A setting is unknown or out of range, or the prompt file cannot be used.
        BoundaryError: The folder holds a run with other settings, or a broken file.
        EngineDeadError: The engine is gone; answers so far are kept.
    """
    chosen = AnnotationSettings.check(**settings)
    instruction = _instruction(chosen)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    claim(folder, _provenance(annotator, chosen, instruction))
    drawn = draw(traces, chosen, source_model, family)
    answers = AnswerLog(folder / "answers.jsonl")
    try:
        _run(_ask_all(drawn, annotator, instruction, chosen, answers))
    finally:
        answers.close()
        rows, counts, agreed = collect(answers, chosen)
        write(folder, rows, counts, agreed)
    return Annotations(folder, rows, counts, agreed)


# --- asking


def _instruction(settings: AnnotationSettings) -> str:
    path = PROMPTS.get(settings.prompt) or Path(settings.prompt)
    try:
        source = path.read_text(encoding="utf-8")
        probe = _render(source, "PROBE")
    except (OSError, UnicodeDecodeError, TemplateError) as error:
        raise SettingsError(f"The prompt {str(path)!r} cannot be used: {error}. A Jinja file is expected.") from error
    if "PROBE" not in probe:
        raise SettingsError(f"The prompt {str(path)!r} never shows the segment. Put {{{{ text }}}} where it belongs.")
    return source


def _render(instruction: str, text: str) -> str:
    return Environment(undefined=StrictUndefined, autoescape=False).from_string(instruction).render(text=text)


async def _ask_all(
    drawn: Iterable[Drawn], annotator: Speaker, instruction: str, settings: AnnotationSettings, answers: AnswerLog
) -> None:
    """Ask about all segments that have no answer yet, at most ``rows_in_flight`` at a time."""
    slots, ask = asyncio.Semaphore(settings.rows_in_flight), _ask_thinking if _thinks(annotator) else _ask_plainly

    async def keep(segment: Drawn, prompt: Prompt) -> None:
        try:
            answer, finished = await ask(annotator, prompt, settings)
            answers.add(segment, prompt.order, answer=answer, finished=finished, error=None)
        except RequestError as error:
            answers.add(segment, prompt.order, answer=None, finished=False, error=str(error))
        finally:
            annotator.engine.release(prompt.key)
            slots.release()

    await annotator.engine.start()
    try:
        async with asyncio.TaskGroup() as tasks:
            for order, segment in enumerate(ballots(drawn, settings.votes)):
                if segment.id not in answers:
                    await slots.acquire()
                    messages = [{"role": "user", "content": _render(instruction, segment.text)}]
                    seed = derive_seed(settings.seed, segment.id)
                    tasks.create_task(keep(segment, Prompt(segment.id, messages, seed=seed, order=order)))
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    finally:
        await annotator.engine.close()


def _thinks(annotator: Speaker) -> bool:
    """Return whether the annotator's chat template leaves thinking open."""
    try:
        annotator.check_templates(student=False)
    except ChatTemplateError:
        return False
    return annotator.thinking_format.thinks


async def _ask_thinking(annotator: Speaker, prompt: Prompt, settings: AnnotationSettings) -> tuple[str, bool]:
    """Let the model think and answer; return its answer, and whether that is complete."""
    plan = Plan(
        thinking="teacher",
        answer="teacher",
        sampling={"teacher": Sampling(settings.sampled_at)},
        max_thinking_tokens=settings.max_thinking_tokens,
        max_answer_tokens=settings.max_answer_tokens,
    )
    row = await synthesize(prompt, annotator, annotator, plan)
    if row.finish_reason == "error":
        raise RequestError(str(row.error))
    return row.text("answer"), row.finish_reason == "stop"


async def _ask_plainly(annotator: Speaker, prompt: Prompt, settings: AnnotationSettings) -> tuple[str, bool]:
    """Let the model answer without thinking; return its answer, and whether that is complete."""
    engine, vocabulary = annotator.engine, annotator.vocabulary
    text = vocabulary.chat_text(prompt.messages, add_generation_prompt=True, **annotator.template_options)
    ids = vocabulary.encode_template(text)
    completion = await engine.complete(
        Request(
            row=prompt.key,
            order=prompt.order,
            part="answer",
            prompt_ids=ids,
            max_tokens=max(1, min(settings.max_answer_tokens, engine.context_length - len(ids))),
            temperature=settings.sampled_at,
            top_p=1.0,
            seed=prompt.seed,
            stop_ids=vocabulary.special_ids,
        )
    )
    return vocabulary.decode(completion.token_ids).strip(), completion.stop_id is not None


def _run(work: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine to its end, in a thread of its own if this one already runs an event loop (notebooks)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        asyncio.run(work)
        return
    with ThreadPoolExecutor(1, thread_name_prefix="tessy-annotate") as thread:
        thread.submit(asyncio.run, work).result()


def _provenance(annotator: Speaker, settings: AnnotationSettings, instruction: str) -> dict[str, Any]:
    return {
        "annotator": annotator.engine.identity,
        "chat_template": annotator.chat_template and digest(annotator.chat_template),
        "template_options": annotator.template_options,
        "settings": settings.model_dump(exclude={"limit", "rows_in_flight", "prompt"}),
        "instruction": instruction,
        "prompt": settings.prompt if settings.prompt in PROMPTS else Path(settings.prompt).name,
    }
