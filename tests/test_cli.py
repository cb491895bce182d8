"""The `tessy` command, as a person types it."""

from pathlib import Path

import pytest
from datasets import load_dataset

from tessy_hf import cli, demo
from tests.test_transform import prompts, scripted

RECIPE = Path(__file__).parent.parent / "recipes" / "miniature" / "tessy.yaml"


@pytest.fixture
def tessy(monkeypatch, capsys):
    """Run the command with some words; return its exit code and what it printed."""

    def run(*words):
        monkeypatch.setattr("sys.argv", ["tessy", *map(str, words)])
        monkeypatch.chdir(RECIPE.parent.parent.parent)
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        printed = capsys.readouterr()
        return stopped.value.code or 0, printed.out + printed.err

    return run


def test_a_recipe_turns_a_file_of_prompts_into_a_file_of_rows(tessy, tmp_path):
    demo.prompts(6, seed=8).to_json(tmp_path / "prompts.jsonl")
    code, printed = tessy("synthesize", RECIPE, tmp_path / "prompts.jsonl", tmp_path / "rows.parquet")
    assert code == 0 and "6 rows in" in printed
    rows = load_dataset("parquet", data_files=str(tmp_path / "rows.parquet"), split="train")
    assert [row["id"] for row in rows] == demo.prompts(6, seed=8)["id"]
    assert sum(map(demo.verify, rows)) >= 5


def test_status_and_export_read_a_journal(tessy, tmp_path):
    journal = tmp_path / "rows.journal"
    with scripted(journal=str(journal)) as transform:
        transform(prompts(5)[:])
    code, printed = tessy("status", journal)
    assert code == 0 and transform.run_fingerprint in printed and "5" in printed
    code, printed = tessy("export", journal, tmp_path / "rows.jsonl")
    assert code == 0 and "5 rows in" in printed
    rows = load_dataset("json", data_files=str(tmp_path / "rows.jsonl"), split="train")
    assert rows["key"] == [f"r{i}" for i in range(5)]
    assert rows["answer"][3] == "the answer is r3 ."


def test_a_journal_of_several_runs_wants_to_know_which(tessy, tmp_path):
    journal = tmp_path / "rows.journal"
    for temperature in (0.5, 0.6):
        with scripted(journal=str(journal), temperature=temperature) as transform:
            transform(prompts(2)[:])
    code, printed = tessy("export", journal, tmp_path / "rows.parquet")
    assert code == 1 and "holds 2 runs" in printed and "--run" in printed
    code, printed = tessy("export", journal, tmp_path / "rows.parquet", "--run", transform.run_fingerprint)
    assert code == 0 and "2 rows in" in printed
    assert tessy("export", journal, tmp_path / "rows.parquet", "--run", "none")[0] == 1


def test_mistakes_end_in_a_sentence(tessy, tmp_path):
    for words, told in [
        (("status", tmp_path / "no.journal"), "There is no journal at"),
        (("export", tmp_path / "no.journal", tmp_path / "rows.txt"), "neither .parquet nor .jsonl"),
        (("synthesize", tmp_path / "no.yaml", "x.jsonl", tmp_path / "rows.parquet"), "cannot be read"),
    ]:
        code, printed = tessy(*words)
        assert code == 1 and told in " ".join(printed.split()) and "Traceback" not in printed
