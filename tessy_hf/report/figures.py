"""Figures of a dataset: a summary (:mod:`tessy_hf.report.statistics`) goes in, matplotlib figures come out.

Draws without pyplot, so that no window system and no global state is touched. Knows nothing of rows or of the Hub.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from tessy_hf.errors import TessyError
from tessy_hf.report.statistics import AUTHORS
from tessy_hf.report.tables import count, nats, percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Colors:
    """The colors of a figure. Authors, and datasets, are distinguishable with every kind of color vision."""

    text: str
    muted: str
    line: str
    teacher: str
    student: str
    background: str
    datasets: tuple[str, str, str]
    """Colors of datasets that are compared: none of them is an author's."""

    def of(self, author: str) -> str:
        """Return an author's color."""
        return self.teacher if author == "teacher" else self.student


COLORS = Colors("#1b1f24", "#57606a", "#d8dee4", "#0b69a8", "#d9731a", "#ffffff", ("#0e8a66", "#7b4fc9", "#4a5560"))
"""Light; pages put their own colors, light or dark, in place of these."""

Kind = Literal["svg", "png"]
NAMES = ("teacher_share", "share_along_row", "span_lengths", "tokens_by_part")
SURPRISE = "surprise_along_row"
"""The figure of rows that say how the student finds them."""
SIZE = (6.4, 3.6)  # inches
STYLE = Path(__file__).with_name("figures.mplstyle")
Drawing = Callable[["Figure", dict[str, Any]], None]


def names(summary: dict[str, Any]) -> tuple[str, ...]:
    """Return the figures that a dataset has."""
    return (*NAMES, SURPRISE) if summary.get("surprise") else NAMES


def draw(name: str, summary: dict[str, Any]) -> Figure:
    """Draw one figure.

    Args:
        name: One of :func:`names`.
        summary: The dataset's statistics.

    Raises:
        TessyError: matplotlib is not installed.
    """
    return paint(_DRAW[name], summary)


def paint(drawing: Drawing, data: dict[str, Any], size: tuple[float, float] = SIZE) -> Figure:
    """Draw on a new figure of a size in inches."""
    with style() as new_figure:
        figure: Figure = new_figure(figsize=size)
        drawing(figure, data)
        return figure


def image(name: str, summary: dict[str, Any], kind: Kind = "svg") -> bytes:
    """Draw one figure and return it as a file, the same bytes for the same summary and version of matplotlib."""
    return save(draw(name, summary), kind)


def save(figure: Figure, kind: Kind) -> bytes:
    """Encode a figure."""
    buffer = io.BytesIO()
    with style():
        plain = {"Date": None} if kind == "svg" else {"Software": None}
        transparent = kind == "svg"  # in the report the page's background shows
        figure.savefig(buffer, format=kind, transparent=transparent, metadata=plain, dpi=120)
    return buffer.getvalue()


def describe(name: str, summary: dict[str, Any]) -> str:
    """Describe a figure in one sentence, as alternative text."""
    if name == SURPRISE:
        told = summary["surprise"]["thinking"]
        means = ", ".join(f"{nats(told[author]['nats'])} by the {author}" for author in AUTHORS)
        return f"How surprising the student finds each word along the thinking; mean nats a word: {means}."
    share, spans, tokens = summary["teacher_share"]["row"], summary["spans"], summary["tokens"]
    return {
        "teacher_share": (
            f"The teacher's share of a row's tokens: median {percent(share['quantiles']['0.5'])}, "
            f"5th–95th percentile {percent(share['quantiles']['0.05'])}–{percent(share['quantiles']['0.95'])}."
        ),
        "share_along_row": "The teacher's share of the tokens from the beginning to the end of the thinking, "
        "then of the answer: " + _along(summary["position"]) + ".",
        "span_lengths": "; ".join(
            f"{author}: {spans[author]['count']:,} spans, median {count(spans[author]['quantiles']['0.5'])} tokens, "
            f"longest {count(spans[author]['max'])}"
            for author in AUTHORS
        )
        + ".",
        "tokens_by_part": "; ".join(
            f"{part}: {tokens[part]['teacher']:,} by the teacher, {tokens[part]['student']:,} by the student"
            for part in ("thinking", "answer")
        )
        + f"; discarded: {summary['discarded']['all']['tokens']:,}.",
    }[name]


# --- the figures


