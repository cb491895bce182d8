"""Publish a folder's files in one commit: a report's static Space, and what else is not a versioned dataset."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tessy_hf.errors import BoundaryError, HubError
from tessy_hf.hub.repository import Repository

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, RepoFile


def push_space(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    retry_timeout: float = 60.0,
    backoff: float = 1.0,
) -> str:
    """Push a static Space that ``tessy report --space`` wrote, in one commit; return its page.

    Raises:
        HubError: The folder holds none, or the Hub refuses.
    """
    from huggingface_hub import CommitOperationAdd

    files = [CommitOperationAdd(path.name, path) for path in space_files(folder)]
    with tempfile.TemporaryDirectory(prefix="tessy-push-") as cache:
        options: dict[str, Any] = {"token": token, "retry_timeout": retry_timeout, "backoff": backoff}
        repo = Repository(repo_id, Path(cache), repo_type="space", **options)
        publish(repo, private, files, "Add the report")
        return f"{repo.api.endpoint}/spaces/{repo_id}"


def space_files(folder: str | Path) -> list[Path]:
    """Return the files of a Space in a folder.

    Raises:
        HubError: The folder holds none.
    """
    paths = [Path(folder, name) for name in ("README.md", "index.html")]
    if not all(path.is_file() for path in paths):
        raise HubError(f"{str(folder)!r} holds no Space. Pass a folder that `tessy report --space` wrote.")
    return paths


def publish(
    repo: Repository,
    private: bool | None,
    files: Sequence[CommitOperationAdd],
    message: str,
    tag: str | None = None,
) -> str:
    """Put files on ``main`` in one commit, unless they are there, and tag it; return the commit.

    Raises:
        BoundaryError: The tag has other files.
    """
    repo.reach(private)
    if tag in repo.refs()[1]:  # as an earlier push may have left it
        tagged = repo.resolve(str(tag))
        if other := _difference(repo, tagged, files):
            raise BoundaryError(
                f"{repo.id} already has a tag {tag!r}, with another {other}. A tag does not move; pass another one. "
                "Nothing was pushed."
            )
        return tagged

    def commit() -> str:
        main = repo.refs()[0].get("main")
        if main is not None and _difference(repo, main, files) is None:  # done, and only the answer was lost
            return main
        return repo.commit("main", files, message)

    made = repo.call("commit", commit)
    if tag is not None:
        repo.make_tag(tag, made)
    return made


def _difference(repo: Repository, commit: str, files: Sequence[CommitOperationAdd]) -> str | None:
    """Return the first of the files that a commit lacks or has with other content, or ``None``."""
    there = repo.files(commit)
    return next((file.path_in_repo for file in files if not _is_same(file, there.get(file.path_in_repo))), None)


def _is_same(file: CommitOperationAdd, there: RepoFile | None) -> bool:
    """Compare by what the Hub identifies a file's content by: its SHA-256 if it is large, else git's blob id."""
    if there is None:
        return False
    if there.lfs is not None:
        return bool(there.lfs.sha256 == file.upload_info.sha256.hex())
    with file.as_file() as content:
        data = content.read()
    return bool(there.blob_id == hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest())
