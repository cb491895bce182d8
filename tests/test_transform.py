"""The transform inside `map`: the same on every kind of dataset, cached by its settings, with bad rows kept."""

import asyncio
import contextlib
import gc
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict, IterableDatasetDict
from datasets.fingerprint import Hasher

from tessy_hf import BoundaryPredictor, Script, ScriptedEngine, Speaker, TessyTransform, demo
from tessy_hf.errors import BoundaryError, DatasetError, EngineDeadError, RequestError, SettingsError, TemplateError
from tessy_hf.rows.columns import COLUMNS
from tessy_hf.run.journal import Counts, Journal
from tessy_hf.trajectory import RowKey
from tests.worlds import R1_KEEPS, make_tokenizer


def play(row):
    return Script(f"okay so row {row} is 1 + 1 = 2", f"the answer is {row} .")


def scripted(script=play, **options):
    """Return a transform in which a scripted student writes alone."""
    settings = {"method": "student-only", "id_column": "id", "journal": None}
    engine = {key: options.pop(key) for key in ("latency", "fault", "context_length", "tokenizer") if key in options}
    speaker = Speaker(ScriptedEngine(script, **engine))
    return TessyTransform(teacher=speaker, student=speaker, **{**settings, **options})


def prompts(n):
    return Dataset.from_dict({"id": [f"r{i}" for i in range(n)], "prompt": [f"What is {i}?" for i in range(n)]})


def rows_of(dataset, transform, **options):
    with transform:
        mapped = dataset.map(transform, batched=True, features=transform.features(dataset), **options)
        return list(mapped)


def test_every_row_comes_out_once_and_in_order_on_both_kinds_of_dataset():
    expected = [f"the answer is r{i} ." for i in range(70)]
    plain = rows_of(prompts(70), scripted(rows_in_flight=7), batch_size=10)
    streamed = rows_of(prompts(70).to_iterable_dataset(num_shards=3), scripted(rows_in_flight=7), batch_size=10)
    assert [row["answer"] for row in plain] == expected
    assert plain == streamed
    assert set(COLUMNS) < set(plain[0])


def test_a_running_event_loop_gets_the_same_rows():
    async def notebook():
        return rows_of(prompts(30), scripted(), batch_size=10)

    assert asyncio.run(notebook()) == rows_of(prompts(30), scripted(), batch_size=10)


def test_a_bare_call_gets_columns():
    with scripted() as transform:
        columns = transform(prompts(3)[:])
    assert columns["answer"] == ["the answer is r0 .", "the answer is r1 .", "the answer is r2 ."]


def test_the_window_is_shared_by_all_batches_and_never_exceeded():
    inside, most = 0, 0
    begun = []

    def latency(request):
        nonlocal inside, most
        inside, most = inside + 1, max(most, inside + 1)
        begun.append(request.order)
        asyncio.get_running_loop().call_later(0.01, leave)
        return 0.01

    def leave():
        nonlocal inside
        inside -= 1

    rows_of(prompts(40), scripted(latency=latency, rows_in_flight=6), batch_size=4)
    assert most == 6  # more than a batch of 4, so batches overlap
    assert begun[:6] == [1, 2, 3, 4, 5, 6]


def test_the_longest_prompts_of_a_batch_come_first():
    begun = {}

    def latency(request):
        return begun.setdefault(request.row, len(begun)) * 0.0

    given = {"id": list("abcdef"), "prompt": ["x" * n for n in (3, 9, 3, 0, 12, 3)]}
    with scripted(lambda row: Script("okay", row), latency=latency, rows_in_flight=1) as transform:
        columns = transform(given)
        assert [*begun] == ["e", "b", "a", "c", "f"]  # the one without a prompt asks for nothing
        assert columns["answer"] == ["a", "b", "c", "", "e", "f"]


