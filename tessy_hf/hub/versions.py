"""Versions of a dataset on the Hub: is this one there, does it hold the same rows, what does it add to?

A release's specification, the submitted rows and the repository's refs go in. Reads the Hub, writes nothing to it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from tessy_hf.errors import DatasetError, HubError, VersionError
from tessy_hf.hub import layout
from tessy_hf.manifest import SCHEMA_VERSION, License, Manifest
from tessy_hf.rows import parquet
from tessy_hf.rows.datasets_internals import features_to_yaml

if TYPE_CHECKING:
    from tessy_hf.hub.repository import Repository
    from tessy_hf.hub.submission import Submission

_VERSION = re.compile(r"v?(\d+)\.(\d+)\.(\d+)")


@dataclass(frozen=True)
class ReleaseSpec:
    """What is to be released: see the arguments of :func:`tessy_hf.hub.push.push_to_hub`."""

    version: str
    split: str
    config_name: str
    append: bool | None
    failures: Literal["split", "drop"]
    complete: tuple[str, ...]
    license: License
    language: tuple[str, ...]
    max_bytes: int

    @classmethod
    def checked(
        cls,
        version: str,
        split: str,
        config_name: str,
        append: bool | None,
        failures: Literal["split", "drop"],
        complete: Sequence[str],
        license: License,  # noqa: A002 - the Hub's name for it
        language: str | Sequence[str] | None,
        max_shard_size: int | str,
    ) -> ReleaseSpec:
        """Check the arguments.

        Raises:
            VersionError: The version is not three numbers.
            DatasetError: A name, the size or ``failures`` cannot be used.
        """
        if not _VERSION.fullmatch(str(version)):
            raise VersionError(f"{version!r} is not a valid version. Pass three numbers, such as version='1.0.0'.")
        for what, name in (("split", split), ("config_name", config_name)):
            if not re.fullmatch(r"\w+(\.\w+)*", name) or (what == "config_name" and name in ("data", "tessy")):
                raise DatasetError(
                    f"{what}={name!r} cannot be used. Letters, digits and _ are expected (and for a configuration, "
                    f"neither 'data' nor 'tessy'); choose another {what}."
                )
        if failures not in ("split", "drop"):
            raise DatasetError(f"failures={failures!r} cannot be used. Pass 'split' or 'drop'.")
        plain = ".".join(map(str, numbers(version)))
        size = parquet.checked_size(max_shard_size)
        languages = (language,) if isinstance(language, str) else tuple(language or ())
        return cls(plain, split, config_name, append, failures, tuple(complete), license, languages, size)

    @property
    def tag(self) -> str:
        """The release's tag."""
        return f"v{self.version}"

    @property
    def records(self) -> str:
        """The folder of the manifest, statistics and figures."""
        return layout.record_folder(self.config_name, self.split)

    @property
    def data_prefixes(self) -> tuple[str, ...]:
        """The beginnings of the paths of all data files that the release replaces."""
        return tuple(layout.data_prefix(self.config_name, split) for split in layout.replaced_splits(self.split))


def numbers(version: str) -> tuple[int, ...]:
    """Return the three numbers of a version or tag; -1 for each of a name that is neither."""
    found = _VERSION.fullmatch(version)
    return tuple(map(int, found.groups())) if found else (-1, -1, -1)


# --- what is there


@dataclass(frozen=True)
class Standing:
    """What is on the Hub before a push.

    Attributes:
        branches: Their commits by name.
        tags: Their commits, or the ids of their own objects, by name.
        manifest: The manifest on ``main`` of the split that is to be pushed, if there is one.
    """

    branches: dict[str, str]
    tags: dict[str, str]
    manifest: Manifest | None

    @property
    def main(self) -> str | None:
        """The head of ``main``; ``None`` in a repository without commits."""
        return self.branches.get("main")


def read_standing(repo: Repository, spec: ReleaseSpec) -> Standing:
    """Read branches, tags and the manifest on ``main``."""
    branches, tags = repo.refs()
    return Standing(branches, tags, read_manifest(repo, branches.get("main"), spec.config_name, spec.split))


