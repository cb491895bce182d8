"""Settings are checked before anything starts; their fingerprint names what decides the rows, and only that."""

import hashlib
import json
import pydoc
from typing import get_type_hints

import pytest
from pydantic import TypeAdapter, ValidationError

from tessy_hf.errors import SettingsError, TessyError
from tessy_hf.plan import Sampling
from tessy_hf.settings import FORMAT, GivenSettings, Settings
from tessy_hf.verifiers.verifiers import Number

SPEAKERS = {"teacher": {"engine": {"model": "t"}}, "student": {"engine": {"model": "s"}}}


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("chunk_tokens", 0, "greater than or equal to 1"),
        ("chunk_tokens", -20, "greater than or equal to 1"),
        ("chunk_tokens", "many", "valid integer"),
        ("chunk_tokens", 2.5, "valid integer"),
        ("chunk_tokens", None, "valid integer"),
        ("temperature", -0.1, "greater than or equal to 0"),
        ("temperature", float("nan"), "0"),
        ("top_p", 0, "greater than 0"),
        ("top_p", 1.1, "less than or equal to 1"),
        ("seed", "x", "valid integer"),
        ("max_thinking_tokens", 0, "greater than or equal to 1"),
        ("max_answer_tokens", 0, "greater than or equal to 1"),
        ("rows_in_flight", 0, "greater than or equal to 1"),
        ("max_attempts", 0, "greater than or equal to 1"),
        ("prompt_column", 3, "valid string"),
        ("journal", 3, "valid string"),
        ("method", "tesy", "'tessy'"),
        ("method", None, "'teacher-only'"),
    ],
)
def test_a_value_that_cannot_be_used_is_told_with_what_would_do(name, value, expected):
    with pytest.raises(SettingsError) as caught:
        Settings.check(**{name: value})
    message = str(caught.value)
    assert f"{name}={value!r}" in message  # what was seen
    assert expected in message  # what was expected
    assert f"Pass for instance {name}={Settings.model_fields[name].default!r}" in message  # what to do
    assert isinstance(caught.value, (TessyError, ValueError))


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("chunk_token", "chunk_tokens"),
        ("chunksize_tokens", "chunk_tokens"),
        ("max_think_tokens", "max_thinking_tokens"),
        ("temprature", "temperature"),
        ("prompt_colum", "prompt_column"),
        ("rows_inflight", "rows_in_flight"),
    ],
)
def test_an_unknown_name_is_told_with_the_nearest_known_one(given, meant):
    with pytest.raises(SettingsError) as caught:
        Settings.check(**{given: 1})
    message = str(caught.value)
    assert f"Unknown setting {given!r}" in message
    assert all(name in message for name in Settings.model_fields)
    assert f" Did you mean {meant!r}? Known: " in message


def test_a_name_like_no_other_is_told_to_be_left_out():
    with pytest.raises(SettingsError, match=r"Unknown setting 'zzz'\. Known: method, .*Leave it out\."):
        Settings.check(zzz=1)


def test_the_paper_s_figures_are_the_defaults():
    settings = Settings.check()
    assert (settings.method, settings.temperature) == ("tessy", 0.6)


def test_each_author_may_have_its_own_sampling_and_chunk_size():
    settings = Settings.check(
        temperature={"teacher": 1.0, "student": 0.6}, top_k={"teacher": 40, "student": 20}, min_p=0.1,
        chunk_tokens={"teacher": 10, "student": 5},
    )  # fmt: skip
    plan = settings.plan("row-1")
    assert plan.sampling == {
        "teacher": Sampling(1.0, top_k=40, min_p=0.1),
        "student": Sampling(0.6, top_k=20, min_p=0.1),
    }
    assert plan.chunk_tokens == {"teacher": 10, "student": 5}
    assert settings.fingerprint(SPEAKERS) != Settings.check(min_p=0.1).fingerprint(SPEAKERS)
    assert Settings.check(**json.loads(settings.model_dump_json())) == settings


