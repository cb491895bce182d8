"""The vocabularies that users have: text is kept as written, ids are those of the whole text, rows do not depend on k.

Needs tokenizers from the package index: see :mod:`tests.real_models`.
"""

import json
import zlib
from itertools import product
from pathlib import Path
from unicodedata import normalize

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tessy_hf.engines import scripted as scripted_engine
from tessy_hf.engines.scripted import Script
from tessy_hf.method import speaker
from tessy_hf.text.transcript import TokenList, Transcript
from tessy_hf.text.vocabulary import words
from tests.real_models import SOURCES
from tests.rules import GreedyModel, RulePredictor, by_all_ids, by_first_letter, scripted, spans, vocabulary, write

pytestmark = pytest.mark.real
KINDS = sorted(SOURCES)
CHUNKS = [1, 7, 20, None, "stream"]

TEXTS = json.loads((Path(__file__).parents[1] / "data" / "kinds_of_text.json").read_text())
"""Kinds of text that reasoning is full of, and some that tokenizers treat in their own ways."""

letters = st.characters(
    max_codepoint=0x1FFFF, exclude_categories=["Cc", "Cn", "Co", "Cs"]
)  # small vocabularies lack bytes
sentences = st.sampled_from([text[start:end] for text in TEXTS.values() for start, end in words(text)])
texts = st.lists(sentences, min_size=1, max_size=40).map("".join)


@pytest.fixture
def loaded_once(monkeypatch):
    """Let engines and speakers share the vocabularies of these tests: the large ones take seconds to load."""
    known = {id(vocabulary(kind).tokenizer): vocabulary(kind) for kind in KINDS}
    for module in (scripted_engine, speaker):
        monkeypatch.setattr(module, "Vocabulary", lambda tokenizer, name: known[id(tokenizer)])


def kept(kind, text):
    """What is left of a text in ids: Qwen's letters are composed, SentencePiece's mark of a space is a space."""
    return normalize("NFC", text) if "qwen" in kind else text.replace("▁", " ") if marks_spaces(kind) else text


def marks_spaces(kind):
    return "mistral" in kind or "gemma" in kind


def opened(kind):
    """A list that holds a prompt with the thinking left open."""
    return TokenList(vocabulary(kind), vocabulary(kind).encode_template("assistant\n<think>\n"), "\n")


def cut(text, seed):
    """Cut a text at some of its word ends."""
    ends = [end for _, end in words(text)]
    chosen = [end for end in ends[:-1] if zlib.crc32(f"{seed} {end}".encode()) % 3 == 0]
    return [text[a:b] for a, b in zip([0, *chosen], [*chosen, *ends[-1:]], strict=False) if b > a]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60)
@given(text=st.one_of(st.sampled_from(sorted(TEXTS.values())), texts, st.text(letters, max_size=40)))
@example(text="▁")
def test_text_is_read_back_as_it_was_written(kind, text):
    known = vocabulary(kind)
    ids, offsets = known.encode(text, known.token_id("a"))
    read, ends = known.read(ids)
    assert read == kept(kind, text)
    assert ends == sorted(ends) and ends[-1:] in ([], [len(read)])
    if read == text:
        assert {end for _, end in offsets} >= set(ends)
    begin = kept(kind, text).lstrip()  # a text that begins with a space, or its mark, has none to begin with
    assert known.decode(known.encode(begin).ids) == kept(kind, begin)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60)
@given(text=st.one_of(st.sampled_from(sorted(TEXTS.values())), texts), seed=st.integers(0, 99))
def test_the_ids_of_a_text_that_grew_are_those_of_the_whole(kind, text, seed):
    known, pieces = vocabulary(kind), cut(text.strip(), seed)
    view, reader = opened(kind), TokenList(known)
    for piece in pieces:
        view.append(piece)
        reader.append(piece)
    assert list(reader.ids) == known.encode("".join(pieces)).ids
    prompt = "assistant\n<think>\n"
    if not any(mark in text for mark in ("<|im_end|>", "[INST]", "</s>", "<eos>")):  # tokens in a template
        assert list(view.ids) == known.encode_template(prompt + "".join(pieces))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_encoded_again_does_not_grow_with_the_text(kind):
    tokens = TokenList(vocabulary(kind))
    for name in ("prose", "code", "latex", "table", "emoji", "spaces"):
        for start, end in words(TEXTS[name] * 3):
            text = (TEXTS[name] * 3)[start:end]
            preview = tokens.preview(text)
            assert preview.begin >= preview.length - 40, f"{text!r} of {name} is joined with all of {preview.new}"
            tokens.append(text)


