"""Render the model card of a trained boundary predictor: its folder goes in, a card comes out. Knows no Hub calls."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tessy_hf.errors import BoundaryError

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

CARD = Path(__file__).with_name("predictor_card.jinja")

_METRICS: dict[str, tuple[str, Callable[[dict[str, Any]], float]]] = {
    "Character F1 of style": ("f1", lambda of: of["char"]["f1"]),
    "Span F1 of style": ("f1", lambda of: of["span"]["f1"]),
    "First boundary within one word": ("accuracy", lambda of: of["boundary_words"]["within_1"]),
}
"""Kind, and where it is in the report, of each figure on the card."""

EXAMPLE = "Okay, so the user wants the sum. Hmm, wait. 3 + 4 = 7, and 7 + 5 = 12. So far so good."
"""What the Hub's widget shows the model on."""


def render_card(
    folder: str | Path,
    repo_id: str | None = None,
    *,
    license: str | None = None,  # noqa: A002 - the Hub's name for it
    language: str | list[str] | None = "en",
    datasets: list[str] | None = None,
) -> ModelCard:
    """Render the model card of a trained predictor from its config and ``report.json`` alone.

    Args:
        folder: The output of :func:`tessy_hf.boundary_training.train.train_boundary`.
        repo_id: Its id on the Hub; by default the folder's name is shown.
        license: The license of the weights, by its name on the Hub.
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
            metric_name=f"{metric}{f' ({group})' if group else ''}",
            metric_value=round(value(of), 4),
        )
        for group, of in groups.items()
        for metric, (kind, value) in _METRICS.items()
    ]
    base = report["settings"]["base"]
    data = ModelCardData(
        model_name=name.split("/")[-1],
        eval_results=results,
        language=language,
        license=license,
        datasets=datasets,
        base_model=base if base.count("/") == 1 else None,
        library_name="transformers",
        pipeline_tag="token-classification",
        tags=["tessy", "boundary-predictor", "reasoning"],
        widget=[{"text": EXAMPLE, "example_title": "A thought"}],
    )
    card: ModelCard = ModelCard.from_template(
        data, template_path=str(CARD), name=name, config=config, report=report, figures=figures, part=part, base=base
    )
    return card


def _read(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BoundaryError(
            f"{path.parent} holds no trained predictor: {error}. Pass a folder that `tessy train-boundary` wrote."
        ) from error
    return found
