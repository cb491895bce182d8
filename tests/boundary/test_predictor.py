"""Boundary predictors are read by a stated label convention, from a bounded window, in batches that change nothing."""

import asyncio
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    AutoModelForTokenClassification,
    BertConfig,
    BertForTokenClassification,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3ForTokenClassification,
)

from tessy_hf.boundary import batches
from tessy_hf.boundary.predictor import KNOWN_CHECKPOINTS, BoundaryPredictor, Convention, window_start
from tessy_hf.errors import BoundaryError
from tests.rules import ids_of, vocabulary
from tests.worlds import TEXT, make_tokenizer

NAMED = {"id2label": {0: "capability", 1: "style"}, "label2id": {"capability": 0, "style": 1}}


def save(folder, model_class=Qwen3ForTokenClassification, tokenizer="qwen", **config):
    """Save a tiny random checkpoint."""
    torch.manual_seed(3)
    shape = {"hidden_size": 32, "head_dim": 32, "num_hidden_layers": 1, "intermediate_size": 64}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 512, "pad_token_id": 0}
    model_class(Qwen3Config(**shape, **heads, **config)).save_pretrained(folder)
    if tokenizer is not None:
        make_tokenizer(tokenizer).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint whose config states everything."""
    return save(tmp_path_factory.mktemp("stated"), label_shift=0, **NAMED)


@pytest.fixture(scope="module")
def upstream(tmp_path_factory):
    """A checkpoint as the authors released theirs: two labels without names, and no word of a convention."""
    return save(tmp_path_factory.mktemp("upstream"), num_labels=2)


@pytest.fixture
def load():
    """Load predictors and let go of them after the test."""
    loaded = []

    def from_pretrained(model, **options):
        loaded.append(BoundaryPredictor.from_pretrained(model, device="cpu", **options))
        return loaded[-1]

    yield from_pretrained
    for predictor in loaded:
        predictor.close()


def labels(predictor, *windows):
    """Read windows at the same time."""

    async def run():
        return await asyncio.gather(*(predictor.labels(window) for window in windows))

    return asyncio.run(run())


def by_hand(folder, window, style_label=1):
    """The labels of one window, from the network alone."""
    network = AutoModelForTokenClassification.from_pretrained(folder).eval()
    with torch.inference_mode():
        logits = network(input_ids=torch.tensor([window])).logits[0]
    return (logits.argmax(-1) == style_label).tolist()


# --- label conventions


@pytest.mark.parametrize("label_shift", [0, 1])
def test_the_config_may_state_the_convention(tmp_path, load, label_shift):
    folder = save(tmp_path, label_shift=label_shift, **NAMED)
    predictor = load(folder)
    assert (predictor.label_shift, predictor.live.convention.style_label) == (label_shift, 1)


def test_the_config_may_name_the_style_label(tmp_path, load):
    names = {"id2label": {0: "STYLE", 1: "capability"}, "label2id": {"STYLE": 0, "capability": 1}}
    folder = save(tmp_path, label_shift=0, **names)
    predictor = load(folder)
    assert predictor.live.convention == Convention(label_shift=0, style_label=0)
    window = ids_of(TEXT)[:60]
    assert labels(predictor, window) == [by_hand(folder, window, style_label=0)]


def test_the_user_may_state_the_convention_and_wins_over_the_config(checkpoint, load):
    predictor = load(checkpoint, label_shift=1, style_label=0)
    assert predictor.live.convention == Convention(label_shift=1, style_label=0)


def test_an_unstated_convention_is_refused_with_how_to_state_it(upstream):
    with pytest.raises(BoundaryError) as caught:
        BoundaryPredictor.from_pretrained(upstream, device="cpu")
    for shown in (upstream, "does not state", "LABEL_1", "label_shift=0", "label_shift=1", "config.json"):
        assert shown in str(caught.value)


def test_an_upstream_checkpoint_loads_once_the_convention_is_stated(upstream, load):
    predictor = load(upstream, label_shift=1)
    assert predictor.live.convention == Convention(label_shift=1, style_label=1)
    assert (predictor.label_shift, predictor.window) == (1, 200)


def test_the_released_checkpoints_are_known():
    assert KNOWN_CHECKPOINTS == {
        "CoopReason/Boundary_Predictor_Teacher_Code": Convention(label_shift=1, style_label=1),
        "CoopReason/Boundary_Predictor_Student_Code": Convention(label_shift=1, style_label=1),
    }


def test_a_known_checkpoint_needs_no_statement(upstream, monkeypatch, load):
    monkeypatch.setitem(KNOWN_CHECKPOINTS, upstream, Convention(label_shift=1, style_label=0))
    assert load(upstream).live.convention == Convention(label_shift=1, style_label=0)


@pytest.mark.parametrize("label_shift", [2, -1])
def test_a_shift_other_than_0_or_1_is_refused(checkpoint, label_shift):
    with pytest.raises(BoundaryError, match=rf"label_shift is {label_shift}\b"):
        BoundaryPredictor.from_pretrained(checkpoint, label_shift=label_shift, device="cpu")


def test_labels_of_which_none_is_called_style_are_refused_with_what_to_state(tmp_path, load):
    folder = save(tmp_path, num_labels=3)
    with pytest.raises(BoundaryError) as caught:
        BoundaryPredictor.from_pretrained(folder, label_shift=0, device="cpu")
    for shown in (folder, "LABEL_2", "none is named 'style'", "style_label=1"):
        assert shown in str(caught.value)
    assert load(folder, label_shift=0, style_label=2).live.convention.style_label == 2
    with pytest.raises(BoundaryError, match="style_label"):
        BoundaryPredictor.from_pretrained(folder, label_shift=0, style_label=3, device="cpu")


def test_a_look_ahead_is_read_from_the_config(tmp_path, load):
    predictor = load(save(tmp_path, label_shift=0, lookahead=2, eos_token_id=7, **NAMED))
    assert (predictor.lookahead, predictor.end_id) == (2, 7)


@pytest.mark.parametrize("wrong", [{"label_shift": 1}, {"lookahead": -1}, {"lookahead": "2"}, {"eos_token_id": None}])
def test_a_look_ahead_that_cannot_be_used_is_refused(tmp_path, wrong):
    folder = save(tmp_path, **{"label_shift": 0, "lookahead": 2, "eos_token_id": 7, **NAMED, **wrong})
    with pytest.raises(BoundaryError, match=r"has lookahead=(?s:.*)Fix config\.json"):
        BoundaryPredictor.from_pretrained(folder, device="cpu")


# --- what is no boundary predictor


def test_a_causal_language_model_is_refused(tmp_path):
    folder = save(tmp_path, Qwen3ForCausalLM)
    with pytest.raises(BoundaryError) as caught:
        BoundaryPredictor.from_pretrained(folder, label_shift=1, device="cpu")
    for shown in (folder, "no trained weights for", "not a token classifier", *KNOWN_CHECKPOINTS, "train one"):
        assert shown in str(caught.value)


def test_a_folder_without_a_model_or_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(BoundaryError, match="No boundary predictor could be loaded from .*nowhere"):
        BoundaryPredictor.from_pretrained(tmp_path / "nowhere", label_shift=1, device="cpu")
    make_tokenizer("qwen").save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(BoundaryError, match=r"tokenizer(?s:.*)token-classification model in safetensors"):
        BoundaryPredictor.from_pretrained(tmp_path / "tokenizer", label_shift=1, device="cpu")


@pytest.mark.parametrize("window", [1, 0, -3])
def test_a_window_too_short_to_read_is_refused(checkpoint, window):
    with pytest.raises(BoundaryError, match=rf"is {window}\. Pass window=200"):
        BoundaryPredictor.from_pretrained(checkpoint, window=window, device="cpu")


# --- the window


@given(position=st.integers(0, 3000), window=st.integers(2, 400))
def test_a_token_is_inside_its_window(position, window):
    start = window_start(position, window)
    assert 0 <= start <= position < start + window


@given(position=st.integers(0, 3000), window=st.integers(2, 400))
def test_windows_move_on_and_never_back(position, window):
    assert window_start(position, window) <= window_start(position + 1, window)


@given(position=st.integers(0, 3000), window=st.integers(2, 400))
def test_a_token_is_read_with_half_a_window_before_it_where_there_is_that_much(position, window):
    before = position - window_start(position, window)
    assert before >= min(position, (window - 1) // 2)


@given(position=st.integers(0, 1000), window=st.integers(2, 50))
def test_windows_move_in_strides_so_that_neighbours_share_one(position, window):
    starts = {window_start(p, window) for p in range(position, position + window // 2)}
    assert len(starts) <= 2 and all(start % (window // 2) == 0 for start in starts)


def test_the_window_is_the_users_or_the_configs_or_200(tmp_path, checkpoint, load):
    folder = save(tmp_path, label_shift=0, window=64, **NAMED)
    assert load(folder).window == 64
    assert load(folder, window=32).window == 32
    assert load(checkpoint).window == 200


# --- reading


def test_labels_are_those_of_the_network(checkpoint, load):
    window = ids_of(TEXT)[:100]
    expected = by_hand(checkpoint, window)
    assert labels(load(checkpoint), window) == [expected]
    assert {True, False} == set(expected)  # else this test could not fail


def test_the_predictor_reads_with_its_own_vocabulary(tmp_path, load):
    folder = save(tmp_path, tokenizer="harmony", label_shift=0, **NAMED)
    assert load(folder).vocabulary.fingerprint == vocabulary("harmony").fingerprint


def test_labels_depend_on_what_comes_before_alone(checkpoint, load):
    window = ids_of(TEXT)[:80]
    predictor = load(checkpoint)
    whole, *parts = labels(predictor, window, *(window[:n] for n in (1, 7, 40, 79)))
    assert parts == [whole[:n] for n in (1, 7, 40, 79)]


def test_windows_read_together_get_the_labels_they_get_alone(checkpoint, load, monkeypatch):
    predictor = load(checkpoint)
    ids = ids_of(TEXT)
    windows = [ids[start : start + length] for start in range(0, 60, 6) for length in (1, 2, 17, 90)]
    alone = [labels(predictor, window)[0] for window in windows]
    assert len({tuple(each) for each in alone}) > len(windows) // 2
    sizes = []
    read = predictor.live.reader.read
    monkeypatch.setattr(predictor.live.reader, "read", lambda *batch: sizes.append(len(batch[0])) or read(*batch))
    assert labels(predictor, *windows) == alone
    assert sizes == [len(windows)]  # one forward pass for all that wait
    monkeypatch.setattr(batches, "MAX_BATCH", 7)
    sizes.clear()
    assert labels(predictor, *windows) == alone
    assert sum(sizes) == len(windows) and max(sizes) == 7


def test_padding_is_hidden_from_a_model_that_looks_both_ways(tmp_path, load):
    """Right padding could not mislead a causal model; a classifier may be another kind."""
    torch.manual_seed(5)
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    config = BertConfig(**shape, vocab_size=512, label_shift=0, initializer_range=1.0, **NAMED)
    BertForTokenClassification(config).save_pretrained(tmp_path)
    make_tokenizer("qwen").save_pretrained(tmp_path)
    windows = [ids_of(TEXT)[start : start + length] for start, length in ((0, 90), (5, 4), (9, 30), (40, 1), (60, 17))]
    predictor = load(tmp_path)
    alone = [labels(predictor, window)[0] for window in windows]
    assert alone == [by_hand(tmp_path, window) for window in windows]
    assert labels(predictor, *windows) == alone


def test_a_failed_reading_is_told_to_those_who_wait_and_to_nobody_else(checkpoint, load):
    predictor = load(checkpoint)
    good, bad = ids_of("Okay, so"), [10**6]

    async def run():
        both = await asyncio.gather(predictor.labels(bad), predictor.labels(good), return_exceptions=True)
        return both, await predictor.labels(good)

    failed, after = asyncio.run(run())
    assert all(isinstance(error, BoundaryError) and "predictor failed" in str(error) for error in failed)
    assert after == by_hand(checkpoint, good)


def test_a_caller_who_gives_up_does_not_disturb_the_others(checkpoint, load):
    predictor = load(checkpoint)
    window = ids_of("Okay, so I need")

    async def run():
        leaving = asyncio.create_task(predictor.labels(window))
        staying = asyncio.create_task(predictor.labels(window))
        await asyncio.sleep(0)
        leaving.cancel()
        return await staying, leaving

    stayed, left = asyncio.run(run())
    assert stayed == by_hand(checkpoint, window)
    assert left.cancelled()


def test_a_predictor_serves_one_loop_after_another_and_starts_again_after_close(checkpoint, load):
    predictor = load(checkpoint)
    window = ids_of("Okay, so I need")
    first = labels(predictor, window)
    assert labels(predictor, window) == first
    predictor.close()
    predictor.close()
    assert labels(predictor, window) == first


# --- being described, pickled and shown


def test_describing_a_predictor_loads_nothing():
    predictor = BoundaryPredictor("no/such-model", revision="v1", label_shift=1, window=64)
    assert predictor.identity == {
        "model": "no/such-model",
        "revision": "v1",
        "label_shift": 1,
        "style_label": None,
        "window": 64,
    }
    assert repr(predictor) == "BoundaryPredictor('no/such-model')"
    predictor.close()


def test_a_pickled_predictor_carries_its_description_and_reads_the_same(checkpoint, load):
    predictor = load(checkpoint, label_shift=1, window=50)
    window = ids_of(TEXT)[:50]
    first = labels(predictor, window)
    data = pickle.dumps(predictor)
    assert len(data) < 2_000  # no weights in it
    copy = pickle.loads(data)
    assert copy.identity == predictor.identity
    try:
        assert (copy.label_shift, copy.window) == (1, 50)
        assert labels(copy, window) == first
    finally:
        copy.close()
    assert labels(predictor, window) == first  # the original is as it was
