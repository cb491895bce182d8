"""A model is what its files say: a folder that changes in place is another model."""

import os
import shutil

import pytest

from tessy_hf import BoundaryPredictor, TransformersEngine, VLLMEngine, demo
from tessy_hf.engines.model_files import ModelFiles, digest


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
