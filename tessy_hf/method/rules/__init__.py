"""Rules of who writes next: the ``switch`` of a run. All work on words, so that vocabularies may differ."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pydantic import ValidationError

from tessy_hf.engines.base import Measure
from tessy_hf.errors import SettingsError
from tessy_hf.method.judging import Judge
from tessy_hf.method.rules.base import Rule, Word
from tessy_hf.method.rules.entropy import Entropy
from tessy_hf.method.rules.every import Every
from tessy_hf.method.rules.function import Function
from tessy_hf.method.rules.likeliest import Likeliest
from tessy_hf.method.rules.predictor import Predictor
from tessy_hf.method.rules.student_accepts import StudentAccepts
from tessy_hf.method.speaker import Speaker
from tessy_hf.plan import Plan
from tessy_hf.trajectory import Author

__all__ = ["PREDICTOR", "RULES", "Judge", "Rule", "Word", "build", "check_engines", "rule_of"]

RULES: dict[str, type[Rule]] = {rule.name: rule for rule in (Predictor, Entropy, StudentAccepts, Likeliest, Every)}
PREDICTOR = Predictor()
_EXPECTED = (
    f"Expected is one of {', '.join(RULES)}, with its numbers where it has some, for instance "
    'switch={"student-accepts": 0.1} or switch={"name": "entropy", "threshold": 1.0, "words": 10}, or a function of '
    "a word."
)


def build(given: Any) -> Rule:
    """Build a rule: from its name, ``{name: number}``, a mapping with ``name`` and numbers, or a function.

    Raises:
        SettingsError: It is none of these.
    """
    if isinstance(given, Rule):
        return given
    if callable(given):
        return Function(function=given)
    described = {"name": given} if isinstance(given, str) else given
    if isinstance(described, Mapping) and len(described) == 1 and "name" not in described:
        ((name, value),) = described.items()
        known = RULES[name].model_fields if name in RULES else {}
        numbers = {RULES[name].number if known else "": value}
        if isinstance(value, Mapping) and value.keys() <= known.keys():
            numbers = dict(value)
        described = {"name": name, **numbers}
    if isinstance(described, Mapping) and described.get("name") == Function.name:
        raise SettingsError(
            f"The rule of this run was the function {described.get('function')!r}, whose code is not in its record. "
            "Pass it in Python: TessyTransform(..., switch=function)."
        )
    name = described.get("name") if isinstance(described, Mapping) else None
    if name not in RULES:
        raise SettingsError(f"Setting switch={given!r} is not a rule of who writes next. {_EXPECTED}")
    try:
        return RULES[name].model_validate({key: value for key, value in described.items() if key != "name"})
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(map(str, fault["loc"]))
        raise SettingsError(
            f"Setting switch={given!r} cannot be used: {where}: {fault['msg'].lower()}. {_EXPECTED}"
        ) from error


def rule_of(plan: Plan) -> Rule:
    """Return the rule of a plan."""
    return PREDICTOR if plan.switch is None else plan.switch


def check_engines(needs: Callable[[Author], frozenset[Measure]], speakers: Mapping[Author, Speaker]) -> None:
    """Refuse started engines that cannot measure what a run needs.

    Raises:
        SettingsError: One cannot.
    """
    for author, speaker in speakers.items():
        lacking = needs(author) - getattr(speaker.engine, "measures", frozenset())
        if lacking:
            raise SettingsError(
                f"This run needs {' and '.join(sorted(lacking))} of the {author} {speaker.engine.model!r} (switch, "
                "chosen_by), which its engine cannot tell. TransformersEngine and VLLMEngine tell all, vLLM's servers "
                "logprobs and score, SGLang's servers score. Use one of these, or other settings."
            )