@pytest.mark.parametrize(
    ("given", "seen"),
    [
        ({"temperature": {"teacher": -1, "student": 1}}, "Setting temperature=-1"),
        ({"temperature": {"teacher": 1}}, "Setting temperature"),
        ({"top_k": 0}, "greater than or equal to 1"),
        ({"min_p": 1.5}, "less than or equal to 1"),
        ({"repetition_penalty": 0}, "greater than 0"),
        ({"preset": "papers"}, "Setting preset='papers' is not known. Known: paper, authors"),
    ],
)
def test_sampling_out_of_range_is_refused(given, seen):
    with pytest.raises(SettingsError) as caught:
        Settings.check(**given)
    assert seen in str(caught.value)


def test_a_preset_sets_what_is_not_given():
    authors = Settings.check(preset="authors", top_p=0.9)
    assert (authors.chunk_tokens, authors.top_k, authors.top_p) == ({"teacher": 10, "student": 5}, 20, 0.9)
    assert authors == Settings.check(**{**dict(authors)})
    assert Settings.check(preset="paper") == Settings.check(chunk_tokens=20, temperature=0.6)


def test_new_settings_that_are_not_set_leave_fingerprints_as_they_were():
    described = {"format": FORMAT, "settings": {}, "speakers": SPEAKERS}
    old = set(CHANGES) - {"switch", "chosen_by", "top_k", "min_p", "repetition_penalty"}
    described["settings"] = Settings.check().model_dump(include=old)
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()
    assert Settings.check().fingerprint(SPEAKERS) == digest[:16]


def test_candidates_need_chance_in_whoever_writes_them():
    given = {"best_of": 2, "verifier": "number", "temperature": {"teacher": 0.6, "student": 0.0}}
    assert Settings.check(**given)
    with pytest.raises(SettingsError, match="At temperature=0 all 2 candidates"):
        Settings.check(method="student-only", **given)


def test_settings_do_not_change():
    settings = Settings.check(chunk_tokens=3)
    with pytest.raises(ValidationError, match="frozen"):
        settings.chunk_tokens = 4
    assert settings.chunk_tokens == 3


# --- the fingerprint


@pytest.mark.parametrize(
    "change",
    [
        {"rows_in_flight": 7},
        {"journal": "elsewhere"},
        {"journal": None},
        {"parts": "memory://run"},
        {"max_attempts": 9},
        {"request_timeout": 9.0},
    ],
)
def test_what_only_changes_speed_and_safety_is_not_in_the_fingerprint(change):
    assert Settings.check(**change).fingerprint(SPEAKERS) == Settings.check().fingerprint(SPEAKERS)


CHANGES = {
    "method": "student-only",
    "switch": {"every": 5},
    "chunk_tokens": 21,
    "stream": True,
    "temperature": 0.7,
    "top_p": 0.9,
    "top_k": 20,
    "min_p": 0.05,
    "repetition_penalty": 1.1,
    "seed": 1,
    "max_thinking_tokens": 99,
    "max_answer_tokens": 99,
    "prompt_column": "question",
    "id_column": "id",
    "best_of": 1,
    "verifier": "number",
    "chosen_by": "rsr",
    "system_prompt": "Be brief.",
}


def test_all_that_decides_the_rows_is_in_the_fingerprint():
    speed = {"rows_in_flight", "journal", "parts", "request_timeout", "max_attempts"}
    assert set(CHANGES) | speed == set(Settings.model_fields), "a new setting: say here whether it decides the rows"
    # Not by `check`, which refuses some values that stand alone.
    prints = {Settings(**{name: value}).fingerprint(SPEAKERS) for name, value in CHANGES.items()}
    assert len(prints | {Settings.check().fingerprint(SPEAKERS)}) == len(CHANGES) + 1


def test_the_speakers_are_in_the_fingerprint_whatever_their_order():
    settings = Settings.check()
    swapped = {"student": SPEAKERS["student"], "teacher": SPEAKERS["teacher"]}
    other = {**SPEAKERS, "teacher": {"engine": {"model": "other"}}}
    roles = {"teacher": SPEAKERS["student"], "student": SPEAKERS["teacher"]}
    assert settings.fingerprint(swapped) == settings.fingerprint(SPEAKERS)
    assert len({settings.fingerprint(speakers) for speakers in (SPEAKERS, other, roles)}) == 3


def always(row):
    return True


def never(row):
    return False


