import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, XLNetLMHeadModel

from tessy_hf.engines.forward import cache_argument, forward
from tessy_hf.errors import SettingsError

IDS = torch.arange(12).reshape(1, 12)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
    return AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=32, **shape)).eval()


@pytest.mark.parametrize("cache", [None, "own"])
@torch.inference_mode()
def test_a_text_read_in_parts_has_the_logits_of_the_whole(network, cache):
    whole = network(IDS).logits
    first, cache = forward(network, IDS[:, :5], DynamicCache() if cache else None)
    second, _ = forward(network, IDS[:, 5:], cache)
    torch.testing.assert_close(torch.cat([first, second], 1), whole)


class Older:
    """A model with the older name of the cache argument."""

    def forward(self, input_ids, past_key_values=None, use_cache=None):
        raise NotImplementedError


class Newer:
    """A model with the newer name, behind a decorator that accepts both."""

    def forward(self, input_ids, cache=None, **kwargs):
        raise NotImplementedError


def test_the_name_of_the_cache_argument_comes_from_the_signature():
    assert cache_argument(Older) == "past_key_values"
    assert cache_argument(Newer) == "cache"


def test_a_model_without_a_cache_of_keys_and_values_is_refused():
    with pytest.raises(SettingsError, match="XLNetLMHeadModel.*cache of keys and values"):
        cache_argument(XLNetLMHeadModel)
