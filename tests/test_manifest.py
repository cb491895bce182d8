"""What a run and a release say of themselves."""

import json

import pytest
from datasets import Dataset, IterableDataset, load_dataset
from pydantic import ValidationError

from tessy_hf import demo
from tessy_hf import manifest as provenance
from tessy_hf.manifest import Counts, Manifest
from tests.hub_server import HubServer, clients_of

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")


def test_the_published_schema_is_the_manifests():
    assert provenance.SCHEMA_FILE.read_text() == provenance.json_schema(), "write json_schema() to SCHEMA_FILE"


def miniature():
    transform = demo.transform(journal=None)
    return provenance.record(transform.teacher, transform.student, transform.settings, transform.run_fingerprint)


def test_a_run_is_described_without_loading_a_model():
    run = miniature()
    assert run.teacher.engine == "transformers" and run.teacher.model.name == "tessy_hf/demo/models/teacher"
    assert run.teacher.model.digest.startswith("sha256:") and run.teacher.model.digest != run.student.model.digest
    assert run.teacher.boundary.model.name.endswith("boundary-teacher")
    assert run.settings["temperature"] == 0.6 and "journal" not in run.settings
    assert run.libraries["datasets"] and run.hardware.cores >= 1


def test_folders_elsewhere_are_named_by_their_end(tmp_path, monkeypatch):
    assert provenance.shown(str(tmp_path / "home" / "model")) == "model"
    monkeypatch.chdir(tmp_path)
    assert provenance.shown(str(tmp_path / "home" / "model")) == "home/model"
    assert provenance.shown("Qwen/Qwen3-8B") == "Qwen/Qwen3-8B"


def test_a_manifest_outlives_being_stored_and_refuses_what_it_does_not_know():
    manifest = Manifest(
        version="1.0.0", runs=[miniature()], counts=Counts(rows=1, failed=0), splits={}, begun="", finished=""
    )
    assert Manifest.model_validate_json(manifest.to_json()) == manifest
    with pytest.raises(ValidationError):
        Manifest.model_validate({**json.loads(manifest.to_json()), "schema_version": 2})


def test_prompts_are_known_by_their_commit_streamed_or_not(tmp_path, monkeypatch):
    with HubServer(tmp_path / "storage") as hub, clients_of(hub, tmp_path / "home", monkeypatch):
        demo.prompts(6, seed=8).push_to_hub("ada/prompts")
        commit = hub.repo("ada/prompts").branches["main"]
        whole = provenance.source(load_dataset("ada/prompts", split="train"))
        stream = load_dataset("ada/prompts", split="train", streaming=True)
        streamed = provenance.source(stream)
        for found in (whole, streamed):
            assert (found.id, found.revision, found.split, found.config) == ("ada/prompts", commit, "train", "default")
        assert whole.fingerprint and streamed.fingerprint
        again = provenance.source(load_dataset("ada/prompts", split="train", streaming=True))
        assert again == streamed != provenance.source(stream.take(3))


def test_local_prompts_have_a_fingerprint_where_it_repeats():
    rows = {"prompt": ["a", "b"]}
    dataset, same, other = Dataset.from_dict(rows), Dataset.from_dict(rows), Dataset.from_dict({"prompt": ["a", "c"]})
    found = [provenance.source(one).fingerprint for one in (dataset, same, other)]
    assert found[0] == found[1] != found[2]
    streams = [provenance.source(one.to_iterable_dataset()).fingerprint for one in (dataset, same, other)]
    assert streams[0] == streams[1] != streams[2]
    assert provenance.source(IterableDataset.from_generator(lambda: iter([rows]))).fingerprint is None
