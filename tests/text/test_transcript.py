"""The ids an engine gets equal a from-scratch tokenisation; all authors see the same characters."""

import copy
from unicodedata import normalize

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tessy_hf.text.transcript import TokenList, Transcript
from tessy_hf.text.vocabulary import Vocabulary, words
from tests.worlds import RARER_TOKENIZERS, TEXT, TOKENIZERS, make_tokenizer

VOCABULARIES = {kind: Vocabulary(make_tokenizer(kind), kind) for kind in sorted(TOKENIZERS | RARER_TOKENIZERS)}


def as_read(kind, text):
    """What is left of a text in a test tokenizer's ids: with composed letters, or without a mark of spaces."""
    marks = kind in RARER_TOKENIZERS and kind != "superbpe"
    return normalize("NFC", text) if kind == "qwen" else text.replace("▁", " ") if marks else text


pieces_of_text = st.one_of(
    st.sampled_from(TEXT.split(" ")),
    st.sampled_from(
        [" ", "  ", "\n", "\n\n", " \n", "\t", "\r\n", ".", ",\n", "}\n\n", "don't", "1234", "é", "你好", "。", "🙂"]
    ),
    st.text(max_size=6),
)
texts = st.lists(pieces_of_text, min_size=1, max_size=30).map("".join)


def cut_at_words(text, draw):
    """Cut a text at random word ends."""
    ends = [end for _, end in words(text)]
    chosen = sorted(draw(st.sets(st.sampled_from(ends)))) if ends else []
    bounds = [0, *chosen, *(ends[-1:] or [0])]
    return [text[a:b] for a, b in zip(bounds, bounds[1:], strict=False) if b > a]


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(VOCABULARIES))
@settings(max_examples=150)
@given(data=st.data(), text=texts)
def test_appended_pieces_equal_a_tokenisation_from_scratch(kind, data, text):
    vocabulary = VOCABULARIES[kind]
    text = text.strip()
    tokens = TokenList(vocabulary)
    for piece in cut_at_words(text, data.draw):
        preview = tokens.preview(piece)
        tokens.append(piece)
        assert preview.window(0, len(tokens.ids)) == list(tokens.ids)
    assert list(tokens.ids) == vocabulary.encode(text).ids
    assert vocabulary.decode(tokens.ids) == as_read(kind, text)


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted({*VOCABULARIES} - {"superbpe"}))
def test_a_chunk_costs_the_same_however_long_the_text_is(kind):
    vocabulary, lengths = VOCABULARIES[kind], []
    counting = copy.copy(vocabulary)
    counting.encode = lambda text, after=None: lengths.append(len(text)) or vocabulary.encode(text, after)
    tokens = TokenList(counting)
    lists = "[" + ",\n".join(map(str, range(1000, 1400))) + "]"
    for text in (TEXT, lists, "你好，世界。再见！" * 99):
        for start, end in words(text):
            tokens.append(text[start:end])
    assert max(lengths) < 100


def opened(kind):
    """A list that holds a prompt with the thinking left open."""
    return TokenList(VOCABULARIES[kind], VOCABULARIES[kind].encode_template(f"{OPENED[kind]}\n"), "\n")


OPENED = {"harmony": "<|message|>", **{kind: "<think>" for kind in sorted(VOCABULARIES) if kind != "harmony"}}


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(OPENED))
@pytest.mark.parametrize("tail", ["", "\n"])
@settings(max_examples=100)
@given(data=st.data(), text=texts)
def test_ids_after_a_prompt_equal_a_tokenisation_of_the_whole(kind, tail, data, text):
    vocabulary = VOCABULARIES[kind]
    prompt, text = OPENED[kind] + tail, text.strip()
    tokens = TokenList(vocabulary, vocabulary.encode_template(prompt), tail)
    for piece in cut_at_words(text, data.draw):
        tokens.append(piece)
    assert list(tokens.ids) == vocabulary.encode_template(prompt + text)


