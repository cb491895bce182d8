"""Windows that grew are read from where they grew, and their labels are those of reading them whole."""

import random

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForTokenClassification,
    Qwen3Config,
    Qwen3ForTokenClassification,
)

from tessy_hf.boundary import window_cache
from tessy_hf.boundary.qwen3 import small_qwen3
from tessy_hf.boundary.window_cache import WindowCache

SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "vocab_size": 512, "pad_token_id": 0}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
RANDOM = {"initializer_range": 0.5}
WINDOW = 60


def network(**config):
    torch.manual_seed(3)
    return Qwen3ForTokenClassification(Qwen3Config(**SHAPE, **HEADS, **RANDOM, **config)).eval()


def llama():
    torch.manual_seed(3)
    return LlamaForTokenClassification(LlamaConfig(**SHAPE, **HEADS, **RANDOM)).eval()


def whole(network, window):
    with torch.inference_mode():
        return network(input_ids=torch.tensor([window])).logits[0].argmax(-1).tolist()


def batches(seed):
    """Yield batches of (window, since) as rows make them: they grow, are rolled back, begin anew, begin alike."""
    draw = random.Random(seed)
    same = [draw.randrange(512) for _ in range(window_cache.KEY_IDS)]
    rows = [[*same] if row % 2 else [] for row in range(6)]
    for _ in range(25):
        batch = []
        for row in draw.sample(rows, draw.randint(1, 6)):
            del row[max(0, len(row) - draw.choice([0, 0, 0, 1, 5])) :]
            row += [draw.randrange(512) for _ in range(draw.randint(1, 12))]
            if len(row) > WINDOW:
                del row[: WINDOW // 2]
            batch += [(list(row), draw.randrange(len(row)))] * draw.choice([1, 1, 2])
        yield batch


@pytest.mark.slow
@pytest.mark.parametrize("made", [network, llama], ids=["in few calls", "by transformers"])
@pytest.mark.parametrize("kept_bytes", [2**30, 2**15], ids=["all is kept", "little is kept"])
def test_labels_do_not_depend_on_what_was_read_before(made, kept_bytes, monkeypatch):
    monkeypatch.setattr(window_cache, "CACHE_BYTES", kept_bytes)
    stock = made()
    cache = WindowCache(stock, WINDOW)
    for batch in batches(7):
        windows, since = zip(*batch, strict=True)
        assert cache.read(windows, since) == [whole(stock, window)[begin:] for window, begin in batch]


def test_only_what_is_new_goes_through_the_network(monkeypatch):
    stock, read = network(), []
    monkeypatch.setattr("tessy_hf.boundary.window_cache.small_qwen3", lambda network, longest: None)
    cache, forward = WindowCache(stock, WINDOW), stock.forward
    monkeypatch.setattr(stock, "forward", lambda **given: read.append(given["input_ids"].numel()) or forward(**given))
    ids = list(range(100, 100 + WINDOW))
    for length in (30, 40, 45, 60):
        cache.read([ids[:length]], [length - 3])
    assert read == [30, 10, 5, 15]
    cache.read([ids, ids[1:]], [50, 50])  # one that is known, from 50 on, and one that is not
    assert sorted(read[4:]) == [10, 59]


@pytest.mark.parametrize("bias", [False, True])
def test_logits_in_few_calls_are_those_of_transformers(bias):
    stock = network(attention_bias=bias)
    made, texts = small_qwen3(stock, WINDOW), torch.randint(512, (3, 20))
    cuts = (((0, 12), (0, 5), (0, 19)), ((12, 20), (5, 17), (19, 20)))
    states = [made.room(WINDOW) for _ in texts]
    with torch.inference_mode():
        for spans in cuts:
            ids = torch.cat([text[begin:end] for text, (begin, end) in zip(texts, spans, strict=True)])
            found = made(ids, spans, states).split([end - begin for begin, end in spans])
            for text, (begin, end), own in zip(texts, spans, found, strict=True):
                assert torch.allclose(own, stock(input_ids=text[None, :end]).logits[0, begin:], atol=1e-4)


def test_other_networks_are_left_to_transformers():
    scaled = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0}
    assert small_qwen3(llama(), WINDOW) is None and small_qwen3(network(rope_parameters=scaled), WINDOW) is None
    assert small_qwen3(network(use_sliding_window=True, sliding_window=8, max_window_layers=0), WINDOW) is None
