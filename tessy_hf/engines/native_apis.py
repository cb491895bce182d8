"""SGLang's `/generate` and llama.cpp's `/completion`: ids in and out, by names of their own.

OpenAI's options go in and the server's come out; its answers become choices like those of vLLM.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tessy_hf.engines.base import Request

RANKS = 100
"""How many of the likeliest ids SGLang is asked for at each given one, to tell its rank: as many as RSR counts."""


class SGLang:
    """SGLang's own endpoint, also behind its router. Its events repeat all ids so far, or have the new ones only."""

    path, prompt = "/generate", b"input_ids"
    SCORED = ("return_logprob", "logprob_start_len", "top_logprobs_num")

    @staticmethod
    def options(options: Mapping[str, Any], request: Request, stops: Sequence[str]) -> dict[str, Any]:
        """Return the options by SGLang's names."""
        beside = {name: options[name] for name in SGLang.SCORED if name in options}
        sampling = {name: options[name] for name in options if name not in ("max_tokens", "seed", *SGLang.SCORED)}
        own = {"max_new_tokens": options["max_tokens"], "sampling_seed": options.get("seed", 0)}
        return {"sampling_params": {**sampling, **own}, **beside}

    @staticmethod
    def score_options(request: Request, count: int) -> dict[str, Any]:
        """Return the options that ask for log-probabilities of a prompt's last ids and of the likeliest at each."""
        start = len(request.prompt_ids) - count - 1  # the first of the list has none
        return dict(zip(SGLang.SCORED, (True, start, RANKS), strict=True))

    @staticmethod
    def scored(answer: Mapping[str, Any], request: Request, count: int) -> dict[str, Any]:
        """Return such an answer as vLLM's; it tells no ranks, so those beyond :data:`RANKS` are one more."""
        meta = answer.get("meta_info") or {}
        own, best = (list(meta.get(f"input_{name}_logprobs") or ())[-count:] for name in ("token", "top"))
        found: list[dict[str, Any]] = [
            {str(token): {"logprob": logprob, "rank": _rank(logprob, token, top)}}
            for (logprob, token, *_), top in zip(own, best, strict=False)
        ]
        return {"prompt_logprobs": [None] * (len(request.prompt_ids) - len(found)) + found}

    @staticmethod
    def answer(answer: Mapping[str, Any], seen: int) -> dict[str, Any]:
        """Return the choice in an answer, or in an event of a stream that has brought ``seen`` ids."""
        ids, meta = answer.get("output_ids"), answer.get("meta_info")
        meta = meta if isinstance(meta, Mapping) else {}
        if isinstance(ids, list) and type(total := meta.get("completion_tokens")) is int:
            ids = ids[max(0, len(ids) - max(0, total - seen)) :]
        return _choice(ids, meta.get("finish_reason"), meta.get("prompt_tokens"), meta.get("cached_tokens"))


class LlamaCpp:
    """llama.cpp's server. Its streams leave out ids of characters made of several tokens, so they are not used."""

    path, prompt = "/completion", b"prompt"

    @staticmethod
    def options(options: Mapping[str, Any], request: Request, stops: Sequence[str]) -> dict[str, Any]:
        """Return the options by llama.cpp's names, with its own defaults for sampling switched off."""
        penalty = options.get("repetition_penalty")
        return {
            "n_predict": options["max_tokens"],
            "temperature": options["temperature"],
            "top_p": options["top_p"],
            "top_k": options.get("top_k", 0),
            "min_p": options.get("min_p", 0.0),
            "seed": options.get("seed", 0),
            "samplers": ["penalties", "temperature", "top_k", "top_p", "min_p"],  # in the order of the other engines
            **({"repeat_penalty": penalty, "repeat_last_n": len(request.prompt_ids) + 4096} if penalty else {}),
            "stop": [*stops],
            "preserved_tokens": [*stops],  # else it does not see special tokens as text
            "return_tokens": True,
            "response_fields": ["tokens", "stop_type", "tokens_evaluated", "timings/cache_n"],
        }

    @staticmethod
    def answer(answer: Mapping[str, Any], seen: int) -> dict[str, Any]:
        """Return the choice in an answer. Where a text stopped it, the ids say whether that was a stop id."""
        reason = "stop" if answer.get("stop_type") == "eos" else "length"
        return _choice(answer.get("tokens"), reason, answer.get("tokens_evaluated"), answer.get("timings/cache_n"))


NATIVE: Mapping[str, type[SGLang] | type[LlamaCpp]] = {"sglang": SGLang, "llama.cpp": LlamaCpp}
"""By protocol."""


def _rank(logprob: float, token: int, best: Sequence[Sequence[Any]]) -> int:
    known = any(one[1] == token for one in best)
    return max(1, sum(one[0] >= logprob for one in best)) if known else len(best) + 1


def _choice(ids: Any, reason: Any, prompt_tokens: Any, cached_tokens: Any) -> dict[str, Any]:
    usage = {"prompt_tokens": prompt_tokens, "prompt_tokens_details": {"cached_tokens": cached_tokens}}
    return {"choices": [{"token_ids": ids, "finish_reason": reason}], "usage": usage}
