"""A row is looked up by its id and all that it asks: no prompt ever gets the row of another."""

import asyncio
import hashlib
import json
import shutil
import sqlite3
from contextlib import closing
from itertools import zip_longest

import pytest
from datasets import Dataset, DatasetDict
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from tessy_hf import Script, ServerEngine, Speaker, TessyTransform, demo
from tessy_hf.cluster.merge import Merge
from tessy_hf.engines.base import derive_seed
from tessy_hf.errors import EngineDeadError, MergeError
from tessy_hf.run.journal import Counts, Journal
from tessy_hf.run.journal_reader import JournalReader
from tessy_hf.trajectory import Span
from tests.engines.servers import FakeServer, free_ports
from tests.run.test_resume import run
from tests.test_transform import prompts, rows_of, scripted


def asking(**prompts_by_id):
    return Dataset.from_dict({"id": [*prompts_by_id], "prompt": [*prompts_by_id.values()]})


def asked(rows):
    return [row["messages"][0]["content"] for row in rows]


@pytest.fixture(params=["journal", "parts", "neither"])
def kept(request, tmp_path):
    """Settings of a run that keeps its rows in one of the places there are."""
    return {} if request.param == "neither" else {request.param: str(tmp_path / "kept")}


def test_splits_whose_ids_are_the_same_get_rows_of_their_own(kept):
    splits = DatasetDict(train=asking(a="one", b="two"), test=asking(a="three", b="two"))
    for _ in range(2):
        with scripted(**kept) as transform:
            done = splits.map(transform, batched=True, features=transform.features(splits["train"]))
        assert asked(done["train"]) == ["one", "two"] and asked(done["test"]) == ["three", "two"]


def test_streams_whose_ids_are_the_same_can_be_read_in_turns(kept):
    texts = {"a": "first words", "b": "other words", "c": "last words"}
    with scripted(lambda row: Script("okay so", texts[row]), latency=0.001, **kept) as transform:
        one, two = (
            asking(**{name: f"{name} {n}" for name in texts}).to_iterable_dataset().map(transform, batched=True)
            for n in range(2)
        )
        pairs = list(zip_longest(one, two))
    assert [asked(pair) for pair in pairs] == [[f"{name} 0", f"{name} 1"] for name in texts]
    assert [[row["answer"] for row in pair] for pair in pairs] == [[text, text] for text in texts.values()]


def test_a_corrected_prompt_under_its_old_id_is_written_anew_and_the_old_row_stays(kept, capfd):
    old, new = asking(a="What is 1+2?", b="x"), asking(a="What is 1+1?", b="x")
    first, _ = run(old, scripted(**kept))
    capfd.readouterr()
    transform = scripted(**kept)
    assert transform.plan(new) == (Counts(done=1, to_do=1) if kept else Counts(to_do=2))
    told = capfd.readouterr().err
    rows, requests = run(new, transform)
    assert asked(rows) == ["What is 1+1?", "x"]
    if kept:
        assert requests == 2
        assert run(old, scripted(**kept)) == (first, 0) and run(new, scripted(**kept)) == (rows, 0)
    if "journal" in kept:
        sentence = "TESSY: 1 id was seen before with another prompt: written anew."
        assert sentence in told and sentence in capfd.readouterr().err


def test_the_plan_counts_ids_that_were_seen_with_another_prompt(tmp_path, capfd):
    settings = {"journal": str(tmp_path / "rows.journal")}
    run(prompts(5), scripted(**settings))
    changed = prompts(7).map(lambda row: {"prompt": row["prompt"] + ("!" if row["id"] in ("r1", "r2", "r4") else "")})
    capfd.readouterr()
    assert scripted(**settings).plan(changed.to_iterable_dataset()) == (2, 0, 5, 0)
    assert "3 ids were seen before with another prompt: written anew." in capfd.readouterr().err


