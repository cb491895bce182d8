import asyncio
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, FineGrainedFP8Config

from tessy_hf import TransformersEngine, demo
from tessy_hf.engines import transformers as module
from tessy_hf.errors import EngineDeadError, SettingsError
from tests.engines.contract import ModelContract, request


class TestTransformersEngine(ModelContract):
    knows_its_cache = True

    @staticmethod
    def make():
        return TransformersEngine(demo.STUDENT)

    def test_sampling_follows_the_models_distribution(self, ask):
        """The first token over many seeds is distributed as softmax(logits / T) says."""
        drawn = ask(
            *(request(str(s), tokens=1, temperature=0.8, seed=s * 7919, stop_ids=frozenset({1})) for s in range(2000))
        )
        model = AutoModelForCausalLM.from_pretrained(demo.STUDENT).eval()
        with torch.no_grad():
            expected = torch.softmax(model(torch.tensor([list(request().prompt_ids)])).logits[0, -1] / 0.8, -1)
        observed = torch.bincount(torch.tensor([c.token_ids[0] for c in drawn]), minlength=len(expected)) / len(drawn)
        assert (observed - expected).abs().sum() / 2 < 0.05  # total variation distance

    def test_a_sampled_row_does_not_depend_on_chunks(self, ask):
        (whole,) = ask(request("a", tokens=12, temperature=1.0, seed=5))
        first = request("b", tokens=5, temperature=1.0, seed=5)
        (part,) = ask(first)
        (rest,) = ask(request("b", ids=[*first.prompt_ids, *part.token_ids], tokens=7, temperature=1.0, seed=5))
        assert list(whole.token_ids) == [*part.token_ids, *rest.token_ids]

    def test_nucleus_sampling_keeps_to_the_nucleus(self, ask):
        (greedy,) = ask(request("greedy", tokens=6))
        drawn = ask(*(request(str(s), tokens=6, temperature=2.0, seed=s, top_p=1e-6) for s in range(5)))
        assert {tuple(c.token_ids) for c in drawn} == {tuple(greedy.token_ids)}

    def test_greedy_and_sampled_rows_share_a_batch(self, ask):
        (greedy,) = ask(request("greedy"))
        both = ask(request("a"), replace(request("b"), temperature=1.5))
        assert list(both[0].token_ids) == list(greedy.token_ids)

    def test_long_requests_go_on_over_rounds(self, ask, monkeypatch):
        (whole,) = ask(request("whole", tokens=20))
        monkeypatch.setattr(module, "ROUND_TOKENS", 3)
        assert ask(request("parts", tokens=20)) == [whole]

    @pytest.fixture
    def shapes(self, live, monkeypatch):
        """What was read, as the shapes of the batches."""
        shapes = []
        forward = live._live.network.forward

        def counting(*args, **kwargs):
            shapes.append(tuple(kwargs["input_ids"].shape))
            return forward(*args, **kwargs)

        monkeypatch.setattr(live._live.network, "forward", counting)
        return shapes

    def test_a_continued_row_reads_only_what_is_new(self, ask, shapes):
        first = request("new", tokens=4)
        (written,) = ask(first)
        ask(request("new", ids=[*first.prompt_ids, *written.token_ids], tokens=4))
        # The fourth token's keys were not computed yet: one id to read.
        assert shapes == [(1, len(first.prompt_ids)), *[(1, 1)] * 7]

    def test_long_prompts_are_read_before_rows_that_go_on_join_them(self, ask, shapes):
        long = [request(f"long {i}", ids=[*[300 + i] * (400 + i), *request().prompt_ids], tokens=3) for i in range(2)]
        alone = [completion for asked in long for completion in ask(replace(asked, row=f"{asked.row} alone"))]
        rows = [request(str(i), prompt=i, tokens=2) for i in range(6)]
        begun = ask(*rows)
        going = [replace(row, prompt_ids=[*row.prompt_ids, *c.token_ids]) for row, c in zip(rows, begun, strict=True)]
        expected = [ask(request(f"{i} alone", ids=asked.prompt_ids, tokens=2))[0] for i, asked in enumerate(going)]
        shapes.clear()
        together = ask(*going, *long)
        assert shapes[:2] == [(2, len(long[1].prompt_ids) - 1), (8, 1)]
        assert [list(c.token_ids) for c in together] == [list(c.token_ids) for c in (*expected, *alone)]
        assert [c.prompt_tokens_read for c in together] == [*[1] * 6, *(len(asked.prompt_ids) for asked in long)]


def test_rows_are_read_apart_where_that_spares_more_than_a_pass():
    def apart(*fresh):
        return sorted(module._apart(np.array(fresh)).tolist())

    assert apart(3, 800, 5, 700, 4) == [1, 3]
    assert apart(3, 60, 5, 50, 4) == []  # not worth a pass
    assert apart(800, 800, 800) == [] and apart(5000) == []  # nobody to wait for them
    assert apart(3000, *[300] * 10, *[2] * 50) == [0] and apart(1, *[300] * 10, *[2] * 50) == list(range(1, 11))


def run(engine, *requests):
    async def session():
        await engine.start()
        try:
            return await asyncio.gather(*map(engine.complete, requests))
        finally:
            await engine.close()

    return asyncio.run(session())


def test_more_rows_than_a_batch_holds_all_get_served():
    requests = [request(str(i), prompt=i % 3, order=i) for i in range(7)]
    completions = run(TransformersEngine(demo.STUDENT, max_batch=2), *requests)
    assert [list(c.token_ids) for c in completions[:3]] == [list(c.token_ids) for c in completions[3:6]]


def test_a_broken_model_is_a_dead_engine():
    engine = TransformersEngine(demo.STUDENT)

    async def session():
        await engine.start()
        engine._live.network.forward = None
        try:
            await asyncio.gather(*(engine.complete(request(str(i))) for i in range(2)))
        finally:
            await engine.close()

    with pytest.raises(EngineDeadError, match="broke down"):
        asyncio.run(session())


def test_a_model_that_is_not_there_is_told(tmp_path):
    engine = TransformersEngine(tmp_path / "nothing")
    with pytest.raises(EngineDeadError, match="could not be loaded.*is expected"):
        asyncio.run(engine.start())
    with pytest.raises(EngineDeadError, match="tokenizer"):
        _ = engine.tokenizer


def test_an_impossible_batch_is_refused():
    with pytest.raises(SettingsError, match="max_batch"):
        TransformersEngine(demo.STUDENT, max_batch=0)


def test_options_that_change_the_text_are_part_of_the_identity():
    def identity(**options):
        return TransformersEngine("m", **options).identity

    plain = identity()
    assert plain == {"engine": "transformers", "model": "m", "revision": None, "dtype": "auto"}
    assert identity(device="cpu", max_batch=3, token="secret", device_map="auto", cache_dir="/tmp") == plain
    quantization = FineGrainedFP8Config()
    assert identity(attn_implementation="eager") == {**plain, "options": {"attn_implementation": "eager"}}
    options = json.loads(json.dumps(identity(quantization_config=quantization)["options"]))
    assert options["quantization_config"]["quant_method"] == "fp8"


def test_code_of_a_checkpoint_is_not_run():
    with pytest.raises(SettingsError, match="trust_remote_code"):
        TransformersEngine("m", trust_remote_code=True)


def test_an_option_that_transformers_does_not_know_is_a_dead_engine():
    with pytest.raises(EngineDeadError, match="could not be loaded.*no_such_option"):
        run(TransformersEngine(demo.STUDENT, no_such_option=1))
