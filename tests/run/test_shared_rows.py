"""Finished rows on storage that all hosts see: what one host has put there, no other writes again."""

import asyncio
import random
import signal
import threading
import time
import uuid

import fsspec
import pytest
from datasets import load_dataset
from fsspec.implementations.memory import MemoryFileSystem

from tessy_hf import ScriptedEngine
from tessy_hf.cluster.merge import Merge
from tessy_hf.errors import JournalError, PartsError, RequestError
from tessy_hf.rows import run_record
from tessy_hf.rows.prompt import PromptReader
from tessy_hf.run import outbox
from tessy_hf.run.journal import Journal
from tessy_hf.run.shared_rows import SharedRows
from tessy_hf.run.storage import ParquetRows, file_system
from tessy_hf.trajectory import RowKey
from tests import crashes
from tests.crashes import Work
from tests.test_transform import play, prompts, rows_of, scripted

pytestmark = pytest.mark.slow  # all of them together


@pytest.fixture(params=["a folder", "memory"])
def shared(request, tmp_path):
    """A place that all hosts see."""
    if request.param == "memory":
        return f"memory://{uuid.uuid4().hex}/run"
    return str(tmp_path / "shared" / "run")


def names_in(shared):
    system, path = file_system(shared)
    return [str(name).rpartition("/")[2] for name in system.ls(path, detail=False)]


def never(request):
    raise AssertionError(f"{request.row} was written again")


def test_what_one_host_has_written_another_looks_up(shared):
    first = rows_of(prompts(30), scripted(parts=shared), batch_size=10)
    again = rows_of(prompts(40).select(range(30)), scripted(parts=shared, fault=never), batch_size=7)
    assert first == again == rows_of(prompts(30), scripted())


def test_a_part_is_a_dataset_with_the_keys_and_the_run_s_record(tmp_path):
    with scripted(parts=str(tmp_path)) as transform:
        transform(prompts(5)[:])
        record = transform.record()
    [part] = tmp_path.iterdir()
    assert part.name.startswith(f"part-{transform.run_fingerprint}-") and part.suffix == ".parquet"
    rows = load_dataset("parquet", data_files=str(part), split="train")
    assert rows["key"] == [f"r{i}" for i in range(5)] and rows["answer"][3] == "the answer is r3 ."
    system, path = file_system(str(part))
    told = run_record.of_schema(ParquetRows(system).schema(path))
    assert told["settings"] == record.settings and told["fingerprint"] == record.fingerprint


def test_the_plan_counts_what_is_there(shared):
    with scripted(parts=shared) as transform:
        transform(prompts(5)[:])
    assert scripted(parts=shared).plan(prompts(8))[:3] == (5, 0, 3)


def test_parts_of_another_run_are_refused(shared):
    rows_of(prompts(2), scripted(parts=shared))
    other = scripted(parts=shared, temperature=0.1)
    with pytest.raises(PartsError, match="parts of another run: .*Pass parts= with another folder"):
        rows_of(prompts(2), other)
    with pytest.raises(PartsError, match="another run"):
        other.plan(prompts(2))


def test_rows_share_parts_while_there_is_more_to_do_and_none_waits_at_the_end(shared, monkeypatch):
    monkeypatch.setattr(outbox, "LONGEST_WAIT", 1e9)
    rows_of(prompts(200), scripted(parts=shared, rows_in_flight=16, latency=0.001), batch_size=50)
    assert len(names_in(shared)) <= 200 / 8 + 16  # one for eight rows, and less full ones by the last of them


def test_a_row_is_put_before_its_batch_is_done(tmp_path, monkeypatch):
    """The first row takes longer than the test, though rows wait for its place."""
    monkeypatch.setattr(outbox, "LONGEST_WAIT", 0.05)
    shared = tmp_path / "run"
    endless = {"rows_in_flight": 2, "latency": lambda request: 1e6 if request.row == "r0" else 0.0}
    with scripted(parts=str(shared), **endless) as transform:
        written = transform.submit(prompts(100)[:])
        while not (shared.exists() and any(shared.iterdir())):
            assert not written.done(), "nothing was put before the batch was done"
            time.sleep(0.01)
    assert len(rows_of(prompts(100), scripted(parts=str(shared)))) == 100


def test_what_is_no_whole_part_is_told(tmp_path):
    shared = tmp_path / "run"
    rows_of(prompts(3), scripted(parts=str(shared)))
    [part] = shared.iterdir()
    part.write_bytes(part.read_bytes()[:-100])
    with pytest.raises(PartsError, match="cannot be read.*remove the file and run again"):
        rows_of(prompts(3), scripted(parts=str(shared)))
    part.unlink()
    (shared / ".half.tmp").write_bytes(b"PAR1")  # of a host that died: no part
    assert len(rows_of(prompts(3), scripted(parts=str(shared)))) == 3


