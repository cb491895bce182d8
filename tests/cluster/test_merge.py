"""One dataset of what many hosts wrote: nothing missing, nothing twice, and told by id where it is otherwise."""

import gc
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, load_dataset

from tessy_hf import Script, Settings
from tessy_hf.cluster.merge import Merge
from tessy_hf.errors import DatasetError, MergeError, OutputError, PartsError
from tessy_hf.rows import run_record
from tessy_hf.rows.columns import schema
from tessy_hf.rows.prompt import finished_prompt_hash
from tessy_hf.run import storage
from tessy_hf.run.journal import Journal
from tessy_hf.run.shared_rows import SharedRows
from tessy_hf.trajectory import RowKey, Span
from tests.cli.test_cli import tessy as tessy
from tests.test_transform import prompts, rows_of, scripted

pytestmark = pytest.mark.slow  # all of them together


@pytest.fixture
def hosts(tmp_path):
    """Four hosts' parts of forty rows, in a folder each."""
    folders = [tmp_path / f"host-{number}" for number in range(4)]
    for number, folder in enumerate(folders):
        rows_of(prompts(40).shard(4, number, contiguous=False), scripted(parts=str(folder), rows_in_flight=4))
    return folders


def lose(folder, keys):
    """Take rows out of a host's parts."""
    for part in folder.iterdir():
        rows = pq.read_table(part)
        pq.write_table(rows.filter(pa.array([key not in keys for key in rows["key"].to_pylist()])), part)


def change(folder, key, **changes):
    """Change what a host has written in a row."""
    for part in folder.iterdir():
        table = pq.read_table(part)
        rows = [{**row, **changes} if row["key"] == key else row for row in table.to_pylist()]
        pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), part)


def test_the_rows_of_many_hosts_are_those_of_one(hosts, tmp_path):
    merged = Merge(hosts, prompts(40))
    expected = prompts(40).map(scripted(), batched=True, features=scripted().features(prompts(40)))
    assert list(merged.rows()) == expected.to_list()
    assert list(merged.dataset()) == expected.to_list() and merged.dataset().features == expected.features
    assert merged.write(tmp_path / "rows.parquet") == merged.write(tmp_path / "rows") == 40
    for files in (tmp_path / "rows.parquet", tmp_path / "rows" / "*.parquet"):
        written = load_dataset("parquet", data_files=str(files), split="train")
        assert written.to_list() == expected.to_list() and written.features == expected.features
    assert merged.record.fingerprint == merged.run == scripted().run_fingerprint
    assert sorted(path.name for path in tmp_path.iterdir())[-2:] == ["rows", "rows.parquet"]  # nothing left over


def test_the_result_is_the_same_file_whoever_wrote_the_rows(hosts, tmp_path):
    Merge(hosts, prompts(40)).write(tmp_path / "one.parquet")
    Merge(hosts[::-1], prompts(40)).write(tmp_path / "two.parquet")
    assert (tmp_path / "one.parquet").read_bytes() == (tmp_path / "two.parquet").read_bytes()


def test_a_stream_of_prompts_will_do(hosts):
    assert list(Merge(hosts, prompts(40).to_iterable_dataset()).rows()) == list(Merge(hosts, prompts(40)).rows())


def test_missing_rows_are_named_and_nothing_is_written(hosts, tmp_path):
    lose(hosts[3], {"r7", "r23"})
    merged = Merge(hosts, prompts(41))
    assert merged.report.missing == ["r7", "r23", "r40"]
    for use in (lambda: list(merged.rows()), merged.dataset, lambda: merged.write(tmp_path / "rows.parquet")):
        with pytest.raises(MergeError, match="3 of 41 prompts have no row: 'r7', 'r23', 'r40'.*run their shards"):
            use()
    assert not (tmp_path / "rows.parquet").exists()
    assert [row["id"] for row in Merge(hosts, prompts(41), incomplete=True).rows()] == [
        f"r{i}" for i in range(40) if i not in (7, 23)
    ]


def test_rows_that_are_there_twice_and_the_same_are_one(hosts):
    merged = Merge([*hosts, hosts[1]], prompts(40))
    assert merged.report.duplicates == [f"r{i}" for i in range(1, 40, 4)] and not merged.report.differing
    assert list(merged.rows()) == list(Merge(hosts, prompts(40)).rows())


def test_what_a_row_had_cost_does_not_make_two_of_it(hosts, tmp_path):
    again = tmp_path / "again"
    rows_of(prompts(1), scripted(parts=str(again)))
    change(again, "r0", discarded_teacher_tokens=99, generated_student_tokens=99)
    assert Merge([*hosts, again], prompts(40)).report.duplicates == ["r0"]


def test_rows_that_are_there_twice_and_differ_are_refused_unless_one_is_to_be_taken(hosts, tmp_path):
    again = tmp_path / "again"
    rows_of(prompts(2), scripted(parts=str(again)))
    change(again, "r1", answer="something else")
    merged = Merge([*hosts, again], prompts(40))
    assert (merged.report.duplicates, merged.report.differing) == (["r0"], ["r1"])
    with pytest.raises(MergeError, match="1 rows .* differ: 'r1'.*--first"):
        list(merged.rows())
    for sources, answer in (([*hosts, again], "the answer is r1 ."), ([again, *hosts], "something else")):
        assert list(Merge(sources, prompts(40), first=True).rows())[1]["answer"] == answer


