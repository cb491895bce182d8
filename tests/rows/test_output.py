"""Files of finished rows: checked before a run, whole or as they were, with the run's record in them."""

import json
import os
import resource
import signal
from contextlib import contextmanager

import pyarrow.parquet as pq
import pytest
from datasets import load_dataset

from tessy_hf.errors import DatasetError, OutputError
from tessy_hf.rows import run_record
from tessy_hf.rows.output import Output
from tessy_hf.rows.parquet import tables
from tests.finished import FEATURES, finished_row
from tests.test_transform import prompts, scripted

KINDS = ["rows.parquet", "rows.jsonl"]


def listed(folder):
    return sorted(path.name for path in folder.iterdir())


def write(path, rows, record=None, **options):
    return Output(path, **options).write(tables(rows, FEATURES), FEATURES, lambda: record)


def some_rows(n):
    return (finished_row(number) for number in range(n))


@contextmanager
def full_disk(size):
    """Let no file grow beyond so many bytes, as a full disk would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("name", KINDS)
def test_rows_and_their_record_come_back_from_a_file(tmp_path, name):
    record = scripted().record()
    assert write(tmp_path / "made" / name, some_rows(150), record) == 150
    assert run_record.read(tmp_path / "made" / name) == record
    for source in (tmp_path / "made", tmp_path / "made" / "*"):
        assert run_record.read_all(str(source)) == [record]
    kind = "parquet" if name.endswith("parquet") else "json"
    for back in (
        load_dataset(kind, data_files=str(tmp_path / "made" / name), split="train"),
        load_dataset(str(tmp_path / "made"), split="train"),  # the record is no data
    ):
        expected = [finished_row(number) for number in range(150)]
        assert [row["messages"] for row in back] == [row["messages"] for row in expected]
        assert back["seed"] == [row["seed"] for row in expected]


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("there", [False, True])
def test_nothing_half_is_there_after_an_interrupt_or_a_full_disk(tmp_path, name, there):
    out = tmp_path / name
    if there:
        write(out, some_rows(3), scripted().record())
    before = {path: (tmp_path / path).read_bytes() for path in listed(tmp_path)}

    def interrupted():
        yield from some_rows(200)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(out, interrupted(), overwrite=True)
    with full_disk(20_000), pytest.raises(OutputError, match="cannot be written: .*too large.*What was there"):
        write(out, some_rows(2000), overwrite=True)
    assert {path: (tmp_path / path).read_bytes() for path in listed(tmp_path)} == before


def test_a_failure_of_the_rows_is_not_called_one_of_the_file(tmp_path):
    def failing():
        yield finished_row(0)
        raise ConnectionError("The prompts' server is gone.")

    for name in KINDS:
        with pytest.raises(ConnectionError):
            write(tmp_path / name, failing())
    assert listed(tmp_path) == []


def test_places_that_cannot_be_written_are_refused_at_once(tmp_path):
    (tmp_path / "folder.parquet").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "prompts.jsonl").write_text("{}")
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "prompts.jsonl")
    inputs = [tmp_path / "prompts.jsonl", str(tmp_path / "data" / "*.parquet"), "me/prompts"]
    for path, why in [
        ("rows.csv", "neither .parquet nor .jsonl"),
        ("rows", "neither .parquet nor .jsonl"),
        ("folder.parquet", "is no file"),
        ("file/rows.parquet", "cannot be written"),
        ("prompts.jsonl", "read as an input"),
        ("link.jsonl", "read as an input"),
        ("data/all.parquet", "read as an input"),
    ]:
        with pytest.raises(OutputError, match=why):
            Output(tmp_path / path, inputs, overwrite=True)
    with pytest.raises(OutputError, match="read as an input"):
        Output(tmp_path / "rows.parquet", [tmp_path])
    for path, why in [("s3://bucket/rows.parquet", "not a local path"), ("/proc/rows.parquet", "cannot be written")]:
        with pytest.raises(OutputError, match=why):
            Output(path)
    assert Output(tmp_path / "ROWS.PARQUET", inputs).path.name == "ROWS.PARQUET"


def test_a_link_to_another_disk_stays_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "rows.parquet").symlink_to(tmp_path / "disk" / "rows.parquet")
    write(tmp_path / "rows.parquet", some_rows(2))
    assert (tmp_path / "rows.parquet").is_symlink() and listed(tmp_path / "disk") == ["rows.parquet"]


@pytest.mark.parametrize("options", [{}, {"id_column": None}])
@pytest.mark.parametrize("name", KINDS)
def test_only_files_of_the_same_run_and_prompts_are_replaced(tmp_path, name, options):
    out = tmp_path / name

    def run(rows, overwrite=False, **changes):
        with scripted(**{"journal": None, **options, **changes}) as transform:
            return transform.write(transform.map(rows), out, overwrite=overwrite)

    assert run(prompts(4)) == 4  # a trial
    assert run(prompts(9)) == 9 and run(prompts(9)) == 9  # the full run, and once more
    for other, changes, why in [
        (prompts(4), {}, "5 of its 9 rows answer prompts that are not among these"),
        (prompts(9).map(lambda row: {"prompt": row["prompt"] + "?"}), {}, "9 of its 9 rows"),
        (prompts(9), {"temperature": 0.1}, "is of run"),
    ]:
        with pytest.raises(OutputError, match=f"is there already, and .*{why}.*--overwrite"):
            run(other, **changes)
    assert run(prompts(4), overwrite=True) == 4
    for content in ("{}\n", '{"messages": 1, "run_fingerprint": "a"}\n', "PAR1"):
        out.write_text(content)
        with pytest.raises(OutputError, match="is there already"):
            run(prompts(4))
        assert out.read_text() == content


@pytest.mark.parametrize("name", KINDS)
def test_a_stream_replaces_no_row_that_it_does_not_have(tmp_path, name):
    def run(rows, overwrite=False):
        with scripted(journal=None) as transform:
            return transform.write(transform.map(rows.to_iterable_dataset()), tmp_path / name, overwrite=overwrite)

    assert run(prompts(4)) == 4 and run(prompts(9)) == 9
    there = (tmp_path / name).read_bytes()
    with pytest.raises(OutputError, match="5 of its 9 rows answer prompts that are not among these"):
        run(prompts(4))
    assert (tmp_path / name).read_bytes() == there
    assert run(prompts(4), overwrite=True) == 4


def test_a_stream_is_written_as_it_comes(tmp_path):
    source = prompts(70).to_iterable_dataset()
    with scripted() as transform:
        assert transform.write(transform.map(source), tmp_path / "rows.parquet") == 70
        record = run_record.read(tmp_path / "rows.parquet")
        assert record == transform.record() and record.begun and record.source.fingerprint
    rows = load_dataset("parquet", data_files=str(tmp_path / "rows.parquet"), split="train")
    assert rows["id"] == prompts(70)["id"] and rows.features == transform.features(prompts(70))


def test_a_record_that_cannot_be_read_is_told(tmp_path):
    write(tmp_path / "rows.jsonl", some_rows(1), scripted().record())
    run_record.sidecar(tmp_path / "rows.jsonl").write_text(json.dumps({"fingerprint": "a", "of_tomorrow": 1}))
    with pytest.raises(DatasetError, match="record of .* cannot be read: of_tomorrow: Extra.*upgrade"):
        run_record.read(tmp_path / "rows.jsonl")
    with pytest.raises(DatasetError, match="cannot be read"):
        run_record.read(tmp_path / "none.parquet")


def test_a_run_is_remembered_without_its_prompts(tmp_path):
    with scripted(journal=None) as transform:
        transform.map(prompts(1))
    assert run_record.recall(transform.run_fingerprint) == transform.record().model_copy(update={"source": None})
    assert run_record.recall("0" * 16) is None is run_record.recall("../../passwd")


def test_a_new_file_has_the_permissions_of_the_users_files(tmp_path):
    before = os.umask(0o027)
    try:
        write(tmp_path / "rows.jsonl", some_rows(1), scripted().record())
    finally:
        os.umask(before)
    assert {(path.stat().st_mode & 0o777) for path in tmp_path.iterdir()} == {0o640}
    assert signal.getsignal(signal.SIGXFSZ) == signal.SIG_IGN  # as Python has it, for the full disk above


def test_the_metadata_of_datasets_stays(tmp_path):
    write(tmp_path / "rows.parquet", some_rows(1), scripted().record())
    assert {b"huggingface", run_record.KEY} <= set(pq.read_schema(tmp_path / "rows.parquet").metadata)
