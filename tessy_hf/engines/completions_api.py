"""Request bodies and answers of the completion protocols, vLLM's `/inference/v1/generate` and `/v1/completions` first.

A request goes in and the bytes of a body come out; an answer goes in and a completion comes out. Knows no replicas,
retries or sockets. Chat endpoints are never used: their reasoning parsers mislabel thinking that is continued
(vllm#38749, sglang#26176).
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import orjson

from tessy_hf.engines.base import Completion, Measure, Request, Scores, derive_seed
from tessy_hf.engines.encoded_prompt import EncodedPrompt
from tessy_hf.engines.native_apis import NATIVE, SGLang
from tessy_hf.retries import first_words
from tessy_hf.text.vocabulary import Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")
Protocol = Literal["deltas", "generate", "sglang", "llama.cpp", "ids", "ids-to-text", "text"]
PROTOCOLS: tuple[Protocol, ...] = (
    "generate",  # ids in and out by `/inference/v1/generate`: vLLM started with --enable-scale-out
    "sglang",  # ids in and out by SGLang's own `/generate`
    "llama.cpp",  # ids in and out by llama.cpp's own `/completion`
    "ids",  # ids in and out by `/v1/completions`: any vLLM; it sends the prompt back each time
    "ids-to-text",  # ids in, text out by `/v1/completions`: servers that take ids, as OpenAI's own do
    "text",  # text in and out by `/v1/completions`: the rest, such as `transformers serve`
)
"""How a server can be asked by HTTP to continue a text, best first; ``deltas`` is for :mod:`.deltas`."""

EXACT: frozenset[Protocol] = frozenset({"deltas", "generate", "sglang", "llama.cpp", "ids"})
"""Protocols with ids in and out."""

STREAMS = EXACT - {"llama.cpp"}
"""Protocols that can stream ids."""

MEASURED: Mapping[Protocol, frozenset[Measure]] = {
    **dict.fromkeys(("deltas", "generate", "ids"), frozenset[Measure](("logprobs", "score"))),
    "sglang": frozenset(("score",)),
}
"""What servers tell of ids, by protocol, nothing where it is not listed; see :func:`measuring`."""

PROBE = "Okay, so f(x) = x² + 3x.\n\n1. Wait,\tnaïve 123 你好 🙂<think>\n</think>\n"
"""Text that a server has to tokenize as the local tokenizer does, followed by the markers of the chat template."""

MOST_STOP_TEXTS = 4
"""Most stop texts that OpenAI's protocol allows."""

MOST_ROWS = 1024
"""Rows whose encoded prompts are kept; of more, those used longest ago are encoded anew."""

_STOPPED = frozenset({"stop", "eos", "eos_token", "stop_token", "stop_sequence", "stop_str", "end_turn", "complete"})
_OUT_OF_TOKENS = frozenset({"length", "max_tokens", "max_length", "max_new_tokens", "model_length", "limit"})
"""What servers write as ``finish_reason``: OpenAI, TGI, Together, Mistral, Cohere, Anthropic and llama.cpp."""

_ECHO = b'"prompt_token_ids":'
_CACHE_CONFIG = re.compile(r"^vllm:cache_config_info\{(.*)\}", re.MULTILINE)


class AnswerError(Exception):
    """An answer under status 200 that cannot be used: what is wrong, as in "the server" ``sent 2 choices, not one``.

    Of an ``error`` object in it, ``status`` is the HTTP status it claims, if any, and ``words`` what it says.
    """

    def __init__(self, message: str, status: int | None = None, words: str = "") -> None:
        super().__init__(message)
        self.status, self.words = status, words


