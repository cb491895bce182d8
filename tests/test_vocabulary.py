"""Text to ids and back, exactly, for tokenizers of each kind the field uses."""

import copy
import json
from functools import cache
from itertools import accumulate

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tessy_hf.errors import TemplateError
from tessy_hf.vocabulary import Vocabulary, words
from tests.rules import vocabulary
from tests.worlds import TEXT, TOKENIZERS, make_tokenizer

KINDS = sorted(TOKENIZERS)


def as_read(kind, text):
    """A text as the normalizer of a test tokenizer leaves it."""
    normalizer = make_tokenizer(kind).backend_tokenizer.normalizer
    return normalizer.normalize_str(text) if normalizer else text


texts = st.lists(st.one_of(st.sampled_from(TEXT.split(" ")), st.text(max_size=8)), max_size=12).map(" ".join)


@cache
def marking(by):
    """A tokenizer that marks word starts and puts a mark before any text: as Mistral's does, or as Llama 2's does."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True)
    strip = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(strip)
    special = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([line for line in TEXT.split("\n") if line], trainer)
    if by == "normalizer":
        tokenizer.pre_tokenizer = None
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return Vocabulary(PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>"), by)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60)
@given(text=texts)
def test_decoding_gives_the_encoded_text_back(kind, text):
    known = vocabulary(kind)
    assert known.decode(known.encode(text).ids) == as_read(kind, text)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60)
@given(text=texts)
def test_offsets_give_each_character_to_a_token(kind, text):
    offsets = vocabulary(kind).encode(text).offsets
    reached = 0
    for start, end in offsets:
        assert start <= reached <= end  # the tokens of one character share its offsets
        reached = end
    assert reached == len(text)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60)
@given(text=texts, cut=st.integers(0, 400))
def test_decoding_after_a_context_gives_what_comes_after_it(kind, text, cut):
    known = vocabulary(kind)
    ids = known.encode(text).ids
    whole = known.decode(ids)
    before = known.decode(ids[:cut])
    if "\ufffd" in before:  # the cut is inside a character
        return
    assert known.decode(ids[cut:], ids[:cut][-1:]) == whole[len(before) :]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40)
@given(text=texts)
def test_token_ends_are_the_same_for_ids_the_tokenizer_would_not_choose(kind, text):
    """Spelled letter by letter, each letter ends one after the other."""
    known = vocabulary(kind)
    text = as_read(kind, text)
    ids = known.encode(text).ids
    assert known.token_ends(ids, text) == [end for _, end in known.encode(text).offsets]
    letters = [known.encode(letter).ids for letter in text]
    if known.decode([i for of_letter in letters for i in of_letter]) != text:
        return  # a letter that normalises with its neighbour
    ends = known.token_ends([i for of_letter in letters for i in of_letter], text)
    assert ends == sorted(ends) and set(ends) >= set(range(1, len(text) + 1)) and len(ends) == sum(map(len, letters))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=300)
@given(text=texts)
@example(text="two  spaces,\n a line \n\n  b;\tc \u00a0 d\x1c e .. f 's 12 3456")
def test_text_in_pieces_has_the_ids_and_offsets_of_the_whole(kind, text):
    known = vocabulary(kind)
    assert known._byte_level
    assert known.encode(text) == known._whole(text)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60)
@given(text=texts)
def test_tokens_that_are_whole_characters_have_pieces_that_make_up_the_text(kind, text):
    known = vocabulary(kind)
    text = as_read(kind, text)
    ids = known.encode(text).ids
    pieces = known.pieces(ids)
    if pieces is None:
        assert any("\ufffd" in known.decode([i]) for i in ids)
        return
    assert "".join(pieces) == text
    assert list(accumulate(map(len, pieces))) == known.token_ends(ids, text)


def spoiled(change):
    """A byte-level vocabulary whose description is changed."""
    described = json.loads(make_tokenizer("gpt2").backend_tokenizer.to_str())
    change(described)
    backend = Tokenizer.from_str(json.dumps(described))
    return Vocabulary(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>"), "spoiled")


def spans_a_space(described):
    described["model"]["vocab"]["eĠ"] = max(described["model"]["vocab"].values()) + 1
    described["model"]["merges"].insert(0, ["e", "Ġ"])
    described["pre_tokenizer"]["pretokenizers"] = described["pre_tokenizer"]["pretokenizers"][-1:]


def swallows_a_space(described):
    added = {"id": 299, "content": "<x>", "single_word": False, "lstrip": False, "rstrip": True}
    described["added_tokens"].append({**added, "normalized": False, "special": False})


@pytest.mark.parametrize("change", [spans_a_space, swallows_a_space])
def test_text_stays_whole_where_a_token_can_reach_over_a_space(change):
    known = spoiled(change)
    text = "the end <x> of one"
    assert not known._byte_level and known.pieces([1]) is None
    assert known.encode(text) == known._whole(text) != known._joined(text)


@pytest.mark.parametrize("by", ["pre-tokenizer", "normalizer"])
def test_tokenizers_that_mark_word_starts_read_text_whole(by):
    assert not marking(by)._byte_level


def test_special_tokens_are_special_in_templates_and_text_in_model_text(tokenizer):
    known = Vocabulary(tokenizer, "x")
    special = sorted(known.special_ids)
    names = [tokenizer.convert_ids_to_tokens(i) for i in special]
    rendered = "".join(f"{name}text" for name in names)
    assert [i for i in known.encode_template(rendered) if i in special] == special
    assert not known.special_ids & set(known.encode(rendered).ids)
    assert known.decode(known.encode(rendered).ids) == rendered


def test_the_tokenizer_itself_is_left_as_it_was(tokenizer):
    before = tokenizer.backend_tokenizer.to_str()
    ids = tokenizer(f"a {tokenizer.eos_token} b")["input_ids"]
    Vocabulary(tokenizer, "x").encode("text")
    assert tokenizer.backend_tokenizer.to_str() == before
    assert tokenizer(f"a {tokenizer.eos_token} b")["input_ids"] == ids
    assert tokenizer.backend_tokenizer.encode_special_tokens is False


def test_truncation_and_padding_of_the_tokenizer_do_not_touch_model_text():
    tokenizer = copy.deepcopy(make_tokenizer("qwen"))
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=64)
    assert Vocabulary(tokenizer, "cut").encode(TEXT).ids == vocabulary("qwen").encode(TEXT).ids


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_id_is_given_for_whole_tokens_only(kind):
    known = vocabulary(kind)
    eos = known.tokenizer.eos_token
    assert known.token_id(eos) == known.tokenizer.eos_token_id
    assert known.token_id("Okay, so") is None
    assert (known.token_id("</think>") is None) == (kind in ("harmony", "gpt2"))


def test_equal_tokenizers_have_equal_fingerprints_and_others_do_not(tmp_path):
    fingerprints = {vocabulary(kind).fingerprint for kind in KINDS}
    assert len(fingerprints) == len(KINDS)
    make_tokenizer("qwen").save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    loaded.chat_template = "another"
    assert Vocabulary(loaded, "elsewhere").fingerprint == vocabulary("qwen").fingerprint
    loaded.add_tokens(["<tool>"])
    assert Vocabulary(loaded, "more").fingerprint not in fingerprints


def test_a_tokenizer_without_offsets_is_refused_with_what_to_do():
    class Slow:
        """A tokenizer written in Python."""

    with pytest.raises(TemplateError, match=r"'old/model' is a Slow .* fast tokenizer is needed .*save_pretrained"):
        Vocabulary(Slow(), "old/model")


def test_offsets_count_the_characters_of_the_text_as_it_is_not_as_normalized():
    assert as_read("qwen", "cafe\u0301 so") == "café so"
    for kind in ("qwen", "harmony", "gemma"):
        assert vocabulary(kind).encode("cafe\u0301 so").offsets[-1][1] == len("cafe\u0301 so")


@pytest.mark.parametrize("by", ["metaspace", "normalizer"])
@settings(max_examples=60)
@given(text=texts.map(str.strip))
@example(text="Okay, so\n\nI  need")
def test_a_tokenizer_that_marks_word_starts_continues_a_text_exactly(by, text):
    """No word gets a mark, which would be a space, that it does not have in the whole text."""
    pieces = [text[start:end] for start, end in words(text)]
    assume(all(piece[0].isspace() for piece in pieces[1:]) and "▁" not in text)
    ids = [i for piece in pieces for i in marking(by).encode(piece).ids]
    assert marking(by).decode(ids) == text
    assert ids == marking(by).encode(text).ids
    for piece in pieces[1:]:
        offsets = marking(by).encode(piece).offsets
        assert offsets[0][0] == 0 and offsets[-1][1] == len(piece)


# --- words


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        (" \n\t", []),
        ("one", ["one"]),
        ("  one two \n\nthree \n", ["  one", " two", " \n\nthree"]),
        ("你好，世界。再见", ["你好，", "世界。", "再见"]),
        ("a。。b", ["a。。", "b"]),
        ("，，a", ["，，", "a"]),
        ("x^2+1, (y)", ["x^2+1,", " (y)"]),
    ],
)
def test_words_are_cut_at_spaces_and_after_clause_ends(text, expected):
    assert [text[start:end] for start, end in words(text)] == expected


@given(text=st.text())
def test_words_lie_end_to_end_and_leave_out_only_the_last_whitespace(text):
    reached = 0
    for start, end in words(text):
        assert start == reached and text[start:end].strip() and not text[end - 1].isspace()
        reached = end
    assert text[reached:].strip() == ""


@settings(max_examples=50)
@given(
    text=st.text(alphabet=st.sampled_from("ab 。，\n"), max_size=30),
    more=st.text(alphabet=st.sampled_from("ab 。，\n"), max_size=9),
)
def test_a_word_that_another_one_follows_no_longer_changes(text, more):
    assert words(text + more)[: max(0, len(words(text)) - 1)] == words(text)[:-1]


def test_identity_ignores_how_a_tokenizer_was_used(tokenizer):
    used = copy.deepcopy(tokenizer)
    used(["one", "three words here"], padding=True, truncation=True, max_length=7) if used.pad_token else used("one")
    assert Vocabulary(used, "x").fingerprint == Vocabulary(tokenizer, "x").fingerprint
    assert (
        json.loads(used.backend_tokenizer.to_str())["model"]
        == json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    )
