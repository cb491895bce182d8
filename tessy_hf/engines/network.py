"""Load a causal language model of `transformers`, and refuse one whose rows would depend on each other.

In: a model's name and options. Out: the network on its device, its context length, and a cache with one token, which
shows what the model keeps of a text. Knows no rows, requests or event loop.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from tessy_hf.engines.forward import forward, takes
from tessy_hf.errors import EngineDeadError, SettingsError

LAYER_TYPES = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
"""Types of layers whose whole state is a key and a value per token, so that a row can be rolled back."""

PACKAGES = "torchao, compressed-tensors, bitsandbytes, optimum-quanto, gptqmodel (GPTQ and AWQ), gguf"
"""What transformers needs to load quantized checkpoints, by the names on PyPI."""


def load(model: str, revision: str | None, dtype: str, device: str, options: Mapping[str, Any]) -> PreTrainedModel:
    """Load a model from safetensors or GGUF, and never code that comes with it.

    Raises:
        EngineDeadError: It cannot be loaded, or lacks weights, which transformers would draw at random.
        SettingsError: Its quantization makes a row depend on the rows beside it.
    """
    try:
        network, found = AutoModelForCausalLM.from_pretrained(
            model, revision=revision, dtype=dtype, use_safetensors=True, output_loading_info=True, **options
        )
        if "device_map" not in options and network.device.type != torch.device(device).type:
            network = network.to(device)  # some quantized ones are there already, and refuse to be moved
    except ImportError as error:
        raise EngineDeadError(
            f"The model {model!r} needs a package that is not installed: {str(error).rstrip('.')}. Install it with "
            f"pip; packages of quantized checkpoints: {PACKAGES}."
        ) from error
    except (AttributeError, NotImplementedError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise EngineDeadError(
            f"The model {model!r} could not be loaded: {str(error).rstrip('.')}. A Hub id or a folder with "
            "config.json and safetensors (or a gguf_file) is expected, and options of "
            "AutoModelForCausalLM.from_pretrained; check the name, and HF_TOKEN for gated models."
        ) from error
    if missing := [*found["missing_keys"], *found["mismatched_keys"]]:
        raise EngineDeadError(
            f"The files of {model!r} lack {len(missing)} weights of {type(network).__name__}, such as {missing[0]}; "
            "transformers would draw them at random. A whole checkpoint of this architecture is expected, in a "
            "quantization that this transformers knows; download it again, update transformers, or serve the model "
            "with vLLM (ServerEngine)."
        )
    quantization: Any = getattr(network.config, "quantization_config", None)
    if getattr(quantization, "load_in_8bit", False) and quantization.llm_int8_threshold:
        raise SettingsError(
            f"{model!r} is quantized by LLM.int8 with llm_int8_threshold={quantization.llm_int8_threshold}: which "
            "features are outliers is decided for a whole batch, so a row would depend on the rows beside it. "
            "llm_int8_threshold=0.0 is expected in its BitsAndBytesConfig, or another quantization."
        )
    return network.eval()


def row_length(network: PreTrainedModel, asked: int | None) -> int:
    """Return the context length: what is asked for, or what the model's config says.

    It is limited where rotary frequencies of a whole batch change once one row passes a length (``longrope``,
    ``dynamic``): beyond it a row would depend on the rows beside it.

    Raises:
        SettingsError: More are asked for.
    """
    config = network.config.get_text_config()
    length = int(getattr(config, "max_position_embeddings", None) or 1 << 30)
    steady = min((_steady_length(rope, length) for rope in _rope_parameters(config)), default=asked or length)
    if asked is not None and asked > steady:
        raise SettingsError(
            f"context_length is {asked}, but {network.name_or_path!r} changes its rotary frequencies for all rows of "
            f"a batch once one passes {steady} tokens. At most {steady} is expected. Leave context_length out, or "
            "serve the model with vLLM (ServerEngine, VLLMEngine)."
        )
    return asked if asked is not None else min(length, steady)


def _rope_parameters(config: Any) -> list[dict[str, Any]]:
    """Return the rotary parameters of a config, one set or one for each type of layer."""
    given = getattr(config, "rope_parameters", None) or {}
    return [given, *(value for value in given.values() if isinstance(value, dict))]


def _steady_length(rope: dict[str, Any], length: int) -> int:
    """Return the longest row for which frequencies do not depend on the batch."""
    if rope.get("rope_type") == "longrope":
        return int(rope.get("original_max_position_embeddings") or length)
    return length if rope.get("rope_type") == "dynamic" else 1 << 30


def sample_cache(network: PreTrainedModel) -> Any:
    """Read one token, and return the cache with its keys and values in all layers.

    Raises:
        SettingsError: The model keeps other state than a key and a value per token: linear attention, state space,
            sparse attention with an indexer.
    """
    types = set(getattr(network.config.get_text_config(), "layer_types", None) or ()) - LAYER_TYPES
    if types:
        raise _refused(network, f"has layers of type {', '.join(sorted(map(repr, types)))}")
    if not takes(type(network), "position_ids"):
        raise _refused(network, "takes no position_ids")
    cache, zero = DynamicCache(), torch.zeros((1, 1), dtype=torch.long, device=network.device)
    try:
        with torch.inference_mode():
            forward(network, zero, cache, attention_mask=zero + 1, position_ids=zero, logits_to_keep=1)
    except (AttributeError, LookupError, NotImplementedError, TypeError, ValueError) as error:
        raise _refused(network, f"cannot read a token with a cache of keys and values: {error!r}") from error
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    if not tensors or any(tensor is None or tensor.ndim != 4 or tensor.shape[2] != 1 for tensor in tensors):
        raise _refused(network, "does not keep a key and a value per token in each layer")
    if len({(tensor.device, tensor.dtype) for tensor in tensors}) > 1:
        raise _refused(network, "keeps keys and values on several devices or in several precisions")
    return cache


def _refused(network: PreTrainedModel, seen: str) -> SettingsError:
    return SettingsError(
        f"{network.name_or_path!r} ({type(network).__name__}) {seen}. TransformersEngine expects attention layers "
        "that keep a key and a value per token, on one device, and nothing else: only those can be rolled back to a "
        "boundary and read beside other rows. Serve this model with vLLM: ServerEngine or VLLMEngine."
    )
