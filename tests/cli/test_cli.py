"""The `tessy` command, as a person types it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from datasets import load_dataset

from tessy_hf import demo
from tessy_hf.boundary.predictor import is_shipped
from tessy_hf.cli import main as cli
from tessy_hf.rows import run_record
from tests.boundary_training.bases import make_base
from tests.engines.servers import FakeServer
from tests.test_transform import prompts, scripted
from tests.worlds import TEXT, make_tokenizer

RECIPE = Path(__file__).parents[2] / "recipes" / "miniature" / "tessy.yaml"


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
    assert code == 2 and "holds 2 runs" in printed and "--run" in printed
    code, printed = tessy("export", journal, tmp_path / "rows.parquet", "--run", transform.run_fingerprint)
    assert code == 0 and "2 rows in" in printed
    assert tessy("export", journal, tmp_path / "rows.parquet", "--run", "none")[0] == 2


def test_an_output_is_checked_before_anything_is_read_or_written(tessy, tmp_path, monkeypatch):
    """Whatever is wrong with it, no model is loaded; and what is there stays."""
    demo.prompts(3, seed=8).to_json(tmp_path / "prompts.jsonl")
    monkeypatch.setattr("tessy_hf.transform.Run", None)
    (tmp_path / "mine.parquet").write_text("mine")
    (tmp_path / "folder.jsonl").mkdir()
    for out, why in [
        (tmp_path / "prompts.jsonl", "is read as an input"),
        (tmp_path / "mine.parquet", "is there already, and it has no rows of a run"),
        (tmp_path / "folder.jsonl", "is no file"),
        (tmp_path / "mine.parquet" / "rows.jsonl", "cannot be written"),
        (tmp_path / "rows.csv", "neither .parquet nor .jsonl"),
        ("s3://bucket/rows.parquet", "not a local path"),
    ]:
        code, printed = tessy("synthesize", RECIPE, tmp_path / "prompts.jsonl", out)
        assert code == 2 and why in " ".join(printed.split()) and "Traceback" not in printed
    assert (tmp_path / "mine.parquet").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.jsonl", "mine.parquet", "prompts.jsonl"]


@pytest.mark.slow
def test_a_trial_is_followed_by_the_whole_run_and_never_the_other_way_round(tessy, tmp_path):
    demo.prompts(6, seed=8).to_json(tmp_path / "prompts.jsonl")
    demo.prompts(6, seed=9).to_json(tmp_path / "others.jsonl")
    out = tmp_path / "rows.jsonl"

    def run(*words, given="prompts.jsonl"):
        code, printed = tessy("synthesize", RECIPE, tmp_path / given, out, *words)
        return code, " ".join(printed.split())

    assert run("--split", "train[:2]")[0] == 0 and run()[0] == 0 and run()[0] == 0
    whole = out.read_bytes()
    assert len(whole.splitlines()) == 6
    for words, given, why in [
        (("--split", "train[:2]"), "prompts.jsonl", "4 of its 6 rows answer prompts that are not among these"),
        ((), "others.jsonl", "6 of its 6 rows"),
        (("--set", "temperature=0.1"), "prompts.jsonl", "is of run"),
    ]:
        code, printed = run(*words, given=given)
        assert code == 2 and why in printed and "--overwrite" in printed and out.read_bytes() == whole
    assert run("--overwrite", given="others.jsonl")[0] == 0 and out.read_bytes() != whole


def test_an_export_is_replaced_by_more_rows_only(tessy, tmp_path):
    journals = [tmp_path / name for name in ("one.journal", "two.journal")]
    for journal, first in zip(journals, (0, 3), strict=True):
        with scripted(journal=str(journal)) as transform:
            transform(prompts(9).select(range(first, 6))[:])
    out = tmp_path / "rows.parquet"
    assert tessy("export", journals[1], out)[0] == 0 == tessy("export", journals[0], out)[0]
    code, printed = tessy("export", journals[1], out)
    assert code == 2 and "3 of its 6 rows answer prompts" in " ".join(printed.split())
    assert tessy("export", journals[1], out, "--overwrite")[0] == 0
    assert run_record.read(out).fingerprint == transform.run_fingerprint


def test_mistakes_end_in_a_sentence(tessy, tmp_path):
    for words, told in [
        (("status", tmp_path / "no.journal"), "There is no journal at"),
        (("export", tmp_path / "no.journal", tmp_path / "rows.txt"), "neither .parquet nor .jsonl"),
        (("synthesize", tmp_path / "no.yaml", "x.jsonl", tmp_path / "rows.parquet"), "cannot be read"),
    ]:
        code, printed = tessy(*words)
        assert code == 2 and told in " ".join(printed.split()) and "Traceback" not in printed


# --- boundary predictors

SPANS = RECIPE.parent.parent.parent / "dataset_cards" / "style-spans" / "train.jsonl"


def some_spans(folder, n):
    """A file with the first of the marked segments."""
    lines = SPANS.read_text("utf-8").split("\n")[:n]
    (folder / "spans.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    return folder / "spans.jsonl"


@pytest.mark.slow
def test_a_predictor_is_trained_and_measured_by_two_commands(tessy, tmp_path):
    make_base([TEXT] * 9, tmp_path / "base", steps=2)
    (tmp_path / "recipe.yaml").write_text(f"base: {tmp_path / 'base'}\ndata: {some_spans(tmp_path, 60)}\nepochs: 1\n")
    code, printed = tessy("train-boundary", tmp_path / "recipe.yaml", tmp_path / "model")
    assert code == 0 and "The predictor is in" in printed and "gpt-oss" in printed
    code, printed = tessy(
        "evaluate-boundary", tmp_path / "model", "--data", tmp_path / "spans.jsonl", "--plot", tmp_path / "plot.png"
    )
    assert code == 0 and "begins as teacher" in printed and (tmp_path / "plot.png").stat().st_size > 9999


@pytest.mark.slow
def test_an_evaluation_as_json_is_one_object_and_nothing_else(tmp_path):
    found = subprocess.run(
        [sys.executable, "-m", "tessy_hf.cli.main", "evaluate-boundary", demo.BOUNDARY_STUDENT, "--json", "--data"]
        + [some_spans(tmp_path, 8)],
        env={**os.environ, "PYTHONPATH": str(RECIPE.parent.parent.parent), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    told = json.loads(found.stdout)
    assert {"char_f1", "char_f1_by_family", "span_f1", "boundary_within_1_word"} < told.keys()
    assert told["char_f1_by_family"].keys() == {"gpt-oss", "qwen3"} and told["overall"]["segments"] == 8


@pytest.mark.slow
@pytest.mark.skipif(not is_shipped(), reason="the small predictor is not here")
def test_the_small_predictor_is_measured_where_none_is_named(tessy, tmp_path):
    code, printed = tessy("evaluate-boundary", "--data", SPANS, "--json")
    told, _ = json.JSONDecoder().raw_decode(printed[printed.index("{") :])  # the error stream comes after it
    assert code == 0 and told["char_f1"] > 0.88


def write_traces(path, n):
    """Write a file of reasoning traces."""
    says = (f"okay so {i} + 1 = {i + 1} . wait is that right ? yes " * 3 for i in range(n))
    path.write_text("".join(json.dumps({"id": f"t{i}", "thinking": text}) + "\n" for i, text in enumerate(says)))


@pytest.mark.slow
def test_traces_are_annotated_by_a_recipe(tessy, tmp_path):
    write_traces(tmp_path / "traces.jsonl", 3)
    (tmp_path / "recipe.yaml").write_text(
        f"annotator: {{engine: transformers, model: {demo.STUDENT}}}\nwords: 20\nmax_thinking_tokens: 20\n"
    )
    code, printed = tessy(
        "annotate", tmp_path / "recipe.yaml", tmp_path / "traces.jsonl", tmp_path / "out", "--limit", 2
    )
    assert code == 0 and "0 segments in" in printed  # the miniature student can count, but not annotate
    assert len((tmp_path / "out" / "answers.jsonl").read_text().splitlines()) == 2


def mark_style(tokenizer, style="okay so|wait"):
    """Answer at /v1/completions as a harmony model does that thinks a little, then marks what it knows as style."""

    def answer(handler, body):
        prompt = tokenizer.decode(body["prompt"])
        segment = prompt.split("<input_text>")[-1].split("</input_text>")[0]
        quotes = json.dumps(re.findall(style, segment))
        answers = "<|channel|>final<|message|>" in prompt.split("</input_text>")[-1]
        ids = tokenizer.encode(f"{quotes}<|return|>" if answers else "I see .<|end|>")
        reason = "stop" if len(ids) <= body["max_tokens"] else "length"
        handler.reply({"choices": [{"token_ids": ids[: body["max_tokens"]], "finish_reason": reason}]})

    return answer


def test_the_annotation_recipe_works_with_any_openai_compatible_server(tessy, tmp_path):
    tokenizer = make_tokenizer("harmony")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    recipe = yaml.safe_load((RECIPE.parent.parent / "boundary" / "annotate.yaml").read_text())
    served = {"id": recipe["annotator"]["model"], "max_model_len": 8192}
    write_traces(tmp_path / "traces.jsonl", 3)
    paths = {"/v1/completions": mark_style(tokenizer)}
    with FakeServer(ways=("ids",), models=[served], paths=paths, tokenize=tokenizer.encode) as server:
        options = {"base_url": server.url, "tokenizer": str(tmp_path / "tokenizer")}
        recipe["annotator"]["options"] = options  # no Hub here
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        code, printed = tessy("annotate", tmp_path / "recipe.yaml", tmp_path / "traces.jsonl", tmp_path / "out")
        asked = [tokenizer.decode(body["prompt"]) for path, body, _ in server.requests if path == "/v1/completions"]
    assert code == 0 and "3 segments in" in printed and "accepted" in printed
    assert all("Reasoning: low" in prompt for prompt in asked if "<input_text>" in prompt)
    rows = load_dataset(str(tmp_path / "out"), split="train")
    assert {span["text"] for row in rows for span in row["style_spans"]} == {"okay so", "wait"}


def test_mistakes_about_predictors_end_in_a_sentence(tessy, tmp_path):
    (tmp_path / "recipe.yaml").write_text("epochs: 1\n")
    (tmp_path / "list.yaml").write_text("[1]\n")
    for words, told in [
        (("train-boundary", tmp_path / "recipe.yaml", tmp_path / "out"), "names no `data`"),
        (("train-boundary", tmp_path / "none.yaml", tmp_path / "out"), "cannot be read"),
        (("train-boundary", tmp_path / "list.yaml", tmp_path / "out"), "settings by name"),
        (("annotate", tmp_path / "recipe.yaml", SPANS, tmp_path / "out"), "invalid at annotator"),
        (("evaluate-boundary", "--data", tmp_path / "none.jsonl"), "none.jsonl"),
        (("evaluate-boundary", demo.STUDENT, "--data", SPANS), "not a token classifier"),
        (("push-boundary", tmp_path, "me/model"), "could be loaded"),
    ]:
        code, printed = tessy(*words)
        assert code == 2 and told in " ".join(printed.split()) and "Traceback" not in printed
