"""The networks of the small predictor's recipe and how they learn: token ids and soft labels in, weights out.

Knows nothing of files, problems or held-out segments.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3Model

from tessy_hf.boundary_training.readings import first_tokens
from tessy_hf.boundary_training.segments import Segment, span_starts, word_kinds
from tessy_hf.text.vocabulary import Vocabulary, owners, words

log = logging.getLogger("small")

WIDTH = 160
WINDOW = 128  # tokens the predictor reads at most, and the length of a training sequence
LOOKAHEADS = (0, 1, 2, 4)  # each has a head of its own, trained together; one of them is shipped
END = 0  # the token that ends a text


# --- the language model


def train_language_model(
    encoded: Sequence[Sequence[int]],
    passes: Sequence[float],
    embeddings: Tensor,
    steps: int,
    seed: int,
    batch: int = 24,
    rate: float = 5e-3,
) -> Qwen3ForCausalLM:
    """Train a causal language model; the learning rate falls to nothing over the second half.

    Args:
        encoded: Texts as token ids.
        passes: How often each text comes in an epoch.
        embeddings: The token embeddings to begin with, of shape (vocabulary, :data:`WIDTH`).
        steps: Training steps.
        seed: Of the weights and the order.
        batch: Sequences in a step.
        rate: Peak learning rate.
    """
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(embeddings),
        hidden_size=WIDTH,
        num_hidden_layers=4,
        intermediate_size=432,
        num_attention_heads=5,
        num_key_value_heads=5,
        head_dim=32,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=END,
    )
    network = Qwen3ForCausalLM(config)
    with torch.no_grad():
        network.model.embed_tokens.weight.copy_(embeddings)
    matrices = [p for n, p in network.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in network.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers = [
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw", ns_steps=4),
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    blocks = _blocks(encoded, passes, np.random.default_rng(seed))
    begun = time.monotonic()
    for step in range(steps):
        pace = min(1.0, (step + 1) / 60) * (1 if 2 * step < steps else 0.03 + 0.97 * 2 * (1 - step / steps))
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = rate * pace
        ids = torch.from_numpy(np.stack([next(blocks) for _ in range(batch)]))
        logits = network(input_ids=ids[:, :-1], use_cache=False).logits
        loss = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if (step + 1) % 50 == 0:
            log.info("language model, step %d: loss %.3f, %.0f s", step + 1, loss.item(), time.monotonic() - begun)
    return network


def _blocks(
    encoded: Sequence[Sequence[int]], passes: Sequence[float], random: np.random.Generator
) -> Iterator[np.ndarray]:
    """Yield blocks of ``WINDOW`` tokens without end, cut at random from the texts laid end to end."""
    laid: list[int] = []
    while True:
        for i in random.permutation(len(encoded)):
            for _ in range(int(passes[i]) + (random.random() < passes[i] % 1)):
                laid += [*encoded[i], END]
            if len(laid) >= 200_000:
                cut = np.array(laid[int(random.integers(WINDOW)) :])
                whole = len(cut) // WINDOW
                yield from cut[: whole * WINDOW].reshape(whole, WINDOW)[random.permutation(whole)]
                laid = []


# --- what is learnt from


@dataclass(frozen=True)
class Judged:
    """A text as token ids, and how probable it is that each of its words is style.

    Attributes:
        ids: Token ids.
        word: The index of each token's word; -1 for whitespace alone.
        first: Whether a token holds the first letter of its word.
        style: The probability of each word.
        ended: Whether the text ends here, so that end tokens follow.
    """

    ids: np.ndarray
    word: np.ndarray
    first: np.ndarray
    style: np.ndarray
    ended: bool = False

    @classmethod
    def of(cls, text: str, style: Sequence[float], vocabulary: Vocabulary, *, ended: bool = False) -> Judged:
        """Encode a text whose words were judged."""
        ids, offsets = vocabulary.encode(text)
        own = np.array(owners(offsets, [end for _, end in words(text)]))
        own[[text[start:end].isspace() for start, end in offsets]] = -1
        first = np.zeros(len(ids), dtype=bool)
        first[first_tokens(text, offsets)] = True
        return cls(np.array(ids), own, first, np.asarray(style, dtype=np.float32), ended)

    def part(self, start: int, stop: int) -> Judged:
        """Return some of the tokens."""
        return Judged(self.ids[start:stop], self.word[start:stop], self.first[start:stop], self.style)

    def mixed(self, style: np.ndarray) -> Judged:
        """Return the mean with another judgement of the words."""
        return replace(self, style=((self.style + style) / 2).astype(np.float32))

    def sequence(self) -> np.ndarray:
        """Return the ids, with end tokens where the text ends."""
        return np.concatenate([self.ids, np.full(max(LOOKAHEADS) if self.ended else 0, END)])

    def targets(self) -> np.ndarray:
        """Return the probability to be learnt at each token by each head; not a number where there is none."""
        word, first = self.word, self.first
        if self.ended:
            beyond = np.arange(max(LOOKAHEADS))
            word = np.concatenate([word, len(self.style) + beyond])
            first = np.concatenate([first, beyond >= 0])
        begin = min(word[word >= 0], default=0)
        told = np.full((len(word), len(LOOKAHEADS)), np.nan, dtype=np.float32)
        for head, ahead in enumerate(LOOKAHEADS):
            about = word - ahead
            known = (word >= 0) & (about >= begin) & (about < len(self.style)) & (first | (ahead == 0))
            told[known, head] = self.style[about[known]]
        return told


def marked(segment: Segment, vocabulary: Vocabulary, random: np.random.Generator | None = None) -> Judged:
    """Encode a marked segment; one in five begins at a span start, and one in five at any word, where drawn."""
    chance = 1.0 if random is None else random.random()
    if random is not None and chance < 0.4:
        places = [start for start, _ in words(segment.text)][:-8]
        starts = [0, *span_starts(segment)] if chance < 0.2 else [p + 1 for p in places[1:]]
        segment = segment.part(max(0, int(random.choice(starts or [0])) - int(random.integers(2))))
    return Judged.of(segment.text, [float(kind) for kind in word_kinds(segment)], vocabulary, ended=True)


def windows(judged: Sequence[Judged], random: np.random.Generator) -> list[Judged]:
    """Cut judged traces into windows, elsewhere in each epoch."""
    found = []
    for trace in judged:
        first = -int(random.integers(WINDOW)) if len(trace.ids) > WINDOW else 0
        parts = (trace.part(max(0, start), start + WINDOW) for start in range(first, len(trace.ids), WINDOW))
        found += [part for part in parts if len(part.ids) >= 8]
    return found


# --- student and teacher


class Student(nn.Module):
    """The language model's body under one linear layer for each look-ahead: what is shipped, with one of them."""

    def __init__(self, base: Path) -> None:
        super().__init__()
        self.body = Qwen3Model.from_pretrained(base)
        self.head = nn.Linear(self.body.config.hidden_size, 2 * len(LOOKAHEADS))
        self.dropout = nn.Dropout(0.1)

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """Return logits of shape (texts, tokens, heads, 2); each looks back only."""
        hidden = self.body(input_ids=ids, use_cache=False).last_hidden_state
        return self.head(self.dropout(hidden)).unflatten(-1, (-1, 2))


