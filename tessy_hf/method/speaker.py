"""A speaker: an engine, its boundary predictor and its dialect. Teacher and student are two of them, in mirror image.

Describes itself by light data until :meth:`Speaker.start`, so that it can be pickled and fingerprinted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tessy_hf.boundary.predictor import BoundaryPredictor
from tessy_hf.dialects import Dialect, check_templates, detect, end_ids, render
from tessy_hf.engines.base import Engine
from tessy_hf.errors import SettingsError
from tessy_hf.trajectory import Message
from tessy_hf.vocabulary import Vocabulary


class Speaker:
    """One of the two authors.

    Args:
        engine: What writes.
        boundary: What says where this author's kind of text ends: a predictor, or a Hub id or folder of one. Where
            a method that alternates finds none, it takes the small one that comes with this package, with a warning.
        chat_template: A Jinja template to use in place of the tokenizer's own.
        template_options: Passed to the chat template, for instance ``{"reasoning_effort": "high"}`` for gpt-oss.

    Raises:
        SettingsError: ``engine`` is not an engine.
    """

    def __init__(
        self,
        engine: Engine,
        boundary: BoundaryPredictor | str | Path | None = None,
        *,
        chat_template: str | None = None,
        template_options: Mapping[str, Any] | None = None,
    ) -> None:
        if not callable(getattr(engine, "complete", None)):
            raise SettingsError(
                f"Speaker(engine=...) got a {type(engine).__name__}: {engine!r}. An engine is expected, "
                'for instance Speaker(TransformersEngine("Qwen/Qwen3-8B"), boundary=...).'
            )
        self.engine = engine
        self.boundary = BoundaryPredictor(str(boundary)) if isinstance(boundary, str | Path) else boundary
        self.chat_template = chat_template
        self.template_options = dict(template_options or {})
        self._live: tuple[Vocabulary, Dialect, frozenset[int], list[int]] | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """What decides this speaker's text, for the run's fingerprint."""
        return {
            "engine": self.engine.identity,
            "boundary": self.boundary.identity if self.boundary else None,
            "chat_template": self.chat_template,
            "template_options": self.template_options,
        }

    @property
    def vocabulary(self) -> Vocabulary:
        """The engine's vocabulary; loads the tokenizer on first use, never the model."""
        return self._tongue()[0]

    @property
    def dialect(self) -> Dialect:
        """How this model marks its thinking."""
        return self._tongue()[1]

    @property
    def end_ids(self) -> frozenset[int]:
        """The ids that end this model's thinking."""
        return self._tongue()[2]

    def _tongue(self) -> tuple[Vocabulary, Dialect, frozenset[int], list[int]]:
        if self._live is None:
            tokenizer = self.engine.tokenizer
            if self.chat_template is not None:
                tokenizer.chat_template = self.chat_template
            vocabulary = Vocabulary(tokenizer, self.engine.model)
            dialect = detect(vocabulary)
            _, marker, after = dialect.close.partition(dialect.end_marker)
            closing = vocabulary.encode_template(marker + after)
            self._live = vocabulary, dialect, end_ids(dialect, vocabulary), closing
        return self._live

    @property
    def close_ids(self) -> list[int]:
        """The ids from the mark that ends this model's thinking to where its answer begins."""
        return self._tongue()[3]

    def check_templates(self, *, student: bool) -> None:
        """Refuse templates that would lose thinking, before anything is generated.

        Raises:
            TemplateError: See :func:`tessy_hf.dialects.check_templates`.
        """
        check_templates(self.vocabulary, self.dialect, student=student, **self.template_options)

    def open_turn(self, messages: Sequence[Message]) -> tuple[list[int], str]:
        """Render an open assistant turn; return its ids and the whitespace it ends in.

        Raises:
            PromptError: The chat template refuses the messages.
        """
        text = render(self.vocabulary, self.dialect, messages, **self.template_options)
        return self.vocabulary.encode_template(text), text[len(text.rstrip()) :]

    async def start(self) -> None:
        """Make engine and predictor ready."""
        if self.boundary is not None:
            self.boundary.start()
        await self.engine.start()

    async def close(self) -> None:
        """Let go of engine and predictor."""
        if self.boundary is not None:
            self.boundary.close()
        await self.engine.close()

    def __getstate__(self) -> dict[str, Any]:
        """Pickle the description only."""
        return {**self.__dict__, "_live": None}
