"""A report becomes a static Space beside its dataset."""

import pytest
import yaml

from tessy_hf import demo
from tessy_hf.errors import HubError
from tessy_hf.hub.folders import push_space
from tests.cli.test_cli import tessy  # noqa: F401 - a fixture
from tests.finished import finished
from tests.hub_server import HubServer, clients_of
from tests.second_hub import SecondHub

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")]


@pytest.fixture(params=[HubServer, SecondHub])
def hub(request, tmp_path, monkeypatch):
    first = request.param is HubServer
    server = HubServer(tmp_path / "storage") if first else SecondHub()
    with server, clients_of(server, tmp_path / "home", monkeypatch, **({} if first else {"token": "hf_writes"})):
        yield server


def test_a_report_is_pushed_as_a_space_beside_the_dataset(hub, tessy, tmp_path):  # noqa: F811
    finished(12).to_parquet(tmp_path / "rows.parquet")
    code, _ = tessy("report", tmp_path / "rows.parquet", "--space", tmp_path / "space", "--tokenizer", demo.STUDENT)
    assert code == 0
    name = "ada/rows" if isinstance(hub, HubServer) else "ann/rows"
    words = ("push", tmp_path / "rows.parquet", name, "--space", tmp_path / "space")
    for _ in range(2):  # the same again is no commit
        code, printed = tessy(*words)
        assert code == 0 and f"{hub.endpoint}/spaces/{name}" in printed, printed
    repo = hub.repos["spaces", name]
    tree = repo.at("main").tree if isinstance(hub, HubServer) else repo.tree("main")
    assert {"README.md", "index.html"} <= set(tree) and len(repo.commits) == 2
    head = yaml.safe_load((tmp_path / "space" / "README.md").read_text().split("---")[1])
    assert head["sdk"] == "static" and head["app_file"] == "index.html"


def test_a_folder_without_a_space_is_refused(tmp_path):
    with pytest.raises(HubError, match="holds no Space"):
        push_space(tmp_path, "ada/rows")
