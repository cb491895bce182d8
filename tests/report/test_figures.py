"""The figures show the numbers of the summary, and are drawn for every dataset there is."""

import subprocess
import sys

import pytest
from datasets import Dataset

from tessy_hf.errors import TessyError
from tessy_hf.report import figures
from tessy_hf.report.statistics import Statistics
from tests.finished import FEATURES, finished


@pytest.fixture(scope="module")
def summary():
    statistics = Statistics()
    statistics.add(finished(120).data.table)
    return statistics.summary()


def texts(figure):
    """All texts of a figure."""
    found = []
    for axes in figure.axes:
        found += [axes.get_title(loc="left"), axes.get_title(), axes.get_xlabel(), axes.get_ylabel()]
        found += [text.get_text() for text in axes.texts]
        found += [text.get_text() for text in (axes.get_legend().get_texts() if axes.get_legend() else [])]
    return [text for text in found if text]


def test_the_share_is_drawn_as_it_was_counted(summary):
    (axes,) = figures.draw("teacher_share", summary).axes
    row, thinking = (patch.get_data() for patch in axes.patches)
    assert list(row.values) == summary["teacher_share"]["row"]["histogram"]["counts"]
    assert list(thinking.values) == summary["teacher_share"]["thinking"]["histogram"]["counts"]
    assert list(row.edges) == pytest.approx([5 * step for step in range(21)])
    middle = 100 * summary["teacher_share"]["row"]["quantiles"]["0.5"]
    assert axes.lines[0].get_xdata()[0] == pytest.approx(middle)
    assert f"median row, {middle:.0f}%" in texts(figures.draw("teacher_share", summary))


def test_the_share_along_the_row_is_drawn_for_both_parts(summary):
    for axes, part in zip(figures.draw("share_along_row", summary).axes, ("thinking", "answer"), strict=True):
        student, teacher = (patch.get_data() for patch in axes.patches)
        assert list(teacher.values) == pytest.approx([100 * share for share in summary["position"][part]])
        assert list(student.baseline) == list(teacher.values) and set(student.values) == {100}


def test_span_lengths_are_drawn_in_percent_of_each_author(summary):
    (axes,) = figures.draw("span_lengths", summary).axes
    for bars, author in zip(axes.containers, ("teacher", "student"), strict=True):
        told = summary["spans"][author]
        counts = told["histogram"]["counts"][-len(bars) :]
        assert [bar.get_height() for bar in bars] == pytest.approx([100 * count / told["count"] for count in counts])
        assert sum(bar.get_height() for bar in bars) == pytest.approx(100)
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert len(labels) == len(bars) and labels[0] in ("0", "1")


def test_tokens_by_part_are_drawn_with_their_totals(summary):
    figure = figures.draw("tokens_by_part", summary)
    widths = [bar.get_width() for bars in figure.axes[0].containers for bar in bars]
    expected = [
        summary["tokens"][part][author] for part in ("thinking", "answer") for author in ("teacher", "student")
    ]
    expected += [summary["discarded"][author]["tokens"] for author in ("teacher", "student")]
    assert widths == expected
    assert f"{sum(expected[:2]):,}" in texts(figure) and f"{sum(expected[4:]):,}" in texts(figure)


@pytest.mark.slow
@pytest.mark.parametrize("name", figures.NAMES)
def test_every_figure_has_a_title_units_a_legend_and_the_same_bytes_again(summary, name):
    figure = figures.draw(name, summary)
    told = " ".join(texts(figure))
    assert "tokens" in told and ("%" in told or name == "tokens_by_part")
    assert any(axes.get_legend() for axes in figure.axes)
    for kind, start in (("png", b"\x89PNG"), ("svg", b"<?xml")):
        drawn = figures.image(name, summary, kind=kind)
        assert drawn.startswith(start) and drawn == figures.image(name, summary, kind=kind)
        assert len(drawn) < 60_000


@pytest.mark.parametrize("name", figures.NAMES)
def test_a_dataset_without_tokens_is_drawn_too(name):
    empty = Statistics().summary()
    assert "no tokens" in texts(figures.draw(name, empty))
    assert figures.image(name, empty).startswith(b"<?xml") and figures.describe(name, empty)


@pytest.mark.parametrize("discarded", [0, 7])
def test_a_dataset_of_failed_rows_alone_is_drawn_without_a_warning(discarded):
    rows = [{**row, "discarded_teacher_tokens": discarded} for row in finished(99) if not row["spans"]]
    statistics = Statistics()
    statistics.add(Dataset.from_list(rows, features=FEATURES).data.table)
    summary = statistics.summary()
    assert summary["rows"] == len(rows) > 0 and not summary["lengths"]["row"]["max"]
    assert all(len(figures.image(name, summary, kind="png")) > 3000 for name in figures.NAMES)


def test_what_a_figure_shows_is_said_in_words(summary):
    assert f"{summary['spans']['teacher']['count']:,} spans" in figures.describe("span_lengths", summary)
    assert f"{summary['discarded']['all']['tokens']:,}" in figures.describe("tokens_by_part", summary)


def test_without_matplotlib_one_is_told_what_to_install(summary, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(TessyError, match=r'pip install "tessy-hf\[report\]"'):
        figures.draw("teacher_share", summary)


def test_the_package_loads_no_part_of_the_report():
    ask = "import sys, tessy_hf, tessy_hf.cli.main; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True).stdout.split()
    assert "tessy_hf.cli.main" in loaded and not {"matplotlib", "tessy_hf.report", "tessy_hf.report.statistics"} & set(
        loaded
    )