@pytest.mark.parametrize("folder", ["a file/inside", "/proc/parts"])
def test_a_disk_that_refuses_ends_the_run_before_anything_is_generated(tmp_path, folder):
    (tmp_path / "a file").write_text("no folder")
    asked = []
    with pytest.raises(PartsError, match="cannot be (read|written).*expected"):
        rows_of(prompts(3), scripted(lambda row: asked.append(row) or play(row), parts=str(tmp_path / folder)))
    assert not asked


def test_an_address_that_nobody_knows_is_told():
    with pytest.raises(PartsError, match="cannot be reached.*an address that fsspec knows"):
        rows_of(prompts(1), scripted(parts="nowhere://run"))


class Flaky(MemoryFileSystem):
    """Fails each second time it is given a file, half of it written."""

    protocol, store, pseudo_dirs, attempts = "flaky", {}, [""], 0

    @classmethod
    def _strip_protocol(cls, path):
        return MemoryFileSystem._strip_protocol(path.replace("flaky://", "memory://"))

    def pipe_file(self, path, value, mode="overwrite", **kwargs):
        type(self).attempts += 1
        if self.attempts % 2:
            raise OSError("the storage is busy")
        super().pipe_file(path, value, mode, **kwargs)


class Breaking(Flaky):
    """Takes three files and then no more, for good."""

    protocol, store, files = "breaking", {}, 3

    @classmethod
    def _strip_protocol(cls, path):
        return MemoryFileSystem._strip_protocol(path.replace("breaking://", "memory://"))

    def pipe_file(self, path, value, mode="overwrite", **kwargs):
        if len(self.store) >= self.files:
            raise PermissionError("the quota is used up")
        MemoryFileSystem.pipe_file(self, path, value, mode, **kwargs)


def test_storage_that_breaks_in_mid_run_ends_it_and_costs_no_row(tmp_path):
    fsspec.register_implementation("breaking", Breaking, clobber=True)
    given = {"parts": "breaking://run", "journal": str(tmp_path / "journal"), "rows_in_flight": 4}
    asked = []
    with pytest.raises(PartsError, match="cannot be written to breaking://run: the quota"):
        rows_of(prompts(200), scripted(fault=lambda request: asked.append(request.row), **given), batch_size=100)
    done = set(asked)
    assert 0 < len(Breaking.store) <= 3 and len(done) < 200
    Breaking.files = 1000
    again = []
    rows_of(prompts(200), scripted(fault=lambda request: again.append(request.row), **given), batch_size=100)
    assert len(done & set(again)) <= 8, "finished rows were written again"
    assert list(Merge(["breaking://run"], prompts(200)).rows()) == rows_of(prompts(200), scripted())


class Strange(MemoryFileSystem):
    """A file system whose errors are its library's own, as those of gcsfs and adlfs are."""

    protocol = "strange"

    def pipe_file(self, path, value, mode="overwrite", **kwargs):
        raise ArithmeticError("quota exceeded")


def test_errors_of_a_storage_s_own_kind_end_the_run(tmp_path):
    fsspec.register_implementation("strange", Strange, clobber=True)
    with pytest.raises(PartsError, match="cannot be written to strange://run: quota exceeded"):
        rows_of(prompts(3), scripted(parts="strange://run"))


def test_whoever_waits_for_rows_is_told_of_any_error():
    class Broken:
        folder = "broken"

        def done(self, key):
            return False

        def write(self, rows):
            raise ArithmeticError("a value that Arrow cannot hold")

    async def put():
        box = outbox.Outbox(Broken(), lambda: 1, lambda: True)
        box.add(RowKey("a"), {"thinking": "", "answer": "", "finish_reason": "stop"})
        async with asyncio.timeout(30):
            await box.stored()

    with pytest.raises(ArithmeticError, match="Arrow"):
        asyncio.run(put())


def test_a_journal_that_cannot_be_closed_keeps_neither_engines_nor_parts(tmp_path, monkeypatch):
    def full(journal):
        raise JournalError("the disk is full")

    closed, before = [], set(threading.enumerate())
    monkeypatch.setattr(ScriptedEngine, "close", lambda engine: asyncio.sleep(0, closed.append(engine.model)))
    monkeypatch.setattr(Journal, "close", full)
    transform = scripted(parts=str(tmp_path / "parts"), journal=str(tmp_path / "journal"))
    transform(prompts(2)[:])
    with pytest.raises(JournalError, match="disk is full"):
        transform.close()
    assert len(closed) == 2 and "tessy" not in {one.name for one in set(threading.enumerate()) - before}