def test_a_half_written_row_is_not_continued_under_another_prompt(tmp_path):
    asked_for = []

    def fault(request):
        asked_for.append(request.part)
        return EngineDeadError("gone") if request.part == "answer" and len(asked_for) == 2 else None

    settings = {"journal": str(tmp_path / "rows.journal"), "fault": fault}
    with scripted(**settings) as transform, pytest.raises(EngineDeadError):
        transform(asking(a="old")[:])
    rows, _ = run(asking(a="new"), scripted(**settings))
    assert asked(rows) == ["new"] and asked_for[2:] == ["thinking", "answer"]
    rows, _ = run(asking(a="old"), scripted(**settings))
    assert asked(rows) == ["old"] and asked_for[4:] == ["answer"]  # its own text was kept all the while


def test_an_id_that_is_there_twice_in_one_pass_is_refused_whatever_it_asks():
    twice = Dataset.from_dict({"id": ["a", "a", "a"], "prompt": ["x", "y", "x"]})
    rows = rows_of(twice, scripted())
    assert [row["finish_reason"] for row in rows] == ["stop", "error", "error"]
    assert "Ids must be unique" in rows[1]["error"] and rows[1]["error"] == rows[2]["error"]


def test_tools_belong_to_what_is_asked(kept):
    tokenizer = AutoTokenizer.from_pretrained(demo.STUDENT)
    tokenizer.chat_template = "{{ tools | tojson if tools }}" + tokenizer.chat_template

    def with_tools(names):
        tools = [{"type": "function", "function": {"name": name}} for name in names]
        return Dataset.from_dict({"id": ["a"], "prompt": [[{"role": "user", "content": "x"}]], "tools": [tools]})

    run(with_tools(["add"]), scripted(tokenizer=tokenizer, **kept))
    assert run(with_tools(["add"]), scripted(tokenizer=tokenizer, **kept))[1] == (0 if kept else 2)
    assert run(with_tools(["add", "sub"]), scripted(tokenizer=tokenizer, **kept))[1] == 2


# --- what verifiers read


@pytest.mark.slow
def test_a_verdict_is_of_the_reference_answer_of_its_row(kept):
    """The answer is 2: right by the first reference, wrong by the second."""

    def verdicts(id_column, **columns):
        where = {name: f"{path}-{id_column}" for name, path in kept.items()}
        settings = {"verifier": {"name": "exact", "column": "gold"}, "id_column": id_column, **where}
        rows = rows_of(Dataset.from_dict(columns), scripted(lambda row: Script("okay", "2"), **settings))
        return [row["verdict"] for row in rows]

    assert verdicts(None, prompt=["x", "x"], gold=["2", "3"]) == [1, 0]
    assert verdicts(None, prompt=["x", "x"], gold=["3", "2"]) == [0, 1]
    assert verdicts("id", prompt=["x"], gold=["2"], id=["a"]) == [1]
    assert verdicts("id", prompt=["x"], gold=["3"], id=["a"]) == [0]


def says_gold(row):
    return row["answer"] == row["gold"]


@pytest.mark.slow
def test_a_function_may_have_read_any_column(kept):
    def requests(verifier, **columns):
        given = Dataset.from_dict({"id": ["a"], "prompt": ["x"], **columns})
        where = {name: f"{path}-{verifier is exact}" for name, path in kept.items()}
        return run(given, scripted(lambda row: Script("okay", "2"), verifier=verifier, **where))[1]

    exact = {"name": "exact", "column": "gold"}
    again = 0 if kept else 2
    assert requests(says_gold, gold=["2"], note=["one"]) == requests(exact, gold=["2"], note=["one"]) == 2
    assert requests(says_gold, gold=["2"], note=["one"]) == again
    assert requests(says_gold, gold=["2"], note=["two"]) == 2
    assert requests(exact, gold=["2"], note=["two"]) == again


# --- seeds stay


def test_the_seed_is_that_of_the_id_or_of_the_messages():
    with scripted(seed=3) as transform:
        row = transform({"id": ["a"], "prompt": ["x"]})
    assert row["seed"] == [derive_seed(3, "a")]
    text = '[{"content": "x", "role": "user"}]'
    with scripted(lambda row: Script("okay", "2"), seed=3, id_column=None) as transform:
        row = transform({"prompt": ["x"]})
    assert row["seed"] == [derive_seed(3, hashlib.sha256(text.encode()).hexdigest()[:32])]


