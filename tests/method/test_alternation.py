"""Algorithm 1 and the decisions of METHOD.md, with every token of both authors decided by the test."""

from itertools import pairwise
from unicodedata import normalize

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tessy_hf.engines.scripted import Script
from tessy_hf.errors import EngineDeadError, RequestError
from tessy_hf.method.limits import SLACK
from tessy_hf.text.vocabulary import words
from tessy_hf.trajectory import Prompt
from tests.rules import (
    CannedEngine,
    Completion,
    GreedyModel,
    RulePredictor,
    TapeModel,
    after_comma,
    always_style,
    both,
    by_all_ids,
    by_first_letter,
    by_first_letter_of,
    ids_of,
    is_style_word,
    never_style,
    said,
    scripted,
    spans,
    vocabulary,
    write,
)
from tests.worlds import HARMONY_SYSTEM, TEXT

KINDS = ["gpt2", "harmony", "qwen", "r1"]
PAIRS = [("qwen", "qwen"), ("harmony", "qwen")]  # teacher, student
CHUNKS = [1, 3, 4, 8, 20, 50, None, "stream"]
ENOUGH = 10_000
"""A chunk that holds a whole turn."""

STUDENT = ["hello all Zebra one", " go Now", " it"]
TEACHER = [" Stop Please be so", " Take care"]
TURNS = [
    ("student", "hello all"),
    ("teacher", " Stop Please"),
    ("student", " go"),
    ("teacher", " Take"),
    ("student", " it"),
]


def boundary_kinds():
    """Each kind of rule, with its convention."""
    conventions = [{}, {"label_shift": 1}, {"lookahead": 1}, {"lookahead": 3}]
    rules = [(by_first_letter, {}), (after_comma, {"label_shift": 1}), *((by_all_ids, one) for one in conventions)]
    return st.sampled_from(rules)


# --- taking turns


@pytest.mark.parametrize(("teacher", "student"), [*PAIRS, ("gpt2", "harmony"), ("r1", "gpt2")])
@pytest.mark.parametrize("k", CHUNKS)
def test_authors_take_turns_where_the_kind_of_text_changes(teacher, student, k):
    row = write(
        scripted(TEACHER, teacher),
        scripted(Script(STUDENT, "It is 3."), student),
        (RulePredictor(by_first_letter, teacher), RulePredictor(by_first_letter, student)),
        chunk_tokens=k,
    )
    assert spans(row) == TURNS
    assert spans(row, "answer") == [("student", "It is 3.")]
    assert (row.key, row.seed, row.finish_reason, row.closed, row.error) == ("row-1", 7, "stop", True, None)


@pytest.mark.parametrize("k", CHUNKS)
def test_a_predictor_that_looks_ahead_hands_over_before_the_next_word(k):
    row = write(
        scripted([" Next, is", " End"], "harmony"),
        scripted(["Say it, then", " all, ok no"]),
        both(after_comma, label_shift=1),
        chunk_tokens=k,
    )
    # The row's first word has nothing before it and is not judged; "it" and "no" follow no comma: they are capability.
    assert spans(row) == [("student", "Say"), ("teacher", " Next,"), ("student", " all, ok"), ("teacher", " End")]
    assert row.closed


def simulate(teacher, student, is_style, *, lookahead=0, budget=100_000, kind="qwen"):
    """Tell what algorithm 1 makes of scripts of short words, word by word and with no chunks at all.

    Args:
        teacher: What the teacher writes at each take-over; it writes on into the next texts.
        student: What the student writes.
        is_style: From the text before a word and the word to whether it is style (None: no telling).
        lookahead: How many words beyond a word must have begun before it is judged.
        budget: The most tokens of thinking.
        kind: The student's tokenizer.

    Returns:
        Spans, and whether the thinking was closed.
    """
    scripts, turns = {"teacher": teacher, "student": student}, {"teacher": 0, "student": 0}
    accepted, author, result = "", "student", []
    while True:
        text = "".join(scripts[author][turns[author] :])
        turns[author] += 1
        spoken = words(text)
        style = [is_style(accepted + text[:start], text[start:end]) for start, end in spoken]
        other = next((i for i, kind in enumerate(style) if kind is not None and kind != (author == "student")), None)
        ends = [0, *(end for _, end in spoken)]
        room = [budget - len(ids_of(accepted + text[:end], kind)) for end in ends]
        kept, how = first_that_ends(text, spoken, room, other, lookahead)
        piece = text[: ends[kept]]
        accepted += piece
        if piece and result and result[-1][0] == author:
            result[-1] = (author, result[-1][1] + piece)
        elif piece:
            result.append((author, piece))
        if how != "other":
            return result, how == "closed"
        author = "teacher" if author == "student" else "student"


def first_that_ends(text, spoken, room, other, lookahead):
    """Return how many words of a turn are kept, and whether the other author, the budget or the close ends it.

    Args:
        text: The whole script from here.
        spoken: Its words.
        room: The tokens of the budget that are left after each number of words.
        other: The first word that is not the author's kind.
        lookahead: How many words beyond a word must have begun before it is judged.
    """
    moments = []  # in the order of writing: how many words stand, and how many of them are judged
    for word, (start, _) in enumerate([*spoken, (ends_at(spoken), 0)]):
        if text[start : start + 1].isspace():
            moments.append((word, word - lookahead))
        if word < len(spoken):
            moments.append((word, word - lookahead + (lookahead > 0)))
    for stand, judged in [*moments, (len(spoken), len(spoken))]:
        last = len(spoken) if other is None else max(1, other)
        over = next((n for n in range(1, min(judged, last) + 1) if room[n] < 0), None)
        if over is not None:
            return over - 1, "length"
        if other is not None and judged > other:
            return last, "other"
        if other is not None and not lookahead and stand >= last:
            return last, "other"
        if room[stand] < -SLACK:
            return max(0, judged), "length"
    return len(spoken), "closed"


