"""Segments are checked as they are read, split by problem, and their spans become kinds of tokens and words."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tessy_hf.boundary_training.segments import (
    UNKNOWN,
    Segment,
    read_segments,
    span_starts,
    split_by_problem,
    token_kinds,
    word_kinds,
)
from tessy_hf.errors import DatasetError
from tests.rules import vocabulary
from tests.worlds import TOKENIZERS

TEXT = "Okay, so 3 + 4 is 7.\n\nWait,\u2028maybe it (so?) is Größe 🙂 fine."


def marked(text=TEXT, *quotes, **about):
    """A segment in which these stretches are style."""
    spans, cursor = [], 0
    for quote in quotes:
        start = text.index(quote, cursor)
        cursor = start + len(quote)
        spans.append((start, cursor))
    return Segment(text, tuple(spans), **about)


def row(**changes):
    spans = [{"start": 0, "end": 8, "text": "Okay, so"}, {"start": 22, "end": 27, "text": None}]
    return {"id": "s1", "text": TEXT, "style_spans": spans, "problem_id": "p", "family": "f", **changes}


def test_a_row_is_read_with_what_it_says_of_itself():
    segment = Segment.from_row(row(weight=0.3, source_model="m"))
    assert segment == Segment(TEXT, ((0, 8), (22, 27)), "p", "f", "m", 0.3, "s1")
    assert Segment.from_row({"text": TEXT, "style_spans": segment.marked()}).spans == segment.spans


def test_the_authors_annotations_are_read():
    spans = [{"span": "Okay, so", "start": 0, "end": 8}]
    segment = Segment.from_row({"id_ddm": "a-1", "think_text": TEXT, "pred_result": spans})
    assert segment == Segment(TEXT, ((0, 8),), problem="a-1", key="a-1")
    with pytest.raises(DatasetError, match="does not fit its text"):
        Segment.from_row({"id_ddm": "a-1", "think_text": TEXT, "pred_result": [{**spans[0], "end": 7}]})


def test_a_file_is_read_line_by_line_whatever_its_lines_hold(tmp_path):
    file = tmp_path / "segments.jsonl"
    file.write_text("\n".join(json.dumps(row(id=f"s{i}"), ensure_ascii=False) for i in range(3)) + "\n\n", "utf-8")
    assert [segment.key for segment in read_segments(file)] == ["s0", "s1", "s2"]
    assert read_segments(file)[0].text == TEXT


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"style_spans": None}, "Expected are `text`"),
        ({"text": 7}, "Expected are `text`"),
        ({"style_spans": [{"start": 3, "end": 3}]}, "3-3"),
        ({"style_spans": [{"start": 0, "end": 999}]}, "0-999"),
        ({"style_spans": [{"start": 5, "end": 9}, {"start": 0, "end": 4}]}, "0-4"),
        ({"style_spans": [{"start": 0, "end": 4, "text": "Wait"}]}, "'Wait'"),
    ],
)
def test_a_row_that_is_no_segment_is_refused_by_name(changes, told):
    with pytest.raises(DatasetError, match="'s1'") as caught:
        read_segments([row(**changes)])
    assert told in str(caught.value)


def test_a_file_that_is_none_is_refused(tmp_path):
    (tmp_path / "torn.jsonl").write_text('{"text": ')
    for file in ("torn.jsonl", "missing.jsonl"):
        with pytest.raises(DatasetError, match=f"{file}.*cannot be read"):
            read_segments(tmp_path / file)
    with pytest.raises(DatasetError, match="no segments"):
        read_segments([])


def test_no_problem_is_on_both_sides_of_a_split():
    segments = [Segment("a b", (), problem=f"p{i % 7}", key=str(i)) for i in range(50)]
    train, kept = split_by_problem(segments, 0.3, seed=4)
    assert len(train) + len(kept) == 50 and len({s.problem for s in kept}) == 2
    assert not {s.problem for s in train} & {s.problem for s in kept}
    assert split_by_problem(segments, 0.3, seed=4) == (train, kept) != split_by_problem(segments, 0.3, seed=5)
    both = split_by_problem([Segment("a", (), problem=p) for p in "ab"], 0.99)
    assert [len(part) for part in both] == [1, 1]


@pytest.mark.parametrize(("problems", "told"), [(["p", ""], "no `problem_id`"), (["p", "p"], "At least two")])
def test_a_split_that_cannot_be_by_problem_is_refused(problems, told):
    with pytest.raises(DatasetError, match=told):
        split_by_problem([Segment("a", (), problem=problem) for problem in problems], 0.5)


@pytest.mark.parametrize("kind", sorted(TOKENIZERS))
def test_a_token_that_overlaps_a_style_span_is_style(kind):
    segment = marked(TEXT, "Okay, so", "Wait,\u2028maybe", "so?", "🙂")
    encoding = vocabulary(kind).encode(segment.text)
    style, blank = "style", "blank"
    for (start, end), token in zip(encoding.offsets, token_kinds(segment, encoding.offsets), strict=True):
        written = [i for i in range(start, end) if not TEXT[i].isspace()]
        expected = (any(segment.style()[i] for i in written) and style) or (not written and blank) or None
        assert {1: style, UNKNOWN: blank, 0: None}[int(token)] == expected


def test_words_and_span_starts():
    segment = marked(TEXT, "Okay, so", "Wait,\u2028maybe", "so?")
    assert word_kinds(segment) == [True] * 2 + [False] * 5 + [True] * 2 + [False, True] + [False] * 4
    assert [TEXT[start:].split()[0] for start in span_starts(segment)] == ["3", "Wait,", "it", "(so?)", "is"]


@given(st.text("ab ,\n🙂", max_size=40), st.data())
def test_a_part_has_the_spans_of_its_stretch(text, data):
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=6)))
    segment = Segment(text, tuple(zip(cuts[::2], cuts[1::2], strict=False)))
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, len(text)))
    part = segment.part(start, end)
    assert part.text == text[start:end] and np.array_equal(part.style(), segment.style()[start:end])
