"""The `tessy` command: thin words over the package."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from tessy_hf.errors import DatasetError, JournalError, SettingsError, TessyError

app = typer.Typer(
    help="Cooperative teacher-student synthesis of reasoning data (TESSY).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

JournalPath = Annotated[Path, typer.Argument(help="A journal file.", show_default=False)]


@app.command()
def synthesize(
    recipe: Annotated[Path, typer.Argument(help="A YAML recipe: settings, teacher and student.")],
    data: Annotated[
        str, typer.Argument(help="Prompts: a .jsonl, .json, .csv or .parquet file, or a dataset on the Hub.")
    ],
    out: Annotated[Path, typer.Argument(help="Where to write the finished rows: a .parquet or .jsonl file.")],
    split: Annotated[str, typer.Option(help="Which split of the prompts.")] = "train",
) -> None:
    """Write an answer to each prompt, teacher and student together."""
    from datasets import Dataset

    from tessy_hf.transform import TessyTransform

    _writer(out)
    with TessyTransform.from_yaml(recipe) as transform:
        prompts = _load(data, split)
        features = transform.features(prompts)
        rows = prompts.map(transform, batched=True, features=features)
        finished = Dataset.from_generator(_iterate, gen_kwargs={"rows": rows}, features=features)
    _write(finished, out)


@app.command()
def status(journal: JournalPath) -> None:
    """Tell how far the runs in a journal are."""
    table = Table("run", "done", "to continue", "begun", "failed before")
    for fingerprint, counts in _open(journal).fingerprints().items():
        table.add_row(fingerprint, *map(str, (counts.done, counts.to_continue, counts.to_do, counts.failed_before)))
    Console().print(table)


@app.command()
def export(
    journal: JournalPath,
    out: Annotated[Path, typer.Argument(help="Where to write the rows: a .parquet or .jsonl file.")],
    run: Annotated[str | None, typer.Option(help="Which run, where the journal holds several.")] = None,
) -> None:
    """Write the finished rows of a journal as a dataset, even if the run never ended."""
    from datasets import Dataset, Features, Value

    from tessy_hf.columns import schema

    _writer(out)
    opened = _open(journal)
    runs = list(opened.fingerprints())
    if run is None and len(runs) != 1:
        raise JournalError(
            f"The journal {journal} holds {len(runs)} runs: {', '.join(runs)}. Pass --run with one of them."
        )
    if run is not None and run not in runs:
        raise JournalError(f"The journal {journal} holds no run {run!r}, but {', '.join(runs)}. Pass one of these.")
    rows = [{"key": key, **columns} for key, columns in opened.finished(run or runs[0])]
    opened.close()
    features = Features({"key": Value("string"), **schema(marks_in_content="thinking" not in _keys(rows))})
    _write(Dataset.from_list(rows, features=features), out)


@app.command()
def annotate(
    recipe: Annotated[Path, typer.Argument(help="A YAML recipe: the annotator, and what to draw from the traces.")],
    traces: Annotated[
        str, typer.Argument(help="Reasoning traces: a .jsonl, .json or .parquet file, or a dataset on the Hub.")
    ],
    out: Annotated[Path, typer.Argument(help="The folder to write the marked segments into, or to continue.")],
    limit: Annotated[int | None, typer.Option(help="Most segments altogether.")] = None,
    split: Annotated[str, typer.Option(help="Which split of the traces.")] = "train",
) -> None:
    """Let a model mark the style spans in segments of reasoning traces."""
    from tessy_hf.boundary import annotate as annotation
    from tessy_hf.recipe import read_annotation

    annotator, settings = read_annotation(recipe)
    settings |= {} if limit is None else {"limit": limit}
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    found = annotation.annotate(_load(traces, split), annotator, out, **settings)
    table = Table("answers", "")
    for outcome, count in found.counts.items():
        table.add_row(outcome, str(count))
    Console().print(table)
    Console().print(f"{len(found.rows)} segments in {found.folder}", soft_wrap=True)


@app.command("train-boundary")
def train_boundary(
    recipe: Annotated[Path, typer.Argument(help="A YAML recipe: training settings, and where the data are.")],
    out: Annotated[Path, typer.Argument(help="The folder to write the predictor into.")],
    data: Annotated[list[str] | None, typer.Option(help="Segments with marked style spans (again for more).")] = None,
    extra: Annotated[list[str] | None, typer.Option(help="More of them, for training only.")] = None,
    texts: Annotated[list[str] | None, typer.Option(help="Thinking to make a small base model from.")] = None,
    split: Annotated[str, typer.Option(help="Which split of the data.")] = "train",
) -> None:
    """Train a boundary predictor from segments whose style spans are marked."""
    from tessy_hf.boundary import train
    from tessy_hf.boundary.traces import thinking

    settings = train.read_recipe(recipe)
    told = {"data": data, "extra": extra, "texts": texts}
    places = {name: settings.pop(name, None) for name in told} | {name: told[name] for name in told if told[name]}
    rows = {name: _chain(place, split) for name, place in places.items() if place}
    if "data" not in rows:
        raise SettingsError(f"The recipe {str(recipe)!r} names no `data`. Add it, or pass --data with a file.")
    plain = (thinking(row) or row.get("text") or "" for row in rows["texts"]) if "texts" in rows else None
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    made = train.train_boundary(rows["data"], out, extra=rows.get("extra"), texts=plain, **settings)
    _show(made.evaluation)
    Console().print(f"The predictor is in {made.folder}", soft_wrap=True)


def _chain(places: str | list[str], split: str) -> Iterator[Any]:
    for place in [places] if isinstance(places, str) else places:
        yield from _load(place, split)


@app.command("push-boundary")
def push_boundary(
    folder: Annotated[Path, typer.Argument(help="A folder that train-boundary wrote.")],
    repo_id: Annotated[str, typer.Argument(help="Where to on the Hub, as name/model.")],
    private: Annotated[bool, typer.Option(help="Make it private where it is made.")] = False,
    tag: Annotated[str | None, typer.Option(help="A tag to set on the commit.")] = None,
    license: Annotated[str | None, typer.Option(help="The licence of the weights, by its name on the Hub.")] = None,  # noqa: A002
) -> None:
    """Publish a boundary predictor: weights, tokenizer, config and card in one commit."""
    from tessy_hf.boundary import publish

    commit = publish.push_boundary(folder, repo_id, private=private, tag=tag, license=license)
    Console().print(f"{repo_id} at {commit}", soft_wrap=True)


@app.command("evaluate-boundary")
def evaluate_boundary(
    data: Annotated[
        str, typer.Option(help="Segments with marked style spans: a .jsonl or .parquet file, or a dataset on the Hub.")
    ],
    model: Annotated[
        str | None, typer.Argument(help="A Hub id or folder; by default the small predictor that comes along.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the model.")] = None,
    label_shift: Annotated[int | None, typer.Option(help="0 or 1, where the model's config does not say.")] = None,
    style_label: Annotated[int | None, typer.Option(help="The label number that means style, likewise.")] = None,
    window: Annotated[int | None, typer.Option(help="How many tokens are read at most, likewise.")] = None,
    split: Annotated[str, typer.Option(help="Which split of the data.")] = "train",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw calibration and boundary errors into this file.")] = None,
) -> None:
    """Measure a boundary predictor on segments whose style spans are marked."""
    from tessy_hf.boundary import metrics
    from tessy_hf.boundary.predictor import SHIPPED, BoundaryPredictor
    from tessy_hf.boundary.segments import read_segments

    segments = read_segments(_load(data, split))
    stated: Any = {"label_shift": label_shift, "style_label": style_label, "window": window}
    predictor = BoundaryPredictor.from_pretrained(model or SHIPPED, revision=revision, **stated)
    evaluation = metrics.evaluate(predictor, segments)
    predictor.close()
    if plot is not None:
        metrics.plot(evaluation, plot)
    if as_json:
        typer.echo(evaluation.model_dump_json())
    else:
        _show(evaluation)


def _show(evaluation: Any) -> None:
    """Print an evaluation as a table: a line for all segments, then one for each group."""
    table = Table(
        *("", "n", "char F1", "95%", "P", "R", "span F1", "±0", "±1", "±3"),
        title=f"{evaluation.model}: style, and the first boundary by words",
        box=None,
    )
    groups = {"all": evaluation.overall, **evaluation.by_family, **evaluation.by_source_model}
    groups |= {f"begins as {author}": figures for author, figures in evaluation.by_author.items()}
    for name, figures in groups.items():
        low, high = figures.char_f1_interval
        shares = (figures.char.precision, figures.char.recall, figures.span.f1)
        within = (figures.boundary_words.exact, figures.boundary_words.within_1, figures.boundary_words.within_3)
        cells = (*(f"{share:.2f}" for share in shares), *(f"{share:.0%}" for share in within))
        table.add_row(name, str(figures.segments), f"{figures.char.f1:.3f}", f"{low:.2f}-{high:.2f}", *cells)
    Console().print(table)
    if not evaluation.causal:
        Console().print("The model reads text on both sides: while a row is written it sees less than here.")


def _keys(rows: list[dict[str, Any]]) -> set[str]:
    return {key for row in rows for message in row["messages"] for key in message}


def _open(path: Path) -> Any:
    from tessy_hf.journal import Journal

    if not path.is_file():
        raise JournalError(f"There is no journal at {path}. A file that a run wrote is expected; check the path.")
    return Journal(path, "")


def _iterate(rows: Any) -> Iterator[Any]:
    yield from rows


def _load(data: str, split: str) -> Any:
    from datasets import load_dataset

    kinds = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
    kind = kinds.get(Path(data).suffix)
    if kind is None:
        return load_dataset(data, split=split, streaming=True)
    if not any(mark in data for mark in ("://", "*")) and not Path(data).is_file():
        raise DatasetError(f"There is no file {data!r}. Check the path, or name a dataset on the Hub.")
    return load_dataset(kind, data_files=data, split=split, streaming=True)


def _writer(out: Path) -> str:
    if out.suffix not in (".parquet", ".jsonl"):
        raise TessyError(
            f"The output {str(out)!r} is neither .parquet nor .jsonl. Name the file with one of these endings."
        )
    return out.suffix


def _write(dataset: Any, out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    (dataset.to_parquet if _writer(out) == ".parquet" else dataset.to_json)(str(out))
    Console().print(f"{len(dataset)} rows in {out}", soft_wrap=True)


def main() -> None:
    """Run the command; a mistake of the user's ends in a sentence, not in a traceback."""
    try:
        app()
    except TessyError as error:
        Console(stderr=True).print(f"[bold red]{type(error).__name__}[/]", end=": ")
        Console(stderr=True).print(str(error), markup=False, soft_wrap=True)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
