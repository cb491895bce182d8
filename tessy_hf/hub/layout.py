"""Where a release's files lie in a dataset repository, and what the card's metadata says about them.

A manifest goes in with the metadata of the present card; ``configs`` and ``dataset_info`` come out up to date, those
of other splits and configurations kept (format: https://huggingface.co/docs/hub/datasets-manual-configuration). Reads
and writes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tessy_hf.errors import DatasetError
from tessy_hf.manifest import Manifest, failures_split

if TYPE_CHECKING:
    from huggingface_hub import DatasetCardData

Info = dict[str, Any]
"""A split in ``dataset_info``: ``name``, ``num_bytes`` and ``num_examples``."""


def record_folder(config_name: str, split: str) -> str:
    """Return the folder of a split's manifest, statistics and figures in the repository."""
    return f"tessy/{config_name}/{split}"


def data_prefix(config_name: str, split: str) -> str:
    """Return the path of a split's files up to their number, as ``datasets`` itself lays them out."""
    return f"{'data' if config_name == 'default' else config_name}/{split}-"


# --- reading a card


def configs(data: DatasetCardData) -> dict[str, dict[str, Any]]:
    """Return the entries of a card's ``configs``, by name.

    Raises:
        DatasetError: It is not a list of named configurations, so ``datasets`` cannot read it either.
    """
    listed = data.get("configs") or []
    if not isinstance(listed, list) or not all(isinstance(one, dict) and "config_name" in one for one in listed):
        raise DatasetError(
            f"The card's `configs` are {listed!r}. A list of entries with config_name and data_files is expected; "
            "fix the card's metadata, or push to another repository."
        )
    return {str(one["config_name"]): one for one in listed}


def patterns(config: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the file patterns of one entry of ``configs``, by split.

    Raises:
        DatasetError: Its ``data_files`` have none of the forms that ``datasets`` reads.
    """
    files = config.get("data_files") or []
    files = [files] if isinstance(files, str) else files
    try:
        if all(isinstance(one, str) for one in files):
            return {"train": list(files)} if files else {}
        return {one["split"]: [one["path"]] if isinstance(one["path"], str) else list(one["path"]) for one in files}
    except (TypeError, KeyError) as error:
        raise DatasetError(
            f"The card's configuration {config.get('config_name')!r} has the data_files {files!r}. Expected are "
            "patterns, or a list of a split and a path each; fix the card's metadata, or push to another repository."
        ) from error


def infos(data: DatasetCardData) -> dict[str, dict[str, Any]]:
    """Return the entries of a card's ``dataset_info`` by configuration, whether it is one or a list of them."""
    described = data.get("dataset_info") or []
    listed = [described] if isinstance(described, dict) else described
    return {one.get("config_name", "default"): one for one in listed}


def replaced_splits(split: str) -> tuple[str, str]:
    """Return the splits that a release of a split replaces: itself and that of its failures."""
    return split, failures_split(split)


# --- updating it


def update(data: DatasetCardData, manifest: Manifest, other_splits: Mapping[str, Info] | None = None) -> None:
    """Enter a release into ``configs`` and ``dataset_info``.

    Args:
        data: The card's metadata; changed in place.
        manifest: The release.
        other_splits: Other splits of its configuration that the card's ``dataset_info`` does not count.
    """
    name, listed = manifest.config_name, configs(data)
    present = listed.get(name, {})
    others = {
        split: files for split, files in patterns(present).items() if split not in replaced_splits(manifest.split)
    }
    own = {split: [_pattern(record.shards[0].path)] for split, record in manifest.splits.items() if record.shards}
    files = [
        {"split": split, "path": paths[0] if len(paths) == 1 else paths} for split, paths in {**own, **others}.items()
    ]
    listed[name] = {**({"default": present["default"]} if "default" in present else {}), "data_files": files}
    if len(listed) == 2 and not present and "default" not in listed:  # load_dataset(repo_id) goes on without a name
        next(one for other, one in listed.items() if other != name)["default"] = True
    data["configs"] = _by_name(listed)

    described = infos(data)
    described[name] = _info(manifest, others, {**_counts(described.get(name, {})), **(other_splits or {})})
    entries = _by_name(described)
    if len(entries) == 1 and name == "default":
        del entries[0]["config_name"]
    data["dataset_info"] = entries[0] if len(entries) == 1 else entries


def _info(manifest: Manifest, others: Mapping[str, Any], counts: Mapping[str, Info]) -> dict[str, Any]:
    own = [
        {"name": split, "num_bytes": record.uncompressed_bytes, "num_examples": record.rows}
        for split, record in manifest.splits.items()
    ]
    info: dict[str, Any] = {"features": manifest.features}
    if all(split in counts for split in others):  # `datasets` refuses splits that are there but not counted
        info["splits"] = [*own, *(counts[split] for split in others)]
        info["dataset_size"] = sum(split["num_bytes"] for split in info["splits"])
    if not others:
        info["download_size"] = sum(record.bytes for record in manifest.splits.values())
    return info


def _counts(info: Mapping[str, Any]) -> dict[str, Info]:
    return {split["name"]: split for split in info.get("splits") or []}


def _by_name(entries: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return entries in the order and form in which ``datasets`` writes them."""
    return [{**entry, "config_name": name} for name, entry in sorted(entries.items())]


def _pattern(path: str) -> str:
    """Return the pattern of a split's files, from the path of one of them."""
    return re.sub(r"\d+(-of-\d+)?\.parquet$", "*.parquet", path)


def rows_on_card(data: DatasetCardData) -> int:
    """Return the rows of all splits that a card counts."""
    return sum(split.get("num_examples") or 0 for info in infos(data).values() for split in info.get("splits") or [])
