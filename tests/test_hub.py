"""Releases on the Hub, with the real clients over loopback."""

import json

import pytest
from datasets import load_dataset

from tessy_hf import push_to_hub
from tessy_hf.errors import RequestError
from tessy_hf.provenance import Manifest
from tests.hub_server import HubServer, clients_of
from tests.test_transform import prompts, scripted

# The client's own upload speaks to httpx2 in a deprecated way.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")

REPO = "ada/rows"
MANIFEST = "tessy/default/train/manifest.json"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with HubServer(tmp_path / "storage") as server, clients_of(server, tmp_path / "home", monkeypatch):
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
    settings = {"max_shard_size": 20_000, "backoff": 0, "patience": 5, "say": told.append}
    release = push_to_hub(rows, REPO, version, **{**settings, **options})
    return release, told


def manifest_at(hub, revision):
    return Manifest.model_validate_json(hub.read(REPO, revision, MANIFEST))


def test_a_stream_becomes_one_tagged_release(hub):
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
        expected = [dict(row) for row in rows]
    assert list(whole["train"]) == list(streamed) == [row for row in expected if row["finish_reason"] == "stop"]
    assert list(whole["failures"]) == [row for row in expected if row["finish_reason"] == "error"]
    assert whole["train"].features == whole["failures"].features == streamed.features == rows.features

    manifest = manifest_at(hub, "v1.0.0")
    assert manifest.counts.model_dump() == {
        "rows": 900,
        "failed": 100,
        "given": 1000,
        "unfinished": 0,
        "finish_reasons": {"stop": 900, "error": 100},
        "runs": {transform.run_fingerprint: 1000},
    }
    assert manifest.run.teacher.engine == "scripted" and manifest.run.source.fingerprint
    card = hub.read(REPO, "v1.0.0", "README.md").decode()
    assert "license: apache-2.0" in card and "900" in card
    assert json.loads(hub.read(REPO, "v1.0.0", "tessy/default/train/statistics.json"))["rows"] == 1000
