"""Weaknesses are named: style by kind of phrase, and the worst segments on a page."""

import numpy as np
import pytest

from tessy_hf.boundary_training.segments import Segment
from tessy_hf.boundary_training.weaknesses import by_kind, kind_of, worst_page


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("So", "connective"),
        ("But then,", "connective"),
        ("Wait,", "connective"),
        ("Let me check", "opener"),
        ("Okay, so I need to", "opener"),
        ("The user wants", "opener"),
        ("So maybe", "hedge"),
        ("Hmm,", "hedge"),
        ("That seems correct.", "verdict"),
        ("Makes sense.", "verdict"),
        ("Good.", "verdict"),
        ("For example:", "lead-in"),
        ("Implementation plan:", "lead-in"),
        ("Zebra", "other"),
    ],
)
def test_spans_are_told_apart_by_their_words(text, kind):
    assert kind_of(text) == kind


def mask(text, *parts):
    found = np.zeros(len(text), dtype=bool)
    for part in parts:
        found[text.index(part) : text.index(part) + len(part)] = True
    return found


def test_style_is_counted_by_kind():
    text = "So 5 is it. Let me check 7. Good."
    segment = Segment(text, ((0, 2), (12, 24), (28, 33)))
    found = by_kind([segment], [mask(text, "So 5", "check", "Good.")])
    assert found["connective"] == (2, 2, 2, 4)  # "So" was found; of "So 5" half is marked
    assert found["opener"] == (5, 12, 0, 0)
    assert found["verdict"] == (5, 5, 5, 5)
    assert found["other"] == (0, 0, 5, 5)


def test_the_worst_segments_are_shown_and_model_text_is_escaped():
    texts = ["So <b>5</b> & 6.", "Okay then, go on.", "Fine."]
    segments = [Segment(text, ((0, 2),), key=f"<k{i}>", domain="code") for i, text in enumerate(texts)]
    page = worst_page(segments, [mask(texts[0], "<b>"), mask(texts[1], "Okay then, go"), mask(texts[2], "Fi")], most=2)
    assert page.index("&lt;k1&gt; · code: 11 characters") < page.index("&lt;k0&gt;") and "&lt;k2&gt;" not in page
    assert "<mark>So</mark> <u>&lt;b&gt;</u>5&lt;/b&gt; &amp; 6." in page and "<b>" not in page
