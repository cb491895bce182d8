"""Tokenizers and chat templates of the reasoning model families: their markers, and how their templates treat them."""

from dataclasses import dataclass, field
from functools import cache
from typing import Any

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from tests.worlds import CHATML, HARMONY, QWEN, _bpe

_SPLIT = (
    "{% set content = m.content %}{% set thought = m.reasoning_content or '' %}"
    "{% if '</think>' in content %}{% set thought = content.split('</think>')[0].split('<think>')[-1] %}"
    "{% set content = content.split('</think>')[-1] %}{% endif %}"
)
"""How most templates part content at thinking tags."""


def _turns(user, assistant, prompt):
    return (
        f"{{% for m in messages %}}{{% if m.role == 'assistant' %}}{assistant}{{% else %}}{user}{{% endif %}}"
        f"{{% endfor %}}{{% if add_generation_prompt %}}{prompt}{{% endif %}}"
    )


def _chatml(assistant, prompt):
    return _turns(
        "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n",
        f"<|im_start|>assistant\n{assistant}<|im_end|>\n",
        f"<|im_start|>assistant\n{prompt}",
    )


@dataclass(frozen=True)
class Family:
    """One family.

    Attributes:
        template: The logic of its chat template.
        prompted: What its open turn ends in.
        between: What stands between thinking and answer.
        key: The message key that holds the thinking.
        tokens: Markers that are tokens; ``special`` are special tokens.
        options: Template options that a user of the family passes.
    """

    template: str
    prompted: str
    between: str
    key: str | None = None
    tokens: tuple[str, ...] = ()
    special: tuple[str, ...] = ("<|im_start|>", "<|im_end|>")
    options: dict[str, Any] = field(default_factory=dict)


_THINK = ("<think>", "</think>")
FAMILIES = {
    "Qwen3": Family(
        _chatml(
            _SPLIT + "{{ '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}",
            "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}",
        ),
        "<|im_start|>assistant\n<think>\n",
        "\n</think>\n\n",
        tokens=_THINK,
    ),
    "Qwen3.8": Family(
        _chatml("{{ '<think>\n' + (m.reasoning_content or '') | trim + '\n</think>\n\n' + m.content }}", "<think>\n"),
        "<|im_start|>assistant\n<think>\n",
        "\n</think>\n\n",
        key="reasoning_content",
        tokens=_THINK,
    ),
    "Kimi-K2-Thinking": Family(
        _turns(
            "<|im_user|>user<|im_middle|>{{ m.content }}<|im_end|>",
            "<|im_assistant|>assistant<|im_middle|><think>{{ m.reasoning_content or '' }}</think>{{ m.content }}"
            "<|im_end|>",
            "<|im_assistant|>assistant<|im_middle|>",
        ),
        "<|im_middle|><think>",
        "</think>",
        key="reasoning_content",
        tokens=_THINK,
        special=("<|im_user|>", "<|im_assistant|>", "<|im_middle|>", "<|im_end|>"),
    ),
    "GLM-4.5": Family(
        _turns(
            "<|user|>\n{{ m.content }}",
            "<|assistant|>" + _SPLIT + "{{ '\n<think>' + thought.strip() + '</think>\n' + content.strip() }}",
            "<|assistant|>",
        ),
        "<|assistant|>\n<think>",
        "</think>\n",
        tokens=_THINK,
        special=("<|user|>", "<|assistant|>", "<|im_end|>"),
    ),
    "a key and newlines of its own": Family(
        _chatml("{{ '<think>' + (m['my_thoughts'] or '') + '</think>' + m.content }}", "<think>\n"),
        "<|im_start|>assistant\n<think>",
        "</think>",
        key="my_thoughts",
        tokens=_THINK,
    ),
    "harmony's key with tags": Family(
        _chatml("<think>\n{{ m.thinking or '' }}</think>{{ m.content }}", "<think>\n"),
        "<|im_start|>assistant\n<think>\n",
        "</think>",
        key="thinking",
        tokens=_THINK,
    ),
    "Olmo-3": Family(
        _chatml("{{ m.content }}", "<think>"), "<|im_start|>assistant\n<think>", "\n</think>\n\n", tokens=_THINK
    ),
    "Olmo-3, tags as text": Family(
        _chatml("{{ m.content }}", "<think>"), "<|im_start|>assistant\n<think>", "\n</think>\n\n"
    ),
    "gpt-oss": Family(
        HARMONY,
        "<|start|>assistant<|channel|>analysis<|message|>",
        "<|end|><|start|>assistant<|channel|>final<|message|>",
        key="thinking",
        special=("<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>", "<|call|>"),
    ),
    "Magistral": Family(
        _turns("[INST]{{ m.content }}[/INST]", "{{ m.content }}<|im_end|>", ""),
        "[/INST][THINK]",
        "[/THINK]",
        special=("[INST]", "[/INST]", "[THINK]", "[/THINK]", "<|im_end|>"),
    ),
    "Seed-OSS": Family(
        _chatml(
            "{% set thought = m.reasoning_content %}"
            "{% if thought %}{{ '<seed:think>' + thought | trim + '</seed:think>' }}{% endif %}{{ m.content | trim }}",
            "",
        ),
        "<|im_start|>assistant\n<seed:think>",
        "</seed:think>",
        tokens=("<seed:think>", "</seed:think>"),
    ),
    "EXAONE-Deep, kept": Family(
        _chatml("{{ m.content }}", "<thought>\n"), "<|im_start|>assistant\n<thought>\n", "\n</thought>\n\n"
    ),
    "Granite-3": Family(
        "{% if thinking %}<|im_start|>system\nWrite thoughts after 'Here is my thought process:' and the response "
        "after 'Here is my response:'.<|im_end|>\n{% endif %}" + CHATML,
        "<|im_start|>assistant\nHere is my thought process:\n",
        "\n\nHere is my response:\n",
        options={"thinking": True},
    ),
    "Gemma-4": Family(
        _turns(
            "<|turn>user\n{% if enable_thinking %}<|think|>{% endif %}{{ m.content }}<turn|>\n",
            "<|turn>model\n{% if m.reasoning %}{{ '<|channel>thought\n' + m.reasoning + '\n<channel|>' }}{% endif %}"
            "{{ m.content.split('<channel|>')[-1] }}<turn|>\n",
            "<|turn>model\n",
        ),
        "<|turn>model\n<|channel>thought\n",
        "\n<channel|>",
        key="reasoning",
        special=("<|turn>", "<turn|>", "<|channel>", "<channel|>", "<|im_end|>"),
        options={"enable_thinking": True},
    ),
    "instruct": Family(_chatml("{{ m.content | trim }}", ""), "<|im_start|>assistant\n", ""),
}


@cache
def tokenizer(name):
    """Train the tokenizer of a family."""
    family = FAMILIES[name]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=_bpe(QWEN, 400, list(family.special)),
        eos_token="<|return|>" if name == "gpt-oss" else "<|im_end|>",
        chat_template=family.template,
    )
    fast.add_special_tokens({"additional_special_tokens": list(family.special)})
    fast.add_tokens([AddedToken(token, normalized=False) for token in family.tokens])
    return fast
