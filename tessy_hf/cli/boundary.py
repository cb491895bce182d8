"""`tessy annotate`, `train-boundary`, `evaluate-boundary` and `push-boundary`: a boundary predictor's life."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from tessy_hf.cli.files import load
from tessy_hf.errors import SettingsError


def annotate(
    recipe: Annotated[Path, typer.Argument(help="A YAML recipe: the annotator, and how to sample segments.")],
    traces: Annotated[
        str, typer.Argument(help="Reasoning traces: a .jsonl, .json or .parquet file, or a dataset on the Hub.")
    ],
    out: Annotated[Path, typer.Argument(help="The folder to write annotated segments to, or to continue.")],
    limit: Annotated[int | None, typer.Option(help="The most segments in all.")] = None,
    votes: Annotated[int | None, typer.Option(help="How often to mark each segment; the majority counts.")] = None,
    split: Annotated[str, typer.Option(help="Which split of the traces.")] = "train",
) -> None:
    """Annotate the style spans in segments of reasoning traces with a strong model."""
    from tessy_hf.boundary_training import annotate as annotation
    from tessy_hf.recipe import read_annotation

    annotator, settings = read_annotation(recipe)
    settings |= {name: value for name, value in {"limit": limit, "votes": votes}.items() if value is not None}
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    found = annotation.annotate(load(traces, split), annotator, out, **settings)
    table = Table("answers", "")
    for outcome, count in found.counts.items():
        table.add_row(outcome, str(count))
    Console().print(table)
    if found.agreement:
        Console().print("agreement of pairs: character F1 {char_f1:.3f}, kappa {kappa:.3f}".format(**found.agreement))
    Console().print(f"{len(found.rows)} segments in {found.folder}", soft_wrap=True)


def train_boundary(
    recipe: Annotated[Path, typer.Argument(help="A YAML recipe: training settings and data files.")],
    out: Annotated[Path, typer.Argument(help="The folder to write the predictor to.")],
    data: Annotated[list[str] | None, typer.Option(help="Annotated segments; repeat for several files.")] = None,
    extra: Annotated[list[str] | None, typer.Option(help="Further annotated segments, for training only.")] = None,
    split: Annotated[str, typer.Option(help="Which split of the data.")] = "train",
) -> None:
    """Train a boundary predictor on annotated segments."""
    from tessy_hf.boundary_training import train
    from tessy_hf.recipe import read_training

    settings = read_training(recipe)
    given = {"data": data, "extra": extra}
    places = {name: settings.pop(name, None) for name in given} | {name: given[name] for name in given if given[name]}
    rows = {name: _chain(place, split) for name, place in places.items() if place}
    if "data" not in rows:
        raise SettingsError(f"The recipe {str(recipe)!r} names no `data`. Add it, or pass --data with a file.")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    made = train.train_boundary(rows["data"], out, extra=rows.get("extra"), **settings)
    _show(made.evaluation)
    Console().print(f"The predictor is in {made.folder}", soft_wrap=True)


def _chain(places: str | list[str], split: str) -> Iterator[Any]:
    for place in [places] if isinstance(places, str) else places:
        yield from load(place, split)


def push_boundary(
    folder: Annotated[Path, typer.Argument(help="A folder that train-boundary wrote.")],
    repo_id: Annotated[str, typer.Argument(help="The model repository on the Hub, user/name.")],
    private: Annotated[bool, typer.Option(help="Create the repository as private.")] = False,
    tag: Annotated[str | None, typer.Option(help="A tag to set on the commit.")] = None,
    license: Annotated[str | None, typer.Option(help="License of the weights, as the Hub names it.")] = None,  # noqa: A002
) -> None:
    """Publish a boundary predictor: weights, tokenizer, config and card in one commit."""
    from tessy_hf.hub import boundary_models as publish

    commit = publish.push_boundary(folder, repo_id, private=private, tag=tag, license=license)
    Console().print(f"{repo_id} at {commit}", soft_wrap=True)


def evaluate_boundary(
    data: Annotated[str, typer.Option(help="Annotated segments: a .jsonl or .parquet file, or a dataset on the Hub.")],
    model: Annotated[
        str | None, typer.Argument(help="A Hub id or folder; by default the predictor shipped with the package.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the model.")] = None,
    label_shift: Annotated[int | None, typer.Option(help="0 or 1, if the model's config does not say.")] = None,
    style_label: Annotated[int | None, typer.Option(help="The label id of style, if the config does not say.")] = None,
    window: Annotated[
        int | None, typer.Option(help="The most tokens read at once, if the config does not say.")
    ] = None,
    split: Annotated[str, typer.Option(help="Which split of the data.")] = "train",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Plot calibration and boundary errors to this file.")] = None,
    worst: Annotated[
        Path | None, typer.Option(help="Write the 20 worst segments to this HTML file, which quotes them.")
    ] = None,
) -> None:
    """Evaluate a boundary predictor on annotated segments."""
    from tessy_hf.boundary.predictor import SHIPPED, BoundaryPredictor
    from tessy_hf.boundary_training import metrics
    from tessy_hf.boundary_training.segments import read_segments

    segments = read_segments(load(data, split))
    stated: Any = {"label_shift": label_shift, "style_label": style_label, "window": window}
    predictor = BoundaryPredictor.from_pretrained(model or SHIPPED, revision=revision, **stated)
    evaluation = metrics.evaluate(predictor, segments)
    if worst is not None:
        metrics.write_worst(predictor, segments, worst)
    predictor.close()
    if plot is not None:
        metrics.plot(evaluation, plot)
    if as_json:
        typer.echo(evaluation.model_dump_json())
    else:
        _show(evaluation)


def _show(evaluation: Any) -> None:
    """Print an evaluation as a table: all segments, then each group."""
    table = Table(
        *("", "n", "char F1", "95%", "P", "R", "span F1", "±0", "±1", "±3"),
        title=f"{evaluation.model}: style, and the first boundary by words",
        box=None,
    )
    groups = {"all": evaluation.overall}
    groups |= {f"about {domain}": figures for domain, figures in evaluation.by_domain.items()}
    groups |= {**evaluation.by_family, **evaluation.by_source_model}
    groups |= {f"begins as {author}": figures for author, figures in evaluation.by_author.items()}
    for name, figures in groups.items():
        low, high = figures.char_f1_interval
        shares = (figures.char.precision, figures.char.recall, figures.span.f1)
        within = (figures.boundary_words.exact, figures.boundary_words.within_1, figures.boundary_words.within_3)
        cells = (*(f"{share:.2f}" for share in shares), *(f"{share:.0%}" for share in within))
        table.add_row(name, str(figures.segments), f"{figures.char.f1:.3f}", f"{low:.2f}-{high:.2f}", *cells)
    Console().print(table)
    kinds = Table("kind of phrase", "P", "R", title="style by kind of phrase", box=None)
    for kind, score in evaluation.by_kind.items():
        kinds.add_row(kind, f"{score.precision:.2f}", f"{score.recall:.2f}")
    Console().print(kinds)
    if not evaluation.causal:
        Console().print("The model is bidirectional: during synthesis it sees less context than in this evaluation.")
