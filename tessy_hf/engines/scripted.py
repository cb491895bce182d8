"""An engine that plays given texts, with given latencies and faults: for tests and for measuring all but models.

It answers as a model would: token ids continue token ids, more than is kept may be written, and what was rolled back
is not written again in the same words unless the script says so.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
from array import array
from bisect import bisect_right
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from os.path import commonprefix
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tessy_hf.engines.base import Completion, Measure, Request, Scores
from tessy_hf.errors import RequestError
from tessy_hf.text.vocabulary import Vocabulary, words

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MINIATURE_STUDENT = Path(__file__).parent.parent / "demo" / "models" / "student"
"""Only its tokenizer is read."""


@dataclass(frozen=True)
class Script:
    """What one engine writes for one row.

    Attributes:
        thinking: One text, which goes on after what was kept of it; or a list of texts, one for each time the engine
            takes over (it writes on into the next ones until it is cut).
        answer: The final answer.
    """

    thinking: str | Sequence[str]
    answer: str = ""


class ScriptedEngine:
    """Plays scripts.

    Args:
        script: What to write for each row: a mapping from row key, or a function of it. A bare string or list stands
            for the thinking, with an empty answer.
        tokenizer: The vocabulary to write in; by default the miniature student's.
        latency: Seconds each request takes, or a function of the request.
        fault: A function of the request that may return an exception to raise.
        context_length: The most tokens a prompt and its completion may have together.
        piece_tokens: How many tokens of a stream come at once. Each piece takes the time of a request.
        probability: How likely it finds an id after others, above 0; all other ids share the rest evenly. Without it
            the engine measures nothing.
        name: What to call the engine.
    """

    def __init__(
        self,
        script: Mapping[str, Script | str | Sequence[str]] | Callable[[str], Script | str | Sequence[str]],
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        latency: float | Callable[[Request], float] = 0.0,
        fault: Callable[[Request], Exception | None] | None = None,
        context_length: int = 1 << 30,
        piece_tokens: int = 4,
        probability: Callable[[Sequence[int], int], float] | None = None,
        name: str = "scripted",
    ) -> None:
        self.model = name
        self.context_length = context_length
        self.requests = 0
        self.streams = True
        self._piece_tokens = piece_tokens
        self._probability = probability
        every: frozenset[Measure] = frozenset(("logprobs", "entropies", "score"))
        self.measures = every if probability is not None else frozenset()
        self._script = script
        self._tokenizer = tokenizer
        self._latency = latency
        self._fault = fault
        self._vocabulary: Vocabulary | None = None
        self._plays: dict[str, _Play] = {}

    @property
    def identity(self) -> dict[str, Any]:
        """The scripts themselves, or the function's code."""
        if callable(self._script):
            from datasets.fingerprint import Hasher

            shown = Hasher.hash(self._script)  # of its code: another function is another run
        else:
            text = json.dumps({key: vars(_as_script(value)) for key, value in self._script.items()}, sort_keys=True)
            shown = hashlib.sha256(text.encode()).hexdigest()
        return {"engine": "scripted", "model": self.model, "script": shown}

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The vocabulary it writes in."""
        if self._tokenizer is None:
            from transformers import AutoTokenizer

            self._tokenizer = AutoTokenizer.from_pretrained(_MINIATURE_STUDENT)
        return self._tokenizer

    @property
    def cache_tokens(self) -> int | None:
        """Return ``None``: it keeps nothing that could overflow."""
        return None

    async def start(self) -> None:
        """Read the vocabulary."""
        if self._vocabulary is None:
            self._vocabulary = Vocabulary(self.tokenizer, self.model)

    async def complete(self, request: Request) -> Completion:
        """Play on.

        Raises:
            RequestError: There is no script for the row, or what ``fault`` returned.
        """
        self.requests += 1
        seconds = self._latency(request) if callable(self._latency) else self._latency
        if seconds:
            await asyncio.sleep(seconds)
        fault = self._fault(request) if self._fault else None
        if fault is not None:
            raise fault
        assert self._vocabulary is not None, "start() comes first"
        if request.row not in self._plays:
            self._plays[request.row] = _Play(self._find(request.row), self._vocabulary, request.prompt_ids[-1])
        written = self._plays[request.row].play(request, self.tokenizer.eos_token_id)
        if self._probability is None or not (request.logprobs or request.entropies):
            return written
        drawn = list(self._probabilities(request.prompt_ids, written.token_ids))
        entropies = [self._entropy(probability) for probability in drawn] if request.entropies else None
        return replace(written, logprobs=list(map(math.log, drawn)), entropies=entropies)

    async def score(self, prompt_ids: Sequence[int], ids: Sequence[int], *, row: str = "", order: int = 0) -> Scores:
        """Tell how likely it finds ids."""
        probabilities = list(self._probabilities(prompt_ids, ids))
        even = 1 / len(self.tokenizer)
        return Scores(list(map(math.log, probabilities)), [1 if each >= even else 2 for each in probabilities])

    def _probabilities(self, before: Sequence[int], ids: Sequence[int]) -> Iterator[float]:
        if self._probability is None:
            raise RequestError(f"{self.model!r} has no probabilities. Pass ScriptedEngine(..., probability=).")
        text = array("i", before)
        for token in ids:
            yield self._probability(text, token)
            text.append(token)

    def _entropy(self, probability: float) -> float:
        rest, others = 1 - probability, len(self.tokenizer) - 1
        return -probability * math.log(probability) - (rest * math.log(rest / others) if rest > 0 else 0.0)

    async def stream(self, request: Request) -> AsyncGenerator[Completion, None]:
        """Play on piece by piece."""
        ids, left = array("i", request.prompt_ids), request.max_tokens
        while left:
            wanted = min(left, self._piece_tokens)
            piece = await self.complete(replace(request, prompt_ids=ids, max_tokens=wanted))
            yield piece
            if piece.stop_id is not None:
                return
            ids.extend(piece.token_ids)
            left -= len(piece.token_ids)

    def _find(self, row: str) -> Script:
        if not callable(self._script) and row not in self._script:
            raise RequestError(
                f"There is no script for row {row!r}. Scripts: {', '.join(list(self._script)[:5])}, ..."
            )
        return _as_script(self._script(row) if callable(self._script) else self._script[row])

    def release(self, row: str) -> None:
        """Forget how far a row was played."""
        self._plays.pop(row, None)

    async def close(self) -> None:
        """Forget all rows."""
        self._plays.clear()

    def __getstate__(self) -> dict[str, Any]:
        """Pickle the description only."""
        return {**self.__dict__, "_vocabulary": None, "_plays": {}}

    def __repr__(self) -> str:
        return f"ScriptedEngine({self.model!r})"


def _as_script(given: Script | str | Sequence[str]) -> Script:
    return given if isinstance(given, Script) else Script(given)


@dataclass
class _Play:
    """How far one row's script was played: where the current turn began and what was written in it."""

    script: Script
    vocabulary: Vocabulary
    after: int  # the id that the row's prompt ends in
    turns: int = 0
    cursor: int = 0
    turn_prompt: int = -1
    turn_ids: list[int] = field(default_factory=list)
    head: list[int] = field(default_factory=list)
    index: int = 0

    def __post_init__(self) -> None:
        pieces = [self.script.thinking] if isinstance(self.script.thinking, str) else list(self.script.thinking)
        self.begins = [0, *accumulate(map(len, pieces))] if not isinstance(self.script.thinking, str) else None
        self.text = "".join(pieces)
        encoded = self.vocabulary.encode(self.text, self.after)
        self.ids, self.ends = encoded.ids, [end for _, end in encoded.offsets]
        for at in range(len(self.ids) - 2, -1, -1):
            if encoded.offsets[at + 1][0] < self.ends[at]:  # they share a character
                self.ends[at] = self.ends[at + 1]

    def play(self, request: Request, eos: int | None) -> Completion:
        stop = eos if eos in request.stop_ids else min(request.stop_ids)
        if request.part == "answer":
            ids = self.vocabulary.encode(self.script.answer, request.prompt_ids[-1]).ids
            return Completion(ids[: request.max_tokens], stop if len(ids) <= request.max_tokens else None)
        written = request.prompt_ids[self.turn_prompt :] if self.turn_prompt >= 0 else None
        if written is None or list(written) != self.turn_ids:
            self._take_over(request)
        ids = self._next_ids(request.max_tokens + 1)
        more = ids[: request.max_tokens]
        self.turn_ids.extend(more)
        return Completion(more, stop if len(ids) <= request.max_tokens else None)

    def _take_over(self, request: Request) -> None:
        """Begin a turn: at its own text, or where the text that was kept of the last one ends."""
        if self.begins is not None:
            self.cursor = self.begins[min(self.turns, len(self.begins) - 1)]
        elif self.turn_prompt >= 0:
            stop = self.turn_prompt + len(self.turn_ids) + 1
            now, _ = self.vocabulary.read(request.prompt_ids[self.turn_prompt : stop])
            before, _ = self.vocabulary.read(self.turn_ids)
            same = len(commonprefix([now, before]))
            whole = (end for _, end in words(before) if end <= same and self._is_word_end(self.cursor + end))
            self.cursor += max(whole, default=0)
        self.turns += 1
        self.turn_prompt, self.turn_ids = len(request.prompt_ids), []
        self._seek(self.cursor)

    def _is_word_end(self, character: int) -> bool:
        """Return whether a word of the script ends there: half of one may begin another author's word as well."""
        return not self.text[character : character + 1].strip()

    def _seek(self, character: int) -> None:
        """Find where a turn that begins at a character of the script begins in its ids, or inside one of them."""
        self.index = bisect_right(self.ends, character)
        begin = self.ends[self.index - 1] if self.index else 0
        self.head = []
        if self.index < len(self.ids) and begin != character:
            end = self.ends[self.index]
            self.head = self.vocabulary.encode(self.text[character:end], self.ids[0]).ids
            self.index = bisect_right(self.ends, end)

    def _next_ids(self, count: int) -> list[int]:
        """Return the ids that follow those already written in this turn."""
        done = len(self.turn_ids)
        at = self.index + max(0, done - len(self.head))
        return [*self.head[done:], *self.ids[at : at + count]][:count]
