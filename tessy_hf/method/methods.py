"""A row by any of the paper's data recipes (section 3.4): what is shown to whom, how many candidates, which is kept.

A prompt and two speakers go in; the text that is the row comes out, and all else that was written for it is in the
:class:`~tessy_hf.trajectory.Draft`. Each candidate is written by :func:`tessy_hf.method.alternation.synthesize`; who writes
what in it stands in :mod:`tessy_hf.settings`. Candidates follow one another, so that a row in flight is one request in
flight. Knows nothing of datasets, journals or retries.
"""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined, Template

from tessy_hf.engines.base import derive_seed
from tessy_hf.errors import PromptError, RequestError
from tessy_hf.method.alternation import synthesize
from tessy_hf.method.speaker import Speaker
from tessy_hf.run.metering import Waits
from tessy_hf.settings import Settings
from tessy_hf.trajectory import Candidate, Draft, Prompt, Span, Trajectory
from tessy_hf.verifiers.verifiers import Verifier

_TEMPLATES = Path(__file__).with_name("templates")
_SCORE = re.compile(r"Score: (10|[0-9])")

Record = Callable[[Draft, Span | None], None]


async def write(
    prompt: Prompt,
    teacher: Speaker,
    student: Speaker,
    settings: Settings,
    draft: Draft,
    *,
    given: Mapping[str, Any] | None = None,
    verifier: Verifier | None = None,
    record: Record | None = None,
    waits: Waits | None = None,
) -> Trajectory:
    """Write one row, on from what its draft holds.

    Args:
        prompt: The row's question.
        teacher: The strong model; must be started.
        student: The model to be trained; must be started.
        settings: The method, and how it samples.
        draft: What earlier attempts wrote; what this one writes is added.
        given: The row's input columns, for the verifier.
        verifier: Says whether a finished text is right.
        record: Called with the draft for each piece of a candidate as it is kept, and without one for what is beside.
        waits: Where it is noted what the row waits for, and how long it may.

    Returns:
        The candidate that is kept, or what failed, with ``finish_reason="error"``.

    Raises:
        EngineDeadError: An engine is gone; no row can go on.
    """
    row = _Row(prompt, teacher, student, settings, draft, given or {}, verifier, record or _forget, waits or Waits())
    try:
        asked = await row.asked()
        for number in range(settings.tries):
            candidate = await row.candidate(number, asked)
            if candidate.trajectory.finish_reason == "error":
                return candidate.trajectory
            await row.judge(number, candidate)
            if not settings.scored and candidate.verdict is not None and candidate.verdict >= 1:
                break
    except (PromptError, RequestError) as error:
        text = draft.candidates[-1].trajectory if draft.candidates else Trajectory(prompt.key, seed=prompt.seed)
        again = isinstance(error, RequestError) and error.retryable
        return replace(text, finish_reason="error", error=str(error), retryable=again)
    return best(draft.candidates).trajectory


def best(candidates: list[Candidate]) -> Candidate:
    """Return the candidate to keep: one that ended, then by verdict, then by score; of equals the first written."""
    return max(candidates, key=lambda one: (one.trajectory.finish_reason == "stop", _or(one.verdict), _or(one.score)))


def _or(judged: float | None) -> float:
    return -math.inf if judged is None else judged


def read_score(judgement: str) -> float | None:
    """Return the score a judgement gives, or ``None`` where it is not exactly what was asked for."""
    found = _SCORE.fullmatch(judgement)
    return float(found[1]) if found else None


def _forget(draft: Draft, piece: Span | None) -> None:
    """Keep no record."""


