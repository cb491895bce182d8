"""THE METHOD: teacher and student write one answer together (TESSY, arXiv 2604.14164, section 2.2, Algorithm 1).

A prompt, two speakers and a plan go in, a trajectory comes out. Margin comments give the lines of Algorithm 1. With
greedy decoding and a causal predictor the text does not depend on k. Knows no datasets, HTTP, retries or files.
"""

from __future__ import annotations

from collections.abc import Callable

from tessy_hf.errors import PromptError, RequestError
from tessy_hf.method.speaker import Speaker
from tessy_hf.method.turn import Turns, open_turns
from tessy_hf.plan import Plan
from tessy_hf.trajectory import Prompt, Span, Trajectory

Record = Callable[[Trajectory, Span], None]


async def synthesize(
    prompt: Prompt,
    teacher: Speaker,
    student: Speaker,
    plan: Plan,
    *,
    begun: Trajectory | None = None,
    record: Record | None = None,
) -> Trajectory:
    """Write one row.

    Args:
        prompt: The row's question.
        teacher: The strong model; must be started.
        student: The model to be trained; must be started.
        plan: Who writes what, and how.
        begun: What an earlier attempt kept; the row resumes after it.
        record: Called with each piece of thinking as it is kept, before anything else is asked.

    Returns:
        The trajectory; an unusable prompt or a failed request gives ``finish_reason="error"`` and what was kept.

    Raises:
        EngineDeadError: An engine is gone; no row can go on.
    """
    y = begun or Trajectory(prompt.key, seed=prompt.seed)
    y.error, y.retryable, y.final = None, False, False
    try:
        async with open_turns(prompt, {"teacher": teacher, "student": student}, plan, y) as turns:  # 1-4
            await _write(y, turns, plan, record or (lambda _, piece: None))
    except (PromptError, RequestError) as error:
        y.fail(error)
    finally:
        teacher.engine.release(prompt.key)
        student.engine.release(prompt.key)
    return y


async def _write(y: Trajectory, turns: Turns, plan: Plan, record: Record) -> None:
    author = y.turn = y.turn or plan.first_author  # 5, 6: the student, with its predictor
    while not y.closed:  # 7
        turn = turns[author]
        chunk = await turn.write()  # 8: at most k tokens
        b = await turn.boundary(chunk)  # 9: None where all is of the author's own kind
        count, limit = turn.limit(chunk, b)  # budgets and loops are results
        ends = b is not None or limit is not None or chunk.closed
        z = await turn.keep(chunk, count, boundary=b, ends=ends)  # 10: the rest is rolled back
        y.add(author, "thinking", z)  # 11
        if limit is not None:
            y.finish_reason, y.budget = limit
        elif b is not None:  # 12, 13
            y.hand_over()  # 14-17: the other model and its predictor
        else:  # 18
            y.closed, y.whole, y.turn_is_empty = chunk.closed, chunk.whole, y.turn_is_empty and not z
        record(y, Span(author, "thinking", z))
        if limit is not None:
            return
        author = y.turn  # 19, 20
    text, (y.finish_reason, y.budget) = await turns[plan.answer].answer()  # 21
    y.add(plan.answer, "answer", text)  # 22
