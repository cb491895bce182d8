"""An annotator's answer is read strictly; every fault has its name."""

import json
from collections import Counter
from functools import cache
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tessy_hf.boundary_training.annotation_folder import AnswerLog, collect
from tessy_hf.boundary_training.answers import Fault, Rejected, locate, parse
from tessy_hf.boundary_training.sampling import Drawn
from tessy_hf.boundary_training.segments import Segment
from tessy_hf.boundary_training.settings import AnnotationSettings
from tessy_hf.text.vocabulary import words
from tests.test_fuzz import JSON

TEXT = "Okay, so 3 + 4 is 7.\n\nWait, also Sophie said so: so what? Größe 🙂 stays, okay."


@pytest.mark.parametrize(
    "answer",
    [
        '["Okay, so", "Wait,"]',
        ' \n["Okay, so",\n "Wait,"]\n',
        '```json\n["Okay, so", "Wait,"]\n```',
        '```\n["Okay, so", "Wait,"]\n```',
    ],
)
def test_a_json_array_is_read_also_in_a_code_fence(answer):
    assert parse(answer) == ["Okay, so", "Wait,"]


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        ("", "empty"),
        (" \n", "empty"),
        ("The spans are: Okay", "not json"),
        ('["Okay", "so"', "not json"),
        ('Here you are:\n```json\n["Okay"]\n```', "not json"),
        ('```json\n["Okay"]\n```\n```json\n["so"]\n```', "not json"),
        ("```json\nOkay\n```", "not json"),
        ('{"spans": ["Okay"]}', "not an array of strings"),
        ('["Okay", 3]', "not an array of strings"),
        ('[["Okay"]]', "not an array of strings"),
        ('"Okay"', "not an array of strings"),
        ("null", "not an array of strings"),
    ],
)
def test_anything_else_is_rejected_by_its_fault(answer, fault):
    with pytest.raises(Rejected) as caught:
        parse(answer)
    assert caught.value.fault == fault


@pytest.mark.parametrize(
    ("quotes", "fault"),
    [
        (["Okay so"], "not verbatim"),
        (["okay, so"], "not verbatim"),
        (["Wait,  also"], "not verbatim"),
        (["Okay, so", "Wait,", "Okay, so"], "out of order"),
        (["Wait,", "Okay"], "out of order"),
        (["Okay, so", "so 3"], "nested"),
        (["Okay, so", "Okay"], "nested"),
        (["Okay, so 3 + 4", "3 + 4 is"], "nested"),
        (["lso"], "inside a word"),
        (["Soph"], "inside a word"),
        (["Okay", ""], "empty span"),
        (["Okay", " \n"], "empty span"),
    ],
)
def test_a_quote_that_is_not_in_the_text_so_rejects_the_answer(quotes, fault):
    with pytest.raises(Rejected) as caught:
        locate(TEXT, quotes)
    assert caught.value.fault == fault


def test_quotes_are_found_in_order_as_whole_words():
    quotes = ["Okay, so", "Wait, also", "so", " so what? ", "Größe 🙂", "okay"]
    spans = locate(TEXT, quotes)
    assert [TEXT[a:b] for a, b in spans] == [quote.strip() for quote in quotes]
    assert spans[2][0] == TEXT.index("so: so")  # not the "So" of "Sophie", nor the "so" of "also"


def test_no_quotes_are_no_spans():
    assert locate(TEXT, parse("[]")) == []


@given(st.text("ab ,\n🙂é", max_size=60), st.data())
def test_what_is_cut_out_of_a_text_at_words_is_found_again(text, data):
    places = words(text)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(places)), max_size=6)))
    quotes = [text[places[a][0] : places[b - 1][1]].strip() for a, b in zip(cuts[::2], cuts[1::2], strict=False)]
    spans = locate(text, parse(json.dumps(quotes)))
    assert [text[a:b] for a, b in spans] == quotes
    assert all(before[1] <= after[0] for before, after in zip(spans, spans[1:], strict=False))


# --- whatever is answered

ANY_TEXT = st.text(st.one_of(st.characters(), st.characters(categories=["Cs"])), max_size=30)
TEXTS = st.one_of(st.just(TEXT), st.text("ab ,.\n'é🙂", min_size=1, max_size=40))


@st.composite
def quotes_of(draw, text):
    """Pieces of a text, of whole words or not: in order, nested, twice, or a little wrong."""
    places = words(text) or [(0, len(text))]
    ends = st.one_of(st.integers(0, len(text)), st.sampled_from(sorted({end for place in places for end in place})))
    cuts = draw(st.lists(ends, max_size=10))
    cuts = draw(st.sampled_from([cuts, sorted(cuts)]))
    pieces = [text[min(pair) : max(pair)] for pair in zip(cuts[::2], cuts[1::2], strict=False)]
    again, wrong = draw(st.sampled_from([0, 0, 1, 5])), draw(st.lists(st.one_of(ANY_TEXT, JSON), max_size=1))
    return [*pieces, *pieces[:again], *(wrong if draw(st.integers(0, 3)) == 0 else [])]


