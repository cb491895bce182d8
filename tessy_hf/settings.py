"""Settings of a run: keyword arguments or YAML in, checked settings and their fingerprint out.

The table of methods is here. Knows nothing of how rows are written.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, Self, TypedDict, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_serializer

from tessy_hf.engines.base import Measure
from tessy_hf.errors import SettingsError
from tessy_hf.method import rules
from tessy_hf.plan import Plan, Sampling
from tessy_hf.trajectory import Author
from tessy_hf.verifiers import verifiers

SPEED = frozenset({"rows_in_flight", "journal", "parts", "request_timeout", "max_attempts"})
"""Settings that never change the rows: how fast and how safely a run goes."""

FORMAT = 5
"""Goes up when the same settings would give other rows or columns, so that cached results are not mixed up."""

_Path = Annotated[str, BeforeValidator(lambda given: os.fspath(given) if isinstance(given, os.PathLike) else given)]

Method = Literal[
    "tessy",
    "tessy-teacher-answer",
    "student-only",
    "teacher-only",
    "teacher-think",
    "teacher-answer",
    "teacher-mix",
    "teacher-reference",
    "teacher-score",
]

_AUTHORS: dict[str, tuple[Any, Any]] = {
    "tessy": ("alternate", "student"),
    "tessy-teacher-answer": ("alternate", "teacher"),
    "student-only": ("student", "student"),
    "teacher-only": ("teacher", "teacher"),
    "teacher-think": ("teacher", "student"),
    "teacher-answer": ("student", "teacher"),
    "teacher-reference": ("student", "student"),  # who is shown the teacher's answer
    "teacher-score": ("student", "student"),  # several times, and the teacher scores each
}

Value = TypeVar("Value")
PerAuthor = Annotated[dict[Author, Value], Field(min_length=2)]
"""A value for each author: ``{"teacher": 0.6, "student": 0.7}``."""

TokenCount = Annotated[int, Field(ge=1)]
Temperature = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(gt=0, le=1)]
Penalty = Annotated[float, Field(gt=0)]

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"chunk_tokens": 20, "temperature": 0.6},
    "authors": {"chunk_tokens": {"teacher": 10, "student": 5}, "temperature": 0.7, "top_p": 0.8, "top_k": 20},
}
"""Settings by the name of a preset: the paper's text, and its authors' released scripts (which read their predictors
with a window of 200 tokens and labels about the next token, as :class:`BoundaryPredictor` reads those checkpoints)."""

SCORED_CANDIDATES = 5
"""How many candidates the paper lets the teacher choose from."""


def nearest(name: str, known: Iterable[str], cutoff: float = 0.4) -> str:
    """Ask whether the nearest known name is meant; nothing where none is near."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f"Did you mean {near[0]!r}?" if near else ""


class Checked(BaseModel):
    """Settings given by name. Unknown names are refused with the nearest known one."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        """Put the fields' descriptions into ``help(cls)``."""
        told = {name: " ".join((field.description or "").split()) for name, field in cls.model_fields.items()}
        lines = [f"    {name}: {text}" for name, text in told.items()]
        cls.__doc__ = "\n".join([cls.__doc__ or "", "", "Attributes:", *lines])

    @classmethod
    def check(cls, **given: Any) -> Self:
        """Check settings given by name.

        Raises:
            SettingsError: A name is unknown or a value is out of range.
        """
        for name in given:
            if name not in cls.model_fields:
                known, near = f"Known: {', '.join(cls.model_fields)}.", nearest(name, cls.model_fields)
                said = f"{near} {known}" if near else f"{known} Leave it out."
                raise SettingsError(f"Unknown setting {name!r}. {said}")
        try:
            return cls(**given)
        except ValidationError as error:
            first = max(error.errors(), key=lambda fault: len(fault["loc"]))  # of several alternatives, the closest
            name = str(first["loc"][0])
            default = cls.model_fields[name].get_default(call_default_factory=True)
            raise SettingsError(
                f"Setting {name}={first['input']!r} cannot be used: {first['msg'].lower()}. "
                f"Pass for instance {name}={default!r}."
            ) from error


