"""A release's record as a recipe: the same run again, and nothing that only the user may allow."""

import pytest

from tessy_hf import Speaker, TessyTransform, TransformersEngine, demo
from tessy_hf import recipe as recipes
from tessy_hf.cli.release import diff, show
from tessy_hf.errors import HubError
from tessy_hf.hub import releases
from tessy_hf.manifest import Counts, License, Manifest


def test_a_recorded_run_is_built_again_as_it_was(monkeypatch):
    monkeypatch.chdir(demo.STUDENT.parent)  # a folder is known by its path
    marks = {"open": "<t>", "close": "</t>", "end_marker": "</t>"}
    engine = TransformersEngine(demo.STUDENT.name, attn_implementation="eager")
    with TessyTransform(student=Speaker(engine, thinking_format=marks), method="student-only") as transform:
        run = transform.record()
    _, student, settings = recipes.build(releases.recipe(run), "a release")
    with TessyTransform(student=student, **settings) as again:
        assert again.run_fingerprint == run.fingerprint


def test_what_a_publisher_wrote_does_not_drive_the_terminal(monkeypatch, capsys):
    nasty = "\x1b[31m[red]mit"
    told = Manifest(
        version="1.0.0", split=nasty, counts=Counts(rows=1, failed=0), splits={}, begun="", finished="",
        license=License(license="other", license_name=nasty),
    )  # fmt: skip
    monkeypatch.setattr(releases, "manifests", lambda name: [told])
    monkeypatch.setattr(
        releases, "diff", lambda *_: [releases.Difference(nasty, "train", (1, 1), *[([nasty], 1)] * 3, [(nasty,) * 3])]
    )
    show("ada/rows")
    diff("ada/rows", "v1.0.0", "v1.1.0")
    printed = capsys.readouterr().out
    assert "\x1b" not in printed and printed.count("[red]mit") == 9


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
        with pytest.raises(HubError, match="If you trust this one"):
            releases.recipe(bad, [names[0].partition(".")[0] + ".opt=1", "=", *names[1:]])
    assert "journal" not in releases.recipe(run.model_copy(update={"settings": {**run.settings, "journal": "/x"}}))