def test_a_verifier_is_in_the_fingerprint_by_what_it_does_however_it_is_given():
    def fingerprint(verifier):
        return Settings.check(verifier=verifier).fingerprint(SPEAKERS)

    ways = "number", {"name": "number"}, {"name": "number", "column": "reference_answer"}, Number()
    assert len({fingerprint(way) for way in ways}) == 1
    others = Number("expected"), {"name": "exact"}, always, never, None
    assert len({fingerprint(way) for way in (*others, "number")}) == len(others) + 1
    assert fingerprint(always) == fingerprint(always)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"best_of": 0}, "best_of=0"),
        ({"best_of": 3}, "nothing to choose by"),
        ({"best_of": 3, "verifier": "number", "temperature": 0}, "all 3 candidates"),
        ({"method": "teacher-score", "temperature": 0}, "all 5 candidates"),
        ({"verifier": "numbr"}, "exact, number, math-verify, python-tests"),
        ({"verifier": {"name": "number", "colum": "x"}}, "Arguments: column"),
        ({"verifier": {"function": "me.right", "hash": "0"}}, "'me.right'"),
        ({"verifier": 3}, "Unknown verifier 3"),
    ],
    ids=str,
)
def test_candidates_that_could_not_be_chosen_from_are_told(given, told):
    with pytest.raises(SettingsError) as caught:
        Settings.check(**given)
    assert told in str(caught.value)


def test_how_many_candidates_a_row_has():
    assert [Settings.check(method=method).max_candidates for method in ("tessy", "teacher-score")] == [1, 5]
    assert Settings.check(method="teacher-score", best_of=2).max_candidates == 2
    assert Settings.check(verifier="exact", best_of=4).max_candidates == 4


# --- the plan of a row


@pytest.mark.parametrize(
    ("method", "thinking", "answer"),
    [
        ("tessy", "alternate", "student"),
        ("tessy-teacher-answer", "alternate", "teacher"),
        ("student-only", "student", "student"),
        ("teacher-only", "teacher", "teacher"),
        ("teacher-think", "teacher", "student"),
        ("teacher-answer", "student", "teacher"),
        ("teacher-reference", "student", "student"),
        ("teacher-score", "student", "student"),
    ],
)
def test_a_method_says_who_thinks_and_who_answers(method, thinking, answer):
    settings = Settings.check(
        method=method, chunk_tokens=5, temperature=0.3, top_p=0.5, max_thinking_tokens=6, max_answer_tokens=7
    )
    plan = settings.plan("row-1")
    assert (plan.thinking, plan.answer) == (thinking, answer)
    assert (plan.chunk_tokens, plan.sampling["teacher"]) == (5, Sampling(0.3, 0.5))
    assert (plan.max_thinking_tokens, plan.max_answer_tokens) == (6, 7)
    assert settings.alternates == (thinking == "alternate")


def test_teacher_mix_splits_the_rows_by_their_key_alone_and_about_in_half():
    plans = {key: Settings.check(method="teacher-mix", seed=1).plan(key) for key in map(str, range(400))}
    assert all(plan.thinking == plan.answer for plan in plans.values())
    assert 160 < sum(plan.thinking == "teacher" for plan in plans.values()) < 240
    again = Settings.check(method="teacher-mix", seed=2, chunk_tokens=9)
    assert all(again.plan(key).thinking == plan.thinking for key, plan in plans.items())


def test_the_typed_settings_are_those_there_are():
    hints, fields = get_type_hints(GivenSettings), Settings.model_fields
    assert hints.keys() == {*fields, "preset"} and GivenSettings.__total__ is False
    for name, field in fields.items():
        given = TypeAdapter(hints[name], config={"arbitrary_types_allowed": True}).json_schema(mode="validation")
        assert _kinds(given) == _kinds(Settings.model_json_schema()["properties"][name]), (name, field)


def _kinds(schema):
    """The types of JSON values that a schema allows, and the values of its enumerations."""
    found = {json.dumps(schema[key]) for key in ("enum", "const") if key in schema} or {schema.get("type")}
    return set().union(*map(_kinds, schema["anyOf"])) if "anyOf" in schema else found


def test_each_setting_is_described_in_help_and_in_the_schema():
    text, schema = pydoc.render_doc(Settings), Settings.model_json_schema()["properties"]
    for name in Settings.model_fields:
        assert schema[name]["description"]
        assert f"{name}: {schema[name]['description'].split()[0]}" in text