def ends_at(spoken):
    """Return where the last word ends."""
    return spoken[-1][1] if spoken else 0


simple_words = st.lists(
    st.sampled_from(
        [" add", " Zoo", " is,", " 12,", " not", "\n\nbut", "\n\nWe,", "  x^2", " (a)", " go.", " {\n  fold,\n}\n"]
    ),
    min_size=1,
    max_size=9,
).map("".join)


def simple_scripts(names):
    """Scripts of plain words; each begins with one of some words that only this author uses.

    So no author happens to write what the other just took back, which a scripted engine would take for its own.
    """
    return st.lists(st.tuples(st.sampled_from(names), simple_words).map("".join), max_size=4)


@pytest.mark.parametrize(("label_shift", "lookahead"), [(0, 0), (1, 0), (0, 1), (0, 3)])
@settings(max_examples=60)
@given(
    teacher=simple_scripts([" Tea", " bet,"]),
    student=simple_scripts([" Stu", " dye,"]),
    kinds=st.tuples(*[st.sampled_from(KINDS)] * 3),
    k=st.sampled_from(CHUNKS),
    budget=st.one_of(st.just(100_000), st.integers(1, 30)),
)
def test_a_row_is_what_a_word_by_word_simulation_gives(label_shift, lookahead, teacher, student, kinds, k, budget):
    student = [text.lstrip() if index == 0 else text for index, text in enumerate(student)]

    def is_style(before, word):
        if label_shift:
            return before.rstrip().endswith(",") if before.strip() else None
        return is_style_word(word)

    row = write(
        scripted(teacher, kinds[0]),
        scripted(student, kinds[1]),
        both(
            after_comma if label_shift else by_first_letter_of(lookahead),
            kinds[2],
            label_shift=label_shift,
            lookahead=lookahead,
        ),
        chunk_tokens=k,
        max_thinking_tokens=budget,
    )
    expected = simulate(teacher, student, is_style, lookahead=lookahead, budget=budget, kind=kinds[1])
    assert (spans(row), row.closed) == expected


# --- decision 2: progress


@pytest.mark.parametrize("label_shift", [0, 1])
@pytest.mark.parametrize(("teacher", "student"), PAIRS)
@pytest.mark.parametrize("k", [1, 4, 50])
def test_an_author_keeps_its_first_word_even_if_all_is_of_the_other_kind(label_shift, teacher, student, k):
    row = write(
        scripted(" Uno Dos Tres", teacher),
        scripted("one two three", student),
        (
            RulePredictor(always_style, label_shift=label_shift),
            RulePredictor(never_style, label_shift=label_shift),
        ),
        chunk_tokens=k,
    )
    assert spans(row) == [
        ("student", "one"),
        ("teacher", " Uno"),
        ("student", " two"),
        ("teacher", " Dos"),
        ("student", " three"),
        ("teacher", " Tres"),
    ]
    assert row.closed and row.finish_reason == "stop"


# --- decision 3: cuts fall on word ends


@pytest.mark.parametrize("k", range(1, 12))
def test_a_chunk_that_ends_inside_a_word_hands_over_whole_words_only(k):
    row = write(
        scripted([" Indivisible go"], "harmony"),
        scripted(["incomparably good Uncopyrightable", " end"]),
        both(by_first_letter),
        chunk_tokens=k,
    )
    assert spans(row) == [("student", "incomparably good"), ("teacher", " Indivisible"), ("student", " end")]


@pytest.mark.parametrize("k", CHUNKS)
def test_whitespace_at_the_ends_of_the_thinking_is_not_kept(k):
    row = write(CannedEngine(), scripted(["it is done.  \n\n"]), both(by_first_letter), chunk_tokens=k)
    assert row.text("thinking") == "it is done."
    row = write(CannedEngine(), scripted(["\n it is done."]), both(by_first_letter), chunk_tokens=k)
    assert row.text("thinking") == "it is done."


# --- decision 4: what an engine is given


def test_authors_of_one_vocabulary_are_handed_token_ids():
    spelled_out = [i for letter in "all" for i in ids_of(letter)]
    assert spelled_out != ids_of("all")
    teacher = CannedEngine(said(" Ok", stop="</think>"))
    student = CannedEngine(Completion([*spelled_out, *ids_of(" Then we")], None), said("3", stop="<|im_end|>"))
    row = write(teacher, student, both(by_first_letter), chunk_tokens=ENOUGH)
    assert spans(row) == [("student", "all"), ("teacher", " Ok")]
    (_, given), (_, at_answer) = teacher.requests[0], student.requests[1]
    assert given[-3:] == spelled_out
    assert at_answer[len(given) :][: len(ids_of(" Ok"))] == ids_of(" Ok")


@pytest.mark.parametrize("kinds", [("harmony", "qwen"), ("qwen", "harmony"), ("gpt2", "r1"), ("r1", "r1")])
@pytest.mark.parametrize("k", [1, 5, 50])
def test_engines_are_given_the_ids_of_the_prompt_and_of_the_text_so_far(kinds, k):
    opened = {
        "harmony": HARMONY_SYSTEM
        + "<|start|>user<|message|>How many?<|end|><|start|>assistant<|channel|>analysis<|message|>",
        "qwen": "<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n<think>\n",
        "gpt2": "<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n<think>\n",
        "r1": "<｜begin▁of▁sentence｜><｜User｜>How many?<｜Assistant｜><think>\n",
    }
    engines = [scripted(TEACHER, kinds[0]), scripted(STUDENT, kinds[1])]
    seen = {author: [] for author in ("teacher", "student")}
    for author, engine in zip(seen, engines, strict=True):
        complete = engine.complete

        def spy(request, author=author, complete=complete):
            seen[author].append(list(request.prompt_ids))
            return complete(request)

        engine.complete = spy
    row = write(*engines, both(by_first_letter), chunk_tokens=k)
    assert spans(row) == TURNS
    for kind, author in zip(kinds, seen, strict=True):
        prompt, so_far = vocabulary(kind).encode_template(opened[kind]), ""
        for writer, text in TURNS:
            expected = prompt + ids_of(so_far, kind)
            assert writer != author or expected in seen[author], f"{author} was never asked to go on from {so_far!r}"
            so_far += text


