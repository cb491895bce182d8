"""Segments are drawn from traces, marked by any engine, and kept on disk so that a killed run loses nothing."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter

import pytest
from datasets import Dataset, load_dataset

from tessy_hf import Script, ScriptedEngine, Speaker
from tessy_hf.boundary_training import annotate as module
from tessy_hf.boundary_training.annotate import annotate
from tessy_hf.boundary_training.answers import locate
from tessy_hf.boundary_training.sampling import draw
from tessy_hf.boundary_training.segments import Segment, span_starts
from tessy_hf.boundary_training.settings import AnnotationSettings
from tessy_hf.errors import BoundaryError, EngineDeadError, RequestError, SettingsError
from tests.worlds import CHATML, make_tokenizer

STYLE = ("Okay, so", "Wait, then", "Hmm, maybe")
STEPS = (
    "the river is 40 km long",
    "7 + 5\n= 12",
    "Größe 🙂 counts twice",
    "f(x) := x² – 1",
    "it ends at\n\n- Rome\n- Oslo",
)


def trace(number, sentences=30):
    """A trace in which style and steps take turns."""
    return " ".join(f"{STYLE[(number + i) % 3]} {STEPS[(number * i) % 5]}." for i in range(sentences))


def traces(n, **columns):
    return [
        {"id": f"t{i}", "problem_id": f"p{i % 4}", "source_model": "m", "thinking": trace(i), **columns}
        for i in range(n)
    ]


def mark(text):
    """Answer as a careful annotator would: all of the style phrases that stand in the text whole."""
    return json.dumps(re.findall("|".join(STYLE), text), ensure_ascii=False)


def asked(folder):
    """What the annotator was shown, with what a careful one marks, by id."""
    lines = (folder / "answers.jsonl").read_text("utf-8").split("\n")
    texts = {row["id"]: row["text"] for row in map(json.loads, filter(None, lines))}
    return {key: Segment(text, tuple(locate(text, json.loads(mark(text))))) for key, text in texts.items()}


class Annotator(ScriptedEngine):
    """A scripted engine that reads the segment out of its prompt, and answers as told."""

    def __init__(self, answer=mark, tokenizer=None, thinking="Let me see .", **options):
        super().__init__(self.read, tokenizer=tokenizer or make_tokenizer("qwen"), **options)
        self.answer, self.think, self.prompts = answer, thinking, {}

    @property
    def identity(self):
        return {"model": self.model}

    def read(self, row):
        answer = self.answer(self.prompts[row])
        return Script(self.think, answer if isinstance(answer, str) else json.dumps(answer))

    async def complete(self, request):
        prompt = self.tokenizer.decode(request.prompt_ids)
        self.prompts.setdefault(request.row, prompt.split("<input_text>")[1].split("</input_text>")[0])
        return await super().complete(request)


def run(folder, rows, answer=mark, template_options=None, fault=None, tokenizer=None, **settings):
    engine = Annotator(answer, tokenizer, fault=fault)
    return annotate(rows, Speaker(engine, template_options=template_options), folder, **settings), engine


# --- drawing


def test_what_is_drawn_stands_in_the_thinking_and_does_not_overlap():
    rows = traces(20)
    drawn = list(draw(rows, AnnotationSettings(per_trace=3, words=20)))
    assert len(drawn) == 60 and len({segment.id for segment in drawn}) == 60
    lengths = Counter((segment.aligned, len(segment.text.split())) for segment in drawn)
    assert set(lengths) == {(False, 20), (True, 30)} and 15 < lengths[True, 30] < 45
    for row in rows:
        end = 0
        for segment in (segment for segment in drawn if segment.trace_id == row["id"]):
            first, last = map(int, segment.id.split(":")[1].split("-"))
            assert segment.text in row["thinking"] and row["thinking"].split()[first:last] == segment.text.split()
            assert end <= first
            end = last


def test_the_draw_depends_on_trace_and_seed_alone():
    rows = traces(10)
    once = {s.id: s for s in draw(rows, AnnotationSettings(seed=3))}
    again = {s.id: s for s in draw(reversed(rows), AnnotationSettings(seed=3, limit=7))}
    assert len(once) == 10 and len(again) == 7 and again.items() <= once.items()
    assert {s.id for s in draw(rows, AnnotationSettings(seed=4))} != set(once)


def test_short_traces_are_taken_whole_and_the_shortest_not_at_all():
    rows = [{"thinking": "one two " * 12}, {"thinking": "too short"}, {"thinking": None}, {"text": "column"}]
    (only,) = draw(rows, AnnotationSettings(aligned_share=0))
    assert only.text == ("one two " * 12).strip() and only.problem_id == only.trace_id


def test_rows_of_one_question_are_one_problem():
    text = trace(1)
    rows = [
        {"id": "a", "question": "How far?", "reasoning": text},
        {"id": "b", "question": "How far?", "reasoning_content": text},
        {
            "id": "c",
            "messages": [
                {"role": "user", "content": "How long?"},
                {"role": "assistant", "content": f"<think>{text}</think>7"},
            ],
        },
    ]
    problems = [segment.problem_id for segment in draw(rows, AnnotationSettings())]
    assert problems[0] == problems[1] != problems[2] and all(problems)


# --- marking


def test_marked_segments_become_a_dataset_with_provenance(tmp_path):
    stream = Dataset.from_list(traces(12)).to_iterable_dataset()
    found, _ = run(tmp_path, stream, per_trace=2, words=20, family="fam")
    assert found.counts == {"accepted": 24}
    dataset = load_dataset(str(tmp_path), split="train")
    assert [row["id"] for row in dataset] == [row["id"] for row in found.rows] and len(dataset) == 24
    for row in dataset:
        segment, shown = Segment.from_row(row), asked(tmp_path)[row["id"]]
        at = shown.text.index(segment.text)
        assert segment.spans == shown.part(at, at + len(segment.text)).spans
        assert (segment.family, segment.source_model, len(segment.text.split())) == ("fam", "m", 20)
    told = json.loads((tmp_path / "annotation.json").read_text())
    assert told["annotator"] == {"model": "scripted"} and told["counts"] == {"accepted": 24}
    card = (tmp_path / "README.md").read_text()
    assert "24 segments of 20 words" in card and "`scripted`" in card and told["instruction"][:40] in card


def test_aligned_segments_begin_at_a_span_start(tmp_path):
    found, _ = run(tmp_path, traces(20), words=20, aligned_share=1.0)
    assert {row["begins"] for row in found.rows} == {"span"}
    for row in found.rows:
        shown = asked(tmp_path)[row["id"]]
        starts = [shown.text[start:][: len(row["text"])] for start in span_starts(shown)]
        assert row["text"] in starts and len(row["text"].split()) == 20


def test_half_a_character_becomes_a_question_mark(tmp_path):
    broken = {"id": "t\udc00", "problem_id": "p\ud800", "thinking": "\ud83d " + trace(1)}
    found, _ = run(tmp_path, [broken, {"thinking": "\udfff " + trace(2)}], words=20, aligned_share=0.0, seed=2)
    rows = load_dataset(str(tmp_path), split="train")
    assert found.counts == {"accepted": 2} and (rows[0]["trace_id"], rows[0]["problem_id"]) == ("t?", "p?")
    assert {segment.text for segment in draw([broken], AnnotationSettings(words=200))} == {"? " + trace(1)}


def test_an_annotator_is_let_think_unless_its_template_closes_thinking(tmp_path):
    _, thinks = run(tmp_path / "a", traces(2))
    assert thinks.requests == 4
    closed = "{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    closing = CHATML.removesuffix("{% endif %}") + closed + "{% endif %}"
    engine = Annotator()
    speaker = Speaker(engine, chat_template=closing, template_options={"enable_thinking": False})
    found = annotate(traces(2), speaker, tmp_path / "b")
    assert engine.requests == 2 and found.counts == {"accepted": 2}


def test_harmony_annotators_answer_in_their_final_channel(tmp_path):
    found, engine = run(tmp_path, traces(3), tokenizer=make_tokenizer("harmony"))
    assert found.counts == {"accepted": 3} and engine.requests == 6


def test_answers_that_cannot_be_used_are_counted_and_kept_out(tmp_path):
    said = iter(["Sure!", "", ["okay so"], [""], {"a": 1}, ["ait,"]])

    def answer(text):
        return next(said, mark(text))

    found, _ = run(tmp_path, traces(9), answer, rows_in_flight=1)
    assert found.counts == {
        "not json": 1,
        "empty": 1,
        "not verbatim": 1,
        "empty span": 1,
        "not an array of strings": 1,
        "inside a word": 1,
        "accepted": 3,
    }
    assert len(load_dataset(str(tmp_path), split="train")) == 3
    kept = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text("utf-8").split("\n") if line]
    assert [row["answer"] for row in kept][:2] == ["Sure!", ""] and len(kept) == 9


def test_an_answer_that_was_cut_off_is_rejected(tmp_path):
    found, _ = run(tmp_path, traces(3), max_answer_tokens=5)
    assert found.counts == {"unfinished": 3}


def test_failed_requests_are_counted_and_asked_again_by_the_next_run(tmp_path):
    def fault(request):
        return RequestError("overloaded") if request.row.startswith(("t1:", "t3:")) else None

    first, _ = run(tmp_path, traces(6), fault=fault)
    assert first.counts == {"accepted": 4, "failed": 2}
    second, engine = run(tmp_path, traces(6))
    assert second.counts == {"accepted": 6} and len(engine.prompts) == 2
    assert [row["trace_id"] for row in second.rows] == [f"t{i}" for i in range(6)]


def test_a_dead_engine_stops_the_run_and_what_was_answered_stays(tmp_path):
    def fault(request):
        return EngineDeadError("gone") if request.row.startswith("t4:") else None

    with pytest.raises(EngineDeadError):
        run(tmp_path, traces(8), fault=fault, rows_in_flight=1)
    assert len(load_dataset(str(tmp_path), split="train")) == 4
    found, engine = run(tmp_path, traces(8))
    assert found.counts == {"accepted": 8} and len(engine.prompts) == 4


# --- resuming


@pytest.mark.parametrize("torn", [1, 40, 200])
def test_a_torn_last_line_is_asked_again_and_nothing_else(tmp_path, torn):
    whole, _ = run(tmp_path / "whole", traces(6), rows_in_flight=1)
    run(tmp_path / "torn", traces(4), rows_in_flight=1)
    file = tmp_path / "torn" / "answers.jsonl"
    file.write_bytes(file.read_bytes()[:-torn])
    found, engine = run(tmp_path / "torn", traces(6), rows_in_flight=1)
    assert sorted(key.split(":")[0] for key in engine.prompts) == ["t3", "t4", "t5"]
    assert found.rows == whole.rows
    ids = [json.loads(line)["id"] for line in file.read_text("utf-8").split("\n") if line]
    assert len(ids) == len(set(ids)) == 6


def test_a_broken_line_before_the_last_is_refused(tmp_path):
    run(tmp_path, traces(3))
    file = tmp_path / "answers.jsonl"
    file.write_bytes(b'{"id": "t0' + file.read_bytes()[30:])
    with pytest.raises(BoundaryError, match="Line 1 of .*broken"):
        run(tmp_path, traces(3))


KILLED = """
import os, signal, sys
from tessy_hf import Speaker
from tessy_hf.boundary_training.annotate import annotate
from tests.boundary_training.test_annotate import Annotator, traces

