"""Figures of a predictor are those one counts by hand."""

import asyncio
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import precision_recall_fscore_support

from tessy_hf.boundary.predictor import BoundaryPredictor, window_start
from tessy_hf.boundary_training.examples import IGNORED, encode
from tessy_hf.boundary_training.metrics import evaluate, evaluate_readings, plot
from tessy_hf.boundary_training.readings import Reading, attribute, is_causal, read
from tessy_hf.boundary_training.segments import Segment, word_kinds
from tessy_hf.method.chunk import Chunk, Marks
from tessy_hf.method.judging import PredictorJudge
from tessy_hf.text.transcript import Transcript
from tests.boundary.test_predictor import NAMED, save
from tests.rules import vocabulary
from tests.worlds import TEXT, TOKENIZERS

SAID = "Okay, so 3 + 4 is 7. Wait, maybe 8? Fine then."


def by_word(segment, style, probability=0.9):
    """A reading in which each word is one token, style where its number is in ``style``."""
    starts = [0, *(i for i in range(1, len(segment.text)) if segment.text[i - 1].isspace())]
    offsets = list(zip(starts, [*starts[1:], len(segment.text)], strict=True))
    return Reading(offsets, np.array([probability if i in style else 1 - probability for i in range(len(offsets))]))


def segment(**about):
    return Segment(SAID, ((0, 8), (21, 32)), problem="p", **about)  # "Okay, so" and "Wait, maybe"


def figures_of(*style, segments=None):
    segments = segments or [segment() for _ in style]
    return evaluate_readings([by_word(s, found) for s, found in zip(segments, style, strict=True)], segments).overall


def test_a_perfect_reading_is_perfect():
    figures = figures_of({0, 1, 7, 8})
    assert (figures.char.f1, figures.span.f1, figures.token_accuracy, figures.token_style.f1) == (1, 1, 1, 1)
    assert (figures.boundary_words.exact, figures.boundary_words.distribution) == (1, {0: 1})
    assert figures.char_f1_interval == (1, 1)
    assert figures.style_share == pytest.approx(len("Okay, soWait, maybe") / len(SAID))


def test_characters_are_counted_as_they_are_marked():
    found = evaluate_readings([by_word(segment(), {0, 1, 2, 7})], [segment()])  # "Okay, so 3" and "Wait,"
    right, predicted, marked = len("Okay, soWait,"), len("Okay, so 3Wait,"), len("Okay, soWait, maybe")
    figures = found.overall
    assert figures.char.precision == pytest.approx(right / predicted)
    assert figures.char.recall == pytest.approx(right / marked)
    assert found.char_f1 == figures.char.f1 == pytest.approx(2 * right / (predicted + marked))
    assert found.char_f1_without_whitespace == pytest.approx(2 * (right - 1) / (predicted - 2 + marked - 2))
    assert figures.span.f1 == 0


@pytest.mark.parametrize(
    ("style", "error"),
    [({0, 1}, 0), ({0}, -1), ({0, 1, 2}, 1), (set(), -2), ({0, 1, 2, 3, 4}, 3), (set(range(12)), 10)],
)
def test_the_first_boundary_of_style_is_where_capability_begins(style, error):
    figures = figures_of(style)
    assert figures.boundary_words.distribution == {error: 1} == figures.boundary_tokens.distribution
    assert figures.boundary_words.exact == (error == 0)
    assert figures.boundary_words.within_1 == (abs(error) <= 1)
    assert figures.boundary_words.within_3 == (abs(error) <= 3)


def test_a_segment_that_begins_with_capability_is_the_teachers():
    teachers = Segment(SAID, ((21, 32),), problem="p")
    segments = [teachers, segment(), Segment("3 + 4", (), problem="q")]
    readings = [by_word(s, style) for s, style in zip(segments, ({7, 8}, {0}, set()), strict=True)]
    found = evaluate_readings(readings, segments)
    assert (found.by_author["teacher"].segments, found.by_author["student"].segments) == (2, 1)
    assert found.by_author["teacher"].boundary_words.exact == 1
    assert found.by_author["student"].boundary_words.distribution == {-1: 1}


def test_a_gap_between_two_marks_that_touch_is_an_error_unless_whitespace_is_left_out():
    touching = Segment(SAID, ((0, 5), (6, 8)), problem="p")
    found = evaluate_readings([by_word(touching, {0, 1})], [touching])
    assert (found.char_f1, found.char_f1_without_whitespace) == (pytest.approx(2 * 7 / (7 + 8)), 1)


def test_whitespace_of_its_own_token_belongs_to_the_run_around_it():
    text = "so\n\nwait 3"
    marked = Segment(text, ((0, 8),), problem="p")
    offsets = [(0, 2), (2, 4), (4, 8), (8, 10)]
    assert evaluate_readings([Reading(offsets, np.array([0.9, 0.1, 0.9, 0.1]))], [marked]).char_f1 == 1