class CompletionsAPI:
    """Builds bodies and reads answers for one model, in each of :data:`PROTOCOLS`.

    What cannot be read is an :class:`AnswerError`.
    """

    def __init__(self, model: str, tokenizer: PreTrainedTokenizerBase) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._vocabulary = Vocabulary(tokenizer, model)
        self._last_id = max(tokenizer.get_vocab().values())
        self._prefix: list[int] = tokenizer("").input_ids  # what servers' tokenizers put before each text too
        template = str(tokenizer.chat_template)
        self._probe_text = PROBE + "".join(token for token in tokenizer.get_added_vocab() if token in template)
        self._prompts: OrderedDict[str, EncodedPrompt] = OrderedDict()
        self._stop_texts = lru_cache(maxsize=64)(self._decode_stops)

    # --- bodies

    def body(self, protocol: Protocol, request: Request, *, stream: bool = False, priority: bool = False) -> bytes:
        """Return the body that asks for a completion. Its size grows with the row, the work for it hardly."""
        return self._asking(protocol, request, self._options(protocol, request), stream, priority)

    def score_body(self, protocol: Protocol, request: Request, count: int) -> bytes:
        """Return the body that asks for the log-probabilities of a prompt's last ``count`` ids, with one new token."""
        options = {"max_tokens": 1, "temperature": 0.0}
        told = SGLang.score_options(request, count) if protocol == "sglang" else {"prompt_logprobs": 0}
        return self._asking(protocol, request, {**options, **told})

    def _options(self, protocol: Protocol, request: Request) -> dict[str, Any]:
        options = {"max_tokens": request.max_tokens, **_sampling(request)}
        if request.temperature:
            options["seed"] = seed(request)
        if request.logprobs and "logprobs" in MEASURED.get(protocol, ()):
            options["logprobs"] = 0  # of the drawn ids only
        if protocol in EXACT:
            options["stop_token_ids"] = _encoded_ids(request.stop_ids)
        elif stops := self._stop_texts(request.stop_ids)[:MOST_STOP_TEXTS]:
            options["stop"] = stops
        return options

    def _asking(
        self,
        protocol: Protocol,
        request: Request,
        options: dict[str, Any],
        stream: bool = False,
        priority: bool = False,
    ) -> bytes:
        native = NATIVE.get(protocol)
        if native is not None:
            options = native.options(options, request, self._stop_texts(request.stop_ids))
        elif protocol == "generate":
            options = {"sampling_params": {**options, "detokenize": False}}
        elif protocol == "ids":
            options["return_token_ids"] = True
        if stream:
            options["stream"] = True
        if priority:
            options["priority"] = request.order  # lower is served first
        name = native.prompt if native else b"token_ids" if protocol == "generate" else b"prompt"
        head = b"".join((orjson.dumps({"model": self._model})[:-1], b',"', name, b'":'))
        tail = b"," + orjson.dumps(options)[1:]
        if protocol == "text":
            return b"".join((head, self._text_prompt(request), tail))
        return self._id_prompt(request, head, tail)

    def release(self, row: str) -> None:
        """Forget a row's encoded prompt."""
        self._prompts.pop(row, None)

    def probe(self) -> Request:
        """Return a small request, to find out whether a server speaks a protocol."""
        ids = self._vocabulary.encode("1 + 1 =").ids
        return Request("", 0, "thinking", ids, 8, 0.0, 1.0, 0, self._vocabulary.special_ids)

    def tokenize_body(self) -> bytes:
        """Return the body that asks vLLM's `/tokenize` for the tokens of :data:`PROBE` and the template's markers."""
        body = {"model": self._model, "prompt": self._probe_text, "add_special_tokens": False}
        return orjson.dumps(body)

    def _id_prompt(self, request: Request, head: bytes, tail: bytes) -> bytes:
        prompt = self._prompts.get(request.row) or self._prompts.setdefault(request.row, EncodedPrompt())
        self._prompts.move_to_end(request.row)
        if len(self._prompts) > MOST_ROWS:
            self._prompts.popitem(last=False)
        return prompt.update(request.prompt_ids, head, tail)

    def _text_prompt(self, request: Request) -> bytes:
        """Return the prompt as text, without what the server's tokenizer puts before each text."""
        ids, prefix = list(request.prompt_ids), self._prefix
        own = ids[len(prefix) :] if ids[: len(prefix)] == prefix else ids
        return orjson.dumps(self._vocabulary.decode(own))

    def _decode_stops(self, stop_ids: frozenset[int]) -> list[str]:
        """Return the stop ids as text, the end of thinking first. A server knows its own end of sequence."""
        others = stop_ids - {self._tokenizer.eos_token_id}
        ids = sorted(others, key=lambda i: (i in self._vocabulary.special_ids, -i))
        return [text for text in (self._vocabulary.decode([i]) for i in ids) if text]

    # --- answers

    def completion(self, protocol: Protocol, answer: Any, request: Request) -> Completion:
        """Read a completion from the JSON of an answer."""
        answer = _common(protocol, answer)
        read, choice = self._ids if protocol in EXACT else self._text_ids, _choice(answer)
        ids, stop_id = read(choice, request, request.max_tokens)
        logprobs = _logprobs([choice], len(ids)) if request.logprobs else None
        return Completion(ids, stop_id, uncached_tokens(answer), logprobs)

    def scores(self, protocol: Protocol, answer: Any, request: Request, count: int) -> Scores:
        """Read the log-probabilities and ranks of a prompt's last ``count`` ids."""
        if protocol == "sglang":
            answer = SGLang.scored(answer, request, count)
        told = _get(answer, "prompt_logprobs", list) or _get(_choice(answer), "prompt_logprobs", list)
        ids = request.prompt_ids[len(request.prompt_ids) - count :]
        entries = [_get(each, str(token), dict) for each, token in zip(told[-count:], ids, strict=False)]
        scores: list[tuple[Any, Any]] = [(one.get("logprob"), one.get("rank")) for one in entries]
        if len(told) != len(request.prompt_ids) or not all(_is_score(*one) for one in scores):
            raise AnswerError("answered without log-probabilities of the prompt")
        return Scores([float(logprob) for logprob, _ in scores], [int(rank) for _, rank in scores])

    def piece(self, protocol: Protocol, events: Sequence[Any], request: Request, most: int) -> Completion | None:
        """Read what the events of a stream add, at most so many tokens; ``None`` where they add nothing."""
        choices: list[Mapping[str, Any]] = []
        ids: list[int] = []
        seen = request.max_tokens - most
        for event in events:
            common = _common(protocol, event, seen + len(ids))
            if _get(common, "choices", list):
                choices.append(_choice(common))
                ids += _get(choices[-1], "token_ids", list)
        if not ids:  # the last event may have nothing but the reason
            return None
        together = {"token_ids": ids, "finish_reason": choices[-1].get("finish_reason")}
        ids, stop_id = self._ids(together, request, most)
        return Completion(ids, stop_id, None, _logprobs(choices, len(ids)) if request.logprobs else None)

    def other_tokens(self, answer: Any) -> str | None:
        """Return where the tokens of `/tokenize` differ from the local tokenizer's, for people; else ``None``."""
        tokens, expected = _get(answer, "tokens", list), self._vocabulary.encode_template(self._probe_text)
        if not tokens or tokens == expected:
            return None
        at = next((i for i, pair in enumerate(zip(tokens, expected, strict=False)) if pair[0] != pair[1]), 0)
        return f"{tokens[at : at + 5]} against {expected[at : at + 5]} at token {at} of the same text"

    def _ids(self, choice: Mapping[str, Any], request: Request, most: int) -> tuple[list[int], int | None]:
        ids = choice.get("token_ids")
        if not isinstance(ids, list) or not ids or any(type(i) is not int or not 0 <= i <= self._last_id for i in ids):
            raise AnswerError("answered without tokens of this vocabulary")
        if len(ids) > most:
            raise AnswerError(f"sent {len(ids)} tokens, {most} were asked for")
        stop_at = next((at for at, token in enumerate(ids) if token in request.stop_ids), None)
        if stop_at is None and _reason(choice) in _STOPPED:
            stop_at = len(ids) - 1  # an end of sequence that only the server's settings know
        return (ids, None) if stop_at is None else (ids[:stop_at], ids[stop_at])

    def _text_ids(self, choice: Mapping[str, Any], request: Request, most: int) -> tuple[list[int], int | None]:
        text, reason = choice.get("text"), _reason(choice)
        if not isinstance(text, str) or reason not in _STOPPED | _OUT_OF_TOKENS:
            shown = first_words(str(choice.get("finish_reason")))
            raise AnswerError(f"answered without text (finish_reason {shown!r})")
        found = [at for at in map(text.find, self._stop_texts(request.stop_ids)) if at >= 0]  # some send what stopped
        stopped = bool(found) or reason in _STOPPED
        text = text[: min(found)] if found else text.rstrip("\ufffd")  # part of a character that was cut
        if not text and not stopped:
            raise AnswerError("answered with an empty text")
        ids = self._vocabulary.encode(text, request.prompt_ids[-1]).ids
        if len(ids) > most or not stopped:
            return ids[:most], None
        eos = self._tokenizer.eos_token_id  # any stop will do: which one it was is not told
        return ids, int(eos) if eos is not None else min(request.stop_ids, default=None)


