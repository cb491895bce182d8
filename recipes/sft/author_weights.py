"""Loss weights by author: rows with spans go in, tokens with weights come out, and the trainer that heeds them.

Who wrote what is known exactly in a tessy row, so the loss of the student's own style, of the teacher's capability and
of the answer can be weighted apart (the paper's equation 2 splits the loss like this, but trains with equal weights).
An experiment: nobody has published what it does to a reasoning model. Knows nothing of where rows come from.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from trl import SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl.trainer.utils import pad

from tessy_hf.errors import DatasetError, SettingsError, TemplateError
from tessy_hf.rows.columns import pieces, thinking_key
from tessy_hf.text.vocabulary import owners


@dataclass(frozen=True)
class Weights:
    """What a token's loss counts, by what the token is. They are scaled so that the mean over all tokens is one."""

    style: float = 1.0
    """The student's spans of the thinking."""
    capability: float = 1.0
    """The teacher's spans of the thinking."""
    answer: float = 1.0
    """The answer, whoever wrote it, with the end of the turn."""

    def __post_init__(self):
        given = (self.style, self.capability, self.answer)
        if not all(0 <= weight < float("inf") for weight in given) or not any(given):
            raise SettingsError(
                f"The weights are {given}. Numbers of at least 0 are expected, not all of them 0; 1.0 is plain."
            )

    def of(self, span):
        """Return the weight of a span."""
        if span["part"] == "answer":
            return self.answer
        return self.style if span["author"] == "student" else self.capability


def tokenize(row, *, tokenizer, template, weights, max_length):
    """Return a row's ``input_ids``, ``labels`` (-100 outside the assistant's turns) and ``loss_weights``.

    A token belongs to the span it ends in, as in the row's own token counts; what follows the last span, the end of
    the turn, belongs to that one. Earlier turns of the assistant count 1.

    Raises:
        DatasetError: The row has no spans.
        TemplateError: The template changes the text that the spans are of.
    """
    chat = {"conversation": row["messages"], "chat_template": template}
    text = tokenizer.apply_chat_template(**chat, tokenize=False)
    tokens = tokenizer.apply_chat_template(
        **chat, return_dict=True, return_assistant_tokens_mask=True, tokenizer_kwargs={"return_offsets_mapping": True}
    )
    start, ends = locate(row, text)
    values = [1.0, *(weights.of(span) for span in row["spans"])]
    places = owners(tokens["offset_mapping"], [start, *ends])
    pairs = zip(tokens["input_ids"], tokens["assistant_masks"], strict=True)
    return {
        "input_ids": tokens["input_ids"][:max_length],
        "labels": [token if trained else -100 for token, trained in pairs][:max_length],
        "loss_weights": [values[min(place, len(ends))] for place in places][:max_length],
    }


def locate(row, text):
    """Return the index at which the assistant's text starts in the rendered chat, and the end of each span in it.

    A template may only add or remove whitespace at the ends of spans, such as around the thinking.
    """
    cut = pieces(row)
    texts = [(piece.before + piece.text + piece.after).strip() for piece in cut]
    if not texts:
        raise DatasetError(
            "A row has no spans that cover its text, so its authors are unknown. Train on unedited rows that ended "
            "with 'stop'."
        )
    start = at = max(text.rfind(texts[0]), 0)
    keyed = thinking_key([key for key, value in row["messages"][-1].items() if value is not None]) is not None
    ends = []
    for number, piece in enumerate(texts):
        found = text.find(piece, at)
        marked = (
            keyed and number and cut[number].part != cut[number - 1].part
        )  # by the template, not in the row's text
        if found < 0 or (text[at:found].strip() and not marked):
            raise TemplateError(
                f"The chat template changes the assistant's text: expected {piece[:60]!r}, found "
                f"{text[at : at + 60]!r}. Pass a chat_template that keeps the whole content."
            )
        at = found + len(piece)
        ends.append(at)
    return start, ends


def weigh(rows, tokenizer, template, weights, max_length=None):
    """Tokenize a dataset with weights, and return it with the number that scales their mean to one."""
    told = {"tokenizer": tokenizer, "template": template, "weights": weights, "max_length": max_length}
    tokens = rows.map(partial(tokenize, **told), remove_columns=rows.column_names)
    count = total = 0.0
    for row in tokens.with_format("numpy"):
        trained = row["labels"] != -100
        count, total = count + np.sum(trained), total + np.sum(row["loss_weights"][trained])
    if not total:
        raise SettingsError(f"No token of {len(rows)} rows has a weight: {weights}. Give one of their kinds a weight.")
    return tokens, float(count / total)


@dataclass
class AuthorWeightedCollator(DataCollatorForLanguageModeling):
    """TRL's collator, with the tokens' weights."""

    scale: float = 1.0

    def torch_call(self, examples):
        """Pad weights as tokens are padded."""
        weights = [self.scale * torch.tensor(example["loss_weights"]) for example in examples]
        multiple = {"pad_to_multiple_of": self.pad_to_multiple_of}
        return {
            **super().torch_call(examples),
            "loss_weights": pad(weights, padding_value=0.0, padding_side="right", **multiple),
        }


class AuthorWeightedTrainer(SFTTrainer):
    """TRL's trainer, with each token's log-probability multiplied by its weight; all else is TRL's."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Compute TRL's loss over weighted log-probabilities (``log_probs`` of TRL's fused head, one label on)."""
        weights = inputs.pop("loss_weights")[:, 1:]

        def weighted(**given):
            outputs = model(**given)
            if given.get("fused_lm_head"):
                outputs.log_probs = outputs.log_probs * weights
            return outputs

        return super().compute_loss(weighted, inputs, return_outputs, num_items_in_batch)
