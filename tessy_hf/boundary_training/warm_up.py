"""Train a small base model from plain thinking: texts go in, a byte-level BPE and a causal language model come out.

For machines without a pretrained base, or predictors of a few megabytes: predicting the next word teaches most of what
a boundary predictor needs to know about a text.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from tessy_hf.errors import DatasetError

log = logging.getLogger(__name__)

PRE_TOKENS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How text is split before merging: words with the space before them, single digits, runs of signs, line ends."""

END = "<|endoftext|>"


class WarmUp(BaseModel):
    """The shape of a small base model of Qwen3's architecture, and its training."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    vocabulary: int = Field(default=4096, ge=300)
    """Vocabulary size."""
    hidden_size: int = 192
    """Width. ``head_dim`` is 32, the smallest that all engines support."""
    layers: int = 4
    heads: int = 6
    """Attention heads; half as many key-value heads."""
    intermediate_size: int = 512
    steps: int = Field(default=1000, ge=0)
    """Training steps of the language model; 0 leaves the weights random."""
    batch_size: int = 32
    block: int = 128
    """Tokens of a training sequence."""
    learning_rate: float = 2e-3
    seed: int = 0


def warm_up(texts: Iterable[str], out: str | Path, settings: WarmUp | None = None) -> Path:
    """Train a base model.

    Args:
        texts: Plain thinking.
        out: The folder to write. A model with the same settings that is there already is kept.
        settings: Its shape and training.

    Raises:
        DatasetError: There is not enough text.
    """
    settings = settings or WarmUp()
    folder = Path(out)
    done = folder / "warm_up.json"
    if done.is_file() and WarmUp.model_validate_json(done.read_text()) == settings:
        return folder
    corpus = [text for text in texts if text.strip()]
    tokenizer = train_tokenizer(corpus, settings.vocabulary)
    encoded = tokenizer.backend_tokenizer.encode_batch(corpus, add_special_tokens=False)
    ids = np.concatenate([[*text.ids, tokenizer.eos_token_id] for text in encoded] or [[]]).astype(np.int64)
    if len(ids) <= settings.block:
        raise DatasetError(
            f"The texts for a base model have {len(ids)} tokens. More than {settings.block}, the length of one "
            "training sequence, are needed; pass more thinking."
        )
    network = _train(ids, len(tokenizer), tokenizer.eos_token_id, settings)
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    done.write_text(settings.model_dump_json() + "\n")
    return folder


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> Any:
    """Train a byte-level BPE and return it as a fast tokenizer of `transformers`."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKENS), behavior="isolated"),
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


def _train(ids: np.ndarray[Any, Any], vocabulary: int, end: int, settings: WarmUp) -> Any:
    """Train the language model on random stretches of the texts."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM, set_seed

    set_seed(settings.seed)
    network: Any = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=vocabulary,
            hidden_size=settings.hidden_size,
            intermediate_size=settings.intermediate_size,
            num_hidden_layers=settings.layers,
            num_attention_heads=settings.heads,
            num_key_value_heads=max(1, settings.heads // 2),
            head_dim=32,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            eos_token_id=end,
            pad_token_id=end,
            bos_token_id=None,
        )
    )
    network.to("cuda" if torch.cuda.is_available() else "cpu")
    optimizer = torch.optim.AdamW(network.parameters(), settings.learning_rate, weight_decay=0.05, betas=(0.9, 0.95))
    rise = max(1, settings.steps // 20)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / rise, 0.55 + 0.45 * math.cos(math.pi * step / max(1, settings.steps))),
    )
    random = np.random.default_rng(settings.seed)
    network.train()
    for step in range(settings.steps):
        starts = random.integers(0, len(ids) - settings.block, settings.batch_size)
        batch = torch.from_numpy(np.stack([ids[s : s + settings.block] for s in starts])).to(network.device)
        loss = network(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            log.info("warm-up step %d: loss %.3f", step, loss.item())
    return network.cpu()
