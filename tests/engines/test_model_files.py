"""A model is what its files say: a folder that changes in place is another model."""

import os
import pickle
import shutil
import subprocess
import sys
from types import SimpleNamespace

import huggingface_hub
import pytest

from tessy_hf import BoundaryPredictor, ServerEngine, TransformersEngine, VLLMEngine, demo
from tessy_hf.engines.model_files import ModelFiles, digest
from tessy_hf.errors import SettingsError


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(demo.STUDENT, tmp_path / "student")


def change(path):
    """Change one byte and neither size nor name."""
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(1, path.stat().st_mtime_ns + 1_000_000))


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json", "chat_template.jinja"])
def test_a_folder_whose_files_change_is_another_model(folder, name):
    before = digest(folder)
    change(folder / name)
    assert digest(folder) != before


def test_a_copy_and_a_touched_file_are_the_same_model(folder, tmp_path):
    before = digest(folder)
    os.utime(folder / "model.safetensors", (1, 2))
    (folder / "README.md").write_text("A card decides nothing.")
    assert digest(folder) == before == digest(shutil.copytree(folder, tmp_path / "copy"))


@pytest.mark.parametrize("kind", [TransformersEngine, BoundaryPredictor])
def test_a_revision_that_is_not_text_is_refused(kind):
    with pytest.raises(SettingsError, match="revision of 'me/model' is 1234567.*put quotes around it"):
        kind("me/model", revision=1234567)


def test_a_name_on_the_hub_is_identified_by_name_and_revision():
    assert ModelFiles("me/model", "v1").identity == {"model": "me/model", "revision": "v1"}


@pytest.mark.parametrize("kind", [TransformersEngine, VLLMEngine, BoundaryPredictor])
def test_engines_and_predictors_of_a_changed_folder_have_another_identity(folder, kind):
    before = kind(str(folder)).identity
    assert kind(str(folder)).identity == before
    change(folder / "model.safetensors")
    assert kind(str(folder)).identity != before


def test_a_retrained_student_is_another_run(folder):
    def fingerprint():
        return demo.transform(student=folder, journal=None).run_fingerprint

    before = fingerprint()
    assert fingerprint() == before
    change(folder / "model.safetensors")
    assert fingerprint() != before


# --- on the Hub

FIRST, SECOND = "1" * 40, "2" * 40


@pytest.fixture
def hub(monkeypatch):
    """What the Hub says of a model's branch; ``None`` where it cannot be asked."""
    said = {"sha": FIRST, "asked": 0}

    def model_info(self, name, *, revision=None, timeout=None):
        said["asked"] += 1
        if said["sha"] is None:
            raise OSError("offline")
        return SimpleNamespace(sha=said["sha"])

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    return said


@pytest.mark.parametrize("kind", [TransformersEngine, VLLMEngine, BoundaryPredictor])
def test_a_model_on_the_hub_is_its_commit(hub, kind):
    first = kind("me/model")
    assert first.identity == kind("me/model", revision=FIRST).identity
    hub["sha"] = SECOND
    assert first.identity["revision"] == FIRST  # it stays what was first asked for, and so does what is loaded
    assert kind("me/model").identity["revision"] == SECOND
    copy = pickle.loads(pickle.dumps(first))
    assert copy.identity == first.identity and copy.files.pinned == FIRST


def test_a_servers_tokenizer_is_its_commit_or_its_bytes(hub, folder):
    def identity(tokenizer):
        return ServerEngine("m", base_url="http://127.0.0.1:9/v1", tokenizer=tokenizer).identity

    assert identity("me/tokenizer")["revision"] == FIRST
    before = identity(str(folder))
    change(folder / "model.safetensors")
    assert identity(str(folder)) == before
    change(folder / "tokenizer.json")
    assert identity(str(folder)) != before


def test_without_network_a_model_is_the_commit_in_the_cache(hub, monkeypatch, tmp_path):
    hub["sha"] = None
    assert ModelFiles("me/model", "v1").identity == {"model": "me/model", "revision": "v1"}
    snapshot = tmp_path / "models--me--model" / "snapshots" / SECOND
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    refs = tmp_path / "models--me--model" / "refs"
    refs.mkdir()
    (refs / "v1").write_text(SECOND)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert ModelFiles("me/model", "v1").identity == {"model": "me/model", "revision": SECOND}
    assert ModelFiles("me/model", "v2").identity == {"model": "me/model", "revision": "v2"}


def test_a_model_that_is_in_the_package_is_not_looked_up(hub):
    assert BoundaryPredictor().identity["revision"] is None and hub["asked"] == 0


# --- across processes


def digest_elsewhere(folder, home):
    """Return a folder's digest as another process finds it."""
    code = "import sys; from pathlib import Path; from tessy_hf.engines.model_files import digest; "
    code += "print(digest(Path(sys.argv[1])))"
    environment = {**os.environ, "HF_HOME": str(home)}
    return subprocess.check_output([sys.executable, "-c", code, str(folder)], env=environment, text=True).strip()


def test_a_large_file_is_hashed_once_for_all_processes(tmp_path):
    folder, home = tmp_path / "model", tmp_path / "home"
    folder.mkdir()
    weights = folder / "model.safetensors"
    weights.write_bytes(bytes(1 << 20))
    os.utime(weights, (1, 1))
    first = digest_elsewhere(folder, home)
    assert first == digest_elsewhere(folder, home) == digest(folder)
    [note] = (home / "tessy" / "digests").iterdir()
    note.write_text("0" * 64)
    assert digest_elsewhere(folder, home) != first  # it was read
    note.write_text("")
    assert digest_elsewhere(folder, home) == first  # cut short: hashed again
    weights.write_bytes(b"x" + bytes((1 << 20) - 1))
    assert digest_elsewhere(folder, home) == digest(folder) != first
    assert len([*note.parent.iterdir()]) == 1  # too young to be told from its next change


def test_a_cache_that_cannot_be_written_costs_time_only(tmp_path):
    (tmp_path / "home").write_text("a file")
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(bytes(1 << 20))
    os.utime(weights, (1, 1))
    assert digest_elsewhere(tmp_path, tmp_path / "home") == digest(tmp_path)
