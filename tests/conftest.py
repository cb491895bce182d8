import os
from collections import Counter

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # on Linux: Ray uses nothing but 127.0.0.1

import datasets
import pytest
from hypothesis import HealthCheck, settings

from tests.hub_server import READ_TOKEN, WRITE_TOKEN, HubServer, clients_of
from tests.second_hub import SecondHub
from tests.worlds import TOKENIZERS, make_tokenizer

settings.register_profile("tessy", deadline=None, suppress_health_check=list(HealthCheck))
settings.load_profile("tessy")
datasets.disable_progress_bars()


@pytest.fixture(autouse=True)
def no_shared_cache(tmp_path_factory, monkeypatch):
    """Keep each test's `datasets` cache and journals to itself."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("hub") / "datasets")


@pytest.fixture(params=["hub", "second_hub"])
def hub(request, tmp_path, monkeypatch):
    """A Hub on loopback that this process' clients speak to; each of the two that were written apart."""
    tokens = {WRITE_TOKEN: "write", READ_TOKEN: "read"}
    server = HubServer(tmp_path / "storage") if request.param == "hub" else SecondHub(tokens)
    with server, clients_of(server, tmp_path / "home", monkeypatch):
        yield server


@pytest.fixture(scope="session", params=sorted(TOKENIZERS))
def tokenizer(request):
    """One tokenizer of each kind the field uses."""
    return make_tokenizer(request.param)


def pytest_terminal_summary(terminalreporter):
    """Say at the end how many tests were skipped, and why."""
    reports = terminalreporter.stats.get("skipped", [])
    reasons = Counter(str(report.longrepr[2]).removeprefix("Skipped: ") for report in reports)
    if reasons:
        terminalreporter.section("skipped")
    for reason, number in reasons.most_common():
        terminalreporter.write_line(f"{number:5} {reason}")
