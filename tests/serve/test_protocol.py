import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import ValidationError

from tessy_hf.errors import SettingsError
from tessy_hf.serve.protocol import ChatRequest, Stops
from tessy_hf.settings import Settings

LETTERS = st.text("ab\n", max_size=12)
STOPS = st.lists(st.text("ab\n", min_size=1, max_size=3), max_size=3)


@given(st.lists(LETTERS, max_size=6), STOPS)
@example(["b", "\n", "\n"], ["\n", "b\n\n"])  # the shorter one ends first, within the longer
@example(["ab\n"], ["b\n", "ab\n"])  # both end at once
def test_a_growing_text_is_cut_where_the_whole_text_is(pieces, stops):
    cutter, text = Stops(stops), "".join(pieces)
    shown = "".join([*map(cutter.feed, pieces), cutter.feed("", last=True)])
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    assert shown == (text[: min(ends)[1]] if ends else text)
    assert cutter.hit == bool(ends)


def asked(**options):
    return ChatRequest.model_validate_json(json.dumps({"model": "m", "messages": [], **options}))


def test_a_request_changes_the_recipe_for_itself():
    settings = Settings.check(temperature={"teacher": 1.0, "student": 0.5}, top_k=7, max_thinking_tokens=100)
    plain = asked(top_p=None, frequency_penalty=0.0, tools=[], logprobs=False, user="me").plan(settings, "row")
    assert plain == settings.plan("row")
    changed = asked(temperature=0, top_k=-1, max_tokens=300, max_completion_tokens=40).plan(settings, "row")
    assert {(one.temperature, one.top_k) for one in changed.sampling.values()} == {(0.0, None)}
    assert (changed.max_thinking_tokens, changed.max_tokens) == (40, 40)
    assert asked(max_tokens=300).plan(settings, "row").max_thinking_tokens == 100
    with pytest.raises(SettingsError, match=r"top_p=1\.5"):
        asked(top_p=1.5).plan(settings, "row")


@pytest.mark.parametrize("wrong", [{"n": 3}, {"logit_bias": {"5": 1}}, {"max_tokens": 0}, {"stop": ["x"] * 17}])
def test_what_cannot_be_done_is_not_ignored(wrong):
    with pytest.raises(ValidationError):
        asked(**wrong)
