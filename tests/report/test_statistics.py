"""The summary is what counting by hand gives, however the rows are cut into batches and shards."""

import json
import pickle

import numpy as np
import pyarrow as pa
import pytest

from tessy_hf.errors import DatasetError
from tessy_hf.report.statistics import QUANTILES, Statistics, Tally, kind_of_error
from tests.finished import finished


@pytest.fixture(scope="module")
def rows():
    return finished(300)


def count(*tables):
    statistics = Statistics()
    for table in tables:
        statistics.add(table)
    return statistics


def table(dataset):
    return dataset.data.table


def spans(rows, author, part="thinking"):
    return [s["tokens"] for row in rows for s in row["spans"] if (s["author"], s["part"]) == (author, part)]


def exact(values):
    return {str(q): int(np.quantile(values, q, method="inverted_cdf")) for q in QUANTILES}


def test_rows_tokens_and_failures_are_counted(rows):
    summary = count(table(rows)).summary()
    reasons = rows["finish_reason"][:]
    assert summary["rows"] == 300 and summary["methods"] == {"tessy": 300}
    assert summary["finish_reasons"] == {reason: reasons.count(reason) for reason in summary["finish_reasons"]}
    assert set(summary["finish_reasons"]) == {"stop", "length", "repetition", "error"}
    assert summary["failures"]["rows"] == reasons.count("error") > 0
    assert summary["failures"]["errors"] == [
        {"error": "Row …: the engine answered HTTP ….", "rows": reasons.count("error")}
    ]
    for author in ("teacher", "student"):
        assert summary["tokens"][author] == sum(rows[f"{author}_tokens"])
        for part in ("thinking", "answer"):
            assert summary["tokens"][part][author] == sum(spans(rows, author, part))


def test_shares_and_lengths_have_the_mean_and_the_quantiles_of_the_rows(rows):
    summary = count(table(rows)).summary()
    for part, column in (("row", "teacher_token_ratio"), ("thinking", "thinking_teacher_token_ratio")):
        shares = [share for share in rows[column] if share is not None]
        told = summary["teacher_share"][part]
        assert told["count"] == len(shares) < 300 and told["mean"] == pytest.approx(np.mean(shares))
        for q in QUANTILES:
            assert told["quantiles"][str(q)] == pytest.approx(np.quantile(shares, q, method="inverted_cdf"), abs=1e-4)
        assert sum(told["histogram"]["counts"]) == len(shares)
    lengths = [row["teacher_tokens"] + row["student_tokens"] for row in rows if row["spans"]]
    told = summary["lengths"]["row"]
    assert (told["count"], told["total"], told["max"]) == (len(lengths), sum(lengths), max(lengths))
    assert told["quantiles"] == exact(lengths)


def test_spans_are_measured_by_author(rows):
    summary = count(table(rows)).summary()
    for author in ("teacher", "student"):
        lengths, told = spans(rows, author), summary["spans"][author]
        assert (told["count"], told["mean"]) == (len(lengths), pytest.approx(np.mean(lengths)))
        assert told["quantiles"] == exact(lengths) and told["max"] == max(lengths)
        edges, counts = told["histogram"]["edges"], told["histogram"]["counts"]
        assert counts == [
            sum(low <= n < high for n in lengths) for low, high in zip(edges, edges[1:], strict=False)
        ] and sum(counts) == len(lengths)


def test_discarded_tokens_are_told_with_their_share_of_the_cost(rows):
    told = count(table(rows)).summary()["discarded"]
    cost = sum(sum(rows[f"{kind}{author}_tokens"]) for kind in ("", "discarded_") for author in ("teacher", "student"))
    assert told["cost"] == cost
    for author in ("teacher", "student"):
        thrown, kept = sum(rows[f"discarded_{author}_tokens"]), sum(rows[f"{author}_tokens"])
        assert told[author] == {
            "tokens": thrown,
            "share_of_own": pytest.approx(thrown / (thrown + kept)),
            "share_of_cost": pytest.approx(thrown / cost),
        }
    assert told["all"]["share_of_cost"] == pytest.approx(
        told["teacher"]["share_of_cost"] + told["student"]["share_of_cost"]
    )


