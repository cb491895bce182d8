"""Train a boundary predictor: segments with marked style spans go in, a folder with a token classifier comes out.

Any base model that ``AutoModelForTokenClassification`` loads will do (paper, section 2.2: Qwen3-0.6B-Base). The
folder's ``config.json`` states how the labels are to be read.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from tessy_hf.boundary.predictor import BoundaryPredictor
from tessy_hf.boundary_training.card import render_card
from tessy_hf.boundary_training.examples import cut
from tessy_hf.boundary_training.fit import fit, load_base, save
from tessy_hf.boundary_training.metrics import Evaluation, evaluate
from tessy_hf.boundary_training.segments import Segment, read_segments, split_by_problem
from tessy_hf.boundary_training.settings import TrainingSettings
from tessy_hf.text.vocabulary import Vocabulary

Rows = str | Path | Iterable[Mapping[str, Any] | Segment]


class Trained(NamedTuple):
    """The result of :func:`train_boundary`.

    Attributes:
        folder: The model, its tokenizer, ``report.json`` and ``README.md``.
        evaluation: The figures of the test segments, or of the validation segments if ``test_share`` is 0.
    """

    folder: Path
    evaluation: Evaluation


def train_boundary(
    data: Rows,
    out: str | Path,
    *,
    extra: Rows | None = None,
    validation: Rows | None = None,
    test: Rows | None = None,
    **settings: Any,
) -> Trained:
    """Train a predictor.

    Args:
        data: Segments: a JSONL file, a ``datasets.Dataset`` or any rows with ``text``, ``style_spans`` and
            ``problem_id`` (:meth:`tessy_hf.boundary_training.segments.Segment.from_row`).
        out: The folder to write. An interrupted run resumes from its last epoch.
        extra: More training segments, for instance pseudo-labeled ones, with a ``weight`` each. Those about problems
            of validation or test are left out.
        validation: Segments for early stopping; by default a share of the problems of ``data``.
        test: Segments for the final figures; by default a share of the problems of ``data``.
        **settings: See :class:`tessy_hf.boundary_training.settings.TrainingSettings`.

    Raises:
        SettingsError: A setting is unknown or out of range.
        DatasetError: The segments cannot be read or split.
        BoundaryError: The base model cannot be loaded, or ``accelerate`` is missing.
    """
    chosen = TrainingSettings.check(**settings)
    begun, folder = time.monotonic(), Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    parts = _split(data, extra, validation, test, chosen)
    network, tokenizer = load_base(chosen)
    vocabulary = Vocabulary(tokenizer, chosen.base)
    pieces = {name: [p for s in part for p in cut(s, vocabulary, chosen.window)] for name, part in parts.items()}
    history = fit(network, vocabulary, [*pieces["train"], *pieces["extra"]], pieces["validation"], chosen, folder)
    save(network, tokenizer, chosen, folder)
    predictor = BoundaryPredictor.from_pretrained(str(folder))
    figures = {name: evaluate(predictor, parts[name]) for name in ("validation", "test") if parts[name]}
    predictor.close()
    figures = {name: found.model_copy(update={"model": folder.name}) for name, found in figures.items()}
    described = chosen.model_dump(mode="json")
    if Path(chosen.base).is_dir():
        described["base"] = Path(chosen.base).name  # paths of this machine are not published
    report = {
        "settings": described,
        "segments": {name: len(part) for name, part in parts.items()},
        "problems": {name: len({segment.problem for segment in part}) for name, part in parts.items()},
        "parameters": network.num_parameters(),
        "epochs": history,
        "seconds": round(time.monotonic() - begun),
        "versions": {package: version(package) for package in ("torch", "transformers", "tokenizers")},
        **{name: found.model_dump(mode="json") for name, found in figures.items()},
    }
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    render_card(folder).save(folder / "README.md")
    return Trained(folder, figures.get("test") or figures["validation"])


def _split(
    data: Rows, extra: Rows | None, validation: Rows | None, test: Rows | None, settings: TrainingSettings
) -> dict[str, list[Segment]]:
    train = read_segments(data)
    kept = [] if test is None else read_segments(test)
    if test is None and settings.test_share:
        train, kept = split_by_problem(train, settings.test_share, settings.seed)
    if validation is None:
        train, stopping = split_by_problem(train, settings.validation_share, settings.seed + 1)
    else:
        stopping = read_segments(validation)
    held_out = {segment.problem for segment in (*kept, *stopping)} - {""}
    more = [] if extra is None else [s for s in read_segments(extra) if s.problem not in held_out]
    return {"train": train, "extra": more, "validation": stopping, "test": kept}
