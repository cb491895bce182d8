"""Small tokenizers of the kinds that real models have, trained in a second on a bit of text."""

import json
from functools import cache

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from tests import real_models

TEXT = """Okay, so I need to find the sum of the first ten primes. Wait, is 1 a prime? No, it isn't.
Let me think: 2 + 3 = 5, then 5 + 5 = 10, so far so good.\n\n```python\ndef total(n):\n    return sum(range(n))\n```
Hmm, maybe check `total(10)` == 45... Therefore, the answer is 129. 你好，世界。 Größe, naïve café 🙂 — "quoted" text!
We need to compute f(x) = x^2 + 3x.  Then,\n\tindent\n\n- a list\n- of things\n\n\n1. one\n2. two
"""

QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% elif m.role == 'user' %}"
    "<｜User｜>{{ m.content }}{% else %}<｜Assistant｜>{{ m.content.split('</think>')[-1] }}<｜end▁of▁sentence｜>"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<｜Assistant｜><think>\n{% endif %}"
)
R1_KEEPS = R1.replace(".split('</think>')[-1]", "")
HARMONY_SYSTEM = "<|start|>system<|message|>Reasoning: medium\n\n# Valid channels: analysis, commentary, final.<|end|>"
HARMONY = (
    "<|start|>system<|message|>Reasoning: {{ reasoning_effort | default('medium') }}\n\n"
    "# Valid channels: analysis, commentary, final.<|end|>"
    "{% for m in messages %}<|start|>{{ 'developer' if m.role == 'system' else m.role }}"
    "{% if m.thinking %}<|channel|>analysis<|message|>{{ m.thinking }}<|end|><|start|>assistant{% endif %}"
    "{% if m.role == 'assistant' %}<|channel|>final{% endif %}<|message|>{{ m.content }}"
    "{{ '<|return|>' if m.role == 'assistant' else '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)


def _bpe(regex, vocabulary, special, normalizer=None, repeat=1):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(regex), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)  # the harder case, as GPT-2 has it
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=special,
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * repeat, trainer)
    return tokenizer


def _qwen():
    tokenizer = _bpe(QWEN, 420, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], normalizers.NFC())
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHATML
    )
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    fast.add_tokens(["<think>", "</think>"])
    return fast


def _harmony():
    special = ["<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>"]
    tokenizer = _bpe(O200K, 340, special)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|return|>", chat_template=HARMONY)
    fast.add_special_tokens({"additional_special_tokens": special[:4] + special[5:]})
    return fast


def _r1():
    special = ["<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"]
    tokenizer = _bpe(QWEN.replace(r"\p{N}|", r"\p{N}{1,3}|", 1), 380, special)
    begin, *roles, end = special
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=begin, eos_token=end, chat_template=R1)
    fast.add_special_tokens({"additional_special_tokens": roles})
    fast.add_tokens(["<think>", "</think>"])
    return fast


def _gpt2():
    tokenizer = _bpe(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+", 300, ["<|end|>"])
    template = CHATML + "{# <think> #}"  # thinking marks are plain text here, as in models that were only fine-tuned
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", chat_template=template)


def _marking(normalizer, pre_tokenizer, strip):
    """A BPE tokenizer that spells a space as "▁" and unknown characters as bytes, as SentencePiece does."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    special = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([line for line in TEXT.split("\n") if line], trainer)
    trained = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(pair) for pair in trained["merges"]]
    tokenizer = Tokenizer(models.BPE(trained["vocab"], merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre_tokenizer
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strip else steps)
    return _think_tags(tokenizer, "<eos>", bos_token="<bos>", unk_token="<unk>")


def _think_tags(tokenizer, eos, **options):
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, chat_template=CHATML, **options)
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    fast.add_tokens([AddedToken(tag, normalized=False) for tag in ("<think>", "</think>")])
    return fast


def _gemma():
    return _marking(normalizers.Replace(" ", "▁"), pre_tokenizers.Split(" ", "merged_with_previous"), strip=False)


def _llama():
    """Puts a space before a text: only at its very beginning."""
    return _marking(None, pre_tokenizers.Metaspace(prepend_scheme="first", split=False), strip=True)


def _llama2():
    """Puts a space before a text, and after each special token."""
    return _marking(normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]), None, strip=True)


def _superbpe():
    """Has tokens of several words, and of line ends with words, as it splits text nowhere."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=440, initial_alphabet=alphabet, special_tokens=["<eos>"], show_progress=False
    )
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    return _think_tags(tokenizer, "<eos>")


TOKENIZERS = {"qwen": _qwen, "harmony": _harmony, "r1": _r1, "gpt2": _gpt2}
RARER_TOKENIZERS = {"gemma": _gemma, "llama": _llama, "llama-2": _llama2, "superbpe": _superbpe}
"""Those that mark spaces before they look for ids, and one whose tokens reach over spaces and line ends."""


@cache
def make_tokenizer(kind):
    if kind in real_models.SOURCES:
        return real_models.tokenizer(kind)
    return (TOKENIZERS | RARER_TOKENIZERS)[kind]()


def save_models(kind, folder, seed):
    """Save a model that writes by chance, but always the same, and a predictor; return their folders.

    The heads are of 32, which is what vLLM's CPU backend takes. Ends of thinking and of text are made likely enough.
    """
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3ForTokenClassification

    tokenizer = make_tokenizer(kind)
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 2048}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "initializer_range": 0.5}
    base = {**shape, **heads, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(seed)
    writer = Qwen3ForCausalLM(Qwen3Config(**base, tie_word_embeddings=False))
    ends = [tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(["<|end|>" if kind == "harmony" else "</think>"])]
    with torch.no_grad():
        writer.lm_head.weight[ends] *= 1.3
    labels = {"id2label": {0: "capability", 1: "style"}, "label2id": {"capability": 0, "style": 1}}
    reader = Qwen3ForTokenClassification(Qwen3Config(**base, **labels, label_shift=0))
    folders = folder / f"{kind}-writer", folder / f"{kind}-reader"
    for model, where in zip((writer, reader), folders, strict=True):
        model.save_pretrained(where)
        tokenizer.save_pretrained(where)
    return folders