@given(st.data())
def test_the_character_figures_are_those_of_plain_counting(data):
    words_of = SAID.split(" ")
    style = data.draw(st.sets(st.integers(0, len(words_of) - 1)))
    cuts = sorted(data.draw(st.sets(st.integers(0, len(SAID)), max_size=8)))
    marked = Segment(SAID, tuple(zip(cuts[::2], cuts[1::2], strict=False)), problem="p")
    said = "".join(
        ("x" * len(word) if i in style else "-" * len(word)) + ("x" if {i, i + 1} <= style else "-")
        for i, word in enumerate(words_of)
    )
    truth = ["-"] * len(SAID)
    for start, end in marked.spans:
        truth[start:end] = "x" * (end - start)
    right = sum(one == other == "x" for one, other in zip(said, truth, strict=False))
    counted = said.count("x") + truth.count("x")
    found = evaluate_readings([by_word(marked, style)], [marked])
    assert found.char_f1 == pytest.approx(2 * right / counted if counted else 0)


def test_a_span_of_several_marks_is_one_and_is_right_if_its_words_are():
    touching = Segment(SAID, ((0, 4), (6, 8), (21, 26), (27, 32)), problem="p")
    found = evaluate_readings([by_word(touching, {0, 1, 7, 9})], [touching]).overall.span
    assert (found.precision, found.recall) == (1 / 3, 1 / 2)


def test_figures_are_kept_apart_by_family_and_model():
    segments = [segment(family="a", source_model="x"), segment(family="b", source_model="y"), segment()]
    readings = [by_word(s, style) for s, style in zip(segments, ({0, 1, 7, 8}, {0}, set()), strict=True)]
    found = evaluate_readings(readings, segments)
    assert found.char_f1_by_family == {"a": 1, "b": found.by_source_model["y"].char.f1}
    assert found.overall.segments == 3 and set(found.by_source_model) == {"x", "y"}


def test_calibration_compares_probability_with_share():
    segments = [segment()] * 2
    readings = [by_word(segments[0], {0, 1, 7, 8}, 0.8), by_word(segments[1], set(range(12)), 0.8)]
    found = evaluate_readings(readings, segments).overall
    low, high = found.calibration
    assert (low.tokens, low.style, high.tokens, high.style) == (8, 0, 16, 0.5)
    assert found.calibration_error == pytest.approx((8 * 0.2 + 16 * (0.8 - 0.5)) / 24)


def test_nothing_said_of_the_first_token_counts_for_nothing():
    reading = by_word(segment(), {1, 7, 8})
    reading.style[0] = np.nan
    found = evaluate_readings([reading], [segment()]).overall
    assert (found.char.f1, found.span.f1, found.boundary_words.exact, found.tokens) == (1, 1, 1, 11)


@pytest.mark.slow
@settings(max_examples=40)
@given(st.data())
def test_token_figures_are_those_of_scikit_learn(data):
    kind = data.draw(st.sampled_from(sorted(TOKENIZERS)))
    offsets = vocabulary(kind).encode(TEXT).offsets
    cuts = sorted(data.draw(st.sets(st.integers(0, len(TEXT)), max_size=12)))
    marked = Segment(TEXT, tuple(zip(cuts[::2], cuts[1::2], strict=False)), problem="p")
    style = np.array(data.draw(st.lists(st.floats(0, 1), min_size=len(offsets), max_size=len(offsets))))
    kinds = [
        (any(marked.style()[i] for i in range(a, b) if not TEXT[i].isspace()), style[n] > 0.5)
        for n, (a, b) in enumerate(offsets)
        if TEXT[a:b].strip()
    ]
    precision, recall, f1, _ = precision_recall_fscore_support(
        *zip(*kinds, strict=True), average="binary", zero_division=0
    )
    found = evaluate_readings([Reading(offsets, style)], [marked]).overall
    assert (found.token_style.precision, found.token_style.recall) == pytest.approx((precision, recall))
    assert found.token_style.f1 == pytest.approx(f1)
    assert found.token_accuracy == pytest.approx(np.mean([a == b for a, b in kinds]))


# --- reading


@pytest.mark.slow
@pytest.mark.parametrize("label_shift", [0, 1])
def test_texts_are_read_from_the_windows_that_the_method_reads(tmp_path, label_shift):
    predictor = BoundaryPredictor.from_pretrained(save(tmp_path, label_shift=label_shift, window=16, **NAMED))
    texts = [TEXT, "Okay.", TEXT[::-1]]
    for text, reading in zip(texts, read(predictor, texts, batch_size=2), strict=True):
        ids = predictor.vocabulary.encode(text).ids
        assert len(reading.style) == len(ids) == len(reading.offsets)
        assert bool(np.isnan(reading.style[0])) == bool(label_shift)
        for token in range(label_shift, len(ids)):
            start = window_start(token - label_shift, 16)
            said = predictor.probabilities([ids[start : token - label_shift + 1]])[0][-1]
            assert reading.style[token] == pytest.approx(said, abs=1e-5)
    predictor.close()