def read_manifest(repo: Repository, commit: str | None, config_name: str, split: str) -> Manifest | None:
    """Return the manifest of a split at a commit, if there is one.

    Raises:
        HubError: It is there but cannot be read.
    """
    text = repo.read(f"{layout.record_folder(config_name, split)}/manifest.json", commit) if commit else None
    if text is None:
        return None
    try:
        return Manifest.model_validate_json(text)
    except ValueError as error:
        raise HubError(
            f"The manifest of {repo.id} at {commit} cannot be read: {error} Schema version {SCHEMA_VERSION} is "
            "expected; upgrade tessy-hf."
        ) from error


# --- is this version there?


@dataclass(frozen=True)
class Found:
    """A release with the same rows that is there already; ``tagged`` unless its push died before the tag."""

    commit: str
    manifest: Manifest
    tagged: bool


def find_release(repo: Repository, spec: ReleaseSpec, submission: Submission, standing: Standing) -> Found | None:
    """Return the release if it is there with the same rows.

    Raises:
        VersionError: It is there with other rows, or a higher version is.
    """
    version, tag, on_main = spec.version, spec.tag, standing.manifest
    if tag in standing.tags:
        there = read_manifest(repo, standing.tags[tag], spec.config_name, spec.split)
        if there is None:
            raise VersionError(
                f"{repo.id} has a tag {tag} without the split {spec.split!r} of the configuration "
                f"{spec.config_name!r}. Releases do not change; push it as a higher version."
            )
        require_same_rows(submission, there, f"{repo.id}@{tag}")
        return Found(repo.resolve(tag), there, tagged=True)
    if higher := sorted(name for name in standing.tags if numbers(name) > numbers(version)):
        raise VersionError(f"{repo.id} already has {', '.join(higher)}, above {tag}. Pass a higher version.")
    if on_main is not None and on_main.version == version:
        require_same_rows(submission, on_main, f"{repo.id}@main")
        return Found(standing.branches["main"], on_main, tagged=False)
    return None


def require_same_rows(submission: Submission, there: Manifest, name: str) -> None:
    """Raise a :class:`VersionError` where a release holds other rows, as far as its manifest can tell."""
    if seen := other_rows(submission, there):
        raise VersionError(f"{name} exists with other rows: {seen}. A version never changes; push a higher one.")


def other_rows(submission: Submission, there: Manifest) -> str | None:
    """Return how a manifest shows that a release holds other rows than the submitted ones, or ``None``."""
    own, theirs = submission.fingerprints, set(there.fingerprints)
    if not (own <= theirs if there.appends_to else own == theirs):
        return f"it is of run {', '.join(sorted(theirs)) or '?'}, these rows are of {', '.join(sorted(own)) or '?'}"
    count = submission.rows.count
    if count not in (None, there.counts.given):
        return f"it was made of {there.counts.given} rows, these are {count}"
    for run in there.runs:
        mine = submission.record(run.fingerprint).source if run.fingerprint in own else None
        known = mine and run.source and mine.fingerprint and run.source.fingerprint
        if known and mine.fingerprint != run.source.fingerprint:  # type: ignore[union-attr]
            return f"its prompts have the fingerprint {run.source.fingerprint}, these {mine.fingerprint}"  # type: ignore[union-attr]
    return None


# --- what does it add to?


@dataclass(frozen=True)
class Base:
    """The release that a new one adds to, and the commit at which its files are."""

    manifest: Manifest
    commit: str


def choose_base(repo: Repository, spec: ReleaseSpec, submission: Submission, standing: Standing) -> Base | None:
    """Return the release on ``main`` if the new one adds to it, ``None`` if it replaces it.

    Raises:
        DatasetError: The rows have other columns than those they are to be added to.
    """
    there = standing.manifest
    if there is None or not (_is_minor_step(there.version, spec.version) if spec.append is None else spec.append):
        return None
    if there.features != features_to_yaml(submission.rows.features):
        raise DatasetError(
            f"The rows have other columns than {repo.id}@v{there.version}, to which they are to be added: "
            f"{', '.join(submission.rows.features)}. Give them the same columns, or pass append=False to replace what "
            "is there."
        )
    return Base(there, standing.branches["main"])


def _is_minor_step(base: str, version: str) -> bool:
    (base_major, base_minor, _), (major, minor, _) = numbers(base), numbers(version)
    return major == base_major and minor > base_minor