class Teacher(nn.Module):
    """A body under a recurrent layer that reads both ways; its one head is about a token's own word."""

    def __init__(self, body: Qwen3Model) -> None:
        super().__init__()
        self.body = copy.deepcopy(body)
        width = self.body.config.hidden_size
        self.both = nn.GRU(width, 96, bidirectional=True, batch_first=True)
        self.out = nn.Linear(2 * 96 + width, 2)
        self.head = nn.ModuleList([self.both, self.out])
        self.dropout = nn.Dropout(0.25)

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """Return logits of shape (texts, tokens, 1, 2) that know what follows."""
        hidden = self.dropout(self.body(input_ids=ids, use_cache=False).last_hidden_state)
        packed = nn.utils.rnn.pack_padded_sequence(hidden, lengths, batch_first=True, enforce_sorted=False)
        read, _ = nn.utils.rnn.pad_packed_sequence(self.both(packed)[0], batch_first=True, total_length=ids.shape[1])
        return self.out(torch.cat([self.dropout(read), hidden], dim=-1)).unsqueeze(2)


@dataclass(frozen=True)
class Stretch:
    """One stretch of a network's training, at a rate that rises shortly and falls to nearly nothing.

    Attributes:
        epochs: Passes over everything.
        rate: Peak learning rate.
        head_rate: That of the layers on top of the language model.
        copies: How often a marked segment comes in an epoch.
        batch: Segments and windows a step.
        hidden: Share of the tokens that are replaced by others.
    """

    epochs: int
    rate: float
    head_rate: float
    copies: int = 1
    batch: int = 16
    hidden: float = 0.03


