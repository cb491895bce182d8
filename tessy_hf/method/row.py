"""What both authors of a row share. Knows nothing of how they write."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tessy_hf.method.chunk import Marks
from tessy_hf.method.chunk_size import ChunkSizes
from tessy_hf.method.limits import Limits
from tessy_hf.method.speaker import Speaker
from tessy_hf.plan import Plan
from tessy_hf.text.transcript import Transcript
from tessy_hf.trajectory import Author, Prompt, Trajectory


@dataclass(frozen=True)
class Row:
    """What both authors of a row share.

    Attributes:
        prompt: The row's question.
        plan: Who writes what, and how.
        trajectory: What is kept and counted.
        transcript: The kept text as each model sees it.
        limits: The limits of the thinking.
        chunk_sizes: How many tokens to ask for at once.
        marks: What ends the thinking as text, in either author's format.
        row_thinks: Whether the row's format, the student's, marks the thinking.
        speakers: Both authors.
    """

    prompt: Prompt
    plan: Plan
    trajectory: Trajectory
    transcript: Transcript
    limits: Limits
    chunk_sizes: ChunkSizes
    marks: Marks
    row_thinks: bool
    speakers: Mapping[Author, Speaker]

    @property
    def answer_tokens(self) -> int:
        """The most tokens of the final answer, after the thinking."""
        thought = self.plan.max_thinking_tokens - self.limits.tokens_left
        both = self.plan.max_tokens
        return self.plan.max_answer_tokens if both is None else min(self.plan.max_answer_tokens, both - thought)
