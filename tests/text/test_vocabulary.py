"""Text to ids and back, exactly, for tokenizers of each kind the field uses."""

import copy
import json
from unicodedata import normalize

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tessy_hf.errors import TemplateError
from tessy_hf.text.vocabulary import Vocabulary, words
from tests.rules import vocabulary
from tests.worlds import RARER_TOKENIZERS, TEXT, TOKENIZERS, make_tokenizer

KINDS = sorted(TOKENIZERS | RARER_TOKENIZERS)
BEFORE = 300
"""An id that stands before a text, which therefore goes on and does not begin."""


def as_read(kind, text):
    """What is left of a text in a test tokenizer's ids: with composed letters, or without a mark of spaces."""
    return normalize("NFC", text) if kind == "qwen" else text if kind in BYTE_LEVEL else text.replace("▁", " ")


BYTE_LEVEL = {*TOKENIZERS, "superbpe"}
texts = st.lists(st.one_of(st.sampled_from(TEXT.split(" ")), st.text(max_size=8)), max_size=12).map(" ".join)


# --- text to ids and back


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60)
@given(text=texts)
def test_a_text_that_goes_on_is_read_back_as_it_was(kind, text):
    known = vocabulary(kind)
    assert known.read(known.encode(text, BEFORE).ids)[0] == as_read(kind, text)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60)
@given(text=texts.map(str.lstrip))
def test_decoding_a_whole_text_gives_it_back(kind, text):
    known = vocabulary(kind)
    assert known.decode(known.encode(text).ids) == as_read(kind, text)
    assert known.decode([BEFORE, *known.encode(text, BEFORE).ids], [BEFORE]).endswith(as_read(kind, text))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60)
@given(text=texts)
def test_offsets_give_each_character_to_a_token(kind, text):
    reached = 0
    for start, end in vocabulary(kind).encode(text).offsets:
        assert start <= reached <= end  # the tokens of one character share its offsets
        reached = end
    assert reached == len(text)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60)
@given(text=texts.map(lambda text: normalize("NFC", text.replace("▁", "_"))))
def test_texts_end_where_the_offsets_do(kind, text):
    known = vocabulary(kind)
    ids, offsets = known.encode(text, BEFORE)
    ends = [end for _, end in offsets]
    for at in reversed(range(len(ids) - 1)):
        if offsets[at + 1][0] < offsets[at][1]:  # they share a character
            ends[at] = ends[at + 1]
    assert known.read(ids) == (text, ends)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40)
@given(text=texts.map(lambda text: normalize("NFC", text.replace("▁", "_"))))
def test_ids_that_the_tokenizer_would_not_choose_are_read_as_well(kind, text):
    """Spelled letter by letter, each letter ends one after the other."""
    known = vocabulary(kind)
    letters = [known.encode(letter, BEFORE).ids for letter in text]
    read, ends = known.read([i for of_letter in letters for i in of_letter])
    assert read == "".join(as_read(kind, letter) for letter in text)
    assert ends == [number for number, of_letter in enumerate(letters, 1) for _ in of_letter]


@pytest.mark.parametrize("kind", ["qwen", "harmony", "gemma", "llama"])
def test_bytes_that_are_no_character_are_replaced_and_do_not_hide_their_neighbors(kind):
    known = vocabulary(kind)
    letter, x = known.encode("𝔉", BEFORE).ids, known.encode("x", BEFORE).ids
    assert len(letter) == 4
    assert known.read([*letter[:2], *x, *letter]) == ("\ufffdx𝔉", [2, 2, 2, 3, 3, 3, 3])
    assert known.read([*letter, *letter[:3]]) == ("𝔉\ufffd", [1, 1, 1, 1, 2, 2, 2])
    assert known.read([*x, *letter[1:2], *letter[1:2]]) == ("x\ufffd\ufffd", [1, 2, 3])


