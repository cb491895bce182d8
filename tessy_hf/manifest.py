"""The record of a run and the manifest of a release, as JSON that stays readable for years.

What is the same for all rows of a run goes in (speakers, settings, prompts, this machine), a :class:`RunRecord` comes
out. A release on the Hub has the records of its runs in its :class:`Manifest`, whose JSON Schema ships as
``manifest.schema.json``. Knows nothing of the Hub and of how rows are written.

Nothing secret or personal enters: no tokens, no server addresses, no host or user names, and of folders outside the
working directory only their last name.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field

from tessy_hf.engines.model_files import cached_commit, digest
from tessy_hf.settings import SPEED, Settings

if TYPE_CHECKING:
    from tessy_hf.boundary.predictor import BoundaryPredictor
    from tessy_hf.engines.model_files import ModelFiles
    from tessy_hf.method.speaker import Speaker

SCHEMA_VERSION: Literal[1] = 1
"""Raised when the previous code could not read a manifest of this version."""

SCHEMA_FILE = Path(__file__).with_name("manifest.schema.json")
"""The manifest's JSON Schema, as published with the package."""

LIBRARIES = ("datasets", "huggingface-hub", "tessy-hf", "tokenizers", "torch", "transformers", "vllm")


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ModelRecord(_Record):
    """A model, as exactly as it is known here."""

    name: str
    """Hub id, or the folder's path below the working directory, else the folder's name."""
    revision: str | None = None
    """The commit on the Hub that was loaded; null where it is not known (a folder, a model behind a server)."""
    requested_revision: str | None = None
    """The requested branch, tag or commit."""
    digest: str | None = None
    """For a folder: a SHA-256 of its weights, configuration, tokenizer and chat template."""
    root: str | None = None
    """For a model behind a server: the Hub id or the folder's last name that it says is served under this name."""


class BoundaryRecord(_Record):
    """A boundary predictor and how its labels are read, where that was stated."""

    model: ModelRecord
    label_shift: int | None = None
    style_label: int | None = None
    window: int | None = None


class SpeakerRecord(_Record):
    """One of the two authors."""

    engine: str
    """``transformers``, ``vllm``, ``server`` or another engine's name."""
    model: ModelRecord
    options: dict[str, Any] = Field(default_factory=dict)
    """Other options that decide the engine's text, such as ``dtype`` and ``quantization``."""
    tokenizer: ModelRecord | None = None
    """The tokenizer, where it is not the model's own."""
    boundary: BoundaryRecord | None = None
    chat_template: str | None = None
    """The template used in place of the tokenizer's own."""
    template_options: dict[str, Any] = Field(default_factory=dict)
    thinking_format: dict[str, Any] | None = None
    """Markers and message key; null where neither given nor read from the tokenizer."""


class SourceRecord(_Record):
    """The prompts."""

    id: str | None = None
    """The dataset on the Hub, or the name of the files' format."""
    config: str | None = None
    split: str | None = None
    revision: str | None = None
    """The commit on the Hub."""
    fingerprint: str | None = None
    """Hash of the rows that went into the transform; null where a stream has no reproducible one."""


class HardwareRecord(_Record):
    """The machine a run was started on."""

    system: str
    machine: str
    python: str
    cores: int
    memory_gib: float | None = None
    gpus: list[str] = Field(default_factory=list)


class RunRecord(_Record):
    """What is the same for all rows of one run."""

    fingerprint: str
    """The hash of everything that decides the rows; their ``run_fingerprint``."""
    recipe: str | None = None
    """The YAML file that describes it: its path below the working directory, else its name; or a release."""
    method: str | None = None
    settings: dict[str, Any] = Field(default_factory=dict)
    """All settings that decide the rows, and ``rows_in_flight``."""
    teacher: SpeakerRecord | None = None
    """Null where the method asks no teacher."""
    student: SpeakerRecord | None = None
    """Null where only the fingerprint is known, as for rows of another process that come without a manifest."""
    source: SourceRecord | None = None
    libraries: dict[str, str] = Field(default_factory=dict)
    """Versions by distribution name."""
    hardware: HardwareRecord | None = None
    begun: str | None = None
    """When the run, or its last continuation, began: UTC, ISO 8601."""


