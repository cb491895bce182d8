"""A model of which only the tokenizer is read: the student of ``teacher-only``. Loads, starts and asks nothing."""

from __future__ import annotations

import sys
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tessy_hf.engines.base import Completion, Engine, Measure, Request, Scores
from tessy_hf.engines.model_files import ModelFiles
from tessy_hf.errors import EngineDeadError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TokenizerOnly:
    """Stands for an engine that is not asked for text.

    Args:
        engine: The engine whose tokenizer is read, or a Hub id or folder.
        **options: As for :class:`~tessy_hf.engines.transformers.TransformersEngine`, for a Hub id or folder.
    """

    streams, cache_tokens, context_length = False, None, sys.maxsize
    measures: frozenset[Measure] = frozenset()

    def __init__(self, engine: Engine | str | Path, **options: Any) -> None:
        from tessy_hf.engines.transformers import TransformersEngine

        self._engine: Engine = TransformersEngine(engine, **options) if isinstance(engine, (str, Path)) else engine
        self.model = self._engine.model
        given: ModelFiles | None = getattr(self._engine, "files", None)
        self.files = given and ModelFiles(given.model, given.revision, weights=False)

    @property
    def identity(self) -> dict[str, Any]:
        """The tokenizer's files, whatever engine the model has; asks no server."""
        identity = self.files.identity if self.files is not None else self._engine.identity
        return {**identity, "engine": "tokenizer"}

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        return self._engine.tokenizer

    async def start(self) -> None:
        """Start nothing."""

    async def complete(self, request: Request) -> Completion:
        """Refuse: there is no model.

        Raises:
            EngineDeadError: Always.
        """
        raise EngineDeadError(
            f"Row {request.row!r} asks {self.model!r} for text, of which only the tokenizer is used. An engine is "
            "expected for a method in which this model writes; pass one."
        )

    async def stream(self, request: Request) -> AsyncGenerator[Completion, None]:
        """Refuse, as :meth:`complete` does."""
        yield await self.complete(request)

    async def score(self, prompt_ids: Sequence[int], ids: Sequence[int], *, row: str = "", order: int = 0) -> Scores:
        """Refuse: there is no model.

        Raises:
            EngineDeadError: Always.
        """
        raise EngineDeadError(
            f"{self.model!r} is asked to score a text, but only its tokenizer is used. Pass an engine for it."
        )

    def release(self, row: str) -> None:
        """Keep nothing of rows."""

    async def close(self) -> None:
        """Close nothing."""

    def __repr__(self) -> str:
        return f"TokenizerOnly({self.model!r})"