def test_a_prompt_s_own_column_is_not_taken_for_the_hash_of_shared_rows(tmp_path):
    rows, out = prompts(3).add_column("prompt_hash", ["x", "y", "z"]), tmp_path / "rows.parquet"
    with scripted(journal=None) as transform:
        written = transform.map(rows)
        transform.write(written, out)
        merged = Merge([str(out)], rows, settings=transform.settings)
    assert [row["answer"] for row in merged.rows()] == written["answer"]


def test_what_may_pass_is_tried_again():
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    rows_of(prompts(20), scripted(parts="flaky://run", rows_in_flight=4), batch_size=5)
    assert rows_of(prompts(20), scripted(parts="flaky://run", fault=never)) == rows_of(prompts(20), scripted())
    assert Flaky.attempts > 2


def test_a_row_that_failed_is_tried_again_and_yields_to_one_that_did_not(shared):
    def fault(request):
        if request.row == "r1":
            raise RequestError("the engine is out of order")

    failed = rows_of(prompts(3), scripted(parts=shared, fault=fault))
    assert [row["finish_reason"] for row in failed] == ["stop", "error", "stop"]
    merged = Merge([shared], prompts(3))
    assert merged.report.failed == 1 and list(merged.rows()) == failed
    rows_of(prompts(3), scripted(parts=shared, fault=fault))
    assert len(Merge([shared], prompts(3)).report.duplicates) == 0  # it failed again: nothing new
    healed = rows_of(prompts(3), scripted(parts=shared))
    merged = Merge([shared], prompts(3))
    assert list(merged.rows()) == healed == rows_of(prompts(3), scripted())
    assert (merged.report.failed, merged.report.duplicates) == (0, ["r1"])


def test_rows_under_way_are_not_lost_when_a_run_is_closed(shared):
    with scripted(parts=shared, rows_in_flight=2) as transform:
        pieces = iter(prompts(50).to_iterable_dataset().map(transform, batched=True, batch_size=5))
        next(pieces)
    assert set(Merge([shared], prompts(50), incomplete=True).report.missing) < {f"r{i}" for i in range(2, 50)}


def test_equal_prompts_and_unusable_ones_come_out_as_from_one_process(shared):
    given = prompts(4).remove_columns("id").to_list()
    given = type(prompts(1)).from_list([*given, {"prompt": ""}, given[0], {"prompt": None}])
    without_ids = {"id_column": None, "script": same}
    expected = rows_of(given, scripted(**without_ids))
    assert rows_of(given, scripted(parts=shared, **without_ids)) == expected
    merged = Merge([shared], given)
    assert list(merged.rows()) == expected and merged.report.unusable == 2 and not merged.report.foreign


def same(row):
    return play("x")


# --- hosts that die


@pytest.mark.parametrize("seed", range(3))
def test_another_host_goes_on_where_one_was_killed(tmp_path, seed):
    """The second host has another disk: all it knows of the first is what is in parts."""
    settings = {"chunk_tokens": 8, "rows_in_flight": 16, "parts": str(tmp_path / "parts")}
    options = {"batch_size": 8}
    first = Work("scripts", tmp_path / "first", tuple(range(120)), settings, options)
    expected, _ = crashes.unbroken(first._replace(settings={**settings, "parts": None}), tmp_path / "unbroken")
    draw = random.Random(seed)
    assert crashes.kill_when(crashes.begin(first), first, draw.randrange(60_000, 90_000), 0.0) == -signal.SIGKILL
    there = SharedRows(settings["parts"], first.transform.run_fingerprint)
    there.refresh()
    reader = PromptReader(first.transform.settings, ["id", "prompt"])
    done = {key.id for key in (reader.read(row).row_key for row in crashes.script_rows(range(120))) if there.done(key)}
    assert done, "the death came too early to show anything"
    second = first._replace(folder=tmp_path / "second")
    second.folder.mkdir()
    assert crashes.end(crashes.begin(second), second) == expected
    assert not {call.row for call in crashes.calls(second)} & done
    merged = Merge([settings["parts"]], crashes.script_rows(range(120)))
    assert [row["id"] for row in merged.rows()] == [f"r{i}" for i in range(120)]


def test_hosts_with_the_same_rows_leave_one_of_each(tmp_path):
    settings = {"chunk_tokens": 8, "rows_in_flight": 16, "parts": str(tmp_path / "parts")}
    one = Work("scripts", tmp_path / "one", tuple(range(60)), settings)
    two = one._replace(folder=tmp_path / "two", numbers=tuple(range(89, 29, -1)))
    running = []
    for work in (one, two):
        work.folder.mkdir()
        running.append(crashes.begin(work))
    for process, work in zip(running, (one, two), strict=True):
        crashes.end(process, work)
    merged = Merge([settings["parts"]], crashes.script_rows(range(90)))
    rows = list(merged.rows())
    assert [row["id"] for row in rows] == [f"r{i}" for i in range(90)]
    assert not merged.report.missing and not merged.report.differing
