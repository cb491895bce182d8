"""The OpenAI protocol: request bodies in, plans out; finished rows in, response bodies out.

Knows no HTTP and no event loop. What this endpoint does not do is refused by name, never ignored.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from tessy_hf.plan import Plan
from tessy_hf.rows import columns
from tessy_hf.settings import Settings

REPORTED = (
    "finish_reason",
    "exhausted_budget",
    "method",
    "teacher_token_ratio",
    "generated_teacher_tokens",
    "generated_student_tokens",
    "discarded_teacher_tokens",
    "discarded_student_tokens",
)
"""Columns of a row that a response tells besides its spans."""

SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def _nothing(given: Any) -> None:
    if given:
        raise ValueError("it is not served here")


Nothing = Annotated[Any, AfterValidator(_nothing)]
"""A parameter that may be there if it asks for nothing."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class StreamOptions(_Part):
    """What a stream has besides its text."""

    include_usage: bool = False
    include_obfuscation: Nothing = None


class ResponseFormat(_Part):
    """Text, and nothing else."""

    type: Literal["text"]


class Asked(_Part):
    """What both kinds of requests have. Sampling that is not given is the recipe's."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    user: str | None = None
    n: Literal[1] | None = None
    logit_bias: Nothing = None
    frequency_penalty: Nothing = None
    presence_penalty: Nothing = None
    logprobs: Nothing = None

    @property
    def most_tokens(self) -> int | None:
        """The most tokens of thinking and answer together."""
        return self.max_tokens

    @property
    def stops(self) -> list[str]:
        """Texts that end the answer, and are not part of it."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [stop for stop in given if stop]

    def plan(self, settings: Settings, key: str) -> Plan:
        """Return how to write the text.

        Raises:
            SettingsError: A value is out of range.
        """
        given = {name: value for name in SAMPLING if (value := getattr(self, name)) is not None}
        given |= {name: None for name in ("top_k", "min_p") if given.get(name) in (0, -1)}  # vLLM's words for all
        plan = Settings.check(**{**dict(settings), **given}).plan(key)
        most = self.most_tokens
        thinking = min(plan.max_thinking_tokens, most or plan.max_thinking_tokens)
        return replace(plan, max_thinking_tokens=thinking, max_tokens=most)


class ChatRequest(Asked):
    """The body of ``/v1/chat/completions``."""

    messages: list[Any]
    max_completion_tokens: int | None = Field(default=None, ge=1)
    top_logprobs: Nothing = None
    tools: Nothing = None
    functions: Nothing = None
    tool_choice: Literal["none", "auto"] | None = None
    response_format: ResponseFormat | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None

    @property
    def most_tokens(self) -> int | None:
        """The most tokens of thinking and answer together."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def prompt_messages(self) -> Any:
        """The chat."""
        return self.messages


class CompletionRequest(Asked):
    """The body of ``/v1/completions``: the prompt is a user's message, and the text is the answer to it."""

    prompt: str | Annotated[list[str], Field(min_length=1, max_length=1)]
    echo: Nothing = None
    suffix: Nothing = None
    best_of: Literal[1] | None = None

    @property
    def prompt_messages(self) -> Any:
        """The chat."""
        return self.prompt if isinstance(self.prompt, str) else self.prompt[0]


