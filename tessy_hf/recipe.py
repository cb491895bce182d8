"""A run described in YAML: settings by name, and the two speakers. Secrets come from the environment, never from it.

.. code-block:: yaml

    method: tessy
    chunk_tokens: 20
    teacher:
      engine: transformers
      model: Qwen/Qwen3-8B
      boundary: {model: me/boundary-teacher, label_shift: 0}
    student:
      engine: transformers
      model: Qwen/Qwen3-0.6B
      boundary: me/boundary-student
"""

from __future__ import annotations

import difflib
import inspect
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tessy_hf.boundary.predictor import BoundaryPredictor
from tessy_hf.engines.base import Engine
from tessy_hf.engines.server import ServerEngine
from tessy_hf.engines.tokenizer_only import TokenizerOnly
from tessy_hf.engines.transformers import TransformersEngine
from tessy_hf.engines.vllm import VLLMEngine
from tessy_hf.errors import SettingsError
from tessy_hf.method.speaker import Speaker
from tessy_hf.settings import Settings, nearest

Read = TypeVar("Read", bound=BaseModel)

ENGINES: dict[str, Any] = {
    "transformers": TransformersEngine, "vllm": VLLMEngine, "server": ServerEngine, "tokenizer": TokenizerOnly
}  # fmt: skip


_EXPECTED = "settings by name, `teacher` and `student` with `engine`, `model` and `boundary`, and perhaps `cluster`"


class _Boundary(BaseModel):
    model_config = ConfigDict(extra="forbid")

    model: str
    revision: str | None = None
    label_shift: int | None = None
    style_label: int | None = None
    window: int | None = None
    device: str | None = None
    engine: Literal["transformers", "vllm", "server"] = "transformers"
    options: dict[str, Any] = Field(default_factory=dict)


class _Speaker(BaseModel):
    model_config = ConfigDict(extra="forbid")

    engine: str = "transformers"
    model: str
    options: dict[str, Any] = Field(default_factory=dict)
    boundary: str | _Boundary | None = None
    chat_template: str | None = None
    template_options: dict[str, Any] = Field(default_factory=dict)
    thinking_format: str | dict[str, str] | None = None


