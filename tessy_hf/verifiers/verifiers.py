"""Verifiers check whether a finished answer is right: a row's columns go in, a verdict comes out.

A verifier is any function of a row, a mapping with the input columns and the row's ``thinking``, ``answer`` and
``finish_reason``. It returns a bool or a number; 1 means right, and higher is better. It is called from threads, for
several rows at once. The verifiers here can be named in a recipe:

.. code-block:: yaml

    verifier: {name: number, column: reference_answer}

Knows nothing of models or of how rows are written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from decimal import Decimal, InvalidOperation
from secrets import token_hex
from typing import Any, ClassVar

from tessy_hf.errors import SettingsError
from tessy_hf.verifiers import sandbox

Verifier = Callable[[Mapping[str, Any]], bool | float]

_NUMBER = re.compile(r"[-+]?(?:\d[\d,]*)?\.?\d+(?:[eE][-+]?\d+)?")
_FENCED = re.compile(r"^```(?:python|py|python3)?[ \t]*\n(.*?)^```", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Exact:
    """The answer equals the expected text, up to whitespace."""

    name: ClassVar[str] = "exact"
    column: str = "reference_answer"

    def __call__(self, row: Mapping[str, Any]) -> bool:
        """Judge a row.

        Raises:
            ValueError: There is no expected text.
        """
        return str(row["answer"]).split() == _expected(row, self.column).split()


@dataclass(frozen=True)
class Number:
    """The last number in the answer equals the last number in the expected text."""

    name: ClassVar[str] = "number"
    column: str = "reference_answer"

    def __call__(self, row: Mapping[str, Any]) -> bool:
        """Judge a row.

        Raises:
            ValueError: The expected text has no number.
        """
        expected = _last_number(_expected(row, self.column))
        if expected is None:
            raise ValueError(f"column {self.column!r} is {row[self.column]!r}, in which there is no number")
        return _last_number(row["answer"]) == expected


def _expected(row: Mapping[str, Any], column: str) -> str:
    """Return what an answer is held against; a row that lacks it is nobody's fault but the prompts'.

    Raises:
        ValueError: There is none.
    """
    if row[column] is None:
        raise ValueError(f"column {column!r} is None; the expected text of each row is needed")
    return str(row[column])


def _last_number(text: str) -> Decimal | None:
    found = _NUMBER.findall(text.replace("\N{MINUS SIGN}", "-"))
    try:
        return Decimal(found[-1].replace(",", "")) if found else None
    except InvalidOperation:
        return None


@dataclass(frozen=True)
class MathVerify:
    """The answer is mathematically equal to the expected one by ``math-verify``: fractions, sets, intervals, LaTeX.

    Each comparison runs in its own process, because sympy may never finish with a formula.
    """

    name: ClassVar[str] = "math-verify"
    column: str = "reference_answer"
    seconds: float = 30.0
    memory_mb: int = 2048

    def __call__(self, row: Mapping[str, Any]) -> bool:
        """Judge a row.

        Raises:
            ValueError: The expected text is not mathematics.
        """
        texts = json.dumps([_expected(row, self.column), row["answer"]])
        limits: Any = {"seconds": self.seconds, "memory_mb": self.memory_mb}
        limits |= {"network": True, "files": True}  # runs only our own code
        code, output = sandbox.run({"main.py": _MATH}, texts, **limits)
        if output.strip() == "no gold":
            raise ValueError(f"column {self.column!r} is {row[self.column]!r}, which math-verify cannot read")
        return code == 0 and output.strip() == "True"

    def check(self) -> None:
        """Check before a run that ``math-verify`` works.

        Raises:
            SettingsError: It is not installed, or does not work.
        """
        if not self({self.column: "1/2", "answer": "$0.5$"}):
            raise SettingsError(
                'The verifier "math-verify" does not work on this machine: it did not find 1/2 equal to 0.5. '
                'Run: pip install "tessy-hf[math]"'
            )


_MATH = r"""
import json, sys
from math_verify import parse, verify
expected, answer = json.load(sys.stdin)
gold = parse(expected) or parse("$" + expected + "$")
print(verify(gold, parse(answer)) if gold else "no gold")
"""


@dataclass(frozen=True)
class PythonTests:
    """The program in the answer's last fenced block passes its tests in :mod:`tessy_hf.verifiers.sandbox`.

    The column holds Python code that uses the program's names, such as ``assert add(1, 2) == 3``, or a list, also as
    JSON, of ``{"input": ..., "output": ...}`` with the standard input and the expected standard output. ``network``
    and ``files`` let programs use the network, and read and write all that this user may.
    """

    name: ClassVar[str] = "python-tests"
    column: str = "tests"
    seconds: float = 10.0
    memory_mb: int = 1024
    network: bool = False
    files: bool = False

    def __call__(self, row: Mapping[str, Any]) -> bool:
        """Judge a row.

        Raises:
            ValueError: The column holds no tests.
            SandboxError: This system cannot keep programs from the network or from files.
        """
        blocks, tests = _FENCED.findall(row["answer"]), _tests(row[self.column])
        if tests is None:
            raise ValueError(
                f"column {self.column!r} is {row[self.column]!r}; expected is Python code or a list of "
                "{input, output}, both texts"
            )
        if not blocks:
            return False
        if isinstance(tests, str):
            return self._asserts(blocks[-1], tests)
        return all(self._prints(blocks[-1], test["input"], test["output"]) for test in tests)

    def _asserts(self, program: str, tests: str) -> bool:
        passed = token_hex(8)  # a program that exits early does not print it
        main = f"import sys\nsys.path.insert(0, '.')\nfrom solution import *\n{tests}\nprint({passed!r})\n"
        code, output = self._run({"solution.py": program, "main.py": main})
        return code == 0 and output.rstrip().endswith(passed)

    def _prints(self, program: str, given: str, expected: str) -> bool:
        code, output = self._run({"main.py": program}, given)
        return code == 0 and _lines(output) == _lines(expected)

    def _run(self, files: Mapping[str, str], stdin: str = "") -> sandbox.Finished:
        allowed = {"network": self.network, "files": self.files}
        return sandbox.run(files, stdin, seconds=self.seconds, memory_mb=self.memory_mb, **allowed)

    def check(self) -> None:
        """Check before a run that programs can be run on this machine.

        Raises:
            SandboxError: This system cannot keep programs from the network or from files.
            SettingsError: A correct program does not pass.
        """
        if not self._asserts("def one():\n    return 1\n", "assert one() == 1"):
            raise SettingsError(
                f"The verifier {self} cannot run the simplest program on this machine. Raise seconds or memory_mb."
            )


def _tests(given: Any) -> str | list[dict[str, str]] | None:
    """Return tests as code or as a list; ``None`` for what would test nothing: as code, JSON does nothing."""
    with suppress(ValueError):
        given = json.loads(given) if isinstance(given, str) else given
    if isinstance(given, list):
        pairs = [(test.get("input"), test.get("output")) if isinstance(test, Mapping) else (None,) for test in given]
        return given if pairs and all(isinstance(text, str) for pair in pairs for text in pair) else None
    return given if isinstance(given, str) and given.strip() else None


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().splitlines()]


VERIFIERS: dict[str, Any] = {kind.name: kind for kind in (Exact, Number, MathVerify, PythonTests)}


def build(given: Any) -> Verifier | None:
    """Build a verifier from a run's setting: a name, a mapping with ``name`` and arguments, a function, or ``None``.

    Raises:
        SettingsError: It is none of these, or the verifier does not take such an argument.
    """
    if given is None or callable(given):
        return given  # type: ignore[no-any-return]
    described = {"name": given} if isinstance(given, str) else given
    if isinstance(described, Mapping) and "function" in described:
        raise SettingsError(
            f"The verifier of this run was the function {described['function']!r}, whose code is not in its record. "
            "Pass it in Python: TessyTransform(..., verifier=function)."
        )
    name = described.get("name") if isinstance(described, Mapping) else None
    if name not in VERIFIERS:
        raise SettingsError(
            f"Unknown verifier {given!r}. Expected is a function of a row, or one of {', '.join(VERIFIERS)}, "
            'for instance verifier={"name": "number", "column": "reference_answer"}.'
        )
    try:
        made: Verifier = VERIFIERS[name](**{key: value for key, value in described.items() if key != "name"})
    except TypeError as error:
        raise SettingsError(
            f"The verifier {given!r} cannot be built: {error}. Arguments: "
            f"{', '.join(field.name for field in fields(VERIFIERS[name]))}."
        ) from error
    return made


def check(verifier: Any) -> None:
    """Call a verifier's own check of this machine, if it has one.

    Raises:
        SettingsError: The verifier does not work.
        SandboxError: This system cannot isolate programs as asked.
    """
    if hasattr(verifier, "check"):
        verifier.check()


def describe(given: Any) -> dict[str, Any] | None:
    """Describe a verifier by JSON values that decide its verdicts, for fingerprints and records."""
    made = build(given)
    if made is None:
        return None
    if type(made) in VERIFIERS.values():
        return {"name": type(made).name, **asdict(made)}  # type: ignore[attr-defined, call-overload]
    return describe_function(made)


def describe_function(function: Any) -> dict[str, Any]:
    """Describe a user's function by its name and a hash of its code, for fingerprints and records."""
    from datasets.fingerprint import Hasher

    kind = type(function) if not hasattr(function, "__qualname__") else function
    return {"function": f"{kind.__module__}.{kind.__qualname__}", "hash": Hasher.hash(function)}


def column(given: Any) -> str | None:
    """Return the input column that one of our verifiers reads, or ``None`` for a user's function."""
    made = build(given)
    return made.column if type(made) in VERIFIERS.values() else None  # type: ignore[union-attr]
