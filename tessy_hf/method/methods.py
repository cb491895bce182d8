"""Write a row by any of the paper's data recipes (section 3.4): who is shown what, how many candidates, which is kept.

A prompt, two speakers and a plan go in; the text that is the row comes out, and all else that was written for it is in
the :class:`~tessy_hf.trajectory.Draft`. Each candidate is written by :func:`tessy_hf.method.alternation.synthesize`.
Candidates follow one another, so that a row in flight is one request in flight. Knows nothing of datasets, journals,
retries or waiting.
"""

from __future__ import annotations

import math
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined, Template

from tessy_hf.engines.base import derive_seed
from tessy_hf.engines.scoring import surprise
from tessy_hf.errors import PromptError, RequestError
from tessy_hf.method.alternation import synthesize
from tessy_hf.method.speaker import Speaker
from tessy_hf.plan import Plan
from tessy_hf.text.transcript import TokenList
from tessy_hf.trajectory import Candidate, Draft, Prompt, Span, Trajectory

_TEMPLATES = Path(__file__).with_name("templates")
_SCORE = re.compile(r"Score: (10|[0-9])")

Record = Callable[[Draft, Span | None], None]
"""Called with the draft and the piece of a candidate that was just kept; without a piece for anything else."""

Verify = Callable[[Mapping[str, Any]], Awaitable[float]]
"""Judges ``{"thinking", "answer", "finish_reason"}`` of a finished text: 1 is right. Raises RequestError."""


async def write(
    prompt: Prompt,
    teacher: Speaker,
    student: Speaker,
    plan: Plan,
    draft: Draft,
    *,
    verify: Verify | None = None,
    record: Record | None = None,
) -> Trajectory:
    """Write one row by the plan's method, on from what its draft holds; what is written is added to the draft.

    ``prompt``, ``teacher`` and ``student`` are those of :func:`~tessy_hf.method.alternation.synthesize`.

    Returns:
        The candidate that is kept, or what failed, with ``finish_reason="error"``.

    Raises:
        EngineDeadError: An engine is gone; no row can go on.
    """
    row = _Row(prompt, teacher, student, plan, draft, verify, record or (lambda _, piece: None))
    try:
        student.check_row(prompt)
        shown = await row.shown_prompt()
        for number in range(plan.max_candidates):
            candidate = await row.candidate(number, shown)
            if candidate.trajectory.finish_reason == "error":
                if not candidate.trajectory.final:
                    return candidate.trajectory
                continue
            await row.judge(number, candidate)
            if not (plan.scored or plan.chosen_by) and candidate.verdict is not None and candidate.verdict >= 1:
                break
    except (PromptError, RequestError) as error:
        text = draft.candidates[-1].trajectory if draft.candidates else Trajectory(prompt.key, seed=prompt.seed)
        failed = replace(text)
        failed.fail(error)
        return failed
    return best(draft.candidates).trajectory


def best(candidates: list[Candidate]) -> Candidate:
    """Return the candidate to keep: one that finished, then by verdict, then by score; of equals the first written."""
    return max(candidates, key=lambda one: (one.trajectory.finish_reason == "stop", _or(one.verdict), _or(one.score)))


def _or(judged: float | None) -> float:
    return -math.inf if judged is None else judged


def read_score(judgement: str) -> float | None:
    """Return the score a judgement gives, or ``None`` where it is not exactly what was asked for."""
    found = _SCORE.fullmatch(judgement)
    return float(found[1]) if found else None