class ShardRecord(_Record):
    """One Parquet file of a release."""

    path: str
    rows: int
    bytes: int
    sha256: str


class SplitRecord(_Record):
    """One split of a release."""

    rows: int
    bytes: int
    """Of the Parquet files."""
    uncompressed_bytes: int
    """In memory, as Arrow."""
    shards: list[ShardRecord]


class Counts(_Record):
    """How many rows there are and how they ended."""

    rows: int
    """In the pushed split."""
    failed: int
    """Failed or incomplete: in the split of failures, or left out, as ``Manifest.failures`` says."""
    given: int = 0
    """The rows this push was given, those included that were there already."""
    unfinished: int = 0
    """In progress in the journal, hence in no split."""
    finish_reasons: dict[str, int] = Field(default_factory=dict)
    """Over all of these, failed ones included."""
    runs: dict[str, int] = Field(default_factory=dict)
    """Rows by run fingerprint, failed ones included."""


class License(_Record):
    """The license, as the user gave it; the names are those of the Hub's card metadata."""

    license: str | None = None
    """An identifier the Hub knows, such as ``apache-2.0`` or ``other``."""
    license_name: str | None = None
    license_link: str | None = None


class Manifest(_Record):
    """The record of one split of one release, stored beside the data."""

    schema_version: Literal[1] = SCHEMA_VERSION
    version: str
    """The release, ``1.0.0`` for the tag ``v1.0.0``."""
    appends_to: str | None = None
    """The release whose rows this one contains and adds to."""
    config_name: str = "default"
    split: str = "train"
    failures_split: str | None = None
    """Where failed and incomplete rows are, if there are any and they were kept."""
    failures: Literal["split", "drop"] = "split"
    """Whether failed and incomplete rows got a split of their own or were left out."""
    complete: list[str] = Field(default_factory=lambda: ["stop"])
    """The finish reasons that count as complete."""
    runs: list[RunRecord] = Field(default_factory=list)
    """One, unless rows of several runs were put together."""
    counts: Counts
    splits: dict[str, SplitRecord]
    """The split and, where there is one, that of its failures."""
    features: list[Any] = Field(default_factory=list)
    """The columns and their types, as in a dataset card's ``dataset_info``."""
    license: License = Field(
        default_factory=License,
        validation_alias=AliasChoices("licence", "license"),
        serialization_alias="licence",
    )
    """Stored under the name ``licence``."""
    begun: str
    """When the push began: UTC, ISO 8601."""
    finished: str
    """When all rows were written."""
    pushed_with: dict[str, str] = Field(default_factory=dict)
    """Versions of the libraries that pushed."""

    @property
    def fingerprints(self) -> list[str]:
        """The fingerprints of the runs, sorted."""
        return sorted(run.fingerprint for run in self.runs)

    @property
    def shards(self) -> list[ShardRecord]:
        """The files of all splits."""
        return [shard for split in self.splits.values() for shard in split.shards]

    @property
    def run(self) -> RunRecord | None:
        """The one run, or ``None`` where there are several or none is known."""
        return self.runs[0] if len(self.runs) == 1 else None

    def to_json(self) -> str:
        """Return the manifest as it is stored."""
        return self.model_dump_json(indent=2, by_alias=True) + "\n"


def failures_split(split: str) -> str:
    """Return the name of the split that holds a split's failed and incomplete rows."""
    return "failures" if split == "train" else f"{split}_failures"


def json_schema() -> str:
    """Return the manifest's JSON Schema, as in :data:`SCHEMA_FILE`."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **Manifest.model_json_schema()}
    return json.dumps(schema, indent=2) + "\n"


def now() -> str:
    """Return the time, to the second: UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


# --- the record of a run


def record(
    teacher: Speaker | None,
    student: Speaker,
    settings: Settings,
    fingerprint: str,
    source: SourceRecord | None = None,
    begun: str | None = None,
    recipe: str | None = None,
) -> RunRecord:
    """Describe a run. Loads no model; revisions come from the local cache, so they are known after loading.

    Args:
        teacher: The strong model, where it is asked.
        student: The model to be trained.
        settings: The run's settings.
        fingerprint: The run's fingerprint.
        source: The prompts, where they are known.
        begun: When it began, where it has.
        recipe: The file that describes it, where there is one.
    """
    return RunRecord(
        fingerprint=fingerprint,
        recipe=recipe and shown(recipe),
        method=settings.method,
        settings=settings.model_dump(exclude=set(SPEED) - {"rows_in_flight"}),
        teacher=_speaker(teacher) if teacher is not None else None,
        student=_speaker(student),
        source=source,
        libraries=libraries(),
        hardware=hardware(),
        begun=begun,
    )


