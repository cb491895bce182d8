"""The nouns of the project: a prompt goes in, a trajectory of authored spans comes out. Read this first.

Knows nothing of models, tokenizers, datasets or files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

from tessy_hf.errors import PromptError, RequestError

Author = Literal["teacher", "student"]
"""Who wrote a span: the strong model, or the model to be trained."""

Part = Literal["thinking", "answer"]
"""Where a span stands: in the thinking, or in the final answer."""

FinishReason = Literal["stop", "length", "repetition", "error"]
"""How a row ended.

``stop``: thinking closed and answer ended. ``length``: the thinking or answer budget, or a model's context, ran out.
``repetition``: a degenerate loop was cut off. ``error``: the prompt was unusable or an engine failed after retries.
"""

Budget = Literal["thinking", "answer", "context", "word"]
"""What ran out in a row of ``length``: the thinking or answer budget, a model's context, or the room for one word."""


class Ending(NamedTuple):
    """How a row ended, and by which budget where it was one."""

    finish_reason: FinishReason
    budget: Budget | None = None


Message = Mapping[str, Any]
"""One chat message, ``{"role": ..., "content": ...}``."""


class RowKey(NamedTuple):
    """What a row is looked up by: the same id with another prompt is another row.

    Attributes:
        id: The id column's value, or a hash of the messages.
        prompt_hash: A hash of all that the row asks: messages, tools and the columns that its verifier reads.
    """

    id: str
    prompt_hash: str = ""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One row's question.

    Attributes:
        key: The row's id: the id column's value, or a hash of the messages.
        messages: The chat so far, ending in the user's turn.
        seed: The row's own seed, derived from the run's seed and ``key``.
        order: The row's place in the run; engines serve older rows first.
        prompt_hash: A hash of all that the row asks; see :class:`RowKey`.
        tools: JSON schemas of the tools that the models are shown, where there are any.
    """

    key: str
    messages: Sequence[Message]
    seed: int = 0
    order: int = 0
    prompt_hash: str = ""
    tools: Sequence[Mapping[str, Any]] | None = None

    @property
    def row_key(self) -> RowKey:
        """What the row is looked up by."""
        return RowKey(self.key, self.prompt_hash)


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
        budget: Which budget ran out, for ``finish_reason="length"``; else ``None``.
        closed: Whether the thinking was closed, so that the answer could begin.
        whole: Whether the thinking is the whole text: a model that does not think apart has ended its answer.
        error: What went wrong, for ``finish_reason="error"``; else ``None``.
        retryable: Whether writing the row again may help.
        refused: Whether the prompt itself cannot be used.
        final: Whether the error is the text's own, so that no attempt, in this run or another, can help.
        discarded: Generated tokens that were rolled back, per author, in that author's own tokens.
        generated: All generated tokens, per author, in that author's own tokens.
        seed: The row's seed.
        turn: Whose turn it is in the thinking; ``None`` before the first.
        turn_is_empty: Whether that author kept nothing yet in this turn.
        turn_words: How many words of a turn that goes on are kept.
    """

    key: str
    spans: list[Span] = field(default_factory=list)
    finish_reason: FinishReason = "stop"
    budget: Budget | None = None
    closed: bool = False
    whole: bool = False
    error: str | None = None
    retryable: bool = False
    refused: bool = False
    final: bool = False
    discarded: dict[Author, int] = field(default_factory=lambda: {"teacher": 0, "student": 0})
    generated: dict[Author, int] = field(default_factory=lambda: {"teacher": 0, "student": 0})
    seed: int = 0
    turn: Author | None = None
    turn_is_empty: bool = True
    turn_words: int = 0

    def text(self, part: Part) -> str:
        """Return the text of one part, markers not included."""
        return "".join(span.text for span in self.spans if span.part == part)

    @property
    def response(self) -> str:
        """The answer; of a model that does not think apart, its whole text."""
        return self.text("answer") or (self.text("thinking") if self.whole else "")

    def last_text(self, length: int) -> str:
        """Return at least the last ``length`` characters kept, or all."""
        texts: list[str] = []
        for span in reversed(self.spans):
            if length <= 0:
                break
            texts.append(span.text)
            length -= len(span.text)
        return "".join(reversed(texts))

    def add(self, author: Author, part: Part, text: str) -> None:
        """Append kept text, joining it to the last span where author and part are the same."""
        if not text:
            return
        if self.spans and self.spans[-1].author == author and self.spans[-1].part == part:
            text = self.spans.pop().text + text
        self.spans.append(Span(author, part, text))

    def fail(self, error: PromptError | RequestError) -> None:
        """Note what went wrong."""
        self.finish_reason, self.error = "error", str(error)
        self.retryable, self.refused = getattr(error, "retryable", False), isinstance(error, PromptError)

    def hand_over(self) -> None:
        """Give the turn to the other author."""
        self.turn, self.turn_is_empty = "teacher" if self.turn == "student" else "student", True
        self.turn_words = 0

    def state(self) -> dict[str, Any]:
        """Return what is needed besides the spans to resume, as JSON values."""
        return {
            "closed": self.closed,
            **({"whole": True} if self.whole else {}),
            "turn": self.turn,
            "turn_is_empty": self.turn_is_empty,
            **({"turn_words": self.turn_words} if self.turn_words else {}),
            "discarded": dict(self.discarded),
            "generated": dict(self.generated),
        }

    @classmethod
    def resume(cls, key: str, seed: int, spans: Sequence[Span], state: Mapping[str, Any]) -> Trajectory:
        """Return an unfinished trajectory that resumes after ``spans``, from its :meth:`state`."""
        return cls(key, spans=list(spans), seed=seed, **state)