class Stops:
    """Cut a growing text before the text that ends first of several: what may be the beginning of one waits."""

    def __init__(self, stops: list[str]) -> None:
        self._stops, self._held = stops, ""
        self.hit = False

    def feed(self, text: str, *, last: bool = False) -> str:
        """Return what of the text so far can be shown, and was not shown before."""
        if self.hit:
            return ""
        text = self._held + text
        places = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if places:
            self.hit = True
            return text[: min(places)[1]]
        tails = (n for n in range(len(text), 0, -1) if any(stop.startswith(text[-n:]) for stop in self._stops))
        held = 0 if last else next(tails, 0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


@dataclass(frozen=True)
class Reply:
    """The bodies of one response.

    Attributes:
        model: The served model's name.
        chat: Whether it answers a chat.
        prompt_tokens: Tokens of the prompt, the student's.
        fingerprint: The run's fingerprint.
        seed: The request's seed, its own or one drawn for it.
        id: The request's name.
        created: When it came, in seconds since 1970.
    """

    model: str
    chat: bool
    prompt_tokens: int
    fingerprint: str
    seed: int
    id: str = field(default_factory=lambda: f"tessy-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def _body(self, kind: str, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        own = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return {**own, "system_fingerprint": self.fingerprint, "choices": choices, **more}

    def whole(self, row: Mapping[str, Any], thinking: str, text: str, stopped: bool) -> dict[str, Any]:
        """Return the body of a response that is not a stream."""
        said = {"reasoning_content": thinking} if thinking else {}
        content = {"message": {"role": "assistant", "content": text, **said}} if self.chat else {"text": text, **said}
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": finish_reason(row, stopped)}
        kind = "chat.completion" if self.chat else "text_completion"
        told = {"usage": self.usage(row), "tessy": self.report(row, len(thinking) + len(text))}
        return self._body(kind, [choice], **told)

    def piece(self, part: str, text: str, author: str | None) -> dict[str, Any]:
        """Return a piece of a stream: ``reasoning_content`` or ``content``."""
        delta = {"delta": {part: text}} if self.chat else {"text": text if part == "content" else ""}
        said = {part: text} if part != "content" and not self.chat else {}
        return self._chunk({**delta, **said}, tessy={"author": author})

    def begin(self) -> dict[str, Any]:
        """Return the first piece of a chat's stream."""
        return self._chunk({"delta": {"role": "assistant", "content": ""}})

    def end(self, row: Mapping[str, Any], length: int, stopped: bool) -> dict[str, Any]:
        """Return the last piece of a stream of so many characters."""
        last: dict[str, Any] = {"delta": {}} if self.chat else {"text": ""}
        return self._chunk({**last, "finish_reason": finish_reason(row, stopped)}, tessy=self.report(row, length))

    def used(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return what a stream ends with where ``usage`` was asked for."""
        return {**self._chunk({}), "choices": [], "usage": self.usage(row)}

    def _chunk(self, choice: dict[str, Any], **more: Any) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return self._body(kind, [{"index": 0, "logprobs": None, "finish_reason": None, **choice}], **more)

    def usage(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Count tokens of the text, the student's; what was rolled back is in :meth:`report`."""
        written = row["teacher_tokens"] + row["student_tokens"]
        thought = sum(span["tokens"] for span in row["spans"] if span["part"] == "thinking")
        total = {"prompt_tokens": self.prompt_tokens, "completion_tokens": written}
        details = {"completion_tokens_details": {"reasoning_tokens": thought}}
        return {**total, "total_tokens": self.prompt_tokens + written, **details}

    def report(self, row: Mapping[str, Any], length: int) -> dict[str, Any]:
        """Return what OpenAI's protocol has no field for: who wrote what, and what was rolled back."""
        told = {"spans": list(_spans(row, length)), "seed": self.seed}
        return {**told, **{name: row[name] for name in REPORTED}}


def finish_reason(row: Mapping[str, Any], stopped: bool) -> str:
    """Return OpenAI's name for how a row ended; ``stopped``: at a stop text."""
    return "stop" if stopped or row["finish_reason"] == "stop" else "length"


def _spans(row: Mapping[str, Any], length: int) -> Iterator[dict[str, Any]]:
    """Iterate over a row's spans; their texts, laid end to end, are thinking and answer up to ``length``."""
    for piece in columns.pieces(row):
        text = piece.text[:length]
        length -= len(text)
        if text:
            yield {"author": piece.author, "part": piece.part, "tokens": piece.tokens, "text": text}
