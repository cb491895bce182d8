"""`tessy report` and `tessy analyze`: rows as pages to look at."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from tessy_hf.cli.files import check_page, quiet
from tessy_hf.errors import OutputError, SettingsError


def report(
    source: Annotated[
        str,
        typer.Argument(
            metavar="PATH_OR_REPO",
            help="Rows of a run or others' (TESSY, OpenThoughts, Nemotron, Open-R1): a .parquet or .jsonl file, a "
            "saved folder, a journal, or a dataset on the Hub (me/data@v1.0.0).",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The HTML file to write.")] = Path("report.html"),
    against: Annotated[
        str | None, typer.Option(help="A second dataset of the same prompts, to show beside the first.")
    ] = None,
    split: Annotated[str, typer.Option(help="Which split, if there are several.")] = "train",
    config_name: Annotated[str | None, typer.Option("--config", help="Which configuration, on the Hub.")] = None,
    rows: Annotated[int, typer.Option(help="The most rows to show; the numbers cover all rows.")] = 10_000,
    run: Annotated[str | None, typer.Option(help="Which run of a journal, if it holds several.")] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="A folder or Hub id: counts the tokens of rows that others released.")
    ] = None,
    space: Annotated[
        Path | None, typer.Option(help="A folder to write a static Space of the Hub to, for `tessy push --space`.")
    ] = None,
) -> None:
    """Write one HTML file with a dataset's statistics, figures and rows colored by author."""
    from tessy_hf.engines.scoring import load_student
    from tessy_hf.report.page import write_report, write_space

    check_page(out)
    write, out = (write_report, out) if space is None else (write_space, space)
    with quiet():
        vocabulary = load_student(tokenizer)[0] if tokenizer is not None else None
        shown = write(
            source,
            out,
            against=against,
            split=split,
            config_name=config_name,
            rows=rows,
            run=run,
            vocabulary=vocabulary,
        )
    out = out if space is None else space / "index.html"
    size = out.stat().st_size / 1e6
    Console().print(f"{shown:,} rows in {out} ({size:.1f} MB). Open it in a browser.", soft_wrap=True, highlight=False)


def analyze(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="A B [C]",
            help="Two or three datasets of the same prompts, of a run or others': .parquet or .jsonl files, "
            "saved folders, or datasets on the Hub (me/data@v1.0.0).",
            show_default=False,
        ),
    ],
    tokenizer: Annotated[
        str | None, typer.Option(help="The student's tokenizer, a folder or a Hub id. --student is enough.")
    ] = None,
    student: Annotated[
        str | None,
        typer.Option(help="The student itself, to measure how likely it finds the texts."),
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="The HTML file to write.")] = Path("analysis.html"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON and nothing else.")] = False,
    split: Annotated[str, typer.Option(help="Which split, if there are several.")] = "train",
    limit: Annotated[int, typer.Option(help="The most prompts to compare.")] = 10_000,
    nll_rows: Annotated[int, typer.Option(help="Rows of each dataset that the student reads.")] = 200,
    nll_tokens: Annotated[
        int,
        typer.Option(
            min=3, help="Tokens of a row, prompt included, that the student reads; what comes after has no figures."
        ),
    ] = 4096,
    columns: Annotated[
        Path | None,
        typer.Option(help="A folder to write the datasets to, with columns for the student's surprise."),
    ] = None,
) -> None:
    """Compare datasets of the same prompts: similarity, lengths, authors, words, and likelihood under the student."""
    from tessy_hf.engines.scoring import load_student
    from tessy_hf.report import compare_page
    from tessy_hf.report.compare import analyze as compare
    from tessy_hf.report.compare import with_surprise
    from tessy_hf.rows.loading import load, short_names

    check_page(out)
    if student is None and tokenizer is None:
        raise SettingsError("No tokenizer given. Pass --student or --tokenizer with the model to be trained.")
    if columns is not None and student is None:
        raise SettingsError("--columns needs the student's likelihoods. Pass --student with the model to be trained.")
    datasets = {name: load(source, split) for name, source in zip(short_names(sources), sources, strict=True)}
    files = _new_files(datasets, columns) if columns is not None else []
    vocabulary, scorer = load_student(tokenizer or str(student), student)
    if scorer is not None:
        for rows, file in zip(datasets.values(), files, strict=False):
            scored, cut = with_surprise(rows, vocabulary, scorer, nll_tokens)
            scored.to_parquet(str(file))
            _tell_cut(str(file), cut, len(rows), nll_tokens)
    result = compare(datasets, vocabulary, limit=limit, scorer=scorer, nll_rows=nll_rows, nll_tokens=nll_tokens)
    if as_json:
        typer.echo(json.dumps(result))
        return
    compare_page.write(out, result)
    lines = [f"{' and '.join(one['of'])}: similarity {one['mean']:.3f}" for one in result["similarity"]]
    for name, lengths in result["tokens"].items():
        means = ", ".join(f"{part} {lengths[part]['mean']:,.1f}" for part in ("thinking", "answer"))
        lines.append(f"{name}: mean tokens: {means}")
    for name, one in (result["surprise"] or {}).items():
        means = f"surprisal {one['surprisal']:.3f} nats, rank {one['rank']:.2f}"
        lines.append(f"{name}: no text scored" if one["rsr"] is None else f"{name}: RSR {one['rsr']:.2f} ({means})")
    for line in lines:
        Console().print(line, markup=False, highlight=False, soft_wrap=True)
    for name, one in (result["surprise"] or {}).items():
        _tell_cut(name, one["cut"], min(nll_rows, result["prompts"]), nll_tokens)
    Console().print(f"{result['prompts']:,} prompts compared in {out}. Open it in a browser.", soft_wrap=True)


def _tell_cut(name: str, cut: int, rows: int, tokens: int) -> None:
    """Say on stderr that rows are longer than what the student reads of them."""
    if cut:
        told = f"{name}: {cut:,} of {rows:,} rows have more than {tokens:,} tokens; the student read only the first "
        typer.echo(f"{told}{tokens:,} of each, prompt included. Pass a higher --nll-tokens.", err=True)


def _new_files(names: Iterable[str], folder: Path) -> list[Path]:
    """Return a new file in a folder for each dataset.

    Raises:
        OutputError: One is there, or would be there twice.
    """
    files = [folder / f"{name.removesuffix('.parquet').replace('/', '--')}.parquet" for name in names]
    if there := next((file for file in files if file.exists() or files.count(file) > 1), None):
        raise OutputError(f"{there} is there already, or would be twice. Pass another folder to --columns.")
    folder.mkdir(parents=True, exist_ok=True)
    return files
