"""From the examples to rows on the screen: trial runs, `tessy view`, `tessy status`, `tessy examples`."""

import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest

import tessy_hf
from tessy_hf import TessyTransform, demo
from tessy_hf.cli.main import for_command_line
from tessy_hf.run.journal import Journal
from tessy_hf.trajectory import Span
from tests.cli.test_cli import RECIPE
from tests.cli.test_cli import tessy as tessy  # noqa: PLC0414 - a fixture
from tests.test_transform import prompts, scripted

TRIAL = "max_thinking_tokens=20"


@pytest.mark.slow
def test_a_trial_keeps_its_rows_for_the_whole_run_and_says_so(tessy, tmp_path):
    demo.prompts(5, seed=8).to_json(tmp_path / "prompts.jsonl")
    out = tmp_path / "rows.parquet"
    words = ("synthesize", RECIPE, tmp_path / "prompts.jsonl", out, "--set", TRIAL)
    code, printed = tessy(*words, "--limit", "2")
    assert code == 0 and "TESSY: 2 rows to write (journal: " in printed and "2 rows in" in printed
    assert printed.count("Loading weights") == 1 and "teacher demo:teacher, student demo:student" in printed
    assert f"view: tessy view {out}" in printed and "0it" not in printed
    again = f"next: tessy synthesize {RECIPE} {words[2]} {out} --set {TRIAL}  (all rows; these are reused)"
    assert again in printed
    code, printed = tessy(*words)
    assert code == 0 and "2 of 5 rows are there already and are reused, 3 rows to write" in printed
    assert "5 rows finished, 0 failed, 2 of them before" in printed and "next: tessy push" in printed
    code, printed = tessy(*words[:3], tmp_path / "hot.parquet", "--set", "temperature=1", "--limit", "1")
    assert "has 5 rows of run" in printed and "settings.temperature (0.6, now 1" in printed


def test_a_trial_of_no_rows_is_refused(tessy, tmp_path):
    assert tessy("synthesize", RECIPE, "x.jsonl", tmp_path / "rows.parquet", "--limit", "0")[0] == 2


# --- looking at rows


@pytest.fixture
def journal(tmp_path):
    """A journal with two finished rows and one that is being written."""
    path = tmp_path / "rows.journal"
    with scripted(journal=str(path)) as transform:
        transform(prompts(2)[:])
    writer = Journal(path, transform.run_fingerprint)
    assert writer.claim("r2").status == "started"
    spans = [Span("student", "thinking", "okay so \x1b[2J"), Span("teacher", "thinking", "7 is odd")]
    writer.append("r2", spans, {"closed": False})
    writer.flush()
    yield path
    writer.close()


def test_rows_of_a_journal_are_shown_while_others_are_being_written(tessy, journal):
    code, printed = tessy("view", journal)
    assert code == 0 and "row r1 · stop" in printed and "user: What is 1?" in printed
    assert "row r2 · unfinished\n\nokay so \\x1b[2J«7 is odd»" in printed and "\x1b" not in printed
    assert "3 shown of 2 finished rows and 1 being written" in printed
    code, printed = tessy("view", journal, "--row", "r1")
    assert "row r1" in printed and "row r0" not in printed and "r2" not in printed
    assert "row r0" in tessy("view", journal, "--row", "0")[1]
    code, printed = tessy("view", journal, "--row", "none")
    assert code == 2 and "has no row none. Pass an id, or a number from 0 on." in printed


def test_a_file_of_rows_is_shown_up_to_a_limit(tessy, journal, tmp_path):
    tessy("export", journal, tmp_path / "rows.jsonl")
    code, printed = tessy("view", tmp_path / "rows.jsonl", "-n", "1")
    assert code == 0 and "row r0" in printed and "row r1" not in printed
    assert "1 shown of 2 finished rows; --limit shows more, --row ID one" in printed


def test_a_report_reads_a_journal(tessy, journal, tmp_path):
    pytest.importorskip("matplotlib")
    code, printed = tessy("report", journal, "--out", tmp_path / "report.html")
    assert code == 0 and "2 rows in" in printed


# --- which journals there are


def test_status_lists_all_journals_with_what_differs(tessy, tmp_path, monkeypatch):
    monkeypatch.setattr("tessy_hf.cli.rows.Path.cwd", lambda: tmp_path)
    assert "No journals here, below, or in the default place" in tessy("status")[1]
    (tmp_path / "below").mkdir()
    (tmp_path / "other.db").write_text("not a journal")
    for place, seed in ((str(tmp_path / "below" / "one.journal"), 1), ("auto", 2)):
        with scripted(journal=place, seed=seed) as transform:
            transform(prompts(3)[:])
    code, printed = tessy("status")
    lines = printed.splitlines()
    assert code == 0 and "below/one.journal" in lines and f"tessy/{transform.run_fingerprint}.journal" in printed
    for line in ("student-only: scripted, begun 20", "3 of 3 rows done (100%); last written 20"):
        assert printed.count(line) == 2
    assert "  differs in: seed=1" in lines and "  differs in: seed=2" in lines


