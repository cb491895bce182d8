"""Thinking is found in every shape in which traces come."""

import pytest

from tessy_hf.errors import DatasetError
from tessy_hf.text.traces import read, thinking

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


MESSAGES = [{"role": "user", "content": "What is 3 + 4?"}]
SAID = {"from": "gpt", "value": "<think>\nOkay, so 7.\n</think>\n\n7"}
THEIRS = {
    "TESSY": {"id_ddm": "0", "dialogs": [*MESSAGES, {"role": "assistant", "content": SAID["value"]}]},
    "OpenThoughts3": {"conversations": [{"from": "human", "value": "What is 3 + 4?"}, SAID]},
    "OpenThoughts-114k": {
        "system": "Think.",
        "conversations": [
            {"from": "user", "value": "What is 3 + 4?"},
            {
                "from": "assistant",
                "value": "<|begin_of_thought|>\n\nOkay, so 7.\n\n<|end_of_thought|>\n\n<|begin_of_solution|>\n\n7"
                "\n\n<|end_of_solution|>",
            },
        ],
    },
    "OpenThoughts metadata": {
        "problem": "What is 3 + 4?",
        "deepseek_reasoning": "Okay, so 7.",
        "deepseek_solution": "7",
        "ground_truth_solution": "seven",
    },
    "Llama-Nemotron": {"input": MESSAGES, "output": SAID["value"], "reasoning": "on", "system_prompt": "Think."},
    "Nemotron": {"messages": [*MESSAGES, {"role": "assistant", "content": SAID["value"]}], "reasoning": "on"},
    "OpenR1-Math": {"problem": "What is 3 + 4?", "answer": "seven", "generations": ["", SAID["value"], "8"]},
    "Open-R1": {"prompt": "?", "messages": [*MESSAGES, {"role": "assistant", "content": SAID["value"]}]},
    "columns": {"question": "What is 3 + 4?", "reasoning": "Okay, so 7.", "solution": "7"},
    "key": {"messages": [*MESSAGES, {"role": "assistant", "reasoning_content": "Okay, so 7.", "content": "7"}]},
    "parts": {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "What is "}, {"type": "text", "text": "3 + 4?"}]},
            {"role": "assistant", "content": SAID["value"]},
        ]
    },
    "thinking beside a chat": {
        "messages": [*MESSAGES, {"role": "assistant", "content": "Okay, so 7.7"}],
        "thinking": "Okay, so 7.",
    },
}


@pytest.mark.parametrize("name", THEIRS)
def test_what_others_released_is_read(name):
    trace = read(THEIRS[name])
    assert (trace.question, trace.thinking, trace.answer) == ("What is 3 + 4?", "Okay, so 7.", "7")


def test_rows_of_an_unknown_format_get_the_list_of_known_ones():
    with pytest.raises(DatasetError, match=r"columns id, blob, .*no known format.*dialogs \(TESSY\).*Nemo"):
        read({"id": 1, "blob": "?"})
    assert read({"messages": MESSAGES, "thinking": "", "answer": None}).question == "What is 3 + 4?"  # a failed row
