"""Rows that others released as finished rows, and finished rows as others write them.

Traces of any format of :data:`tessy_hf.text.traces.FORMATS` go in, rows with the columns of a run come out; what
nobody knows of them, such as who wrote what, is null.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from tessy_hf.rows import columns
from tessy_hf.rows.tools import asked_message, has_calls
from tessy_hf.text import traces
from tessy_hf.text.thinking_format import THINK_TAGS, ThinkingFormat

if TYPE_CHECKING:
    from datasets import Dataset, Features

    from tessy_hf.text.vocabulary import Vocabulary

COUNTS = {"n_tokens_teacher": "teacher_tokens", "n_tokens_student": "student_tokens"}
"""Columns that the authors' script adds to its rows, and ours for the same numbers."""


def finished(
    dataset: Dataset, thinking_format: ThinkingFormat = THINK_TAGS, vocabulary: Vocabulary | None = None
) -> Dataset:
    """Return others' rows with the columns of a run, and their own where these have other names.

    Args:
        dataset: The rows.
        thinking_format: The format that the assistant's message is written in.
        vocabulary: Counts the tokens of thinking and answer, as spans of an unknown author. Without one there are no
            spans.

    Raises:
        DatasetError: Their columns are of no known format.
    """
    from datasets import Features

    traces.check(dataset.column_names)
    read = {*columns.COLUMNS, *(name for one in traces.FORMATS for name in one.chat)}
    kept = {name: kind for name, kind in dataset.features.items() if name not in read}
    calls = any(has_calls(traces.read(row).messages) for row in dataset.select(range(min(100, len(dataset)))))
    typed = columns.schema(thinking_format.key, calls)

    def convert(row: Mapping[str, Any]) -> dict[str, Any]:
        return _row(row, thinking_format, vocabulary)

    return dataset.map(convert, features=Features({**kept, **typed}), remove_columns=list(read & {*dataset.features}))


def _row(row: Mapping[str, Any], thinking_format: ThinkingFormat, vocabulary: Vocabulary | None) -> dict[str, Any]:
    trace = traces.read(row)
    message = {"role": "assistant", "content": trace.answer}
    if trace.thinking:
        message = thinking_format.assistant_message(trace.thinking, trace.answer, bool(trace.answer))
    wrote = [message] if trace.thinking or trace.answer else []
    counts = {ours: row[theirs] for theirs, ours in COUNTS.items() if row.get(theirs) is not None}
    total = sum(counts.values()) if len(counts) == len(COUNTS) else 0
    shares = {f"{name}_token_ratio": counts[f"{name}_tokens"] / total for name in ("teacher", "student") if total}
    return {
        **dict.fromkeys(columns.COLUMNS),
        "messages": [*map(asked_message, trace.messages), *wrote],
        "thinking": trace.thinking,
        "answer": trace.answer,
        "spans": list(_spans(trace, message, vocabulary)) if vocabulary is not None else [],
        "candidates": [],
        "finish_reason": "stop" if trace.answer else "length" if trace.thinking else None,
        **counts,
        **shares,
    }


def _spans(trace: traces.Trace, message: Mapping[str, Any], vocabulary: Vocabulary) -> Iterator[dict[str, Any]]:
    """Lay a span of an unknown author over each part."""
    end = sum(len(text) for name, text in message.items() if name != "role")
    middle = end - len(trace.answer)
    for part, text, start, stop in (("thinking", trace.thinking, 0, middle), ("answer", trace.answer, middle, end)):
        if text:
            tokens = len(vocabulary.encode(text).ids)
            yield {"author": "", "part": part, "start": start, "end": stop, "tokens": tokens}


def dialog_features() -> Features:
    """Return the types of :func:`dialogs`."""
    from datasets import Features, List, Value

    text, count = Value("string"), Value("int32")
    counts = dict.fromkeys(("n_tokens_total", *COUNTS), count)
    return Features({"id_ddm": text, "dialogs": List({"role": text, "content": text}), **counts})


def dialogs(rows: Iterable[Mapping[str, Any]], id_column: str) -> Iterator[dict[str, Any]]:
    """Yield finished rows in the format of the authors' datasets: ``id_ddm``, ``dialogs`` and their token counts.

    Left out are rows without an answer, and chats of several turns, of which the format has none.
    """
    for row in rows:
        trace = traces.read(row)
        users = [turn for turn in trace.messages if turn["role"] != "system"]
        if len(users) != 1 or not trace.answer:
            continue
        counts = {theirs: row[ours] for theirs, ours in COUNTS.items()}
        yield {
            "id_ddm": str(row[id_column]),
            "dialogs": [
                {"role": "user", "content": trace.question},
                THINK_TAGS.assistant_message(trace.thinking, trace.answer),
            ],
            "n_tokens_total": sum(count or 0 for count in counts.values()),
            **counts,
        }