def test_a_journal_keeps_the_order_of_the_prompts_whichever_is_begun_first(tmp_path):
    given = {"id": list("abcd"), "prompt": ["x" * n for n in (3, 9, 1, 12)]}
    path = tmp_path / "rows.journal"
    with scripted(lambda row: Script("okay", row), journal=str(path), rows_in_flight=1) as transform:
        columns = transform(given)
        fingerprint = transform.run_fingerprint
    with contextlib.closing(Journal(path, fingerprint)) as journal:
        assert [(key, row["answer"]) for key, row in journal.finished()] == list(
            zip("abcd", columns["answer"], strict=True)
        )
        assert journal.fingerprints()[fingerprint] == Counts(done=4)
        first = next(key for key, _ in journal.keys())
        journal.enroll([RowKey("e"), first])
        assert journal.fingerprints()[fingerprint] == Counts(done=4, to_do=1)
        assert journal.claim(RowKey("e")).status == "started" and journal.claim(first).status == "finished"


def test_of_two_rows_with_one_id_the_second_fails_even_if_it_is_longer():
    with scripted(lambda row: Script("okay", row)) as transform:
        columns = transform({"id": ["a", "a"], "prompt": ["short", "much longer"]})
    assert columns["finish_reason"] == ["stop", "error"]


def test_the_fingerprint_is_that_of_what_decides_the_rows(tmp_path):
    same = [scripted(demo_script, rows_in_flight=n).run_fingerprint for n in (1, 9)]
    assert same[0] == same[1]
    used = scripted(demo_script)
    before = Hasher.hash(used)
    with used:
        used(prompts(2)[:])
        assert Hasher.hash(used) == before  # live handles do not count
    assert Hasher.hash(scripted(demo_script)) == before
    assert Hasher.hash(scripted(demo_script, temperature=0.7)) != before
    assert Hasher.hash(scripted(play)) != before


def demo_script(row):
    return Script("okay", "fine")


def test_a_rerun_finds_the_datasets_cache_and_a_changed_setting_does_not(tmp_path):
    prompts(5).to_parquet(tmp_path / "prompts.parquet")

    def run(**settings):
        dataset = Dataset.from_parquet(str(tmp_path / "prompts.parquet"), cache_dir=str(tmp_path / "cache"))
        transform = scripted(**settings)
        with transform:
            rows = dataset.map(transform, batched=True, features=transform.features(dataset))
        return transform.student.engine.requests, rows._fingerprint

    first, rerun, other_window, changed = run(), run(), run(rows_in_flight=2), run(temperature=0.1)
    assert first[0] > 0 and changed[0] > 0
    assert rerun == other_window == (0, first[1])
    assert changed[1] != first[1]


def test_num_proc_gives_the_same_rows():
    plain = rows_of(prompts(20), scripted(), batch_size=5)
    assert rows_of(prompts(20), scripted(), batch_size=5, num_proc=2) == plain


def test_a_transform_in_use_can_be_pickled():
    with scripted() as transform:
        transform(prompts(1)[:])
        copy = pickle.loads(pickle.dumps(transform))
        assert copy.run_fingerprint == transform.run_fingerprint
        assert copy(prompts(2)[:]) == transform(prompts(2)[:])


@pytest.mark.parametrize("prompt", [None, "", [], [{"content": "no role"}], "half \ud83d"])
def test_a_bad_prompt_is_a_failed_row_and_nothing_else_is_lost(prompt):
    with scripted() as transform:
        columns = transform({"id": ["a", "b", "c"], "prompt": ["one", prompt, "three"]})
    assert columns["finish_reason"] == ["stop", "error", "stop"]
    assert "Row 'b'" in columns["error"][1] and "is expected" in columns["error"][1]
    assert columns["messages"][1] == [] and columns["teacher_token_ratio"][1] is None


def test_an_over_long_prompt_is_a_failed_row():
    rows = rows_of(
        Dataset.from_dict({"id": ["short", "long"], "prompt": ["hi", "why " * 300]}), scripted(context_length=200)
    )
    assert [row["finish_reason"] for row in rows] == ["stop", "error"]
    assert "'long'" in rows[1]["error"] and "holds 200" in rows[1]["error"] and "Shorten" in rows[1]["error"]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_duplicate_id_fails_whatever_the_batch_size_and_a_second_pass_does_not(batch_size):
    twice = Dataset.from_dict({"id": ["a", "b", "a"], "prompt": ["x", "y", "z"]}).to_iterable_dataset()
    with scripted() as transform:
        stream = twice.map(transform, batched=True, batch_size=batch_size, features=transform.features(twice))
        for _ in range(2):
            rows = list(stream)
            assert [row["finish_reason"] for row in rows] == ["stop", "stop", "error"]
            assert "Ids must be unique" in rows[2]["error"]


