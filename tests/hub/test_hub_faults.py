"""Deaths while pushing: a sample of ``tests/hub_sweep.py``, real SIGKILLs, and releases of more than 50 files."""

import pytest

from tests.hub_sweep import (
    REPO,
    Scenario,
    check_old_or_new,
    check_release,
    finished,
    kill_at,
    patched,
    push,
    state,
    sweep,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def quickly(monkeypatch):
    with patched(monkeypatch):
        yield


def test_main_and_tags_are_the_old_release_or_the_new_wherever_a_push_dies(hub):
    assert sweep(hub, count=2, step=97, offset=7) >= 8


def test_releases_of_more_than_50_files_are_complete_or_absent_too(hub):
    """The client and `datasets` make several commits of so many files, which readers of main see half done."""
    scenario = Scenario(hub, [(finished(8), "1.0.0")], finished(4 * 52, "run-b"), "2.0.0")
    commits = [request.number for request in hub.requests if "/commit/" in request.path]
    assert len(commits) == 4  # two of files and one of records on the side branch, one on main
    for number, kind in zip(commits, ("lost", "killed after", "503", "lost"), strict=True):
        before, after = scenario.die(number, kind)
        assert after - before < 0.2 * before, "files were sent again"


CHILD = """
from tests import hub_sweep
hub_sweep.shards.BATCH_ROWS = 4
hub_sweep.push(hub_sweep.finished(12, "run-b"), "2.0.0")
"""


def test_sigkill_at_any_moment_leaves_the_old_release_or_the_new(hub, tmp_path):
    rows = finished(12, "run-b")
    scenario = Scenario(hub, [(finished(8), "1.0.0")], rows, "2.0.0")
    for place, fault in (("/commit/tessy-v2.0.0", "lost"), ("/commit/main", "cut"), ("/commit/main", "lost")):
        scenario.restore()
        old = state(hub)
        kill_at(hub, CHILD, tmp_path, place, fault)
        check_old_or_new(hub, old, "2.0.0", rows)
        assert (state(hub) == old) == ((place, fault) != ("/commit/main", "lost"))
        push(rows, "2.0.0")
        check_release(hub, "main", "2.0.0", rows)
        check_release(hub, "v2.0.0", "2.0.0", rows)
        assert set(hub.repo(REPO).branches) == {"main"}
