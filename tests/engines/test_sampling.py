from collections import Counter

import pytest
import torch

from tessy_hf.engines.sampling import Sampler
from tests.engines.contract import request

CPU = torch.device("cpu")
LOGITS = torch.randn(1, 12, generator=torch.Generator().manual_seed(0)) * 2


def draw(requests, logits=LOGITS, *, lengths=None, step=0):
    sampler = Sampler(requests, lengths or [10] * len(requests), CPU)
    return sampler(logits.expand(len(requests), -1), step).tolist()


@pytest.mark.parametrize("top_p", [1.0, 0.7])
def test_tokens_are_distributed_as_temperature_and_nucleus_say(top_p):
    requests = [request(temperature=0.8, seed=seed * 7919, top_p=top_p) for seed in range(10_000)]
    expected = torch.softmax(LOGITS[0] / 0.8, -1)
    order = expected.argsort(descending=True)
    outside = order[expected[order].cumsum(0) - expected[order] >= top_p]
    expected[outside] = 0
    counts = Counter(draw(requests))
    observed = torch.tensor([counts[token] for token in range(12)]) / len(requests)
    assert not observed[outside].any()
    assert (observed - expected / expected.sum()).abs().sum() / 2 < 0.02  # total variation distance


@pytest.mark.parametrize(
    "restrict", [{"top_k": 4}, {"min_p": 0.2}, {"top_k": 8, "min_p": 0.1, "top_p": 0.6}, {"top_k": 50, "top_p": 0.9}]
)
def test_top_k_and_min_p_leave_the_most_probable_tokens_in_their_proportions(restrict):
    requests = [request(temperature=0.8, seed=seed * 7919, **restrict) for seed in range(10_000)]
    expected, order = torch.softmax(LOGITS[0] / 0.8, -1).sort(descending=True)
    expected[restrict.get("top_k", 12) :] = 0
    expected[expected < restrict.get("min_p", 0) * expected[0]] = 0
    expected /= expected.sum()
    expected[expected.cumsum(0) - expected >= restrict.get("top_p", 1.0)] = 0
    counts = Counter(draw(requests))
    observed = torch.tensor([counts[token] for token in order.tolist()]) / len(requests)
    assert not observed[expected == 0].any()
    assert (observed - expected / expected.sum()).abs().sum() / 2 < 0.02


def test_a_penalty_lowers_tokens_of_the_text_and_those_drawn_since():
    logits = torch.tensor([[4.0, 3.0, -1.0, -2.0]])
    sampler = Sampler([request(ids=[0, 2], repetition_penalty=2.0)], [2], CPU)
    assert [int(sampler(logits, step)) for step in range(3)] == [1, 0, 0]  # 3 of 2, 3, -2, -2; then 2 of 2, 1.5, ...


def test_a_restriction_of_one_row_changes_no_other():
    own = [request(ids=[1], temperature=1.5, seed=seed, top_k=3) for seed in range(20)]
    beside = [
        request(ids=[1], temperature=1.5, seed=9, top_p=0.9),
        request(ids=[3], repetition_penalty=3.0),
        request(ids=[2], top_k=7),
    ]
    assert draw([*own, *beside])[:20] == draw(own)


def test_a_small_nucleus_is_the_most_probable_token():
    best = int(LOGITS.argmax())
    assert draw([request(temperature=2.0, seed=seed, top_p=1e-6) for seed in range(50)]) == [best] * 50


def test_a_token_depends_on_seed_and_position_alone():
    own = request(temperature=1.5, seed=5)
    others = [request(temperature=0.0), request(temperature=0.3, top_p=0.5, seed=6)]
    alone = [draw([own], lengths=[10], step=step)[0] for step in range(30)]
    cut = [draw([own], lengths=[10 + step])[0] for step in range(30)]
    beside = [draw([*others, own], lengths=[3, 4, 10], step=step)[2] for step in range(30)]
    assert alone == cut == beside
    assert alone != [draw([request(temperature=1.5, seed=6)], lengths=[10], step=step)[0] for step in range(30)]


def test_greedy_rows_stay_greedy_beside_sampled_ones():
    best = int(LOGITS.argmax())
    drawn = [draw([request(), request(temperature=1.5, seed=seed, top_p=0.9)]) for seed in range(30)]
    assert {greedy for greedy, _ in drawn} == {best} and {sampled for _, sampled in drawn} != {best}