def _teacher_share(figure: Figure, summary: dict[str, Any]) -> None:
    axes = figure.subplots()
    row, thinking = (summary["teacher_share"][part] for part in ("row", "thinking"))
    name_axes(
        axes, "How much of a row the teacher wrote", "share of a row's tokens by the teacher (%)", "number of rows"
    )
    if not row["count"]:
        return _nothing(axes)
    edges = [100 * edge for edge in row["histogram"]["edges"]]
    axes.stairs(row["histogram"]["counts"], edges, fill=True, color=COLORS.teacher, alpha=0.85, label="whole row")
    axes.stairs(thinking["histogram"]["counts"], edges, color=COLORS.text, linewidth=1.3, label="thinking alone")
    middle = 100 * row["quantiles"]["0.5"]
    axes.axvline(middle, color=COLORS.text, linewidth=1.1, linestyle=(0, (4, 3)), label=f"median row, {middle:.0f}%")
    axes.set_xlim(0, 100)
    axes.set_xticks(range(0, 101, 10))
    _whole_numbers(axes)
    put_legend(axes)


def _share_along_row(figure: Figure, summary: dict[str, Any]) -> None:
    position = summary["position"]
    panels = figure.subplots(1, 2, sharey=True, width_ratios=[4, 1])
    panels[0].set_title("Who writes where in a row")
    panels[0].set_ylabel("share of the tokens (%)")
    for axes, part in zip(panels, ("thinking", "answer"), strict=True):
        shares = [None if share is None else 100 * share for share in position[part]]
        edges = [100 * step / len(shares) for step in range(len(shares) + 1)]
        axes.set_xlabel(
            "from the beginning to the end of the thinking (%)" if part == "thinking" else "of the answer (%)"
        )
        axes.grid(visible=False)
        axes.set(xlim=(0, 100), ylim=(0, 100), xticks=range(0, 101, 10 if part == "thinking" else 50))
        if any(share is None for share in shares):
            _nothing(axes)
            continue
        axes.stairs([100] * len(shares), edges, baseline=shares, fill=True, color=COLORS.student, label="student")
        axes.stairs(shares, edges, fill=True, color=COLORS.teacher, label="teacher")
    for axes in [axes for axes in panels if not axes.texts][:1]:
        put_legend(axes)


def _span_lengths(figure: Figure, summary: dict[str, Any]) -> None:
    axes = figure.subplots()
    name_axes(
        axes,
        "How long a span is",
        "tokens that an author wrote before handing over",
        "share of that author's spans (%)",
    )
    spans = summary["spans"]
    if not any(spans[author]["count"] for author in AUTHORS):
        return _nothing(axes)
    edges = spans["teacher"]["histogram"]["edges"]
    first = 0 if any(spans[author]["histogram"]["counts"][0] for author in AUTHORS) else 1
    labels = [str(low) if high - low == 1 else f"{low}–{high - 1}" for low, high in pairwise(edges)]
    places = range(len(labels) - first)
    for author, shift in (("teacher", -0.2), ("student", 0.2)):
        own = spans[author]
        heights = [100 * spans / max(own["count"], 1) for spans in own["histogram"]["counts"][first:]]
        median = "none" if not own["count"] else f"median {count(own['quantiles']['0.5'])} tokens"
        axes.bar([p + shift for p in places], heights, 0.4, color=COLORS.of(author), label=f"{author}, {median}")
    axes.set_xticks(places, labels[first:])
    axes.tick_params(axis="x", length=0, labelsize=9 if len(labels) < 12 else 7)
    put_legend(axes)


def _tokens_by_part(figure: Figure, summary: dict[str, Any]) -> None:
    axes = figure.subplots()
    name_axes(axes, "What the tokens were spent on", "number of tokens (discarded: rolled back at a boundary)", "")
    tokens, discarded = summary["tokens"], summary["discarded"]
    spent = {
        "thinking": tokens["thinking"],
        "answer": tokens["answer"],
        "discarded": {author: discarded[author]["tokens"] for author in AUTHORS},
    }
    if not any(tokens for by_author in spent.values() for tokens in by_author.values()):
        return _nothing(axes)
    bars = []
    for label, by_author in spent.items():
        total = sum(by_author[author] for author in AUTHORS)
        note = f"teacher {percent(by_author['teacher'] / total)}" if total else ""
        bars.append(Bar(label, author_parts(by_author), f"{total:,}", note))
    draw_bars(axes, bars)
    axes.xaxis.set_major_formatter(thousands)
    put_legend(axes)


