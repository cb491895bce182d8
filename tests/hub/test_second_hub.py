"""Releases on a Hub that was written apart from the first, read back with plain clients in a process of their own."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
from datasets import load_dataset

from tessy_hf import BoundaryPredictor, push_boundary, push_to_hub
from tessy_hf.errors import BoundaryError, HubError, VersionError
from tessy_hf.hub import releases
from tests.boundary_training.test_train import segments
from tests.cli.test_cli import tessy  # noqa: F401 - a fixture
from tests.hub.test_boundary_models import LOAD, folder  # noqa: F401 - a fixture
from tests.hub.test_push import failing, stream
from tests.hub_server import clients_of
from tests.hub_sweep import REPO, finished, patched
from tests.second_hub import SecondHub
from tests.test_transform import prompts, scripted

# The client's own upload speaks to httpx2 in a deprecated way.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning"),
]

READ = """
import json, sys
from datasets import load_dataset
from huggingface_hub import DatasetCard, HfApi, hf_hub_download

repo, revision = sys.argv[1:]
whole = load_dataset(repo, revision=revision)
streamed = load_dataset(repo, revision=revision, streaming=True)
refs = HfApi().list_repo_refs(repo, repo_type="dataset")
card, record = DatasetCard.load(repo), hf_hub_download(
    repo, "tessy/default/train/manifest.json", revision=revision, repo_type="dataset")
print(json.dumps({
    "rows": {name: list(split) for name, split in whole.items()},
    "streamed": {name: list(split) for name, split in streamed.items()},
    "features": [repr(given["train"].features) for given in (whole, streamed)],
    "tags": [tag.name for tag in refs.tags],
    "branches": [branch.name for branch in refs.branches],
    "license": card.data.license,
    "manifest": json.load(open(record)),
}))
assert not [name for name in sys.modules if name.startswith("tessy")]
"""

PUSH = """
from datasets import disable_progress_bars
from tests import hub_sweep
from tests.hub.test_second_hub import push

