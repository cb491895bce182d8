"""Score whole texts under a student: token ids go in, log-probabilities, ranks and their ratio (RSR) come out.

Knows nothing of prompts, rows or datasets.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import NamedTuple

from tessy_hf.engines.base import Engine, Scores
from tessy_hf.engines.model_files import located
from tessy_hf.engines.transformers import TransformersEngine
from tessy_hf.errors import EngineError, SettingsError
from tessy_hf.text.vocabulary import Vocabulary

MOST_RANK = 100
"""Ranks above count as this one."""

BATCH = 8
"""Texts scored at the same time, of which keys and values are held."""


class Surprise(NamedTuple):
    """How a student finds one text, means over its tokens.

    Attributes:
        surprisal: Negative log-probability, in nats.
        rank: Rank in the student's vocabulary, at most :data:`MOST_RANK`.
        tokens: How many tokens there are.
    """

    surprisal: float
    rank: float
    tokens: int

    @property
    def rsr(self) -> float | None:
        """Rank over surprisal (arXiv 2601.14249): low for text that is new to the student and yet near to it."""
        return self.rank / self.surprisal if self.surprisal > 0 else None


def surprise(logprobs: Sequence[float], ranks: Sequence[int]) -> Surprise | None:
    """Return how the student finds a text; ``None`` of one without tokens."""
    count = len(logprobs)
    if not count:
        return None
    return Surprise(-sum(logprobs) / count, sum(min(rank, MOST_RANK) for rank in ranks) / count, count)


class Scorer:
    """Scores texts with an engine.

    Args:
        engine: What scores them; it is started when it is needed.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def start(self) -> None:
        """Load the model.

        Raises:
            EngineDeadError: It cannot be loaded.
        """
        asyncio.run(self._engine.start())

    def __call__(self, texts: Sequence[tuple[Sequence[int], int]]) -> list[Scores]:
        """Score each text, a list of ids, from an index on; the first id of a text has nothing before it."""
        return asyncio.run(self._score(texts))

    async def _score(self, texts: Sequence[tuple[Sequence[int], int]]) -> list[Scores]:
        await self._engine.start()
        found: list[Scores] = []
        for start in range(0, len(texts), BATCH):
            some = texts[start : start + BATCH]
            rows = [f"text {at}" for at in range(len(some))]
            asked = (self._one(row, ids, max(begin, 1)) for row, (ids, begin) in zip(rows, some, strict=True))
            found += await asyncio.gather(*asked)
            for row in rows:
                self._engine.release(row)
        return found

    async def _one(self, row: str, ids: Sequence[int], begin: int) -> Scores:
        if begin >= len(ids):
            return Scores([], [])
        return await self._engine.score(ids[:begin], ids[begin:], row=row)


def load_student(tokenizer: str, model: str | None = None) -> tuple[Vocabulary, Scorer | None]:
    """Load a student's tokenizer and, if ``model`` is given, its weights to score texts with.

    Args:
        tokenizer: A folder or Hub id with a tokenizer.
        model: A folder or Hub id with weights in safetensors.

    Raises:
        SettingsError: One of them cannot be loaded.
    """
    from transformers import AutoTokenizer

    scorer = Scorer(TransformersEngine(model)) if model else None
    try:
        vocabulary = Vocabulary(AutoTokenizer.from_pretrained(located(tokenizer)), tokenizer)
        if scorer is not None:
            scorer.start()
    except (EngineError, OSError, ValueError) as error:
        seen = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise SettingsError(
            f"{model or tokenizer!r} cannot be loaded: {seen}. Expected is a folder or a Hub id with a tokenizer, and "
            "for --student with weights in safetensors too. Check the name and HF_TOKEN."
        ) from error
    return vocabulary, scorer
