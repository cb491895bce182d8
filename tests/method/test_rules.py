"""Who writes next by each rule: on words, whatever the vocabularies, chunks and engines."""

import math
import zlib
from array import array
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tessy_hf import Speaker, TessyTransform, demo
from tessy_hf.engines.base import Scores
from tessy_hf.errors import SettingsError
from tessy_hf.method import rules
from tessy_hf.method.rules.base import Word
from tessy_hf.rows.columns import pieces
from tessy_hf.settings import Settings
from tessy_hf.text.vocabulary import words
from tessy_hf.trajectory import Trajectory
from tests.rules import (
    CannedEngine,
    GreedyModel,
    ids_of,
    own_rule,
    rule_name,
    said,
    scripted,
    spans,
    vocabulary,
    write,
)
from tests.worlds import make_tokenizer

CHUNKS = [1, 3, 7, 50, None, "stream"]
PAIRS = [("qwen", "qwen"), ("harmony", "qwen"), ("gpt2", "r1")]
TEACHER = " We need 12 apples , then\n\n(a) x^2 is it . Therefore we have naïve Größe 7 + 5 here ."
STUDENT = "Okay, so let me see if I can do it . Hmm, wait, maybe it is not the end of this one ."


class Model(GreedyModel):
    """A greedy model that can tell how likely it finds ids: a number made of all ids before, and of the id."""

    measures = frozenset({"logprobs", "entropies", "score"})

    async def complete(self, request):
        if request.temperature:
            request = replace(request, prompt_ids=[*request.prompt_ids, request.seed % 997])
        completion = await super().complete(request)
        measured = [self._numbers(request.prompt_ids, completion.token_ids, at) for at in range(2)]
        logprobs, entropies = measured[0] if request.logprobs else None, measured[1] if request.entropies else None
        return type(completion)(completion.token_ids, completion.stop_id, None, logprobs, entropies)

    def _numbers(self, before, ids, salt):
        ids = [*before, *ids]
        return [
            -(zlib.crc32(array("i", ids[: at + 1]).tobytes(), salt) % 300) / 100 for at in range(len(before), len(ids))
        ]

    async def score(self, prompt_ids, ids, *, row="", order=0):
        return Scores(self._numbers(prompt_ids, ids, 0), [1] * len(ids))


def models(pair):
    """A teacher and a student that write and judge by chance, but always the same."""
    text = " add Zoo is, 12, not\n\nbut\n\nWe,  x^2 (a) go. naïve 你好 ."
    return [Model(kind, weights, ids_of(text, kind)) for weights, kind in enumerate(pair)]


def by_rule(switch, teacher=TEACHER, student=STUDENT, pair=("qwen", "qwen"), probability=None, **plan):
    engines = [
        scripted(text, kind, probability=probability) for text, kind in zip((teacher, student), pair, strict=True)
    ]
    return write(*engines, switch=rules.build(switch), **plan)


def word_counts(row):
    return [(author, len(words(text))) for author, text in spans(row)]


def fair(_, token):
    """A scripted model's probability of an id."""
    return ((token * 37) % 19 + 1) / 20


# --- each rule is what it says


@pytest.mark.parametrize("k", CHUNKS)
@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("n", [1, 2, 5, {"teacher": 4, "student": 1}])
def test_every_n_words_the_other_author_writes(n, pair, k):
    row = by_rule({"every": n}, pair=pair, chunk_tokens=k)
    lengths = {"teacher": n, "student": n} if isinstance(n, int) else n
    *whole, (author, last) = word_counts(row)
    assert all(count == lengths[who] for who, count in whole) and last <= lengths[author]
    assert [who for who, _ in whole] == [("student", "teacher")[at % 2] for at in range(len(whole))]
    assert row.finish_reason == "stop"


