"""A finished trajectory as the columns of a dataset row, and the schema of those columns."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

from tessy_hf.errors import DatasetError
from tessy_hf.rows.datasets_internals import features_of
from tessy_hf.rows.tools import CALL_KEYS, SOURCE_TOOLS, TOOLS, asked_message, has_calls, stored_tools
from tessy_hf.text.thinking_format import FAMILIES, HARMONY, ThinkingFormat
from tessy_hf.text.vocabulary import owners
from tessy_hf.trajectory import Author, Candidate, Draft, Message, Trajectory

if TYPE_CHECKING:
    from datasets import Dataset, Features, IterableDataset

    from tessy_hf.text.vocabulary import Vocabulary

_TYPES = {
    "messages": "messages",
    "thinking": "string",
    "answer": "string",
    "spans": "spans",
    "teacher_tokens": "int32",
    "student_tokens": "int32",
    "teacher_token_ratio": "float64",
    "student_token_ratio": "float64",
    "thinking_teacher_token_ratio": "float64",
    "discarded_teacher_tokens": "int32",
    "discarded_student_tokens": "int32",
    "generated_teacher_tokens": "int32",
    "generated_student_tokens": "int32",
    "finish_reason": "string",
    "exhausted_budget": "string",
    "error": "string",
    "verdict": "float64",
    "teacher_score": "float64",
    "candidates": "candidates",
    "teacher_reference": "string",
    "method": "string",
    "run_fingerprint": "string",
    "seed": "int64",
}
COLUMNS = tuple(_TYPES)

_MESSAGE_KEYS = frozenset(("role", "content", "name", "tool_calls", "tool_call_id"))
"""Keys of messages that hold no thinking."""

LIKELY_PROMPTS = ("prompt", "question", "problem", "instruction", "query", "input", "text", "messages")
"""Names of columns that are proposed as the prompts, the likeliest first."""

LATER = ("exhausted_budget",)
"""Columns that rows written before may lack; they read as null."""


def features(dataset: Dataset | IterableDataset, prompt_column: str, thinking_format: ThinkingFormat) -> Features:
    """Return the schema of a dataset once the transform has been mapped over it.

    Args:
        dataset: The prompts. Where a stream has no schema, its first row is read.
        prompt_column: The column that may be replaced (a ``messages`` column of prompts becomes the finished chat).
        thinking_format: The student's thinking format, which decides the keys of a message.

    Raises:
        DatasetError: The prompt column is missing, or a column of the dataset would be overwritten.
    """
    given = features_of(dataset)
    check_columns(list(given), prompt_column)
    return finished(given, prompt_column, thinking_format.key)


def finished(given: Features, prompt_column: str, thinking_key: str | None) -> Features:
    """Return the schema of finished rows: that of the prompts, the tools they were shown, and :data:`COLUMNS`."""
    from datasets import Features, Json, Value

    message = getattr(given[prompt_column], "feature", given[prompt_column])  # of a list
    calls = isinstance(message, Json) or (isinstance(message, dict) and not message.keys().isdisjoint(CALL_KEYS))
    read = TOOLS in given and prompt_column != TOOLS
    tools = {TOOLS: Value("string"), SOURCE_TOOLS: given[TOOLS]} if read else {}
    return Features({**given, **tools, **schema(thinking_key, calls)})


def fitting(features: Mapping[str, Any], rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the types for rows whose messages may have tool calls."""
    calls = any(has_calls(row["messages"]) for row in rows)
    return {**features, **({"messages": schema(calls=calls)["messages"]} if calls else {})}


def schema(thinking_key: str | None = None, calls: bool = False) -> dict[str, Any]:
    """Return the types of :data:`COLUMNS`.

    Args:
        thinking_key: The key of a message that holds the thinking, where that is not in its content.
        calls: Whether messages may have tool calls. They are JSON then, so that no message gets keys of others.
    """
    from datasets import Json, List, Value

    text = Value("string")
    typed = {"role": text, "content": text} | ({} if thinking_key is None else {thinking_key: text})
    message = Json() if calls else typed
    span = {"author": text, "part": text, "start": Value("int32"), "end": Value("int32"), "tokens": Value("int32")}
    candidate = {
        "seed": Value("int64"),
        "finish_reason": text,
        "answer": text,
        "verdict": Value("float64"),
        "score": Value("float64"),
        "judgement": text,
        "chosen": Value("bool"),
    }
    lists = {"messages": List(message), "spans": List(span), "candidates": List(candidate)}
    return {name: lists[kind] if kind in lists else Value(kind) for name, kind in _TYPES.items()}


def thinking_key(keys: Collection[str]) -> str | None:
    """Return which of a message's keys holds the thinking; ``None`` where it is in the content."""
    return next((key for key in keys if key not in _MESSAGE_KEYS), None)