# --- merging


def test_a_row_of_another_prompt_does_not_fill_the_place_of_its_id(tmp_path):
    old, new = asking(a="old", b="x"), asking(a="new", b="x")
    rows_of(old, scripted(parts=str(tmp_path / "parts")))
    rows_of(old, scripted(journal=str(tmp_path / "rows.journal")))
    old.map(scripted(), batched=True).to_parquet(tmp_path / "rows.parquet")
    for source in ("parts", "rows.journal", "rows.parquet"):
        merged = Merge([tmp_path / source], new, settings=scripted().settings)
        assert merged.report.missing == merged.report.foreign == merged.report.other_prompts == ["a"], source
        with pytest.raises(MergeError, match="1 of 2 prompts have no row: 'a'. Of 'a' .* answer other prompts"):
            merged.check()
    rows_of(new, scripted(parts=str(tmp_path / "parts")))
    sources = [tmp_path / source for source in ("parts", "rows.journal", "rows.parquet")]
    merged = Merge(sources, new)
    assert asked(merged.rows()) == ["new", "x"] and merged.report.duplicates == ["b"]


@pytest.mark.parametrize("verifier", [says_gold, {"name": "exact", "column": "gold"}])
def test_a_row_with_the_verdict_of_another_reference_does_not_either(tmp_path, verifier):
    def given(gold):
        return asking(a="x", b="y").add_column("gold", gold)

    settings = {"verifier": verifier, "script": lambda row: Script("okay", "2")}
    rows_of(given(["2", "2"]), scripted(parts=str(tmp_path / "parts"), **settings))
    given(["2", "2"]).map(scripted(**settings), batched=True).to_parquet(tmp_path / "rows.parquet")
    for source in ("parts", "rows.parquet"):
        told = None if source == "parts" else scripted(**settings).settings
        assert Merge([tmp_path / source], given(["2", "3"]), settings=told).report.missing == ["b"]
        assert not Merge([tmp_path / source], given(["2", "2"]), settings=told).report.missing


# --- what earlier versions left


def as_format_1(path):
    """Take the prompt hashes out of a journal, as it was written before there were any."""
    with closing(sqlite3.connect(path)) as db:
        db.executescript("""
            BEGIN; DROP INDEX held; ALTER TABLE rows RENAME TO new;
            CREATE TABLE rows (id INTEGER PRIMARY KEY, fingerprint TEXT NOT NULL, key TEXT NOT NULL, owner TEXT,
                attempts INTEGER NOT NULL DEFAULT 0, finish_reason TEXT, state TEXT, UNIQUE (fingerprint, key));
            INSERT INTO rows SELECT id, fingerprint, key, owner, attempts, finish_reason, state FROM new;
            DROP TABLE new; CREATE INDEX held ON rows (owner) WHERE owner IS NOT NULL;
            PRAGMA user_version = 1; COMMIT;
        """)


def test_a_journal_that_knew_rows_by_their_ids_gives_those_of_the_same_messages(tmp_path, capfd):
    path = tmp_path / "rows.journal"
    first, _ = run(prompts(4), scripted(journal=str(path)))
    with closing(Journal(path, scripted().run_fingerprint)) as journal:
        journal.claim("r4")
        journal.append("r4", [Span("student", "thinking", "okay so")], {})
    as_format_1(path)
    changed = prompts(5).map(lambda row: {"prompt": "another" if row["id"] == "r1" else row["prompt"]})
    capfd.readouterr()
    assert scripted(journal=str(path)).plan(changed) == Counts(done=3, to_do=2)
    told = capfd.readouterr().err
    assert "1 id was seen before with another prompt: written anew." in told
    assert "1 id was begun by an earlier version, which did not keep what half-written rows answer" in told
    rows, requests = run(changed, scripted(journal=str(path)))
    assert requests == 4 and asked(rows) == changed["prompt"][:]
    assert [rows[0], *rows[2:4]] == [first[0], *first[2:4]]


