"""Releases on the Hub, with the real clients over loopback."""

import gc
import json
import random

import pytest
from datasets import Dataset, DatasetDict, IterableDataset, load_dataset
from huggingface_hub import DatasetCard

from tessy_hf import demo, push_to_hub
from tessy_hf.cluster.merge import Merge
from tessy_hf.errors import DatasetError, HubError, JournalError, RequestError, VersionError
from tessy_hf.hub import releases
from tessy_hf.hub.candidate import Candidate
from tessy_hf.manifest import Manifest, RunRecord, SourceRecord
from tessy_hf.rows import parquet as shards
from tests.hub_server import READ_TOKEN, WRITE_TOKEN, HubServer, Repo, clients_of
from tests.hub_sweep import MANIFEST, REPO, as_stream, check_release, finished, patched, state
from tests.rows import test_tools
from tests.test_transform import prompts, scripted

# The client's own upload speaks to httpx2 in a deprecated way.
pytestmark = [
    pytest.mark.slow,  # all of them together
    pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning"),
]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with HubServer(tmp_path / "storage") as server, clients_of(server, tmp_path / "home", monkeypatch):
        with patched(monkeypatch):
            yield server


def failing(request):
    """Let one row in ten fail."""
    return RequestError("The server gave up.") if int(request.row[1:]) % 10 == 3 else None


def stream(n, **options):
    """Return a stream of rows that a scripted student writes, one in ten failed, and its transform."""
    transform = scripted(fault=failing, max_attempts=1, **options)
    source = prompts(n).to_iterable_dataset()
    return source.map(transform, batched=True, batch_size=100, features=transform.features(source)), transform


def push(rows, version="1.0.0", **options):
    told = []
    settings = {"max_shard_size": 1000, "backoff": 0, "retry_timeout": 5, "say": told.append}
    release = push_to_hub(rows, REPO, version, **{**settings, **options})
    return release, told


def manifest_at(hub, revision):
    return Manifest.model_validate_json(hub.read(REPO, revision, MANIFEST))


def test_parts_of_several_hosts_become_one_release(hub, tmp_path):
    for host in range(2):
        with scripted(parts=str(tmp_path / "parts")) as transform:
            transform(prompts(40).shard(2, host)[:])
            record = transform.record()
    merged = Merge([tmp_path / "parts"], prompts(40))
    release, _ = push(merged.dataset(), manifest=merged.record)
    assert (release.rows, release.failed) == (40, 0)
    rows = load_dataset(REPO, revision="v1.0.0", split="train")
    assert rows["id"] == [f"r{i}" for i in range(40)] and rows["answer"][7] == "the answer is r7 ."
    told = manifest_at(hub, "v1.0.0").run
    assert told.settings == record.settings and told.teacher == record.teacher


@pytest.mark.parametrize("kind", ["dataset", "journal"])
def test_a_release_renders_the_tools_that_the_models_saw(hub, tmp_path, kind):
    prompts = test_tools.DATASETS["structs that Arrow fills in"]
    with test_tools.transform(journal=str(tmp_path / "rows.journal")) as transform:
        rows = prompts.map(transform, batched=True, features=transform.features(prompts))
    given = (rows, {}) if kind == "dataset" else (tmp_path / "rows.journal", {"prompts": prompts})
    release, _ = push(given[0], **given[1])
    assert (release.rows, release.failed) == (3, 0)
    for streaming in (False, True):
        loaded = load_dataset(REPO, revision="v1.0.0", split="train", streaming=streaming)
        test_tools.check_trained(loaded, transform.student.engine, prompts["id"])


