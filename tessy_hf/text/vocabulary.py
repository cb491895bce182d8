"""One tokenizer, read exactly: text to ids and ids to text, with no special meaning given to model text.

Knows nothing of rows or chat templates. Only tokenizers backed by the ``tokenizers`` library are accepted, because
the seams of :mod:`tessy_hf.text.transcript` need character offsets.
"""

from __future__ import annotations

import codecs
import hashlib
import re
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from functools import cache, lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakValueDictionary

from tessy_hf.errors import TemplateError

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer
    from transformers import PreTrainedTokenizerBase

CLAUSE_END = "，。！？；：、"
"""Punctuation after which words end in scripts without spaces."""

WORD = re.compile(rf"\s*(?:[^\s{CLAUSE_END}]+[{CLAUSE_END}]*|[{CLAUSE_END}]+)")
"""A word with the whitespace before it. Scripts without spaces are cut after their punctuation instead."""

LONGEST_TAIL = 200
"""Characters of a prompt's end that are looked at for the place up to which a token may reach into what follows."""

LONGEST_FRAGMENT = 32
"""Characters up to which a piece of text is cached with its ids; longer ones rarely come again."""

_PROBE = 'It\'s 12345 + (6.7)x: "naïve",\n\n  def f(a, b):\n\treturn a[1] != b # 你好 👍 x-y.org/?q=%20\r\n - é > </p>'

# Byte-level BPE spells bytes that are not printable in Latin-1 as the characters from U+0100 on.
_PRINTABLE = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
_BYTES = {0x100 + number: byte for number, byte in enumerate(sorted(set(range(0x100)) - _PRINTABLE))}
_FALLBACK = re.compile(r"<0x([0-9A-F]{2})>")
"""A byte as SentencePiece vocabularies with byte fallback spell it."""

_BYTE = re.compile("[\udc80-\udcff]")  # of a character, as "surrogateescape" decodes it
_SEPARATOR = "\udcff"  # 0xFF is in no UTF-8 text
_PAIR = re.compile(rf"(?=([^{_SEPARATOR}]\s|[\s{CLAUSE_END}\udc80-\udcbf][^{_SEPARATOR}]))")
"""Two neighboring characters, of which one is whitespace or the end of a clause; bytes are lone surrogates."""


class Encoding(NamedTuple):
    """Token ids and, for each, its ``(start, end)`` character offsets in the encoded text."""

    ids: list[int]
    offsets: list[tuple[int, int]]


