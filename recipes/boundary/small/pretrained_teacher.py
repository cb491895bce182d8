"""A second teacher: the lower layers of a pretrained language model, the upper ones of them made to read both ways.

Marked segments go in, then texts; the probability that each word is style comes out. The lowest layers stay as they
are and read forwards only, so what they say of a segment is computed once.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import torch
from network import by_length, padded
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence
from transformers import AutoModel, AutoTokenizer

from tessy_hf.boundary_training.segments import UNKNOWN, Segment, token_kinds
from tessy_hf.text.vocabulary import Vocabulary, owners, words

log = logging.getLogger("small")

FROZEN, TRAINED, EPOCHS = 8, 4, 3


class PretrainedTeacher(nn.Module):
    """The first ``FROZEN + TRAINED`` layers of a decoder under a recurrent layer."""

    def __init__(self, pretrained: str) -> None:
        super().__init__()
        body = AutoModel.from_pretrained(pretrained, dtype=torch.float32, num_hidden_layers=FROZEN + TRAINED)
        self.vocabulary = Vocabulary(AutoTokenizer.from_pretrained(pretrained), pretrained)
        self.embed, self.positions = body.embed_tokens.bfloat16().requires_grad_(False), body.rotary_emb
        self.lower, self.upper = body.layers[:FROZEN].bfloat16().requires_grad_(False), body.layers[FROZEN:]
        width = body.config.hidden_size
        self.norm, self.both = nn.RMSNorm(width), nn.GRU(width, 96, bidirectional=True, batch_first=True)
        self.out, self.dropout = nn.Linear(2 * 96 + width, 2), nn.Dropout(0.15)

    @torch.no_grad()
    def read(self, ids: Tensor) -> Tensor:
        """Return what the frozen layers make of token ids."""
        hidden = self.embed(ids)
        return self._through(self.lower, hidden, None)

    def forward(self, hidden: Tensor, lengths: Tensor) -> Tensor:
        """Return logits of shape (texts, tokens, 2)."""
        count = hidden.shape[1]
        real = torch.arange(count) < lengths[:, None]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = self._through(self.upper, hidden.float(), real[:, None, None, :].expand(-1, 1, count, -1))
        hidden = self.dropout(self.norm(hidden.float()))
        packed = pack_padded_sequence(hidden, lengths, batch_first=True, enforce_sorted=False)
        read, _ = pad_packed_sequence(self.both(packed)[0], batch_first=True, total_length=count)
        return self.out(torch.cat([self.dropout(read), hidden], dim=-1))

    def _through(self, layers: nn.ModuleList, hidden: Tensor, mask: Tensor | None) -> Tensor:
        positions = self.positions(hidden, torch.arange(hidden.shape[1])[None])
        for layer in layers:
            hidden = layer(hidden, attention_mask=mask, position_embeddings=positions)
        return hidden

    def fit(self, segments: Sequence[Segment], random: np.random.Generator, size: int = 16) -> PretrainedTeacher:
        """Learn from marked segments."""
        encodings = [self.vocabulary.encode(segment.text) for segment in segments]
        kinds = [
            torch.tensor(token_kinds(s, e.offsets), dtype=torch.int64)
            for s, e in zip(segments, encodings, strict=True)
        ]
        lower = self._read_all([encoding.ids for encoding in encodings])
        heads = [*self.norm.parameters(), *self.both.parameters(), *self.out.parameters()]
        parts = [{"params": self.upper.parameters(), "lr": 1.5e-4}, {"params": heads, "lr": 1.5e-3}]
        optimizer = torch.optim.AdamW(parts, betas=(0.9, 0.98), weight_decay=0.01)
        steps = EPOCHS * -(-len(segments) // size)
        pace = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(1.0, (step + 1) / (0.08 * steps)) * max(0.02, 1 - step / steps)
        )
        for epoch in range(EPOCHS):
            self.train()
            losses = []
            for batch in by_length([len(one) for one in kinds], size, random):
                hidden = pad_sequence([lower[i] for i in batch], batch_first=True)
                told = pad_sequence([kinds[i] for i in batch], batch_first=True, padding_value=UNKNOWN)
                seen = torch.rand(told.shape)[..., None] > 0.05
                odds = self(hidden * seen, torch.tensor([len(kinds[i]) for i in batch]))
                loss = functional.cross_entropy(odds.flatten(0, 1), told.flatten(), ignore_index=UNKNOWN)
                loss.backward()
                torch.nn.utils.clip_grad_norm_([p for part in parts for p in part["params"]], 1.0)
                optimizer.step()
                pace.step()
                optimizer.zero_grad()
                losses.append(loss.item())
            log.info("pretrained teacher, epoch %d: loss %.4f", epoch + 1, np.mean(losses))
        return self.eval()

    def _read_all(self, texts: Sequence[Sequence[int]], size: int = 32) -> list[Tensor]:
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        found: dict[int, Tensor] = {}
        for begin in range(0, len(order), size):
            batch = order[begin : begin + size]
            hidden = self.read(padded([np.array(texts[i]) for i in batch])[0])
            found |= {i: hidden[row, : len(texts[i])].clone() for row, i in enumerate(batch)}
        return [found[i] for i in range(len(texts))]

    def tokens(self, texts: Sequence[Sequence[int]], window: int = 192, margin: int = 24) -> list[np.ndarray]:
        """Return the probability of each token of texts, read in overlapping windows."""
        cuts = []
        for text, ids in enumerate(texts):
            last = max(0, len(ids) - 2 * margin - 1)
            cuts += [(text, start) for start in range(0, last + 1, window - 2 * margin)]
        said = [np.zeros(len(ids), dtype=np.float32) for ids in texts]
        with torch.inference_mode():
            for begin in range(0, len(cuts), 32):
                batch = cuts[begin : begin + 32]
                ids, lengths = padded([np.array(texts[text][start : start + window]) for text, start in batch])
                style = self(self.read(ids), lengths).softmax(-1)[..., 1].numpy()
                for row, (text, start) in enumerate(batch):
                    first = margin if start else 0
                    said[text][start + first : start + window] = style[row, first : lengths[row]]
        return said

    def judge(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the probability of each word of texts: the mean of its tokens."""
        encodings = [self.vocabulary.encode(text) for text in texts]
        return [
            _by_word(text, encoding.offsets, style)
            for text, encoding, style in zip(texts, encodings, self.tokens([e.ids for e in encodings]), strict=True)
        ]


def _by_word(text: str, offsets: Sequence[tuple[int, int]], style: np.ndarray) -> np.ndarray:
    ends = [end for _, end in words(text)]
    own = np.minimum(owners(offsets, ends), len(ends) - 1)
    written = np.array([not text[start:end].isspace() for start, end in offsets])
    count = np.bincount(own[written], minlength=len(ends))
    return np.bincount(own[written], style[written], len(ends)) / np.maximum(1, count)