def test_a_stream_becomes_one_tagged_release(hub, monkeypatch):
    monkeypatch.setattr(shards, "BATCH_ROWS", 64)
    rows, transform = stream(1000)
    with transform:
        release, told = push(rows, license="apache-2.0")
    assert (release.rows, release.failed, release.created) == (900, 100, True)
    assert list(hub.repo(REPO).tags) == ["v1.0.0"] and list(hub.repo(REPO).branches) == ["main"]
    assert hub.repo(REPO).tags["v1.0.0"] == hub.repo(REPO).branches["main"] == release.commit
    assert len([path for path in hub.paths(REPO, "v1.0.0") if path.startswith("data/train-")]) > 10

    whole = load_dataset(REPO, revision="v1.0.0")
    streamed = load_dataset(REPO, revision="v1.0.0", split="train", streaming=True)
    with transform:
        expected = [{"source_prompt" if name == "prompt" else name: row[name] for name in row} for row in rows]
    assert list(whole["train"]) == list(streamed) == [row for row in expected if row["finish_reason"] == "stop"]
    assert list(whole["failures"]) == [row for row in expected if row["finish_reason"] == "error"]
    assert whole["train"].features == whole["failures"].features == streamed.features
    assert {**whole["train"].features, **rows.features} == {**rows.features, "source_prompt": rows.features["prompt"]}

    manifest = manifest_at(hub, "v1.0.0")
    assert manifest.counts.model_dump() == {
        "rows": 900,
        "failed": 100,
        "given": 1000,
        "unfinished": 0,
        "finish_reasons": {"stop": 900, "error": 100},
        "runs": {transform.run_fingerprint: 1000},
    }
    assert manifest.run.student.engine == "scripted" and manifest.run.source.fingerprint
    card = hub.read(REPO, "v1.0.0", "README.md").decode()
    assert "license: apache-2.0" in card and "900" in card
    assert json.loads(hub.read(REPO, "v1.0.0", "tessy/default/train/statistics.json"))["rows"] == 1000


# --- versions


def test_the_same_again_is_no_work_and_anything_else_is_refused_before_a_row_is_written(hub):
    rows, transform = stream(20)
    with transform:
        push(rows)
    begun, before = len(hub.requests), state(hub)
    again, transform = stream(20)
    with transform:
        release, told = push(again)
        assert transform.student.engine.requests == 0, "rows were generated"
    assert not release.created and (release.rows, release.failed) == (18, 2) and hub.uploaded(begun) == 0
    for other, seen in [
        (stream(20, temperature=0.1), "of run"),
        (stream(16), "prompts have the fingerprint"),
    ]:
        with other[1] as transform, pytest.raises(VersionError, match=seen):
            push(other[0])
        assert transform.student.engine.requests == 0
    with pytest.raises(VersionError, match="it was made of 20 rows, these are 8"):
        push(finished(8, manifest_at(hub, "v1.0.0").run.fingerprint))
    assert state(hub) == before


def test_versions_only_grow_and_look_like_versions(hub):
    push(finished(8), "2.0.0")
    with pytest.raises(VersionError, match=r"already has v2\.0\.0, above v1\.5\.0"):
        push(finished(8), "1.5.0")
    with pytest.raises(VersionError, match="is not a valid version"):
        push(finished(8), "next")
    with pytest.raises(DatasetError, match=r"failures='keep' cannot be used. Pass 'split' or 'drop'"):
        push(finished(8), "3.0.0", failures="keep")
    with pytest.raises(VersionError, match="Releases do not change"):
        push(finished(8), "2.0.0", config_name="other")


def test_a_major_version_replaces_and_the_old_one_stays_as_it_was(hub):
    push(finished(40))
    old = hub.paths(REPO, "v1.0.0")
    push(finished(16, "run-b"), "2.0.0", failures="drop")
    assert hub.paths(REPO, "v1.0.0") == old
    assert set(load_dataset(REPO, revision="v2.0.0")) == {"train"}
    assert load_dataset(REPO, split="train")["run_fingerprint"] == ["run-b"] * 14
    manifest = manifest_at(hub, "main")
    assert (manifest.counts.failed, manifest.failures, manifest.failures_split) == (2, "drop", None)
    assert "left out" in hub.read(REPO, "main", "README.md").decode()
    assert len(load_dataset(REPO, revision="v1.0.0", split="failures")) == 4


def test_a_minor_version_adds_the_rows_that_are_new(hub):
    push(finished(40))
    begun = len(hub.requests)
    mended = finished(60).map(lambda row: mend(row) if row["id"] == "r13" else row)
    release, _ = push(mended, "1.1.0")
    assert (release.rows, release.failed) == (36 + 18 + 1, 5)
    rows = load_dataset(REPO, revision="v1.1.0")
    assert sorted(rows["train"]["id"]) == sorted(f"r{n}" for n in range(60) if n % 10 != 3 or n == 13)
    assert sorted(rows["failures"]["id"]) == sorted(f"r{n}" for n in range(60) if n % 10 == 3 and n != 13)
    manifest = manifest_at(hub, "v1.1.0")
    assert manifest.appends_to == "1.0.0" and manifest.counts.finish_reasons == {"stop": 55, "error": 5}
    assert manifest.counts.runs == {"run-a": 60}
    old = {shard.sha256 for shard in manifest_at(hub, "v1.0.0").splits["train"].shards}
    assert old < {shard.sha256 for shard in manifest.splits["train"].shards}
    assert hub.uploaded(begun) < hub.uploaded()
    assert not push(mended, "1.1.0")[0].created
    release, _ = push(finished(8, "run-c"), "1.2.0", append=False)
    assert release.rows == 7


