"""Publish a trained boundary predictor: its folder goes in, one commit of a stock model with its card comes out."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from tessy_hf.boundary.predictor import BoundaryPredictor
from tessy_hf.boundary_training.card import render_card
from tessy_hf.errors import BoundaryError, HubError
from tessy_hf.hub.folders import publish
from tessy_hf.hub.repository import Repository

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
            return publish(repo, private, files, "Add the boundary predictor", tag)
        except HubError as error:
            raise BoundaryError(f"The predictor could not be pushed. {error}") from error
