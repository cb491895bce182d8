"""One tokenizer, read exactly: text to ids and ids to text, with no special meaning given to model text.

Knows nothing of rows or chat templates. Only tokenizers backed by the ``tokenizers`` library are accepted, because
the seams of :mod:`tessy_hf.transcript` need character offsets.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from tessy_hf.errors import TemplateError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CLAUSE_END = "，。！？；：、"
WORD = re.compile(rf"\s*(?:[^\s{_CLAUSE_END}]+[{_CLAUSE_END}]*|[{_CLAUSE_END}]+)")
"""A word with the whitespace before it. Scripts without spaces are cut after their punctuation instead."""

_FRAGMENT = re.compile(r"(?<=\S)(?= \S)")
"""Where text is taken apart to be encoded piece by piece: before a single space between words."""

LONGEST_FRAGMENT = 32
"""Characters up to which a piece of text is remembered with its ids; longer ones rarely come again."""

_PROBE = 'It\'s 12345 + (6.7)x: "naïve",\n\n  def f(a, b):\n\treturn a[1] != b # 你好 👍 x-y.org/?q=%20\r\n - é'


class Encoding(NamedTuple):
    """Token ids and, for each, its ``(start, end)`` character offsets in the encoded text."""

    ids: list[int]
    offsets: list[tuple[int, int]]


class Vocabulary:
    """Exact encoding and decoding with one tokenizer.

    Args:
        tokenizer: A fast Hugging Face tokenizer.
        name: What to call it in errors.

    Raises:
        TemplateError: The tokenizer has no ``tokenizers`` backend.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
        from tokenizers import Tokenizer

        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise TemplateError(
                f"The tokenizer of {name!r} is a {type(tokenizer).__name__} without a `tokenizers` backend; a fast "
                "tokenizer is needed for character offsets. Convert it once with "
                "AutoTokenizer.from_pretrained(..., use_fast=True).save_pretrained(folder) and use that folder."
            )
        self.tokenizer = tokenizer
        self.name = name
        self._template_backend = backend
        backend.no_truncation()
        backend.no_padding()
        serialized = json.loads(backend.to_str())
        # A post-processor may trim the whitespace off token offsets; here each character belongs to a token.
        serialized["padding"] = serialized["truncation"] = serialized["post_processor"] = None
        # A private copy: here "<|im_end|>" written by a model is text, while chat templates need it to be special.
        self._backend = Tokenizer.from_str(json.dumps(serialized))
        self._backend.encode_special_tokens = True
        self._fragment = lru_cache(maxsize=1 << 15)(self._whole)
        self._piece = cache(lambda token: str(self._backend.decode([token], skip_special_tokens=False)))
        identity = {key: serialized[key] for key in ("model", "added_tokens", "normalizer", "pre_tokenizer")}
        self.fingerprint = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        # Tokenizers that mark word starts (SentencePiece) would add a mark at the start of every fragment.
        self._anchor = "" if all(map(self._continues, (" b", "\nb", "\n\n b"))) else "a"
        self._byte_level = _is_byte_level(serialized) and self._whole(_PROBE) == self._joined(_PROBE)
        marked = [i for i, token in backend.get_added_tokens_decoder().items() if token.special]
        self.special_ids = frozenset(map(int, (*marked, *tokenizer.all_special_ids)))

    def _continues(self, piece: str) -> bool:
        """Return whether a piece has the same ids by itself as after a word."""
        joined, word, alone = (
            self._backend.encode(t, add_special_tokens=False).ids for t in ("a" + piece, "a", piece)
        )
        return bool(joined == word + alone)

    def encode(self, text: str) -> Encoding:
        """Encode model text, never reading special tokens into it.

        A tokenizer's normalizer only helps to find the ids: offsets count characters of ``text`` as it is.
        Exact as a continuation when ``text`` starts at a word: the ids equal that part of the whole text's ids.
        """
        return self._joined(text) if self._byte_level else self._whole(text)

    def _whole(self, text: str) -> Encoding:
        anchor = self._anchor if text[:1].isspace() else ""
        encoded = self._backend.encode(anchor + text, add_special_tokens=False)
        if not anchor:
            return Encoding(encoded.ids, encoded.offsets)
        first = next((i for i, (_, end) in enumerate(encoded.offsets) if end > 1), len(encoded.ids))
        return Encoding(encoded.ids[first:], [(start - 1, end - 1) for start, end in encoded.offsets[first:]])

    def _joined(self, text: str) -> Encoding:
        """Encode text word by word: most words were met before, and short texts are encoded at every turn."""
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        at = 0
        for fragment in _FRAGMENT.split(text):
            own = self._fragment(fragment) if len(fragment) <= LONGEST_FRAGMENT else self._whole(fragment)
            ids += own.ids
            for start, end in own.offsets:  # mostly one
                offsets.append((start + at, end + at))
            at += len(fragment)
        return Encoding(ids, offsets)

    def encode_template(self, text: str) -> list[int]:
        """Encode a rendered chat template: special tokens in it are special."""
        ids: list[int] = self._template_backend.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int], context: Sequence[int] = ()) -> str:
        """Decode ``ids`` as the continuation of the ids in ``context`` (one or a few are enough)."""
        if not len(context):
            return str(self._backend.decode(list(ids), skip_special_tokens=False))
        before = self._backend.decode(list(context), skip_special_tokens=False)
        both = self._backend.decode([*context, *ids], skip_special_tokens=False)
        return str(both[len(before) :])

    def pieces(self, ids: Sequence[int]) -> list[str] | None:
        """Return the text of each id, where each has one whatever stands around it; else ``None``."""
        if not self._byte_level:
            return None
        pieces = [self._piece(i) for i in ids]
        return None if any("\ufffd" in piece for piece in pieces) else pieces

    def token_ends(self, ids: Sequence[int], text: str, context: Sequence[int] = ()) -> list[int]:
        """Return, for each token, where its text ends in ``text``, the decoded ``ids``."""
        encoded = self.encode(text)
        if encoded.ids == list(ids):
            return [end for _, end in encoded.offsets]
        # Ids a model sampled need not be the tokenizer's own choice for the text: measure them one by one.
        ends = [len(self.decode(ids[: i + 1], context)) for i in range(len(ids))]
        return [min(end, len(text)) for end in ends]

    def token_id(self, token: str) -> int | None:
        """Return the id of ``token`` where it is one token of the vocabulary, else ``None``."""
        found = self._backend.token_to_id(token)
        return None if found is None else int(found)

    def chat_text(self, messages: Sequence[Any], **options: Any) -> str:
        """Render ``messages`` through the tokenizer's chat template as text."""
        return str(self.tokenizer.apply_chat_template(list(messages), tokenize=False, **options))


