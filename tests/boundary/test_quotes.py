"""An annotator's answer is read strictly; every fault has its name."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tessy_hf.boundary.quotes import Rejected, locate, parse
from tessy_hf.vocabulary import words

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