def test_an_id_that_lacks_bytes_of_a_character_ends_with_the_id_that_brings_them():
    """Here with one that goes on after the character: text cannot be cut between the two ids."""
    known = vocabulary("superbpe")
    assert known.token_id("ĤĠ") is not None  # the last byte of 🙂 and a space
    ids = [*known.encode("🙂", BEFORE).ids[:-1], known.token_id("ĤĠ")]
    assert known.read([*known.encode("x", BEFORE).ids, *ids]) == ("x🙂 ", [1, *[3] * len(ids)])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=100)
@given(text=texts, places=st.sets(st.integers(0, 400), max_size=4))
@example(text="two  spaces,\n a line \n\n  b;\tc \u00a0 d\x1c e .. f 's 12 3456\n\n3", places=set())
def test_the_ids_of_a_whole_text_are_those_of_its_parts_where_no_token_spans_two(kind, text, places):
    known, cuts = vocabulary(kind), [0]
    for _, end in words(text)[:-1]:
        if not known.joins(text[end - 1], text[end]) and (not places or end in places):
            cuts.append(end)
    parts = [text[start:stop] for start, stop in zip(cuts, [*cuts[1:], len(text)], strict=True)]
    ids = [i for number, part in enumerate(parts) for i in known.encode(part, BEFORE if number else None).ids]
    assert ids == known.encode(text).ids


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=200)
@given(text=texts)
@example(text="two  spaces,\n a line \n\n  b;\tc \u00a0 d\x1c e .. f 's 12 3456")
def test_text_encoded_piece_by_piece_has_the_ids_and_offsets_of_the_whole(kind, text):
    backend = copy.deepcopy(make_tokenizer(kind).backend_tokenizer)
    backend.encode_special_tokens = True
    backend.post_processor = None
    if not text[:1].isspace():  # else it is taken for a continuation
        whole = backend.encode(text, add_special_tokens=False)
        assert vocabulary(kind).encode(text) == (whole.ids, whole.offsets)


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
    known, text = spoiled(change), "the end <x> of one"
    whole = known.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
    assert known.encode(text).ids == whole.ids
    pieces = [known.encode(piece).ids for piece in ("the", " end", " <x>", " of", " one")]
    assert whole.ids != [i for piece in pieces for i in piece]


def test_characters_that_a_token_joins_are_told():
    assert spoiled(spans_a_space).joins("e", " ") and not spoiled(spans_a_space).joins("d", " ")
    assert vocabulary("harmony").joins(",", "\n") and not vocabulary("harmony").joins("y", "\n")
    assert vocabulary("superbpe").joins("\n", "H") and not vocabulary("gemma").joins("\n", "H")


@pytest.mark.parametrize(("kind", "adds"), [("qwen", 0), ("superbpe", 0), ("gemma", 0), ("llama", 1), ("llama-2", 1)])
def test_a_space_is_put_only_where_the_tokenizer_takes_a_text_to_begin(kind, adds):
    known = vocabulary(kind)
    assert known.read(known.encode("Okay, so").ids)[0] == " " * adds + "Okay, so"
    for text in ("Okay, so", " Okay", "\n\nOkay", "你好", "  Okay"):
        assert known.read(known.encode(text, known.token_id("O")).ids)[0] == text
    template = known.encode_template("<|im_end|>Okay, so")
    assert template[1:] == known.encode("Okay, so", known.token_id("<|im_end|>") or template[0]).ids


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


def test_equal_tokenizers_are_read_once_and_keep_their_own_names_and_templates():
    one, other, grown = (copy.deepcopy(make_tokenizer("qwen")) for _ in range(3))
    other.chat_template = "other"
    grown.add_tokens(["<more>"])
    first, second, third = Vocabulary(one, "a"), Vocabulary(other, "b"), Vocabulary(grown, "c")
    assert second.special_ids is first.special_ids and third.special_ids is not first.special_ids
    chats = [known.chat_text([{"role": "user", "content": "x"}]) for known in (first, second)]
    assert (first.name, second.name) == ("a", "b") and chats[0] != chats[1] == "other"
    assert second.encode(TEXT) == first.encode(TEXT) and third.fingerprint != first.fingerprint
