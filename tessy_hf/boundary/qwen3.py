"""The forward pass of a Qwen3 token classifier in few calls.

Of small ones, that of `transformers` takes longer in Python than in its matrices (2.7 of 3.5 ms for 8 new tokens).

In: the stock network's weights. Out: the same logits, which is checked when it is made. Knows no windows or labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention, silu

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOLERANCE = 1e-3
"""Most that logits may differ from those of the stock network."""

Weights = dict[str, torch.Tensor]


class Qwen3Classifier:
    """Weights of a ``Qwen3ForTokenClassification``, projections of the same input joined.

    Args:
        network: The stock network, on a CPU in float32, with full attention and plain rotary embeddings.
        longest: Most tokens of a text.
    """

    def __init__(self, network: PreTrainedModel, longest: int) -> None:
        config: Any = network.config
        self._seen = torch.ones((longest, longest), dtype=torch.bool).tril()
        self._size, self._epsilon = config.head_dim, config.rms_norm_eps
        self._heads = config.num_attention_heads, config.num_key_value_heads
        turns = torch.arange(0, self._size, 2, dtype=torch.float32) / self._size
        self._frequencies = 1.0 / config.rope_parameters["rope_theta"] ** turns
        weights = network.state_dict()
        self._embedding, self._norm = weights["model.embed_tokens.weight"], weights["model.norm.weight"]
        self._score = weights["score.weight"], weights.get("score.bias")
        self._layers = [_layer(weights, f"model.layers.{i}.", self._heads) for i in range(config.num_hidden_layers)]

    def room(self, tokens: int) -> torch.Tensor:
        """Return room for the keys and values of one text: (layers, 2, heads, tokens, head size)."""
        return torch.empty((len(self._layers), 2, self._heads[1], tokens, self._size))

    def __call__(
        self, ids: torch.Tensor, spans: Sequence[tuple[int, int]], states: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """Return the logits of new ids, of shape (ids, labels).

        Texts are not padded to one length, and their keys and values are read where they are kept: batches of them
        would be copied for each pass, which takes longer than all else where few ids are new.

        Args:
            ids: The new ids of all texts, one text after the other.
            spans: Where they are in each text: from how many known ids on, and up to where.
            states: The keys and values of each text, from :meth:`room`. Those of new ids are added.
        """
        positions = torch.cat([torch.arange(begin, end) for begin, end in spans])
        angles = (positions[:, None] * self._frequencies).repeat(1, 2)[:, None]
        turn = angles.cos(), angles.sin()
        x = self._embedding[ids]
        for number, layer in enumerate(self._layers):
            own = [state[number] for state in states]
            x = x + self._attention(self._rms(x, layer["input_layernorm"]), layer, spans, own, turn)
            gate, up = linear(self._rms(x, layer["post_attention_layernorm"]), layer["gate_up"]).chunk(2, -1)
            x = x + linear(silu(gate) * up, layer["mlp.down_proj"])
        return linear(self._rms(x, self._norm), *self._score)

    def _attention(
        self, x: torch.Tensor, layer: Weights, spans: Sequence[tuple[int, int]], states: list[torch.Tensor], turn: Any
    ) -> torch.Tensor:
        heads: torch.Tensor = linear(x, layer["qkv"], layer.get("qkv_bias")).view(len(x), -1, self._size)
        qk, v = torch.split(heads, [sum(self._heads), self._heads[1]], 1)
        qk = rms_norm(qk, (self._size,), None, self._epsilon) * layer["qk_norm"]
        first, second = qk.chunk(2, -1)
        q, k = torch.split(qk * turn[0] + torch.cat((-second, first), -1) * turn[1], [*self._heads], 1)
        sizes = [end - begin for begin, end in spans]
        q, kv = q.transpose(0, 1)[None], torch.stack((k, v)).transpose(1, 2)
        read = []
        for (begin, end), state, own, new in zip(
            spans, states, torch.split(q, sizes, 2), torch.split(kv, sizes, 2), strict=True
        ):
            state[:, :, begin:end] = new
            keys, values = state[:, None, :, :end]
            seen = self._seen[begin:end, :end] if end - begin > 1 else None
            read.append(scaled_dot_product_attention(own, keys, values, attn_mask=seen, enable_gqa=True))
        together = torch.cat(read, 2)[0].transpose(0, 1).flatten(1)
        return linear(together, layer["self_attn.o_proj"], layer.get("o_bias"))

    def _rms(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, weight.shape, weight, self._epsilon)


def small_qwen3(network: PreTrainedModel, longest: int) -> Qwen3Classifier | None:
    """Return a classifier of the same logits; ``None`` where the network is another kind, or they differ."""
    config: Any = network.config
    rope = getattr(config, "rope_parameters", None) or {}
    layers = set(getattr(config, "layer_types", None) or [""])
    if config.model_type != "qwen3" or rope.get("rope_type") != "default" or layers != {"full_attention"}:
        return None
    made, ids = Qwen3Classifier(network, longest), torch.arange(min(12, longest)) % config.vocab_size
    with torch.inference_mode():
        own = made(ids, [(0, len(ids))], [made.room(longest)])
        differences = own - network(input_ids=ids[None]).logits[0]
    return made if differences.abs().max() < TOLERANCE else None


def _layer(weights: Weights, prefix: str, heads: tuple[int, int]) -> Weights:
    own = {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}
    layer = {name.removesuffix(".weight"): weight for name, weight in own.items()}
    projections = [f"self_attn.{name}_proj" for name in "qkv"]
    norms = [layer.pop(f"self_attn.{name}_norm").repeat(count, 1) for name, count in zip("qk", heads, strict=True)]
    layer["qk_norm"] = torch.cat(norms)
    layer["qkv"] = torch.cat([layer.pop(name) for name in projections])
    layer["gate_up"] = torch.cat([layer.pop(f"mlp.{name}_proj") for name in ("gate", "up")])
    if f"{projections[0]}.bias" in layer:
        layer["qkv_bias"] = torch.cat([layer.pop(f"{name}.bias") for name in projections])
        layer["o_bias"] = layer.pop("self_attn.o_proj.bias")
    return layer