def test_the_share_along_the_row_is_that_of_the_spans_under_each_piece(rows):
    pieces, teacher, everything = 20, np.zeros(20), np.zeros(20)
    for row in rows:
        thinking = [span for span in row["spans"] if span["part"] == "thinking"]
        authors = [span["author"] for span in thinking for _ in range(span["tokens"])]
        for at in range(len(authors) * pieces):  # each token cut in 20, so that none lies across two pieces
            piece = at // len(authors)
            everything[piece] += 1 / len(authors) / pieces
            teacher[piece] += (authors[at // pieces] == "teacher") / len(authors) / pieces
    told = count(table(rows)).summary()["position"]
    assert told["thinking"] == pytest.approx(list(teacher / everything))
    assert told["answer"] == [0.0] * 5  # in these rows the student wrote all answers


def same(one, other):
    """Whether two summaries are the same but for the rounding of sums of shares."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one == (pytest.approx(other) if isinstance(other, float) else other)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 7, 64])
def test_batches_do_not_matter(rows, size):
    whole = count(table(rows)).summary()
    cut = [table(rows.select(range(at, min(at + size, 300)))) for at in range(0, 300, size)]
    assert same(count(*cut).summary(), whole)
    assert same(count(*reversed(cut)).summary() | {"methods": {"tessy": 300}, "sample": whole["sample"]}, whole)


def test_no_rows_have_no_mean_and_the_summary_is_json(rows):
    for summary in (Statistics().summary(), count(table(rows.select([]))).summary(), count(table(rows)).summary()):
        assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    empty = Statistics().summary()
    assert empty["teacher_share"]["row"]["mean"] is None and empty["lengths"]["row"]["quantiles"]["0.5"] is None
    assert empty["failures"] == {"rows": 0, "share": None, "errors": []}


def test_rows_that_all_failed_before_a_word_are_counted(rows):
    failed = rows.filter(lambda row: not row["spans"])
    summary = count(table(failed.flatten_indices())).summary()
    assert summary["rows"] == len(failed) > 0 and summary["teacher_share"]["row"]["count"] == 0
    assert summary["lengths"]["row"]["count"] == 0 and summary["position"]["thinking"] == [None] * 20
    untyped = table(failed.flatten_indices()).to_pylist()  # as inferred types have it: lists of nothing
    assert same(count(pa.Table.from_pylist(untyped)).summary(), summary)


def test_missing_columns_are_told(rows):
    with pytest.raises(DatasetError, match=r"no spans, error\. Columns: .*TessyTransform"):
        count(table(rows.remove_columns(["spans", "error"])))


def test_errors_of_the_same_kind_are_one_and_kinds_are_bounded():
    assert kind_of_error("Row 'a': HTTP 500\n after 3 tries") == "Row …: HTTP … after … tries"
    assert len(kind_of_error("x" * 10_000)) == 200
    statistics = Statistics()
    rows = finished(1).to_list() * 3000
    for i, row in enumerate(rows):
        rows[i] = {**row, "finish_reason": "error", "error": "fault " + "abcdefghij"[i % 10] * (i // 10 % 190 + 1)}
    statistics.add(pa.Table.from_pylist(rows))
    assert len(statistics.errors) == 501 and statistics.errors.total() == 3000
    assert statistics.summary()["failures"]["errors"][0]["error"] == "other errors"


@pytest.mark.slow
def test_memory_does_not_grow_with_the_rows():
    statistics, rows = Statistics(), table(finished(1000))
    statistics.add(rows)
    small = len(pickle.dumps(statistics))
    for _ in range(99):
        statistics.add(rows)
    assert statistics.rows == 100_000 and len(pickle.dumps(statistics)) < 1.2 * small < 100_000


def test_a_tally_of_one_number():
    tally = Tally([7, 7])
    assert tally.summary() == {
        "count": 2, "total": 14, "mean": 7, "min": 7, "max": 7, "quantiles": dict.fromkeys(map(str, QUANTILES), 7)
    }  # fmt: skip
    assert tally.histogram([0, 7, 8]) == [0, 2]


def test_the_sample_is_the_beginning_of_the_first_row_that_finished(rows):
    finished = next(row for row in rows if row["finish_reason"] == "stop" and row["spans"])
    sample = count(table(rows)).summary()["sample"]
    assert sample["prompt"] == finished["messages"][-2]["content"] and sample["more"] == 0
    assert "".join(span["text"] for span in sample["spans"]) == finished["thinking"] + finished["answer"]
    assert count(table(rows.select([0]).map(lambda _: {"finish_reason": "error"}))).summary()["sample"] is None
