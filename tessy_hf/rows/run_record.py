"""The run's record that finished rows carry: in a Parquet file's metadata, beside a JSONL file, in the cache.

A :class:`~tessy_hf.manifest.RunRecord` goes in with the rows; who has only the rows gets it back. Knows nothing of the
Hub.
"""

from __future__ import annotations

import glob
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from tessy_hf.errors import DatasetError
from tessy_hf.manifest import RunRecord
from tessy_hf.settings import Settings

if TYPE_CHECKING:
    import pyarrow as pa

logger = logging.getLogger(__name__)

KEY = b"tessy_run"
"""The record's key in the metadata of a Parquet file."""


def metadata(schema: pa.Schema, record: str) -> dict[bytes, bytes]:
    """Return a schema's metadata with a run's record, as JSON, in it."""
    return {**(schema.metadata or {}), KEY: record.encode()}


def of_schema(schema: pa.Schema) -> dict[str, Any]:
    """Return the record in a Parquet file's schema; an empty one where there is none."""
    record: dict[str, Any] = json.loads((schema.metadata or {}).get(KEY, b"{}"))
    return record


def sidecar(path: Path) -> Path:
    """Return where the record of a JSONL file is: hidden, or `datasets` would take it for data of the folder."""
    return path.with_name(f".{path.name}.run.json")


def read(path: Path) -> RunRecord | None:
    """Return the record that a file of rows carries, if it has one.

    Raises:
        DatasetError: It is there but cannot be read.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    beside = sidecar(path)
    try:
        if path.suffix.lower() == ".parquet":
            stored = json.dumps(of_schema(pq.read_schema(path)))
        else:
            stored = beside.read_text("utf-8") if beside.is_file() else "{}"
    except (OSError, ValueError, pa.ArrowException) as error:
        raise DatasetError(f"{path} cannot be read: {error}. A file of rows is expected; check it.") from error
    return parse(stored, path)


def parse(stored: str, source: Path) -> RunRecord | None:
    """Return the record that a file or a journal has stored as JSON; ``None`` for an empty one.

    Raises:
        DatasetError: It cannot be read.
    """
    try:
        return RunRecord.model_validate_json(stored) if stored != "{}" else None
    except ValidationError as error:
        fault = error.errors()[0]
        raise DatasetError(
            f"The run's record of {source} cannot be read: {'.'.join(map(str, fault['loc']))}: {fault['msg']}. One "
            "that tessy_hf wrote is expected; upgrade tessy_hf, or run the recipe again."
        ) from error


def read_all(source: str) -> list[RunRecord]:
    """Return the records of the local files that a path, a folder or a pattern names.

    Raises:
        DatasetError: One cannot be read.
    """
    files = Path(source).iterdir() if Path(source).is_dir() else map(Path, glob.glob(source))
    rows = sorted(path for path in files if path.suffix.lower() in (".parquet", ".jsonl"))
    return [record for path in rows if (record := read(path)) is not None]


# --- the cache


def _cached(fingerprint: str) -> Path:
    import datasets

    return Path(datasets.config.HF_DATASETS_CACHE).parent / "tessy" / f"{fingerprint}.run.json"


def remember(record: RunRecord) -> None:
    """Keep a run's record in the cache, for datasets that go through files of `datasets` itself."""
    path = _cached(record.fingerprint)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(record.model_copy(update={"source": None}).model_dump_json(), "utf-8")  # it may have several
    except (OSError, ValueError) as error:  # rows do not depend on it
        logger.warning("The run's record is not kept in the cache: %s", error)


def recall(fingerprint: str) -> RunRecord | None:
    """Return the record that a run on this machine left in the cache, without its prompts."""
    if not fingerprint.isalnum():  # it comes from data and becomes a path
        return None
    try:
        return RunRecord.model_validate_json(_cached(fingerprint).read_text("utf-8"))
    except (OSError, ValueError):  # the cache may be of another version
        return None


# --- what it tells


def prompt_settings(record: Mapping[str, Any]) -> Settings | None:
    """Return the settings by which a recorded run read its prompts; ``None`` where the record does not have them."""
    if not (told := record.get("settings")):
        return None
    names = {name: told[name] for name in ("prompt_column", "id_column", "system_prompt")}
    verifier = told.get("verifier")
    return Settings.check(**names, verifier=_unknown if "function" in (verifier or {}) else verifier)


def _unknown(row: Mapping[str, Any]) -> bool:
    """Stand for a verifier that was a function: it is not called here, but may have read any column."""
    raise NotImplementedError
