"""Publish a trained boundary predictor: its folder goes in, one commit of a stock model with its card comes out."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tessy_hf.boundary.predictor import BoundaryPredictor
from tessy_hf.boundary_training.card import render_card
from tessy_hf.errors import BoundaryError, HubError
from tessy_hf.hub.repository import Repository

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, RepoFile

PUBLISHED = (
    "README.md", "report.json", "config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer*", "vocab.*",
    "special_tokens_map.json", "added_tokens.json", "merges.txt", "*.model", "*.jinja",
)  # fmt: skip
"""Which files of the folder are the model. Others are not published."""


def push_boundary(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    tag: str | None = None,
    token: str | None = None,
    retry_timeout: float = 60.0,
    backoff: float = 1.0,
    **card: Any,
) -> str:
    """Push a trained predictor to the Hub in one commit: weights, tokenizer, config, card and report.

    Args:
        folder: The output of :func:`tessy_hf.boundary_training.train.train_boundary`.
        repo_id: The model repository, ``user/name``. Made if it is not there.
        private: Whether a repository that is made now is private.
        tag: A tag for the commit. One that is there stays; it is enough if it has this very predictor.
        token: A token that may write; by default that of the environment.
        retry_timeout: Seconds for which a call that fails for the moment is tried again.
        backoff: Seconds before the first retry; each further pause is twice as long.
        **card: See :func:`tessy_hf.boundary_training.card.render_card`.

    Returns:
        The id of the commit, for ``revision=``.

    Raises:
        BoundaryError: The folder holds no predictor that states its label convention, the tag has another predictor,
            or the Hub refused. There is one commit, so nothing is ever half there; run it again.
    """
    from huggingface_hub import CommitOperationAdd

    folder = Path(folder)
    BoundaryPredictor.from_pretrained(str(folder)).close()
    rendered = render_card(folder, repo_id, **card)
    paths = sorted({file for pattern in PUBLISHED for file in folder.glob(pattern) if file.name != "README.md"})
    files = [CommitOperationAdd(path.name, path) for path in paths]
    files.append(CommitOperationAdd("README.md", str(rendered).encode()))
    with tempfile.TemporaryDirectory(prefix="tessy-push-") as cache:
        options: dict[str, Any] = {"token": token, "retry_timeout": retry_timeout, "backoff": backoff}
        repo = Repository(repo_id, Path(cache), repo_type="model", **options)
        try:
            return _publish(repo, private, tag, files)
        except HubError as error:
            raise BoundaryError(f"The predictor could not be pushed. {error}") from error


def _publish(repo: Repository, private: bool, tag: str | None, files: Sequence[CommitOperationAdd]) -> str:
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
        return repo.commit("main", files, "Add the boundary predictor")

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