@pytest.mark.parametrize("kind", ["harmony", "qwen"])
def test_a_cut_inside_a_token_leaves_the_author_with_the_kept_text(kind):
    """The full stop that is kept and the line ends that are not are one token."""
    ends = [end for _, end in vocabulary(kind).encode(" Zoo.\n\nbe").offsets]
    assert len(" Zoo.") not in ends
    teacher = CannedEngine(said(" Zoo.\n\nbe so", kind), said(" End", kind, make_eos(kind)), kind=kind)
    student = CannedEngine(said("all Then we"), said(" it No we"), said("3", stop="<|im_end|>"))
    row = write(teacher, student, both(by_first_letter), chunk_tokens=ENOUGH)
    assert spans(row) == [("student", "all"), ("teacher", " Zoo."), ("student", " it"), ("teacher", " End")]
    (_, first), (_, second) = teacher.requests
    assert second[len(first) :] == ids_of(" Zoo. it", kind)


@pytest.mark.parametrize("kind", KINDS)
def test_the_answer_is_asked_for_after_the_closed_thinking(kind):
    closed = {
        "harmony": "<|channel|>analysis<|message|>all<|end|><|start|>assistant<|channel|>final<|message|>",
        "qwen": "<think>\nall\n</think>\n\n",
        "gpt2": "<think>\nall\n</think>\n\n",
        "r1": "<think>\nall\n</think>\n\n",
    }[kind]
    eos = make_eos(kind)
    student = CannedEngine(said("all", kind, stop=eos), said("Three.", kind, stop=eos), kind=kind)
    row = write(CannedEngine(), student, both(by_first_letter))
    _, given = student.requests[1]
    expected = vocabulary(kind).encode_template(closed)
    assert given[-len(expected) :] == expected
    assert spans(row, "answer") == [("student", "Three.")]


def make_eos(kind):
    """The end of sequence token of a kind of test tokenizer."""
    return vocabulary(kind).tokenizer.eos_token


@pytest.mark.parametrize("kind", KINDS)
def test_requests_carry_the_rows_seed_and_order_and_the_sampling(kind):
    student = CannedEngine(said("all", kind), said(" is", kind, make_eos(kind)), said("3", kind), kind=kind)
    write(
        CannedEngine(),
        student,
        both(by_first_letter),
        chunk_tokens=9,
        temperature=0.6,
        top_p=0.9,
        max_answer_tokens=77,
    )
    requests = [request for request, _ in student.requests]
    assert [(r.part, r.max_tokens) for r in requests] == [("thinking", 9), ("thinking", 9), ("answer", 77)]
    assert {(r.row, r.seed, r.order, r.temperature, r.top_p) for r in requests} == {("row-1", 7, 3, 0.6, 0.9)}
    ends = vocabulary(kind).special_ids
    assert all(ends <= r.stop_ids for r in requests)
    marker = vocabulary(kind).token_id("</think>")
    if marker is not None:  # it ends the thinking but may stand in an answer
        assert [marker in r.stop_ids for r in requests] == [True, True, False]


def test_the_predictor_reads_a_bounded_window():
    teacher, student = both(by_first_letter, window=16)
    row = write(CannedEngine(), scripted(["add all " * 60]), (teacher, student), chunk_tokens=20)
    assert len(ids_of(row.text("thinking"))) > 100
    assert 8 <= student.longest <= 16


# --- decision 5: how thinking ends


@pytest.mark.parametrize(
    ("kind", "marker"),
    [
        ("qwen", "</think>"),
        ("qwen", "<|im_end|>"),
        ("r1", "</think>"),
        ("r1", "<｜end▁of▁sentence｜>"),
        ("gpt2", "<|end|>"),
    ]
    + [("harmony", token) for token in ("<|end|>", "<|return|>", "<|start|>", "<|channel|>")],
)
@pytest.mark.parametrize("author", ["student", "teacher"])
def test_an_end_token_of_the_author_closes_the_thinking(kind, marker, author):
    last = CannedEngine(said(" Zoo" if author == "teacher" else " it", kind, marker), kind=kind)
    student = CannedEngine(said("all Then we"), said("Three.", stop="<|im_end|>"))
    if author == "student":
        student = CannedEngine(last.answers[0], said("Three.", kind, make_eos(kind)), kind=kind)
    row = write(last if author == "teacher" else CannedEngine(), student, both(by_first_letter), chunk_tokens=ENOUGH)
    assert row.text("thinking") == {"teacher": "all Zoo", "student": "it"}[author]
    assert row.closed and row.finish_reason == "stop"
    assert row.text("answer") == "Three."
    assert row.generated["teacher"] == (len(ids_of(" Zoo", kind)) if author == "teacher" else 0)


