"""How `tessy synthesize` ends: a summary, an exit code, and where it was stopped what is kept."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tessy_hf import demo
from tessy_hf.cli.ending import most_failures
from tessy_hf.errors import SettingsError
from tessy_hf.run.progress import Summary
from tests.cli.test_cli import tessy as tessy  # noqa: PLC0414 - a fixture
from tests.engines.servers import THINK, VOCABULARY, FakeServer, hang

PROJECT = Path(__file__).parents[2]


def write_files(folder, server, rows=8, **settings):
    """Write a recipe that asks a server, and prompts; return their paths and that of the output."""
    options = {"base_url": server, "tokenizer": str(demo.STUDENT), "retry_timeout": 5}
    speaker = {"engine": "server", "model": "student", "options": options}
    journal = {"journal": str(folder / "rows.journal")}
    recipe = {
        "method": "student-only",
        "id_column": "id",
        **journal,
        **settings,
        "teacher": speaker,
        "student": speaker,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    given = [{"id": f"r{i}", "prompt": f"calc {i} + 1 ="} for i in range(rows)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given))
    return folder / "recipe.yaml", folder / "prompts.jsonl", folder / "rows.parquet"


def refusing(*numbers, code=400):
    """Refuse the rows of these numbers, in words of their own."""

    def answer(handler, body):
        ids = body["token_ids"] if "token_ids" in body else body["prompt"]
        told = VOCABULARY.decode(ids).split() if THINK in ids else []
        number = next((word for word in told if word.isdigit()), "")
        if number in map(str, numbers):
            handler.reply({"error": {"message": f"no answer to '{number}', ever"}}, code)
        else:
            handler.answer(body)

    return {"/v1/completions": answer, "/inference/v1/generate": answer}


def test_a_run_without_failures_ends_with_its_sums_and_the_next_command(tessy, tmp_path):
    with FakeServer() as server:
        files = write_files(tmp_path, server.url)
        code, printed = tessy("synthesize", *files)
        assert code == 0 and "8 rows finished, 0 failed\n" in printed and "8 rows in" in printed
        assert "teacher share of tokens 0%, " in printed and " tokens/s" in printed
        assert f"journal: {tmp_path / 'rows.journal'}\nnext: tessy push {files[2]} user/name" in printed
        files[2].unlink()
        assert "8 rows finished, 0 failed, 8 of them before" in tessy("synthesize", *files)[1]


def test_failed_rows_are_told_and_counted_against_those_allowed(tessy, tmp_path):
    with FakeServer(paths=refusing(2, 5, 6)) as server:
        files = write_files(tmp_path, server.url)
        code, printed = tessy("synthesize", *files)
        assert code == 1 and "5 rows finished, 3 failed" in printed
        assert "first error: The server at" in printed and "most frequent error (3 of 3): the same" in printed
        assert "3 of 8 rows failed for good; --allow-failures 0." in printed and files[2].exists()
        assert f"next: tessy synthesize {files[0]} {files[1]} {files[2]} --set max_attempts=6" in printed
        for allowed, expected in (("2", 1), ("3", 0), ("37.4%", 1), ("38%", 0)):
            files[2].unlink()
            assert tessy("synthesize", *files, "--allow-failures", allowed)[0] == expected


def test_rows_refused_for_their_prompts_count_apart(tessy, tmp_path):
    with FakeServer(models=[{"id": "student", "max_model_len": 60}]) as server:
        files = write_files(tmp_path, server.url, rows=3, max_thinking_tokens=20, max_answer_tokens=5)
        with files[1].open("a") as lines:
            lines.write(json.dumps({"id": "empty", "prompt": ""}) + "\n")
            lines.write(json.dumps({"id": "long", "prompt": "calc 1 + 1 = " * 60}) + "\n")
        code, printed = tessy("synthesize", *files)
    assert code == 0 and "3 rows finished, 0 failed, 2 refused for their prompts" in printed
    assert "first refusal: Row 'long': the prompt has" in printed and "first error" not in printed


def test_a_server_that_is_gone_ends_the_run_with_what_is_kept(tessy, tmp_path):
    with FakeServer(paths=refusing(2, code=503)) as server:
        files = write_files(tmp_path, server.url, rows=4, rows_in_flight=1)
        code, printed = tessy("synthesize", *files, "--set", "teacher.options.retry_timeout=0.3")
    assert code == 2 and "TESSY: stopped: 2 rows finished, 0 failed" in printed and not files[2].exists()
    assert f"kept in {tmp_path / 'rows.journal'}; to go on: tessy synthesize {files[0]}" in printed
    assert "EngineDeadError: 'student' did not answer row 'r2'" in printed and "Traceback" not in printed


@pytest.mark.slow
@pytest.mark.parametrize("journal", [True, False])
def test_ctrl_c_says_what_is_kept_and_how_to_go_on(tmp_path, journal):
    asked = 0

    def answer(handler, body):
        nonlocal asked
        asked += THINK in body["token_ids"]
        if asked < 8:
            handler.answer(body)
        else:
            os.kill(running.pid, signal.SIGINT)
            hang(handler, body)

    with FakeServer(paths={"/inference/v1/generate": answer}) as server:
        files = write_files(tmp_path, server.url, rows=9, rows_in_flight=1, **({} if journal else {"journal": None}))
        command = [sys.executable, "-c", "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "]
        command[-1] += "from tessy_hf.cli.main import main; main()"
        running = subprocess.Popen(
            [*command, "synthesize", *map(str, files)],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(PROJECT), "HF_HUB_OFFLINE": "1"},
        )
        printed = running.communicate(timeout=120)[1]
    assert running.returncode == 130 and "Traceback" not in printed and not files[2].exists()
    kept = (
        f"half-written are kept in {tmp_path / 'rows.journal'}; to go on: " if journal else "Nothing is kept: the run"
    )
    assert "TESSY: stopped: " in printed and kept in printed


def test_failures_are_allowed_by_number_or_share():
    assert [most_failures(allowed, 200) for allowed in ("0", "12", "5%", "0.5%")] == [0, 12, 10, 1]
    for wrong in ("", "-1", "0.05", "many", "5 %", "%"):
        with pytest.raises(SettingsError, match="neither a number nor a share"):
            most_failures(wrong, 200)


def row(reason="stop", error=None, teacher=3, student=1):
    return {"finish_reason": reason, "error": error, "teacher_tokens": teacher, "student_tokens": student}


def test_errors_that_differ_in_names_and_numbers_only_are_of_one_kind():
    summary = Summary(seconds=2.0)
    summary.add(row("error", "Row 'a': the server broke", 0, 0), "written")
    for number in range(3):
        summary.add(row("error", f"Row 'b{number}' got nothing within {number} s", 0, 0), "written")
    summary.add(row("error", "Row 'c': no text", 0, 0), "refused")
    summary.add(row("length"), "found")
    summary.add(row(), "written")
    assert str(summary).splitlines() == [
        "2 rows finished, 4 failed, 1 of them before, 1 refused for their prompts",
        "teacher share of tokens 75%, 2 tokens/s",
        "first error: Row 'a': the server broke",
        "most frequent error (3 of 4): Row 'b0' got nothing within 0 s",
        "first refusal: Row 'c': no text",
    ]
