"""Statistics of finished rows: Arrow tables go in, batch by batch; a summary of JSON values comes out.

Only counts are kept, so that memory does not grow with the rows. Knows nothing of cards, figures or the Hub, which are
made from the summary.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import Counter, defaultdict
from itertools import accumulate, product
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tessy_hf.errors import DatasetError
from tessy_hf.report import heat
from tessy_hf.rows.batch import decoded
from tessy_hf.rows.columns import content_text, pieces

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

NEEDED = (
    "spans", "teacher_tokens", "student_tokens", "teacher_token_ratio", "thinking_teacher_token_ratio",
    "discarded_teacher_tokens", "discarded_student_tokens", "finish_reason", "error", "method", "run_fingerprint",
)  # fmt: skip
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

SAMPLED, LONGEST_SAMPLE = 100, 1_500
"""Rows of a batch that are looked at for a sample, and about how many characters of it are shown."""

Numbers = npt.NDArray[Any]


class Tally(Counter[Any]):
    """Counts of values, with exact means and quantiles where these are integers."""

    def quantiles(self) -> dict[str, int | None]:
        """Return for each quantile the smallest number that at least that share of all numbers does not exceed."""
        values = sorted(self)
        upto = list(accumulate(self[value] for value in values))
        return {str(q): values[bisect_left(upto, q * upto[-1])] if upto else None for q in QUANTILES}

    def histogram(self, edges: list[int]) -> list[int]:
        """Return the count of numbers in each bin ``edges[i] <= number < edges[i + 1]``."""
        bins = [*edges[:-1], edges[-1] - 0.5]
        return [int(count) for count in np.histogram(list(self), bins=bins, weights=list(self.values()))[0]]

    def summary(self) -> dict[str, Any]:
        """Return count, total, mean, minimum, maximum and quantiles; ``None`` where they do not exist."""
        count, total = self.total(), sum(value * times for value, times in self.items())
        return {
            "count": count,
            "total": total,
            "mean": share(total, count),
            "min": min(self, default=None),
            "max": max(self, default=None),
            "quantiles": self.quantiles(),
        }


class Statistics:
    """Counts from which a dataset's card, figures and report are made.

    Incremental: :meth:`add` one table of rows after the other.

    Attributes:
        rows: The number of rows.
        sample: A row to show.
        counts: All else that is counted, by name: finish reasons, methods, runs, kinds of error; tokens by part (or
            ``kept``, ``discarded``) and author; shares in steps, their sums, lengths, and amounts along the row.
    """

    def __init__(self) -> None:
        self.rows = 0
        self.counts: defaultdict[str, Tally] = defaultdict(Tally)
        self.sample: dict[str, Any] | None = None

    @property
    def errors(self) -> Counter[str]:
        """Failed rows by kind of error."""
        return self.counts["error"]

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
        for name in ("finish_reason", "method", "run_fingerprint"):
            self.counts[name].update(_values(table, name))
        for error in _values(table, "error"):
            kind = kind_of_error(error)
            self.errors[kind if kind in self.errors or len(self.errors) < ERRORS_KEPT else "other errors"] += 1
        for author in AUTHORS:
            self.counts["tokens"]["kept", author] += sum(_values(table, f"{author}_tokens"))
            self.counts["tokens"]["discarded", author] += sum(_values(table, f"discarded_{author}_tokens"))
        for part, column in (("row", "teacher_token_ratio"), ("thinking", "thinking_teacher_token_ratio")):
            shares = _values(table, column)
            self.counts[f"share of {part}"].update(round(one * SHARE_STEPS) for one in shares)
            self.counts["sum of shares"][part] += sum(shares)
        self._add_spans(_spans(table), table.num_rows)
        if heat.known(table.column_names):
            self._add_surprise(table)
        self.sample = self.sample or _sample(table)

    def _add_spans(self, spans: dict[str, Numbers], rows: int) -> None:
        row, tokens, thinking = spans["row"], spans["tokens"], spans["thinking"]
        wrote = np.bincount(row, minlength=rows) > 0
        for author, part in product(AUTHORS, PARTS):
            self.counts["tokens"][part, author] += int(tokens[spans[author] & spans[part]].sum())
        for author in AUTHORS:
            self.counts[f"spans of {author}"].update(tokens[spans[author] & thinking].tolist())
        self.counts["spans per row"].update(np.bincount(row[thinking], minlength=rows)[wrote].tolist())
        self.counts["length of row"].update(np.bincount(row, tokens, rows)[wrote].astype(int).tolist())
        for part in PARTS:
            here = spans[part]
            lengths = np.bincount(row[here], tokens[here], rows).astype(int)
            self.counts[f"length of {part}"].update(lengths[lengths > 0].tolist())
            amounts = _along(row[here], tokens[here], spans["teacher"][here], POSITIONS[part])
            self.counts[f"position in {part}"].update(dict(np.ndenumerate(amounts)))

    def _add_surprise(self, table: pa.Table) -> None:
        totals, steps = self.counts["surprise"], POSITIONS["thinking"]
        for row in table.to_pylist():
            if row["student_rank"] is not None:
                totals.update({"rows": 1, "rank": row["student_rank"], "surprisal": row["student_surprisal"]})
            for author, part, place, nats in heat.row_words(row):
                totals.update({(part, author): 1, (part, author, "nats"): nats})
                if part == "thinking":
                    at = int(place * steps)
                    totals.update({("at", author, at): 1, ("at", author, at, "nats"): nats})

    def summary(self) -> dict[str, Any]:
        """Return all numbers as JSON values.

        Shares are between 0 and 1 and lengths are in the student's tokens. What does not exist, such as the mean of no
        rows, is ``None``. Keys: ``rows``, ``finish_reasons``, ``failures``, ``methods``, ``run_fingerprints``,
        ``teacher_share`` (of a whole row, and of its thinking), ``tokens``, ``lengths``, ``spans`` (of the thinking,
        by author), ``spans_per_row``, ``discarded``, ``position``, ``sample`` (of the first row that finished:
        its ``prompt``, its first ``spans`` with ``author`` and ``text``, and how many ``more`` there are),
        ``surprise`` (in nats, where the rows have :data:`tessy_hf.report.heat.COLUMNS`: RSR, words by part and
        author, and along the thinking).
        """
        failed = self.counts["finish_reason"]["error"]
        return {
            "rows": self.rows,
            "finish_reasons": dict(self.counts["finish_reason"].most_common()),
            "failures": {
                "rows": failed,
                "share": share(failed, self.rows),
                "errors": [{"error": error, "rows": rows} for error, rows in self.errors.most_common(10)],
            },
            "methods": dict(self.counts["method"].most_common()),
            "run_fingerprints": dict(self.counts["run_fingerprint"].most_common()),
            "teacher_share": {part: self._share(part) for part in ("row", "thinking")},
            "tokens": {
                **{part: {author: self._tokens(part, author) for author in AUTHORS} for part in PARTS},
                **{author: self._tokens("kept", author) for author in AUTHORS},
                "all": self._tokens("kept"),
            },
            "lengths": {part: self.counts[f"length of {part}"].summary() for part in ("row", *PARTS)},
            "spans": {author: self._span_lengths(author) for author in AUTHORS},
            "spans_per_row": self.counts["spans per row"].summary(),
            "discarded": self._discarded(),
            "position": {part: self._positions(part) for part in PARTS},
            "sample": self.sample,
            "surprise": self._surprise() if self.counts["surprise"]["rows"] else None,
        }

    def _surprise(self) -> dict[str, Any]:
        at, steps = self.counts["surprise"], range(POSITIONS["thinking"])
        words = {
            part: {
                who: {"words": at[part, who], "nats": share(at[part, who, "nats"], at[part, who])} for who in AUTHORS
            }
            for part in PARTS
        }
        along = {who: [share(at["at", who, step, "nats"], at["at", who, step]) for step in steps] for who in AUTHORS}
        return {
            "rows": at["rows"],
            "rsr": share(at["rank"], at["surprisal"]),
            **{name: at[name] / at["rows"] for name in ("rank", "surprisal")},
            **words,
            "along": along,
        }

    def _tokens(self, part: str, *authors: str) -> int:
        return sum(self.counts["tokens"][part, author] for author in authors or AUTHORS)

    def _share(self, part: str) -> dict[str, Any]:
        tally, tokens = self.counts[f"share of {part}"], "kept" if part == "row" else part
        edges = [step * SHARE_STEPS // 20 for step in range(20)] + [SHARE_STEPS + 1]
        return {
            "count": tally.total(),
            "of_all_tokens": share(self._tokens(tokens, "teacher"), self._tokens(tokens)),
            "mean": share(self.counts["sum of shares"][part], tally.total()),
            "quantiles": {q: None if at is None else at / SHARE_STEPS for q, at in tally.quantiles().items()},
            "histogram": {"edges": [step / 20 for step in range(21)], "counts": tally.histogram(edges)},
        }

    def _span_lengths(self, author: str) -> dict[str, Any]:
        longest = max(max(self.counts[f"spans of {one}"], default=1) for one in AUTHORS)
        edges = [0, 1, 2, 3] if longest > 16 else list(range(longest + 2))
        while edges[-1] <= longest:
            edges.append(2 * edges[-1] - 1)  # bins double in width: 3-4, 5-8, ...
        tally = self.counts[f"spans of {author}"]
        return {**tally.summary(), "histogram": {"edges": edges, "counts": tally.histogram(edges)}}

    def _discarded(self) -> dict[str, Any]:
        total = self._tokens("discarded")
        cost, told = self._tokens("kept") + total, {}
        for author in AUTHORS:
            tokens = self._tokens("discarded", author)
            own = self._tokens("kept", author) + tokens
            told[author] = {
                "tokens": tokens, "share_of_own": share(tokens, own), "share_of_cost": share(tokens, cost)
            }  # fmt: skip
        return {**told, "all": {"tokens": total, "share_of_cost": share(total, cost)}, "cost": cost}

    def _positions(self, part: str) -> list[float | None]:
        at = self.counts[f"position in {part}"]
        return [share(float(at[0, piece]), float(at[1, piece])) for piece in range(POSITIONS[part])]


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


def share(part: float, whole: float) -> float | None:
    """Return ``part / whole``, or ``None`` if the whole is 0."""
    return part / whole if whole else None


def _sample(table: pa.Table) -> dict[str, Any] | None:
    """Return the beginning of the first row that finished."""
    for at in range(min(table.num_rows, SAMPLED) if "messages" in table.column_names else 0):
        row = {name: values[0] for name, values in decoded(table.slice(at, 1)).items()}
        cut = [piece for piece in pieces(row) if piece.text.strip()]
        asked = [message["content"] for message in row["messages"] or () if message["role"] == "user"]
        if row["finish_reason"] == "stop" and cut and asked:
            ends = list(accumulate(len(piece.text) for piece in cut))
            shown = cut[: 1 + bisect_left(ends, LONGEST_SAMPLE)]
            spans = [{"author": piece.author, "text": _shortened(piece.text)} for piece in shown]
            return {"prompt": _shortened(content_text(asked[-1])), "spans": spans, "more": len(cut) - len(shown)}
    return None


def _shortened(text: str) -> str:
    return text if len(text) <= LONGEST_SAMPLE else text[:LONGEST_SAMPLE] + " …"


def _values(table: pa.Table, name: str) -> list[Any]:
    return list(table.column(name).drop_null().to_pylist())


def _spans(table: pa.Table) -> dict[str, Numbers]:
    """Return for each span its ``row`` (an index) and ``tokens``, and a mask for each author and part."""
    import pyarrow.compute as pc

    column = table.column("spans").combine_chunks()
    flat = pc.list_flatten(column)
    if not len(flat):  # its type may then lack the fields of a span
        none, nowhere = np.zeros(0, np.int64), np.zeros(0, np.bool_)
        return {"row": none, "tokens": none, **dict.fromkeys(_KINDS, nowhere)}
    kinds = {value: np.asarray(pc.equal(pc.struct_field(flat, name), value)) for value, name in _KINDS.items()}
    tokens = np.asarray(pc.struct_field(flat, "tokens")).astype(np.int64)
    return {"row": np.asarray(pc.list_parent_indices(column)), "tokens": tokens, **kinds}


_KINDS = {**dict.fromkeys(AUTHORS, "author"), **dict.fromkeys(PARTS, "part")}


def _along(row: Numbers, tokens: Numbers, teachers: Numbers, pieces: int) -> Numbers:
    """Sum over rows how much of each of ``pieces`` equal pieces of a row the teacher wrote, and both authors.

    Every row weighs the same, however long it is. ``row`` is sorted, as are the spans of a row.

    Returns:
        An array of shape ``(2, pieces)``: the teacher's amounts, then all.
    """
    total = np.bincount(row, tokens, minlength=1)
    before = np.concatenate([[0], np.cumsum(total)])[row]
    end = np.cumsum(tokens) - before
    length = np.maximum(total[row], 1)
    start, end = (end - tokens) / length, end / length
    edges = np.linspace(0, 1, pieces + 1)
    covered = np.array([np.clip(edge - start, 0, end - start) for edge in edges]).reshape(pieces + 1, -1)
    return np.diff(np.stack([covered[:, teachers].sum(1), covered.sum(1)]), axis=1)