@pytest.mark.parametrize(("kind", "marker"), [("gpt2", "</think>"), ("harmony", "</think>")])
@pytest.mark.parametrize("before", ["", " ", "\n"])
@pytest.mark.parametrize("k", [1, 3, 50])
def test_a_spelled_out_end_marker_closes_the_thinking(kind, marker, before, k):
    row = write(
        scripted([f" Zoo X{before}{marker}\n\nThe answer is all"], kind),
        scripted(Script(["all Then"], "Three."), "gpt2"),
        both(by_first_letter),
        chunk_tokens=k,
    )
    assert spans(row) == [("student", "all"), ("teacher", " Zoo X")]
    assert row.closed and row.text("answer") == "Three."


@pytest.mark.parametrize("k", [1, 3, 50])
def test_an_end_marker_that_is_a_token_does_not_close_the_thinking_as_text(k):
    row = write(
        scripted([" Zoo X <|end|>\n\nY"], "harmony"),
        scripted(Script(["all Then"], "Three."), "gpt2"),
        both(by_first_letter),
        chunk_tokens=k,
    )
    assert spans(row) == [("student", "all"), ("teacher", " Zoo X <|end|>\n\nY")]


@pytest.mark.parametrize("k", CHUNKS)
def test_an_end_marker_beyond_the_boundary_is_discarded(k):
    row = write(
        scripted([" Zoo be</think> X", " End</think>"], "gpt2"),
        scripted(["all Then</think>", " its No"], "gpt2"),
        both(by_first_letter, "gpt2"),
        chunk_tokens=k,
    )
    assert spans(row) == [("student", "all"), ("teacher", " Zoo"), ("student", " its"), ("teacher", " End")]
    assert row.closed


def test_an_end_token_beyond_the_boundary_is_discarded():
    teacher = CannedEngine(said(" Zoo be", stop="</think>"), said(" End", stop="</think>"))
    student = CannedEngine(
        said("all Then", stop="</think>"), said(" its No", stop="<|im_end|>"), said("3", stop="<|im_end|>")
    )
    row = write(teacher, student, both(by_first_letter), chunk_tokens=ENOUGH)
    assert spans(row) == [("student", "all"), ("teacher", " Zoo"), ("student", " its"), ("teacher", " End")]
    assert row.finish_reason == "stop"


@pytest.mark.parametrize("script", [[], [""], ["  \n"]])
def test_empty_thinking_is_closed_and_answered(script):
    row = write(CannedEngine(), scripted(Script(script, "Three.")), both(by_first_letter))
    assert spans(row) == [] and row.closed
    assert (row.text("answer"), row.finish_reason) == ("Three.", "stop")


def test_a_row_without_any_text_is_not_given_out_as_finished():
    row = write(CannedEngine(), scripted(Script([], "")), both(by_first_letter))
    assert row.spans == []
    assert row.finish_reason == "error"
    assert "row-1" in row.error and "student" in row.error


def test_an_author_that_takes_over_may_close_at_once():
    teacher = CannedEngine(Completion([], vocabulary("qwen").token_id("</think>")))
    row = write(teacher, scripted(Script(["all Then"], "Three.")), both(by_first_letter))
    assert spans(row) == [("student", "all")]
    assert row.closed and row.text("answer") == "Three."


# --- decision 6: k is only a speed knob

rough_pieces = st.one_of(
    st.sampled_from(TEXT.split(" ")),
    st.sampled_from(
        [
            " ",
            "  ",
            "\n",
            "\n\n",
            " \n",
            "\t",
            "\r\n",
            ".",
            ",\n",
            "}\n\n",
            " 🙂",
            "你好",
            "。",
            "，",
            "<。。",
            "é",
            "</",
        ]
    ),
    st.text(max_size=5).map(lambda text: normalize("NFC", text)),
)
rough_texts = st.lists(rough_pieces, min_size=1, max_size=14).map("".join)


def rough_scripts(names):
    """Scripts of rough text; see :func:`simple_scripts`."""
    begins = st.tuples(st.sampled_from(["", " ", "\n\n"]), st.sampled_from(names)).map("".join)
    return st.lists(st.tuples(begins, rough_texts).map(lambda pair: f"{pair[0]} {pair[1]}"), min_size=1, max_size=4)


@pytest.mark.slow
@pytest.mark.parametrize("convention", [{}, {"label_shift": 1}, {"lookahead": 1}, {"lookahead": 3}], ids=str)
@pytest.mark.parametrize("pair", PAIRS)
@settings(max_examples=25)
@given(
    teacher=rough_scripts(["Tea", "bet", "7th"]),
    student=rough_scripts(["Stu", "dye", "5ix"]),
    reader=st.sampled_from(KINDS),
    rule=st.sampled_from([by_first_letter, by_all_ids, after_comma]),
    window=st.sampled_from([2, 8, 200]),
    budget=st.one_of(st.just(100_000), st.integers(1, 40)),
)
def test_scripted_rows_do_not_depend_on_k(convention, pair, teacher, student, reader, rule, window, budget):
    rows = [
        write(
            scripted(teacher, pair[0]),
            scripted(student, pair[1]),
            both(rule, reader, **convention, window=window),
            chunk_tokens=k,
            max_thinking_tokens=budget,
        )
        for k in CHUNKS
    ]
    first = rows[0]
    assert first.finish_reason == ("stop" if first.closed else "length")
    for row, k in zip(rows, CHUNKS, strict=True):
        assert spans(row) == spans(first), f"k={k} wrote another text than k={CHUNKS[0]}"
        assert (row.finish_reason, row.closed) == (first.finish_reason, first.closed)
    assert all(author != other for (author, _), (other, _) in pairwise(spans(first)))
    for _, text in spans(first):  # whole words, and nothing but words
        assert text and text[-1:].strip() and words(text)[-1][1] == len(text)
    # "\ufffd" comes from single bytes of characters: none may appear where the scripts have none
    assert first.text("thinking").count("\ufffd") <= "".join([*teacher, *student]).count("\ufffd")