class Vocabulary:
    """Exact encoding and decoding with one tokenizer.

    The tokenizer's normalizer only helps to find ids: offsets count characters of the text as it was given.

    Args:
        tokenizer: A fast Hugging Face tokenizer.
        name: What to call it in errors.

    Attributes:
        fingerprint: Equal where the same text has the same ids.
        special_ids: The ids of special tokens, such as the end of sequence.

    Raises:
        TemplateError: The tokenizer has no ``tokenizers`` backend.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
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
        described = backend.to_str()
        key = hashlib.sha256(f"{sorted(tokenizer.all_special_ids)} {described}".encode()).digest()
        if (same := _BUILT.get(key)) is not None:
            vars(self).update({**vars(same), **vars(self)})
        else:
            self._build(described, [int(i) for i in tokenizer.all_special_ids])
            _BUILT[key] = self

    def _build(self, described: str, special_ids: Sequence[int]) -> None:
        """Read the tokenizer, which takes seconds where it is large, and whatever its speaker is the same."""
        from tokenizers import Tokenizer

        # A private copy: here "<|im_end|>" written by a model is text, while chat templates need it to be special.
        self._backend: Tokenizer = Tokenizer.from_str(described)
        self._backend.encode_special_tokens = True
        self._backend.post_processor = None  # may trim whitespace off offsets; here each character belongs to a token
        self.fingerprint = _fingerprint(self._backend)
        added = self._backend.get_added_tokens_decoder()
        self.special_ids = frozenset((*(i for i, token in added.items() if token.special), *special_ids))
        self._piece = cache(self._read_token)
        self._pairs = _pairs_in_tokens(self._backend)
        self._choose_anchors(frozenset(added))
        self._cached = lru_cache(maxsize=1 << 15)(self._encode_whole)
        self._choose_fragments(added)

    # --- text to ids

    def encode(self, text: str, after: int | None = None) -> Encoding:
        """Encode model text, never reading special tokens into it.

        Exact as a continuation where no token reaches over the place where ``text`` begins: the ids are those that
        this part of the whole text has. Text that begins with whitespace is always taken for a continuation.

        Args:
            text: The text.
            after: The id before it, or ``None`` where a text begins: there, some tokenizers add a space.
        """
        begins = after is None or after in self._begins_after
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        at = 0
        for fragment in self._fragments.split(text):
            encode = self._cached if len(fragment) <= LONGEST_FRAGMENT else self._encode_whole
            own = encode(fragment, begins)
            ids += own.ids
            for start, end in own.offsets:  # mostly one
                offsets.append((start + at, end + at))
            at, begins = at + len(fragment), False
        return Encoding(ids, offsets)

    def _encode_whole(self, text: str, begins: bool) -> Encoding:
        """Encode text in one call, behind an anchor where the tokenizer would add a space to it.

        The anchor's ids are dropped; one that a token joins with the text is not used.
        """
        anchors = self._before_space if text[:1].isspace() else ("",) if begins else self._before_word
        for anchor in (*anchors, ""):
            encoded = self._backend.encode(anchor + text, add_special_tokens=False)
            ids, offsets, length = encoded.ids, encoded.offsets, len(anchor)
            if not anchor:
                break
            first = next((i for i, (_, end) in enumerate(offsets) if end > length), len(ids))
            if first == len(ids) or offsets[first][0] >= length:
                return Encoding(ids[first:], [(start - length, end - length) for start, end in offsets[first:]])
        return Encoding(ids, offsets)

    def _choose_anchors(self, added: frozenset[int]) -> None:
        """Find out whether the tokenizer adds a space where a text begins, and after which ids a text begins."""

        def adds(*texts: str) -> bool:
            return any(self.read(self._backend.encode(t, add_special_tokens=False).ids)[0] != t for t in texts)

        self._before_space = ("a", "。") if adds(" b", "\nb", "\n\n b") else ()
        self._before_word = ("\n", "。", "a") if adds("b", "1") else ()
        self._begins_after: frozenset[int] = frozenset()
        if self._before_word and self.special_ids:
            token = self._backend.id_to_token(min(self.special_ids))
            begin, behind = self._encode_whole("b", True).ids, self.encode_template(f"{token}b")
            self._begins_after = added if behind[-len(begin) :] == begin else frozenset()

    def _choose_fragments(self, added: Mapping[int, AddedToken]) -> None:
        """Choose where to split text that is encoded piece by piece, each piece cached: most words come again.

        That is before a single space between words, unless some token spans it. Splitting there changes no ids: merges
        on two sides of a place that no token spans do not touch each other.
        """
        spanning = "".join({pair[0] for pair in self._pairs if pair[1] == " " and not pair[0].isspace()})
        self._fragments = re.compile(rf"(?<=[^\s{re.escape(spanning)}])(?= \S)")
        swallowing = any(token.rstrip or token.single_word for token in added.values() if not token.special)
        known = not swallowing and not _BYTE.search(spanning)
        if not known or self.encode(_PROBE) != self._encode_whole(_PROBE, True):
            self._fragments = re.compile("(?!)")  # nowhere

    def encode_template(self, text: str) -> list[int]:
        """Encode a rendered chat template: special tokens in it are special."""
        ids: list[int] = self._template_backend.encode(text, add_special_tokens=False).ids
        return ids

    def encode_open(self, text: str) -> tuple[list[int], str]:
        """Encode a rendered template; return its ids, and its end that a token may join with what follows."""
        encoded = self._template_backend.encode(text, add_special_tokens=False)
        last = max((at for at, i in enumerate(encoded.ids) if i in self.special_ids), default=None)
        end = text if last is None else text[encoded.offsets[last][1] :]
        if len(end) > LONGEST_TAIL:
            _, space, end = end[-LONGEST_TAIL:].partition(" ")
            end = space + end  # whole words
        return encoded.ids, end

    def joins(self, before: str, after: str) -> bool:
        """Return whether some token may hold two neighboring characters, or bytes of both.

        Args:
            before: A character; whitespace or the end of a clause, unless ``after`` is whitespace.
            after: The character that follows.
        """
        return any(left + right in self._pairs for left in _units(before, -1) for right in _units(after, 0))

    # --- ids to text

    def decode(self, ids: Sequence[int], context: Sequence[int] = ()) -> str:
        """Decode ``ids``: as the continuation of the ids in ``context`` (one is enough), or as a text of its own."""
        return self.read(ids)[0] if len(context) else str(self._backend.decode(list(ids), skip_special_tokens=False))

    def read(self, ids: Sequence[int]) -> tuple[str, list[int]]:
        """Decode ids that continue a text, in time linear in their number.

        Returns:
            The text, with U+FFFD for bytes that are no character, and where each id's text ends in it: one that leaves
            a character unfinished ends with the id after it.
        """
        pieces = [self._piece(i) for i in ids]
        if bytes not in map(type, pieces):
            return "".join(map(str, pieces)), list(accumulate(map(len, pieces)))
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        texts, lacking, ends, length = [], [], [], 0
        for piece in pieces:
            texts.append(decoder.decode(piece if isinstance(piece, bytes) else piece.encode("utf-8", "surrogatepass")))
            lacking.append(bool(decoder.getstate()[0]))
            length += len(texts[-1])
            ends.append(length + lacking[-1])
        for at in range(len(ids) - 2, -1, -1):
            ends[at] = ends[at + 1] if lacking[at] else ends[at]
        return "".join(texts) + decoder.decode(b"", final=True), ends

    def _read_token(self, token_id: int) -> str | bytes:
        """Return the text that a token adds after another one; as bytes where it is not whole characters."""
        before = self._backend.encode("a", add_special_tokens=False).ids
        alone = self._backend.decode(before, skip_special_tokens=False)
        text = str(self._backend.decode([*before, token_id], skip_special_tokens=False))[len(alone) :]
        if "\ufffd" not in text:
            return text
        token = str(self._backend.id_to_token(token_id))
        if fallback := _FALLBACK.fullmatch(token):
            return bytes.fromhex(fallback[1])
        try:
            return token.translate(_BYTES).encode("latin-1")
        except UnicodeEncodeError:
            return text

    def token_id(self, token: str) -> int | None:
        """Return the id of ``token`` where it is one token of the vocabulary, else ``None``."""
        found = self._backend.token_to_id(token)
        return None if found is None else int(found)

    def chat_text(self, messages: Sequence[Any], **options: Any) -> str:
        """Render ``messages`` through the tokenizer's chat template as text."""
        return str(self.tokenizer.apply_chat_template(list(messages), tokenize=False, **options))