class Settings(Checked):
    """Settings of one run."""

    method: Method = "tessy"
    """The data recipe: who writes the thinking and who the answer (paper, section 3.4 and figure 9)."""
    switch: Annotated[Any, BeforeValidator(rules.build)] = Field(default="predictor", validate_default=True)
    """The rule that decides who writes next: "predictor" (the paper's, with boundary predictors); "entropy",
    "student-accepts", "likeliest" or "every" with a number, for instance ``{"every": 5}``; or a function of a word.
    See :mod:`tessy_hf.method.rules`."""
    chunk_tokens: TokenCount | Literal["auto"] | PerAuthor[TokenCount] = "auto"
    """k, the most tokens that an author is asked for at once: a number (the paper uses 20), one for each author, or
    "auto" to follow the lengths of each author's spans. It changes the speed; greedy rows do not depend on it."""
    stream: bool = False
    """Whether to request an author's turn as one stream, which is closed at the boundary, and not chunk by chunk.
    Engines that cannot stream are still asked for chunks. It changes the speed; greedy rows do not depend on it."""
    temperature: Temperature | PerAuthor[Temperature] = 0.6
    """Sampling temperature; 0 is greedy. The paper uses 0.6. Like all sampling settings it may be one number, or one
    for each author: ``{"teacher": 1.0, "student": 0.6}``."""
    top_p: Share | PerAuthor[Share] = 1.0
    """Nucleus sampling mass."""
    top_k: TokenCount | PerAuthor[TokenCount] | None = None
    """Sample only from this many most probable tokens; by default from all."""
    min_p: Share | PerAuthor[Share] | None = None
    """Sample only tokens whose probability is at least this share of the most probable token's."""
    repetition_penalty: Penalty | PerAuthor[Penalty] | None = None
    """Values above 1 make tokens less probable that are in the prompt or the text already. There are no frequency and
    presence penalties: servers count them per request, so rows would depend on how they are split into requests."""
    seed: int = 0
    """The run's seed. Tokens are sampled from (seed, row key, position), so a rerun gives the same rows."""
    max_thinking_tokens: int = Field(default=32_768, ge=1)
    """Budget of a row's thinking, in the student's tokens."""
    max_answer_tokens: int = Field(default=8_192, ge=1)
    """Budget of a row's final answer, in the answering model's tokens."""
    prompt_column: str = "prompt"
    """The column with the prompt: a string, or a list of chat messages ending in the user's turn."""
    id_column: str | None = None
    """The column with unique ids. Without one, rows are identified by their prompts, and equal prompts share a row."""
    best_of: int | None = Field(default=None, ge=1)
    """The most candidates to write for a row: by default 5 for ``teacher-score``, else 1. ``teacher-score`` writes all
    of them. With a verifier, they are written one after the other until one is right."""
    verifier: Any = None
    """Decides whether a finished candidate is right: the name of a verifier in :mod:`tessy_hf.verifiers.verifiers`, a
    mapping with its ``name`` and arguments, or a function of a row that returns a bool or a number (1 for right)."""
    chosen_by: Literal["rsr"] | None = None
    """Chooses among equally good candidates: ``rsr`` keeps the one with the lowest Rank-Surprisal Ratio under the
    student (arXiv 2601.14249). All ``best_of`` candidates are written; the score of each is its negative ratio."""
    system_prompt: str | None = None
    """A system message for both models, put before each prompt."""

    # What follows changes how fast and how safely a run goes, never what it writes: it is not in the fingerprint.
    rows_in_flight: Annotated[int, Field(ge=1)] | Literal["auto"] = 64
    """How many rows are written at the same time, across all batches: a number, or "auto" for as many as fit into the
    engines' caches."""
    journal: _Path | None = "auto"
    """Where rows are kept as they are written, so that a rerun can resume: a file, "auto" for a file next to the
    datasets cache, or None for no journal."""
    parts: _Path | None = None
    """A folder through which hosts share finished rows, as small Parquet files: a path, or any address that fsspec
    knows, such as ``s3://bucket/run``. Rows that are there are not written again."""
    request_timeout: float = Field(default=3600.0, gt=0)
    """Seconds that an engine or a predictor may take for one request. A row that waits longer fails and is tried
    again."""
    max_attempts: int = Field(default=3, ge=1)
    """How often a row whose engine failed is tried before the failure is final, over all runs with the same journal.
    Each try resumes from the last kept span."""

    @classmethod
    def check(cls, **given: Any) -> Self:
        """Check settings given by name; ``preset`` sets those of :data:`PRESETS` that are not given.

        Raises:
            SettingsError: A name is unknown, a value is out of range, or two values do not go together.
        """
        checked = super().check(**expand_preset(given))
        verifiers.build(checked.verifier)
        checked._check_candidates()
        checked.switch.check(checked.plan(""))
        return checked

    def _check_candidates(self) -> None:
        if self.max_candidates > 1 and not self.judged:
            raise SettingsError(
                f"Setting best_of={self.best_of} leaves nothing to choose by. Pass a verifier, for instance "
                'verifier="number", or method="teacher-score", or chosen_by="rsr".'
            )
        if self.scored and self.chosen_by:
            raise SettingsError(
                f"The method {self.method!r} chooses by the teacher's scores. Leave out chosen_by={self.chosen_by!r}, "
                "or pass another method."
            )
        if self.chosen_by and self.max_candidates == 1:
            raise SettingsError(
                f"Setting chosen_by={self.chosen_by!r} leaves nothing to choose from: best_of={self.best_of} is one "
                "candidate a row. Pass for instance best_of=4, or leave out chosen_by."
            )
        if self.max_candidates > 1 and not any(self.sampling(author).temperature for author in self.plan("").writers):
            raise SettingsError(
                f"At temperature=0 all {self.max_candidates} candidates of a row would be the same. Pass a higher "
                "temperature, for instance temperature=0.6, or best_of=1."
            )

    @field_serializer("verifier")
    def _describe(self, verifier: Any) -> dict[str, Any] | None:
        return verifiers.describe(verifier)

    @field_serializer("switch")
    def _describe_rule(self, rule: rules.Rule) -> dict[str, Any]:
        numbers = rule.model_dump()
        own = verifiers.describe_function(numbers.pop("function")) if "function" in numbers else numbers
        return {"name": rule.name, **own}

    @property
    def max_candidates(self) -> int:
        """The most candidates to write for a row."""
        return self.best_of or (SCORED_CANDIDATES if self.scored else 1)

    @property
    def scored(self) -> bool:
        """Whether the teacher scores the candidates."""
        return self.method == "teacher-score"

    @property
    def shows_reference(self) -> bool:
        """Whether the student is shown an answer of the teacher's."""
        return self.method == "teacher-reference"

    @property
    def judged(self) -> bool:
        """Whether candidates are judged, by the teacher, a verifier, or the student's likelihoods."""
        return self.scored or self.verifier is not None or self.chosen_by is not None

    @property
    def alternates(self) -> bool:
        """Whether the authors take turns within a row."""
        return self.method.startswith("tessy")

    @property
    def authors(self) -> frozenset[Author]:
        """The authors that are asked, for text or for scores. Of a student that is not, the tokenizer is read."""
        if self.scored or self.shows_reference or self.method == "teacher-mix":
            return frozenset(("teacher", "student"))
        return self.plan("").writers | ({"student"} if self.chosen_by else frozenset())

    def needs(self, author: Author) -> frozenset[Measure]:
        """Return what an author's engine must measure."""
        scores: frozenset[Measure] = frozenset({"score"} if self.chosen_by and author == "student" else ())
        return scores | (self.switch.needs(author) if self.alternates else frozenset())

    @property
    def reads_predictors(self) -> bool:
        """Whether boundary predictors say who writes next."""
        return self.alternates and bool(self.switch.reads_predictors)

    def sampling(self, author: Author) -> Sampling:
        """Return how an author's tokens are drawn."""
        given = {name: getattr(self, name) for name in Sampling._fields}
        return Sampling(**{name: value[author] if isinstance(value, dict) else value for name, value in given.items()})

    def plan(self, key: str) -> Plan:
        """Return who writes the row with this key, and how."""
        method: str = self.method
        if method == "teacher-mix":  # half of the rows each, decided by the row alone
            method = "teacher-only" if hashlib.sha256(key.encode()).digest()[0] % 2 else "student-only"
        thinking, answer = _AUTHORS[method]
        return Plan(
            method=self.method,
            thinking=thinking,
            answer=answer,
            switch=self.switch,
            chunk_tokens=None if self.chunk_tokens == "auto" else self.chunk_tokens,
            stream=self.stream,
            sampling={"teacher": self.sampling("teacher"), "student": self.sampling("student")},
            max_thinking_tokens=self.max_thinking_tokens,
            max_answer_tokens=self.max_answer_tokens,
            max_candidates=self.max_candidates,
            scored=self.scored,
            chosen_by=self.chosen_by,
            shows_reference=self.shows_reference,
        )

    def fingerprint(self, speakers: Mapping[str, Any]) -> str:
        """Return a hash of all that decides the rows: these settings and the speakers' identities."""
        unset = {name for name in ("top_k", "min_p", "repetition_penalty", "chosen_by") if getattr(self, name) is None}
        unset |= {"switch"} if self.switch == rules.PREDICTOR else set()
        settings = self.model_dump(exclude={*SPEED, *unset})
        described = {"format": FORMAT, "settings": settings, "speakers": dict(speakers)}
        return hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()[:16]


