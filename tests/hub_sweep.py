"""Let a push die at each of its requests in turn, and hold what is left on the Hub against what is promised.

`main` and the tags are the old release or the complete new one, whatever died where; a rerun finishes. Run it whole::

    python -m tests.hub_sweep [--shards 3] [--step 1]

``tests/hub/test_hub_faults.py`` takes a sample of it.
"""

import argparse
import copy
import io
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from datasets import Dataset, IterableDataset, List, disable_progress_bars

from tessy_hf import push_to_hub
from tessy_hf.manifest import Manifest
from tessy_hf.report.statistics import Statistics
from tessy_hf.rows import columns
from tessy_hf.rows import parquet as shards
from tests.hub_server import HubServer, clients_of

REPO = "ada/rows"
MANIFEST = "tessy/default/train/manifest.json"
KINDS = ("503", "cut", "lost", "killed before", "killed after")


class Killed(BaseException):
    """The process dies: nothing may catch it."""


def finished(n, run="run-a", first=0):
    """Return finished rows, typed; each tenth failed, with nothing written."""
    from datasets import Features, Value

    features = Features({"id": Value("string"), "question": Value("string"), **columns.schema()})
    assert isinstance(features["spans"], List)
    return Dataset.from_list([finished_row(number, run) for number in range(first, first + n)], features=features)


def finished_row(number, run="run-a"):
    failed = number % 10 == 3
    text = f"<think>\nokay so {number}\n</think>\n\nit is {number}"
    chat = [{"role": "user", "content": f"what is {number}"}]
    span = {"author": "student", "part": "thinking", "start": 0, "end": len(text), "tokens": 9}
    return {
        "id": f"r{number}",
        "question": f"what is {number}",
        "messages": chat if failed else [*chat, {"role": "assistant", "content": text}],
        "thinking": "" if failed else f"okay so {number}",
        "answer": "" if failed else f"it is {number}",
        "spans": [] if failed else [span],
        "teacher_tokens": 0,
        "student_tokens": 0 if failed else 9,
        "teacher_token_ratio": None if failed else 0.0,
        "student_token_ratio": None if failed else 1.0,
        "thinking_teacher_token_ratio": None if failed else 0.0,
        "discarded_teacher_tokens": 0,
        "discarded_student_tokens": 0,
        "generated_teacher_tokens": 0,
        "generated_student_tokens": 9,
        "finish_reason": "error" if failed else "stop",
        "exhausted_budget": None,
        "error": "The server gave up." if failed else None,
        "verdict": None,
        "teacher_score": None,
        "candidates": [],
        "teacher_reference": None,
        "method": "student-only",
        "run_fingerprint": run,
        "seed": number + 1,
    }


def as_stream(rows):
    return IterableDataset.from_generator(lambda: iter(rows), features=rows.features)


def push(rows, version, **options):
    settings = {"max_shard_size": 1, "backoff": 0, "retry_timeout": 20, "say": lambda _: None}
    return push_to_hub(as_stream(rows), REPO, version, **{**settings, **options})


def state(hub):
    repo = hub.repos.get(("datasets", REPO))
    return repo and (repo.branches.get("main"), dict(repo.tags))


def check_release(hub, revision, version, rows):
    """Check that all of a release is at a revision, and nothing else."""
    tree = hub.repo(REPO).at(revision).tree
    manifest = Manifest.model_validate_json(hub.content(tree[MANIFEST]))
    assert manifest.version == version and "README.md" in tree
    listed = {shard.path: shard for split in manifest.splits.values() for shard in split.shards}
    assert {path for path in tree if path.startswith("data/")} == set(listed)
    found = {"train": [], "failures": []}
    for path, shard in sorted(listed.items()):
        data = hub.content(tree[path])
        assert len(data) == shard.bytes
        found[path.split("/")[1].split("-")[0]] += pq.read_table(io.BytesIO(data)).to_pylist()
    failed = [row["finish_reason"] == "error" for row in rows]
    assert sorted(r["id"] for r in found["train"]) == sorted(
        r["id"] for r, bad in zip(rows, failed, strict=True) if not bad
    )
    assert sorted(r["id"] for r in found["failures"]) == sorted(
        r["id"] for r, bad in zip(rows, failed, strict=True) if bad
    )


def check_old_or_new(hub, old, version, rows):
    """Check what is promised after any death: no third state is ever seen."""
    main, tags = old or (None, {})
    now = state(hub)
    if now is None:
        return
    repo = hub.repo(REPO)
    assert {name: now[1][name] for name in tags} == tags, "an old tag has moved"
    assert set(now[1]) - set(tags) <= {f"v{version}"}
    data = [path for path in (repo.at("main").tree if repo.at("main") else {}) if not path.startswith(".git")]
    if now[0] != main and not (main is None and not data):
        check_release(hub, "main", version, rows)
    if f"v{version}" in now[1]:
        check_release(hub, f"v{version}", version, rows)


@contextmanager
def dying(hub, number, after):
    """Let this process die at a request: before it is sent, or before its answer is read."""
    import httpx2
    import huggingface_hub

    send = httpx2.Client.send

    def sending(client, request, **options):
        if len(hub.requests) >= number and not after:
            raise Killed
        answer = send(client, request, **options)
        if len(hub.requests) > number:
            raise Killed
        return answer

    httpx2.Client.send = sending
    try:
        yield
    finally:
        httpx2.Client.send = send
        huggingface_hub.close_session()


