"""A run's progress on the Hub: whatever dies or fails, `main` and the tags are the old release or the new one."""

import re
import threading
from functools import partial

import pytest
from datasets import IterableDataset, load_dataset
from huggingface_hub import DatasetCard

from tessy_hf import push_to_hub
from tessy_hf.errors import SettingsError
from tessy_hf.hub import live
from tessy_hf.hub.live import PREVIEW, Live, LiveCard
from tessy_hf.hub.repository import Repository
from tessy_hf.run.finished import Rows
from tests.cli.test_cli import tessy  # noqa: F401 - a fixture
from tests.hub_sweep import REPO, Killed, check_release, finished, kill_at, patched, push, state
from tests.test_transform import prompts, scripted

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning"),
]

BRANCH = "tessy-live-v1.0.0"
OFTEN = 1e-5


FEWEST_MINUTES = live.FEWEST_MINUTES


@pytest.fixture(autouse=True)
def often(monkeypatch):
    monkeypatch.setattr(live, "FEWEST_MINUTES", 0)
    with patched(monkeypatch):
        yield


class Commits:
    """Counts commits to the live branch as they are answered, and lets a run wait for more of them."""

    def __init__(self):
        self.more = threading.Semaphore(0)

    def __call__(self, *request):
        if f"/commit/{BRANCH}" in str(request):
            self.more.release()

    def wait(self):
        """Wait until a commit was begun and ended after now: the third one's text is younger than this call."""
        while self.more.acquire(blocking=False):
            pass
        for _ in range(3):
            assert self.more.acquire(timeout=60), "no commit was made"


BEFORE = {}
"""What streams call before a row; `datasets` pickles what it is given."""


def generate(rows, at):
    for number, row in enumerate(rows):
        if number == at:
            BEFORE["row"]()
        yield row


def stopping(rows, at, then):
    """A stream that calls a function before a row."""
    BEFORE["row"] = then
    return IterableDataset.from_generator(partial(generate, rows, at), features=rows.features)


def release(stream, version="1.0.0", **options):
    told = []
    given = {"live": Live(OFTEN, rows=12), "max_shard_size": 1, "backoff": 0, "retry_timeout": 5, "say": told.append}
    return push_to_hub(stream, REPO, version, **{**given, **options}), told


def card_of(hub, branch=BRANCH):
    text = hub.read(REPO, branch, "README.md").decode()
    return text, dict(re.findall(r"^\| (.*?) \| (.*?) \|$", text, re.M))


BLOCK = re.compile(r"<!-- tessy:live \w+ -->\n(.*?)\n<!-- /tessy:live -->\n\n", re.S)


def changed(before, after):
    """Return the paths whose files differ, or that only one of two trees has."""
    return {path for path in {**before, **after} if before.get(path) != after.get(path)}


