"""`tessy report`: what it reads, what it writes, and what it says when it cannot."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

from tessy_hf.errors import DatasetError, SettingsError
from tessy_hf.report import viewer
from tessy_hf.report.page import write_report
from tessy_hf.report.statistics import evenly
from tessy_hf.rows.columns import schema
from tests.finished import finished
from tests.hub_server import HubServer
from tests.rows.test_columns import HARMONY, as_row, trajectory


@pytest.fixture(scope="module")
def rows():
    return finished(40)


@pytest.fixture
def tessy(tmp_path):
    """Run the command."""

    def run(*words, env=None):
        command = [sys.executable, "-m", "tessy_hf.cli.main", "report", *map(str, words)]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=120, env=env, cwd=Path(__file__).parents[2]
        )
        return done.returncode, " ".join((done.stdout + done.stderr).split())

    return run


def test_columns_of_lists_stand_among_a_row_s_details(rows):
    tests = [["assert True"], []] * 20
    details = [viewer.details(row, [("user", row["prompt"])]) for row in rows.add_column("tests", tests)]
    assert details[0]["tests"] == '["assert True"]' and "tests" not in details[1] and "prompt" not in details[0]


@pytest.mark.slow
def test_the_command_writes_one_file_that_needs_no_other(tessy, tmp_path, rows):
    rows.to_parquet(tmp_path / "a.parquet")
    code, printed = tessy(tmp_path / "a.parquet", "--out", tmp_path / "r.html", "--rows", 10)
    assert code == 0 and f"10 rows in {tmp_path / 'r.html'}" in printed
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert page.count("<figure") == 4 and page.endswith("</html>\n")
    assert "default-src &#39;none&#39;" in page or "default-src 'none'" in page
    assert not re.search(
        r"""(src|href|action)=["']?(https?:|//|/)|@import|url\(\s*["']?(?!#)""", page.split("<script>")[0]
    )
    assert "Problem 0" not in page  # no text of a row stands in the page as such


@pytest.mark.slow
def test_a_dataset_on_the_hub_is_read_at_its_version(tessy, tmp_path, rows):
    push = (
        "import sys\nfrom datasets import Dataset\nfrom huggingface_hub import HfApi\n"
        "rows = Dataset.from_parquet(sys.argv[1])\nrows.push_to_hub('ada/rows')\n"
        "HfApi().create_tag('ada/rows', tag='v1.0.0', repo_type='dataset')\n"
        "rows.select(range(5)).push_to_hub('ada/rows')\n"
    )
    rows.to_parquet(tmp_path / "a.parquet")
    with HubServer(tmp_path / "hub") as hub:
        env = {**hub.environment(tmp_path / "home"), "HF_DATASETS_CACHE": str(tmp_path / "cache")}
        script = [sys.executable, "-c", push, str(tmp_path / "a.parquet")]
        subprocess.run(script, env=env, check=True, capture_output=True, timeout=120)
        for source, count in (("ada/rows@v1.0.0", 40), ("ada/rows", 5)):
            code, printed = tessy(source, "--out", tmp_path / "r.html", env=env)
            assert code == 0 and f"{count} rows in" in printed, printed
        assert "<h1>ada/rows</h1>" in (tmp_path / "r.html").read_text(encoding="utf-8")
        for source in ("ada/rows@v9",):
            code, printed = tessy(source, "--out", tmp_path / "r.html", env=env)
            assert code == 2 and f"'{source}' cannot be read" in printed and "Traceback" not in printed


@pytest.mark.slow
def test_what_cannot_be_read_is_told(tessy, tmp_path, rows):
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    Dataset.from_dict({"question": ["a"]}).to_parquet(tmp_path / "prompts.parquet")
    DatasetDict({"train": rows}).save_to_disk(tmp_path / "saved")
    for source, told in [
        ("none.parquet", "'none.parquet' cannot be read: there is no such file"),
        (tmp_path / "bad.parquet", "cannot be read"),
        (tmp_path / "prompts.parquet", "columns question, which are of no known format"),
    ]:
        with pytest.raises(DatasetError, match=told):
            write_report(str(source), tmp_path / "r.html")
    code, printed = tessy(tmp_path / "bad.parquet", "--out", tmp_path / "r.html")
    assert code == 2 and "DatasetError" in printed and "Traceback" not in printed, printed
    with pytest.raises(DatasetError, match="with a split 'test'"):
        write_report(str(tmp_path / "saved"), tmp_path / "r.html", split="test")
    with pytest.raises(SettingsError, match="rows=0"):
        write_report(str(tmp_path / "saved"), tmp_path / "r.html", rows=0)
    assert not (tmp_path / "r.html").exists()


@pytest.mark.slow
def test_rows_of_other_origin_can_stand_beside(tmp_path, rows):
    rows.to_parquet(tmp_path / "a.parquet")
    rows.select_columns(["messages"]).to_parquet(tmp_path / "chats.parquet")
    write_report(str(tmp_path / "a.parquet"), tmp_path / "r.html", against=str(tmp_path / "chats.parquet"))
    rows.to_parquet(tmp_path / "b.parquet")
    write_report(str(tmp_path / "a.parquet"), tmp_path / "s.html", against=str(tmp_path / "b.parquet"))
    pages = [(tmp_path / name).read_text(encoding="utf-8") for name in ("r.html", "s.html")]
    assert all("<h2>Side by side</h2>" in page for page in pages)


def test_pieces_lie_end_to_end_over_the_text(rows):
    for row in rows:
        pieces = viewer.shown(row)
        chat = row["messages"][-1]["content"] if row["spans"] else ""
        assert "".join(text for *_, text in pieces) == chat
        mine = [(author, tokens) for author, _, tokens, _ in pieces if author < 2]
        assert mine == [(["teacher", "student"].index(span["author"]), span["tokens"]) for span in row["spans"]]


def test_a_harmony_row_is_shown_with_its_channels():
    for answer, closed in (((("student", "It is **5**."),), True), ((), False)):
        row = as_row(trajectory(answer=answer, closed=closed), "harmony", HARMONY)
        pieces = viewer.shown(row)
        marks = [text for author, *_, text in pieces if author == 2]
        assert marks == [HARMONY.open, HARMONY.close][: 1 + closed]
        assert "".join(text for author, *_, text in pieces if author < 2) == row["thinking"] + row["answer"]


def test_spans_that_do_not_fit_the_text_name_nobody(rows):
    row = dict(next(row for row in rows if row["spans"]))
    row["messages"] = [*row["messages"][:-1], {"role": "assistant", "content": "edited"}]
    assert viewer.shown(row) == [(3, 1, 0, "edited")]
    assert viewer.shown({**row, "spans": None}) == [(3, 1, 0, "edited")]
    assert set(schema()) >= {"messages", "spans"}


def test_rows_are_taken_evenly():
    assert evenly(5, 10) == [0, 1, 2, 3, 4] and evenly(10, 4) == [0, 2, 5, 7] and evenly(0, 3) == []
