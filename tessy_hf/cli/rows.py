"""`tessy status`, `export` and `merge`: what runs have written, as datasets."""

from __future__ import annotations

import dataclasses
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

from tessy_hf.cli.files import load

if TYPE_CHECKING:
    from tessy_hf.cluster.merge import Report
    from tessy_hf.manifest import RunRecord
    from tessy_hf.run.journal import Counts

from tessy_hf.cli.synthesize import open_transform

Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an output that is not of this run.")]
JournalPath = Annotated[Path, typer.Argument(help="A journal file.", show_default=False)]


def status(
    journal: Annotated[
        Path | None,
        typer.Argument(help="A journal; by default all journals in this folder, below it, and in the default place."),
    ] = None,
) -> None:
    """Show how far runs are: recipe, models, dates, progress, and which settings differ."""
    from tessy_hf.report.show import visible
    from tessy_hf.rows import run_record
    from tessy_hf.run.finished import open_journal
    from tessy_hf.run.journal_reader import JournalReader
    from tessy_hf.run.stores import find_journals

    paths = [open_journal(journal).path] if journal is not None else find_journals(Path.cwd())
    runs = [(path, run, counts) for path in paths for run, counts in JournalReader(path, "").fingerprints().items()]
    records = [run_record.parse(JournalReader(path, run).description() or "{}", path) for path, run, _ in runs]
    told = [record.settings if record else {} for record in records]
    names = dict.fromkeys(name for settings in told for name in settings)
    differing = [name for name in names if len({json.dumps(one[name]) for one in told if name in one}) > 1]
    console = Console()
    for (path, run, counts), record, settings in zip(runs, records, told, strict=True):
        lines = [
            _shown_path(path),
            f"  {run}  {_models(record)}",
            f"  {_progress(counts)}; last written {_date(path)}",
        ]
        chosen = [f"{name}={settings[name]}" for name in differing if name in settings]
        lines += [f"  differs in: {', '.join(chosen)}"] if chosen else []
        console.print(visible("\n".join(lines)), markup=False, highlight=False, soft_wrap=True)
    if not runs:
        console.print("No journals here, below, or in the default place. A run with a journal makes one.")


def _shown_path(path: Path) -> str:
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _models(record: RunRecord | None) -> str:
    if record is None or record.student is None:
        return "models unknown"
    models = " → ".join(one.model.name for one in (record.teacher, record.student) if one is not None)
    begun = (record.begun or "?")[:16].replace("T", " ")
    recipe = f"{record.recipe}, " if record.recipe else ""
    return f"{recipe}{record.method}: {models}, begun {begun} UTC"


def _progress(counts: Counts) -> str:
    total = sum(counts)
    share = f" ({counts.done / total:.0%})" if total else ""
    more = {"to continue": counts.to_continue, "to do": counts.to_do, "failed before": counts.failed_before}
    return f"{counts.done:,} of {total:,} rows done{share}" + "".join(
        f", {n:,} {what}" for what, n in more.items() if n
    )


def _date(path: Path) -> str:
    return datetime.fromtimestamp(path.stat().st_mtime, UTC).strftime("%Y-%m-%d %H:%M UTC")


def export(
    journal: JournalPath,
    out: Annotated[Path, typer.Argument(help="Where to write the rows: a .parquet or .jsonl file.")],
    run: Annotated[str | None, typer.Option(help="Which run, if the journal holds several.")] = None,
    overwrite: Overwrite = False,
    form: Annotated[
        Literal["tessy", "dialogs"], typer.Option("--format", help="Our columns, or the TESSY authors' dialogs.")
    ] = "tessy",
) -> None:
    """Write the finished rows of a journal, even if the run never ended.

    They have no columns of the prompts; `tessy merge JOURNAL --prompts ...` writes these too.
    """
    from tessy_hf.rows import foreign, parquet
    from tessy_hf.rows.output import Output
    from tessy_hf.run.finished import Rows, open_journal
    from tessy_hf.settings import Settings

    output = Output(out, [journal], overwrite=overwrite)
    open_journal(journal).fingerprints()  # other files of rows are no journal
    rows = Rows(journal, run, max_attempts=3)
    (fingerprint,) = rows.fingerprints() or {""}
    own = Settings.check(id_column="key")
    if form == "dialogs":
        output.check_old(fingerprint, own)
        theirs = foreign.dialogs((row for table in rows.tables() for row in table.to_pylist()), "key")
        count = output.write(
            parquet.tables(theirs, foreign.dialog_features()), foreign.dialog_features(), lambda: None
        )
    else:
        wanted = (key for table in rows.tables() for key in parquet.keys(table, "key"))
        output.check_old(fingerprint, own, lambda: list(wanted))
        count = output.write(rows.tables(), rows.features, lambda: rows.record(fingerprint))
    Console().print(f"{count} rows in {out}", soft_wrap=True)


def merge(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="PARTS...",
            help="What the hosts wrote: folders of shared rows (a path, s3://...), journals, or .parquet files.",
            show_default=False,
        ),
    ],
    data: Annotated[str, typer.Option("--prompts", help="All prompts of the run, as for synthesize.")],
    out: Annotated[
        Path | None,
        typer.Option(help="Where to write the rows: a .parquet or .jsonl file, or a folder. Without it, only check."),
    ] = None,
    split: Annotated[str, typer.Option(help="Which split of the prompts.")] = "train",
    config: Annotated[str | None, typer.Option(help="Which configuration of the prompts.")] = None,
    recipe: Annotated[
        str | None, typer.Option(help="The recipe of the run; needed for .parquet files of rows only.")
    ] = None,
    change: Annotated[list[str] | None, typer.Option("--set", help="Change the recipe, as for synthesize.")] = None,
    run: Annotated[str | None, typer.Option(help="Which run, if there are rows of several.")] = None,
    first: Annotated[
        bool, typer.Option("--first", help="If rows differ, take the one from the first source.")
    ] = False,
    incomplete: Annotated[
        bool,
        typer.Option("--incomplete", help="Write rows even if some are missing; still exits with 1."),
    ] = False,
    overwrite: Overwrite = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, with all ids.")] = False,
) -> None:
    """Merge what many hosts wrote into one dataset, after proving that each prompt has exactly one row."""
    from tessy_hf.cluster.merge import Merge

    settings = open_transform(recipe, change or [], run).settings if recipe is not None else None
    prompts = load(data, split, config, line_column="prompt")
    merged = Merge(sources, prompts, settings=settings, run=run, first=first, incomplete=incomplete)
    _print_report(merged.report, as_json)
    merged.check()
    if out is not None:
        count = merged.write(out, overwrite=overwrite)
        Console(stderr=as_json).print(f"{count} rows in {out}", soft_wrap=True)
    if merged.report.missing:
        raise typer.Exit(1)


def _print_report(report: Report, as_json: bool) -> None:
    """Print the report of a merge."""
    from tessy_hf.rows.output import some

    found = dataclasses.asdict(report)
    if as_json:
        typer.echo(json.dumps(found))
        return
    console = Console()
    console.print(
        f"{report.prompts} prompts, {report.unusable} of them unusable; {report.failed} rows failed", highlight=False
    )
    for name, what in (
        ("missing", "prompts without a row"),
        ("duplicates", "duplicate rows, all the same"),
        ("differing", "duplicate rows that differ"),
        ("foreign", "rows of unknown prompts, left out"),
    ):
        ids = found[name]
        console.print(f"{len(ids)} {what}{': ' + some(ids) if ids else ''}", markup=False, soft_wrap=True)
