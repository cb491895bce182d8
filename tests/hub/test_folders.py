"""A report becomes a static Space beside its dataset."""

import pytest
import yaml

from tessy_hf import demo
from tessy_hf.errors import HubError
from tessy_hf.hub.folders import push_space
from tests.cli.test_cli import tessy  # noqa: F401 - a fixture
from tests.finished import finished

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")]


def test_a_report_is_pushed_as_a_space_beside_the_dataset(hub, tessy, tmp_path):  # noqa: F811
    finished(12).to_parquet(tmp_path / "rows.parquet")
    code, _ = tessy("report", tmp_path / "rows.parquet", "--space", tmp_path / "space", "--tokenizer", demo.STUDENT)
    assert code == 0
    words = ("push", tmp_path / "rows.parquet", "ada/rows", "--space", tmp_path / "space")
    for _ in range(2):  # the same again is no commit
        code, printed = tessy(*words)
        assert code == 0 and f"{hub.endpoint}/spaces/ada/rows" in printed, printed
    repo = hub.repos["spaces", "ada/rows"]
    assert {"README.md", "index.html"} <= set(repo.at("main").tree) and len(repo.commits) == 2
    head = yaml.safe_load((tmp_path / "space" / "README.md").read_text().split("---")[1])
    assert head["sdk"] == "static" and head["app_file"] == "index.html"


def test_a_folder_without_a_space_is_refused_before_anything_is_pushed(hub, tessy, tmp_path):  # noqa: F811
    finished(4).to_parquet(tmp_path / "rows.parquet")
    code, printed = tessy("push", tmp_path / "rows.parquet", "ada/rows", "--space", tmp_path)
    assert code == 2 and "holds no Space" in " ".join(printed.split()) and not hub.repos
    with pytest.raises(HubError, match="holds no Space"):
        push_space(tmp_path, "ada/rows")
