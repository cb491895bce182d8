import asyncio

import pytest
import torch
from transformers import AutoModelForCausalLM

from tessy_hf import TransformersEngine, demo
from tessy_hf.engines import transformers as module
from tessy_hf.errors import EngineDeadError, SettingsError
from tests.engines.contract import ModelContract, run


class TestTransformersEngine(ModelContract):
    @pytest.fixture
    def engine(self):
        return TransformersEngine(demo.STUDENT)

    def test_greedy_text_is_that_of_generate(self, engine):
        requests = [self.request(engine, row=str(i), prompt=i, tokens=12) for i in range(4)]
        completions = self.complete(engine, *requests)
        model = AutoModelForCausalLM.from_pretrained(demo.STUDENT).eval()
        for request, completion in zip(requests, completions, strict=True):
            ids = torch.tensor([list(request.prompt_ids)])
            expected = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, eos_token_id=None
            )
            assert list(completion.token_ids) == expected[0, ids.shape[1] :].tolist()

    def test_sampling_follows_the_models_distribution(self, engine):
        """The first token over many seeds is distributed as softmax(logits / T) says."""
        base = self.request(engine)
        requests = [
            self.request(engine, row=str(seed), tokens=1, temperature=0.8, seed=seed * 7919, stop=frozenset({1}))
            for seed in range(2000)
        ]
        drawn = torch.tensor([c.token_ids[0] for c in self.complete(engine, *requests)])
        model = AutoModelForCausalLM.from_pretrained(demo.STUDENT).eval()
        with torch.no_grad():
            expected = torch.softmax(model(torch.tensor([list(base.prompt_ids)])).logits[0, -1] / 0.8, -1)
        observed = torch.bincount(drawn, minlength=len(expected)) / len(drawn)
        assert (observed - expected).abs().sum() / 2 < 0.05  # total variation distance

    def test_a_sampled_row_does_not_depend_on_chunks(self, engine):
        async def session():
            await engine.start()
            try:
                whole = await engine.complete(self.request(engine, row="a", tokens=12, temperature=1.0, seed=5))
                first = self.request(engine, row="b", tokens=5, temperature=1.0, seed=5)
                part = await engine.complete(first)
                ids = [*first.prompt_ids, *part.token_ids]
                rest = await engine.complete(self.request(engine, row="b", ids=ids, tokens=7, temperature=1.0, seed=5))
                return list(whole.token_ids), [*part.token_ids, *rest.token_ids]
            finally:
                await engine.close()

        whole, parts = run(session())
        assert whole == parts

    def test_a_continued_row_reads_only_what_is_new(self, engine):
        widths = []

        async def session():
            await engine.start()
            network = engine._live.network
            forward = network.forward

            def counting(*args, **kwargs):
                widths.append(kwargs["input_ids"].shape[1])
                return forward(*args, **kwargs)

            network.forward = counting
            first = self.request(engine, row="a", tokens=4)
            written = await engine.complete(first)
            ids = [*first.prompt_ids, *written.token_ids]
            await engine.complete(self.request(engine, row="a", ids=ids, tokens=4))
            await engine.close()
            return len(first.prompt_ids)

        length = run(session())
        assert widths == [length, 1, 1, 1, 1, 1, 1, 1]  # the fourth token's keys were not computed yet: one id to read

    def test_nucleus_sampling_keeps_to_the_nucleus(self, engine):
        from dataclasses import replace

        requests = [
            replace(self.request(engine, row=str(s), tokens=6, temperature=2.0, seed=s), top_p=1e-6) for s in range(5)
        ]
        greedy = self.complete(engine, self.request(engine, tokens=6))[0]
        assert {tuple(c.token_ids) for c in self.complete(engine, *requests)} == {tuple(greedy.token_ids)}

    def test_long_requests_go_on_over_rounds(self, engine, monkeypatch):
        whole = self.complete(engine, self.request(engine, tokens=20))
        monkeypatch.setattr(module, "ROUND_TOKENS", 3)
        assert self.complete(engine, self.request(engine, tokens=20)) == whole

    def test_more_rows_than_a_batch_holds_all_get_served(self):
        engine = TransformersEngine(demo.STUDENT, max_batch=2)
        requests = [self.request(engine, row=str(i), prompt=i % 3, order=i) for i in range(7)]
        completions = self.complete(engine, *requests)
        assert [list(c.token_ids) for c in completions[:3]] == [list(c.token_ids) for c in completions[3:6]]

    def test_a_broken_model_is_a_dead_engine(self, engine):
        async def session():
            await engine.start()
            engine._live.network.forward = None
            try:
                await asyncio.gather(*(engine.complete(self.request(engine, row=str(i))) for i in range(2)))
            finally:
                await engine.close()

        with pytest.raises(EngineDeadError, match="broke down"):
            run(session())

    def test_a_model_that_is_not_there_is_told(self, tmp_path):
        engine = TransformersEngine(tmp_path / "nothing")
        with pytest.raises(EngineDeadError, match="could not be loaded.*is expected"):
            run(engine.start())
        with pytest.raises(EngineDeadError, match="tokenizer"):
            _ = engine.tokenizer

    def test_an_impossible_batch_is_refused(self):
        with pytest.raises(SettingsError, match="max_batch"):
            TransformersEngine(demo.STUDENT, max_batch=0)