def whole_characters(kind):
    """Ids of a kind of test tokenizer that are text by themselves."""
    return [i for i in sorted(set(ids_of(TEXT, kind))) if "\ufffd" not in vocabulary(kind).decode([i])]


@pytest.mark.slow
@pytest.mark.parametrize("pair", PAIRS)
@settings(max_examples=40)
@given(
    kinds=st.data(),
    weights=st.integers(0, 2**32 - 1),
    boundary=boundary_kinds(),
    reader=st.sampled_from(KINDS),
    budget=st.sampled_from([10, 40, 10_000]),
)
def test_greedy_models_write_the_same_row_for_any_k(pair, kinds, weights, boundary, reader, budget):
    """The ids that a model samples are rarely the tokenizer's own choice for their text; all must hold even so."""
    alphabets = [
        kinds.draw(st.lists(st.sampled_from(whole_characters(kind)), min_size=8, max_size=40)) for kind in pair
    ]
    rule, convention = boundary

    def row(k):
        row = write(
            *(GreedyModel(kind, weights, alphabet) for kind, alphabet in zip(pair, alphabets, strict=True)),
            both(rule, reader, **convention),
            chunk_tokens=k,
            max_thinking_tokens=budget,
            max_answer_tokens=1,
        )
        return spans(row), row.closed, row.text("answer")

    first = row(CHUNKS[0])
    for k in CHUNKS[1:]:
        assert row(k) == first, f"k={k} wrote another row than k={CHUNKS[0]}"


@pytest.mark.parametrize("k", CHUNKS)
def test_a_character_of_many_tokens_is_not_a_word_before_it_is_whole(k):
    """Bytes of "。" look like a new word, but it goes on with the last one."""
    student = TapeModel(ids_of("so <。。 far", "gpt2"), "gpt2")
    row = write(CannedEngine(), student, both(always_style), chunk_tokens=k, max_thinking_tokens=6)
    assert row.text("thinking") == "so"  # 1 token for "so", 7 and more for the next word


@pytest.mark.parametrize("k", CHUNKS)
def test_a_predictor_that_looks_ahead_is_not_misled_by_half_a_word(k):
    """The first letter of a word may be another token than the word: " m" is two, " maybe" begins with " may"."""
    assert [vocabulary("qwen").decode([i]) for i in ids_of(" maybe")[:1]] == [" may"]
    assert [vocabulary("qwen").decode([i]) for i in ids_of(" m")] == [" ", "m"]

    def last_is_space(vocabulary, ids):
        return vocabulary.decode(ids[-1:]) != " "

    student = TapeModel(ids_of("need maybe", "gpt2"), "gpt2")
    row = write(CannedEngine(), student, both(last_is_space, label_shift=1), chunk_tokens=k)
    assert spans(row) == [("student", "need maybe")]


@pytest.mark.parametrize("k", CHUNKS)
@pytest.mark.parametrize("budget", [1, 2, 3, 4])
def test_the_budget_counts_a_word_the_same_in_any_chunk(k, budget):
    """The last kept word may share a token with the whitespace after it, here ",\\n"."""
    text = "me,\n \r\n ="
    assert [vocabulary("harmony").decode([i]) for i in ids_of(text, "harmony")][:2] == ["me", ",\n"]
    student = TapeModel(ids_of(f"{text} text", "harmony"), "harmony")
    row = write(CannedEngine(), student, both(always_style), chunk_tokens=k, max_thinking_tokens=budget)
    fitting = [text[:end] for _, end in words(text) if len(ids_of(text[:end], "harmony")) <= budget]
    assert (row.text("thinking"), row.finish_reason) == ((fitting or [""])[-1], "length")


@pytest.mark.parametrize("k", CHUNKS)
def test_the_budget_counts_the_text_however_the_student_spelled_it(k):
    """Sampled ids need not be the tokenizer's choice: 3 for "all" here, where the tokenizer takes fewer."""
    tape = [i for word in ["all", " the", " list", " and", " fun"] for letter in word for i in ids_of(letter)]
    budget = len(ids_of("all the list"))
    assert budget < len("all the list") <= len(tape)
    row = write(CannedEngine(), TapeModel(tape), both(always_style), chunk_tokens=k, max_thinking_tokens=budget)
    assert (row.text("thinking"), row.finish_reason) == ("all the list", "length")


@pytest.mark.parametrize("weights", [10, 13, 42, 127])
def test_what_is_joined_to_an_authors_unusual_ids_does_not_depend_on_k(weights):
    """Brackets and line ends of one author share tokens with the other's last word, if that has the usual ids."""
    pieces = [")", "`", "}", ",", "\n", "\n\n", " }", " so", " d"]
    alphabets = {kind: [i for piece in pieces for i in ids_of(piece, kind)] for kind in ("harmony", "qwen")}
    rows = {
        k: write(
            *(GreedyModel(kind, weights, alphabet) for kind, alphabet in alphabets.items()),
            both(by_all_ids),
            chunk_tokens=k,
            max_thinking_tokens=80,
        ).text("thinking")
        for k in CHUNKS
    }
    assert len(set(rows.values())) == 1, rows


@pytest.mark.parametrize("pair", PAIRS)
def test_greedy_models_that_begin_with_whitespace_write_the_same_row_for_any_k(pair):
    alphabets = [ids_of(" so I\n\nOkay, think 12", kind) for kind in pair]
    for weights in range(6):
        rows = {
            k: write(
                *(GreedyModel(kind, weights, alphabet) for kind, alphabet in zip(pair, alphabets, strict=True)),
                both(by_all_ids),
                chunk_tokens=k,
                max_thinking_tokens=40,
            ).text("thinking")
            for k in CHUNKS
        }
        assert len(set(rows.values())) == 1, rows
        assert rows[1] == rows[1].lstrip()


