"""The nouns of the project: a prompt goes in, a trajectory of authored spans comes out. Read this first.

Knows nothing of models, tokenizers, datasets or files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Author = Literal["teacher", "student"]
"""Who wrote a span: the strong model, or the model to be trained."""

Part = Literal["thinking", "answer"]
"""Where a span stands: in the thinking, or in the final answer."""

FinishReason = Literal["stop", "length", "repetition", "error"]
"""How a row ended.

``stop``: thinking closed and answer ended. ``length``: the thinking or answer budget, or a model's context, ran out.
``repetition``: a degenerate loop was cut off. ``error``: the prompt was unusable or an engine failed after retries.
"""

Message = Mapping[str, Any]
"""One chat message, ``{"role": ..., "content": ...}``."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One row's question.

    Attributes:
        key: The row's identity: the id column's value, or a hash of the messages.
        messages: The chat so far, ending in the user's turn.
        seed: The row's own seed, derived from the run's seed and ``key``.
        order: The row's place in the run; engines serve older rows first.
    """

    key: str
    messages: Sequence[Message]
    seed: int = 0
    order: int = 0


@dataclass(frozen=True, slots=True)
class Span:
    """A run of text by one author.

    Attributes:
        author: Who wrote it.
        part: Thinking or final answer.
        text: The text, whitespace included.
    """

    author: Author
    part: Part
    text: str


@dataclass(slots=True)
class Trajectory:
    """What one row became.

    Attributes:
        key: The row's identity.
        spans: The kept text in order; neighbours of the same part differ in author.
        finish_reason: How the row ended.
        closed: Whether the thinking was closed, so that the answer could begin.
        error: What went wrong, for ``finish_reason="error"``; else ``None``.
        retryable: Whether writing the row again may help.
        discarded: Generated tokens that were rolled back, per author, in that author's own tokens.
        generated: All generated tokens, per author, in that author's own tokens.
        seed: The row's seed.
        turn: Whose turn it is in the thinking; ``None`` before the first.
        turn_is_empty: Whether that author kept nothing yet in this turn.
    """

    key: str
    spans: list[Span] = field(default_factory=list)
    finish_reason: FinishReason = "stop"
    closed: bool = False
    error: str | None = None
    retryable: bool = False
    discarded: dict[Author, int] = field(default_factory=lambda: {"teacher": 0, "student": 0})
    generated: dict[Author, int] = field(default_factory=lambda: {"teacher": 0, "student": 0})
    seed: int = 0
    turn: Author | None = None
    turn_is_empty: bool = True

    def text(self, part: Part) -> str:
        """Return the text of one part, markers not included."""
        return "".join(span.text for span in self.spans if span.part == part)

    def add(self, author: Author, part: Part, text: str) -> None:
        """Append kept text, joining it to the last span where author and part are the same."""
        if not text:
            return
        if self.spans and self.spans[-1].author == author and self.spans[-1].part == part:
            text = self.spans.pop().text + text
        self.spans.append(Span(author, part, text))

    def state(self) -> dict[str, Any]:
        """Return, as JSON values, what besides the spans is needed to go on after them."""
        return {
            "closed": self.closed,
            "turn": self.turn,
            "turn_is_empty": self.turn_is_empty,
            "discarded": dict(self.discarded),
            "generated": dict(self.generated),
        }

    @classmethod
    def resume(cls, key: str, seed: int, spans: Sequence[Span], state: Mapping[str, Any]) -> Trajectory:
        """Return an unfinished trajectory that goes on after ``spans``, from what :meth:`state` said of it."""
        return cls(key, spans=list(spans), seed=seed, **state)