def test_shared_rows_without_prompt_hashes_are_known_by_their_messages(tmp_path):
    import pyarrow.parquet as pq

    first = rows_of(prompts(3), scripted(parts=str(tmp_path)))
    [part] = tmp_path.iterdir()
    rows = pq.read_table(part)
    assert rows["prompt_hash"].to_pylist() == [
        hashlib.sha256(json.dumps([{"content": row["prompt"], "role": "user"}]).encode()).hexdigest()[:32]
        for row in prompts(3)
    ]
    pq.write_table(rows.drop_columns("prompt_hash"), part)
    assert run(prompts(3), scripted(parts=str(tmp_path))) == (first, 0)
    assert run(asking(r1="another"), scripted(parts=str(tmp_path)))[1] == 2


# --- models


def test_a_student_retrained_in_place_is_another_run_once_it_is_loaded_again(tmp_path, capfd):
    student, path = shutil.copytree(demo.STUDENT, tmp_path / "student"), str(tmp_path / "rows.journal")
    chats = demo.prompts(2, seed=9)
    settings = {"journal": path, "max_thinking_tokens": 20, "max_answer_tokens": 4}
    with demo.transform(student=student, **settings) as transform:
        first = list(transform.map(chats))
        before = transform.run_fingerprint
        noisy = {
            name: tensor + 0.1 * tensor.std() for name, tensor in load_file(student / "model.safetensors").items()
        }
        save_file(noisy, student / "model.safetensors", metadata={"format": "pt"})
        assert transform.run_fingerprint == before and list(transform.map(chats)) == first  # what is loaded
    assert transform.run_fingerprint != before
    capfd.readouterr()
    assert transform.plan(chats) == Counts(to_do=2)
    said = f"{path} has 2 rows of run {before}, which differs in student.model.digest (sha256:"
    printed = capfd.readouterr().err
    assert said in printed and printed.rstrip().endswith("…): they are not reused.")
    with transform:
        again = list(transform.map(chats))
    assert said not in capfd.readouterr().err  # the plan has said it
    assert {row["run_fingerprint"] for row in again} == {transform.run_fingerprint}


def test_a_new_run_in_a_journal_says_what_is_different(tmp_path, capfd):
    path = str(tmp_path / "rows.journal")
    run(prompts(3), scripted(journal=path))
    capfd.readouterr()
    other = scripted(journal=path, seed=1, temperature=0)
    assert other.plan(prompts(3)) == Counts(to_do=3)
    before = scripted().run_fingerprint
    why = "differs in settings.temperature (0.6, now 0.0), settings.seed (0, now 1): they are not reused."
    assert f"{path} has 3 rows of run {before}, which {why}" in capfd.readouterr().err
    run(prompts(1), other)
    capfd.readouterr()
    other.plan(prompts(3))
    assert "not reused" not in capfd.readouterr().err  # said once


def test_a_journal_beside_it_whose_record_cannot_be_read_stops_no_run(tmp_path, capfd):
    path, first = str(tmp_path / "rows.journal"), scripted(journal=None).run_fingerprint
    run(prompts(3), scripted(journal=path))
    Journal(path, first).describe(json.dumps({"fingerprint": first, "of_a_later_version": 1}))
    assert scripted(journal=path, seed=1).plan(prompts(3)) == Counts(to_do=3)
    assert "which is of another version of tessy-hf: they are not reused" in capfd.readouterr().err


def test_rows_of_the_same_prompts_in_other_journals_are_named_at_the_start_of_a_run(tmp_path, capfd):
    run(prompts(3), scripted(journal=str(tmp_path / "first.journal")))
    run(prompts(9).select(range(6, 9)), scripted(journal=str(tmp_path / "others.journal"), seed=5))
    capfd.readouterr()
    run(prompts(3), scripted(journal=str(tmp_path / "second.journal"), temperature=0))
    printed = capfd.readouterr().err
    assert f"{tmp_path / 'first.journal'} has 3 rows of run" in printed and "others.journal" not in printed
    run(prompts(3), scripted(journal="auto", seed=2))
    run(prompts(3), scripted(journal="auto", seed=3))
    assert "settings.seed (2, now 3): they are not reused" in capfd.readouterr().err