def owners(offsets: Iterable[tuple[int, int]], ends: Sequence[int]) -> list[int]:
    """Return for each token the index of the piece of text it ends in, from the character at which each piece ends."""
    return [bisect_left(ends, end) for _, end in offsets]


_BUILT: WeakValueDictionary[bytes, Vocabulary] = WeakValueDictionary()
"""Vocabularies in use by what their tokenizers are: those of one family share what was read."""


def words(text: str) -> list[tuple[int, int]]:
    """Return the ``(start, end)`` of each word of ``text``, leading whitespace included, trailing excluded."""
    return [match.span() for match in WORD.finditer(text)]


def _fingerprint(backend: Tokenizer) -> str:
    decoder, backend.decoder = backend.decoder, None  # its settings make no ids
    try:
        return hashlib.sha256(backend.to_str().encode()).hexdigest()
    finally:
        backend.decoder = decoder


def _pairs_in_tokens(backend: Tokenizer) -> frozenset[str]:
    """Return the neighboring characters (see :data:`_PAIR`) in the text of all tokens."""
    tokens = backend.get_vocab()
    if backend.decoder is not None and backend.decoder.decode(["a", "Ġ"]) == "a ":  # byte-level
        text = "ÿ".join(tokens).translate(_BYTES).encode("latin-1", "replace").decode("utf-8", "surrogateescape")
    else:
        text = _SEPARATOR.join(tokens).replace("▁", " ")
    return frozenset(_PAIR.findall(text))


def _units(character: str, end: int) -> tuple[str, ...]:
    """Return a character and its first (0) or last (-1) byte, as :func:`_pairs_in_tokens` has them."""
    encoded = character.encode("utf-8", "surrogatepass")
    return (character,) if len(encoded) == 1 else (character, chr(0xDC00 + encoded[end]))
