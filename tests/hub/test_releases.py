"""A release's record as a recipe: the same run again, and nothing that only the user may allow."""

import pytest

from tessy_hf import Speaker, TessyTransform, TransformersEngine, demo
from tessy_hf import recipe as recipes
from tessy_hf.errors import HubError
from tessy_hf.hub import releases


def test_a_recorded_run_is_built_again_as_it_was(monkeypatch):
    monkeypatch.chdir(demo.STUDENT.parent)  # a folder is known by its path
    marks = {"open": "<t>", "close": "</t>", "end_marker": "</t>"}
    engine = TransformersEngine(demo.STUDENT.name, attn_implementation="eager")
    with TessyTransform(student=Speaker(engine, thinking_format=marks), method="student-only") as transform:
        run = transform.record()
    _, student, settings = recipes.build(releases.recipe(run), "a release")
    with TessyTransform(student=student, **settings) as again:
        assert again.run_fingerprint == run.fingerprint


def test_a_release_does_not_set_what_could_do_harm():
    """Its record is its publisher's: tests that run as the user, keys that go to another server, code of a model."""
    with demo.transform(journal=None) as transform:
        run = transform.record()
    open_to_all = {"name": "python-tests", "column": "tests", "files": True, "network": False}
    served = {"base_url": "http://elsewhere/v1", "api_key_env": "HF_TOKEN"}
    student = run.student.model_copy(update={"engine": "server", "options": served})
    coded = run.student.model_copy(update={"options": {"options": {"trust_remote_code": True}}})
    for bad, names in [
        (run.model_copy(update={"settings": {**run.settings, "verifier": open_to_all}}), ["verifier.files=True"]),
        (run.model_copy(update={"student": student}), [f"student.options.{n}={v}" for n, v in served.items()]),
        (run.model_copy(update={"student": coded}), ["student.options.trust_remote_code=True"]),
    ]:
        with pytest.raises(HubError, match="If you trust this one, repeat them") as told:
            releases.recipe(bad)
        assert all(f"--set {name}" in str(told.value) for name in names)
        assert releases.recipe(bad, names)["student"]
    assert "journal" not in releases.recipe(run.model_copy(update={"settings": {**run.settings, "journal": "/x"}}))
