"""Publish a trained predictor: its folder goes in, one commit of a stock model with its card comes out on the Hub."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tessy_hf.boundary.predictor import BoundaryPredictor
from tessy_hf.errors import BoundaryError

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi, ModelCard

CARD = Path(__file__).with_name("templates") / "predictor_card.jinja"

PUBLISHED = (
    "README.md",
    "report.json",
    "config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.jinja",
)
"""Which files of the folder are the model. Others, as a base model made for it, stay where they are."""

_METRICS = {
    "char_f1": ("f1", "Character F1 of style"),
    "span_f1": ("f1", "Span F1 of style"),
    "boundary_within_1_word": ("accuracy", "First boundary within one word"),
}


def render_card(
    folder: str | Path,
    repo_id: str | None = None,
    *,
    license: str | None = None,  # noqa: A002 - the Hub's name for it
    language: str | list[str] | None = "en",
    datasets: list[str] | None = None,
) -> ModelCard:
    """Make the model card of a trained predictor from its config and ``report.json``, and nothing else.

    Args:
        folder: What :func:`tessy_hf.boundary_training.train.train_boundary` wrote.
        repo_id: Where it will be on the Hub; by default the folder's name is shown.
        license: The licence of the weights, by its name on the Hub.
        language: The language of the training segments.
        datasets: Hub ids of the training segments.

    Raises:
        BoundaryError: The folder holds no trained predictor.
    """
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    folder = Path(folder)
    config, report = _read(folder / "config.json"), _read(folder / "report.json")
    part = "test" if "test" in report else "validation"
    figures, name = report[part], repo_id or folder.name
    groups = {"": figures["overall"], **figures["by_family"]}
    results = [
        EvalResult(
            task_type="token-classification",
            task_name="Style spans in reasoning",
            dataset_type=datasets[0] if datasets else "style-spans",
            dataset_name=f"{part} segments",
            dataset_split=part,
            metric_type=kind,
            metric_name=f"{shown}{f' ({group})' if group else ''}",
            metric_value=round(_metric(of, metric), 4),
        )
        for group, of in groups.items()
        for metric, (kind, shown) in _METRICS.items()
    ]
    base = report["settings"]["base"]
    data = ModelCardData(
        model_name=name.split("/")[-1],
        eval_results=results,
        language=language,
        license=license,
        datasets=datasets,
        base_model=base if isinstance(base, str) and base.count("/") == 1 else None,
        library_name="transformers",
        pipeline_tag="token-classification",
        tags=["tessy", "boundary-predictor", "reasoning"],
    )
    card: ModelCard = ModelCard.from_template(
        data, template_path=str(CARD), name=name, config=config, report=report, figures=figures, part=part, base=base
    )
    return card


def _metric(figures: dict[str, Any], metric: str) -> float:
    values = {
        "char_f1": figures["char"]["f1"],
        "span_f1": figures["span"]["f1"],
        "boundary_within_1_word": figures["boundary_words"]["within_1"],
    }
    return float(values[metric])


def _read(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BoundaryError(
            f"{path.parent} holds no trained predictor: {error}. Pass a folder that `tessy train-boundary` wrote."
        ) from error
    return found


def push_boundary(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    tag: str | None = None,
    token: str | None = None,
    **card: Any,
) -> str:
    """Push a trained predictor to the Hub in one commit: weights, tokenizer, config, card and report.

    Args:
        folder: What :func:`tessy_hf.boundary_training.train.train_boundary` wrote.
        repo_id: Where to, as ``name/model``; made if it is not there.
        private: Whether to make it private where it is made.
        tag: A tag to set on the commit. One that is there stays, and is enough if it is of this very predictor.
        token: A token that may write; by default that of the environment.
        **card: See :func:`render_card`.

    Returns:
        The id of the commit, for ``revision=``.

    Raises:
        BoundaryError: The folder holds no predictor that states its label convention, the tag is of another, or the
            Hub refused. As there is one commit, nothing is ever half there; run it again.
    """
    import httpx2
    from huggingface_hub import CommitOperationAdd, HfApi

    folder = Path(folder)
    BoundaryPredictor.from_pretrained(str(folder)).close()
    rendered = render_card(folder, repo_id, **card)
    files = sorted({file for pattern in PUBLISHED for file in folder.glob(pattern) if file.name != "README.md"})
    operations = [CommitOperationAdd(file.name, file) for file in files]
    operations.append(CommitOperationAdd("README.md", str(rendered).encode()))
    api = HfApi(token=token)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        api.auth_check(repo_id, write=True)
        if tag is not None and tag in {there.name for there in api.list_repo_refs(repo_id).tags}:
            return _tagged(api, repo_id, tag, operations)
        commit = api.create_commit(repo_id, operations, commit_message="Add the boundary predictor")
        if tag is not None:
            api.create_tag(repo_id, tag=tag, revision=commit.oid)
    except (httpx2.HTTPError, OSError, RuntimeError) as error:
        raise BoundaryError(
            f"The predictor could not be pushed to {repo_id!r}: {error} Expected are a connection and, in HF_TOKEN or "
            "from `hf auth login`, a token that may write there; run it again."
        ) from error
    return str(commit.oid)


def _tagged(api: HfApi, repo_id: str, tag: str, operations: list[CommitOperationAdd]) -> str:
    """Return the commit of a tag at which these very files are, as an earlier push may have left them.

    Raises:
        BoundaryError: Others are.
    """
    from huggingface_hub import RepoFile

    found = api.get_paths_info(repo_id, [operation.path_in_repo for operation in operations], revision=tag)
    there = {file.path: file for file in found if isinstance(file, RepoFile)}
    for operation in operations:
        file = there.get(operation.path_in_repo)
        kept = file and (file.lfs.sha256 if file.lfs else file.blob_id)
        if file is None or kept != _digest(operation, large=file.lfs is not None):
            raise BoundaryError(
                f"{repo_id} has a tag {tag!r} already, with another {operation.path_in_repo}. A tag does not move; "
                "pass another one. Nothing was pushed."
            )
    return str(api.repo_info(repo_id, revision=tag).sha)


def _digest(operation: CommitOperationAdd, *, large: bool) -> str:
    """Return what the Hub knows a file's content by: its SHA-256 if it is large, else git's name for it."""
    if large:
        return operation.upload_info.sha256.hex()
    with operation.as_file() as file:
        data = file.read()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