def _surprise_along_row(figure: Figure, summary: dict[str, Any]) -> None:
    axes = figure.subplots()
    name_axes(
        axes, "How surprising the student finds it", "from the beginning to the end of the thinking (%)", "nats a word"
    )
    for author, along in summary["surprise"]["along"].items():
        places = [100 * (at + 0.5) / len(along) for at, one in enumerate(along) if one is not None]
        own = [one for one in along if one is not None]
        axes.plot(places, own, color=COLORS.of(author), marker="os"[author == "student"], markersize=4, label=author)
    axes.set(xlim=(0, 100), xticks=range(0, 101, 10), ylim=(0, None))
    put_legend(axes)


_DRAW: dict[str, Drawing] = {
    "teacher_share": _teacher_share,
    "share_along_row": _share_along_row,
    "span_lengths": _span_lengths,
    "tokens_by_part": _tokens_by_part,
    SURPRISE: _surprise_along_row,
}

# --- how they look


@contextmanager
def style() -> Iterator[Any]:
    """Apply our style while a figure is drawn or saved; yields matplotlib's ``Figure`` class."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise TessyError(
            'Figures need matplotlib, which is not installed. Run: pip install "tessy-hf[report]"'
        ) from error
    colors = {
        **{f"{name}.color": COLORS.muted for name in ("xtick", "ytick")},
        **{name: COLORS.text for name in ("text.color", "axes.labelcolor", "axes.titlecolor")},
        **{name: COLORS.line for name in ("axes.edgecolor", "grid.color")},
        **{f"{kind}.facecolor": COLORS.background for kind in ("figure", "axes", "savefig")},
    }
    with matplotlib.rc_context(colors, STYLE):  # type: ignore[arg-type]
        yield Figure


Part = tuple[float, dict[str, Any]]
"""Length and look of a part of a bar."""


class Bar(NamedTuple):
    """A horizontal bar.

    Attributes:
        label: Its name on the axis.
        parts: Its parts, laid end to end.
        total: What is written at its end.
        note: What is written below it.
    """

    label: str
    parts: Sequence[Part]
    total: str
    note: str = ""


def author_parts(lengths: Mapping[str, float]) -> list[Part]:
    """Return the parts of a bar that both authors share."""
    return [(lengths[author], {"color": COLORS.of(author), "label": author}) for author in AUTHORS]


def draw_bars(axes: Axes, bars: Sequence[Bar], margin: float = 0.17) -> None:
    """Draw bars one below the other, with room for their totals: ``margin``, a share of the longest bar."""
    plain: Any = {"textcoords": "offset points", "va": "center"}
    for at, bar in enumerate(bars):
        left = 0.0
        for length, look in bar.parts:
            axes.barh(at, length, 0.56, left=left, **{**look, "label": None if at else look.get("label")})
            left += length
        axes.annotate(bar.total, (left, at), (7, 0), color=COLORS.text, weight="bold", **plain)
        axes.annotate(bar.note, (0, at + 0.28), (0, -8), color=COLORS.muted, size=8.5, **plain)
    longest = max(sum(length for length, _ in bar.parts) for bar in bars)
    axes.set_yticks(range(len(bars)), [bar.label for bar in bars], color=COLORS.text)
    axes.set(ylim=(len(bars) - 0.4, -0.45), xlim=(0, (1 + margin) * longest))
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    axes.grid(visible=True, axis="x")


def name_axes(axes: Axes, title: str, x: str, y: str) -> None:
    """Set the title and the axis labels."""
    axes.set_title(title)
    axes.set_xlabel(x, labelpad=7)
    axes.set_ylabel(y, labelpad=7)


def put_legend(axes: Axes) -> None:
    """Put the legend in one line between title and plot, where it covers nothing."""
    axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1.0), borderaxespad=0.3, borderpad=0, ncols=4, handlelength=1.3,
        columnspacing=1.6, handletextpad=0.5,
    )  # fmt: skip


def _nothing(axes: Axes) -> None:
    axes.text(0.5, 0.5, "no tokens", transform=axes.transAxes, ha="center", va="center", color=COLORS.muted)
    axes.set(xticks=[], yticks=[])


def _whole_numbers(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.yaxis.set_major_formatter(thousands)


def thousands(value: float, _position: float = 0) -> str:
    """Format a tick: 1,234 or 1.5M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e5, "k")):
        if value >= size:
            return f"{value / (1e3 if letter == 'k' else size):g}{letter}"
    return f"{value:,.0f}"


def _along(position: dict[str, list[float | None]]) -> str:
    thinking = position["thinking"]
    quarters = [thinking[0], thinking[len(thinking) // 2], thinking[-1], position["answer"][0]]
    return ", ".join(map(percent, quarters))
