"""A row beside longer rows is what the model's own plain forward pass writes, for each kind of attention.

Tiny models with random weights; windows, chunks and sinks are shorter than the rows. Each row is rolled back and
continued with foreign ids, as an alternation does.
"""

import asyncio
import json
from contextlib import asynccontextmanager

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from tessy_hf import TransformersEngine
from tessy_hf.errors import EngineDeadError, SettingsError
from tests.engines.contract import request

VOCABULARY = 96
WINDOW = 8
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,  # the default of 0.02 makes a model of this size write one token for ever
    "tie_word_embeddings": False,
    "pad_token_id": 0,
}
ALTERNATING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"] * 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = {
    "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16,
    "v_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1, "moe_intermediate_size": 16,
}  # fmt: skip
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_expand": 2}
RIGHT = {
    "llama": {},
    "qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    "qwen3": {},
    "qwen3_moe": EXPERTS,
    "gpt_oss": {**ALTERNATING, "num_local_experts": 4, "num_experts_per_tok": 2},
    "gemma3_text": ALTERNATING,
    "gemma4_text": {
        **ALTERNATING, "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8, "global_head_dim": 16,
        "vocab_size_per_layer_input": VOCABULARY,
    },
    "mistral": {"sliding_window": WINDOW},
    "phi": {"partial_rotary_factor": 0.5},
    "phi3": {"sliding_window": WINDOW},
    "glm4": {},
    "cohere2": ALTERNATING,
    "olmo3": ALTERNATING,
    "llama4_text": {
        "attention_chunk_size": 16, "layer_types": ["chunked_attention", "full_attention"] * 2,
        "intermediate_size_mlp": 32, "num_local_experts": 4,
    },
    "deepseek_v3": LATENT,
    "granitemoehybrid": {
        "layer_types": ["attention"] * 4, "num_local_experts": 0, "shared_intermediate_size": 32, **MAMBA,
    },
}  # fmt: skip
LINEAR = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
REFUSED = {
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention"] * 2, "num_local_experts": 0, "shared_intermediate_size": 32, **MAMBA,
    },
    "qwen3_next": {**LINEAR, **EXPERTS, "shared_expert_intermediate_size": 16},
    "bamba": {"attn_layer_indices": [1, 3], **MAMBA},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba": {"state_size": 8},
    "bloom": {"n_layer": 2, "n_head": 4},
    "bert": {},
}  # fmt: skip


