"""A dataset as one HTML page: its numbers, its figures and every row with its authors in colour."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyarrow.lib import ArrowException

from tessy_hf.errors import DatasetError, SettingsError
from tessy_hf.report.statistics import NEEDED, Statistics
from tessy_hf.report.tables import Table, comparison, count, percent, tables

if TYPE_CHECKING:
    from datasets import Dataset

ROWS = 10_000
"""So many rows are shown, unless said otherwise."""

_FILES = {".parquet": "from_parquet", ".jsonl": "from_json", ".json": "from_json"}
_REPO = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")


def write_report(
    source: str, out: Path, *, against: str | None = None, split: str = "train", config_name: str | None = None,
    rows: int = ROWS,
) -> int:  # fmt: skip
    """Write one self-contained HTML file with a dataset's numbers, figures and rows.

    The numbers are of all rows. Of more than ``rows`` rows so many are shown, evenly spaced.

    Args:
        source: A ``.parquet`` or ``.jsonl`` file, a folder that ``save_to_disk`` wrote, or a dataset on the Hub,
            ``me/data`` or ``me/data@v1.0.0``.
        out: The file to write.
        against: A second dataset of the same prompts, for instance of the teacher alone, to show beside the first.
        split: Which split, where there are several.
        config_name: Which configuration, on the Hub.
        rows: How many rows to show.

    Returns:
        How many rows are shown.

    Raises:
        DatasetError: A dataset cannot be read, or was not written by a TessyTransform.
        SettingsError: No rows are to be shown.
    """
    from tessy_hf.report import viewer

    if rows < 1:
        raise SettingsError(f"rows={rows} shows nothing. Pass at least 1; {ROWS:,} are shown by default.")
    dataset = load(source, split, config_name)
    summary = summarise(dataset)
    other = load(against, split, config_name) if against is not None else None
    names = short_names([source] if against is None else [source, against])
    shown = evenly(len(dataset), rows)
    viewer.write(
        out,
        names[0],
        zip(shown, dataset.select(shown), strict=True),
        summary,
        against=(names[1], other) if other is not None else None,
        head={
            "subtitle": _subtitle(len(dataset), len(shown), names[1:]),
            "tiles": _tiles(summary),
            "tables": _tables(summary, other, names),
        },
    )
    return len(shown)


def load(source: str, split: str = "train", config_name: str | None = None) -> Dataset:
    """Return the finished rows of a file, a folder or a dataset on the Hub.

    Raises:
        DatasetError: There is none, it cannot be read, or it holds no chats.
    """
    dataset = open_dataset(source, split, config_name)
    if "messages" not in dataset.column_names:
        raise DatasetError(
            f"The rows of {source!r} have no column 'messages', in which the chat is expected. "
            f"Columns: {', '.join(dataset.column_names)}. Pass rows that a TessyTransform has written."
        )
    return dataset


def open_dataset(source: str, split: str = "train", config_name: str | None = None) -> Dataset:
    """Return the rows of a file, a folder or a dataset on the Hub, whatever their columns.

    Raises:
        DatasetError: There is none, or it cannot be read.
    """
    from datasets.exceptions import DatasetsError

    try:
        return _load(source, split, config_name)
    except (OSError, ValueError, LookupError, ArrowException, DatasetsError) as error:
        seen = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".!")
        raise DatasetError(
            f"{source!r} cannot be read: {seen}. A .parquet or .jsonl file, a folder that save_to_disk wrote, or a "
            f"dataset on the Hub such as me/data@v1.0.0 is expected, with a split {split!r}; check the name, the "
            "split and HF_TOKEN."
        ) from error


def _load(source: str, split: str, config_name: str | None) -> Dataset:
    from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

    path = Path(source)
    if path.is_file() and path.suffix in _FILES:
        return getattr(Dataset, _FILES[path.suffix])(source)
    if path.is_dir():
        saved = load_from_disk(source)
        return saved[split] if isinstance(saved, DatasetDict) else saved
    repo = _REPO.fullmatch(source)
    if repo is None or path.exists():
        raise FileNotFoundError("there is no such file or folder" if not path.exists() else "unknown ending")
    return load_dataset(repo["repo"], config_name, split=split, revision=repo["revision"])


def summarise(dataset: Dataset) -> dict[str, Any]:
    """Return the numbers of a dataset, see :meth:`tessy_hf.report.statistics.Statistics.summary`."""
    statistics = Statistics()
    for table in dataset.with_format("arrow").iter(batch_size=1000):
        statistics.add(table)
    return statistics.summary()


def evenly(rows: int, most: int) -> list[int]:
    """Return the places of at most ``most`` of so many rows, evenly spaced."""
    return list(range(rows)) if rows <= most else [at * rows // most for at in range(most)]


def short_names(sources: list[str]) -> list[str]:
    """Name datasets by the ends of their paths, or by more of them where these are the same."""
    short = [Path(given).name if Path(given).exists() else given for given in sources]
    return short if len(set(short)) == len(short) else sources


def _subtitle(rows: int, shown: int, against: list[str]) -> str:
    told = f"{rows:,} rows" if shown == rows else f"{shown:,} of {rows:,} rows, evenly spaced; the numbers are of all"
    return told + "".join(f", beside {name}" for name in against)


def _tiles(summary: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return the few numbers that come first: what they are, they, and a remark."""
    shares, lengths = summary["teacher_share"]["row"], summary["lengths"]["row"]
    failures, discarded = summary["failures"], summary["discarded"]["all"]
    nine = "nine rows of ten: {} to {}".format
    return [
        ("Rows", count(summary["rows"]), f"{count(summary['finish_reasons'].get('stop', 0))} ended by themselves"),
        ("Teacher's share of a row", percent(shares["mean"]), nine(*map(percent, _most(shares)))),
        ("Tokens of a row", count(lengths["mean"]), nine(*map(count, _most(lengths)))),
        ("Discarded", percent(discarded["share_of_cost"]), "of all generated tokens were rolled back"),
        ("Failed rows", count(failures["rows"]), f"{percent(failures['share'])} of the rows"),
    ]


def _most(told: dict[str, Any]) -> tuple[Any, Any]:
    return told["quantiles"]["0.05"], told["quantiles"]["0.95"]


def _tables(summary: dict[str, Any], other: Dataset | None, names: list[str]) -> list[Table]:
    made = list(tables(summary).values())
    if other is None or not set(NEEDED) <= set(other.column_names):
        return made
    return [comparison(names, [summary, summarise(other)]), *made]
