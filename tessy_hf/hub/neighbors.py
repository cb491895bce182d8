"""Check, before anything is uploaded, that a release leaves its repository loadable with plain ``datasets``.

``datasets`` reads all configurations of a repository with one file format, and gives all splits of a configuration the
same columns. So what stands beside a release decides whether either can still be loaded. The repository and the
release go in; a refusal comes out, or the sizes of splits that the card did not count.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from tessy_hf.errors import DatasetError
from tessy_hf.hub import layout
from tessy_hf.hub.cards import read_card
from tessy_hf.rows import datasets_internals

if TYPE_CHECKING:
    from datasets import Features

    from tessy_hf.hub.repository import Repository
    from tessy_hf.hub.versions import ReleaseSpec

OVERRIDE = ".huggingface.yaml"
"""A file whose metadata takes the place of the card's (``datasets.config.REPOYAML_FILENAME``)."""

DATA_SUFFIXES = (".parquet", ".arrow", ".json", ".jsonl", ".csv", ".tsv", ".gz", ".zst", ".zip", ".tar")
"""What counts as data in a repository whose card lists no files."""

ELSEWHERE = "Or push to another repository. Nothing was uploaded."


def check_neighbors(repo: Repository, commit: str, spec: ReleaseSpec, features: Features) -> dict[str, layout.Info]:
    """Refuse a release that would make other splits, or itself, unloadable.

    Args:
        repo: The repository.
        commit: The head of its ``main``.
        spec: What is to be released.
        features: The columns of the rows.

    Returns:
        Rows and bytes of the other splits of the configuration that the card does not count.

    Raises:
        DatasetError: With what to do instead.
    """
    data, _ = read_card(repo.read("README.md", commit))
    listed = layout.configs(data)
    _check_files_are_listed(repo, commit, spec, bool(listed))
    _check_configurations(repo, spec, listed)
    uncounted: dict[str, layout.Info] = {}
    for name, config in listed.items():
        for split, patterns in layout.patterns(config).items():
            if name == spec.config_name and split in layout.replaced_splits(spec.split):
                continue
            where = f"split {split!r} of the configuration {name!r}"
            _check_overlap(repo, spec, where, patterns)
            paths = _files(repo, commit, where, patterns)
            if name == spec.config_name:
                told = layout.infos(data).get(name, {})
                size = _check_columns(repo, commit, name, told, split, paths, features)
                uncounted |= {split: size} if size else {}
    return uncounted


def _check_files_are_listed(repo: Repository, commit: str, spec: ReleaseSpec, lists_files: bool) -> None:
    """Refuse where a card with ``configs`` would hide what can be loaded now, or would itself be overridden."""
    there = repo.files(commit)
    if OVERRIDE in there and any(
        f"{field}:" in (repo.read(OVERRIDE, commit) or "") for field in ("configs", "dataset_info")
    ):
        raise DatasetError(
            f"{repo.id} has a file {OVERRIDE} whose metadata takes the place of the card's, so the release would not "
            f"be listed. Move it into README.md and delete the file. {ELSEWHERE}"
        )
    own = tuple(layout.data_prefix(spec.config_name, split) for split in layout.replaced_splits(spec.split))
    hidden = [
        path for path in there
        if path.endswith(DATA_SUFFIXES) and not path.startswith((*own, "tessy/")) and path != "dataset_infos.json"
    ]  # fmt: skip
    if hidden and not lists_files:
        raise DatasetError(
            f"{repo.id} has data that its card does not list ({_some(hidden)}): with the release listed, it could no "
            "longer be loaded. List it under `configs` in the card's metadata (its config_name, and data_files with "
            f"split and path). {ELSEWHERE}"
        )


def _check_configurations(repo: Repository, spec: ReleaseSpec, listed: dict[str, dict[str, Any]]) -> None:
    for name, config in listed.items():
        if not config.get("data_files"):
            given = f"only data_dir={config['data_dir']!r}" if "data_dir" in config else "no data_files"
            raise DatasetError(
                f"The card of {repo.id} has {given} for the configuration {name!r}: which files that means depends on "
                f"all others in the repository. Give it data_files with split and path. {ELSEWHERE}"
            )
        if spec.config_name == "default" != name and config.get("default"):
            raise DatasetError(
                f"The card of {repo.id} calls the configuration {name!r} its default; with one named 'default' beside "
                f"it, none could be loaded. Pass another config_name, for instance config_name={name!r} for the same "
                "columns or config_name='sft'. Nothing was uploaded."
            )


def _check_overlap(repo: Repository, spec: ReleaseSpec, where: str, patterns: list[str]) -> None:
    """Refuse where a pattern of another split also matches the release's files: their rows would be in both."""
    from fsspec.utils import glob_translate

    paths = [f"{prefix}00000.parquet" for prefix in spec.data_prefixes]
    for pattern in patterns:
        if path := next((path for path in paths if re.match(glob_translate(pattern), path)), None):
            raise DatasetError(
                f"The card of {repo.id} lists {pattern} for the {where}, which also matches {path} of the release. "
                f"Narrow the pattern. {ELSEWHERE}"
            )


def _files(repo: Repository, commit: str, where: str, patterns: list[str]) -> list[str]:
    """Return the files of a split that stays."""
    paths = [
        path for pattern in patterns
        for path in ([pattern] if "://" in pattern else repo.glob(pattern, commit))
    ]  # fmt: skip
    if not paths:
        raise DatasetError(
            f"The card of {repo.id} lists {', '.join(patterns)} for the {where}, but no file matches. Remove it from "
            "the card's `configs`, or restore the files. Nothing was uploaded."
        )
    if foreign := [path for path in paths if not path.endswith(".parquet")]:
        raise DatasetError(
            f"{repo.id} has {_some(foreign)} for the {where}. `datasets` reads all files of a repository in one "
            f"format, and releases are Parquet. Convert the files. {ELSEWHERE}"
        )
    return paths


def _check_columns(
    repo: Repository, commit: str, config_name: str, info: layout.Info, split: str, paths: list[str], own: Features
) -> layout.Info | None:
    """Check the columns of another split of the configuration; return its size where the card does not give it."""
    from datasets import Features

    counted = split in {described["name"] for described in info.get("splits") or []}
    local = [path for path in paths if "://" not in path]
    if counted and info.get("features"):
        footers, kinds = [], [datasets_internals.features_from_yaml(info["features"])]
    else:
        footers = [repo.footer(path, commit) for path in local]
        kinds = [Features.from_arrow_schema(footer.schema.to_arrow_schema()) for footer in footers]
    for theirs in kinds:
        if theirs != own:
            raise DatasetError(
                f"{repo.id} has a split {split!r} in the configuration {config_name!r} with other columns "
                f"({_difference(theirs, own)}). All splits of a configuration have the same columns: pass another "
                f"config_name, for instance config_name='sft', or push to another repository. Nothing was uploaded."
            )
    if counted or not footers:
        return None
    size = sum(footer.row_group(n).total_byte_size for footer in footers for n in range(footer.num_row_groups))
    return {"name": split, "num_bytes": size, "num_examples": sum(footer.num_rows for footer in footers)}


def _difference(theirs: Features, own: Features) -> str:
    parts = {
        "not in the rows": [name for name in theirs if name not in own],
        "only in the rows": [name for name in own if name not in theirs],
        "of another type": [name for name in own if name in theirs and own[name] != theirs[name]],
    }
    return "; ".join(f"{what}: {_some(names)}" for what, names in parts.items() if names)


def _some(names: list[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
