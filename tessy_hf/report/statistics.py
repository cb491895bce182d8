"""Statistics of finished rows: Arrow tables go in, batch by batch; a summary of JSON values comes out.

Only counts are kept, so that memory does not grow with the rows. Knows nothing of cards, figures or the Hub, which are
made from the summary.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tessy_hf.errors import DatasetError

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

NEEDED = (
    "spans",
    "teacher_tokens",
    "student_tokens",
    "teacher_token_ratio",
    "thinking_teacher_token_ratio",
    "discarded_teacher_tokens",
    "discarded_student_tokens",
    "finish_reason",
    "error",
    "method",
    "run_fingerprint",
)
"""The columns that :meth:`Statistics.add` reads."""

AUTHORS = ("teacher", "student")
PARTS = ("thinking", "answer")
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
POSITIONS = {"thinking": 20, "answer": 5}
"""Number of equal pieces each part of a row is cut into, to show the teacher's share along it."""
SHARE_STEPS = 10_000
"""Quantiles of shares are exact to one part in this many; means are exact."""
ERRORS_KEPT = 500
"""How many kinds of error are counted separately; the rest counts as "other errors"."""

Numbers = npt.NDArray[Any]


class Tally:
    """A multiset of integers with exact means and quantiles."""

    def __init__(self) -> None:
        self.counts: Counter[int] = Counter()

    def add(self, values: Numbers) -> None:
        """Count these numbers."""
        seen, times = np.unique(values, return_counts=True)
        self.counts.update(dict(zip(seen.tolist(), times.tolist(), strict=True)))

    def merge(self, other: Tally) -> None:
        """Count all that ``other`` has seen."""
        self.counts.update(other.counts)

    def quantiles(self, at: Iterable[float] = QUANTILES) -> dict[str, int | None]:
        """Return for each quantile the smallest number that at least that share of all numbers does not exceed."""
        values = sorted(self.counts)
        upto = list(accumulate(self.counts[value] for value in values))
        return {str(q): values[bisect_left(upto, q * upto[-1])] if upto else None for q in at}

    def histogram(self, edges: list[int]) -> list[int]:
        """Return the count of numbers in each bin ``edges[i] <= number < edges[i + 1]``."""
        values, times = list(self.counts), list(self.counts.values())
        return [int(count) for count in np.histogram(values, bins=[*edges[:-1], edges[-1] - 0.5], weights=times)[0]]

    def summary(self) -> dict[str, Any]:
        """Return count, total, mean, minimum, maximum and quantiles; ``None`` where they do not exist."""
        count, total = self.counts.total(), sum(value * times for value, times in self.counts.items())
        return {
            "count": count,
            "total": total,
            "mean": total / count if count else None,
            "min": min(self.counts, default=None),
            "max": max(self.counts, default=None),
            "quantiles": self.quantiles(),
        }