def test_rows_of_no_prompt_are_named_and_left_out(hosts):
    merged = Merge(hosts, prompts(38))
    assert merged.report.foreign == ["r38", "r39"]
    assert [row["id"] for row in merged.rows()] == [f"r{i}" for i in range(38)]


def test_journals_and_files_of_rows_are_sources_as_well(tmp_path):
    rows_of(prompts(10), scripted(parts=str(tmp_path / "parts")))
    rows_of(prompts(20).select(range(10, 20)), scripted(journal=str(tmp_path / "rows.journal")))
    last = prompts(30).select(range(20, 30))
    last.map(scripted(), batched=True).to_parquet(tmp_path / "rows.parquet")
    sources = [tmp_path / "parts", tmp_path / "rows.journal", tmp_path / "rows.parquet"]
    assert list(Merge(sources, prompts(30)).rows()) == rows_of(prompts(30), scripted())
    with pytest.raises(MergeError, match="does not tell which column.*--recipe"):
        Merge(sources[::-1], prompts(30))
    settings = scripted().settings
    assert list(Merge(sources[::-1], prompts(30), settings=settings).rows()) == rows_of(prompts(30), scripted())


def test_a_row_that_is_not_finished_in_a_journal_is_missing(tmp_path):
    path, transform = tmp_path / "rows.journal", scripted(journal=str(tmp_path / "rows.journal"))
    rows_of(prompts(2), transform)
    journal = Journal(path, transform.run_fingerprint)
    journal.claim("r2")
    journal.append("r2", [Span("student", "thinking", "Okay, so")])
    journal.close()
    assert Merge([path], prompts(3)).report.missing == ["r2"]


def test_rows_of_several_runs_are_not_mixed(tmp_path):
    sources = []
    for temperature in (0.5, 0.6):
        sources.append(tmp_path / str(temperature))
        transform = scripted(parts=str(sources[-1]), temperature=temperature)
        rows_of(prompts(3), transform)
    with pytest.raises(MergeError, match="several runs: .*(3 rows).*(3 rows).*--run"):
        Merge(sources, prompts(3))
    chosen = list(Merge(sources, prompts(3), run=transform.run_fingerprint).rows())
    assert {row["run_fingerprint"] for row in chosen} == {transform.run_fingerprint} and len(chosen) == 3
    with pytest.raises(MergeError, match="no rows of run 'other'"):
        Merge(sources, prompts(3), run="other")


def test_no_rows_at_all_are_told(tmp_path):
    for source in (tmp_path / "nothing", tmp_path, tmp_path / "*.parquet"):
        with pytest.raises(PartsError, match="There are no rows at"):
            Merge([source], prompts(3))


@pytest.mark.parametrize("rows", [prompts(3), prompts(3).add_column("messages", ["a chat"] * 3)])
def test_files_that_hold_no_rows_are_told(tmp_path, rows):
    rows.to_parquet(tmp_path / "prompts.parquet")
    with pytest.raises(PartsError, match="no column 'messages' with lists. Finished rows are expected"):
        Merge([tmp_path / "prompts.parquet"], prompts(3))


def test_prompts_without_the_columns_are_told(hosts):
    with pytest.raises(DatasetError, match="no column 'prompt'"):
        Merge(hosts, prompts(40).rename_column("prompt", "question"))
    with pytest.raises(DatasetError, match="no column 'id'"):
        Merge(hosts, prompts(40).remove_columns("id"))


def test_texts_are_not_held_in_memory(tmp_path, monkeypatch):
    """Rows of 40 kB from many parts: a few row groups are in memory at a time, whatever their number."""
    rows = {row["id"]: row for row in rows_of(prompts(40), scripted(long, max_answer_tokens=10**6))}
    written = SharedRows(str(tmp_path / "parts"), rows["r0"]["run_fingerprint"])
    written.describe(schema(), "{}")
    for key, row in rows.items():
        written.write({RowKey(key, finished_prompt_hash(row["messages"])): row})
    monkeypatch.setattr(storage, "CACHE_BYTES", 1 << 18)
    merged = Merge([tmp_path / "parts"], prompts(40), settings=Settings.check(id_column="id"))
    gc.collect()
    begin, most, size = pa.total_allocated_bytes(), 0, 0
    for row in merged.rows():
        most, size = max(most, pa.total_allocated_bytes() - begin), size + len(row["answer"])
    assert size > 1_600_000 and most < 1 << 20


def long(row):
    return Script("okay", "the answer is long . " * 2000)