@settings(max_examples=40)
@given(n=st.integers(1, 9), k=st.sampled_from(CHUNKS), pair=st.sampled_from(PAIRS))
def test_spans_of_every_have_n_words_also_by_models_by_chance(n, k, pair):
    row = write(*models(pair), switch=rules.build({"every": n}), chunk_tokens=k, max_thinking_tokens=150)
    assert {count for _, count in word_counts(row)[:-1]} <= {n}


@pytest.mark.parametrize("k", CHUNKS)
@pytest.mark.parametrize("pair", PAIRS)
def test_a_rule_that_never_hands_over_is_student_only(pair, k):
    alone = by_rule("predictor", pair=pair, thinking="student", chunk_tokens=k)
    assert spans(alone) == [("student", STUDENT)]
    for rule in (lambda word: False, {"every": 1000}, {"name": "entropy", "threshold": 1e9}):
        row = by_rule(rule, pair=pair, probability=fair, chunk_tokens=k)
        assert (row.spans, row.finish_reason) == (alone.spans, alone.finish_reason)


@pytest.mark.parametrize("k", CHUNKS)
@pytest.mark.parametrize("pair", PAIRS)
def test_at_p_0_all_after_the_first_word_is_the_teachers(pair, k):
    row = by_rule({"student-accepts": 0}, pair=pair, chunk_tokens=k)
    assert spans(row) == [("student", "Okay,"), ("teacher", TEACHER)]


@pytest.mark.parametrize("k", CHUNKS)
@pytest.mark.parametrize("pair", PAIRS)
def test_above_p_1_all_is_the_students_its_end_included(pair, k):
    row = by_rule({"student-accepts": 1.5}, pair=pair, chunk_tokens=k)
    assert spans(row) == [("student", STUDENT)] and row.finish_reason == "stop"


@pytest.mark.parametrize("pair", PAIRS)
def test_the_students_word_stands_where_it_finds_the_teachers_unlikely(pair):
    """The student finds "x" unlikely, and nothing else: in its place comes its own next word."""
    student = vocabulary(pair[1])

    def probability(before, token):
        return 0.05 if "x" in student.decode([token]) else 0.9

    row = by_rule(
        {"student-accepts": 0.1}, [" a x zz", " b c x zz", " end"], ["so zz", " Let zz", " me"], pair, probability
    )
    written = [("student", "so"), ("teacher", " a"), ("student", " Let"), ("teacher", " b c"), ("student", " me")]
    assert spans(row) == written and row.closed


def test_a_word_is_as_likely_as_all_its_tokens_together():
    seen = []

    def record(word):
        seen.append(word)
        return False

    record.needs = {"logprobs"}
    by_rule(record, student="Größe naïve 你好 x", probability=lambda before, token: 0.5)
    tokens = [len(ids_of(text)) for text in ("Größe", " naïve", " 你好", " x")]
    assert [word.text for word in seen] == ["Größe", " naïve", " 你好", " x"]
    assert [word.logprob / math.log(0.5) for word in seen] == pytest.approx(tokens)
    assert seen[2] == Word("student", " 你好", 2, "Größe naïve", seen[2].logprob)


@pytest.mark.parametrize("measure", ["entropy", "surprise"])
def test_the_teacher_takes_over_where_the_student_is_uncertain(measure):
    def probability(before, token):
        return 0.01 if vocabulary("qwen").decode([*before[-4:], token]).endswith(" Hmm") else 0.99

    rule = {"name": "entropy", "threshold": 3.0, "words": 2, "measure": measure}
    row = by_rule(rule, probability=probability)
    assert spans(row)[:3] == [
        ("student", STUDENT[: STUDENT.index(" Hmm")]),
        ("teacher", " We need"),
        ("student", " Hmm,"),
    ]