def test_without_an_id_column_a_row_is_known_by_its_prompt():
    with scripted(lambda row: Script("okay", row), id_column=None) as transform:
        columns = transform({"prompt": ["x", "y", "x"]})
    assert columns["answer"][0] == columns["answer"][2] != columns["answer"][1]


def test_a_missing_column_is_told_before_anything_runs():
    with scripted(prompt_column="question") as transform:
        with pytest.raises(DatasetError, match=r"no column 'question'. Columns: id, prompt. Pass prompt_column="):
            transform.features(prompts(1))
        with pytest.raises(DatasetError, match="no column 'question'"):
            prompts(1).map(transform, batched=True)


# --- datasets as people have them


def splits(kind):
    train, test = prompts(6), prompts(3).map(lambda row: {"prompt": row["prompt"] + " Again."})
    if kind is DatasetDict:
        return DatasetDict(train=train, test=test)
    return IterableDatasetDict(train=train.to_iterable_dataset(), test=test.to_iterable_dataset())


@pytest.mark.parametrize("kind", [DatasetDict, IterableDatasetDict])
def test_each_split_of_a_dataset_dict_is_mapped(kind):
    dataset = splits(kind)
    with scripted() as transform:
        assert transform.plan(dataset) == Counts(to_do=9)
        mapped = {name: list(split) for name, split in transform.map(dataset, batch_size=2).items()}
        assert {name: list(split) for name, split in dataset.map(transform, batched=True).items()} == mapped
        assert transform.features(dataset) == transform.features(dataset["train"])
    assert type(transform.map(dataset)) is kind
    assert {name: [row["messages"][0]["content"] for row in rows] for name, rows in mapped.items()} == {
        name: [row["prompt"] for row in split] for name, split in dataset.items()
    }


def test_a_dataset_dict_without_splits_is_told():
    with scripted() as transform, pytest.raises(DatasetError, match="has no splits"):
        transform.features(DatasetDict())


@pytest.mark.parametrize("stream", [False, True])
def test_mapping_by_the_transform_s_own_method_is_the_same(stream):
    dataset = prompts(12).to_iterable_dataset() if stream else prompts(12)
    expected = rows_of(dataset, scripted(), batch_size=5)
    with scripted() as transform:
        mapped = transform.map(dataset, batch_size=5)
        assert mapped.features == transform.features(dataset) and list(mapped) == expected
        fewer = transform.map(dataset, remove_columns=["prompt"])
        assert "prompt" not in fewer.features and list(fewer)[3]["answer"] == expected[3]["answer"]

    async def notebook():
        with scripted() as transform:
            return list(transform.map(dataset))

    assert asyncio.run(notebook()) == expected


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", ["arrow", "pandas", "polars", "numpy"])
def test_a_dataset_in_any_format_gives_the_same_rows(kind, stream):
    pytest.importorskip(kind if kind != "arrow" else "pyarrow")
    chats = [[{"role": "user", "content": row["prompt"]}] for row in prompts(7)]
    dataset = prompts(7).add_column("chat", chats).add_column("number", list(range(7)))
    expected = rows_of(dataset, scripted(prompt_column="chat", id_column="number"))
    given = (dataset.to_iterable_dataset() if stream else dataset).with_format(kind)
    with scripted(prompt_column="chat", id_column="number") as transform:
        mapped = given.map(transform, batched=True, batch_size=3, features=transform.features(given))
        assert list(mapped.with_format(None)) == expected


OTHERS = [
    {"input_columns": "prompt"},
    {"input_columns": ["id", "prompt"]},
    {"with_indices": True},
    {"with_rank": True},
]


