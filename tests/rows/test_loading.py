"""Prompts and rows are loaded from files as people have them, or refused in one sentence that says why."""

import bz2
import gzip
import json
import lzma
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict, IterableDataset

from tessy_hf import demo
from tessy_hf.errors import DatasetError
from tessy_hf.rows.loading import ending, load, load_finished, short_names

ROWS = [{"id": f"p{n}", "prompt": f"What is {n} + {n}? Größe 🙂"} for n in range(3)]
LINES = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
CSV = "id,prompt\n" + "\n".join(f'{row["id"]},"{row["prompt"]}"' for row in ROWS) + "\n"
FILES = {
    "p.jsonl": LINES.encode(),
    "p.JSONL": LINES.encode(),
    "p.ndjson": LINES.encode(),
    "p.json": json.dumps(ROWS).encode(),
    "p.jsonl.gz": gzip.compress(LINES.encode()),
    "p.Json.GZ": gzip.compress(LINES.encode()),
    "p.jsonl.bz2": bz2.compress(LINES.encode()),
    "p.jsonl.xz": lzma.compress(LINES.encode()),
    "p.csv": CSV.encode(),
    "p.csv.gz": gzip.compress(CSV.encode()),
    "p.tsv": CSV.replace(",", "\t").encode(),
    "from_windows.jsonl": b"\xef\xbb\xbf" + LINES.replace("\n", "\r\n").encode(),
    "from_windows.csv": b"\xef\xbb\xbf" + CSV.replace("\n", "\r\n").encode(),
    "blank_lines.jsonl": f"\n{LINES}\n\n".encode(),
    "my.prompts.v2.jsonl": LINES.encode(),
}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """An empty folder, with a cache of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("streaming", [False, True])
def test_files_of_all_kinds_are_read(name, streaming):
    Path(name).write_bytes(FILES[name])
    rows = load(name, streaming=streaming)
    assert isinstance(rows, IterableDataset if streaming else Dataset) and list(rows) == ROWS
    assert list(load(name, "train[:2]", streaming=streaming)) == ROWS[:2]


def test_a_text_file_has_a_row_per_line():
    Path("p.TXT").write_text("What is 1?\n\n  \nWhat is 2?\r\n", encoding="utf-8")
    assert load("p.TXT")["text"][:] == ["What is 1?", "What is 2?"]
    assert list(load("p.TXT", streaming=True, line_column="prompt")) == [
        {"prompt": "What is 1?"},
        {"prompt": "What is 2?"},
    ]


def test_folders_and_patterns_are_read():
    rows = Dataset.from_list(ROWS)
    rows.save_to_disk("saved")
    DatasetDict({"train": rows, "test": rows.select([2])}).save_to_disk("splits")
    Path("files").mkdir()
    rows.select([0, 1]).to_parquet("files/a.parquet")
    rows.select([2]).to_parquet("files/b.parquet")
    for name in ("saved", "splits", "files", "files/*.parquet"):
        assert list(load(name)) == list(load(name, streaming=True)) == ROWS
        assert list(load(name, "train[1:]")) == ROWS[1:]
    assert list(load("splits", "test")) == ROWS[2:]
    for name in ("saved", "files/a.parquet"):
        with pytest.raises(DatasetError, match="with a split 'trainn'"):
            load(name, "trainn")


BROKEN = {
    "broken.jsonl": (f'{LINES}\n{{"id": "x", "prompt": \n'.encode(), r"line 4 is not JSON: Expecting value"),
    "broken.jsonl.gz": (gzip.compress(f"{LINES}\nno".encode()), "line 4 is not JSON"),
    "cut_off.jsonl.gz": (FILES["p.jsonl.gz"][:-12], "ended before the end"),
    "not_gzip.jsonl.gz": (b"text", "not .* gzip"),
    "empty.jsonl": (b"", "it is empty"),
    "empty.jsonl.gz": (gzip.compress(b""), "it is empty"),
    "empty.csv": (b"", "it is empty"),
    "empty.txt": (b"", "it is empty"),
    "latin.csv": (CSV.encode("latin-1", "replace"), "can't decode byte"),
    "latin.jsonl": (LINES.encode("latin-1", "replace"), "can't decode byte"),
    "latin.txt": (LINES.encode("latin-1", "replace"), "can't decode byte"),
    "bad.parquet": (b"PAR1 no", "Parquet"),
    "rows.docx": (b"text", "its ending is not known"),
    "bad.json": (b'{"a": ', "cannot be read"),
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("streaming", [False, True])
def test_a_file_that_cannot_be_read_is_refused_with_the_reason(name, streaming):
    content, reason = BROKEN[name]
    Path(name).write_bytes(content)
    with pytest.raises(DatasetError, match=reason) as refused:
        load(name, streaming=streaming)
    assert str(refused.value).startswith(f"{name!r} cannot be read: ") and "\n" not in str(refused.value)


def test_what_is_not_there_is_refused():
    Path("bare").mkdir()
    Dataset.from_list(ROWS).save_to_disk("saved")
    DatasetDict({"train": Dataset.from_list(ROWS)}).save_to_disk("splits")
    for source, reason in [
        ("none.jsonl", "there is no such file or folder"),
        ("none.JSONL.gz", "there is no such file or folder"),
        ("a/b/c", "there is no such file or folder"),
        ("none*.jsonl", "cannot be read"),
        ("bare", "any data files"),
        ("ada/does-not-exist@v1", "on the Hub"),
    ]:
        with pytest.raises(DatasetError, match=reason):
            load(source)
    with pytest.raises(DatasetError, match="'splits' cannot be read: .*with a split 'test'"):
        load("splits", "test")


def test_zst_without_its_package_says_what_to_install(monkeypatch):
    Path("p.jsonl.zst").write_bytes(b"")
    monkeypatch.setattr("tessy_hf.rows.loading.find_spec", lambda name: None)
    with pytest.raises(DatasetError, match="pip install zstandard"):
        load("p.jsonl.zst")


def test_finished_rows_have_chats():
    Dataset.from_list(ROWS).to_parquet("p.parquet")
    with pytest.raises(DatasetError, match="columns id, prompt, which are of no known format"):
        load_finished("p.parquet")


def test_endings_and_names():
    names = ("a.JSONL.gz", "b.txt.zst", "c/d.parquet", "s3://x/*.csv", "me/data@v1.0.0", "rows.journal", "a.gz")
    assert [ending(name) for name in names] == [".jsonl", ".txt", ".parquet", ".csv", None, None, None]
    Path("x").mkdir()
    for name in ("x/a.parquet", "a.parquet", "b.parquet"):
        Path(name).write_bytes(b"")
    assert short_names(["x/a.parquet", "b.parquet", "me/data@v1.0.0"]) == ["a.parquet", "b.parquet", "me/data@v1.0.0"]
    assert short_names(["x/a.parquet", "a.parquet"]) == ["x/a.parquet", "a.parquet"]


@pytest.mark.slow
def test_the_command_reads_them_or_says_one_sentence():
    """One process for a file that is read and one for a file that is not; the others differ in nothing that counts."""
    models = "".join(
        f"{author}:\n  engine: transformers\n  model: {folder}\n"
        for author, folder in (("teacher", demo.TEACHER), ("student", demo.STUDENT))
    )
    settings = "method: student-only\njournal: null\nmax_thinking_tokens: 8\nmax_answer_tokens: 8\n"
    Path("recipe.yaml").write_text(settings + models)
    prompts = demo.prompts(2, seed=3)["prompt"]
    Path("p.txt.gz").write_bytes(gzip.compress("\n".join(prompts).encode()))
    Path("broken.jsonl").write_bytes(BROKEN["broken.jsonl"][0])

    def synthesize(name):
        command = [sys.executable, "-m", "tessy_hf.cli.main", "synthesize", "recipe.yaml", name, "out.parquet"]
        return subprocess.run(command, capture_output=True, text=True, timeout=120)

    done = synthesize("p.txt.gz")
    assert done.returncode == 0, done.stderr
    assert [row["messages"][0]["content"] for row in Dataset.from_parquet("out.parquet")] == prompts
    refused = synthesize("broken.jsonl")
    assert refused.returncode == 2 and "Traceback" not in refused.stderr
    assert "DatasetError: 'broken.jsonl' cannot be read: line 4 is not JSON" in refused.stderr
