"""Read releases from the Hub: show one, reproduce it, compare two.

The name of a release goes in (``user/name@v1.0.0``); its manifests, a recipe, a command or differences come out.
Writes nothing.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tessy_hf import recipe as recipes
from tessy_hf.engines.model_files import digest
from tessy_hf.errors import HubError, TessyError
from tessy_hf.hub.repository import Repository, read_tables
from tessy_hf.hub.versions import read_manifest
from tessy_hf.manifest import Manifest, ModelRecord, RunRecord, SourceRecord, SpeakerRecord
from tessy_hf.rows import parquet as shards
from tessy_hf.settings import SPEED
from tessy_hf.text.thinking_format import FAMILIES
from tessy_hf.trajectory import RowKey

if TYPE_CHECKING:
    import pyarrow as pa

SHOWN = 5
"""Most row ids listed in a difference."""

HARMLESS = ("dtype", "quantization", "attn_implementation")
"""Options that a release sets by itself. Others may run code or send keys elsewhere: users repeat them by `--set`."""


@contextmanager
def opened(name: str) -> Iterator[tuple[Repository, str]]:
    """Open a release by name; yields the repository and the release's commit.

    Args:
        name: ``user/name@v1.0.0``, or with a branch or commit; without one, ``main``.

    Raises:
        HubError: There is no such release.
    """
    repo_id, _, revision = name.partition("@")
    with tempfile.TemporaryDirectory(prefix="tessy-read-") as folder:
        repo = Repository(repo_id, Path(folder))
        yield repo, repo.resolve(revision or "main")


def manifests(name: str) -> list[Manifest]:
    """Return the manifests of a release, one for each pushed split.

    Raises:
        HubError: There is no such release, or the repository holds none.
    """
    with opened(name) as (repo, commit):
        return _manifests(repo, commit, name)


def _manifests(repo: Repository, commit: str, name: str) -> list[Manifest]:
    places = [path.split("/")[1:3] for path in repo.files(commit, "tessy") if path.endswith("/manifest.json")]
    found = [read_manifest(repo, commit, config, split) for config, split in places]
    if not found:
        raise HubError(f"{name} has no manifest. Pass a release made by tessy_hf, as user/name@v1.0.0.")
    return [manifest for manifest in found if manifest is not None]


def run_of(name: str, fingerprint: str | None = None) -> RunRecord:
    """Return the record of a release's run.

    Args:
        name: The release.
        fingerprint: Which run, where it has several.

    Raises:
        HubError: It has none of that fingerprint, or several and none was named.
    """
    runs = {run.fingerprint: run for manifest in manifests(name) for run in manifest.runs}
    chosen = [run for run in runs.values() if fingerprint in (None, run.fingerprint)]
    if len(chosen) != 1:
        raise HubError(
            f"{name} has the runs {', '.join(runs) or 'none'}. One is expected; pass --run with one of them."
        )
    return chosen[0]


def outline(manifest: Manifest) -> list[tuple[str, str]]:
    """Return the main facts of a release as pairs of label and text."""
    counts = manifest.counts
    ends = ", ".join(f"{reason} {number}" for reason, number in counts.finish_reasons.items())
    lines = [
        ("version", manifest.version + (f", adds to {manifest.appends_to}" if manifest.appends_to else "")),
        ("rows", f"{counts.rows}, and {counts.failed} failed or incomplete{_failures(manifest)}"),
        ("finish reasons", ends),
        ("license", manifest.license.license_name or manifest.license.license or "not stated"),
        ("pushed", manifest.finished),
    ]
    for run in manifest.runs:
        lines.append(("run", f"{run.fingerprint}, {run.method or 'unknown method'}, begun {run.begun or '–'}"))
        for author, speaker in (("teacher", run.teacher), ("student", run.student)):
            if speaker is not None:
                lines.append((author, f"{_model(speaker.model)}, engine {speaker.engine}"))
                lines += [("  boundary", _model(speaker.boundary.model))] if speaker.boundary else []
        if run.source is not None:
            revision, fingerprint = run.source.revision or "–", run.source.fingerprint or "–"
            lines.append(("prompts", f"{run.source.id or 'local'} at {revision}, fingerprint {fingerprint}"))
        lines.append(("settings", ", ".join(f"{name}={value}" for name, value in run.settings.items())))
        lines.append(("libraries", ", ".join(f"{name} {version}" for name, version in run.libraries.items())))
    return lines


def _failures(manifest: Manifest) -> str:
    if not manifest.counts.failed:
        return ""
    return f", in split {manifest.failures_split}" if manifest.failures_split else ", left out"


def _model(model: ModelRecord) -> str:
    return f"{model.name} at {model.revision or model.digest or model.requested_revision or '–'}"


# --- reproducing it


def recipe(run: RunRecord, changes: Sequence[str] = ()) -> dict[str, Any]:
    """Return a run's recipe for :mod:`tessy_hf.recipe`, with models at the commits that were used.

    Args:
        run: The record, written by whoever published the release.
        changes: The user's overrides. What could do harm has to be among them.

    Raises:
        HubError: The record does not name the models, or asks for what only the user may allow.
    """
    if run.student is None:
        raise HubError(
            f"The record of run {run.fingerprint} does not name its models. One made by a TessyTransform is expected; "
            "ask the publisher for the recipe."
        )
    speakers = {
        author: _speaker(speaker)
        for author, speaker in (("teacher", run.teacher), ("student", run.student))
        if speaker is not None
    }
    settings = {name: value for name, value in run.settings.items() if name not in SPEED - {"rows_in_flight"}}
    repeated = tuple(f"{change.partition('=')[0]}." for change in changes)
    if harmful := [f"{name}={value}" for name, value in _harmful(run) if not f"{name}.".startswith(repeated)]:
        raise HubError(
            f"The record of run {run.fingerprint} sets {', '.join(harmful)}. By such settings a publisher can run "
            "programs here or send your keys elsewhere, so a release does not set them. If you trust this one, repeat "
            f"them: {' '.join(f'--set {shlex.quote(one)}' for one in harmful)}"
        )
    return {**settings, **speakers}


def _harmful(run: RunRecord) -> Iterator[tuple[str, Any]]:
    """Iterate over names and values of a record that only the user may set."""
    verifier = run.settings.get("verifier")
    for name in ("network", "files"):
        if isinstance(verifier, Mapping) and verifier.get(name):
            yield f"verifier.{name}", verifier[name]
    for author, speaker in (("teacher", run.teacher), ("student", run.student)):
        for name, value in _options(speaker).items() if speaker is not None else ():
            if value is not None and (name not in HARMLESS or "/" in str(value)):  # attention of a repository is code
                yield f"{author}.options.{name}", value


def _options(speaker: SpeakerRecord) -> dict[str, Any]:
    """Return an engine's options, those for its library beside its own."""
    return {**speaker.options, **speaker.options.get("options", {}), "options": None}


