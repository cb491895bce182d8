"""What a model is: a folder by the bytes of its files, a Hub id by its commit.

A folder that is retrained or edited in place is another model, and so is a Hub id whose branch has moved. Knows
nothing of how models are loaded.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from tessy_hf.errors import SettingsError

WEIGHTS = ("*.safetensors", "*.gguf")
PATTERNS = ("*.json", "*.jinja", "*.model")
"""Files of a folder that decide, besides the weights, what its model writes: configuration, tokenizer, template."""

REMEMBERED_BYTES = 1 << 20
"""Files of this size and more are hashed once, and known by size and modification time in later processes."""

SETTLED_SECONDS = 2.0
"""Files younger than this are not remembered: file systems may give a second change the same time."""


DEMO = "demo:"
"""Begins the names of the miniature models in this package, which are the same on every machine."""

_MINIATURES = Path(__file__).parent.parent / "demo" / "models"


class ModelFiles:
    """A model as the user names it, and the files that this name stands for when it is first asked.

    A Hub id stands for one commit from then on, also in pickled copies: what identifies the model is what is loaded.

    Args:
        model: Hub id or folder, or a miniature model such as ``demo:teacher``.
        revision: Branch, tag or commit on the Hub.
        weights: Whether the weights belong to it, or only the tokenizer.

    Raises:
        SettingsError: The revision is not text, such as a number in YAML, or there is no such miniature model.
    """

    def __init__(self, model: str, revision: str | None = None, *, weights: bool = True) -> None:
        if revision is not None and not isinstance(revision, str):
            raise SettingsError(
                f"The revision of {model!r} is {revision!r}. A branch, tag or commit is expected as text; put quotes "
                "around it in YAML."
            )
        self.model, self.revision, self._weights = model, revision, weights
        located(model)
        self._commit: str | None = None

    @property
    def path(self) -> str:
        """What is loaded: a folder or a Hub id."""
        return located(self.model)

    @property
    def pinned(self) -> str | None:
        """The revision to load: the commit on the Hub, where it can be found out, else as given."""
        if self._commit is None and not Path(self.path).is_dir():
            self._commit = commit(self.model, self.revision)
        return self._commit or self.revision

    @property
    def identity(self) -> dict[str, Any]:
        """What identifies the model in a run's fingerprint: name, revision, and the digest of a local folder."""
        identity: dict[str, Any] = {"model": self.model, "revision": self.pinned}
        folder = Path(self.path)
        return {**identity, "digest": digest(folder, weights=self._weights)} if folder.is_dir() else identity


def located(model: str) -> str:
    """Return the folder of a miniature model of this package, ``demo:teacher`` and the like, else the name itself.

    Raises:
        SettingsError: There is no such miniature model.
    """
    name = model.removeprefix(DEMO)
    if name == model:
        return model
    known = sorted(path.name for path in _MINIATURES.iterdir())
    if name not in known:
        raise SettingsError(f"There is no miniature model {model!r}. Known: {', '.join(DEMO + one for one in known)}.")
    return str(_MINIATURES / name)


def refuse_code(options: Mapping[str, Any]) -> None:
    """Refuse options of a library that let it run code which comes with a checkpoint.

    Raises:
        SettingsError: They do.
    """
    if options.get("trust_remote_code"):
        raise SettingsError(
            "trust_remote_code=True is not supported: code of a checkpoint is never run. Use an architecture that the "
            "library has, or serve the model yourself and pass its address to ServerEngine."
        )


def commit(name: str, revision: str | None) -> str | None:
    """Return the commit of a model: on the Hub now or, without network, in the local cache; ``None`` if unknown."""
    from huggingface_hub import HfApi

    if revision is not None and len(revision) == 40:
        return revision
    try:
        return HfApi().model_info(name, revision=revision, timeout=10).sha
    except Exception:  # noqa: BLE001 - offline, no such model, no access: loading it says which
        return cached_commit(name, revision)


def cached_commit(name: str, revision: str | None) -> str | None:
    """Return the commit whose files are in the local cache under a Hub id, if there are any."""
    from huggingface_hub import try_to_load_from_cache

    for file in ("config.json", "tokenizer_config.json", "tokenizer.json"):
        try:
            found = try_to_load_from_cache(name, file, revision=revision)
        except ValueError:  # not a Hub id, such as the name of a scripted engine
            return None
        if isinstance(found, str):
            path = Path(found)
            return next(path.relative_to(at).parts[0] for at in path.parents if at.name == "snapshots")
    return None


def digest(folder: Path, *, weights: bool = True) -> str:
    """Return a SHA-256 of a folder's model files, by name and content.

    A large file is read once, and again if its size or modification time changes.
    """
    vocabulary = () if (folder / "tokenizer.json").exists() else ("*.txt", "*.tiktoken")
    total = hashlib.sha256()
    for path in sorted(
        {path for pattern in (*PATTERNS, *vocabulary, *WEIGHTS * weights) for path in folder.glob(pattern)}
    ):
        stat = path.stat()
        total.update(f"{path.name} {_file_digest(path.resolve(), stat.st_size, stat.st_mtime_ns)}\n".encode())
    return f"sha256:{total.hexdigest()}"


@lru_cache(maxsize=4096)
def _file_digest(path: Path, size: int, mtime_ns: int) -> str:
    if size < REMEMBERED_BYTES:
        return _hashed(path)
    note = _notes() / hashlib.sha256(f"{path}\n{size}\n{mtime_ns}".encode()).hexdigest()
    with suppress(OSError):
        known = note.read_text()
        if len(known) == 64:
            return known
    found = _hashed(path)
    if time.time() - mtime_ns / 1e9 > SETTLED_SECONDS:
        with suppress(OSError):  # a cache that cannot be written costs time only
            note.parent.mkdir(parents=True, exist_ok=True)
            note.write_text(found)
    return found


def _notes() -> Path:
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME, "tessy", "digests")


def _hashed(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