def test_the_card_shows_progress_and_a_preview_and_ends_as_the_release(hub):
    rows, commits, seen = finished(12), Commits(), {}

    def look():
        commits.wait()
        seen["card"], seen["main"] = card_of(hub), state(hub)
        seen["preview"] = load_dataset(REPO, revision=BRANCH, split="preview")
        seen["data"] = DatasetCard(seen["card"][0]).data.configs

    hub.fault = commits
    made, told = release(stopping(rows, 8, look))
    text, progress = seen["card"]
    assert progress["state"] == "running" and progress["rows done"] == "8 of 12 (66.7%)" and progress["failed"] == "1"
    assert progress["teacher's share of the tokens"] == "0.0%" and "rows an hour" in progress["rate"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC", progress["last seen"])
    assert re.fullmatch(r"\d+:\d\d h", progress["time left"])
    assert seen["preview"]["id"] == [f"r{n}" for n in range(8) if n != 3]
    assert seen["data"] == [{"config_name": "default", "data_files": [{"split": "preview", "path": PREVIEW}]}]
    assert seen["main"][1] == {} and not [
        path for path in hub.repo(REPO).commits[seen["main"][0]].tree if "data" in path
    ]
    assert any(f"progress is shown at {hub.endpoint}/datasets/{REPO}/blob/{BRANCH}/README.md" in line for line in told)
    check_release(hub, "main", "1.0.0", rows)
    assert hub.repo(REPO).at(BRANCH).tree == hub.repo(REPO).at("v1.0.0").tree and made.created


@pytest.mark.parametrize("kind", ["503", "429", "lost", "cut"])
def test_faults_of_what_shows_progress_stop_nothing(hub, kind):
    rows, commits, count = finished(12), Commits(), [0]

    def fault(request):
        commits(request)
        if "tessy-live" not in request.path and not request.path.endswith("/commit/main"):
            return None
        count[0] += 1
        return kind if count[0] % 3 == 1 else None

    hub.fault = fault
    release(stopping(rows, 8, commits.wait), live=Live(OFTEN, rows=12, main=True))
    check_release(hub, "main", "1.0.0", rows)
    check_release(hub, "v1.0.0", "1.0.0", rows)
    assert hub.repo(REPO).at(BRANCH).tree == hub.repo(REPO).at("v1.0.0").tree


def test_a_hub_that_refuses_all_progress_gets_the_release(hub):
    hub.fault = lambda request: "503" if "tessy-live" in request.path else None
    _, told = release(stopping(finished(12), 0, lambda: None), live=Live(10), retry_timeout=0.1)
    check_release(hub, "v1.0.0", "1.0.0", finished(12))
    assert any("did not show progress" in line for line in told)


def test_a_dead_run_is_ended_by_a_rerun_that_shows_nothing(hub):
    rows, commits = finished(12), Commits()

    def die():
        commits.wait()
        raise Killed

    hub.fault = commits
    with pytest.raises(Killed):
        release(stopping(rows, 8, die), live=Live(OFTEN, rows=12, main=True))
    for branch in ("main", BRANCH):
        text, progress = card_of(hub, branch)
        assert progress["state"] == "running" and "If it was last seen long before that, the run has\ndied" in text
    release(stopping(rows, 0, lambda: None), live=False)
    for branch in ("main", BRANCH):
        check_release(hub, branch, "1.0.0", rows)
        assert "last seen" not in card_of(hub, branch)[0]


CHILD = """
import threading
from tests.hub import test_live
from tests.hub_sweep import finished

test_live.live.FEWEST_MINUTES = 0
stream = test_live.stopping(finished(12, "run-b"), 8, threading.Event().wait)
test_live.release(stream, append=False, live=test_live.Live(test_live.OFTEN, rows=12, main=True))
"""


@pytest.mark.parametrize(("place", "fault"), [(f"/commit/{BRANCH}", "cut"), ("/commit/main", "lost")])
def test_sigkill_leaves_the_old_release_and_when_the_run_was_last_seen(hub, tmp_path, place, fault):
    push(finished(8), "0.9.0")
    (_, tags), before, readme = (
        state(hub),
        hub.repo(REPO).at("main").tree,
        hub.read(REPO, "main", "README.md").decode(),
    )

    def eight_rows_are_shown():
        repo = hub.repo(REPO)
        return BRANCH in repo.branches and card_of(hub)[1].get("rows done", "").startswith("8 of 12")

    kill_at(hub, CHILD, tmp_path, place, fault, eight_rows_are_shown)
    assert state(hub)[1] == tags and changed(before, hub.repo(REPO).at("main").tree) <= {"README.md"}
    assert BLOCK.sub("", hub.read(REPO, "main", "README.md").decode()) == readme
    shown = card_of(hub)[1]
    assert shown["state"] == "running" and shown["rows done"].startswith("8 of 12") and shown["last seen"]
    rows = finished(12, "run-b")
    release(stopping(rows, 0, lambda: None), append=False, live=Live(OFTEN, rows=12, main=True))
    for revision in ("main", "v1.0.0", BRANCH):
        check_release(hub, revision, "1.0.0", rows)
        assert "last seen" not in card_of(hub, revision)[0]
    assert set(hub.repo(REPO).branches) == {"main", BRANCH}


def test_a_run_that_fails_says_so(hub):
    def fail():
        raise ValueError("The stream broke.")

    with pytest.raises(ValueError, match="stream broke"):
        release(stopping(finished(12), 8, fail), live=Live(10))
    assert card_of(hub)[1]["state"] == "stopped by ValueError" and card_of(hub)[1]["rows done"] == "8"
    assert state(hub)[1] == {}


def test_the_card_of_main_is_changed_between_two_marks_alone(hub):
    push(finished(8), "0.9.0")
    before, commits, seen = hub.repo(REPO).at("main").tree, Commits(), {}
    readme = hub.read(REPO, "main", "README.md").decode()

    def look():
        commits.wait()
        commits.wait()
        seen["tree"], seen["text"] = hub.repo(REPO).at("main").tree, hub.read(REPO, "main", "README.md").decode()

    hub.fault = commits
    release(stopping(finished(12, "run-b"), 8, look), append=False, live=Live(OFTEN, rows=12, main=True))
    assert changed(before, seen["tree"]) == {"README.md"}
    assert "rows done | 8 of 12" in BLOCK.search(seen["text"])[1] and BLOCK.sub("", seen["text"]) == readme
    assert not BLOCK.search(hub.read(REPO, "main", "README.md").decode())
    check_release(hub, "main", "1.0.0", finished(12, "run-b"))


def test_a_journal_is_followed_until_each_prompt_has_its_row(hub, tmp_path):
    journal, waits, given = tmp_path / "rows.journal", [], prompts(9)

    def write(upto):
        with scripted(journal=str(journal)) as transform:
            transform(given.select(range(upto))[:])

    write(4)

    def rows(attempts):
        return Rows(journal, None, attempts, prompts=given)

    def wait(seconds):
        waits.append((seconds, card.summary.rows, card.summary.found, card_of(hub)[1]["rows done"]))
        write(9 if len(waits) > 1 else 6)

    repo = Repository(REPO, tmp_path)
    repo.reach(None)
    with LiveCard(repo, "v1.0.0", Live(5), rows(1).features) as card:
        card.follow(rows(1), rows, wait)
    assert (
        waits == [(300, 4, 4, "4 of 9 (44.4%)"), (300, 6, 4, "6 of 9 (66.7%)")]
        and card_of(hub)[1]["rows done"] == "9 of 9 (100.0%)"
    )


def test_a_complete_journal_is_pushed_live_by_the_command(hub, tessy, tmp_path):  # noqa: F811
    prompts(5).to_json(tmp_path / "prompts.jsonl")
    with scripted(journal=str(tmp_path / "rows.journal")) as transform:
        transform(prompts(5)[:])
    words = ("push", tmp_path / "rows.journal", REPO, "--prompts", tmp_path / "prompts.jsonl", "--live")
    code, printed = tessy(*words)
    assert code == 0 and f"progress is shown at {hub.endpoint}" in printed and "5 rows, 0 failed" in printed


@pytest.mark.parametrize("given", ["often", 3, Live(0.5)])
def test_more_commits_than_the_hub_allows_are_refused(given, monkeypatch):
    monkeypatch.setattr(live, "FEWEST_MINUTES", FEWEST_MINUTES)
    with pytest.raises(SettingsError, match="at least 1 minute"):
        Live.read(given)
    assert Live.read(False) is None and Live.read("main").main and Live.read(True) == Live()