@pytest.mark.slow
def test_status_names_the_recipe_file(tessy, tmp_path, monkeypatch):
    monkeypatch.setattr("tessy_hf.cli.rows.Path.cwd", lambda: tmp_path)
    demo.prompts(1, seed=8).to_json(tmp_path / "prompts.jsonl")
    tessy("synthesize", RECIPE, tmp_path / "prompts.jsonl", tmp_path / "rows.parquet", "--set", TRIAL)
    assert "  tessy.yaml, tessy: demo:teacher → demo:student, begun 20" in re.sub(r"  \w{16}", "", tessy("status")[1])


def test_a_transform_remembers_its_recipe_file(tmp_path):
    path = tmp_path / "pair.yaml"
    path.write_text("method: student-only\nstudent: {model: demo:student}\n")
    transform = pickle.loads(pickle.dumps(TessyTransform.from_yaml(path))).with_settings(seed=1)
    assert transform.record().recipe == "pair.yaml"  # of folders elsewhere only the last name
    assert TessyTransform(student="demo:student", method="student-only").record().recipe is None


# --- examples, and words


def test_examples_are_listed_and_copied_with_their_prompts(tessy, tmp_path):
    code, printed = tessy("examples")
    assert code == 0 and "miniature\n  demo:teacher → demo:student; any CPU" in printed and "cluster/slurm" in printed
    code, printed = tessy("examples", "miniature", tmp_path)
    assert (
        code == 0 and f"next: tessy synthesize {tmp_path / 'miniature.yaml'} {tmp_path / 'prompts.jsonl'}" in printed
    )
    assert len([json.loads(line) for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]) == 60
    code, printed = tessy("examples", "miniature", tmp_path)
    assert code == 2 and "miniature.yaml" in printed and "is there already" in printed
    code, printed = tessy("examples", "miniature", tmp_path / "prompts.jsonl")
    assert code == 2 and "prompts.jsonl cannot be used: File exists. Pass another path" in " ".join(printed.split())
    code, printed = tessy("examples", "miniatur")
    assert code == 2 and "Did you mean 'miniature'?" in printed


def test_the_version_is_printed(tessy):
    assert tessy("--version") == (0, f"tessy-hf {tessy_hf.__version__}\n")


def test_completion_can_be_installed(tessy):
    assert "--install-completion" in tessy("--help")[1]


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("Pass for instance chunk_tokens=20.", "Pass for instance --set chunk_tokens=20."),
        ("or pass id_column=None to", "or pass --set id_column=null to"),
        ("Setting seed='x' cannot be used", "Setting seed='x' cannot be used"),
        ("Pass teacher=Speaker(engine, boundary=...) with a", "Pass --set teacher.boundary=... with a"),
        ("Pass BoundaryPredictor(..., label_shift=0) for", "Pass --set AUTHOR.boundary.label_shift=0 for"),
        ("keeps the text: Speaker(..., chat_template=...).", "keeps the text: --set AUTHOR.chat_template=...."),
        ("Pass ServerEngine(..., tokenizer=) with", "Pass --set AUTHOR.options.tokenizer= with"),
        ("Pass prompts= (--prompts)", "Pass prompts= (--prompts)"),
    ],
)
def test_errors_on_the_command_line_speak_of_set(said, shown):
    assert for_command_line(said) == shown


PAGE = Path(__file__).parents[2] / "docs" / "guides" / "first-rows.md"
LED = ("TESSY:", "next:", "view:", "row ", "tessy:", "teacher share")


def leads(text):
    """The lines that say what happens, without numbers and places."""
    lines = [re.sub(r"(~|/)\S*/|\d[\d,.]*|\b[0-9a-f]{16}\b", "#", line.strip()) for line in text.splitlines()]
    return [line for line in lines if line.startswith(LED) or " rows" in line]


@pytest.mark.slow
def test_the_commands_of_the_page_print_what_it_shows(tmp_path):
    """All of them one after the other in an empty folder, as a reader types them."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(PAGE.parents[2]),
        "HF_HOME": str(tmp_path / "home"),
        "COLUMNS": "300",
    }
    (tmp_path / "bin").mkdir()
    tessy = tmp_path / "bin" / "tessy"
    tessy.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m tessy_hf.cli.main "$@"\n')
    tessy.chmod(0o755)
    environment |= {"PATH": f"{tessy.parent}:{environment['PATH']}", "HF_HOME": str(tmp_path / "home")}
    for block in re.findall(r"```console\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL):
        for step in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, expected = step.partition("\n")
            done = subprocess.run(
                command, shell=True, cwd=tmp_path, env=environment, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )  # fmt: skip
            assert done.returncode == 0, done.stdout
            assert [line for line in leads(expected) if line not in leads(done.stdout)] == [], done.stdout