def test_the_candidate_stands_that_the_student_finds_likeliest():
    texts = iter([" bad bad bad bad", " fine good bad bad", " good good bad bad", " bad good good bad"])
    teacher, student = CannedEngine(), scripted(["so we zz", " ok"])
    good, asked = set(ids_of(" good")), []

    async def complete(request):
        asked.append(request.seed)
        return said(next(texts))

    async def score(before, ids, *, row="", order=0):
        return Scores([0.0 if token in good else -1.0 for token in ids], [1] * len(ids))

    teacher.complete, student.score = complete, score
    rule = rules.build({"name": "likeliest", "words": 2})
    row = write(teacher, student, switch=rule, temperature=0.6, chunk_tokens=20)
    assert spans(row) == [("student", "so we"), ("teacher", " good good"), ("student", " ok")]
    assert len(set(asked)) == 4 and row.discarded["teacher"] == row.generated["teacher"] - len(ids_of(" good good"))


# --- and does not depend on chunks


RULES = [
    {"every": 3},
    {"student-accepts": 0.05},
    {"student-accepts": 0.3},
    {"name": "entropy", "threshold": 2.0, "words": 3},
    {"name": "entropy", "threshold": 2.0, "words": 2, "measure": "surprise"},
    own_rule,
]


@pytest.mark.parametrize("rule", RULES, ids=rule_name)
@settings(max_examples=12)
@given(pair=st.sampled_from([*PAIRS, ("harmony", "gpt2")]), seed=st.integers(0, 30))
def test_greedy_rows_do_not_depend_on_k(rule, pair, seed):
    def row(k):
        teacher, student = models(pair)
        teacher.weights, student.weights = seed, seed + 1000
        return write(teacher, student, switch=rules.build(rule), chunk_tokens=k, max_thinking_tokens=120)

    expected = row(50)
    assert {author for author, _ in spans(expected)} <= {"teacher", "student"}
    for k in (1, 4, None, "stream"):
        got = row(k)
        assert (got.spans, got.finish_reason, got.budget) == (expected.spans, expected.finish_reason, expected.budget)


# --- what cannot be is refused


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"switch": "evrey"}, "predictor, entropy, student-accepts, likeliest, every"),
        ({"switch": "every"}, "words: field required"),
        ({"switch": {"entropy": -1}}, "greater than or equal to 0"),
        ({"switch": {"name": "every", "words": {"teacher": 3}}}, "words"),
        ({"switch": {"likeliest": 1}, "temperature": 0.6}, "candidates"),
        ({"switch": "likeliest", "temperature": 0}, "all 4 candidates"),
        ({"switch": "likeliest", "temperature": {"teacher": 0, "student": 1}}, "all 4 candidates"),
        ({"switch": {"every": 3}, "method": "student-only"}, "do not by the method 'student-only'"),
        ({"switch": {"name": "function", "function": "m.f", "hash": "x"}}, "the function 'm.f'"),
    ],
)
def test_a_rule_that_cannot_be_is_refused(given, told):
    with pytest.raises(SettingsError, match=told):
        Settings.check(**given)


def one(word):
    return word.place > 1


def other(word):
    return word.place > 2


def test_the_rule_and_its_numbers_are_in_the_record_and_the_fingerprint():
    given = [{"every": 2}, {"every": 3}, {"entropy": 2.0}, {"student-accepts": 0.5}, "likeliest", one, other]
    made = [Settings.check(switch=each) for each in ["predictor", *given]]
    assert len({each.fingerprint({}) for each in made}) == len(made)
    assert made[0].fingerprint({}) == Settings.check().fingerprint({})
    assert made[3].model_dump()["switch"] == {"name": "entropy", "threshold": 2.0, "words": 10, "measure": "entropy"}
    for each in made[:-2]:
        again = Settings.check(**each.model_dump())
        assert again.switch == each.switch and again.fingerprint({}) == each.fingerprint({})


# --- a row that was broken off


def whole_words(kind):
    """Ids that are words of their own, so that a text has the ids that were written."""
    texts = {token: vocabulary(kind).decode([token]) for token in make_tokenizer(kind).get_vocab().values()}
    return [token for token, text in sorted(texts.items()) if text[:1] == " " and text[1:].isalpha()]