@pytest.fixture
def patient(monkeypatch):
    """However slow this machine is."""
    monkeypatch.setattr("tessy_hf.engines.served.SECONDS", 60.0)


def served(url, **settings):
    speaker = Speaker(ServerEngine("student", base_url=url, tokenizer=str(demo.STUDENT), retry_timeout=20))
    return TessyTransform(teacher=speaker, student=speaker, method="student-only", id_column="id", **settings)


def serving(root=None, **options):
    return FakeServer(models=[{"id": "student", "max_model_len": 2048, "root": root}], **options)


def test_another_model_under_a_servers_name_is_another_run(patient):
    def fingerprint(root, length=2048):
        models = [{"id": "other", "root": "x"}, {"id": "student", "max_model_len": length, "root": root}]
        with FakeServer(models=models) as server:
            return served(server.url, journal=None).run_fingerprint

    assert fingerprint("/ckpt/1") == fingerprint("/ckpt/1", 4096) != fingerprint("/ckpt/2")
    assert fingerprint("student") == fingerprint(None) == served("http://127.0.0.1:9/v1", journal=None).run_fingerprint


def test_a_server_that_was_down_says_what_it_serves_before_rows_are_looked_up(patient, tmp_path):
    [port] = free_ports(1)
    transform = served(f"http://127.0.0.1:{port}/v1", journal=str(tmp_path / "rows.journal"))
    unknown = transform.run_fingerprint
    with serving("/ckpt/1", at=("127.0.0.1", port)):
        [first] = rows_of(asking(a="What is 7 + 1 ?"), transform)
    with serving("/ckpt/1", at=("127.0.0.1", port)) as server:
        again = served(server.url, journal=str(tmp_path / "rows.journal"))
        assert again.run_fingerprint == first["run_fingerprint"] != unknown
        assert rows_of(asking(a="What is 7 + 1 ?"), again) == [first] and not server.texts
    record = JournalReader(tmp_path / "rows.journal", first["run_fingerprint"]).description()
    assert json.loads(record)["student"]["model"]["root"] == "1"


def test_replicas_that_serve_several_models_under_one_name_are_told(patient, caplog):
    with serving("/ckpt/1") as one, serving("/ckpt/2") as other:
        rows_of(asking(a="What is 7 + 1 ?"), served([one.url, other.url], journal=None))
    assert "serve several models under this name: /ckpt/1, /ckpt/2" in caplog.text


def test_a_listed_server_that_is_not_used_does_not_say_what_the_model_is(tmp_path, caplog):
    ports = sorted(free_ports(2), key=str)
    wrong = FakeServer(models=[{"id": "other", "max_model_len": 2048, "root": "/ckpt/0"}], at=("127.0.0.1", ports[0]))
    with wrong, serving("/ckpt/1", at=("127.0.0.1", ports[1])) as right:
        (tmp_path / "servers.txt").write_text(f"{wrong.url}\n{right.url}\n")
        engine = ServerEngine("student", base_url=f"file://{tmp_path}/servers.txt", tokenizer=str(demo.STUDENT))

        async def started():
            await engine.start()
            told = engine.identity["root"]
            await engine.close()
            return told

        assert asyncio.run(started()) == "/ckpt/1" and "several models" not in caplog.text


def test_servers_that_serve_another_model_while_a_run_is_made_are_refused(patient):
    [port] = free_ports(1)
    transform = served(f"http://127.0.0.1:{port}/v1", journal=None)
    with serving("/ckpt/1", at=("127.0.0.1", port)):
        assert transform.run_fingerprint
    with serving("/ckpt/2", at=("127.0.0.1", port)), pytest.raises(EngineDeadError, match="serve '/ckpt/2' now"):
        rows_of(asking(a="What is 7 + 1 ?"), transform)
