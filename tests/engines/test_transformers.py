import asyncio
import json
from dataclasses import replace

import pytest
from transformers import FineGrainedFP8Config

from tessy_hf import TransformersEngine, demo
from tessy_hf.engines import transformers as module
from tessy_hf.errors import EngineDeadError, SettingsError
from tests.engines.contract import ModelContract, request


class TestTransformersEngine(ModelContract):
    knows_its_cache = True

    @staticmethod
    def make():
        return TransformersEngine(demo.STUDENT)

    def test_a_sampled_row_does_not_depend_on_chunks(self, ask):
        (whole,) = ask(request("a", tokens=12, temperature=1.0, seed=5))
        first = request("b", tokens=5, temperature=1.0, seed=5)
        (part,) = ask(first)
        (rest,) = ask(request("b", ids=[*first.prompt_ids, *part.token_ids], tokens=7, temperature=1.0, seed=5))
        assert list(whole.token_ids) == [*part.token_ids, *rest.token_ids]

    def test_greedy_and_sampled_rows_share_a_batch(self, ask):
        (greedy,) = ask(request("greedy"))
        both = ask(request("a"), replace(request("b"), temperature=1.5))
        assert list(both[0].token_ids) == list(greedy.token_ids)

    def test_long_requests_go_on_over_rounds(self, ask, monkeypatch):
        (whole,) = ask(request("whole", tokens=20))
        monkeypatch.setattr(module, "ROUND_TOKENS", 3)
        assert ask(request("parts", tokens=20)) == [whole]


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
    with pytest.raises(EngineDeadError, match="broke down"):
        run(TransformersEngine(demo.STUDENT), *(request(str(i), ids=[10**6]) for i in range(2)))  # no such token


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


def test_a_gguf_file_is_where_model_and_tokenizer_are_read_from():
    engine = TransformersEngine(demo.STUDENT, gguf_file="weights.gguf")
    assert engine.identity["options"] == {"gguf_file": "weights.gguf"}
    with pytest.raises(EngineDeadError, match=r"tokenizer.*could not be loaded: .*weights\.gguf"):
        _ = engine.tokenizer
    with pytest.raises(EngineDeadError, match=r"model.*could not be loaded: .*(weights\.gguf|safetensors)"):
        asyncio.run(engine.start())
