"""What a run and a release say of themselves."""

import json

import pytest
from pydantic import ValidationError

from tessy_hf import demo
from tessy_hf import manifest as provenance
from tessy_hf.manifest import Counts, License, Manifest


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


def test_the_license_is_stored_under_its_old_name_and_read_under_both():
    manifest = Manifest(
        version="1.0.0",
        counts=Counts(rows=1, failed=0),
        splits={},
        begun="",
        finished="",
        license=License(license="mit"),
    )
    stored = json.loads(manifest.to_json())
    assert stored["licence"]["license"] == "mit" and "license" not in stored
    stored["license"] = stored.pop("licence")
    assert Manifest.model_validate(stored) == manifest