def mend(row):
    return {**row, "finish_reason": "stop", "error": None, "answer": "13"}


def test_rows_with_other_columns_are_not_added(hub):
    push(finished(8))
    with pytest.raises(DatasetError, match=r"other columns than ada/rows@v1\.0\.0"):
        push(finished(8, first=20).remove_columns("question"), "1.1.0")


def test_configurations_and_splits_live_side_by_side(hub):
    push(finished(16), "1.0.0")
    push(finished(8, "run-b"), "1.1.0", split="test")
    push(finished(24, "run-c"), "1.2.0", config_name="other")
    assert {name: len(split) for name, split in load_dataset(REPO, revision="v1.2.0").items()} == {
        "train": 14,
        "failures": 2,
        "test": 7,
        "test_failures": 1,
    }
    assert len(load_dataset(REPO, "other", split="train")) == 21
    assert len(releases.manifests(f"{REPO}@v1.2.0")) == 3


# --- refusals come first


def test_without_write_access_nothing_starts(hub, monkeypatch):
    push(finished(8))
    rows, transform = stream(20)
    for token, seen in [(READ_TOKEN, "status 403"), ("hf_of_nobody", "status 401")]:
        monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(HubError, match=seen) as refused:
            push(rows, "2.0.0")
        assert "HF_TOKEN" in str(refused.value) and token not in str(refused.value)
    with pytest.raises(HubError, match="may write to eve/rows"):
        push_to_hub(rows, "eve/rows", backoff=0, retry_timeout=0)
    assert transform.student.engine.requests == 0
    monkeypatch.setenv("HF_TOKEN", READ_TOKEN)
    assert push(finished(8), "2.0.0", token=WRITE_TOKEN)[0].created


def test_what_cannot_be_pushed_is_told(hub):
    with pytest.raises(DatasetError, match="got a DatasetDict.*Pass one split"):
        push(DatasetDict(train=finished(4)))
    with pytest.raises(DatasetError, match="got a list"):
        push([1])
    with pytest.raises(DatasetError, match="have no messages, thinking"):
        push(Dataset.from_dict({"a": [1]}))
    with pytest.raises(DatasetError, match=r"no schema.*features=transform\.features"):
        push(IterableDataset.from_generator(lambda: iter([{"a": 1}])))
    with pytest.raises(DatasetError, match="max_shard_size is 'big'"):
        push(finished(4), max_shard_size="big")
    for name in ({"split": "a-b"}, {"config_name": "data"}):
        with pytest.raises(DatasetError, match="cannot be used"):
            push(finished(4), **name)
    assert not hub.repos


def test_no_token_is_ever_written_down(hub, caplog):
    with caplog.at_level("DEBUG", logger="tessy_hf"):
        _, told = push(finished(40))
    kept = b"".join(path.read_bytes() for path in hub.folder.iterdir())
    assert b"hf_" not in kept.replace(b"tessy_hf", b"") and "hf_write" not in "".join(told) + caplog.text


# --- Hubs that differ


@pytest.mark.parametrize("kind", [{"regular_parquet": True}, {"initial_commit": False}], ids=str)
def test_servers_may_differ_in_what_is_not_documented(tmp_path, monkeypatch, kind):
    with HubServer(tmp_path / "s", **kind) as server, clients_of(server, tmp_path / "home", monkeypatch):
        push(finished(40))
        push(finished(60), "1.1.0")
        check_release(server, "v1.1.0", "1.1.0", finished(60))
        assert len(load_dataset(REPO, revision="v1.0.0", split="train")) == 36


def test_busy_servers_are_waited_for(hub):
    busy = random.Random(5)
    hub.fault = lambda request: "503" if busy.random() < 0.3 else None
    push(finished(8))
    check_release(hub, "main", "1.0.0", finished(8))


