"""A dataset's statistics as small tables of text, for its card and its report: a summary goes in, tables come out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tessy_hf.report.statistics import AUTHORS, PARTS, QUANTILES, share

_NONE = "–"


@dataclass(frozen=True)
class Table:
    """A table of plain text; nothing in it is escaped.

    Attributes:
        title: The heading.
        head: The column names.
        lines: The cells; the first of each line is its label.
        note: An explanation below the table.
    """

    title: str
    head: Sequence[str]
    lines: Sequence[Sequence[str]]
    note: str = ""


def tables(summary: dict[str, Any]) -> dict[str, Table]:
    """Return all tables of one dataset by name."""
    quantiles = tuple("median" if q == 0.5 else f"p{100 * q:.0f}" for q in QUANTILES)
    shares, errors = summary["teacher_share"], summary["failures"]["errors"]
    made = {
        "finish_reasons": Table(
            "Rows by finish reason",
            ("finish reason", "rows", "share"),
            [
                (reason, count(n), percent(share(n, summary["rows"])))
                for reason, n in summary["finish_reasons"].items()
            ],
        ),
        "teacher_share": Table(
            "Teacher's share of the tokens",
            ("of the", "mean", *quantiles),
            [
                (name, percent(shares[part]["mean"]), *map(percent, shares[part]["quantiles"].values()))
                for name, part in (("whole row", "row"), ("thinking", "thinking"))
            ],
            "Share of the kept tokens, counted with the student's tokenizer. The rest is the student's.",
        ),
        "tokens": _tokens(summary),
        "lengths": Table(
            "Lengths in tokens",
            ("", "rows", "mean", *quantiles, "longest"),
            [(part, *_measured(summary["lengths"][part])) for part in ("row", *PARTS)],
        ),
        "spans": Table(
            "Span lengths in the thinking, in tokens",
            ("author", "spans", "mean", *quantiles, "longest"),
            [(author, *_measured(summary["spans"][author])) for author in AUTHORS],
        ),
    }
    if summary.get("surprise"):
        made["surprise"] = _surprise(summary["surprise"])
    if errors:
        lines = [(one["error"], count(one["rows"])) for one in errors]
        note = "Names and numbers in the messages are left out."
        made["errors"] = Table("Errors", ("error", "rows"), lines, note)
    return made


def comparison(names: Sequence[str], summaries: Sequence[dict[str, Any]]) -> Table:
    """Return two or more datasets side by side."""
    rows: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
        ("rows", lambda s: count(s["rows"])),
        ("finished normally", lambda s: percent(share(s["finish_reasons"].get("stop", 0), s["rows"]))),
        ("teacher's share of a row, mean", lambda s: percent(s["teacher_share"]["row"]["mean"])),
        ("tokens of a row, mean", lambda s: count(s["lengths"]["row"]["mean"])),
        ("tokens of a row, median", lambda s: count(s["lengths"]["row"]["quantiles"]["0.5"])),
        ("tokens of the thinking, mean", lambda s: count(s["lengths"]["thinking"]["mean"])),
        ("tokens of the answer, mean", lambda s: count(s["lengths"]["answer"]["mean"])),
        ("discarded, of all generated tokens", lambda s: percent(s["discarded"]["all"]["share_of_cost"])),
    ]
    lines = [(label, *(tell(summary) for summary in summaries)) for label, tell in rows]
    return Table("Side by side", ("", *names), lines)


def _tokens(summary: dict[str, Any]) -> Table:
    tokens, discarded = summary["tokens"], summary["discarded"]
    lines = [
        (author, *(count(tokens[part][author]) for part in PARTS), count(discarded[author]["tokens"]),
         percent(discarded[author]["share_of_own"]), percent(discarded[author]["share_of_cost"]))
        for author in AUTHORS
    ]  # fmt: skip
    both = [count(sum(tokens[part][author] for author in AUTHORS)) for part in PARTS]
    total = discarded["all"]
    lines.append(("both", *both, count(total["tokens"]), *[percent(total["share_of_cost"])] * 2))
    head = ("tokens", *PARTS, "discarded", "of its own tokens", "of the cost")
    note = (
        "Discarded tokens were generated and rolled back. The cost is all generated tokens, kept and discarded. Kept "
        "tokens are counted with the student's tokenizer, discarded ones with their author's."
    )
    return Table("Tokens", head, lines, note)


def _surprise(told: dict[str, Any]) -> Table:
    lines = [
        (f"{author}'s {part}", count(told[part][author]["words"]), nats(told[part][author]["nats"]))
        for part in PARTS
        for author in AUTHORS
        if told[part][author]["words"]
    ]
    note = (
        f"Nats (-log p) under the student, over {count(told['rows'])} rows. Rank-Surprisal Ratio of the set: "
        f"{nats(told['rsr'])} (mean rank {nats(told['rank'])}, mean surprisal of a token {nats(told['surprisal'])}); "
        "a low one is near to the student and yet new to it (arXiv 2601.14249)."
    )
    return Table("How surprising the student finds it", ("", "words", "nats a word"), lines, note)


def nats(value: float | None) -> str:
    """Format a surprise or a ratio."""
    return _NONE if value is None else f"{value:.2f}"


def _measured(tally: dict[str, Any]) -> list[str]:
    return [count(tally["count"]), count(tally["mean"]), *map(count, tally["quantiles"].values()), count(tally["max"])]


def count(value: float | None) -> str:
    """Format a number with at most one decimal."""
    if value is None:
        return _NONE
    return f"{value:,}" if isinstance(value, int) else f"{value:,.1f}"


def percent(value: float | None) -> str:
    """Format a share in percent. Only 0 is shown as 0% and only 1 as 100%."""
    if value is None:
        return _NONE
    rounded = f"{100 * value:.1f}"
    if rounded in ("0.0", "100.0") and 0 < value < 1:
        return "<0.1%" if value < 0.5 else ">99.9%"
    return f"{rounded}%"
