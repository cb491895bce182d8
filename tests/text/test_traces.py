"""Thinking is found in every shape in which traces come."""

import pytest

from tessy_hf.text.traces import thinking

HARMONY = (
    "<|channel|>analysis<|message|>We need 3 + 4.<|end|><|start|>assistant<|channel|>commentary<|message|>call"
    "<|end|><|start|>assistant<|channel|>analysis<|message|>It is 7.<|end|>"
    "<|start|>assistant<|channel|>final<|message|>7<|return|>"
)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"thinking": "Okay, so 7.", "answer": "7"}, "Okay, so 7."),
        ({"reasoning": " Okay, so 7.\n"}, "Okay, so 7."),
        ({"reasoning_content": "Okay, so 7.", "content": "7"}, "Okay, so 7."),
        ({"thinking": None, "reasoning": "", "reasoning_content": "Okay."}, "Okay."),
        ({"thinking": "<think>\nOkay, so 7.\n</think>\n\n7"}, "Okay, so 7."),
        (
            {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "reasoning_content": "Okay."}]},
            "Okay.",
        ),
        ({"messages": [{"role": "assistant", "content": "<think>\nOkay.\n</think>\n7"}]}, "Okay."),
        ({"messages": [{"role": "assistant", "thinking": "We need 7.", "content": "7"}]}, "We need 7."),
        (
            {"conversations": [{"from": "human", "value": ""}, {"from": "gpt", "value": "<think>Okay.</think>7"}]},
            "Okay.",
        ),
        ({"response": "<think>\nOkay, so 7.\n</think>\n7"}, "Okay, so 7."),
        ({"completion": "Okay, so 7.\n</think>\n7"}, "Okay, so 7."),
        ({"output": "<think>\nOkay, so it was cut"}, "Okay, so it was cut"),
        ({"text": HARMONY}, "We need 3 + 4.\n\nIt is 7."),
        ({"text": "<|channel|>analysis<|message|>We need"}, "We need"),
        ({"text": "<|channel|>final<|message|>7<|return|>"}, None),
        ({"text": "[THINK]We need 7.[/THINK]7"}, "We need 7."),
        ({"text": "<seed:think>We need 7.</seed:think>7"}, "We need 7."),
        ({"text": "<thought>\nWe need 7.\n</thought>\n\n7"}, "We need 7."),
        ({"text": "<|channel>thought\nWe need 7.\n<channel|>7"}, "We need 7."),
        ({"text": "Here is my thought process:\nWe need 7.\n\nHere is my response:\n7"}, "We need 7."),
        ({"text": "Here is my response: 7"}, None),
        ({"text": "Just an answer: 7."}, None),
        ({"messages": [{"role": "user", "content": "<think>no</think>"}]}, None),
        ({"answer": "7"}, None),
        ({"thinking": ["not", "text"]}, None),
    ],
)
def test_thinking(row, expected):
    assert thinking(row) == expected
