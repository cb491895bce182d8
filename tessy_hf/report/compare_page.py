"""The page of ``tessy analyze``: what :func:`tessy_hf.report.compare.analyze` returns goes in, HTML comes out.

Knows nothing of rows or models.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tessy_hf.report import figures
from tessy_hf.report.html import drawn, render
from tessy_hf.report.statistics import AUTHORS, share
from tessy_hf.report.tables import Table, count, percent

if TYPE_CHECKING:
    from matplotlib.figure import Figure

POINTS = 800
"""At most this many texts of each dataset are drawn, evenly spaced; centers are those of all texts."""
_WIDE = (12.8, 3.4)  # inches


def names(found: dict[str, Any]) -> list[str]:
    """Return the names of the figures that can be drawn; some need spans or a scorer."""
    authors = ["authors"] if any(found["authors"].values()) else []
    scored = ["nll"] if any((found["nll"] or {}).values()) else []  # none where all prompts are too long
    return ["map", "tokens", *authors, *scored, "words"]


def draw(name: str, found: dict[str, Any]) -> Figure:
    """Draw one figure.

    Args:
        name: One of :func:`names`.
        found: The comparison.

    Raises:
        TessyError: matplotlib is not installed.
    """
    return figures.paint(_DRAW[name], found, _WIDE if name == "words" else figures.SIZE)


def image(name: str, found: dict[str, Any], kind: figures.Kind = "svg") -> bytes:
    """Draw one figure and return it as a file."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # in SVG the page's font is used
        return figures.save(draw(name, found), kind)


def describe(name: str, found: dict[str, Any]) -> str:
    """Describe a figure in one sentence, as alternative text."""
    if name == "map":
        similar = "; ".join(f"{_pair(one)}: similarity {one['mean']:.3f}" for one in found["similarity"])
        return f"The texts on their first two principal components. {similar}."
    if name == "tokens":
        means = (f"{name} {count(round(one['row']['mean'], 1))}" for name, one in found["tokens"].items())
        return f"Mean tokens per text: {', '.join(means)}."
    if name == "authors":
        shares = (f"{name} {_teacher(tokens)} by the teacher" for name, tokens in found["authors"].items())
        return f"Who wrote the tokens: {', '.join(shares)}."
    if name == "nll":
        return "The student's mean negative log-likelihood per token, by author."
    words = ", ".join(found["words"]["words"])
    return f"Frequency in each dataset of the words most typical of one of them: {words}."


# --- the figures


def _colors(found: dict[str, Any]) -> dict[str, str]:
    return dict(zip(found["names"], figures.COLORS.datasets, strict=False))


def _map(figure: Figure, found: dict[str, Any]) -> None:
    axes = figure.subplots()
    first, second = (
        f"principal component {at + 1} ({percent(part)} of the variance)"
        for at, part in enumerate(found["pca"]["explained"])
    )
    figures.name_axes(axes, "How the texts differ: near dots share words", first, second)
    sides = list(zip(_colors(found).items(), found["pca"]["points"], found["pca"]["centres"], strict=True))
    for (name, color), points, _ in sides:
        some = points[:: -(-len(points) // POINTS)]
        x, y = zip(*some, strict=True)
        axes.scatter(x, y, s=7, color=color, alpha=0.35, linewidths=0, label=name)
    for size, ((_, color), _, centre) in zip((260, 130, 50), sides, strict=False):  # rings where centers coincide
        axes.scatter(
            [centre[0]], [centre[1]], s=size, color=color, edgecolors=figures.COLORS.text, linewidths=1.5, zorder=3
        )
    axes.grid(visible=True, axis="both")
    axes.set(xticks=[], yticks=[])
    figures.put_legend(axes)
    legend: Any = axes.get_legend()
    for handle in legend.legend_handles:
        handle.set(alpha=1, sizes=[36])


def _tokens(figure: Figure, found: dict[str, Any]) -> None:
    axes = figure.subplots()
    figures.name_axes(axes, "How long a text is", "mean number of tokens per text (student's tokenizer)", "")
    bars = []
    for name, color in _colors(found).items():
        thinking, answer = (found["tokens"][name][part]["mean"] for part in ("thinking", "answer"))
        parts: list[figures.Part] = [(thinking, {"color": color}), (answer, {"color": color, "alpha": 0.45})]
        note = f"{thinking:,.0f} thinking, {answer:,.0f} answer (paler)"
        bars.append(figures.Bar(name, parts, f"{thinking + answer:,.0f}", note))
    figures.draw_bars(axes, bars)
    axes.xaxis.set_major_formatter(figures.thousands)


def _authors(figure: Figure, found: dict[str, Any]) -> None:
    axes = figure.subplots()
    figures.name_axes(axes, "Who wrote the tokens", "share of the tokens (%)", "")
    bars = []
    for name, tokens in found["authors"].items():
        if tokens:
            shares = {author: 100 * (share(tokens[author], sum(tokens.values())) or 0) for author in AUTHORS}
            bars.append(figures.Bar(name, figures.author_parts(shares), f"teacher {_teacher(tokens)}"))
    figures.draw_bars(axes, bars, margin=0.31)
    axes.set_xticks(range(0, 101, 20))
    figures.put_legend(axes)


def _nll(figure: Figure, found: dict[str, Any]) -> None:
    axes = figure.subplots()
    figures.name_axes(
        axes,
        "How foreign the texts are to the student",
        "negative log-likelihood per token (nats; less is more familiar)",
        "",
    )
    bars = []
    for name, color in _colors(found).items():
        for kind, one in found["nll"][name].items():
            look: dict[str, Any] = {"color": color, "alpha": 1 if kind == "all" else 0.5}
            label = f"{name}: all" if kind == "all" else kind
            bars.append(figures.Bar(label, [(one["nll"], look)], f"{one['nll']:.2f}"))
    figures.draw_bars(axes, bars)


def _words(figure: Figure, found: dict[str, Any]) -> None:
    from matplotlib.patches import Rectangle

    axes = figure.subplots()
    axes.set_title("Typical words: uses in 1,000 words of the dataset", pad=12)
    words, rates = found["words"]["words"], found["words"]["per_thousand"]
    colors = list(_colors(found).values())
    darkest = max(max(line) for line in rates) ** 0.5 or 1
    for y, line in enumerate(rates):
        for x, rate in enumerate(line):
            strength = 0.75 * rate**0.5 / darkest
            axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, color=colors[y], alpha=strength, linewidth=0))
            said = "" if not rate else f"{rate:.0f}" if rate >= 10 else f"{rate:.1f}"
            axes.text(x, y, said, ha="center", va="center", size=8.5, color=figures.COLORS.text)
    axes.grid(visible=False)
    axes.set(xlim=(-0.5, len(words) - 0.5), ylim=(len(rates) - 0.5, -0.5))
    axes.set_xticks(
        range(len(words)), words, rotation=45, ha="right", rotation_mode="anchor", color=figures.COLORS.text
    )
    axes.set_yticks(range(len(rates)), found["names"], color=figures.COLORS.text)
    axes.tick_params(length=0)