@pytest.mark.slow
@pytest.mark.parametrize("author", ["teacher", "student"])
def test_characters_that_one_tokenizer_normalizes_stay_as_written_for_any_k(author):
    """Qwen's tokenizer reads the Ohm sign as a Greek letter, and so does the test one; harmony's does not."""
    ohm, omega = "\u2126", "\u03a9"
    assert ids_of(ohm, "qwen") == ids_of(omega, "qwen") and ids_of(ohm, "harmony") != ids_of(omega, "harmony")
    kinds = ("harmony", "qwen") if author == "teacher" else ("qwen", "harmony")
    bytes_of_ohm = ids_of(ohm, "harmony")
    follows = dict(pairwise(bytes_of_ohm))
    begins = {"harmony": bytes_of_ohm[:1], "qwen": []}
    alphabets = [ids_of(" so think 12 Zoo", kind) + begins[kind] for kind in kinds]
    texts = []
    for weights in range(8):
        rows = {
            k: write(
                *(
                    GreedyModel(kind, weights, alphabet, follows if kind == "harmony" else None)
                    for kind, alphabet in zip(kinds, alphabets, strict=True)
                ),
                both(by_all_ids, "harmony"),
                chunk_tokens=k,
                max_thinking_tokens=60,
            ).text("thinking")
            for k in CHUNKS
        }
        assert len(set(rows.values())) == 1, rows
        texts.append(rows[1])
    assert ohm in "".join(texts) and omega not in "".join(texts)


@pytest.mark.parametrize("pair", [("gemma", "gemma"), ("gemma", "qwen"), ("qwen", "gemma")])
@pytest.mark.parametrize("k", [1, 4, "stream"])
def test_spaces_stay_spaces_where_a_normalizer_marks_them(pair, k):
    teacher, student = scripted(TEACHER, pair[0]), scripted(Script(STUDENT, "It  is 3.\n\n So 3."), pair[1])
    row = write(teacher, student, both(by_first_letter, "gemma"), chunk_tokens=k)
    assert spans(row) == TURNS
    assert spans(row, "answer") == [("student", "It  is 3.\n\n So 3.")]


# --- decision 7: limits are results


@pytest.mark.parametrize(("teacher", "student"), PAIRS)
@pytest.mark.parametrize("budget", [1, 2, 3, 5, 8, 13, 100])
def test_the_thinking_budget_keeps_the_most_words_that_fit(teacher, student, budget):
    row = write(
        scripted(TEACHER, teacher), scripted(STUDENT, student), both(by_first_letter), max_thinking_tokens=budget
    )
    whole = "".join(text for _, text in TURNS)
    fitting = [whole[:end] for _, end in words(whole) if len(ids_of(whole[:end], student)) <= budget]
    assert row.text("thinking") == (fitting or [""])[-1]
    assert (row.finish_reason, row.closed) == (("length", False) if budget < 100 else ("stop", True))
    assert budget == 100 or row.text("answer") == ""
    assert row.budget in ((None,) if budget == 100 else ("thinking", "word"))


def test_a_full_context_ends_the_row_and_keeps_what_fits():
    student = scripted(["add all " * 30], context_length=50)
    row = write(CannedEngine(), student, both(by_first_letter), chunk_tokens=7)
    assert (row.finish_reason, row.closed, row.error) == ("length", False, None)
    assert row.budget == "context" and row.text("thinking").startswith("add all add")
    assert row.generated["student"] - row.discarded["student"] == len(ids_of(row.text("thinking")))


def test_a_long_answer_is_cut_at_its_budget():
    row = write(CannedEngine(), scripted(Script(["all"], "It is three.")), both(by_first_letter), max_answer_tokens=2)
    assert (row.finish_reason, row.budget, row.closed) == ("length", "answer", True)
    assert ids_of(row.text("answer")) == ids_of("It is three.")[:2]


@pytest.mark.parametrize("period", ["again ", "and I add and "])
@pytest.mark.parametrize("k", [8, 50])
def test_thinking_that_goes_round_in_circles_is_cut_off(period, k):
    row = write(CannedEngine(), scripted([period * 600]), both(always_style), chunk_tokens=k)
    assert (row.finish_reason, row.closed, row.error) == ("repetition", False, None)
    # Looked at after word 256, the window still holds the first word, which has no space before it; then at 512.
    looped = (period * 600)[: words(period * 600)[511][1]]
    assert row.text("thinking") == looped
    assert row.generated["student"] - row.discarded["student"] == len(ids_of(looped))


def test_authors_who_go_round_in_circles_together_are_cut_off():
    row = write(
        scripted(" Uno" * 400, "harmony"),
        scripted("one" + " one" * 400),
        (RulePredictor(always_style), RulePredictor(never_style)),
    )
    assert row.finish_reason == "repetition"
    assert len(row.spans) == 512  # one word each; see above
    assert {span.author for span in row.spans} == {"teacher", "student"}


def test_an_endless_word_is_cut_off():
    row = write(CannedEngine(), scripted(["all " + "a" * 9000]), both(always_style), chunk_tokens=1000)
    assert (row.finish_reason, row.text("thinking")) == ("repetition", "all")


ENDLESS = ["so be it all " + "10" * 9000, "so be it all" + "\n" * 9000, "so be it all 1,2" + ",1,2" * 4000]