def train(
    network: Student | Teacher,
    stretch: Stretch,
    segments: Sequence[Segment],
    judged: Sequence[Judged],
    vocabulary: Vocabulary,
    random: np.random.Generator,
) -> None:
    """Train a network for one stretch on marked segments and judged traces."""
    network.train()
    copies = [segment for segment in segments for _ in range(stretch.copies)]
    heads = {"params": network.head.parameters(), "lr": stretch.head_rate}
    bodies = {"params": network.body.parameters(), "lr": stretch.rate}
    optimizer = torch.optim.AdamW([bodies, heads], betas=(0.9, 0.98), weight_decay=0.01)
    steps = stretch.epochs * -(-(len(copies) + len(windows(judged, random))) // stretch.batch)
    pace = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / (0.05 * steps)) * max(0.02, 1 - step / steps)
    )
    for epoch in range(stretch.epochs):
        examples = [*(marked(segment, vocabulary, random) for segment in copies), *windows(judged, random)]
        losses = []
        for batch in by_length([len(example.ids) for example in examples], stretch.batch, random):
            losses.append(_learn(network, [examples[i] for i in batch], stretch.hidden))
            optimizer.step()
            pace.step()
            optimizer.zero_grad()
        log.info("%s, epoch %d: loss %.4f", type(network).__name__, epoch + 1, np.mean(losses))
    network.eval()


def _learn(network: Student | Teacher, batch: Sequence[Judged], hidden: float) -> float:
    """Take the gradient of the cross-entropy with the probabilities."""
    ids, lengths = padded([example.sequence() for example in batch])
    other = torch.randint_like(ids, network.body.config.vocab_size)
    odds = network(torch.where(torch.rand(ids.shape) < hidden, other, ids), lengths).log_softmax(-1)
    told = np.full((*ids.shape, len(LOOKAHEADS)), np.nan, dtype=np.float32)
    for row, length in enumerate(lengths.tolist()):
        told[row, :length] = batch[row].targets()
    style = torch.from_numpy(told[..., : odds.shape[2]])
    counts, share = ~style.isnan(), style.nan_to_num()
    losses = -(share * odds[..., 1] + (1 - share) * odds[..., 0])
    loss = losses[counts].mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    return float(loss.item())


def padded(texts: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Pad on the right; return ids and lengths."""
    lengths = torch.tensor([len(text) for text in texts])
    ids = torch.full((len(texts), int(lengths.max())), END, dtype=torch.int64)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = torch.from_numpy(text)
    return ids, lengths


def by_length(lengths: Sequence[int], size: int, random: np.random.Generator) -> Iterator[list[int]]:
    """Yield batches of indices of like length, in random order."""
    order = random.permutation(len(lengths))
    batches = []
    for begin in range(0, len(order), size * 16):
        alike = sorted(order[begin : begin + size * 16], key=lambda i: lengths[i])
        batches += [alike[i : i + size] for i in range(0, len(alike), size)]
    for i in random.permutation(len(batches)):
        yield batches[i]


def judge(teacher: Teacher, texts: Sequence[str], vocabulary: Vocabulary, margin: int = 24) -> list[Judged]:
    """Let the teacher judge texts in overlapping windows; a word gets the mean of its tokens."""
    judged = [Judged.of(text, [0.0] * len(words(text)), vocabulary) for text in texts]
    cuts = []
    for text, trace in enumerate(judged):
        last = max(0, len(trace.ids) - 2 * margin - 1)
        cuts += [(text, start) for start in range(0, last + 1, WINDOW - 2 * margin)]
    said = [np.zeros(len(trace.ids), dtype=np.float32) for trace in judged]
    with torch.inference_mode():
        for begin in range(0, len(cuts), 48):
            batch = cuts[begin : begin + 48]
            ids, lengths = padded([judged[text].ids[start : start + WINDOW] for text, start in batch])
            style = teacher(ids, lengths)[:, :, 0].softmax(-1)[..., 1].numpy()
            for row, (text, start) in enumerate(batch):
                first = margin if start else 0
                said[text][start + first : start + WINDOW] = style[row, first : lengths[row]]
    return [_by_word(trace, style) for trace, style in zip(judged, said, strict=True)]


def _by_word(trace: Judged, style: np.ndarray) -> Judged:
    """Give each word the mean of its tokens."""
    written = trace.word >= 0
    total = np.bincount(trace.word[written], style[written], len(trace.style))
    count = np.bincount(trace.word[written], minlength=len(trace.style))
    return Judged(trace.ids, trace.word, trace.first, (total / np.maximum(1, count)).astype(np.float32))