def test_a_server_that_stays_away_is_told_and_the_rest_follows_later(hub):
    push(finished(40))
    before = state(hub)
    hub.fault = lambda request: "503" if request.path.endswith("/commit/main") else None
    with pytest.raises(HubError, match=r"did not promote for ada/rows: status 503.*run it again"):
        push(finished(60, "run-b"), "2.0.0", retry_timeout=0.01)
    assert state(hub) == before
    hub.fault, begun = (lambda request: None), len(hub.requests)
    release, told = push(finished(60, "run-b"), "2.0.0")
    assert release.created and hub.uploaded(begun) == 0 and any("complete from an earlier" in step for step in told)
    check_release(hub, "main", "2.0.0", finished(60, "run-b"))


def test_a_push_that_meets_another_on_main_gives_way(hub, monkeypatch):
    push(finished(8))

    def meanwhile(request):
        if request.path.endswith("/commit/main"):
            hub.fault = lambda request: None
            tree = dict(hub.repo(REPO).at("main").tree)
            manifest = json.loads(hub.content(tree[MANIFEST]))
            tree[MANIFEST] = hub.keep(json.dumps({**manifest, "version": "1.9.0"}).encode())
            hub.repo(REPO).commit("main", "another release", tree)
        return None

    hub.fault = meanwhile
    with pytest.raises(HubError, match=r"got version 1\.9\.0 on main"):
        push(finished(8, "run-b"), "2.0.0")


def test_what_a_user_wrote_meanwhile_is_kept(hub):
    push(finished(8))

    def meanwhile(request):
        if request.path.endswith("/commit/main"):
            hub.fault = lambda request: None
            tree = dict(hub.repo(REPO).at("main").tree)
            card = hub.content(tree["README.md"]) + b"\n## My own words\n\nLook closely.\n"
            hub.repo(REPO).commit(
                "main", "my words", {**tree, "README.md": hub.keep(card), "notes.md": hub.keep(b"x")}
            )
        return None

    hub.fault = meanwhile
    push(finished(8, "run-b"), "2.0.0")
    assert "## My own words" in hub.read(REPO, "v2.0.0", "README.md").decode()
    assert "notes.md" in hub.paths(REPO, "v2.0.0")


def test_a_file_that_is_not_what_was_sent_is_never_released(hub):
    def spoil(request):
        side = hub.repos and hub.repo(REPO).at("tessy-v1.0.0")
        if side and MANIFEST in side.tree:
            side.tree.pop("data/train-00000.parquet", None)
        return None

    hub.fault = spoil
    with pytest.raises(HubError, match="train-00000.parquet on the side branch of ada/rows is missing"):
        push(finished(8))
    hub.fault = lambda request: None
    assert set(hub.repo(REPO).branches) == {"main"} and hub.paths(REPO, "main") == [".gitattributes"]
    assert push(finished(8))[0].created


# --- journals and plain pushes


def test_a_journal_is_released_with_its_prompts_columns_and_what_it_knows_of_its_run(hub, tmp_path):
    journal = tmp_path / "rows.journal"
    other, _ = stream(7)  # the same run of other prompts, alive in this process
    rows, transform = stream(30, journal=str(journal))
    with transform:
        expected = list(rows)
        list(transform.map(prompts(33).select(range(30, 33))))  # of another file of prompts
    record = transform.record()
    del rows, transform
    gc.collect()
    with pytest.raises(JournalError, match="no columns of the prompts.*--prompts"):
        push(journal)
    asked = prompts(31).map(lambda row: {"prompt": row["prompt"] + " Why?"} if row["id"] == "r30" else row)
    release, told = push(journal, prompts=asked)
    assert (release.rows, release.failed) == (27, 3)
    assert "3 rows of the journal answer other prompts than these: left out" in told
    assert "1 of these prompts have no finished row in the journal" in told
    manifest = manifest_at(hub, "v1.0.0")
    assert manifest.counts.unfinished == 1 and manifest.counts.given == 30
    assert manifest.run.settings == record.settings and manifest.run.source.fingerprint == asked._fingerprint
    assert other is not None
    released = load_dataset(REPO)
    assert released["failures"]["id"] == ["r3", "r13", "r23"]
    assert released["train"]["source_prompt"] == [row["prompt"] for row in expected if row["finish_reason"] == "stop"]
    assert not push(str(journal), prompts=asked)[0].created
    with pytest.raises(JournalError, match="holds no run 'x'"):
        push(journal, run="x", prompts=asked)
    with pytest.raises(JournalError, match="There is no journal"):
        push(tmp_path / "none")