def test_a_word_is_judged_by_the_token_that_holds_its_first_letter():
    text = "so  indeed"
    reading = Reading([(0, 2), (2, 3), (3, 6), (6, 10)], np.array([0.1, 0.9, 0.2, 0.9]))
    assert reading.words(text, own_kind=True) == [False, False]
    reading.style[0] = np.nan
    assert reading.words(text, own_kind=True) == [True, False]


@pytest.mark.slow
def test_an_evaluation_is_told_in_full_and_drawn(tmp_path):
    predictor = BoundaryPredictor.from_pretrained(save(tmp_path / "m", label_shift=0, **NAMED))
    found = evaluate(predictor, [segment(family="f", source_model="m"), Segment(TEXT, ((0, 8),), family="g")])
    predictor.close()
    told = json.loads(found.model_dump_json())
    assert told["char_f1"] == found.overall.char.f1 and told["char_f1_by_family"].keys() == {"f", "g"}
    assert (told["model"], told["label_shift"], told["window"], told["causal"]) == (str(tmp_path / "m"), 0, 200, True)
    plot(found, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"


def test_a_reader_of_both_sides_is_told_from_a_causal_one(tmp_path):
    from transformers import BertConfig, BertForTokenClassification

    from tests.worlds import make_tokenizer

    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    BertForTokenClassification(BertConfig(vocab_size=512, **shape)).save_pretrained(tmp_path)
    make_tokenizer("qwen").save_pretrained(tmp_path)
    predictor = BoundaryPredictor.from_pretrained(str(tmp_path), label_shift=0, style_label=1)
    assert not is_causal(predictor, TEXT)
    predictor.close()


# --- look-ahead


@pytest.mark.parametrize("kind", ["qwen", "gpt2", "harmony"])
@pytest.mark.parametrize("lookahead", [0, 1, 3])
def test_what_is_taught_with_a_look_ahead_is_read_back_at_the_words_it_is_about(kind, lookahead):
    marked = segment()
    example = encode(marked, vocabulary(kind), 0, lookahead, end_id=0)
    assert len(example.ids) == len(vocabulary(kind).encode(SAID).ids) + lookahead == len(example.labels)
    said = np.array([np.nan if label == IGNORED else float(label) for label in example.labels])
    reading = attribute(SAID, vocabulary(kind).encode(SAID), said, 0, lookahead)
    assert reading.words(SAID, own_kind=False) == word_kinds(marked)
    if lookahead:
        assert evaluate_readings([reading], [marked]).char_f1_without_whitespace == 1


def test_a_text_shorter_than_the_look_ahead_is_read_at_end_tokens():
    example = encode(Segment("So 5", ((0, 2),)), vocabulary("qwen"), 0, 4, end_id=0)
    assert example.labels[-4:] == [IGNORED, IGNORED, 1, 0] and example.ids[-4:] == [0] * 4


def test_figures_by_domain_and_kind_are_told_beside_the_others():
    style = Segment("So it is 5.", ((0, 2),), domain="code", key="a")
    found = evaluate_readings([Reading([(0, 2), (2, 11)], np.array([0.9, 0.1]))], [style])
    assert found.char_f1_by_domain == {"code": 1} and found.by_domain["code"].char_f1_interval == (1, 1)
    assert found.by_kind["connective"].recall == found.by_kind["connective"].precision == 1


@pytest.mark.parametrize("own_kind", [False, True])
def test_the_method_finds_the_boundary_that_is_read_with_a_look_ahead(tmp_path, own_kind):
    predictor = BoundaryPredictor.from_pretrained(
        save(tmp_path, label_shift=0, lookahead=2, eos_token_id=7, window=16, initializer_range=0.5, **NAMED)
    )
    vocabulary = predictor.vocabulary
    for text in (SAID, TEXT, "So", SAID[::-1]):
        kinds = read(predictor, [text])[0].words(text, own_kind)
        reader = Transcript({}, [vocabulary]).reader(vocabulary)
        ends = [end for _, end in vocabulary.encode(text).offsets]
        chunk = Chunk.read(text, ends, Marks(), kept="", stopped=True, lookahead=2)
        found = asyncio.run(PredictorJudge(predictor, reader, own_kind=own_kind).first_of_other_kind(chunk))
        assert found == next((i for i, kind in enumerate(kinds) if kind != own_kind), None)
    predictor.close()