def check_columns(
    columns: Sequence[str], prompt_column: str, id_column: str | None = None, verified_column: str | None = None
) -> None:
    """Check that what is read is there and that nothing would be lost.

    Raises:
        DatasetError: A column is missing, or would be overwritten.
    """
    likely = next((name for name in LIKELY_PROMPTS if name in columns), None)
    for name, advice in (
        (prompt_column, f'prompt_column="{likely}"' if likely else "prompt_column= with the column to use"),
        (id_column, "id_column=None to tell rows apart by their prompts, or id_column= with a column of unique ids"),
        (verified_column, 'verifier={"name": ..., "column": ...} with the column to use'),
    ):
        if name is not None and name not in columns:
            raise DatasetError(f"The dataset has no column {name!r}. Columns: {', '.join(columns)}. Pass {advice}.")
    written = (*COLUMNS, SOURCE_TOOLS) if TOOLS in columns else COLUMNS
    taken = [name for name in columns if name in written and name != prompt_column]
    if taken:
        raise DatasetError(
            f"The dataset already has {', '.join(map(repr, taken))}, which this transform would overwrite. "
            f"Remove it, or rename it first: in the file, or with ds.rename_column({taken[0]!r}, 'source_{taken[0]}')."
        )


def row(
    trajectory: Trajectory,
    messages: Sequence[Message],
    vocabulary: Vocabulary | None,
    thinking_format: ThinkingFormat,
    *,
    method: str,
    run_fingerprint: str,
    draft: Draft | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """Return the columns of one row.

    Args:
        trajectory: What was written.
        messages: The prompt's messages.
        vocabulary: The student's vocabulary, by which tokens are counted; not needed where nothing was written.
        thinking_format: The student's thinking format, in which the row is written.
        method: The data recipe.
        run_fingerprint: The run's fingerprint.
        draft: All that was written for the row, where that is more than the trajectory.
        tools: The tools that the models were shown.

    Returns:
        One value per name in :data:`COLUMNS`, and the tools where there are any. Span offsets are into the assistant
        text: the ``content`` of the last message; where thinking has a key of its own, thinking and content laid end
        to end (of harmony, with the markers around the thinking). Markers belong to the neighboring thinking spans
        and are not counted as tokens.
    """
    thinking, answer = trajectory.text("thinking"), trajectory.text("answer")
    spans = _spans(trajectory, vocabulary, thinking_format) if vocabulary is not None else []
    tokens: dict[Author, int] = {"teacher": 0, "student": 0}
    thought: dict[Author, int] = {"teacher": 0, "student": 0}
    for span in spans:
        tokens[span["author"]] += span["tokens"]
        thought[span["author"]] += span["tokens"] if span["part"] == "thinking" else 0
    draft = draft or Draft(trajectory.key, candidates=[Candidate(trajectory)])
    chosen = next((one for one in draft.candidates if one.trajectory is trajectory), Candidate(trajectory))
    wrote = [thinking_format.assistant_message(thinking, answer, trajectory.closed)] if spans else []
    return {
        "messages": [*map(asked_message, messages), *wrote],
        "thinking": thinking,
        "answer": answer,
        "spans": spans,
        "teacher_tokens": tokens["teacher"],
        "student_tokens": tokens["student"],
        "teacher_token_ratio": _share(tokens, "teacher"),
        "student_token_ratio": _share(tokens, "student"),
        "thinking_teacher_token_ratio": _share(thought, "teacher"),
        "discarded_teacher_tokens": trajectory.discarded["teacher"],
        "discarded_student_tokens": trajectory.discarded["student"],
        "generated_teacher_tokens": draft.generated("teacher"),
        "generated_student_tokens": draft.generated("student"),
        "finish_reason": trajectory.finish_reason,
        "exhausted_budget": trajectory.budget,
        "error": trajectory.error,
        "verdict": chosen.verdict,
        "teacher_score": None if chosen.judgement is None else chosen.score,
        "candidates": [_candidate(one, one is chosen) for one in draft.candidates] if draft.judged else [],
        "teacher_reference": draft.reference,
        "method": method,
        "run_fingerprint": run_fingerprint,
        "seed": trajectory.seed,
        **({TOOLS: stored_tools(tools)} if tools else {}),
    }


def content_text(content: Any) -> str:
    """Return a message's content as text, whatever a dataset keeps there."""
    return content if isinstance(content, str) else "" if content is None else json.dumps(content, default=str)


def assistant_text(row: Mapping[str, Any]) -> str:
    """Return the text that a finished row's span offsets point into (see :func:`row`).

    It is empty where the row ends in no assistant message.
    """
    return "".join(_parts(row))


def _parts(row: Mapping[str, Any]) -> tuple[str, str, str, str]:
    """Return a finished row's assistant text in four parts: open, thinking, close, answer.

    Of rows that lack the columns ``thinking`` and ``answer``, all is answer.
    """
    messages, spans = row["messages"] or [], row.get("spans") or []
    if not messages or messages[-1]["role"] != "assistant":
        return "", "", "", ""
    message, content = messages[-1], content_text(messages[-1]["content"])
    key = thinking_key([name for name, value in message.items() if value is not None])
    if key is not None:
        bare = spans and spans[-1]["end"] == len(message[key]) + len(content)
        if bare or key != HARMONY.key:
            return "", message[key], "", content
        closed = not spans or spans[-1]["end"] > len(HARMONY.open + message[key])
        return HARMONY.open, message[key], HARMONY.close if closed else "", content
    thinking, answer = row.get("thinking") or "", row.get("answer") or ""
    marked = content[: len(content) - len(answer)] if content.endswith(answer) else ""
    places = [at for at in range(LONGEST_MARK) if marked.startswith(thinking, at)]
    if not places:
        return "", "", "", content
    at = next((at for at in places if marked[:at].strip() in _OPENINGS), places[0]) if thinking else 0
    return marked[:at], thinking, marked[at + len(thinking) :], answer


LONGEST_MARK = 64
"""Characters that may open the thinking in a message's content."""

_OPENINGS = frozenset(one.open.strip() for one in FAMILIES.values())


class Piece(NamedTuple):
    """One span of a finished row, cut out of the assistant text.

    Attributes:
        author: Who wrote it.
        part: ``thinking`` or ``answer``.
        tokens: Its tokens.
        text: Its text without the markers around the thinking.
        before: The markers that the span begins with: the opening one, and the closing one of an empty thinking.
        after: The closing marker, where the span ends in it.
    """

    author: str
    part: str
    tokens: int
    text: str
    before: str
    after: str


def pieces(row: Mapping[str, Any]) -> list[Piece]:
    """Cut a finished row's assistant text at its spans.

    Returns:
        The spans in order, or nothing where they do not cover the text (edited rows, rows of other origin). Markers
        and texts, laid end to end, are the assistant text.
    """
    open_, thinking, close, answer = _parts(row)
    whole, spans = open_ + thinking + close + answer, row.get("spans") or []
    if not whole or not spans or spans[0]["start"] != 0 or spans[-1]["end"] != len(whole):
        return []
    closing = max((at for at, span in enumerate(spans) if span["part"] == "thinking"), default=None)
    opening = open_ if closing is not None else open_ + close
    cut = []
    for at, span in enumerate(spans):
        text = whole[span["start"] : span["end"]]
        before = opening if at == 0 and text.startswith(opening) else ""
        after = close if at == closing and text.endswith(close) else ""
        text = text[len(before) : len(text) - len(after)]
        cut.append(Piece(str(span["author"]), str(span["part"]), span["tokens"], text, before, after))
    return cut


def _candidate(candidate: Candidate, chosen: bool) -> dict[str, Any]:
    return {
        "seed": candidate.trajectory.seed,
        "finish_reason": candidate.trajectory.finish_reason,
        "answer": candidate.trajectory.text("answer"),
        "verdict": candidate.verdict,
        "score": candidate.score,
        "judgement": candidate.judgement,
        "chosen": chosen,
    }


def _share(tokens: Mapping[Author, int], author: Author) -> float | None:
    total = sum(tokens.values())
    return tokens[author] / total if total else None


def _spans(trajectory: Trajectory, vocabulary: Vocabulary, thinking_format: ThinkingFormat) -> list[dict[str, Any]]:
    """Lay the spans end to end over the assistant text, markers included, and count their tokens."""
    spans, closed = trajectory.spans, trajectory.closed
    counts = [*_count(trajectory, vocabulary, "thinking"), *_count(trajectory, vocabulary, "answer")]
    thinking = [index for index, span in enumerate(spans) if span.part == "thinking"]
    (opening, closing), laid, at = thinking_format.row_marks, [], 0
    for index, (span, tokens) in enumerate(zip(spans, counts, strict=True)):
        length = len(span.text)
        length += len(opening) if index == 0 and (thinking or closed) else 0
        length += len(closing) if closed and index == (thinking[-1] if thinking else 0) else 0
        laid.append({"author": span.author, "part": span.part, "start": at, "end": at + length, "tokens": tokens})
        at += length
    return laid


def _count(trajectory: Trajectory, vocabulary: Vocabulary, part: str) -> list[int]:
    """Count each span's tokens in a tokenisation of the whole part; a token belongs to the span it ends in."""
    spans = [span for span in trajectory.spans if span.part == part]
    ends = list(accumulate(len(span.text) for span in spans))
    counts = Counter(owners(vocabulary.encode("".join(span.text for span in spans)).offsets, ends))
    return [counts[at] for at in range(len(spans))]
