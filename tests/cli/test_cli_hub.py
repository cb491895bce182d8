"""`tessy push`, `show`, `diff`, and a release made again, as a person types them."""

import shlex

import pytest
from datasets import load_dataset

from tessy_hf import demo
from tests.cli.test_cli import RECIPE, tessy  # noqa: F401 - a fixture

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")


@pytest.mark.slow
def test_a_run_is_released_shown_and_made_again(hub, tessy, tmp_path):  # noqa: F811
    demo.prompts(6, seed=8).push_to_hub("ada/prompts")
    journal = tmp_path / "rows.journal"
    given = ["synthesize", RECIPE, "ada/prompts", tmp_path / "rows.parquet", "--set", f"journal={journal}"]
    assert tessy(*given, "--set", "max_attempts=1")[0] == 0

    code, printed = tessy("push", journal, "ada/rows", "--license", "mit")
    assert code == 2 and "--prompts" in printed
    code, printed = tessy("push", journal, "ada/rows", "--license", "mit", "--prompts", "ada/prompts")
    assert code == 0 and "making the side branch tessy-v1.0.0" in printed and "6 rows, 0 failed" in printed
    assert "on main, in one commit" in printed and "ada/rows@v1.0.0 is released" in printed

    code, printed = tessy("show", "ada/rows@v1.0.0")
    assert code == 0 and "demo:teacher" in printed and "temperature=0.6" in printed
    command = next(line for line in printed.splitlines() if line.startswith("tessy synthesize"))
    commit = hub.repo("ada/prompts").branches["main"]
    assert shlex.split(command) == ["tessy", "synthesize", "ada/rows@v1.0.0", f"ada/prompts@{commit}", "rows.parquet"]

    again = [tmp_path / "again.parquet" if word == "rows.parquet" else word for word in shlex.split(command)[1:]]
    assert tessy(*again, "--set", "journal=null")[0] == 0
    made = load_dataset("parquet", data_files=str(tmp_path / "again.parquet"), split="train")
    released = load_dataset("ada/rows", revision="v1.0.0", split="train")
    assert made["messages"] == released["messages"] and made["spans"] == released["spans"]

    for rows in (
        ("push", journal, "ada/rows", "--prompts", "ada/prompts"),
        ("push", tmp_path / "rows.parquet", "ada/rows"),
    ):
        assert "there already" in tessy(*rows)[1]
    push = ("push", tmp_path / "rows.parquet", "ada/rows", "--version", "2.0.0", "--recipe", RECIPE)
    code, printed = tessy(*push, "--set", "temperature=0.1")
    assert code == 2 and "the manifest or recipe is of" in " ".join(printed.split())
    code, printed = tessy(*push)
    assert code == 0 and "6 rows" in printed
    code, printed = tessy("diff", "ada/rows", "v1.0.0", "v2.0.0")
    assert code == 0 and "mit" in printed and "source" not in printed
    code, printed = tessy("show", "ada/rows@v2.0.0", "--json")
    assert code == 0 and '"schema_version": 1' in printed


def test_mistakes_end_in_a_sentence(hub, tessy, tmp_path):  # noqa: F811
    for words, told in [
        (("push", tmp_path / "no.journal", "ada/rows"), "There is no journal at"),
        (("show", "ada/none@v1.0.0"), "There is no dataset ada/none"),
        (("diff", "ada/none", "v1.0.0", "v1.1.0"), "There is no dataset ada/none"),
        (("synthesize", "ada/none@v1.0.0", "x.jsonl", tmp_path / "rows.parquet"), "There is no dataset ada/none"),
        (("synthesize", RECIPE, "x.jsonl", tmp_path / "rows.parquet", "--set", "nothing"), "is not an override"),
    ]:
        code, printed = tessy(*words)
        assert code == 2 and told in " ".join(printed.split()) and "Traceback" not in printed
