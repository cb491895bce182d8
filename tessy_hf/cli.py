"""The `tessy` command: thin words over the package."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from tessy_hf.errors import JournalError, TessyError

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
def report(
    source: Annotated[
        str,
        typer.Argument(
            metavar="PATH_OR_REPO",
            help="Finished rows: a .parquet or .jsonl file, a saved folder, or a dataset on the Hub (me/data@v1.0.0).",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The HTML file to write.")] = Path("report.html"),
    against: Annotated[
        str | None, typer.Option(help="A second dataset of the same prompts, to show beside the first.")
    ] = None,
    split: Annotated[str, typer.Option(help="Which split, where there are several.")] = "train",
    config_name: Annotated[str | None, typer.Option("--config", help="Which configuration, on the Hub.")] = None,
    rows: Annotated[int, typer.Option(help="Show so many rows at most. The numbers are of all.")] = 10_000,
) -> None:
    """Write one HTML file with a dataset's numbers, its figures and its rows coloured by author."""
    from tessy_hf.report import write_report

    shown = write_report(source, out, against=against, split=split, config_name=config_name, rows=rows)
    size = out.stat().st_size / 1e6
    Console().print(f"{shown:,} rows in {out} ({size:.1f} MB). Open it in a browser.", soft_wrap=True, highlight=False)


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