def differences(one: RunRecord, other: RunRecord) -> dict[str, tuple[Any, Any]]:
    """Return what differs between two runs and decides their rows, such as ``settings.seed``: both values by name."""
    first, second = (
        dict(_leaves(run.model_dump(include={"method", "settings", "teacher", "student"}))) for run in (one, other)
    )
    ignored = {"settings.rows_in_flight", "teacher.model.requested_revision", "student.model.requested_revision"}
    values = {name: (first.get(name), second.get(name)) for name in dict.fromkeys([*first, *second])}
    values = {name: pair for name, pair in values.items() if "thinking_format" not in name or None not in pair}
    return {name: pair for name, pair in values.items() if pair[0] != pair[1] and name not in ignored}


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(value, dict):
        yield path, value
        return
    for name, one in value.items():
        yield from _leaves(one, f"{path}.{name}" if path else name)


def _speaker(speaker: Speaker) -> SpeakerRecord:
    identity = dict(speaker.engine.identity)
    name, revision = str(identity.pop("model", speaker.engine.model)), identity.pop("revision", None)
    engine, tokenizer = str(identity.pop("engine", "unknown")), identity.pop("tokenizer", None)
    identity.pop("digest", None)  # in the model's own record
    root, asked = identity.pop("root", None), getattr(speaker.engine, "files", None)
    served = engine == "server"  # the revision is the tokenizer's; what the server runs is the server's knowledge
    model = ModelRecord(name=shown(name), root=root and shown(root)) if served else _model(name, revision, asked)
    return SpeakerRecord(
        engine=engine,
        model=model,
        options={key: value for key, value in identity.items() if value is not None},
        tokenizer=_model(str(tokenizer), revision, asked) if tokenizer is not None else None,
        boundary=_boundary(speaker.boundary) if speaker.boundary is not None else None,
        chat_template=speaker.chat_template,
        template_options=speaker.template_options,
        thinking_format=asdict(speaker.known_format) if speaker.known_format is not None else None,
    )


def _boundary(predictor: BoundaryPredictor) -> BoundaryRecord:
    identity = predictor.identity
    stated = {key: identity.get(key) for key in ("label_shift", "style_label", "window")}
    model = _model(str(identity.get("model", "unnamed")), identity.get("revision"), getattr(predictor, "files", None))
    return BoundaryRecord(model=model, **stated)


def _model(name: str, revision: str | None, asked: ModelFiles | None) -> ModelRecord:
    requested = asked.revision if asked is not None else revision
    if Path(name).is_dir():
        return ModelRecord(name=shown(name), requested_revision=requested, digest=digest(Path(name)))
    commit = revision if asked is not None and revision != requested else cached_commit(name, revision)
    return ModelRecord(name=name, revision=commit, requested_revision=requested)


def shown(name: str) -> str:
    """Return a name without private parts: of an absolute path, what is below the working directory, or the last."""
    if not Path(name).is_absolute():
        return name
    try:
        return Path(name).resolve().relative_to(Path.cwd().resolve()).as_posix()
    except ValueError:
        return Path(name).name


# --- the machine and what is installed on it


def libraries() -> dict[str, str]:
    """Return the installed versions of :data:`LIBRARIES` and Python's."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def hardware() -> HardwareRecord:
    """Describe this machine, without its name."""
    return HardwareRecord(
        system=f"{platform.system()} {platform.release()}",
        machine=platform.machine(),
        python=platform.python_version(),
        cores=os.cpu_count() or 1,
        memory_gib=_memory(),
        gpus=_gpus(),
    )


def _memory() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, OSError, ValueError):  # not on every system
        return None


def _gpus() -> list[str]:
    """Return the names of the GPUs if this process uses them; asking would initialize CUDA, which breaks forks."""
    torch: Any = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return []
    return [str(torch.cuda.get_device_name(number)) for number in range(torch.cuda.device_count())]