def forget(monkeypatch, tmp_path):
    """Forget all runs, as another machine has never known of them."""
    gc.collect()
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "elsewhere" / "datasets")


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "folder", "journal", "dataset"])
def test_every_way_to_push_has_the_full_manifest_and_all_columns(hub, tmp_path, monkeypatch, kind):
    source = prompts(5).add_column("topic", [f"t{i}" for i in range(5)])
    with scripted(journal=str(tmp_path / "rows.journal")) as transform:
        rows = transform.map(source)
        if kind in ("parquet", "jsonl"):
            transform.write(rows, tmp_path / f"rows.{kind}")
        record, path = transform.record(), tmp_path / f"rows.{kind}"
    del transform
    if kind == "folder":
        Merge([tmp_path / "rows.journal"], source).write(path)
    if kind != "dataset":  # of plain datasets only this machine knows the run
        forget(monkeypatch, tmp_path)
    gc.collect()
    push(rows if kind == "dataset" else path, **({"prompts": source} if kind == "journal" else {}))
    told = manifest_at(hub, "v1.0.0").run
    assert told.teacher == record.teacher and told.settings == record.settings and told.libraries == record.libraries
    assert (told.source or record.source).split == record.source.split
    released = load_dataset(REPO, split="train")
    assert released["id"] == source["id"] and released["topic"] == source["topic"]
    assert released.column_names[:3] == ["id", "source_prompt", "topic"]
    assert {**released.features, **rows.features} == {**released.features, "prompt": rows.features["prompt"]}


def test_a_record_of_another_run_is_refused_before_anything_is_sent(hub):
    rows, transform = stream(3)
    _, other = stream(3, temperature=0.1)
    with transform, other:
        whole = Dataset.from_list(list(rows), features=rows.features)
        for given in (rows, whole):
            with pytest.raises(
                DatasetError, match=f"of run {transform.run_fingerprint}, the manifest or recipe is of"
            ):
                push(given, manifest=other.record())
        with pytest.raises(DatasetError, match="of run .*, the manifest or recipe is of"):
            push(as_stream(whole), manifest=other.record())
        assert state(hub) is None or not state(hub)[1]
        push(rows, manifest=transform.record())


def test_rows_of_which_nothing_is_known_are_told(hub, tmp_path):
    with scripted() as transform:
        transform.write(transform.map(prompts(2)).remove_columns("prompt"), tmp_path / "rows.parquet")
    _, told = push(tmp_path / "rows.parquet")
    assert any("have no column 'prompt'; `tessy merge JOURNAL --prompts`" in line for line in told)
    with pytest.raises(DatasetError, match="Only a journal needs prompts"):
        push(tmp_path / "rows.parquet", prompts=prompts(2))
    _, told = push(finished(3), "2.0.0")
    assert "of run run-a only the fingerprint is known; pass manifest= (--recipe) to name its models" in told


def test_a_minor_release_tells_prompts_apart_not_ids(hub):
    def asked(word):
        return prompts(20).map(lambda row: {"prompt": row["prompt"] + word} if row["id"] in ("r3", "r4") else row)

    with scripted(fault=failing, max_attempts=1) as transform:
        push(transform.map(asked("")))  # r3 and r13 fail
    with scripted() as transform:
        release, told = push(transform.map(asked(" Now with units.")), "1.1.0")
    assert "1 ids are in ada/rows already with another prompt" in " ".join(told)
    released = load_dataset(REPO, revision="v1.1.0")
    assert sorted(released["train"]["id"]) == sorted([*(f"r{i}" for i in range(20)), "r4"])
    both = [row["source_prompt"] for row in released["train"] if row["id"] == "r4"]
    assert len(set(both)) == 2 and all(
        row["source_prompt"] in row["messages"][0]["content"] for row in released["train"]
    )
    assert released["failures"]["id"] == ["r3"]  # of the old prompt


@pytest.mark.parametrize("streamed", [False, True])
def test_plain_push_to_hub_works_on_our_columns(hub, streamed):
    """None beside text, and empty beside filled spans, which trips the inference of types from single rows."""
    source = prompts(40).to_iterable_dataset() if streamed else prompts(40)
    with scripted(fault=failing, max_attempts=1) as transform:
        rows = source.map(transform, batched=True, features=transform.features(source))
        rows.push_to_hub("ada/plain")
        expected = list(rows)
    back = load_dataset("ada/plain", split="train")
    assert list(back) == expected and back.features == rows.features


