"""The one call of a causal language model's forward pass: token ids and a cache in, logits and the cache out.

Knows the two names that `transformers` has for the cache argument: `cache`, and `past_key_values` before it. Which one
a model takes is read from its signature, not from a version. Knows nothing of rows, batches or masks.
"""

from __future__ import annotations

import inspect
from functools import cache as memoized
from typing import TYPE_CHECKING, Any

from tessy_hf.errors import SettingsError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

CACHE_ARGUMENTS = ("cache", "past_key_values")
"""Names of the argument that takes keys and values, newest first."""


def takes(model_class: Any, name: str) -> bool:
    """Return whether a model's ``forward`` declares an argument."""
    return name in inspect.signature(model_class.forward).parameters


@memoized
def cache_argument(model_class: Any) -> str:
    """Return the name under which a model takes its cache.

    Raises:
        SettingsError: It takes none, so a text cannot be continued without reading it again.
    """
    for name in CACHE_ARGUMENTS:
        if takes(model_class, name):
            return name
    raise SettingsError(
        f"{model_class.__name__}.forward takes neither of {', '.join(CACHE_ARGUMENTS)}. A causal language model with "
        "a cache of keys and values is expected. Use another model, or serve this one with vLLM (ServerEngine)."
    )


def forward(
    network: PreTrainedModel, input_ids: torch.Tensor, cache: Any = None, **inputs: Any
) -> tuple[torch.Tensor, Any]:
    """Read ids behind those in a cache.

    Args:
        network: A causal language model.
        input_ids: Ids of shape (rows, width).
        cache: A cache of `transformers`, changed in place; ``None`` starts one of the model's own kind.
        **inputs: Further arguments of the model, such as ``attention_mask``.

    Returns:
        Logits of shape (rows, width or ``logits_to_keep``, vocabulary), and the cache.

    Raises:
        SettingsError: The model takes or returns no cache.
    """
    model_class: Any = type(network)
    name = cache_argument(model_class)
    output = network(input_ids=input_ids, use_cache=True, **{name: cache}, **inputs)
    if name not in output:
        raise SettingsError(
            f"{type(network).__name__} returned no cache. A causal language model is expected, this one seems to be "
            "an encoder. Check the model's name."
        )
    return output.logits, output[name]