class Placement(BaseModel):
    """Resources of a run on a Ray cluster: ``cluster`` in a recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    actors: int = Field(default=1, ge=1)
    """Actors that write rows, each with ``rows_in_flight`` rows at a time."""
    num_cpus: float = Field(default=1, ge=0)
    """CPU cores per actor, for predictors and engines that run in it."""
    num_gpus: float = Field(default=0, ge=0)
    """GPUs per actor, for engines and predictors that run in it; 0 if the engines are servers."""
    resources: dict[str, float] = Field(default_factory=dict)
    """Custom Ray resources per actor, which decide where it may run."""


class _Recipe(BaseModel):
    model_config = ConfigDict(extra="allow")

    teacher: _Speaker | None = None
    student: _Speaker
    cluster: Placement | None = None


class _Annotation(BaseModel):
    model_config = ConfigDict(extra="allow")

    annotator: _Speaker


def read_annotation(path: Path) -> tuple[Speaker, dict[str, Any]]:
    """Read an annotation recipe: ``annotator``, described like a speaker, and annotation settings by name.

    Raises:
        SettingsError: The file is missing or not YAML, or a key is missing, unknown or has a wrong value.
    """
    expected = "annotation settings by name, and `annotator` with `engine` and `model`"
    recipe = _validate(_Annotation, _content(path), path, expected)
    return _speaker(recipe.annotator, path), dict(recipe.model_extra or {})


def read_training(path: Path) -> dict[str, Any]:
    """Read a recipe for training a predictor: training settings by name, and perhaps ``data`` and ``extra``.

    Raises:
        SettingsError: The file is missing or not YAML, or is not a mapping.
    """
    given = _content(path)
    if not isinstance(given, dict):
        raise SettingsError(f"The recipe {str(path)!r} holds {given!r}. Expected are training settings by name.")
    return given


def read(path: Path, changes: Iterable[str] = ()) -> tuple[Speaker | None, Speaker, dict[str, Any]]:
    """Read a recipe; return teacher, where there is one, student and the settings.

    Args:
        path: The file.
        changes: Overrides, such as ``temperature=0.5`` or ``teacher.options.base_url=http://...``.

    Raises:
        SettingsError: The file is missing or not YAML, or a key is missing, unknown or has a wrong value.
    """
    return build(_content(path), path, changes)


def read_placement(path: Path, changes: Iterable[str] = ()) -> Placement:
    """Read the ``cluster`` section of a recipe; one actor by default.

    Raises:
        SettingsError: As for :func:`read`.
    """
    given = _content(path)
    for change in changes:
        _change(given, change)
    return _validate(_Recipe, given, path, _EXPECTED).cluster or Placement()


def build(given: Any, path: Path | str, changes: Iterable[str] = ()) -> tuple[Speaker | None, Speaker, dict[str, Any]]:
    """Build teacher, student and settings from a recipe's content; ``path`` names it in errors.

    Raises:
        SettingsError: A key is missing, unknown or has a wrong value.
    """
    for change in changes:
        _change(given, change)
    recipe = _validate(_Recipe, given, path, _EXPECTED)
    try:
        json.dumps(given, sort_keys=True, default=str)  # the fingerprint needs it
    except (TypeError, ValueError, RecursionError) as error:
        raise SettingsError(
            f"The recipe {str(path)!r} cannot be written as JSON: {error}. Plain values are expected, no anchors that "
            "contain themselves and no mappings with keys of several kinds; put quotes around such keys."
        ) from error
    settings = dict(recipe.model_extra or {})
    for name in settings.keys() - {*Settings.model_fields, "preset"}:  # settings and sections are one level of YAML
        if hint := nearest(name, ("teacher", "student", "cluster"), 0.7):
            raise SettingsError(f"The recipe {str(path)!r} has an unknown key {name!r}. {hint}")
    checked = Settings.check(**settings)
    if recipe.teacher is None and "teacher" in checked.authors:
        raise SettingsError(
            f"The recipe {str(path)!r} has no `teacher`, and the method {checked.method!r} needs one. Expected: "
            f"{_EXPECTED}; or method: student-only."
        )
    teacher = _speaker(recipe.teacher, path) if recipe.teacher is not None else None
    return teacher, _speaker(recipe.student, path), settings


def _content(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    # PyYAML also raises plain Python errors if a tagged value cannot be built.
    except (OSError, yaml.YAMLError, ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise SettingsError(f"The recipe {str(path)!r} cannot be read: {error}. A YAML file is expected.") from error


def _validate(kind: type[Read], given: Any, path: Path | str, expected: str) -> Read:
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        first = max(error.errors(), key=lambda fault: len(fault["loc"]))  # of several alternatives, the closest match
        parts = [str(part) for part in first["loc"]]  # among them the names of alternatives
        where = ".".join(part for part in parts if part != _Boundary.__name__) or "the file"
        hint = _hint(first, given)
        raise SettingsError(
            f"The recipe {str(path)!r} is invalid at {where}: {first['msg'].lower()}. {hint}Expected: {expected}."
        ) from error


def _hint(fault: Any, given: Any) -> str:
    """Name the known key that is meant, for one that is unknown, or the unknown one for one that is missing."""
    *above, last = map(str, fault["loc"] or ("",))
    if fault["type"] == "extra_forbidden":
        kinds: dict[str, type[BaseModel]] = {"boundary": _Boundary, "cluster": Placement}
        kind = kinds.get(str((above[1:2] or above)[0]), _Speaker)
        hint = nearest(last, kind.model_fields, 0.6)
        if not hint and "options" in kind.model_fields:
            hint = f"What its engine takes goes under `options`: {last}."
    elif fault["type"] == "missing" and isinstance(given, dict):
        inner = given
        for name in above:
            inner = inner.get(name, {})
        near = difflib.get_close_matches(last, map(str, inner), n=1, cutoff=0.7)
        hint = f"Write {last!r} in place of {near[0]!r}." if near else ""
    else:
        return ""
    return f"{hint} " if hint else ""


def _change(given: Any, change: str) -> None:
    """Override one value by its dotted name."""
    name, sign, value = change.partition("=")
    *above, last = name.split(".")
    inner = given
    for part in above:
        if part == "boundary" and isinstance(inner, dict) and isinstance(inner.get(part), str):
            inner[part] = {"model": inner[part]}
        inner = inner.setdefault(part, {}) if isinstance(inner, dict) else None
    if not (sign and last and isinstance(inner, dict)):
        raise SettingsError(
            f"{change!r} is not an override. Expected NAME=VALUE with a dotted name, for instance "
            "--set teacher.options.base_url=http://127.0.0.1:8000/v1."
        )
    try:
        inner[last] = yaml.safe_load(value)
    except (yaml.YAMLError, ValueError) as error:  # of a date that there is not
        raise SettingsError(f"{change!r} is not an override: {error}. A YAML value is expected.") from error


def _speaker(described: _Speaker, path: Path | str) -> Speaker:
    boundary = described.boundary
    predictor: BoundaryPredictor | str | None
    if isinstance(boundary, _Boundary):
        predictor = BoundaryPredictor(**boundary.model_dump(exclude={"options"}), **boundary.options)
    else:
        predictor = boundary
    return Speaker(
        _engine(described, path),
        predictor,
        chat_template=described.chat_template,
        template_options=described.template_options,
        thinking_format=described.thinking_format,
    )


def _engine(described: _Speaker, path: Path | str) -> Engine:
    if described.engine not in ENGINES:
        raise SettingsError(
            f"The recipe {str(path)!r} asks for the engine {described.engine!r}. Known: {', '.join(ENGINES)}. "
            f"{nearest(described.engine, ENGINES)}"
        )
    known = [*inspect.signature(ENGINES[described.engine]).parameters]
    for name in described.options.keys() - {*known}:  # what goes on to the engine's own library is known there only
        if hint := nearest(name, known, 0.85):
            raise SettingsError(f"The recipe {str(path)!r} has the option {name!r} for {described.model!r}. {hint}")
    try:
        engine: Engine = ENGINES[described.engine](described.model, **described.options)
    except TypeError as error:
        raise SettingsError(
            f"The recipe {str(path)!r} has options that the engine does not accept: {error}."
        ) from error
    return engine
