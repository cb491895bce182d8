"""Turn marked segments into training batches: segments go in; token ids, labels and loss weights come out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from random import Random
from typing import Any, Literal, NamedTuple

import numpy as np

from tessy_hf.boundary_training.segments import UNKNOWN, Segment, span_starts, token_kinds, word_kinds
from tessy_hf.text.vocabulary import Vocabulary, owners, words

IGNORED = -100
"""The label of a token that is left out of the loss."""


def cut(segment: Segment, vocabulary: Vocabulary, window: int) -> list[Segment]:
    """Cut a segment into pieces of whole words, each of at most ``window`` tokens or of a single longer word."""
    pieces: list[Segment] = []
    start = 0
    while True:
        rest = segment.part(start) if start else segment
        offsets, ends = vocabulary.encode(rest.text).offsets, [end for _, end in words(rest.text)]
        if len(offsets) <= window or len(ends) <= 1:
            return [*pieces, rest] if ends else pieces
        last = offsets[window][0]  # a character may have several tokens
        end = max((end for end in ends if end <= last), default=ends[0])
        pieces.append(rest.part(0, end))
        start += end


def aligned_copies(segments: Sequence[Segment], copies: int, seed: int) -> list[Segment]:
    """Return parts of the segments that begin at span starts, at most ``copies`` of each segment."""
    drawn = []
    for segment in segments:
        starts = span_starts(segment)
        random = Random(f"{seed} {segment.key} {segment.text}")
        drawn += [segment.part(start) for start in random.sample(starts, min(copies, len(starts)))]
    return drawn


class Example(NamedTuple):
    """One segment as the network sees it.

    Attributes:
        ids: Token ids.
        labels: The label of each id: 1 for style, 0 for capability, or :data:`IGNORED`.
        weight: The segment's weight in the loss.
    """

    ids: list[int]
    labels: list[int]
    weight: float


def encode(segment: Segment, vocabulary: Vocabulary, label_shift: int, lookahead: int = 0, end_id: int = 0) -> Example:
    """Turn a segment's character spans into token labels.

    Args:
        segment: The segment.
        vocabulary: The tokenizer.
        label_shift: 0 to label a token itself, 1 to label the token before it.
        lookahead: Label a word at the tokens of the word so many words beyond, and at end tokens after the last one.
        end_id: The end token.
    """
    ids, offsets = vocabulary.encode(segment.text)
    kinds = [IGNORED if kind == UNKNOWN else int(kind) for kind in token_kinds(segment, offsets)]
    labels = kinds[label_shift:] + [IGNORED] * min(label_shift, len(kinds))
    if lookahead:
        words_before = [IGNORED] * lookahead + [int(kind) for kind in word_kinds(segment)]
        own = owners(offsets, [end for _, end in words(segment.text)])
        beyond = [IGNORED if kind == IGNORED else words_before[word] for kind, word in zip(kinds, own, strict=True)]
        ids, labels = [*ids, *[end_id] * lookahead], [*beyond, *words_before[-lookahead:]]
    return Example(ids, labels, segment.weight)


def collate(examples: Sequence[Example], style_weight: float) -> dict[str, Any]:
    """Pad examples to one batch of tensors of shape (examples, tokens), with each token's weight in the loss."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    def padded(rows: Iterable[Any], value: float = 0) -> Any:
        return pad_sequence([torch.as_tensor(row) for row in rows], batch_first=True, padding_value=value)

    labels = padded((example.labels for example in examples), IGNORED)
    kinds = torch.tensor([1.0, style_weight, 0.0])[labels.clamp(min=-1)]  # the last one is that of IGNORED
    return {
        "input_ids": padded(example.ids for example in examples),
        "attention_mask": padded(np.ones(len(example.ids), dtype=np.int64) for example in examples),
        "labels": labels,
        "token_weights": kinds * torch.tensor([[example.weight] for example in examples]),
    }


def weight_of_style(examples: Sequence[Example], asked: float | Literal["balanced"]) -> float:
    """Return the weight of a style token relative to a capability token."""
    if asked != "balanced":
        return asked
    labels = np.concatenate([example.labels for example in examples])
    return float((labels == 0).sum() / max(1, (labels == 1).sum()))