@pytest.mark.parametrize("text", ENDLESS)
@pytest.mark.parametrize(("method", "lookahead"), [("student", 0), *(("alternate", ahead) for ahead in (0, 1, 2, 4))])
@pytest.mark.parametrize("k", [1, 8, "stream"])
def test_the_thinking_budget_binds_where_no_word_ends(text, method, lookahead, k):
    row = write(
        CannedEngine(),
        scripted([text]),
        both(always_style, lookahead=lookahead),
        chunk_tokens=k,
        thinking=method,
        max_thinking_tokens=50,
    )
    judged = 4 - lookahead + (lookahead > 0 and not text.endswith("\n"))  # a word that has begun lets one be judged
    assert (row.finish_reason, row.budget, row.text("thinking")) == ("length", "word", " ".join(text.split()[:judged]))
    assert row.generated["student"] <= 2 * 50 + 20


@pytest.mark.parametrize("lookahead", [0, 1, 2, 4])
@pytest.mark.parametrize("k", [1, 8, 40, "stream"])
def test_a_turn_never_passes_what_is_left_of_the_budget_by_more_than_a_chunk(lookahead, k):
    text = " ".join(["incomprehensibilities", "so", "2,718,281"] * 40)
    for budget in (1, 2, 5, 20, 60):
        row = write(
            CannedEngine(),
            scripted([text]),
            both(always_style, lookahead=lookahead),
            chunk_tokens=k,
            max_thinking_tokens=budget,
        )
        assert row.finish_reason == "length"
        assert len(ids_of(row.text("thinking"))) <= budget
        longest = len(ids_of(" incomprehensibilities"))
        assert row.generated["student"] <= budget + SLACK + longest + (k if isinstance(k, int) else 8)


@pytest.mark.parametrize("convention", [{}, {"label_shift": 1}, {"lookahead": 1}, {"lookahead": 3}], ids=str)
@pytest.mark.parametrize(
    "text",
    [
        "all" + "\n" * 400 + "Zoo it",
        "all it be " + "10" * 400 + " Zoo it so be",
        "be " * 600,
        ("so " * 7 + "be ") * 99,
    ],
)
def test_where_a_row_ends_does_not_depend_on_k_though_one_chunk_holds_all(convention, text):
    rule = after_comma if "label_shift" in convention else by_first_letter_of(convention.get("lookahead", 0))
    for budget in (50, 5000):
        rows = (
            write(
                scripted([" Tea Zoo"]),
                scripted([text, " it"]),
                both(rule, **convention),
                chunk_tokens=k,
                max_thinking_tokens=budget,
            )
            for k in (7, ENOUGH, "stream")
        )
        ends = {(str(spans(row)), row.finish_reason, row.budget) for row in rows}
        assert len(ends) == 1, ends


def test_an_answer_that_goes_round_in_circles_is_called_repetition():
    answer, budget = "again " * 600, len(ids_of("again " * 550))
    row = write(CannedEngine(), scripted(Script(["all"], answer)), both(always_style), max_answer_tokens=budget)
    assert (row.finish_reason, row.budget, row.closed) == ("repetition", None, True)


@pytest.mark.parametrize("retryable", [True, False])
@pytest.mark.parametrize("part", ["thinking", "answer"])
def test_a_failed_request_ends_the_row_with_its_message_and_keeps_the_spans(retryable, part):
    error = RequestError("HTTP 500 from t1. Expected 200. Look at its log.", retryable=retryable)
    fault = {"thinking": error, "answer": None}[part]
    teacher = scripted(
        TEACHER, "harmony", fault=lambda request: fault if len(teacher_seen) == 1 else teacher_seen.append(1)
    )
    teacher_seen = []
    student = scripted(STUDENT, fault=lambda request: error if request.part == "answer" else None)
    row = write(teacher, student, both(by_first_letter), chunk_tokens=ENOUGH)
    assert (row.finish_reason, row.error, row.retryable) == ("error", str(error), retryable)
    assert spans(row) == (TURNS if part == "answer" else TURNS[:3])
    assert row.closed == (part == "answer")


@pytest.mark.parametrize("part", ["thinking", "answer"])
def test_an_engine_that_returns_nothing_is_an_error_and_no_empty_row(part):
    nothing = Completion([], None)
    answers = [nothing] if part == "thinking" else [said("all", stop="</think>"), nothing]
    row = write(CannedEngine(), CannedEngine(*answers), both(by_first_letter))
    assert (row.finish_reason, row.retryable) == ("error", False)
    for shown in ("'row-1'", "'canned-qwen'", "wrote nothing", "At least one token was expected", "look at"):
        assert shown in row.error
    assert row.text("thinking") == ("" if part == "thinking" else "all")


@pytest.mark.parametrize("author", ["teacher", "student"])
def test_a_dead_engine_stops_the_run(author):
    dead = CannedEngine(EngineDeadError("The engine is gone."))
    teacher, student = (dead, CannedEngine(said("all Then we"))) if author == "teacher" else (CannedEngine(), dead)
    with pytest.raises(EngineDeadError, match="gone"):
        write(teacher, student, both(by_first_letter), chunk_tokens=ENOUGH)
    assert teacher.released == student.released == ["row-1"]


@pytest.mark.parametrize("ending", [said("all", stop="</think>"), RequestError("No."), Completion([], None)])
def test_engines_may_forget_a_row_however_it_ended(ending):
    teacher, student = CannedEngine(), CannedEngine(ending, said("3", stop="<|im_end|>"))
    write(teacher, student, both(by_first_letter))
    assert teacher.released == student.released == ["row-1"]


