"""A speaker: an engine, its boundary predictor and its thinking format. Teacher and student are two of them.

A speaker is a light description until :meth:`Speaker.start`, so that it can be pickled and fingerprinted.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from tessy_hf.boundary.predictor import BoundaryPredictor
from tessy_hf.engines.base import Engine
from tessy_hf.engines.transformers import TransformersEngine
from tessy_hf.errors import PromptError, SettingsError
from tessy_hf.plan import Plan
from tessy_hf.text.thinking_format import FAMILIES, ThinkingFormat, check_templates, detect, end_ids, misfit, render
from tessy_hf.text.tool_rendering import check_tools
from tessy_hf.text.vocabulary import Vocabulary
from tessy_hf.trajectory import Author, Message, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_EXPECTED = (
    f"Expected is one of {', '.join(FAMILIES)}, or the markers: ThinkingFormat(open=..., close=..., end_marker=..., "
    "key=...), or ThinkingFormat(final_answer=...) for a model without thinking; in YAML as a mapping."
)


class _Tokenizer(NamedTuple):
    """The engine's tokenizer, read."""

    source: PreTrainedTokenizerBase
    vocabulary: Vocabulary
    thinking_format: ThinkingFormat
    end_ids: frozenset[int]
    closing: tuple[str, list[int]]


