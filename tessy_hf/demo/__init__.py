"""The miniature world: tiny models that really run, prompts for them and a verifier. See `recipes/miniature`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from tessy_hf.demo.world import prompts as prompts
from tessy_hf.demo.world import verify as verify
from tessy_hf.errors import SettingsError
from tessy_hf.transform import TessyTransform

_MODELS = Path(__file__).parent / "models"
TEACHER, STUDENT = _MODELS / "teacher", _MODELS / "student"
BOUNDARY_TEACHER, BOUNDARY_STUDENT = _MODELS / "boundary-teacher", _MODELS / "boundary-student"


def transform(
    engine: str = "transformers", student: Path = STUDENT, models: Path = _MODELS, **overrides: Any
) -> TessyTransform:
    """Return a ready transform over the miniature models.

    Args:
        engine: Which engine runs them: ``transformers`` or ``vllm``.
        student: The folder of another student of this world.
        models: The folder of another teacher of it, with ``boundary-teacher`` and ``boundary-student`` beside.
        **overrides: Settings, see :class:`tessy_hf.Settings`.

    Raises:
        SettingsError: The engine or a setting is unknown.
    """
    from tessy_hf.engines.transformers import TransformersEngine
    from tessy_hf.engines.vllm import VLLMEngine
    from tessy_hf.method.speaker import Speaker

    engines: dict[str, Any] = {
        "transformers": TransformersEngine,
        "vllm": partial(VLLMEngine, dtype="float32", max_model_len=2048),
    }
    if engine not in engines:
        raise SettingsError(f"Unknown engine {engine!r}. The miniature models run on: {', '.join(engines)}.")
    settings = {
        "id_column": "id",
        "chunk_tokens": 8,  # spans are short in this world
        "max_thinking_tokens": 160,
        "max_answer_tokens": 32,
        "rows_in_flight": 128,
    }
    return TessyTransform(
        teacher=Speaker(engines[engine](str(models / "teacher")), boundary=str(models / "boundary-teacher")),
        student=Speaker(engines[engine](str(student)), boundary=str(models / "boundary-student")),
        **{**settings, **overrides},
    )