def words(text: str) -> list[tuple[int, int]]:
    """Return the ``(start, end)`` of each word of ``text``, leading whitespace included, trailing excluded."""
    return [match.span() for match in WORD.finditer(text)]


def _is_byte_level(serialized: dict[str, Any]) -> bool:
    """Return whether this is byte-level BPE in which no token can have letters on both sides of a space.

    Words may then be encoded one by one, as merges on two sides of a place that no token spans do not touch each
    other, and a token's text does not depend on what stands around it.
    """
    model, normalizer = serialized["model"], serialized["normalizer"] or {}
    added = [token["content"] for token in serialized["added_tokens"] if token["rstrip"] or token["single_word"]]
    if model.get("type") != "BPE" or model.get("dropout") or added or normalizer.get("type", "NFC") != "NFC":
        return False
    byte_level = any(part.get("type") == "ByteLevel" for part in _parts(serialized["pre_tokenizer"]))
    byte_level &= (serialized["decoder"] or {}).get("type") == "ByteLevel"
    spaced = (*model["vocab"], *(token["content"].replace(" ", "Ġ") for token in serialized["added_tokens"]))
    return byte_level and not any(_SPANS_A_SPACE.search(token) for token in spaced)


_SPANS_A_SPACE = re.compile("[^ĠĊčĉ]Ġ")  # as byte-level vocabularies spell space, newline, return and tab


def _parts(pre_tokenizer: dict[str, Any] | None) -> list[dict[str, Any]]:
    return [] if pre_tokenizer is None else pre_tokenizer.get("pretokenizers", [pre_tokenizer])