def _logprobs(choices: Sequence[Mapping[str, Any]], count: int) -> list[float]:
    """Return the log-probabilities of the first ids that choices have: of `/inference/v1/generate`, or OpenAI's."""
    told = [_get(choice, "logprobs", dict) for choice in choices]
    found: list[Any] = [value for one in told for value in _get(one, "token_logprobs", list)]
    found += [entry.get("logprob") for one in told for entry in _get(one, "content", list)]
    if len(found) < count or not all(_is_score(value, 1) for value in found[:count]):
        raise AnswerError("answered without log-probabilities of the new tokens")
    return [float(value) for value in found[:count]]


def _is_score(logprob: Any, rank: Any) -> bool:
    return isinstance(logprob, int | float) and type(rank) is int


def sampling(request: Request) -> bytes:
    """Return the JSON of what vLLM is told of a request's sampling, but for what differs from request to request."""
    return orjson.dumps({**_sampling(request), "stop_token_ids": _encoded_ids(request.stop_ids)})


def seed(request: Request) -> int:
    """Return the seed of a request, which depends on the row and the place in it; -1 where it is greedy."""
    return derive_seed(request.seed, len(request.prompt_ids)) % 2**31 if request.temperature else -1


def _sampling(request: Request) -> dict[str, Any]:
    return {"temperature": request.temperature, "top_p": request.top_p, **request.set_sampling}