disable_progress_bars()
push(hub_sweep.as_stream(hub_sweep.finished(12)), "1.0.0")
"""


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with SecondHub() as server, clients_of(server, tmp_path / "home", monkeypatch, "hf_writes"), patched(monkeypatch):
        yield server


def push(rows, version="1.0.0", **options):
    told = []
    settings = {"max_shard_size": 1000, "backoff": 0, "retry_timeout": 5, "say": told.append}
    return push_to_hub(rows, REPO, version, **{**settings, **options}), told


def run(hub, home, code, *words):
    return subprocess.Popen(
        [sys.executable, "-c", code, *words],
        env={**hub.environment(home), "PYTHONPATH": os.getcwd()},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def read(hub, home, revision="v1.0.0"):
    """Read a release with the plain clients, in a process that knows nothing of tessy_hf."""
    out, err = (child := run(hub, home, READ, REPO, revision)).communicate(timeout=200)
    assert child.returncode == 0, err
    return json.loads(out)


def test_a_stream_with_failures_is_read_back_by_plain_clients(hub, tmp_path):
    hub.limited_every = 17
    rows, transform = stream(1000)
    with transform:
        release, _ = push(rows, license="apache-2.0", max_shard_size=200_000)
        expected = [dict(row) for row in rows.rename_column("prompt", "source_prompt")]
        features = repr(rows.rename_column("prompt", "source_prompt").features)
    hub.limited_every = 0
    assert (release.rows, release.failed, release.created) == (900, 100, True)
    assert len([seen for seen in hub.seen if seen[2] == 429]) > 3
    found = read(hub, tmp_path / "reader")
    split = {"train": "stop", "failures": "error"}
    assert found["rows"] == {
        name: [row for row in expected if row["finish_reason"] == reason] for name, reason in split.items()
    }
    assert found["streamed"] == found["rows"] and sorted(set(found["features"])) == [features]
    assert (found["tags"], found["branches"], found["license"]) == (["v1.0.0"], ["main"], "apache-2.0")
    assert found["manifest"]["counts"]["rows"] == 900
    assert found["manifest"]["runs"][0]["fingerprint"] == transform.run_fingerprint


def test_versions_repeat_grow_and_never_change(hub, tmp_path, tessy):  # noqa: F811
    push(finished(40))
    tree = hub.repos["datasets", REPO].tree("v1.0.0")
    again, told = push(finished(40))
    assert not again.created and "there already" in told[-1]
    with pytest.raises(VersionError, match="of run run-a, these rows are of run-b"):
        push(finished(40, "run-b"))
    release, _ = push(finished(8, first=36), "1.1.0")
    assert (release.rows, release.failed) == (39, 5) and hub.repos["datasets", REPO].tree("v1.0.0") == tree
    found = read(hub, tmp_path / "reader", "v1.1.0")
    assert found["tags"] == ["v1.0.0", "v1.1.0"] and found["streamed"] == found["rows"]
    assert sorted(row["seed"] - 1 for split in found["rows"].values() for row in split) == list(range(44))
    train = releases.diff(REPO, "v1.0.0", "v1.1.0")[0]
    assert train.rows == (36, 39) and train.added == ([41, 42, 43, 44], 4)
    code, printed = tessy("diff", REPO, "v1.0.0", "v1.1.0")
    assert code == 0 and "41, 42, 43, 44" in printed
    push(finished(12, "run-b"), "2.0.0")
    for version, count in {"v2.0.0": 11, "v1.0.0": 36, "v1.1.0": 39}.items():
        assert load_dataset(REPO, revision=version, split="train").num_rows == count


@pytest.mark.parametrize("place", ["/lfs-complete", "/commit/tessy-v1.0.0", "/commit/main", "/tag/"])
def test_a_push_killed_midway_is_finished_by_the_next(hub, tmp_path, place):
    def killing(request):
        if place in request.path:
            hub.fault = lambda request: None
            child.send_signal(signal.SIGKILL)
            child.wait()

    hub.fault = killing
    child = run(hub, tmp_path / "child", PUSH)
    child.communicate(timeout=200)
    assert child.returncode == -signal.SIGKILL
    assert not hub.repos["datasets", REPO].tags or place == "/tag/"
    push(finished(12))
    repo, rows = hub.repos["datasets", REPO], load_dataset(REPO, revision="v1.0.0")
    assert (list(repo.tags), list(repo.branches)) == (["v1.0.0"], ["main"])
    assert rows["train"]["id"] == [f"r{n}" for n in range(12) if n % 10 != 3] and rows["failures"]["id"] == ["r3"]


@pytest.mark.parametrize("streamed", [False, True])
def test_plain_push_to_hub_works_too(hub, streamed):
    source = prompts(40).to_iterable_dataset() if streamed else prompts(40)
    with scripted(fault=failing, max_attempts=1) as transform:
        rows = source.map(transform, batched=True, features=transform.features(source))
        rows.push_to_hub("ada/plain")
        expected = list(rows)
    back = load_dataset("ada/plain", split="train")
    assert list(back) == expected and back.features == rows.features


@pytest.mark.parametrize("lag", [1, 2, 5])
def test_refs_may_lag_behind(hub, lag):
    hub.lag = lag
    push(finished(40))
    push(finished(8, first=40), "1.1.0")
    assert not push(finished(8, first=40), "1.1.0")[0].created
    repo = hub.repos["datasets", REPO]
    assert list(repo.tags) == ["v1.0.0", "v1.1.0"] and list(repo.branches) == ["main"]


def test_a_tag_may_be_told_by_an_object_of_its_own(hub):
    hub.refs_tell_objects = True
    first = push(finished(40))[0]
    again = push(finished(40))[0]
    assert (again.created, again.commit) == (False, first.commit)
    push(finished(8, first=36), "1.1.0")
    assert releases.diff(REPO, "v1.0.0", "v1.1.0")[0].rows == (36, 39)


def test_a_predictor_is_published_and_loaded_by_revision(hub, folder, tmp_path):  # noqa: F811
    tiny = tmp_path / "tiny"
    shutil.copytree(folder, tiny)
    first = push_boundary(tiny, "ann/tiny", tag="v1", license="mit")
    assert push_boundary(tiny, "ann/tiny", tag="v1", license="mit") == first
    report = json.loads((tiny / "report.json").read_text())
    (tiny / "report.json").write_text(json.dumps({**report, "note": "trained again"}))
    with pytest.raises(BoundaryError, match="already has a tag 'v1'"):
        push_boundary(tiny, "ann/tiny", tag="v1", license="mit")
    repo = hub.repos["models", "ann/tiny"]
    second = push_boundary(tiny, "ann/tiny", tag="v2", license="mit")
    assert [repo.find(tag) for tag in ("v1", "v2", "main")] == [first, second, second] and second != first
    text = segments()[3].text
    out, err = (child := run(hub, tmp_path / "reader", LOAD, "ann/tiny", first, text)).communicate(timeout=200)
    assert child.returncode == 0, err
    local = BoundaryPredictor.from_pretrained(str(tiny))
    expected = local.live.reader._logits([local.vocabulary.encode(text).ids])[0].tolist()
    local.close()
    label_shift, window, logits, found = json.loads(out)
    assert (label_shift, window, found) == (1, 120, len(logits)) and logits == expected


def test_who_may_not_write_or_see_is_told(hub, monkeypatch):
    for token, told in [("hf_reads", "token that may write"), ("hf_wrong", "token that may write")]:
        monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(HubError, match=told):
            push(finished(4))
    assert not hub.repos
    monkeypatch.setenv("HF_TOKEN", "hf_writes")
    push(finished(4), private=True)
    monkeypatch.setenv("HF_TOKEN", "hf_reads")
    with pytest.raises(HubError, match="token that may write"):
        push(finished(4, "run-b"), "2.0.0")
    assert releases.manifests(f"{REPO}@v1.0.0")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match="may not see it"):
        releases.manifests(f"{REPO}@v1.0.0")