@pytest.mark.parametrize("author", ["teacher", "student"])
def test_a_prompt_longer_than_a_context_is_told_and_asks_no_engine(author):
    engines = {name: CannedEngine(context_length=5 if name == author else 999) for name in ("teacher", "student")}
    row = write(*engines.values(), both(by_first_letter))
    assert (row.finish_reason, row.retryable, row.spans) == ("error", False, [])
    length = len(
        vocabulary("qwen").encode_template("<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n<think>\n")
    )
    for shown in ("'row-1'", f"{length} tokens", author, "'canned-qwen'", "holds 5", "Shorten or filter"):
        assert shown in row.error
    assert not engines["teacher"].requests and not engines["student"].requests


def test_a_prompt_the_template_refuses_is_told():
    prompt = Prompt("row-9", [{"role": "user"}], seed=1)
    teacher = CannedEngine()
    teacher.tokenizer.chat_template, kept = (
        "{{ raise_exception('no content') }}<think>",
        teacher.tokenizer.chat_template,
    )
    try:
        row = write(teacher, CannedEngine(), both(by_first_letter), prompt=prompt)
    finally:
        teacher.tokenizer.chat_template = kept
    assert (row.key, row.finish_reason, row.retryable) == ("row-9", "error", False)
    assert "no content" in row.error and "user" in row.error


# --- counts


@pytest.mark.parametrize(("teacher", "student"), PAIRS)
def test_generated_and_discarded_tokens_are_counted_in_each_authors_own_tokens(teacher, student):
    row = write(
        scripted(TEACHER, teacher),
        scripted(Script(STUDENT, "It is 3."), student),
        both(by_first_letter),
        chunk_tokens=ENOUGH,
    )
    # Each take-over writes the whole rest of the script, from that turn's text on.
    assert row.generated == {
        "student": sum(len(ids_of("".join(STUDENT[turn:]), student)) for turn in range(3))
        + len(ids_of("It is 3.", student)),
        "teacher": sum(len(ids_of("".join(TEACHER[turn:]), teacher)) for turn in range(2)),
    }
    kept = {
        author: sum(len(ids_of(text, kind)) for writer, text in TURNS if writer == author)
        for author, kind in (("student", student), ("teacher", teacher))
    }
    kept["student"] += len(ids_of("It is 3.", student))
    assert row.discarded == {author: row.generated[author] - kept[author] for author in kept}


@pytest.mark.parametrize("k", [k for k in CHUNKS if k])
def test_at_most_a_chunk_is_discarded_at_a_hand_over(k):
    """Beyond the boundary lies what was left of one chunk, and a first word of the other kind."""
    row = write(scripted(TEACHER), scripted(STUDENT, piece_tokens=3), both(by_first_letter), chunk_tokens=k)
    kept = sum(len(ids_of(text)) for writer, text in TURNS if writer == "student")
    assert row.generated["student"] - row.discarded["student"] == kept
    longest = max(len(ids_of(f" {word}")) for word in " ".join(STUDENT).split())
    most = 3 if k == "stream" else k
    assert 0 < row.discarded["student"] <= 2 * (most + longest)


def test_a_spelled_out_marker_and_what_follows_count_as_discarded():
    row = write(
        CannedEngine(), scripted(["all</think>\n\nThe end"], "gpt2"), both(by_first_letter), chunk_tokens=ENOUGH
    )
    assert row.discarded["student"] == len(ids_of("all</think>\n\nThe end", "gpt2")) - len(ids_of("all", "gpt2"))


# --- the other data recipes over the same loop


@pytest.mark.parametrize("thinking", ["teacher", "student"])
@pytest.mark.parametrize("answer", ["teacher", "student"])
@pytest.mark.parametrize(("teacher", "student"), PAIRS)
def test_one_author_thinks_alone_without_a_predictor(thinking, answer, teacher, student):
    kinds = {"teacher": teacher, "student": student}
    text = "all Zoo\n\nbe (x) 12."
    engines = {
        name: CannedEngine(
            *([said(text, kinds[name], make_eos(kinds[name]))] if name == thinking else []),
            *([said(" Three. ", kinds[name], make_eos(kinds[name]))] if name == answer else []),
            kind=kinds[name],
        )
        for name in kinds
    }
    row = write(*engines.values(), thinking=thinking, answer=answer, max_thinking_tokens=300, max_answer_tokens=30)
    assert [(s.author, s.part, s.text) for s in row.spans] == [
        (thinking, "thinking", text),
        (answer, "answer", "Three."),
    ]
    assert row.finish_reason == "stop" and not any(row.discarded.values())
    assert [r.max_tokens for r, _ in engines[thinking].requests if r.part == "thinking"] == [300]
    asked, ids = engines[answer].requests[-1]
    assert asked.max_tokens == 30 and vocabulary(kinds[answer]).decode(ids).count(text) == 1


@pytest.mark.parametrize("author", ["teacher", "student"])
@pytest.mark.parametrize(("teacher", "student"), PAIRS)
def test_one_author_alone_is_held_to_the_budget(author, teacher, student):
    text = " ".join(["add", "Zoo"] * 30)
    engines = {"teacher": scripted([text], teacher), "student": scripted([text], student)}
    row = write(*engines.values(), thinking=author, max_thinking_tokens=25)
    fitting = [text[:end] for _, end in words(text) if len(ids_of(text[:end], student)) <= 25]
    assert spans(row) == [(author, fitting[-1])]
    assert (row.finish_reason, row.budget, row.closed) == ("length", "thinking", False)


@pytest.mark.parametrize(("teacher", "student"), PAIRS)
def test_the_teacher_may_answer_alternated_thinking(teacher, student):
    row = write(
        scripted(Script(TEACHER, "It is 3."), teacher),
        scripted(STUDENT, student),
        both(by_first_letter),
        answer="teacher",
    )
    assert spans(row) == TURNS
    assert spans(row, "answer") == [("teacher", "It is 3.")]
