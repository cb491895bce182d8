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

import json
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tessy_hf.boundary.predictor import BoundaryPredictor
from tessy_hf.engines.base import Engine
from tessy_hf.engines.server import ServerEngine
from tessy_hf.engines.transformers import TransformersEngine
from tessy_hf.engines.vllm import VLLMEngine
from tessy_hf.errors import SettingsError
from tessy_hf.settings import Settings
from tessy_hf.speaker import Speaker

ENGINES: dict[str, Any] = {"transformers": TransformersEngine, "vllm": VLLMEngine, "server": ServerEngine}


class _Boundary(BaseModel):
    model_config = ConfigDict(extra="forbid")

    model: str
    revision: str | None = None
    label_shift: int | None = None
    style_label: int | None = None
    window: int | None = None
    device: str | None = None


class _Speaker(BaseModel):
    model_config = ConfigDict(extra="forbid")

    engine: str
    model: str
    options: dict[str, Any] = Field(default_factory=dict)
    boundary: str | _Boundary | None = None
    chat_template: str | None = None
    template_options: dict[str, Any] = Field(default_factory=dict)


class _Recipe(BaseModel):
    model_config = ConfigDict(extra="allow")

    teacher: _Speaker
    student: _Speaker


def read(path: Path) -> tuple[Speaker, Speaker, dict[str, Any]]:
    """Read a recipe; return teacher, student and the settings.

    Raises:
        SettingsError: The file is missing, is not YAML, or lacks or misspells something.
    """
    given = _load(path)
    try:
        recipe = _Recipe.model_validate(given)
    except ValidationError as error:
        first = max(error.errors(), key=lambda fault: len(fault["loc"]))  # of alternatives, the one that was meant
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise SettingsError(
            f"The recipe {str(path)!r} has a fault at {where}: {first['msg'].lower()}. Expected are settings by name, "
            "and `teacher` and `student` with `engine`, `model` and `boundary`."
        ) from error
    try:
        json.dumps(given, sort_keys=True, default=str)  # as for the fingerprint
    except (TypeError, ValueError, RecursionError) as error:
        raise SettingsError(
            f"The recipe {str(path)!r} cannot be written as JSON: {error}. Plain values are expected, no anchors that "
            "contain themselves and no mappings with keys of several kinds; put quotes around such keys."
        ) from error
    settings = dict(recipe.model_extra or {})
    Settings.check(**settings)
    return _speaker(recipe.teacher, path), _speaker(recipe.student, path), settings


def _load(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    # Besides its own errors, PyYAML lets those through in which a value of a stated type cannot be made.
    except (OSError, yaml.YAMLError, ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise SettingsError(f"The recipe {str(path)!r} cannot be read: {error}. A YAML file is expected.") from error


def _speaker(described: _Speaker, path: Path) -> Speaker:
    boundary = described.boundary
    predictor = BoundaryPredictor(**boundary.model_dump()) if isinstance(boundary, _Boundary) else boundary
    return Speaker(
        _engine(described, path),
        predictor,
        chat_template=described.chat_template,
        template_options=described.template_options,
    )


def _engine(described: _Speaker, path: Path) -> Engine:
    if described.engine not in ENGINES:
        raise SettingsError(
            f"The recipe {str(path)!r} asks for the engine {described.engine!r}. Known: {', '.join(ENGINES)}."
        )
    try:
        engine: Engine = ENGINES[described.engine](described.model, **described.options)
    except TypeError as error:
        raise SettingsError(f"The recipe {str(path)!r} has options the engine does not take: {error}.") from error
    return engine