@lru_cache(maxsize=64)
def _encoded_ids(ids: frozenset[int]) -> orjson.Fragment:
    """Return ids as JSON, in order."""
    return orjson.Fragment(orjson.dumps(sorted(ids)))


def parse(content: bytes) -> Any:
    """Parse an answer or event that is not an ``error`` object, as OpenRouter and llama.cpp send.

    The prompt that vLLM sends back is left out.
    """
    try:
        if (at := content.find(_ECHO)) >= 0 and (end := content.find(b"]", at)) > 0:  # its ids alone, or null
            value = content[at + len(_ECHO) : end].strip()
            content = content[:at] + _ECHO + b"[" + content[end:] if value.startswith(b"[") else content
        answer = orjson.loads(content)
    except ValueError as error:
        shown = first_words(content[:1000].decode(errors="replace"))
        raise AnswerError(f"answered with something that is not JSON: {shown!r}") from error
    _check(answer)
    return answer


def server_words(content: bytes) -> str:
    """Return what a server says in the body of an error, in one line: its message, else the first words."""
    text = content.decode(errors="replace")
    try:
        answer = parse(content)
    except AnswerError as error:
        return error.words or first_words(text)
    found = [answer.get(key) for key in ("detail", "message")] if isinstance(answer, Mapping) else []
    return first_words(next((words for words in found if isinstance(words, str) and words), text))


def measuring(protocol: Protocol, request: Request) -> Protocol:
    """Return how to ask: deltas bring no log-probabilities, but each vLLM tells them by `ids`."""
    return "ids" if protocol == "deltas" and request.logprobs else protocol