@pytest.mark.parametrize("name", ["rows.parquet", "rows.jsonl", "rows"])
def test_a_merge_replaces_its_own_result_and_nothing_else(hosts, tmp_path, name, monkeypatch):
    monkeypatch.setattr("tessy_hf.cluster.merge.SHARD_BYTES", 1 << 10)
    monkeypatch.setattr("tessy_hf.rows.parquet.BATCH_ROWS", 8)
    out, whole = tmp_path / "out" / name, Merge(hosts, prompts(40))
    first = Merge(hosts[:1], prompts(40), incomplete=True)
    assert first.write(out) == 10 and whole.write(out) == 40 == whole.write(out)
    (record,) = set(map(repr, run_record.read_all(str(out))))
    assert record == repr(whole.record) and whole.record.source.fingerprint == prompts(40)._fingerprint
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    with pytest.raises(OutputError, match="is there already, and .* rows answer prompts that are not among these"):
        first.write(out)
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before
    assert first.write(out, overwrite=True) == 10
    kind, files = ("json", out) if name == "rows.jsonl" else ("parquet", out / "*" if name == "rows" else out)
    assert load_dataset(kind, data_files=str(files), split="train")["id"] == [f"r{i}" for i in range(0, 40, 4)]


def test_a_merge_writes_what_its_output_is_called_or_refuses(hosts, tmp_path):
    merged = Merge(hosts, prompts(40))
    for out, why in [
        (tmp_path / "rows.csv", "neither .parquet nor .jsonl"),
        (hosts[0], "is read as an input"),
        (hosts[0] / "rows.parquet", "is read as an input"),
    ]:
        with pytest.raises(OutputError, match=why):
            merged.write(out)


# --- the command


def test_the_command_finds_a_planted_missing_row_and_a_planted_duplicate(hosts, tessy, tmp_path):
    prompts(40).to_json(tmp_path / "prompts.jsonl")
    arguments = [*hosts, "--prompts", tmp_path / "prompts.jsonl", "--out", tmp_path / "rows.parquet"]
    code, printed = tessy("merge", *arguments)
    assert code == 0 and "0 prompts without a row" in printed and "40 rows in" in printed
    (tmp_path / "rows.parquet").unlink()
    lose(hosts[2], {"r6"})
    rows_of(prompts(40).select([5]), scripted(parts=str(hosts[3])))
    code, printed = tessy("merge", *arguments)
    assert code == 1 and not (tmp_path / "rows.parquet").exists()
    assert "1 prompts without a row: 'r6'" in printed and "1 duplicate rows, all the same: 'r5'" in printed
    code, printed = tessy("merge", *arguments, "--json")
    told = json.loads(printed[: printed.index("\n")])
    assert (code, told["missing"], told["duplicates"]) == (1, ["r6"], ["r5"])
    code, printed = tessy("merge", *arguments, "--incomplete")
    assert code == 1 and "39 rows in" in printed
    rows_of(prompts(40).select([6]), scripted(parts=str(hosts[2])))
    change(hosts[3], "r5", answer="no")
    code, printed = tessy("merge", *arguments)
    assert code == 1 and "differ: 'r5'" in printed
    code, printed = tessy("merge", *arguments, "--first")
    rows = load_dataset("parquet", data_files=str(tmp_path / "rows.parquet"), split="train")
    assert code == 0 and rows["id"] == [f"r{i}" for i in range(40)] and rows[5]["answer"] == "the answer is r5 ."


def test_shards_of_the_command_make_the_whole(tessy, tmp_path):
    """What a SLURM array does, with the miniature models: shards into one folder of parts, then a merge."""
    from tessy_hf import demo
    from tests.cli.test_cli import RECIPE

    prompts_file = tmp_path / "prompts.jsonl"
    demo.prompts(9, seed=8).to_json(prompts_file)
    shared, greedy = f"parts={tmp_path / 'parts'}", ("--set", "temperature=0")
    for shard in range(2):
        journal = f"journal={tmp_path / 'journals' / str(shard)}"
        code, printed = tessy("synthesize", RECIPE, prompts_file, "--shard", f"{shard}/2", *greedy, "--set", shared,
                              "--set", journal)  # fmt: skip
        assert code == 0 and f"{5 - shard} rows in" in printed
    assert len(list((tmp_path / "journals").glob("?"))) == 2
    assert tessy("merge", tmp_path / "parts", "--prompts", prompts_file, "--out", tmp_path / "merged.parquet")[0] == 0
    assert tessy("synthesize", RECIPE, prompts_file, tmp_path / "one.parquet", *greedy)[0] == 0
    one, merged = (Dataset.from_parquet(str(tmp_path / f"{name}.parquet")) for name in ("one", "merged"))
    assert merged.to_list() == one.to_list() and merged.features == one.features


@pytest.mark.parametrize("shard", ["2/2", "1", "-1/2", "a/b", "0/0"])
def test_an_invalid_shard_is_refused(tessy, tmp_path, shard):
    from tests.cli.test_cli import RECIPE

    prompts(3).to_json(tmp_path / "prompts.jsonl")
    code, printed = tessy("synthesize", RECIPE, tmp_path / "prompts.jsonl", tmp_path / "x.parquet", f"--shard={shard}")
    assert code == 2 and "is not RANK/WORLD" in printed
    code, printed = tessy("synthesize", RECIPE, tmp_path / "prompts.jsonl")
    assert code == 2 and "No output path given" in printed