def kill_at(hub, code, home, place, fault, ready=lambda: True):
    """Run code in a child that SIGKILL ends at a request to a place, once ready; the fault decides of the request."""

    def killing(request):
        if not request.path.endswith(place) or not ready():
            return None
        child.send_signal(signal.SIGKILL)
        child.wait()
        return fault

    hub.fault = killing
    environment = {**hub.environment(home / "child"), "PYTHONPATH": os.getcwd()}
    with open(home / "stderr", "wb") as file:
        child = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=file, stderr=file)
    code = child.wait(timeout=240)
    assert code == -signal.SIGKILL, (home / "stderr").read_text()
    with hub.lock:  # until the request is done with
        hub.fault = lambda request: None


def at(number, kind):
    """Return a fault at one request, the others being answered."""
    return lambda request: kind if request.number == number else None


class Scenario:
    """A push onto a Hub in a given state, to be repeated.

    Args:
        hub: The Hub.
        before: What is pushed first, as pairs of rows and version; then its state is kept.
        rows: What is pushed.
        version: As which version.
        all_rows: What the release then holds.
    """

    def __init__(self, hub, before, rows, version, all_rows=None):
        self.hub, self.rows, self.version, self.all_rows = hub, rows, version, all_rows or rows
        self.hub.repos.clear()
        for given, number in before:
            push(given, number)
        self.kept = copy.deepcopy(self.hub.repos)
        self.restore()
        push(rows, version)
        self.requests = len(self.hub.requests)
        check_release(hub, f"v{version}", version, self.all_rows)

    def restore(self):
        self.hub.repos = copy.deepcopy(self.kept)
        self.hub.requests.clear()
        self.hub.fault = lambda request: None

    def die(self, number, kind):
        """Push with a fault at a request; check what is left; push again and check the whole."""
        self.restore()
        old = state(self.hub)
        if kind.startswith("killed"):
            with dying(self.hub, number, kind.endswith("after")), pytest.raises(Killed):
                push(self.rows, self.version)
        else:
            self.hub.fault = at(number, kind)
            push(self.rows, self.version)  # one fault alone is survived without a rerun
        self.hub.fault = lambda request: None
        check_old_or_new(self.hub, old, self.version, self.all_rows)
        uploaded = self.hub.uploaded()
        push(self.rows, self.version)
        check_release(self.hub, "main", self.version, self.all_rows)
        check_release(self.hub, f"v{self.version}", self.version, self.all_rows)
        assert set(self.hub.repo(REPO).branches) == {"main"}
        return uploaded, self.hub.uploaded()


def scenarios(hub, count):
    """Yield a first release, one that replaces it and one that adds to it."""
    small, other, more = finished(4 * count), finished(4 * count, "run-b"), finished(4, first=400)
    yield "first", Scenario(hub, [], small, "1.0.0")
    yield "replace", Scenario(hub, [(small, "1.0.0")], other, "2.0.0")
    yield "append", Scenario(hub, [(small, "1.0.0")], more, "1.1.0", Dataset.from_list([*small, *more]))


def sweep(hub, count, step, offset=0, tell=lambda *_: None):
    """Let pushes die at every ``step``-th request. Returns how many died."""
    died = 0
    for name, scenario in scenarios(hub, count):
        tell(f"{name}: {scenario.requests} requests")
        for place in range(offset, scenario.requests * len(KINDS), step):
            number, kind = divmod(place, len(KINDS))
            try:
                scenario.die(number, KINDS[kind])
            except BaseException:
                requests = scenario.hub.requests[number : number + 1]
                tell(f"{name}: {KINDS[kind]} at request {number} {requests}")
                raise
            died += 1
    return died


@cache
def drawn_figures():
    from tessy_hf.report import figures

    statistics = Statistics()
    statistics.add(finished(8).with_format("arrow")[:])
    return {name: figures.image(name, statistics.summary(), kind="png") for name in figures.NAMES}


@contextmanager
def patched(monkeypatch):
    """Cut shards small, draw figures once, and let the client's own retries follow at once."""
    import huggingface_hub.utils._http as client

    from tessy_hf.report import figures

    drawn = drawn_figures()
    monkeypatch.setattr(figures, "image", lambda name, summary, kind: drawn[name])
    monkeypatch.setattr(shards, "BATCH_ROWS", 4)
    monkeypatch.setattr(client.time, "sleep", lambda seconds: None)
    yield


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=int, default=3)
    parser.add_argument("--step", type=int, default=1)
    given = parser.parse_args()
    disable_progress_bars()
    patch = pytest.MonkeyPatch()
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        with HubServer(home / "storage") as hub, clients_of(hub, home / "home", patch), patched(patch):
            begin = time.monotonic()
            died = sweep(hub, given.shards, given.step, tell=lambda *words: print(*words, flush=True))
            print(f"{died} deaths, all survived, in {time.monotonic() - begin:.0f} s")
    patch.undo()


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    sys.exit(main())