def _speaker(speaker: SpeakerRecord) -> dict[str, Any]:
    options = {**_options(speaker), "revision": _revision(speaker.model)}
    if speaker.tokenizer is not None:
        options |= {"tokenizer": speaker.tokenizer.name, "revision": _revision(speaker.tokenizer)}
    described: dict[str, Any] = {
        "engine": speaker.engine,
        "model": speaker.model.name,
        "options": {name: value for name, value in options.items() if value is not None},
        "chat_template": speaker.chat_template,
        "template_options": speaker.template_options,
    }
    stated = speaker.thinking_format or {}
    if stated.get("name", "") not in FAMILIES:  # the user's own; a family is found again
        unread = ("prompted",)  # read from the template each time
        described["thinking_format"] = {n: v for n, v in stated.items() if v is not None and n not in unread} or None
    if speaker.boundary is not None:
        labels = speaker.boundary.model_dump(exclude={"model"})
        model = speaker.boundary.model
        described["boundary"] = {"model": model.name, "revision": _revision(model), **labels}
    return described


def _revision(model: ModelRecord) -> str | None:
    return model.revision or model.requested_revision


def how_to_reproduce(name: str, run: RunRecord, *, several: bool = False) -> list[str]:
    """Return lines with the command that reproduces a run's rows here, or with the reason why there is none.

    Args:
        name: The release, ``user/name@v1.0.0``.
        run: The run.
        several: Whether the release has several runs, so that the command must name this one.
    """
    # Server addresses are not recorded.
    served = [author for author in ("teacher", "student") if getattr(getattr(run, author), "engine", None) == "server"]
    changes = [f"{author}.options.base_url=http://HOST:8000/v1" for author in served]
    if why := _irreproducible(run, changes):
        return [f"No command reproduces the rows of run {run.fingerprint} from here: {why}"]
    source = run.source or SourceRecord()
    prompts = f"{source.id}@{source.revision}" if source.revision else str(source.id)
    words = ["tessy", "synthesize", name, prompts, "rows.parquet"]
    words += ["--split", str(source.split)] if source.split not in (None, "train") else []
    words += ["--config", str(source.config)] if source.config not in (None, "default") else []
    words += ["--run", run.fingerprint] if several else []
    words += [word for change in changes for word in ("--set", change)]
    where = " (put the addresses of your servers in place of HOST)" if changes else ""
    return [f"To reproduce these rows{where}:", " ".join(map(shlex.quote, words))]


