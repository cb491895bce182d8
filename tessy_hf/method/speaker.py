"""A speaker: an engine, its boundary predictor and its thinking format. Teacher and student are two of them.

A speaker is a light description until :meth:`Speaker.start`, so that it can be pickled and fingerprinted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tessy_hf.boundary.predictor import BoundaryPredictor
from tessy_hf.engines.base import Engine
from tessy_hf.errors import SettingsError
from tessy_hf.text.thinking_format import ThinkingFormat, check_templates, detect, end_ids, render
from tessy_hf.text.tool_rendering import check_tools
from tessy_hf.text.vocabulary import Vocabulary
from tessy_hf.trajectory import Message


class _Tokenizer(NamedTuple):
    """The engine's tokenizer, read."""

    vocabulary: Vocabulary
    thinking_format: ThinkingFormat
    end_ids: frozenset[int]
    close_ids: list[int]


class Speaker:
    """One of the two authors.

    Args:
        engine: What writes.
        boundary: The predictor of where this author's kind of text ends, or its Hub id or folder. Methods that
            alternate use the small predictor shipped with this package if none is given, with a warning.
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
        self._loaded: _Tokenizer | None = None

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
        """The engine's vocabulary. Loads the tokenizer on first use, never the model."""
        return self._tokenizer.vocabulary

    @property
    def thinking_format(self) -> ThinkingFormat:
        """How this model marks its thinking."""
        return self._tokenizer.thinking_format

    @property
    def end_ids(self) -> frozenset[int]:
        """The ids that end this model's thinking."""
        return self._tokenizer.end_ids

    @property
    def _tokenizer(self) -> _Tokenizer:
        tokenizer = self.engine.tokenizer
        if self._loaded is None or self._loaded.vocabulary.tokenizer is not tokenizer:
            if self.chat_template is not None:
                tokenizer.chat_template = self.chat_template
            vocabulary = Vocabulary(tokenizer, self.engine.model)
            found = detect(vocabulary)
            _, marker, after = found.close.partition(found.end_marker)
            closing = vocabulary.encode_template(marker + after)
            self._loaded = _Tokenizer(vocabulary, found, end_ids(found, vocabulary), closing)
        return self._loaded

    @property
    def close_ids(self) -> list[int]:
        """The ids from the marker that ends this model's thinking up to its answer."""
        return self._tokenizer.close_ids

    def check_templates(self, *, student: bool) -> None:
        """Refuse templates that would lose thinking, before anything is generated.

        Raises:
            TemplateError: See :func:`tessy_hf.text.thinking_format.check_templates`.
        """
        check_templates(self.vocabulary, self.thinking_format, student=student, **self.template_options)

    def open_turn(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None
    ) -> tuple[list[int], str]:
        """Render an open assistant turn; return its ids and its trailing whitespace.

        Args:
            messages: The chat.
            tools: JSON schemas of tools that the model may call.

        Raises:
            PromptError: The chat template refuses the messages, or leaves out tools, their calls or their results.
        """

        def rendered(messages: Sequence[Message], tools: Any) -> str:
            options = {**self.template_options, **({"tools": tools} if tools else {})}
            return render(self.vocabulary, self.thinking_format, messages, **options)

        text = rendered(messages, tools)
        check_tools(rendered, text, messages, tools, self.engine.model)
        return self.vocabulary.encode_template(text), text[len(text.rstrip()) :]

    async def start(self) -> None:
        """Start engine and predictor."""
        if self.boundary is not None:
            self.boundary.start()
        await self.engine.start()

    async def close(self) -> None:
        """Close engine and predictor."""
        if self.boundary is not None:
            self.boundary.close()
        await self.engine.close()

    def __getstate__(self) -> dict[str, Any]:
        """Pickle the description only."""
        return {**self.__dict__, "_loaded": None}
