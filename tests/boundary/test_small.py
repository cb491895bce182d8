"""The shipped predictor is small and stock, reads two words beyond, and is as good as its card says."""

from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from transformers import pipeline

import tessy_hf
from tessy_hf.boundary.predictor import SHIPPED, BoundaryPredictor
from tessy_hf.boundary_training.metrics import evaluate
from tessy_hf.boundary_training.segments import read_segments
from tessy_hf.text.vocabulary import words

pytestmark = pytest.mark.slow

FOLDER = Path(tessy_hf.__file__).parent / "boundary" / "small"
RECIPE = Path(__file__).parents[2] / "recipes" / "boundary" / "small"
HELD_OUT = RECIPE / "held_out.jsonl"


@pytest.fixture(scope="module")
def found():
    predictor = BoundaryPredictor.from_pretrained(device="cpu")
    yield evaluate(predictor, read_segments(HELD_OUT))
    predictor.close()


@pytest.fixture(scope="module")
def card():
    return ModelCard.load(FOLDER / "README.md")


def test_it_fits_into_ten_megabytes():
    assert {path.name for path in FOLDER.iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 10_000_000


def test_it_is_the_default_and_reads_two_words_beyond(found):
    assert (found.model, found.label_shift, found.lookahead, found.causal) == (SHIPPED, 0, 2, True)


def test_the_figures_on_the_held_out_segments_are_those_of_the_card(found, card):
    stated = {result.metric_name: result.metric_value for result in card.data.eval_results}
    for group, of in {"": found.overall, **{f" ({name})": of for name, of in found.by_family.items()}}.items():
        assert stated[f"Character F1 of style{group}"] == pytest.approx(of.char.f1, abs=0.002)
        assert stated[f"Span F1 of style{group}"] == pytest.approx(of.span.f1, abs=0.005)
        within = of.boundary_words.within_1
        assert stated[f"First boundary within one word{group}"] == pytest.approx(within, abs=1.01 / of.segments)
    assert len(stated) == 3 * (1 + len(found.by_family)) == 15


def test_it_loads_as_a_stock_token_classifier():
    tag = pipeline("token-classification", model=str(FOLDER), device="cpu")
    text = "Okay, let me think. The capital of France is Paris. Wait, is that right? I am not sure."
    found = {token["start"]: token["entity"] for token in tag(text)}
    begins = [end - len(text[start:end].lstrip()) for start, end in words(text)]
    about = {text[start:].split()[0]: found[later] for start, later in zip(begins, begins[2:], strict=False)}
    assert (about["Okay,"], about["let"], about["Wait,"]) == ("style",) * 3
    assert (about["capital"], about["France"], about["Paris."]) == ("capability",) * 3