_DRAW: dict[str, figures.Drawing] = {
    "map": _map,
    "tokens": _tokens,
    "authors": _authors,
    "nll": _nll,
    "words": _words,
}

# --- the page


def write(out: Path, found: dict[str, Any]) -> None:
    """Write a comparison as one self-contained HTML file without scripts."""
    page = render(
        "compare.html",
        title=" · ".join(found["names"]),
        subtitle=f"{found['prompts']:,} common prompts; tokens of {found['tokenizer']}",
        tiles=[(f"Similarity, {_pair(one)}", f"{one['mean']:.3f}", _beside(one)) for one in found["similarity"]],
        figures=[drawn(image(name, found), describe(name, found), wide=name == "words") for name in names(found)],
        tables=tables(found),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page, encoding="utf-8")


def tables(found: dict[str, Any]) -> list[Table]:
    """Return the numbers as tables of plain text."""
    similar = [(_pair(one), f"{one['mean']:.3f}", f"{one['sd']:.3f}", f"{one['other_prompts']:.3f}")
               for one in found["similarity"]]  # fmt: skip
    note = (
        "Cosine of two texts' TF-IDF vectors over the student's tokens, as in the paper's appendix A.6; 1 means the "
        "same bag of tokens. Texts of different prompts give the baseline that any two texts reach."
    )
    head = ("", "same prompt, mean", "sd", "different prompts, mean")
    made = [Table("Similarity", head, similar, note)]
    lengths = [
        (f"{name}, {part}", *(count(round(value, 1)) for value in found["tokens"][name][part].values()))
        for name in found["names"]
        for part in ("row", "thinking", "answer")
    ]
    made.append(Table("Tokens per text", ("", "mean", "p5", "median", "p95"), lengths))
    if found["nll"]:
        lines = [
            (f"{name}: {kind}", f"{one['nll']:.3f}", count(one["tokens"]))
            for name in found["names"]
            for kind, one in found["nll"][name].items()
        ]
        note = "After the prompt, in the student's own format. High values for style mean a style that is not its own."
        cut = ", ".join(f"{one['cut']:,} of {name}" for name, one in (found["surprise"] or {}).items() if one["cut"])
        note += f" Rows too long to be read whole, of which only the beginning counts: {cut}." if cut else ""
        made.append(Table("Negative log-likelihood under the student", ("", "nats per token", "tokens"), lines, note))
    return made


def _pair(one: dict[str, Any]) -> str:
    return " and ".join(one["of"])


def _beside(one: dict[str, Any]) -> str:
    return f"{one['other_prompts']:.3f} for different prompts"


def _teacher(tokens: dict[str, int] | None) -> str:
    return percent(share(tokens["teacher"], sum(tokens.values()))) if tokens else "–"
