"""Surprise of words: tokens are summed by word, words are cut at spans, and card, report and viewer show them."""

import math

import pytest
from datasets import Dataset

from tessy_hf.report import figures, heat, viewer
from tessy_hf.report.statistics import summarize
from tessy_hf.report.tables import tables
from tests.finished import FEATURES, finished


def told(row, nats=lambda at: float(at)):
    """A finished row with a surprise for each of its words."""
    count = sum(len(part.split()) for part in (row["thinking"], row["answer"]))
    means = {"student_surprisal": 2.0, "student_rank": 3.0, "student_rsr": 1.5} if count else {}
    return {**row, **dict.fromkeys(heat.COLUMNS), **means, heat.WORDS: [nats(at) for at in range(count)] or None}


@pytest.fixture(scope="module")
def rows():
    return [told({**row, "thinking": row["thinking"] or "", "answer": row["answer"] or ""}) for row in finished(20)]


def test_a_word_is_as_surprising_as_its_tokens_together():
    text, offsets = "so 12 = ?", [(0, 2), (2, 4), (4, 5), (5, 7), (7, 9)]
    logprobs = [math.log(p) for p in (0.5, 0.5, 0.25, 0.125, 1.0)]
    expected = [round(-math.log(p), 3) for p in (0.5, 0.125, 0.125, 1.0)]
    assert heat.by_word(text, offsets, logprobs) == pytest.approx(expected)
    assert heat.by_word(text, offsets, logprobs[:2]) == pytest.approx(expected[:1])  # the second word is not over
    assert heat.by_word("", [], []) == []


def test_segments_cover_each_span_and_a_cut_word_is_in_both():
    text = "so we add 1 + 2 = 3"
    spans = [
        {"author": "student", "part": "thinking", "start": 0, "end": 12, "tokens": 3},
        {"author": "teacher", "part": "thinking", "start": 12, "end": 38, "tokens": 4},
        {"author": "student", "part": "answer", "start": 38, "end": 42, "tokens": 2},
    ]
    content = f"<think>\n{text}\n</think>\n\nyes."
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": content}]}
    row |= {
        "thinking": text,
        "answer": "yes.",
        "spans": spans,
        heat.WORDS: [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0],
    }
    assert heat.segments(row) == [
        [(2, 1.0), (2, 2.0)],
        [(1, 2.0), (4, 3.0), (2, 4.0), (2, 5.0), (2, 6.0), (2, 7.0), (2, 8.0)],
        [(4, 9.0)],
    ]
    found = list(heat.row_words(row))
    assert [word.author for word in found] == ["student", "student", *["teacher"] * 6, "student"]
    assert found[0].place == 0 and found[1].place == pytest.approx(3 / 19)


def test_segments_of_any_rows_lie_end_to_end(rows):
    for row in rows:
        lengths = [sum(size for size, _ in span) for span in heat.segments(row)]
        assert lengths == [len(piece.text) for piece in heat.pieces(row)] or not lengths


def test_statistics_and_tables_tell_surprise_by_author_where_the_columns_are(rows):
    plain = summarize(Dataset.from_list(list(finished(20)), features=FEATURES))
    assert plain["surprise"] is None and "surprise" not in tables(plain) and figures.names(plain) == figures.NAMES
    summary = summarize(Dataset.from_list([told(row, lambda at: 2.0) for row in rows]))
    found = summary["surprise"]
    assert found["rsr"] == 1.5 and found["thinking"]["teacher"]["nats"] == 2.0
    words = sum(found[part][who]["words"] for part in ("thinking", "answer") for who in ("teacher", "student"))
    assert words == sum(len(row[heat.WORDS] or ()) for row in rows)
    assert {nats for nats in found["along"]["teacher"] if nats is not None} == {2.0}
    assert "1.50" in tables(summary)["surprise"].note
    assert "2.00 by the teacher" in figures.describe(figures.SURPRISE, summary)
    assert figures.image(figures.SURPRISE, summary).startswith(b"<?xml")


def test_the_viewer_gets_the_heat_of_its_spans_only_where_there_is_one(rows):
    warm = next(row for row in rows if row["spans"])
    spans = viewer.shown(warm)
    found = viewer.warmth_of(warm, spans)
    assert len(found) == len(spans)
    assert all(sum(size for size, _ in own) == len(span[3]) for own, span in zip(found, spans, strict=True) if own)
    assert viewer.warmth_of({**warm, heat.WORDS: None}, spans) is None
    assert heat.WORDS not in viewer.details(warm, [])
