"""Write the report of a dataset: its name goes in, one HTML file with statistics, figures and rows comes out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from tessy_hf.errors import SettingsError
from tessy_hf.report import figures, viewer
from tessy_hf.report.html import drawn, render
from tessy_hf.report.statistics import evenly, summarize
from tessy_hf.report.tables import Table, comparison, count, percent, tables
from tessy_hf.rows.loading import short_names
from tessy_hf.run.finished import open_rows

if TYPE_CHECKING:
    from datasets import Dataset

    from tessy_hf.text.vocabulary import Vocabulary

ROWS = 10_000
"""The default for the most rows to show."""


def write_report(
    source: str, out: Path, *, against: str | None = None, split: str = "train", config_name: str | None = None,
    rows: int = ROWS, run: str | None = None, vocabulary: Vocabulary | None = None,
) -> int:  # fmt: skip
    """Write one self-contained HTML file with a dataset's statistics, figures and rows.

    Statistics are those of all rows. If there are more than ``rows`` rows, that many are shown, evenly spaced.

    Args:
        source: A journal, or a dataset as for :func:`tessy_hf.rows.loading.load`.
        out: The file to write.
        against: A second dataset of the same prompts, for instance of the teacher alone, to show beside the first.
        split: Which split, where there are several.
        config_name: Which configuration, on the Hub.
        rows: The most rows to show.
        run: Which run of a journal, where it holds several.
        vocabulary: Counts the tokens of rows that others released; without one they have no lengths.

    Returns:
        How many rows are shown.

    Raises:
        DatasetError: A dataset cannot be read, or its rows are of no known format.
        SettingsError: ``rows`` is below 1.
    """
    if rows < 1:
        raise SettingsError(f"rows={rows} shows nothing. Pass at least 1; the default is {ROWS:,}.")
    dataset = open_rows(source, split, config_name, run, vocabulary)
    summary = summarize(dataset)
    other = open_rows(against, split, config_name, run, vocabulary) if against is not None else None
    names = short_names([source] if against is None else [source, against])
    shown = evenly(len(dataset), rows)
    index, texts = viewer.pack(zip(shown, dataset.select(shown), strict=True), names, other)
    page = render(
        "viewer.html",
        script="viewer.js",
        title=names[0],
        index=index,
        figures=[
            drawn(figures.image(name, summary), figures.describe(name, summary)) for name in figures.names(summary)
        ],
        subtitle=_subtitle(len(dataset), len(shown), names[1:]),
        tiles=_tiles(summary),
        tables=_tables(summary, other, names),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", encoding="utf-8") as file:
        file.write(page)
        for at, text in enumerate(texts):
            file.write(f'<script type="text/plain" id="rows-{at}">{text}</script>\n')
        file.write("</body>\n</html>\n")
    return len(shown)


def write_space(source: str, folder: Path, **options: Any) -> int:
    """Write a report as a static Space of the Hub: ``index.html``, and the ``README.md`` that makes it one.

    Args:
        source: A dataset, as for :func:`write_report`.
        folder: The folder to write.
        **options: Those of :func:`write_report`.
    """
    shown = write_report(source, folder / "index.html", **options)
    (name,) = short_names([source])
    repo = source.partition("@")[0]
    named = {"datasets": [repo]} if repo.count("/") == 1 and not Path(source).exists() else {}
    head = {"title": f"Report of {name}"[:60], "sdk": "static", "app_file": "index.html", "pinned": False, **named}
    text = f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\nMade with `tessy report`.\n"
    (folder / "README.md").write_text(text, encoding="utf-8")
    return shown


def _subtitle(rows: int, shown: int, against: list[str]) -> str:
    size = f"{rows:,} rows" if shown == rows else f"{shown:,} of {rows:,} rows, evenly spaced; statistics of all rows"
    return size + "".join(f", beside {name}" for name in against)


def _tiles(summary: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return the headline numbers as (label, number, note)."""
    shares, lengths = summary["teacher_share"]["row"], summary["lengths"]["row"]
    failures, discarded = summary["failures"], summary["discarded"]["all"]
    return [
        ("Rows", count(summary["rows"]), f"{count(summary['finish_reasons'].get('stop', 0))} finished normally"),
        ("Teacher's share of a row", percent(shares["mean"]), _range(shares, percent)),
        ("Tokens per row", count(lengths["mean"]), _range(lengths, count)),
        ("Discarded", percent(discarded["share_of_cost"]), "of all generated tokens were rolled back"),
        ("Failed rows", count(failures["rows"]), f"{percent(failures['share'])} of the rows"),
    ]


def _range(tally: dict[str, Any], written: Any) -> str:
    low, high = (written(tally["quantiles"][q]) for q in ("0.05", "0.95"))
    return f"5th–95th percentile {low}–{high}"


def _tables(summary: dict[str, Any], other: Dataset | None, names: list[str]) -> list[Table]:
    own = list(tables(summary).values())
    if other is None:
        return own
    return [comparison(names, [summary, summarize(other)]), *own]