def test_another_attempt_with_other_words_is_not_the_one_that_died(hub, monkeypatch):
    def die(*_):
        raise HubError("The Hub did not promote.")

    with monkeypatch.context() as dying, pytest.raises(HubError, match="did not promote"):
        dying.setattr(Candidate, "promote", die)
        push(finished(20))
    push(finished(20), license="mit", failures="drop")
    told = manifest_at(hub, "v1.0.0")
    assert (told.license.license, told.failures, told.failures_split) == ("mit", "drop", None)
    assert "failures" not in load_dataset(REPO, revision="v1.0.0")


# --- reading back


def test_a_command_is_told_only_where_it_works():
    with demo.transform(journal=None) as transform:
        run = transform.record()
    on_hub = run.model_copy(update={"source": SourceRecord(id="me/prompts", revision="a" * 40, split="test")})
    lead, command = releases.how_to_reproduce("me/rows@v1.0.0", on_hub, several=True)
    assert lead == "To reproduce these rows:"
    assert command.startswith(
        f"tessy synthesize me/rows@v1.0.0 me/prompts@{'a' * 40} rows.parquet --split test --run "
    )

    def changed(**student):
        return on_hub.model_copy(update={"student": on_hub.student.model_copy(update=student)})

    model = on_hub.student.model
    served = changed(engine="server", model=model.model_copy(update={"digest": None}), tokenizer=None, options={})
    lead, command = releases.how_to_reproduce("me/rows@v1.0.0", served)
    assert "your servers in place of HOST" in lead and "--set student.options.base_url=http://HOST" in command

    function = {**run.settings, "verifier": {"function": "mine.check", "hash": "0"}}
    for told, why in [
        (RunRecord(fingerprint="0"), "prompts are not a dataset on the Hub"),
        (run, "prompts are not a dataset on the Hub"),
        (run.model_copy(update={"source": SourceRecord(id="json", revision="a" * 40)}), "not a dataset on the Hub"),
        (RunRecord(fingerprint="0", source=on_hub.source), "does not name its models"),
        (changed(engine="scripted"), "engine 'scripted'"),
        (changed(model=model.model_copy(update={"digest": "sha256:0"})), "a local folder that is not here, or has"),
        (changed(model=model.model_copy(update={"name": "gone"})), "'gone' is a local folder that is not here"),
        (on_hub.model_copy(update={"settings": function}), "was the function 'mine.check'"),
    ]:
        (line,) = releases.how_to_reproduce("me/rows@v1.0.0", told)
        assert line.startswith("No command reproduces") and why in line


def test_the_cards_language_is_given_or_stated_by_the_card_or_by_the_prompts_dataset(hub):
    card = hub.keep(b"---\nlanguage:\n- de\n- en\n---\n")
    hub.repos["datasets", "ada/questions"] = Repo("ada/questions", private=False)
    hub.repo("ada/questions").commit("main", "card", {"README.md": card})
    source = SourceRecord(id="ada/questions", split="train")

    def languages(version, of=source, **given):
        _, told = push(finished(4), version, manifest=RunRecord(fingerprint="run-a", source=of), **given)
        return DatasetCard(hub.read(REPO, f"v{version}", "README.md").decode()).data.language, "\n".join(told)

    assert languages("1.0.0", SourceRecord(id="parquet"))[0] is None
    found, told = languages("2.0.0", SourceRecord(id="ada/gone"))
    assert found is None and "the card gets no language: that of ada/gone cannot be read" in told
    assert languages("3.0.0")[0] == ["de", "en"]
    assert languages("4.0.0", language="fr")[0] == ["fr"]
    assert languages("5.0.0")[0] == ["fr"]  # what the card states stays


def test_two_releases_are_compared_without_downloading_what_they_share(hub):
    push(finished(40), license="mit")
    changed = finished(48).map(lambda row: {**row, "answer": "7"} if row["id"] == "r7" else row)
    push(changed.select(range(1, 48)), "2.0.0", license="apache-2.0")
    (told,) = releases.diff(REPO, "v1.0.0", "v2.0.0")
    assert told.rows == (36, 42)
    assert told.added[1] == 8 and told.removed == ([1], 1) and told.changed == ([8], 1)  # by their seeds
    assert ("license", "mit", "apache-2.0") in told.facts
    assert releases.diff(REPO, "v1.0.0", "v1.0.0")[0].facts == []
    with pytest.raises(HubError, match=r"has no 'v3\.0\.0'\. Tags: v1\.0\.0, v2\.0\.0"):
        releases.diff(REPO, "v1.0.0", "v3.0.0")
    with pytest.raises(HubError, match="There is no dataset ada/nothing"):
        releases.manifests("ada/nothing@v1.0.0")
