"""Gemma 3 270M as the teacher and SmolLM2-135M as the student, as their recipe has them, on word problems."""

from pathlib import Path

from datasets import load_dataset

from tessy_hf import TessyTransform
from tessy_hf.boundary.predictor import SHIPPED
from tests import real_models

ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "recipes" / "smollm2-135m--gemma-3-270m--cpu.yaml"
QUESTIONS = ROOT / "tests" / "data" / "word_problems.jsonl"
GREEDY = {"id_column": "id", "temperature": 0, "top_k": None, "max_thinking_tokens": 40, "max_answer_tokens": 12}


def prompts():
    """The questions, shaped like those of GSM8K."""
    return load_dataset("json", data_files=str(QUESTIONS), split="train")


def transform(*changes, **settings):
    """A greedy transform of the pair; ``changes`` are those of its recipe."""
    models = {"teacher": real_models.model("gemma-3"), "student": real_models.model("smollm2")}
    own = [f"{author}.{key}" for author, model in models.items() for key in (f"model={model}", f"boundary={SHIPPED}")]
    return TessyTransform.from_yaml(RECIPE, *own, *changes).with_settings(**{**GREEDY, **settings})


def write(made, rows=8):
    """Write the first rows and return them."""
    with made:
        return made.map(prompts().select(range(rows)), load_from_cache_file=False)


def said(rows):
    """What of rows a greedy run repeats."""
    return [[row["id"], row["messages"], row["spans"], row["finish_reason"]] for row in rows]