def save(folder, kind, **options):
    """Write a model with random weights, and return it."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SHAPE, **options})
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(folder)
    return model


def draw(count, seed=1):
    return torch.randint(3, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.inference_mode()
def greedy(model, ids, count):
    """What comes after ids, read whole and anew for each token: no cache, no batch, no padding."""
    ids = list(ids)
    for _ in range(count):
        ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[-count:]


@asynccontextmanager
async def started(folder, **options):
    engine = TransformersEngine(folder, device="cpu", **options)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.close()


async def write(engine, texts, tokens, *, turns=3, keep=5):
    """Continue texts side by side, each rolled back and continued with foreign ids; yield the ids and what came."""
    for turn in range(turns):
        completions = await asyncio.gather(
            *(
                engine.complete(request(row, ids=ids, tokens=tokens, stop_ids=frozenset()))
                for row, ids in texts.items()
            )
        )
        for (row, ids), completion in zip(texts.items(), completions, strict=True):
            yield list(ids), list(completion.token_ids)
            foreign = draw(1 + len(row), seed=turn)  # rows have different numbers of new ids
            texts[row] = [*ids, *completion.token_ids[:keep], *foreign]


async def check(model, folder, **options):
    ids = draw(150)
    texts = {"b": ids[:4], "beside": ids[4:44], "long": ids[44:]}
    async with started(folder, **options) as engine:
        async for before, written in write(engine, texts, tokens=8):
            assert written == greedy(model, before, len(written))


SLOW = ["cohere2", "llama4_text", "olmo3"]  # others hold their kinds of windows in the fast tier


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind in SLOW)) for kind in RIGHT])
def test_a_row_beside_longer_rows_is_the_row_alone(kind, tmp_path):
    model = save(tmp_path, kind, **RIGHT[kind])
    asyncio.run(check(model, tmp_path))


@pytest.mark.parametrize("kind", ["mistral", "llama4_text"])
def test_masks_are_right_with_another_attention_implementation(kind, tmp_path):
    model = save(tmp_path, kind, **RIGHT[kind])
    asyncio.run(check(model, tmp_path, attn_implementation="eager"))


@pytest.mark.parametrize("cache", ["static", "quantized"])
def test_the_cache_that_a_checkpoint_names_for_generate_changes_nothing(cache, tmp_path):
    model = save(tmp_path, "mistral", **RIGHT["mistral"])
    (tmp_path / "generation_config.json").write_text(json.dumps({"cache_implementation": cache}))
    asyncio.run(check(model, tmp_path))


@pytest.mark.parametrize("kind", REFUSED)
def test_a_model_that_keeps_more_than_keys_and_values_is_refused_at_the_start(kind, tmp_path):
    save(tmp_path, kind, **REFUSED[kind])
    with pytest.raises(SettingsError, match="vLLM"):
        asyncio.run(check(None, tmp_path))


BLOCKS = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}  # quantizers want whole blocks


def quantizer(package, **options):
    """The options that quantize a model while it is loaded, with a package that may be missing."""
    pytest.importorskip(package, reason=f"pip install {package}")
    if package == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        return {"quantization_config": TorchAoConfig(Int8WeightOnlyConfig())}
    return {"quantization_config": BitsAndBytesConfig(**options)}


EIGHT_BITS = {"load_in_8bit": True, "llm_int8_threshold": 0.0}


@pytest.mark.parametrize(
    ("package", "options"), [("torchao", {}), ("bitsandbytes", {"load_in_4bit": True}), ("bitsandbytes", EIGHT_BITS)]
)
def test_rows_of_a_quantized_checkpoint_are_the_rows_alone(package, options, tmp_path):
    quantized = quantizer(package, **options)
    save(tmp_path / "plain", "qwen3", **BLOCKS)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", **quantized, device_map="cpu")
    model.save_pretrained(tmp_path / "quantized")
    asyncio.run(check(model, tmp_path / "quantized"))
    asyncio.run(check(model, tmp_path / "plain", **quantized))
    made = [(tmp_path / "plain", {}), (tmp_path / "plain", quantized), (tmp_path / "quantized", {})]
    identities = [{**TransformersEngine(at, **more).identity, "model": None} for at, more in made]
    assert len(set(map(json.dumps, identities))) == 3


def test_outliers_of_a_whole_batch_are_refused(tmp_path):
    quantized = quantizer("bitsandbytes", load_in_8bit=True)
    save(tmp_path, "qwen3", **BLOCKS)
    with pytest.raises(SettingsError, match=r"llm_int8_threshold=6\.0.*llm_int8_threshold=0\.0 is expected"):
        asyncio.run(check(None, tmp_path, **quantized))


def rewrite(folder, quantization, drop=""):
    """Write a quantization into a checkpoint's config, and leave a weight out."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    weights = load_file(folder / "model.safetensors")
    save_file(
        {name: weights[name] for name in weights if name != drop}, folder / "model.safetensors", {"format": "pt"}
    )


def test_a_quantization_whose_package_is_missing_is_refused_with_the_name_of_it(tmp_path):
    save(tmp_path, "qwen3")
    rewrite(tmp_path, {"quant_method": "aqlm"})
    with pytest.raises(EngineDeadError, match=r"not installed: .*aqlm.*Install it with pip"):
        asyncio.run(check(None, tmp_path))


def test_weights_that_are_not_there_are_not_drawn_at_random(tmp_path):
    save(tmp_path, "qwen3")
    rewrite(tmp_path, {"quant_method": "of-tomorrow"}, drop="model.layers.1.mlp.up_proj.weight")
    with pytest.raises(EngineDeadError, match=r"lack 1 weights of Qwen3ForCausalLM, such as model\.layers\.1\.mlp"):
        asyncio.run(check(None, tmp_path))


LONG = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}


def test_rows_stay_where_rotary_frequencies_do_not_depend_on_the_batch(tmp_path):
    save(tmp_path, "phi3", rope_parameters=LONG, original_max_position_embeddings=64)

    async def length(**options):
        async with started(tmp_path, **options) as engine:
            return engine.context_length

    assert asyncio.run(length()) == 64 and asyncio.run(length(context_length=50)) == 50
    with pytest.raises(SettingsError, match="context_length is 100.*At most 64"):
        asyncio.run(length(context_length=100))