def _irreproducible(run: RunRecord, changes: list[str]) -> str | None:
    """Say what a command would lack."""
    if run.source is None or "/" not in (run.source.id or ""):
        return "its prompts are not a dataset on the Hub, or the record does not name it."
    try:
        recipes.build(recipe(run, changes), run.fingerprint, changes)
    except TessyError as error:
        return str(error)
    speakers = [speaker for speaker in (run.teacher, run.student) if speaker is not None]
    models = [model for speaker in speakers for model in (speaker.model, speaker.tokenizer)]
    for model in [*models, *(speaker.boundary.model for speaker in speakers if speaker.boundary)]:
        if (
            model is not None
            and model.digest
            and not (Path(model.name).is_dir() and digest(Path(model.name)) == model.digest)
        ):
            return f"the model {model.name!r} is a local folder that is not here, or has changed."
    return None


# --- differences


@dataclass(frozen=True)
class Difference:
    """How the rows and runs of one split differ between two releases.

    Attributes:
        config_name: The configuration.
        split: The split, with its failures where they were pushed.
        rows: Rows before and after.
        added: Ids of new rows (the first few) and their number; likewise for ``removed`` and ``changed``.
        removed: Rows that are gone.
        changed: Rows with other content.
        facts: Other differences as name, before and after: settings, models, libraries, columns.
    """

    config_name: str
    split: str
    rows: tuple[int, int]
    added: tuple[list[Any], int]
    removed: tuple[list[Any], int]
    changed: tuple[list[Any], int]
    facts: list[tuple[str, str, str]]


def diff(repo_id: str, before: str, after: str) -> list[Difference]:
    """Compare two releases of a dataset. Files that both have are not downloaded.

    Args:
        repo_id: The dataset.
        before: A tag, branch or commit.
        after: Another.

    Raises:
        HubError: One of them is not there or has no manifest.
    """
    with opened(f"{repo_id}@{before}") as (repo, first):
        second = repo.resolve(after)
        old, new = (
            {(manifest.config_name, manifest.split): manifest for manifest in _manifests(repo, commit, repo_id)}
            for commit in (first, second)
        )
        return [
            _difference(repo, (old.get(place), first), (new.get(place), second), place)
            for place in sorted({*old, *new})
        ]


def _difference(
    repo: Repository, old: tuple[Manifest | None, str], new: tuple[Manifest | None, str], place: tuple[str, str]
) -> Difference:
    common = _hashes(old[0]) & _hashes(new[0])
    before, after = (_rows(repo, manifest, commit, common) for manifest, commit in (old, new))
    told, tells = _facts(old[0]), _facts(new[0])
    facts = [(name, told.get(name, "–"), tells.get(name, "–")) for name in sorted({*told, *tells})]
    return Difference(
        *place,
        rows=(old[0].counts.rows if old[0] else 0, new[0].counts.rows if new[0] else 0),
        added=_some(key for key in after if key not in before),
        removed=_some(key for key in before if key not in after),
        changed=_some(key for key in after if key in before and before[key] != after[key]),
        facts=[fact for fact in facts if fact[1] != fact[2]],
    )


def _hashes(manifest: Manifest | None) -> set[str]:
    return {shard.sha256 for shard in manifest.shards} if manifest else set()


def _rows(repo: Repository, manifest: Manifest | None, commit: str, common: set[str]) -> dict[RowKey, bytes]:
    """Return a hash of each row by its key, except for rows in files that both releases have."""
    if manifest is None:
        return {}
    paths = [shard.path for shard in manifest.shards if shard.sha256 not in common]
    id_column = next((run.settings.get("id_column") for run in manifest.runs if run.settings.get("id_column")), None)
    return {key: digest for table in read_tables(repo, paths, commit) for key, digest in _hashed(table, id_column)}


def _hashed(table: pa.Table, id_column: str | None) -> Iterator[tuple[RowKey, bytes]]:
    for key, row in zip(shards.keys(table, id_column), table.to_pylist(), strict=True):
        yield key, hashlib.blake2b(json.dumps(row, sort_keys=True, default=str).encode(), digest_size=12).digest()


def _some(keys: Iterator[RowKey]) -> tuple[list[Any], int]:
    found = [key.id for key in keys]
    return found[:SHOWN], len(found)


def _facts(manifest: Manifest | None) -> dict[str, str]:
    """Return the facts of a release to compare, as a flat mapping."""
    if manifest is None:
        return {}
    facts: dict[str, Any] = {"version": manifest.version, "failed": manifest.counts.failed}
    facts["columns"] = ", ".join(feature["name"] for feature in manifest.features)
    facts["license"] = manifest.license.license
    facts |= {f"rows: {reason}": count for reason, count in manifest.counts.finish_reasons.items()}
    for number, run in enumerate(manifest.runs, start=1):
        name = "run" if len(manifest.runs) == 1 else f"run {number}"
        facts[name] = run.fingerprint
        facts |= _flat(f"{name}: ", run.model_dump(exclude={"fingerprint", "begun", "hardware"}))
    return {name: str(value) for name, value in facts.items() if value is not None}


def _flat(prefix: str, value: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, inner in value.items():
        flat |= _flat(f"{prefix}{name}.", inner) if isinstance(inner, dict) else {f"{prefix}{name}": inner}
    return flat
