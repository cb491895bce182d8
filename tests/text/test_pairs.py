"""Rows of teachers and students with vocabularies of every kind: text as written, and the same for any k."""

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tessy_hf.engines.scripted import Script
from tests.rules import (
    GreedyModel,
    RulePredictor,
    by_all_ids,
    by_first_letter,
    scripted,
    spans,
    vocabulary,
    write,
)
from tests.worlds import RARER_TOKENIZERS, TEXT

PAIRS = sorted({*product(RARER_TOKENIZERS, [*RARER_TOKENIZERS, "qwen"]), *product(["harmony"], RARER_TOKENIZERS)})
CHUNKS = [1, 3, 20, None, "stream"]

pieces = st.sampled_from(
    [*TEXT.split(" "), "\n", "\n\n", "  ", "\t", ",\n", "}\n\n", "。", "，你好", " 🙂", "don't", "é"]
)
texts = st.lists(pieces, min_size=1, max_size=12).map(" ".join)


def scripts(name):
    """Scripts of rough text that begin with a word that only one author uses."""
    return st.lists(texts.map(lambda text: f" {name} {text}"), min_size=1, max_size=3)


@pytest.mark.parametrize(("teacher", "student"), PAIRS)
@pytest.mark.parametrize("k", [1, 20, "stream"])
def test_a_row_has_the_words_as_they_were_written(teacher, student, k):
    wrote = ["Okay,  so\n\nI need (a b) Zebra", " go\tNow", " it"], ["\n\nStop  Please be", " Take: 你好， 🙂 care"]
    row = write(
        scripted(wrote[1], teacher),
        scripted(Script(wrote[0], "It  is\n 3."), student),
        (RulePredictor(by_first_letter, teacher), RulePredictor(by_first_letter, student)),
        chunk_tokens=k,
    )
    assert spans(row) == [
        ("student", "Okay,"),
        ("teacher", "\n\nStop  Please"),
        ("student", " go"),
        ("teacher", " Take: 你好， 🙂"),
        ("student", " it"),
    ]
    assert row.text("answer") == "It  is\n 3."


@pytest.mark.slow
@pytest.mark.parametrize(("teacher", "student"), PAIRS)
@settings(max_examples=6)
@given(
    wrote=st.tuples(scripts("Tea"), scripts("dye")),
    reader=st.sampled_from(["qwen", *RARER_TOKENIZERS]),
    rule=st.sampled_from([by_first_letter, by_all_ids]),
    budget=st.sampled_from([9, 10_000]),
)
def test_scripted_rows_do_not_depend_on_k(teacher, student, wrote, reader, rule, budget):
    predictors = RulePredictor(rule, reader), RulePredictor(rule, reader)
    engines = scripted(wrote[0], teacher), scripted(wrote[1], student)
    rows = [write(*engines, predictors, chunk_tokens=k, max_thinking_tokens=budget) for k in CHUNKS]
    assert rows[0].finish_reason == ("stop" if rows[0].closed else "length")
    for row in rows:
        assert (spans(row), row.finish_reason) == (spans(rows[0]), rows[0].finish_reason)
        assert "\ufffd" not in row.text("thinking")


@pytest.mark.slow
@pytest.mark.parametrize(("teacher", "student"), PAIRS)
@settings(max_examples=6)
@given(data=st.data(), weights=st.integers(0, 2**32 - 1), reader=st.sampled_from(["qwen", *RARER_TOKENIZERS]))
def test_rows_of_greedy_models_do_not_depend_on_k(teacher, student, data, weights, reader):
    """Ids are drawn at random: they are rarely the tokenizer's own choice, and bytes need not make characters."""
    alphabets = [
        data.draw(st.lists(st.sampled_from(sorted({*vocabulary(kind).encode(TEXT).ids})), min_size=8, max_size=40))
        for kind in (teacher, student)
    ]
    predictors = RulePredictor(by_all_ids, reader), RulePredictor(by_all_ids, reader)
    rows = [
        write(
            *(GreedyModel(kind, weights, ids) for kind, ids in zip((teacher, student), alphabets, strict=True)),
            predictors,
            chunk_tokens=k,
            max_thinking_tokens=60,
            max_answer_tokens=1,
        )
        for k in CHUNKS
    ]
    assert len({(str(spans(row)), row.finish_reason) for row in rows}) == 1