@dataclass(slots=True)
class Candidate:
    """One of the texts written for a row, with its score and verdict.

    Attributes:
        trajectory: The text.
        done: Whether it is finished, in whatever way.
        score: What chooses among candidates of the same verdict: the teacher's score, 0 to 10, or minus the
            Rank-Surprisal Ratio under the student; ``None`` if not asked or unreadable.
        judgement: The teacher's words; ``None`` if not asked.
        verdict: The verifier's verdict, 1 for right; ``None`` if not asked.
    """

    trajectory: Trajectory
    done: bool = False
    score: float | None = None
    judgement: str | None = None
    verdict: float | None = None


@dataclass(slots=True)
class Draft:
    """Everything written for one row so far; one of its candidates becomes the row.

    Attributes:
        key: The row's identity.
        seed: The row's seed.
        judged: Whether its candidates are judged, by the teacher or by a verifier.
        candidates: The candidates in order; the last one may be under way.
        reference: The teacher's answer, where the student is shown one.
        extra_tokens: Generated tokens that are in no candidate (reference, judgements), per author, in its own tokens.
    """

    key: str
    seed: int = 0
    judged: bool = False
    candidates: list[Candidate] = field(default_factory=list)
    reference: str | None = None
    extra_tokens: dict[Author, int] = field(default_factory=lambda: {"teacher": 0, "student": 0})

    def generated(self, author: Author) -> int:
        """Return how many tokens an author generated for this row, kept or not, in its own tokens."""
        return self.extra_tokens[author] + sum(candidate.trajectory.generated[author] for candidate in self.candidates)

    def state(self) -> dict[str, Any]:
        """Return what is needed besides the candidates' spans to resume, as JSON values."""
        under_way = [candidate.trajectory for candidate in self.candidates if not candidate.done]
        state: dict[str, Any] = under_way[0].state() if under_way else {}
        if not self.judged and self.reference is None:
            return state
        done = [_described(candidate) for candidate in self.candidates if candidate.done]
        draft = {"reference": self.reference, "aside": dict(self.extra_tokens), "done": done}
        return {**state, "draft": {**draft, "seed": under_way[0].seed if under_way else None}}

    @classmethod
    def resume(cls, key: str, seed: int, judged: bool, spans: Sequence[Span], state: Mapping[str, Any]) -> Draft:
        """Return a draft that resumes after ``spans`` (of all candidates), from its :meth:`state`."""
        own = dict(state)
        told = own.pop("draft", None)
        draft = cls(key, seed, judged)
        if told is None:
            draft.candidates = [Candidate(Trajectory.resume(key, seed, spans, own))] if own else []
            return draft
        draft.reference, draft.extra_tokens, left = told["reference"], told["aside"], list(spans)
        for one in told["done"]:
            kept, left = _split(left, one["characters"])
            trajectory = Trajectory.resume(key, one["seed"], kept, one["state"])
            trajectory.finish_reason, trajectory.budget = one["finish_reason"], one.get("budget")
            trajectory.error, trajectory.final = one.get("error"), one.get("error") is not None
            draft.candidates.append(Candidate(trajectory, True, one["score"], one["judgement"], one["verdict"]))
        if told["seed"] is not None:
            draft.candidates.append(Candidate(Trajectory.resume(key, told["seed"], left, own)))
        return draft


def _described(candidate: Candidate) -> dict[str, Any]:
    """Describe a finished candidate without its spans; their total length tells them apart."""
    trajectory = candidate.trajectory
    return {
        "seed": trajectory.seed,
        "finish_reason": trajectory.finish_reason,
        "budget": trajectory.budget,
        "error": trajectory.error,
        "characters": sum(len(span.text) for span in trajectory.spans),
        "state": trajectory.state(),
        "score": candidate.score,
        "judgement": candidate.judgement,
        "verdict": candidate.verdict,
    }


def _split(spans: Sequence[Span], characters: int) -> tuple[list[Span], list[Span]]:
    """Split spans after a number of characters; spans of neighboring candidates may have been joined."""
    before: list[Span] = []
    for index, span in enumerate(spans):
        if not characters:
            return before, list(spans[index:])
        before.append(replace(span, text=span.text[:characters]))
        if len(span.text) > characters:
            return before, [replace(span, text=span.text[characters:]), *spans[index + 1 :]]
        characters -= len(span.text)
    return before, []
