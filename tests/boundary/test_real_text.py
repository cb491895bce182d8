"""Real reasoning goes through the whole machine: two engines replay real traces, a predictor trained on real segments
decides, and every row comes out whole, whatever stands in it."""

import json
import re
from pathlib import Path

import pytest
import torch
from datasets import load_dataset

from benchmarks.replay import check, turns
from tessy_hf import BoundaryPredictor, Script, ScriptedEngine, Speaker, TessyTransform
from tessy_hf.boundary.predictor import SHIPPED, is_shipped
from tessy_hf.boundary_training.readings import read
from tessy_hf.boundary_training.segments import read_segments
from tessy_hf.boundary_training.train import train_boundary
from tests.boundary_training.bases import make_base
from tests.worlds import make_tokenizer

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent.parent
EXCERPT = ROOT / "tests" / "data" / "traces_excerpt.jsonl"
TRACES = {row["problem_id"]: row for row in map(json.loads, EXCERPT.read_text("utf-8").rstrip("\n").split("\n"))}


@pytest.fixture(scope="module")
def predictor(tmp_path_factory):
    """The small predictor that comes with the package; where it is missing, a smaller one trained on the spot."""
    if is_shipped():
        model = SHIPPED
    else:
        torch.set_num_threads(1)
        found = read_segments(ROOT / "dataset_cards" / "style-spans" / "train.jsonl")
        out = tmp_path_factory.mktemp("small")
        shape = {"vocabulary": 2000, "hidden_size": 64, "intermediate_size": 128, "block": 128, "steps": 30}
        base = make_base([segment.text for segment in found], out / "base", **shape)
        made = train_boundary(found, out, base=base, epochs=3, learning_rate=3e-3, aligned_copies=0)
        assert made.evaluation.char_f1 > 0.6
        model = str(made.folder)
    predictor = BoundaryPredictor.from_pretrained(model)
    yield predictor
    predictor.close()


def rows(predictor, replay, teacher_kind="harmony"):
    def speaker(author, kind):
        def play(key):
            trace = TRACES[key]
            return Script(replay(trace[f"{author}_thinking"], author == "student"), trace[f"{author}_answer"])

        return Speaker(ScriptedEngine(play, tokenizer=make_tokenizer(kind)), boundary=predictor)

    transform = TessyTransform(
        teacher=speaker("teacher", teacher_kind), student=speaker("student", "qwen"), prompt_column="problem",
        id_column="problem_id", journal=None,
    )  # fmt: skip
    prompts = load_dataset("json", data_files=str(EXCERPT), split="train", streaming=True)
    prompts = prompts.select_columns(["problem_id", "problem"])
    with transform:
        return list(prompts.map(transform, batched=True, features=transform.features(prompts)))


def check_all(found):
    assert [row["problem_id"] for row in found] == list(TRACES)
    for row in found:
        check(row, TRACES[row["problem_id"]]["student_answer"])
        assert row["finish_reason"] == "stop"


@pytest.mark.parametrize("teacher_kind", ["harmony", "qwen"])
def test_traces_replayed_whole_come_out_whole(predictor, teacher_kind):
    found = rows(predictor, lambda text, _: text, teacher_kind)
    check_all(found)
    whole = "\n".join(row["thinking"] for row in found)
    assert not whole.isascii() and "\n\n" in whole and re.search(r"\n\s*(?:\d+\.|[-*]) ", whole)


def test_students_spans_are_style_as_people_know_it(predictor):
    found = rows(predictor, lambda text, own_kind: turns(read(predictor, [text])[0], text, own_kind))
    check_all(found)
    usual = {"okay", "wait", "so", "but", "maybe", "first", "hmm", "let", "let's", "however", "now", "alternatively"}
    usual |= {"i", "the", "then", "perhaps", "also", "for", "next", "therefore", "actually", "since", "another"}

    def share(author):
        spans = [(row["messages"][-1]["content"], span) for row in found for span in row["spans"]]
        said = [
            text[span["start"] : span["end"]].removeprefix("<think>\n").split()
            for text, span in spans
            if (span["author"], span["part"]) == (author, "thinking")
        ]
        assert len(said) > 60
        return sum(first[0].strip(",.:").lower() in usual for first in said if first) / len(said)

    assert share("student") > 0.5 and share("student") > 2.5 * share("teacher")
