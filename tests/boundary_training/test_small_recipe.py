"""The recipe of the shipped predictor runs from end to end, and the same command makes the same weights."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from tests.boundary_training.bases import make_base

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "boundary" / "small"
HELD_OUT = set((RECIPE / "held_out_problems.txt").read_text("utf-8").split())


@pytest.fixture(scope="module")
def segments():
    """A few published segments, some of them on held-out problems."""
    lines = (ROOT / "dataset_cards" / "style-spans" / "train.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    held_out = [row for row in rows if row["problem_id"] in HELD_OUT]
    return [*held_out[:6], *[row for row in rows if row["problem_id"] not in HELD_OUT][:18]]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


def run(folder, *more, out="out"):
    command = [sys.executable, str(RECIPE / "train.py"), "--steps", "2", "--work", str(folder / f"{out}-work")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [*command, "--out", str(folder / out), *more], capture_output=True, text=True, env=environment, timeout=280
    )


@pytest.mark.slow
def test_the_command_makes_a_predictor_with_its_card_and_makes_it_again(tmp_path, segments):
    texts = [row["text"] for row in segments]
    given = ["--segments", write(tmp_path / "segments.jsonl", segments), "--seed", "1"]
    traces = [
        {"thinking": row["text"], "problem_id": row["problem_id"], "source_model": row["source_model"]}
        for row in segments
    ]
    given += ["--traces", write(tmp_path / "traces.jsonl", traces)]
    given += ["--pretrained", make_base(texts, tmp_path / "pretrained", hidden_size=160)]
    for out in ("first", "second"):
        done = run(tmp_path, *given, out=out)
        assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "first" / "config.json").read_text("utf-8"))
    assert (config["lookahead"], config["label_shift"], config["id2label"]["1"]) == (2, 0, "style")
    figures, (result, *_) = json.loads(done.stdout), ModelCard.load(tmp_path / "first" / "README.md").data.eval_results
    assert result.metric_value == pytest.approx(figures["char_f1"], abs=1e-4)
    first, second = ((tmp_path / out / "model.safetensors").read_bytes() for out in ("first", "second"))
    assert first == second


@pytest.mark.slow
def test_files_that_mark_a_text_differently_are_refused(tmp_path, segments):
    other = [{**row, "style_spans": row["style_spans"][1:]} for row in segments if row["style_spans"]]
    files = [write(tmp_path / "one.jsonl", segments), write(tmp_path / "two.jsonl", other)]
    done = run(tmp_path, "--segments", *files, "--traces", write(tmp_path / "traces.jsonl", []))
    assert done.returncode != 0
    assert f"marks {len(other)} texts otherwise than the files before it" in done.stderr