@dataclass
class _Row:
    """One row at work."""

    prompt: Prompt
    teacher: Speaker
    student: Speaker
    settings: Settings
    draft: Draft
    given: Mapping[str, Any]
    verifier: Verifier | None
    record: Record
    waits: Waits

    async def asked(self) -> Prompt:
        """Return the prompt as the authors of the candidates see it; the row's own, but for ``teacher-reference``.

        Raises:
            RequestError: There is no reference.
        """
        if not self.settings.shows_reference:
            return self.prompt
        if self.draft.reference is None:
            self.draft.reference = await self.reference()
            self.record(self.draft, None)
        return self.ask("reference", self.prompt.key, reference=self.draft.reference)

    async def reference(self) -> str:
        """Let the teacher answer: what a row of ``teacher-only`` has as its answer.

        Raises:
            RequestError: It failed, or its answer did not end.
        """
        written = await self.teachers(replace(self.prompt, key=f"{self.prompt.key}#reference"))
        text = written.text("answer")
        if written.finish_reason == "stop" and text:
            return text
        raise RequestError(
            f"Row {self.prompt.key!r}: the teacher's reference has {len(text)} characters and ended with "
            f"{written.finish_reason!r}. A whole answer is expected; raise max_thinking_tokens or "
            "max_answer_tokens, or leave such prompts out."
        )

    async def candidate(self, number: int, asked: Prompt) -> Candidate:
        """Write a candidate, or what is left of it to write."""
        candidates, seed = self.draft.candidates, self.prompt.seed
        if number == len(candidates):
            seed = derive_seed(seed, "candidate", number) if number else seed  # the first is what a lone one would be
            candidates.append(Candidate(Trajectory(self.prompt.key, seed=seed)))
        candidate = candidates[number]
        if candidate.done:
            return candidate
        await synthesize(
            replace(asked, key=_numbered(asked.key, number), seed=candidate.trajectory.seed),
            self.teacher,
            self.student,
            self.settings.plan(self.prompt.key),
            begun=candidate.trajectory,
            record=lambda _, piece: self.record(self.draft, piece),
            waits=self.waits,
        )
        candidate.done = candidate.trajectory.finish_reason != "error"
        if candidate.done and self.draft.judged:
            answer = [span for span in candidate.trajectory.spans if span.part == "answer"]
            self.record(self.draft, answer[0] if answer else None)
        return candidate

    async def judge(self, number: int, candidate: Candidate) -> None:
        """Have a candidate judged that came to its end, by whoever has not judged it yet.

        Raises:
            RequestError: The teacher or the verifier failed.
        """
        if candidate.trajectory.finish_reason != "stop":
            return
        if self.verifier is not None and candidate.verdict is None:
            candidate.verdict = await self.verdict(candidate.trajectory, self.verifier)
            self.record(self.draft, None)
        if self.settings.scored and candidate.judgement is None:
            candidate.judgement = await self.judgement(number, candidate.trajectory)
            candidate.score = read_score(candidate.judgement)
            self.record(self.draft, None)

    async def judgement(self, number: int, text: Trajectory) -> str:
        """Ask the teacher for a score of a final answer.

        Raises:
            RequestError: It failed.
        """
        key = _numbered(f"{self.prompt.key}#score", number)
        return (await self.teachers(self.ask("score", key, text.seed, answer=text.text("answer")))).text("answer")

    async def teachers(self, asked: Prompt) -> Trajectory:
        """Let the teacher alone think and answer.

        Raises:
            RequestError: It failed.
        """
        plan = replace(self.settings.plan(self.prompt.key), thinking="teacher", answer="teacher")
        written = await synthesize(asked, self.teacher, self.student, plan, waits=self.waits)
        self.draft.aside["teacher"] += written.generated["teacher"]
        if written.finish_reason == "error":
            raise RequestError(str(written.error), retryable=written.retryable)
        return written

    def ask(self, template: str, key: str, seed: int | None = None, **told: str) -> Prompt:
        """Return the prompt with the user's last turn put into one of our own prompts.

        Raises:
            PromptError: That turn is not plain text.
        """
        *before, last = self.prompt.messages
        if not isinstance(last["content"], str):
            raise PromptError(
                f"Row {self.prompt.key!r}: the user's last turn is a {type(last['content']).__name__}. The method "
                f"{self.settings.method!r} puts it into a prompt of its own and expects text; use another method."
            )
        text = _template(template).render(question=last["content"], **told)
        seed = self.prompt.seed if seed is None else seed
        return replace(self.prompt, key=key, messages=[*before, {**last, "content": text}], seed=seed)

    async def verdict(self, text: Trajectory, verifier: Verifier) -> float:
        """Run the verifier off the event loop.

        Raises:
            RequestError: It raised, or said neither yes nor no nor a number.
        """
        own = {"thinking": text.text("thinking"), "answer": text.text("answer"), "finish_reason": text.finish_reason}
        try:
            async with self.waits.on(self.prompt.key, "the verifier", of="verifier"):
                verdict = await asyncio.to_thread(verifier, {**self.given, **own})
        except RequestError:
            raise
        except Exception as error:  # noqa: BLE001 - a verifier may be anybody's code
            raise RequestError(
                f"Row {self.prompt.key!r}: the verifier raised {type(error).__name__}: {error}. Mend the verifier or "
                "the column it reads."
            ) from error
        if isinstance(verdict, (bool, int, float)) and math.isfinite(verdict):
            return float(verdict)
        raise RequestError(
            f"Row {self.prompt.key!r}: the verifier returned {verdict!r} ({type(verdict).__name__}). True, False or a "
            "finite number is expected, where 1 means right."
        )


def _numbered(key: str, number: int) -> str:
    return f"{key}#{number + 1}" if number else key


@cache
def _template(name: str) -> Template:
    source = (_TEMPLATES / f"{name}_prompt.jinja").read_text(encoding="utf-8")
    return Environment(undefined=StrictUndefined, autoescape=False, trim_blocks=True).from_string(source.strip())
