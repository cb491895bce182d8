"""What masks of padding cost `TransformersEngine`: decoding rows of unequal length against rows of equal length.

Both batches have as many columns, and nothing else differs: of equal rows no mask is built. Prints one JSON object
with the ratio of CPU times, masks over none, of pairs in one run: ``python benchmarks/masks.py``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel

from tessy_hf.engines.forward import forward

SHAPE = {
    "vocab_size": 1024, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 32, "pad_token_id": 0,
}  # fmt: skip
KINDS = {
    "full attention": ("qwen3", {}),
    "sliding windows": (
        "gemma3_text",
        {"sliding_window": 128, "layer_types": ["sliding_attention", "full_attention"] * 2},
    ),
}


@torch.inference_mode()
def decode(network: PreTrainedModel, rows: int, length: int, steps: int, padding: int) -> float:
    """Return the CPU seconds of so many steps after a prompt, where one row lacks ``padding`` ids at its left."""
    cache, mask = DynamicCache(), torch.ones((rows, length), dtype=torch.long)
    mask[0, :padding] = 0
    ids = torch.randint(3, 1024, (rows, length), generator=torch.Generator().manual_seed(0))
    begun = 0.0
    for step in range(steps + 1):
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        given = mask if padding else None
        logits, _ = forward(network, ids, cache, attention_mask=given, position_ids=positions, logits_to_keep=1)
        ids, mask = logits[:, -1:].argmax(-1), torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        begun = begun if step else time.process_time()  # the prompt is read, and not counted
    return time.process_time() - begun


def main() -> None:
    """Print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    torch.manual_seed(0)
    found: dict[str, list[float]] = {}
    for name, (kind, options) in KINDS.items():
        network = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SHAPE, **options)).eval()
        times = [
            [decode(network, given.rows, given.length, given.steps, padding) for padding in (1, 0)]
            for _ in range(given.repeats)
        ]
        ratios = sorted(masked / plain for masked, plain in times)
        found[name] = [round(each, 2) for each in (statistics.median(ratios), ratios[0], ratios[-1])]
    print(json.dumps({"rows": given.rows, "length": given.length, "with_masks_over_without": found}))


if __name__ == "__main__":
    main()