@pytest.mark.parametrize("options", OTHERS)
def test_options_that_pass_something_else_than_a_batch_are_told(options):
    with scripted() as transform:
        with pytest.raises(DatasetError, match="without input_columns=, with_indices= and with_rank="):
            prompts(2).map(transform, batched=True, **options)


def test_a_single_row_in_place_of_a_batch_is_told():
    with scripted() as transform, pytest.raises(DatasetError, match="batched=True"):
        prompts(1).map(transform)


def test_a_column_that_would_be_overwritten_is_told():
    dataset = prompts(1).add_column("answer", ["gold"])
    with scripted() as transform, pytest.raises(DatasetError, match="rename_column\\('answer'"):
        dataset.map(transform, batched=True)


def test_an_unknown_setting_names_the_nearest():
    with pytest.raises(SettingsError, match="Unknown setting 'chunk_token'.*Did you mean 'chunk_tokens'"):
        scripted(chunk_token=3)


@pytest.mark.parametrize("k", [0, -1])
def test_k_below_one_is_refused(k):
    with pytest.raises(SettingsError, match="chunk_tokens"):
        scripted(chunk_tokens=k)


def test_a_student_whose_template_drops_thinking_is_refused_before_anything_runs():
    transform = scripted(tokenizer=make_tokenizer("r1"))
    with transform, pytest.raises(TemplateError, match="drops the thinking"):
        prompts(1).map(transform, batched=True)
    assert transform.student.engine.requests == 0


def test_a_template_that_keeps_thinking_can_be_given():
    engine = ScriptedEngine(play, tokenizer=make_tokenizer("r1"))
    speaker = Speaker(engine, chat_template=R1_KEEPS)
    transform = TessyTransform(teacher=speaker, student=speaker, method="student-only", id_column="id")
    rows = rows_of(prompts(1), transform)
    assert rows[0]["messages"][-1]["content"].startswith("<think>\nokay so row r0")


def test_alternating_without_any_predictor_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("tessy_hf.boundary.predictor._SHIPPED_FOLDER", tmp_path)
    with pytest.raises(SettingsError, match="teacher and the student have no boundary predictor"):
        scripted(method="tessy")
    with pytest.raises(BoundaryError, match="small one of tessy-hf is missing"):
        BoundaryPredictor.from_pretrained()


def test_an_author_without_a_predictor_gets_the_small_one_with_a_warning(monkeypatch):
    monkeypatch.setattr("tessy_hf.boundary.predictor._SHIPPED_FOLDER", Path(demo.BOUNDARY_STUDENT))
    named = Speaker(ScriptedEngine(play), boundary=demo.BOUNDARY_TEACHER)
    bare = Speaker(ScriptedEngine(play))
    with pytest.warns(UserWarning, match="student has no boundary predictor: the small one"):
        transform = TessyTransform(teacher=named, student=bare, id_column="id", journal=None)
    assert (transform.teacher, bare.boundary) == (named, None)
    chosen = TessyTransform(
        teacher=named, student=Speaker(bare.engine, BoundaryPredictor()), id_column="id", journal=None
    )
    assert transform.run_fingerprint == chosen.run_fingerprint
    assert transform.student.boundary.identity["weights"] and "/" not in transform.student.boundary.identity["model"]
    assert pickle.loads(pickle.dumps(transform)).run_fingerprint == transform.run_fingerprint
    assert [row["finish_reason"] for row in rows_of(prompts(2), transform)] == ["stop"] * 2


def test_a_predictor_without_a_stated_convention_stops_the_run(tmp_path):
    from transformers import AutoModelForTokenClassification, AutoTokenizer

    network = AutoModelForTokenClassification.from_pretrained(demo.BOUNDARY_TEACHER)
    del network.config.label_shift
    network.config.id2label = {0: "LABEL_0", 1: "LABEL_1"}
    network.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(demo.BOUNDARY_TEACHER).save_pretrained(tmp_path)
    speaker = Speaker(ScriptedEngine(play), boundary=str(tmp_path))
    with TessyTransform(teacher=speaker, student=speaker, id_column="id") as transform:
        with pytest.raises(BoundaryError, match="label_shift=0"):
            prompts(1).map(transform, batched=True)


