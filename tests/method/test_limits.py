"""Degenerate loops are told from the text alone, and nothing else is taken for one."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tessy_hf.method.limits import LONGEST_PERIOD, WINDOW, LoopDetector
from tessy_hf.text.vocabulary import words


def loop(period, count=WINDOW):
    """Words that come round every ``period`` words, each with a space before it."""
    return "".join(f" w{index % period}" for index in range(count))


def end_of_word(text, number):
    """Where the word with this number, from 1, ends."""
    return words(text)[number - 1][1]


@pytest.mark.parametrize("period", [1, 2, 3, 63, LONGEST_PERIOD])
def test_a_loop_is_told_once_a_window_of_words_repeats(period):
    text = loop(period, 2 * WINDOW)
    assert LoopDetector().feed(text[: end_of_word(text, WINDOW - 1)]) is None
    assert LoopDetector().feed(text) == end_of_word(text, WINDOW)


@pytest.mark.parametrize("period", [LONGEST_PERIOD + 1, 100, WINDOW])
def test_a_text_that_comes_round_too_seldom_is_no_loop(period):
    assert LoopDetector().feed(loop(period, 3 * WINDOW)) is None


def test_a_loop_after_other_text_is_told_when_it_fills_a_window():
    text = "".join(f" n{index}" for index in range(100)) + loop(5, 2 * WINDOW)
    assert LoopDetector().feed(text) == end_of_word(text, 2 * WINDOW)


def test_one_other_word_in_the_window_makes_it_no_loop():
    spoken = loop(4, WINDOW).split()
    for place in (0, 100, WINDOW - 1):
        changed = [*spoken]
        changed[place] = "other"
        assert LoopDetector().feed(" ".join(["", *changed])) is None


def test_other_whitespace_makes_another_word():
    assert LoopDetector().feed(" x\n x" * (WINDOW // 2)) == len(" x\n x") * WINDOW // 2  # a loop of two words
    text = "".join(" " * (1 + index) + "x" for index in range(WINDOW))
    assert LoopDetector().feed(text) is None


def test_ordinary_text_is_no_loop():
    text = "".join(f" Step {n}: add {n} to the sum, which is {n * (n + 1) // 2}." for n in range(1, 400))
    assert LoopDetector().feed(text) is None


def test_nothing_is_no_loop():
    detector = LoopDetector()
    assert [detector.feed(text) for text in ("", "  \n", "")] == [None, None, None]


@settings(max_examples=50)
@given(
    lead=st.integers(0, 300),
    period=st.integers(1, 70),
    cuts=st.lists(st.integers(1, 800), max_size=8, unique=True).map(sorted),
)
def test_the_place_to_stop_does_not_depend_on_the_pieces_fed(lead, period, cuts):
    text = "".join(f" n{index}" for index in range(lead)) + loop(period, 800)
    whole = LoopDetector().feed(text)
    ends = [end for _, end in words(text)]
    bounds = [0, *(ends[cut - 1] for cut in cuts), len(text)]
    detector, found = LoopDetector(), None
    for start, end in zip(bounds, bounds[1:], strict=False):
        kept = detector.feed(text[start:end])
        if kept is not None:
            found = start + kept
            break
    assert found == whole
    assert (whole is not None) == (period <= LONGEST_PERIOD)