@pytest.mark.parametrize(("teacher", "student"), [*product(KINDS, KINDS)])
def test_authors_hand_over_the_text_as_it_was_written(teacher, student):
    """Each author writes on after its piece, and is cut at the end of a word."""
    views = {"teacher": opened(teacher), "student": opened(student)}
    transcript, said = Transcript(views, [vocabulary(student)]), ""
    wrote = "\n\n".join(TEXTS.values()).replace("▁", "_")
    for number, piece in enumerate(cut(normalize("NFC", wrote), len(teacher))):
        author = ("student", "teacher")[number % 2]
        view = views[author]
        view.push(view.vocabulary.encode(f"{piece} and more besides", view.ids[-1]).ids)
        text, ends = view.tentative()
        assert text == f"{piece} and more besides"
        transcript.cut(author, ends, len(piece), piece)
        said += piece
    for author in views:
        assert views[author].vocabulary.read(views[author].ids)[0].endswith(f"\n{said}")
    assert list(transcript.reader(vocabulary(student)).ids) == vocabulary(student).encode(said).ids


@pytest.mark.parametrize(("teacher", "student"), [*product(KINDS, KINDS)])
@pytest.mark.usefixtures("loaded_once")
def test_rows_do_not_depend_on_k(teacher, student):
    wrote = [" Zoo".join(cut(TEXTS[name], 1)) for name in ("chinese", "emoji", "code", "spaces")]
    row = None
    for k in CHUNKS:
        written = write(
            scripted([f" Tea{wrote[0]}", f"\n\nTea {wrote[1]}"], teacher),
            scripted(Script([f"dye {wrote[2]}", f" dye {wrote[3]}"], "It  is\n 3."), student),
            (RulePredictor(by_first_letter, student, window=16), RulePredictor(by_first_letter, teacher, window=16)),
            chunk_tokens=k,
        )
        row = row or written
        assert (spans(written), written.finish_reason) == (spans(row), "stop")
    assert "\ufffd" not in row.text("thinking") and row.text("answer") == "It  is\n 3."


@pytest.mark.parametrize(("teacher", "student"), [*zip(KINDS, [*KINDS[3:], *KINDS[:3]], strict=True)])
@pytest.mark.parametrize("weights", [1, 2])
@pytest.mark.usefixtures("loaded_once")
def test_rows_of_greedy_models_do_not_depend_on_k(teacher, student, weights):
    """Their ids are drawn from those of the texts above: words, halves of words, whitespace and single bytes."""
    alphabets = [
        [i for i in sorted({*vocabulary(kind).encode("\n".join(TEXTS.values())).ids}) if i % 5 == weights]
        for kind in (teacher, student)
    ]
    rows = [
        write(
            *(GreedyModel(kind, weights, ids) for kind, ids in zip((teacher, student), alphabets, strict=True)),
            (RulePredictor(by_all_ids, student, window=16), RulePredictor(by_all_ids, teacher, window=16)),
            chunk_tokens=k,
            max_thinking_tokens=150,
            max_answer_tokens=1,
        )
        for k in CHUNKS
    ]
    assert len({(str(spans(row)), row.finish_reason) for row in rows}) == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prompt", ["Assistant:\n<think>\n", "[/INST]<think>\n", "So it is: <think>\n\n", "answer ("])
@pytest.mark.parametrize("first", ["//", "/", "//\n", ")", "=> x", "\n\n- a", "—", "你好", "1.", "'s", ">", "think"])
def test_a_first_word_that_joins_the_prompts_end_has_the_ids_of_the_whole(kind, prompt, first):
    known = vocabulary(kind)
    ids, tail = known.encode_open(prompt)
    tokens = TokenList(known, ids, tail)
    tokens.append(first)
    tokens.append(" and")
    assert list(tokens.ids) == known.encode_template(f"{prompt}{first} and")