def address(server: str, protocol: Protocol) -> str:
    """Return where a server is asked in a protocol; the server's address mostly ends in its version."""
    if protocol == "generate":
        return server.removesuffix("/v1") + "/inference/v1/generate"
    return server.removesuffix("/v1") + NATIVE[protocol].path if protocol in NATIVE else server + "/completions"


def uncached_tokens(answer: Any) -> int | None:
    """Return how many tokens of the prompt were not in the server's cache, where it tells.

    vLLM does with ``--enable-prompt-tokens-details``, SGLang with ``--enable-cache-report``; of a stream only at its
    end, which the row does not wait for.
    """
    usage = _get(answer, "usage", dict)
    tokens, cached = usage.get("prompt_tokens"), _get(usage, "prompt_tokens_details", dict).get("cached_tokens")
    if type(tokens) is not int or type(cached) is not int or not 0 <= cached <= tokens:
        return None
    return tokens - cached


def served(answer: Any) -> dict[str, int | None]:
    """Return the models of `/v1/models` and the context length of each, where it is told: by vLLM or llama.cpp."""
    models: dict[str, int | None] = {}
    for entry in _get(answer, "data", list):
        if isinstance(entry, Mapping):
            length = entry.get("max_model_len") or _get(entry, "meta", dict).get("n_ctx")
            models[str(entry.get("id"))] = length if type(length) is int and length > 0 else None
    return models


def roots(answer: Any) -> dict[str, str]:
    """Return the models of `/v1/models` and the folder or Hub id behind each: its own name where that is not told."""
    models = [entry for entry in _get(answer, "data", list) if isinstance(entry, Mapping)]
    return {str(entry.get("id")): str(entry.get("root") or entry.get("id")) for entry in models}


def cache_tokens(metrics: str) -> int | None:
    """Return how many tokens a server's cache holds, where its `/metrics` tell, as vLLM's do."""
    found = _CACHE_CONFIG.search(metrics)
    config = dict(re.findall(r'(\w+)="(\d+)"', found[1])) if found else {}
    return int(config.get("num_gpu_blocks", 0)) * int(config.get("block_size", 0)) or None


def _check(answer: Any) -> None:
    """Raise an :class:`AnswerError` where an answer, or a choice in it, is an error object."""
    if not isinstance(answer, Mapping):
        return
    error = answer.get("error") or (answer if answer.get("object") == "error" else None)
    if not error:
        return
    described = error if isinstance(error, Mapping) else {"message": error}
    codes = [str(of.get(key)) for of in (described, answer) for key in ("code", "status", "status_code")]
    status = next((int(code) for code in codes if re.fullmatch("[45][0-9][0-9]", code)), None)
    words = first_words(str(described.get("message") or orjson.dumps(error).decode()))
    raise AnswerError(f"answered with an error: {words!r}", status, words)


def _common(protocol: Protocol, answer: Any, seen: int = 0) -> Any:
    """Return an answer as vLLM would have sent it."""
    native = NATIVE.get(protocol)
    return answer if native is None else native.answer(answer if isinstance(answer, Mapping) else {}, seen)


def _choice(answer: Any) -> Mapping[str, Any]:
    choices = _get(answer, "choices", list)
    if len(choices) != 1 or not isinstance(choices[0], Mapping):
        raise AnswerError(f"sent {len(choices)} choices, not one")
    _check(choices[0])
    return choices[0]


def _reason(choice: Mapping[str, Any]) -> str:
    """Return why a choice ended, in lower case; SGLang's own answers have it as ``{"type": ...}``."""
    reason = choice.get("finish_reason")
    return str(reason.get("type") if isinstance(reason, Mapping) else reason).lower()


def _get(value: Any, key: str, kind: type[T]) -> T:
    """Return what an answer has by a key, or an empty value where that is of another kind."""
    found = value.get(key) if isinstance(value, Mapping) else None
    return found if isinstance(found, kind) else kind()
