"""What a model is: a folder by the bytes of its files, a Hub id by its name and revision.

A folder that is retrained or edited in place is another model. Knows nothing of how models are loaded.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path
from typing import Any

PATTERNS = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.gguf")
"""Files of a folder that decide what its model writes: weights, configuration, tokenizer and chat template."""


def identify(model: str, revision: str | None) -> dict[str, Any]:
    """Return what identifies a model in a run's fingerprint: name, revision, and the digest of a local folder."""
    identity: dict[str, Any] = {"model": model, "revision": revision}
    return {**identity, "digest": digest(Path(model))} if Path(model).is_dir() else identity


def digest(folder: Path) -> str:
    """Return a SHA-256 of a folder's model files, by name and content.

    A file is read once per process, and again if its size or modification time changes.
    """
    total = hashlib.sha256()
    for path in sorted({path for pattern in PATTERNS for path in folder.glob(pattern)}):
        stat = path.stat()
        total.update(f"{path.name} {_file_digest(path, stat.st_size, stat.st_mtime_ns)}\n".encode())
    return f"sha256:{total.hexdigest()}"


@lru_cache(maxsize=4096)
def _file_digest(path: Path, size: int, mtime_ns: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
