"""Train a small base model from plain thinking, for predictors on machines without a pretrained one.

In: JSONL files of traces or segments. Out: a folder with a byte-level BPE and a small causal language model,
the `base` of a recipe for `tessy train-boundary`.

    python recipes/boundary/small/base.py dataset_cards/style-spans/train.jsonl --out output/boundary-base

Predicting the next word teaches most of what a boundary predictor needs to know about a text.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, set_seed

from tessy_hf.errors import DatasetError
from tessy_hf.text.traces import thinking

log = logging.getLogger("base")

END = "<|endoftext|>"
PRE_TOKENS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How text is split before merging: words with the space before them, single digits, runs of signs, line ends."""


@dataclass(frozen=True)
class Shape:
    """The shape of the model, of Qwen3's architecture, and its training."""

    vocabulary: int = 4096
    hidden_size: int = 96
    """Width. ``head_dim`` is 32, the smallest that all engines support."""
    layers: int = 2
    heads: int = 3
    """Attention heads; half as many key-value heads."""
    intermediate_size: int = 256
    steps: int = 150
    """Training steps of the language model; 0 leaves the weights random."""
    batch_size: int = 32
    block: int = 128
    """Tokens of a training sequence."""
    learning_rate: float = 2e-3
    seed: int = 0


def train_base(texts: Iterable[str], folder: Path, shape: Shape) -> Path:
    """Train a base model and return its folder; a model of the same shape that is there already is kept.

    Raises:
        DatasetError: There is not enough text.
    """
    done = folder / "base.json"
    if done.is_file() and json.loads(done.read_text()) == asdict(shape):
        return folder
    corpus = [text for text in texts if text.strip()]
    tokenizer = train_tokenizer(corpus, shape.vocabulary, PRE_TOKENS)
    encoded = tokenizer.backend_tokenizer.encode_batch(corpus, add_special_tokens=False)
    ids = np.concatenate([[*text.ids, tokenizer.eos_token_id] for text in encoded] or [[]]).astype(np.int64)
    if len(ids) <= shape.block:
        raise DatasetError(
            f"The texts for a base model have {len(ids)} tokens. More than {shape.block}, the length of one training "
            "sequence, are needed; pass more thinking."
        )
    network = _train(ids, len(tokenizer), tokenizer.eos_token_id, shape)
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    done.write_text(json.dumps(asdict(shape)) + "\n")
    return folder


def train_tokenizer(texts: Iterable[str], vocabulary: int, pre_tokens: str) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE that never merges across the pieces of the pattern ``pre_tokens``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pre_tokens), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)


def _train(ids: np.ndarray, vocabulary: int, end: int, shape: Shape) -> Qwen3ForCausalLM:
    """Train the language model on random stretches of the texts."""
    set_seed(shape.seed)
    network = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=vocabulary,
            hidden_size=shape.hidden_size,
            intermediate_size=shape.intermediate_size,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=max(1, shape.heads // 2),
            head_dim=32,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            eos_token_id=end,
            pad_token_id=end,
            bos_token_id=None,
        )
    )
    network.to("cuda" if torch.cuda.is_available() else "cpu")
    optimizer = torch.optim.AdamW(network.parameters(), shape.learning_rate, weight_decay=0.05, betas=(0.9, 0.95))
    rise = max(1, shape.steps // 20)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / rise, 0.55 + 0.45 * math.cos(math.pi * step / max(1, shape.steps))),
    )
    random = np.random.default_rng(shape.seed)
    network.train()
    for step in range(shape.steps):
        starts = random.integers(0, len(ids) - shape.block, shape.batch_size)
        batch = torch.from_numpy(np.stack([ids[s : s + shape.block] for s in starts])).to(network.device)
        loss = network(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            log.info("step %d: loss %.3f", step, loss.item())
    return network.cpu()


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("texts", type=Path, nargs="+", help="JSONL files with thinking, or with `text`")
    parser.add_argument("--out", type=Path, default=Path("output/boundary-base"), help="the folder to write")
    for field in fields(Shape):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default)
    given = vars(parser.parse_args())
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    paths, out = given.pop("texts"), given.pop("out")
    rows = (json.loads(line) for path in paths for line in path.read_text("utf-8").split("\n") if line.strip())
    print(train_base((thinking(row) or row.get("text") or "" for row in rows), out, Shape(**given)))


if __name__ == "__main__":
    main()
