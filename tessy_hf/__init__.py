"""Cooperative teacher-student synthesis of reasoning data (TESSY, arXiv 2604.14164) as a `datasets` transform.

Names are loaded on first use, so that importing the package is quick and needs neither torch nor vllm.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tessy_hf.boundary.predictor import BoundaryPredictor as BoundaryPredictor
    from tessy_hf.boundary_training.annotate import annotate as annotate
    from tessy_hf.boundary_training.train import train_boundary as train_boundary
    from tessy_hf.engines.base import Completion as Completion
    from tessy_hf.engines.base import Engine as Engine
    from tessy_hf.engines.base import Request as Request
    from tessy_hf.engines.scripted import Script as Script
    from tessy_hf.engines.scripted import ScriptedEngine as ScriptedEngine
    from tessy_hf.engines.server import ServerEngine as ServerEngine
    from tessy_hf.engines.transformers import TransformersEngine as TransformersEngine
    from tessy_hf.engines.vllm import VLLMEngine as VLLMEngine
    from tessy_hf.errors import TessyError as TessyError
    from tessy_hf.hub.boundary_models import push_boundary as push_boundary
    from tessy_hf.hub.push import push_to_hub as push_to_hub
    from tessy_hf.method.speaker import Speaker as Speaker
    from tessy_hf.report.show import show as show
    from tessy_hf.settings import Settings as Settings
    from tessy_hf.text.thinking_format import ThinkingFormat as ThinkingFormat
    from tessy_hf.transform import TessyTransform as TessyTransform

__version__ = "0.1.0"

_HOMES = {
    "BoundaryPredictor": "tessy_hf.boundary.predictor",
    "Completion": "tessy_hf.engines.base",
    "Engine": "tessy_hf.engines.base",
    "Request": "tessy_hf.engines.base",
    "Script": "tessy_hf.engines.scripted",
    "ScriptedEngine": "tessy_hf.engines.scripted",
    "ServerEngine": "tessy_hf.engines.server",
    "Settings": "tessy_hf.settings",
    "Speaker": "tessy_hf.method.speaker",
    "TessyError": "tessy_hf.errors",
    "TessyTransform": "tessy_hf.transform",
    "ThinkingFormat": "tessy_hf.text.thinking_format",
    "TransformersEngine": "tessy_hf.engines.transformers",
    "VLLMEngine": "tessy_hf.engines.vllm",
    "push_to_hub": "tessy_hf.hub.push",
    "show": "tessy_hf.report.show",
    "annotate": "tessy_hf.boundary_training.annotate",
    "push_boundary": "tessy_hf.hub.boundary_models",
    "train_boundary": "tessy_hf.boundary_training.train",
}

__all__ = [*_HOMES, "__version__", "demo"]  # noqa: PLE0604 - computed from one table


def __getattr__(name: str) -> Any:
    if name == "demo":
        return import_module("tessy_hf.demo")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'tessy_hf' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