def test_a_failing_request_is_tried_again_and_then_recorded():
    tries = {}

    def fault(request):
        tries[request.row] = tries.get(request.row, 0) + 1
        if request.row == "r1" or (request.row == "r2" and tries["r2"] == 1):
            return RequestError("The server is busy.", retryable=True)
        return None

    with scripted(fault=fault, max_attempts=2) as transform:
        columns = transform(prompts(4)[:])
    assert columns["finish_reason"] == ["stop", "error", "stop", "stop"]
    assert columns["error"][1] == "The server is busy."
    assert tries["r1"] == 2


def test_a_dead_engine_stops_the_run():
    def fault(request):
        return EngineDeadError("The server refuses the key.") if request.row == "r3" else None

    with scripted(fault=fault) as transform, pytest.raises(EngineDeadError, match="refuses the key"):
        prompts(9).map(transform, batched=True, batch_size=3)


def test_a_closed_transform_starts_afresh():
    transform = scripted()
    first = transform(prompts(1)[:])
    transform.close()
    transform.close()
    assert transform(prompts(1)[:]) == first
    transform.close()


def test_dropping_a_stream_early_leaves_a_usable_transform():
    with scripted(latency=0.01) as transform:
        dataset = prompts(50).to_iterable_dataset()
        stream = dataset.map(transform, batched=True, batch_size=5, features=transform.features(dataset))
        assert next(iter(stream))["answer"] == "the answer is r0 ."
        assert [row["answer"] for row in stream.take(2)] == ["the answer is r0 .", "the answer is r1 ."]


def test_a_stream_that_is_dropped_stops_its_batches_and_logs_nothing(caplog):
    """`datasets` leaves the tasks of a dropped stream pending, which asyncio would report one by one."""
    blocked = threading.Event()

    def latency(request):
        if request.row in ("r0", "r1"):
            return 0.0
        blocked.set()
        return 3600.0

    with scripted(latency=latency, rows_in_flight=4) as transform:
        dataset = prompts(8).to_iterable_dataset()
        rows = iter(dataset.map(transform, batched=True, batch_size=2, features=transform.features(dataset)))
        assert next(rows)["answer"] == "the answer is r0 ." and blocked.wait(60)
        del rows
        gc.collect()
        first = prompts(2)  # they get the places of the rows that were dropped
        assert [row["answer"] for row in first.map(transform, batched=True)] == [
            f"the answer is r{i} ." for i in (0, 1)
        ]
    assert "was destroyed" not in caplog.text


INTERRUPTED = """
    import os, signal
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has its jobs in the background ignore Ctrl-C
    from tests.test_transform import prompts, scripted
    transform = scripted(latency=lambda request: 3600.0 * (os.write(1, b"started\\n") > 0))  # one write, not two
    prompts(40).map(transform, batched=True, batch_size=10, num_proc={num_proc})
"""


@pytest.mark.slow
@pytest.mark.parametrize("num_proc", [None, 2])
def test_an_interrupt_ends_the_run_and_all_its_processes(num_proc):
    import psutil

    code = textwrap.dedent(INTERRUPTED.format(num_proc=num_proc))
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    ) as process:
        assert process.stdout.readline() == "started\n"
        family = [process.pid, *(child.pid for child in psutil.Process(process.pid).children(recursive=True))]
        os.killpg(process.pid, signal.SIGINT)  # what a terminal does on Ctrl-C
        assert process.wait(timeout=120) != 0  # rows last an hour: they do not end by themselves
    assert not [pid for pid in family if psutil.pid_exists(pid)]


@pytest.mark.slow
def test_a_script_that_never_closes_its_transform_ends_quietly():
    code = """
        from tessy_hf import demo
        transform = demo.transform(journal=None)
        print(demo.prompts(2).map(transform, batched=True)["finish_reason"][0])
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.strip() == "stop"
    assert "Traceback" not in done.stderr and "Error" not in done.stderr