answered = 0

class Killed(Annotator):
    async def complete(self, request):
        global answered
        answered += request.part == "answer"
        if answered == 9:
            os.kill(os.getpid(), signal.SIGKILL)
        return await super().complete(request)

annotate(traces(12), Speaker(Killed()), sys.argv[1], rows_in_flight=3)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs POSIX signals")
def test_a_killed_run_goes_on_where_it_was(tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    killed = subprocess.run(command, env=environment, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    kept = len((tmp_path / "answers.jsonl").read_bytes().split(b"\n")) - 1
    assert 4 <= kept <= 9
    found, engine = run(tmp_path, traces(12))
    assert found.counts == {"accepted": 12} and len(engine.prompts) == 12 - kept
    assert len({row["id"] for row in found.rows}) == 12


def test_a_folder_of_other_settings_is_refused_but_limit_and_speed_may_change(tmp_path):
    run(tmp_path, traces(5), limit=2)
    found, engine = run(tmp_path, traces(5), limit=4, rows_in_flight=2)
    assert found.counts == {"accepted": 4} and len(engine.prompts) == 2
    with pytest.raises(BoundaryError, match="another settings"):
        run(tmp_path, traces(5), words=30)
    (tmp_path / "other.jinja").write_text("Mark style in <input_text>{{ text }}</input_text>")
    with pytest.raises(BoundaryError, match="another instruction"):
        run(tmp_path, traces(5), prompt=str(tmp_path / "other.jinja"))


def test_settings_that_cannot_be_used_are_refused(tmp_path):
    for settings, told in [({"word": 3}, "Known: .*words"), ({"words": 3}, "greater than or equal to 10")]:
        with pytest.raises(SettingsError, match=told):
            AnnotationSettings.check(**settings)
    (tmp_path / "p.jinja").write_text("Mark style.")
    for prompt, told in [("p.jinja", "never shows the segment"), ("none.jinja", "cannot be used")]:
        with pytest.raises(SettingsError, match=told):
            run(tmp_path / "out", traces(1), prompt=str(tmp_path / prompt))


def test_it_works_in_a_notebook(tmp_path):
    async def cell():
        return run(tmp_path, traces(2))[0]

    assert asyncio.run(cell()).counts == {"accepted": 2}
    assert all(path.is_file() for path in module.PROMPTS.values())


# --- instructions and votes


@pytest.mark.parametrize(("prompt", "told"), [("rules", "First-person openers"), ("paper", None)])
def test_the_card_says_which_instruction_was_used(tmp_path, prompt, told):
    run(tmp_path, traces(1), prompt=prompt)
    card = (tmp_path / "README.md").read_text("utf-8")
    assert f"`prompt: {prompt}`" in card and ("First-person openers" in card) == bool(told)


def test_of_several_votes_the_majority_counts_and_their_agreement_is_reported(tmp_path):
    said = iter(range(99))

    def careless(text):
        """Every third answer marks the first phrase alone, every sixth cannot be used."""
        number = next(said)
        found = json.loads(mark(text))
        return "?" if number % 6 == 5 else json.dumps(found[: 1 if number % 3 == 2 else None])

    found, engine = run(tmp_path, traces(4), answer=careless, votes=3, words=20, rows_in_flight=1)
    shown = {key.rpartition("#")[0]: segment for key, segment in asked(tmp_path).items()}
    assert len(engine.prompts) == 12 and found.counts == {"accepted": 10, "not json": 2}
    for row in found.rows:
        at = shown[row["id"]].text.index(row["text"])
        assert Segment.from_row(row).spans == shown[row["id"]].part(at, at + len(row["text"])).spans
    assert 0.3 < found.agreement["kappa"] < found.agreement["char_f1"] < 1
    assert f"{found.agreement['char_f1']:.3f}" in (tmp_path / "README.md").read_text("utf-8")
    again, engine = run(tmp_path, traces(4), answer=careless, votes=3, words=20)
    assert again == found and not engine.prompts
