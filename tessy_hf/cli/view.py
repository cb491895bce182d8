"""`tessy view`: rows in the terminal, colored by author, also while their run goes on."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain, islice
from typing import Annotated, Any

import typer
from rich.console import Console

from tessy_hf.cli.files import quiet
from tessy_hf.errors import DatasetError


def view(
    source: Annotated[
        str,
        typer.Argument(
            metavar="ROWS", help="Rows: a .parquet or .jsonl file, a journal, a folder, or a dataset on the Hub."
        ),
    ],
    row: Annotated[
        list[str] | None, typer.Option(help="Only the row with this id, or number; repeat for more.")
    ] = None,
    limit: Annotated[int, typer.Option("--limit", "-n", help="The most rows to show.", min=1)] = 20,
    split: Annotated[str, typer.Option(help="Which split, if there are several.")] = "train",
    config: Annotated[str | None, typer.Option(help="Which configuration, on the Hub.")] = None,
    run: Annotated[str | None, typer.Option(help="Which run of a journal, if it holds several.")] = None,
) -> None:
    """Show rows in the terminal, colored by author; for a journal, also rows that are being written."""
    from tessy_hf.report.show import ShownRow, legend
    from tessy_hf.run.finished import half_written, open_rows

    with quiet():
        finished, begun = open_rows(source, split, config, run), list(half_written(source, run))
    rows = enumerate(chain(finished, begun))
    if row:
        wanted = [(number, one) for number, one in rows if _is_named(one, number, row)]
        if not wanted:
            raise DatasetError(f"{source!r} has no row {', '.join(row)}. Pass an id, or a number from 0 on.")
    else:
        wanted = list(islice(rows, limit))
    console = Console()
    console.print(legend(colored=console.is_terminal and not console.no_color), end="\n\n")
    for number, one in wanted:
        console.print(ShownRow(one, number), soft_wrap=not console.is_terminal)
    more = "; --limit shows more, --row ID one" if len(wanted) < len(finished) + len(begun) and not row else ""
    half = f" and {len(begun)} being written" if begun else ""
    console.print(f"{len(wanted)} shown of {len(finished):,} finished rows{half}{more}", highlight=False)


def _is_named(row: Mapping[str, Any], number: int, names: list[str]) -> bool:
    from tessy_hf.report.viewer import row_id

    return row_id(row) in names or str(number) in names