@st.composite
def answers_to(draw, text):
    """What an annotator may answer: the array, alone or in fences or prose, cut off, or anything else."""
    array = json.dumps(draw(quotes_of(text)), ensure_ascii=draw(st.booleans()))
    other = draw(st.one_of(ANY_TEXT, JSON.map(json.dumps)))
    forms = [
        "{0}",
        "```json\n{0}\n```",
        "```\n{0}\n```",
        " \n{0}\n",
        "```{0}```",
        "Here:\n```\n{0}\n```",
        "{0}\n{0}",
        "{1}",
    ]
    answer = draw(st.sampled_from(forms)).format(array, other)
    return answer[: draw(st.one_of(st.none(), st.integers(0, len(answer))))]


def content_of(answer):
    """The array that an answer holds, read without the parser that is tested; ``None`` where there is none."""
    lines = answer.strip().split("\n")
    language = lines[0].rstrip(" \t").removeprefix("```")
    fenced = len(lines) > 2 and lines[0].startswith("```") and lines[-1].strip(" \t") == "```"
    if fenced and (not language or (language.isascii() and language.isalpha())):
        lines = lines[1:-1]
    try:
        return json.loads("\n".join(lines))
    except (ValueError, RecursionError):
        return None


def whole(text, start, end):
    return not any(text[at - 1 : at].isalnum() and text[at : at + 1].isalnum() for at in (start, end))


@cache
def can_be_placed(text, quotes, cursor=0):
    """Whether the quotes stand in the text one after another: all places are tried."""
    if not quotes:
        return True
    size = len(quotes[0])
    starts = [i for i in range(cursor, len(text) - size + 1) if text[i : i + size] == quotes[0]]
    return any(can_be_placed(text, quotes[1:], i + size) for i in starts if whole(text, i, i + size))


def check(text, answer):
    """Read an answer; check that it is accepted if and only if it should be. Returns its spans, or its fault."""
    content = content_of(answer)
    quotes = tuple(quote.strip() for quote in content) if is_array_of_strings(content) else None
    right = quotes is not None and all(quotes) and can_be_placed(text, quotes)
    try:
        spans = locate(text, parse(answer))
    except Rejected as rejected:
        assert not right and rejected.fault in get_args(Fault)
        return rejected.fault
    assert right and tuple(text[start:end] for start, end in spans) == quotes
    assert all(whole(text, *span) for span in spans)
    assert all(before[1] <= after[0] for before, after in zip(spans, spans[1:], strict=False))
    return spans


def is_array_of_strings(content):
    return isinstance(content, list) and all(isinstance(quote, str) for quote in content)


@given(st.data())
def test_any_answer_is_accepted_as_it_should_be_or_rejected_by_a_named_fault(data):
    text = data.draw(TEXTS)
    check(text, data.draw(answers_to(text)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        ("[" * 100_000, "not json"),
        ("[" * 100_000 + '"Okay"' + "]" * 100_000, "not json"),
        (f"[{'9' * 10_000}]", "not json"),
        (f"[{'9' * 1000}]", "not an array of strings"),
        ("[NaN, Infinity]", "not an array of strings"),
        (json.dumps(["Okay"] * 100_000), "nested"),
        (json.dumps(["Okay, " * 100_000]), "not verbatim"),
        ('["\\ud800"]', "not verbatim"),
        ('["\ud800"]', "not verbatim"),
        ('["Okay\x00"]', "not json"),
        ("\ud800", "not json"),
        ("\ufeff[]", "not json"),
        ("```" * 100_000, "not json"),
        ("```json\n" + "\n" * 100_000 + "```", "not json"),
    ],
)
def test_what_breaks_parsers_is_rejected_by_its_fault(answer, fault):
    with pytest.raises(Rejected) as caught:
        locate(TEXT, parse(answer))
    assert caught.value.fault == fault


@pytest.mark.slow
@given(st.data())
def test_any_answer_comes_back_from_the_disk_and_is_counted(tmp_path_factory, data):
    text = data.draw(TEXTS)
    said = data.draw(st.lists(st.one_of(st.none(), answers_to(text)), max_size=5))
    aligned = data.draw(st.booleans())
    path = tmp_path_factory.mktemp("answers") / "answers.jsonl"
    answers = AnswerLog(path)
    for order, answer in enumerate(said):
        told = {"answer": answer, "finished": answer is not None, "error": "gone" if answer is None else None}
        answers.add(Drawn(f"t:{order}", text, aligned, "t", "p", "m", "f"), order, **told)
    answers.close()
    again = AnswerLog(path)
    again.close()
    assert [row["answer"] for row in again.rows.values()] == said
    rows, counts, _ = collect(again, AnnotationSettings(words=10))
    outcomes = ["failed" if answer is None else check(text, answer) for answer in said]
    assert counts == Counter(outcome if isinstance(outcome, str) else "accepted" for outcome in outcomes)
    assert len(rows) == counts.get("accepted", 0)
    for segment in map(Segment.from_row, rows):
        assert segment.text in text and len(words(segment.text)) <= 10


@pytest.mark.parametrize("aligned", [True, False])
def test_a_segment_of_white_space_is_kept_as_it_is(tmp_path, aligned):
    answers = AnswerLog(tmp_path / "answers.jsonl")
    told = {"answer": "[]", "finished": True, "error": None}
    answers.add(Drawn("t:0", " \n", aligned, "t", "p", "m", "f"), 0, **told)
    answers.close()
    [row], counts, _ = collect(answers, AnnotationSettings(words=10))
    assert counts == {"accepted": 1} and row["text"] == " \n" and row["style_spans"] == []