@dataclass
class _Row:
    """One row at work."""

    prompt: Prompt
    teacher: Speaker
    student: Speaker
    plan: Plan
    draft: Draft
    verify: Verify | None
    record: Record

    async def shown_prompt(self) -> Prompt:
        """Return the prompt as the authors of the candidates see it; the row's own, but for ``teacher-reference``."""
        if not self.plan.shows_reference:
            return self.prompt
        if self.draft.reference is None:
            self.draft.reference = await self.reference()
            self.record(self.draft, None)
        return self.with_question("reference", self.prompt.key, reference=self.draft.reference)

    async def reference(self) -> str:
        """Let the teacher answer, as in a row of ``teacher-only``."""
        written = await self.by_teacher(replace(self.prompt, key=f"{self.prompt.key}#reference"))
        text = written.response
        if written.finish_reason == "stop" and text:
            return text
        raise RequestError(
            f"Row {self.prompt.key!r}: the teacher's reference has {len(text)} characters and ended with "
            f"{written.finish_reason!r}. A complete answer is expected; raise max_thinking_tokens or "
            "max_answer_tokens, or leave such prompts out."
        )

    async def candidate(self, number: int, shown: Prompt) -> Candidate:
        """Write a candidate, or what is left of it to write."""
        candidates, seed = self.draft.candidates, self.prompt.seed
        if number == len(candidates):
            seed = derive_seed(seed, "candidate", number) if number else seed  # the first is what a lone one would be
            candidates.append(Candidate(Trajectory(self.prompt.key, seed=seed)))
        candidate = candidates[number]
        if candidate.done:
            return candidate
        await synthesize(
            replace(shown, key=_numbered(shown.key, number), seed=candidate.trajectory.seed),
            self.teacher,
            self.student,
            self.plan,
            begun=candidate.trajectory,
            record=lambda _, piece: self.record(self.draft, piece),
        )
        candidate.done = candidate.trajectory.finish_reason != "error"
        self.check(candidate.trajectory)
        if candidate.done and self.draft.judged:
            answer = [span for span in candidate.trajectory.spans if span.part == "answer"]
            self.record(self.draft, answer[0] if answer else None)
        return candidate

    def check(self, text: Trajectory) -> None:
        """End a text as ``error``, for good, that would be trained on otherwise than it was written."""
        try:
            if text.closed and text.finish_reason != "error":
                self.student.check_row(self.prompt, text.text("thinking"), text.text("answer"))
        except PromptError as error:
            text.finish_reason, text.budget, text.error, text.final = "error", None, str(error), True

    async def judge(self, number: int, candidate: Candidate) -> None:
        """Have a finished candidate judged by the verifier and the teacher, where they have not done so yet."""
        if candidate.trajectory.finish_reason != "stop":
            return
        if self.verify is not None and candidate.verdict is None:
            text = candidate.trajectory
            parts = {"thinking": text.text("thinking"), "answer": text.response}
            candidate.verdict = await self.verify({**parts, "finish_reason": text.finish_reason})
            self.record(self.draft, None)
        if self.plan.scored and candidate.judgement is None:
            candidate.judgement = await self.judgement(number, candidate.trajectory)
            candidate.score = read_score(candidate.judgement)
            self.record(self.draft, None)
        if self.plan.chosen_by == "rsr" and candidate.score is None:
            ratio = await self.ratio(number, candidate.trajectory)
            candidate.score = -ratio if ratio is not None else None
            self.record(self.draft, None)

    async def ratio(self, number: int, text: Trajectory) -> float | None:
        """Return a text's Rank-Surprisal Ratio, as the student would be trained on it."""
        student, key = self.student, _numbered(f"{self.prompt.key}#rsr", number)
        before, marker = student.closing
        ids, tail = student.open_turn(self.prompt.messages, self.prompt.tools)
        laid = TokenList(student.vocabulary, ids, tail)
        laid.append(text.text("thinking") + (before if text.closed else ""))
        whole = [*laid.ids, *(marker if text.closed else ())]
        whole += student.vocabulary.encode(text.text("answer"), whole[-1]).ids
        try:
            scores = await student.engine.score(whole[: len(ids)], whole[len(ids) :], row=key, order=self.prompt.order)
        finally:
            student.engine.release(key)
        found = surprise(*scores)
        return found and found.rsr

    async def judgement(self, number: int, text: Trajectory) -> str:
        """Ask the teacher for a score of a final answer."""
        key = _numbered(f"{self.prompt.key}#score", number)
        question = self.with_question("score", key, text.seed, answer=text.response)
        return (await self.by_teacher(question)).response

    async def by_teacher(self, prompt: Prompt) -> Trajectory:
        """Let the teacher alone think and answer.

        Raises:
            PromptError: It cannot be asked this.
            RequestError: It failed.
        """
        plan = replace(self.plan, thinking="teacher", answer="teacher")
        thinks = self.teacher.thinking_format.thinks  # else its text is whole, not another's chain of thought
        written = await synthesize(prompt, self.teacher, self.student if thinks else self.teacher, plan)
        self.draft.extra_tokens["teacher"] += written.generated["teacher"]
        if written.refused:
            raise PromptError(str(written.error))
        if written.finish_reason == "error":
            raise RequestError(str(written.error), retryable=written.retryable)
        return written

    def with_question(self, template: str, key: str, seed: int | None = None, **values: str) -> Prompt:
        """Return the prompt with the user's last turn put into one of our own templates.

        Raises:
            PromptError: The chat ends otherwise.
        """
        *before, last = self.prompt.messages
        if last["role"] != "user" or not isinstance(last["content"], str):
            raise PromptError(
                f"Row {self.prompt.key!r}: the last message is {type(last['content']).__name__} by {last['role']!r}. "
                f"The method {self.plan.method!r} puts a user's question, as text, into a prompt of its own; use "
                "another method, or leave such rows out."
            )
        text = _template(template).render(question=last["content"], **values)
        seed = self.prompt.seed if seed is None else seed
        return replace(self.prompt, key=key, messages=[*before, {**last, "content": text}], seed=seed)


def _numbered(key: str, number: int) -> str:
    return f"{key}#{number + 1}" if number else key


@cache
def _template(name: str) -> Template:
    source = (_TEMPLATES / f"{name}_prompt.jinja").read_text(encoding="utf-8")
    return Environment(undefined=StrictUndefined, autoescape=False, trim_blocks=True).from_string(source.strip())