@pytest.mark.slow
@pytest.mark.parametrize("rule", [*RULES, {"name": "likeliest", "words": 3, "candidates": 3}], ids=rule_name)
@pytest.mark.parametrize("pair", PAIRS[:2])
def test_a_row_broken_off_anywhere_resumes_as_if_it_was_not(rule, pair):
    points = []

    def row(seed, begun=None):
        def record(y, piece):
            points.append((list(y.spans), y.state()))

        drawn = {"temperature": 0.6} if "candidates" in str(rule) else {}
        limits = {"chunk_tokens": 5, "max_thinking_tokens": 90}
        made = [Model(kind, seed + author, whole_words(kind)) for author, kind in enumerate(pair)]
        return write(*made, switch=rules.build(rule), begun=begun, record=record, **limits, **drawn)

    resumed = 0
    for seed in range(0, 40, 8):
        points.clear()
        whole = row(seed)
        later = [each for each in points if len(each[0]) > 1]
        for kept, state in later[:: max(1, len(later) // 6)]:
            again = row(seed, Trajectory.resume(whole.key, whole.seed, kept, state))
            assert (again.spans, again.finish_reason) == (whole.spans, whole.finish_reason)
            resumed += 1
    assert resumed > 5


# --- in a run


@pytest.mark.slow
def test_recipes_without_predictors_are_accepted_by_rules_that_need_none(recwarn):
    transform = demo.transform(switch={"every": 4}, journal=None)
    bare = [Speaker(each.engine) for each in (transform.teacher, transform.student)]
    made = TessyTransform(teacher=bare[0], student=bare[1], switch={"every": 4}, journal=None, temperature=0)
    assert made.teacher.boundary is made.student.boundary is None and not recwarn.list
    prompts = demo.prompts(3, seed=1)
    with made:
        rows = list(prompts.map(made, batched=True, load_from_cache_file=False))
    texts = [[text for _, text in cut(row)] for row in rows]
    assert all(len(words(text)) == 4 for row in texts for text in row[:-1])
    assert made.record().settings["switch"] == {"name": "every", "words": 4}


@pytest.mark.slow
@pytest.mark.parametrize(
    "rule",
    [RULES[0], *RULES[2:4], {"name": "entropy", "threshold": 0.4, "measure": "surprise"}, own_rule],
    ids=rule_name,
)
def test_greedy_rows_do_not_depend_on_the_rows_beside_them(rule):
    prompts = demo.prompts(8, seed=4)

    def written(**settings):
        with demo.transform(switch=rule, temperature=0, journal=None, **settings) as made:
            rows = prompts.map(made, batched=True, load_from_cache_file=False)
            return [(row["messages"], row["spans"], row["finish_reason"]) for row in rows]

    alone = written(rows_in_flight=1, chunk_tokens=7)
    assert written(rows_in_flight=8) == written(rows_in_flight=5, stream=True) == alone
    assert {span["author"] for _, spans, _ in alone for span in spans} == {"teacher", "student"}


def cut(row):
    return [(piece.author, piece.text) for piece in pieces(row) if piece.part == "thinking"]


def test_engines_that_cannot_measure_are_refused_at_the_start():
    engine = scripted("okay", "qwen")
    transform = TessyTransform(
        teacher=Speaker(engine), student=Speaker(engine), switch={"student-accepts": 0.1}, journal=None
    )
    with transform, pytest.raises(SettingsError, match="needs score of the student 'scripted-qwen'"):
        demo.prompts(1).map(transform, batched=True, load_from_cache_file=False)


def test_a_rule_that_raises_fails_its_row():
    def rule(word):
        return 1 / 0

    row = by_rule(rule)
    assert row.finish_reason == "error" and "raised ZeroDivisionError" in row.error