class GivenSettings(TypedDict, total=False):
    """The fields of :class:`Settings` and ``preset``, for editors and type checkers."""

    preset: Literal["paper", "authors"] | None
    method: Method
    switch: Any
    chunk_tokens: int | Literal["auto"] | dict[Author, int]
    stream: bool
    temperature: float | dict[Author, float]
    top_p: float | dict[Author, float]
    top_k: int | dict[Author, int] | None
    min_p: float | dict[Author, float] | None
    repetition_penalty: float | dict[Author, float] | None
    seed: int
    max_thinking_tokens: int
    max_answer_tokens: int
    prompt_column: str
    id_column: str | None
    best_of: int | None
    verifier: Any
    chosen_by: Literal["rsr"] | None
    system_prompt: str | None
    rows_in_flight: int | Literal["auto"]
    journal: str | os.PathLike[str] | None
    parts: str | os.PathLike[str] | None
    request_timeout: float
    max_attempts: int


def expand_preset(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with those of their ``preset`` in its place, where they are not given themselves.

    Raises:
        SettingsError: There is no such preset.
    """
    given = dict(given)
    name = given.pop("preset", None)
    if name is not None and str(name) not in PRESETS:
        raise SettingsError(f"Setting preset={name!r} is not known. Known: {', '.join(PRESETS)}. Pass one of these.")
    return {**PRESETS.get(str(name), {}), **given}