class Statistics:
    """Counts from which a dataset's card, figures and report are made.

    Incremental (:meth:`add` one table of rows after the other) and mergeable (:meth:`merge` those of other shards).
    """

    def __init__(self) -> None:
        self.rows = 0
        self.finish_reasons: Counter[str] = Counter()
        self.methods: Counter[str] = Counter()
        self.run_fingerprints: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self.tokens: Counter[tuple[str, str]] = Counter()  # by part and author
        self.kept: Counter[str] = Counter()
        self.discarded: Counter[str] = Counter()
        self.shares = {"row": Tally(), "thinking": Tally()}
        self.share_sums = {"row": 0.0, "thinking": 0.0}
        self.lengths = {"row": Tally(), "thinking": Tally(), "answer": Tally()}
        self.spans = {author: Tally() for author in AUTHORS}
        self.spans_per_row = Tally()
        self.along = {
            part: np.zeros((2, pieces)) for part, pieces in POSITIONS.items()
        }  # row 0: the teacher's, row 1: all

    def add(self, table: pa.Table) -> None:
        """Count a batch of finished rows.

        Args:
            table: Rows with (at least) the columns :data:`NEEDED`, as :func:`tessy_hf.rows.columns.schema` types them.

        Raises:
            DatasetError: A column is missing.
        """
        missing = [name for name in NEEDED if name not in table.column_names]
        if missing:
            raise DatasetError(
                f"The rows have no {', '.join(missing)}. Columns: {', '.join(table.column_names)}. "
                "Pass rows that a TessyTransform has written, with the columns it added."
            )
        self.rows += table.num_rows
        self.finish_reasons.update(_texts(table, "finish_reason"))
        self.methods.update(_texts(table, "method"))
        self.run_fingerprints.update(_texts(table, "run_fingerprint"))
        for error in _texts(table, "error"):
            kind = kind_of_error(error)
            self.errors[kind if kind in self.errors or len(self.errors) < ERRORS_KEPT else "other errors"] += 1
        for author in AUTHORS:
            self.kept[author] += int(_integers(table, f"{author}_tokens").sum())
            self.discarded[author] += int(_integers(table, f"discarded_{author}_tokens").sum())
        for part, column in (("row", "teacher_token_ratio"), ("thinking", "thinking_teacher_token_ratio")):
            shares = _floats(table, column)
            self.shares[part].add(np.rint(shares * SHARE_STEPS).astype(np.int64))
            self.share_sums[part] += float(shares.sum())
        self._add_spans(table)

    def _add_spans(self, table: pa.Table) -> None:
        row, spans = _spans(table)
        tokens, thinking = spans["tokens"], spans["thinking"]
        for author in AUTHORS:
            written = spans[author]
            self.spans[author].add(tokens[written & thinking])
            for part in PARTS:
                self.tokens[part, author] += int(tokens[written & spans[part]].sum())
        per_row = {part: np.zeros(table.num_rows, np.int64) for part in PARTS}
        for part in PARTS:
            here = spans[part]
            np.add.at(per_row[part], row[here], tokens[here])
            self.along[part] += _along(row[here], tokens[here], spans["teacher"][here], POSITIONS[part])
        wrote = np.bincount(row, minlength=table.num_rows) > 0
        self.lengths["row"].add((per_row["thinking"] + per_row["answer"])[wrote])
        for part in PARTS:
            self.lengths[part].add(per_row[part][per_row[part] > 0])
        self.spans_per_row.add(np.bincount(row[thinking], minlength=table.num_rows)[wrote])

    def merge(self, other: Statistics) -> None:
        """Count all that ``other`` has counted."""
        self.rows += other.rows
        for name in ("finish_reasons", "methods", "run_fingerprints", "errors", "tokens", "kept", "discarded"):
            getattr(self, name).update(getattr(other, name))
        for name in ("shares", "lengths", "spans"):
            for key, tally in getattr(self, name).items():
                tally.merge(getattr(other, name)[key])
        self.spans_per_row.merge(other.spans_per_row)
        for part in self.share_sums:
            self.share_sums[part] += other.share_sums[part]
        for part in self.along:
            self.along[part] += other.along[part]

    def summary(self) -> dict[str, Any]:
        """Return all numbers as JSON values.

        Shares are between 0 and 1 and lengths are in the student's tokens. What does not exist, such as the mean of no
        rows, is ``None``. Keys: ``rows``, ``finish_reasons``, ``failures``, ``methods``, ``run_fingerprints``,
        ``teacher_share`` (of a whole row, and of its thinking), ``tokens``, ``lengths``, ``spans`` (of the thinking,
        by author), ``spans_per_row``, ``discarded``, ``position``.
        """
        return {
            "rows": self.rows,
            "finish_reasons": dict(self.finish_reasons.most_common()),
            "failures": {
                "rows": self.finish_reasons["error"],
                "share": _ratio(self.finish_reasons["error"], self.rows),
                "errors": [{"error": error, "rows": rows} for error, rows in self.errors.most_common(10)],
            },
            "methods": dict(self.methods.most_common()),
            "run_fingerprints": dict(self.run_fingerprints.most_common()),
            "teacher_share": {part: self._share(part) for part in self.shares},
            "tokens": self._tokens(),
            "lengths": {part: tally.summary() for part, tally in self.lengths.items()},
            "spans": {author: self._span_lengths(author) for author in AUTHORS},
            "spans_per_row": self.spans_per_row.summary(),
            "discarded": self._discarded(),
            "position": {
                part: [_ratio(float(teacher), float(all_)) for teacher, all_ in along.T]
                for part, along in self.along.items()
            },
        }

    def _share(self, part: str) -> dict[str, Any]:
        tally, count = self.shares[part], self.shares[part].counts.total()
        edges = [step * SHARE_STEPS // 20 for step in range(20)] + [SHARE_STEPS + 1]
        teacher = self.tokens["thinking", "teacher"] if part == "thinking" else self.kept["teacher"]
        student = self.tokens["thinking", "student"] if part == "thinking" else self.kept["student"]
        return {
            "count": count,
            "of_all_tokens": _ratio(teacher, teacher + student),
            "mean": _ratio(self.share_sums[part], count),
            "quantiles": {q: None if at is None else at / SHARE_STEPS for q, at in tally.quantiles().items()},
            "histogram": {"edges": [step / 20 for step in range(21)], "counts": tally.histogram(edges)},
        }

    def _tokens(self) -> dict[str, Any]:
        by_part = {part: {author: self.tokens[part, author] for author in AUTHORS} for part in PARTS}
        return {**by_part, **{author: self.kept[author] for author in AUTHORS}, "all": self.kept.total()}

    def _span_lengths(self, author: str) -> dict[str, Any]:
        longest = max((max(tally.counts, default=1) for tally in self.spans.values()), default=1)
        edges = [0, 1, 2, 3] if longest > 16 else list(range(longest + 2))
        while edges[-1] <= longest:
            edges.append(2 * edges[-1] - 1)  # bins double in width: 3-4, 5-8, ...
        tally = self.spans[author]
        return {**tally.summary(), "histogram": {"edges": edges, "counts": tally.histogram(edges)}}

    def _discarded(self) -> dict[str, Any]:
        cost = self.kept.total() + self.discarded.total()
        by_author = {
            author: {
                "tokens": self.discarded[author],
                "share_of_own": _ratio(self.discarded[author], self.kept[author] + self.discarded[author]),
                "share_of_cost": _ratio(self.discarded[author], cost),
            }
            for author in AUTHORS
        }
        total = self.discarded.total()
        return {**by_author, "all": {"tokens": total, "share_of_cost": _ratio(total, cost)}, "cost": cost}


def summarize(dataset: Dataset) -> dict[str, Any]:
    """Return the summary of a dataset, see :meth:`Statistics.summary`."""
    statistics = Statistics()
    for table in dataset.with_format("arrow").iter(batch_size=1000):
        statistics.add(table)
    return statistics.summary()


def evenly(rows: int, most: int) -> list[int]:
    """Return at most ``most`` row indices out of ``rows``, evenly spaced."""
    return list(range(rows)) if rows <= most else [at * rows // most for at in range(most)]


def kind_of_error(error: str) -> str:
    """Return an error without the quoted names and numbers that differ between rows."""
    return re.sub(r"""'[^']*'|"[^"]*"|\d+""", "…", " ".join(error.split()))[:200]


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _texts(table: pa.Table, name: str) -> list[str]:
    return [text for text in table.column(name).to_pylist() if text is not None]


def _integers(table: pa.Table, name: str) -> Numbers:
    return np.array(table.column(name).drop_null(), dtype=np.int64)


def _floats(table: pa.Table, name: str) -> Numbers:
    return np.array(table.column(name).drop_null(), dtype=np.float64)


def _spans(table: pa.Table) -> tuple[Numbers, dict[str, Numbers]]:
    """Return for each span its row index, its tokens, and one mask for each author and part."""
    import pyarrow.compute as pc

    column = table.column("spans").combine_chunks()
    flat = pc.list_flatten(column)
    if not len(flat):  # its type may then lack the fields of a span
        return np.zeros(0, np.int64), {"tokens": np.zeros(0, np.int64), **dict.fromkeys(_KINDS, np.zeros(0, np.bool_))}
    tokens = np.asarray(pc.struct_field(flat, "tokens")).astype(np.int64)
    kinds = {value: np.asarray(pc.equal(pc.struct_field(flat, name), value)) for value, name in _KINDS.items()}
    return np.asarray(pc.list_parent_indices(column)), {"tokens": tokens, **kinds}


_KINDS = {**dict.fromkeys(AUTHORS, "author"), **dict.fromkeys(PARTS, "part")}


def _along(row: Numbers, tokens: Numbers, teachers: Numbers, pieces: int) -> Numbers:
    """Sum over rows the teacher's amount of each of ``pieces`` equal pieces of a row, and the whole amount.

    Every row weighs the same, however long it is. ``row`` is sorted, as are the spans of a row.

    Returns:
        An array of shape ``(2, pieces)``.
    """
    total = np.bincount(row, tokens, minlength=1)
    before = np.concatenate([[0], np.cumsum(total)])[row]
    end = np.cumsum(tokens) - before
    length = np.maximum(total[row], 1)
    start, end = (end - tokens) / length, end / length
    edges = np.linspace(0, 1, pieces + 1)
    covered = np.array([np.clip(edge - start, 0, end - start) for edge in edges]).reshape(pieces + 1, -1)
    return np.diff(np.stack([covered[:, teachers].sum(1), covered.sum(1)]), axis=1)