@pytest.mark.slow
@pytest.mark.parametrize("teacher", sorted(VOCABULARIES))
@pytest.mark.parametrize("student", sorted(VOCABULARIES))
@settings(max_examples=25)
@given(data=st.data(), text=texts)
@example(data=None, text="Wait.\n\nSo  1234, é你好。")
def test_all_authors_see_the_same_characters(teacher, student, data, text):
    """Authors take turns writing the text in their own ids, over-generating each time; each is cut at a word end."""
    views = {"teacher": opened(teacher), "student": opened(student)}
    transcript = Transcript(views, VOCABULARIES.values())
    turns = cut_at_words(text.strip(), data.draw) if data else [text]
    said = ""
    for number, piece in enumerate(turns):
        author = ("student", "teacher")[number % 2]
        view = views[author]
        view.push(view.vocabulary.encode(piece + ", and more besides", 0).ids)
        written, ends = view.tentative()
        kind = {"teacher": teacher, "student": student}[author]
        assert written == as_read(kind, piece + ", and more besides")
        kept = len(as_read(kind, piece))
        transcript.cut(author, ends, kept, written[:kept])
        said += written[:kept]
    for author, kind in (("teacher", teacher), ("student", student)):
        read = views[author].vocabulary.read(views[author].ids)[0]
        assert as_read(kind, read).endswith(f"\n{as_read(kind, said)}")
    for vocabulary in VOCABULARIES.values():  # who only listens has a tokenisation of the whole
        assert list(transcript.reader(vocabulary).ids) == vocabulary.encode(said).ids


def test_special_tokens_in_model_text_stay_text(tokenizer):
    vocabulary = Vocabulary(tokenizer, "x")
    special = tokenizer.eos_token
    ids = vocabulary.encode(f"He wrote {special} and went on.").ids
    assert not vocabulary.special_ids & set(ids)
    assert vocabulary.decode(ids) == f"He wrote {special} and went on."


def test_words_end_at_spaces_and_after_cjk_punctuation():
    text = "Okay, so\n\n1+1 你好，世界。"
    assert [text[a:b] for a, b in words(text)] == ["Okay,", " so", "\n\n1+1", " 你好，", "世界。"]


def test_same_vocabulary_hands_over_the_authors_own_ids():
    """Sampled ids need not be the tokenizer's choice for their text; the other author gets them as they are."""
    vocabulary = VOCABULARIES["qwen"]
    views = {"teacher": TokenList(vocabulary, [5, 6]), "student": TokenList(vocabulary, [7])}
    transcript = Transcript(views, [])
    unusual = [i for letter in "Okay," for i in vocabulary.encode(letter).ids]
    views["student"].push(unusual)
    text, ends = views["student"].tentative()
    assert text == "Okay," and ends == [1, 2, 3, 4, 5]
    transcript.cut("student", ends, 5, text)
    assert list(views["teacher"].ids) == [5, 6, *unusual]


def test_text_that_a_normalizer_would_change_is_kept_as_written_with_the_ids_it_was_written_in():
    """Qwen's tokenizer reads the Ohm sign as a Greek letter; a model that writes its bytes wrote an Ohm sign."""
    vocabulary = VOCABULARIES["qwen"]
    views = {"teacher": TokenList(vocabulary, [5]), "student": TokenList(vocabulary, [7])}
    transcript = Transcript(views, [])
    ohm = VOCABULARIES["gpt2"].encode("\u2126").ids
    for author, ids in (("student", vocabulary.encode("Okay,").ids), ("teacher", _same_bytes(ohm))):
        views[author].push(ids)
        text, ends = views[author].tentative()
        transcript.cut(author, ends, len(text), text)
    assert [vocabulary.decode(view.ids[1:]) for view in views.values()] == ["Okay,\u2126"] * 2


def _same_bytes(gpt2_ids):
    """The ids of the same bytes in the vocabulary of "qwen"."""
    tokens = make_tokenizer("gpt2").convert_ids_to_tokens(gpt2_ids)
    return make_tokenizer("qwen").convert_tokens_to_ids([letter for token in tokens for letter in token])


@pytest.mark.parametrize("words", [0, 3, 400])
def test_the_tail_of_a_long_prompt_is_bounded_and_begins_at_a_word(words):
    vocabulary = VOCABULARIES["qwen"]
    prompt = "<|im_start|>user\n" + "a long question " * words + "<think>\n"
    ids, tail = vocabulary.encode_open(prompt)
    assert ids == vocabulary.encode_template(prompt)
    assert tail == "user\n<think>\n" if not words else tail.endswith("question <think>\n")
    assert len(tail) <= 200 and prompt.endswith(tail) and (words < 9 or tail[0] == " ")
    tokens = TokenList(vocabulary, ids, tail)
    tokens.append("//x")
    assert list(tokens.ids) == vocabulary.encode_template(prompt + "//x")