class Speaker:
    """One of the two authors.

    Args:
        engine: What writes.
        boundary: The predictor of where this author's kind of text ends, or its Hub id or folder. Methods that
            alternate use the small predictor shipped with this package if none is given, with a warning.
        chat_template: A Jinja template to use in place of the tokenizer's own.
        template_options: Passed to the chat template, for instance ``{"reasoning_effort": "high"}`` for gpt-oss.
        thinking_format: How the model marks its thinking, where that is not to be told from tokenizer and template:
            a family's name (:data:`tessy_hf.text.thinking_format.FAMILIES`; ``"none"`` for a model that does not
            think), a :class:`ThinkingFormat`, or its attributes as a mapping.

    Raises:
        SettingsError: ``engine`` is not an engine, or ``thinking_format`` is not a format.
    """

    def __init__(
        self,
        engine: Engine,
        boundary: BoundaryPredictor | str | Path | None = None,
        *,
        chat_template: str | None = None,
        template_options: Mapping[str, Any] | None = None,
        thinking_format: ThinkingFormat | str | Mapping[str, Any] | None = None,
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
        self.given_format = _format(thinking_format)
        self._loaded: _Tokenizer | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """What decides this speaker's text, for the run's fingerprint."""
        given = {} if self.given_format is None else {"thinking_format": asdict(self.given_format)}
        return {
            "engine": self.engine.identity,
            "boundary": self.boundary.identity if self.boundary else None,
            "chat_template": self.chat_template,
            "template_options": self.template_options,
            **given,
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
        source = self.engine.tokenizer
        if self._loaded is None or self._loaded.source is not source:
            tokenizer = source
            if self.chat_template is not None:
                tokenizer = copy.copy(source)  # another speaker may share the engine
                tokenizer.chat_template = self.chat_template
            vocabulary = Vocabulary(tokenizer, self.engine.model)
            found = detect(vocabulary, self.given_format, **self.template_options)
            before = found.close.partition(found.end_marker)[0] if found.thinks else ""
            closing = before, vocabulary.encode_template(found.close[len(before) :])
            self._loaded = _Tokenizer(source, vocabulary, found, end_ids(found, vocabulary), closing)
        return self._loaded

    @property
    def known_format(self) -> ThinkingFormat | None:
        """The thinking format as far as it is known without loading the tokenizer."""
        return self._loaded.thinking_format if self._loaded is not None else self.given_format

    @property
    def closing(self) -> tuple[str, list[int]]:
        """What stands between thinking and answer: text, then ids from the end marker on."""
        return self._tokenizer.closing

    @property
    def text_markers(self) -> tuple[str, ...]:
        """What ends this model's thinking as text: its end marker, unless that is a token, which is told by its id."""
        marker = self.thinking_format.end_marker
        return (marker,) if marker and self.vocabulary.token_id(marker) is None else ()

    def check(self, *, student: bool) -> None:
        """Refuse what cannot be used before a model is loaded: what engine and predictor say themselves, templates.

        Raises:
            TemplateError: See :meth:`check_templates`.
            EngineDeadError: The engine cannot run here, or has no tokenizer.
            BoundaryError: There is no such predictor.
        """
        for part in (self.engine, self.boundary):
            if callable(check := getattr(part, "check", None)):
                check()
        self.check_templates(student=student)

    def check_templates(self, *, student: bool) -> None:
        """Refuse templates that would lose thinking, before anything is generated.

        Raises:
            TemplateError: See :func:`tessy_hf.text.thinking_format.check_templates`.
        """
        check_templates(self.vocabulary, self.thinking_format, student=student, **self.template_options)

    def check_row(self, prompt: Prompt, thinking: str = "Okay.", answer: str = "Yes.") -> None:
        """Refuse a row in this model's format that would be trained on other text than was prompted and written.

        Args:
            prompt: Its prompt.
            thinking: Its thinking; before there is one, a sample.
            answer: Its answer.

        Raises:
            PromptError: It would, and where.
        """
        options = {**self.template_options, **({"tools": prompt.tools} if prompt.tools else {})}
        found = misfit(self.vocabulary, self.thinking_format, prompt.messages, thinking, answer, **options)
        if found is not None:
            raise PromptError(
                f"Row {prompt.key!r} would be trained on other text than was written: {found}. Leave such prompts "
                "out, or give the student a chat template that keeps the text: Speaker(..., chat_template=...)."
            )

    def open_turn(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None
    ) -> tuple[list[int], str]:
        """Render an open assistant turn; return its ids, and its end that a token may join with the first word.

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
        return self.vocabulary.encode_open(text)

    async def start(self) -> None:
        """Start engine and predictor: the engine first, so that a server that is not up is named at once."""
        await self.engine.start()
        if self.boundary is not None:
            await self.boundary.ready()

    async def close(self) -> None:
        """Close engine and predictor."""
        if self.boundary is not None:
            self.boundary.close()
        await self.engine.close()

    def __getstate__(self) -> dict[str, Any]:
        """Pickle the description only."""
        return {**self.__dict__, "_loaded": None}

    def __repr__(self) -> str:
        """Show what differs from a bare engine."""
        format_ = self.given_format
        given = {
            "boundary": self.boundary,
            "chat_template": self.chat_template and "...",
            "template_options": self.template_options,
            "thinking_format": next((name for name, one in FAMILIES.items() if one is format_), format_),
        }
        told = "".join(f", {name}={value!r}" for name, value in given.items() if value)
        return f"Speaker({self.engine!r}{told})"


Model: TypeAlias = Speaker | Engine | str | Path
"""What names an author: a speaker, an engine, or a model's Hub id or folder."""


def as_speaker(given: Model) -> Speaker:
    """Return a speaker; a Hub id or folder becomes one run by `transformers` in this process.

    Raises:
        SettingsError: It is none of these.
    """
    if isinstance(given, Speaker):
        return given
    return Speaker(TransformersEngine(given) if isinstance(given, str | Path) else given)


def _format(given: ThinkingFormat | str | Mapping[str, Any] | None) -> ThinkingFormat | None:
    """Read a thinking format: a family's name, or markers.

    Raises:
        SettingsError: It is neither, or contradicts itself.
    """
    if isinstance(given, str) and given in FAMILIES:
        return FAMILIES[given]
    try:
        made = ThinkingFormat(**given) if isinstance(given, Mapping) else given
        if isinstance(made, ThinkingFormat):
            re.compile(made.final_answer or "")
    except (TypeError, re.error) as error:
        raise SettingsError(f"thinking_format={given!r} cannot be used: {error}. {_EXPECTED}") from error
    if not isinstance(made, ThinkingFormat | None):
        raise SettingsError(f"thinking_format={given!r} is not a thinking format. {_EXPECTED}")
    if made is not None and (made.end_marker not in made.close or bool(made.open.strip()) != made.thinks):
        raise SettingsError(
            f"thinking_format={given!r} contradicts itself: `close` must contain `end_marker`, and a model that "
            f"thinks has `open` and `end_marker`, one that does not has neither. {_EXPECTED}"
        )
    return made


def check_pair(teacher: Speaker, student: Speaker, plan: Plan) -> None:
    """Refuse a method that needs thinking apart from the answer, for models that have none.

    Raises:
        SettingsError: The answer would have no author of its own.
    """
    formats: dict[Author, ThinkingFormat] = {"teacher": teacher.thinking_format, "student": student.thinking_format}
    thinkers: set[Author] = set(formats) if plan.alternates else {plan.first_author}
    if formats["student"].thinks:
        apart = formats[plan.answer].thinks or plan.answer not in thinkers
    else:
        marked = any(formats[author].thinks or formats[author].final_answer for author in thinkers)
        one_text = thinkers == {plan.answer} or (plan.alternates and plan.answer == "student")
        apart = marked or bool(formats["student"].final_answer) or one_text
    if not apart:
        raise SettingsError(
            f"The method {plan.method!r} lets the {plan.answer} write the final answer, but no one marks where the "
            "chain of thought ends: the models do not think apart. Pass a mark, for instance "
            'Speaker(..., thinking_format={"final_answer": "Final answer:"}), or method="tessy" or "student-only".'
        )
