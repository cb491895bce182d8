"""The shipped predictor is small, stock and causal, and as good on the held-out segments as its card says."""

from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from transformers import pipeline

import tessy_hf
from tessy_hf.boundary.predictor import SHIPPED, BoundaryPredictor
from tessy_hf.boundary_training.metrics import evaluate
from tessy_hf.boundary_training.segments import read_segments

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


def test_it_is_the_default_and_looks_back_only(found):
    assert (found.model, found.label_shift, found.causal) == (SHIPPED, 0, True)


def test_the_figures_on_the_held_out_segments_are_those_of_the_card(found, card):
    stated = {result.metric_name: result.metric_value for result in card.data.eval_results}
    for group, of in {"": found.overall, **{f" ({name})": of for name, of in found.by_family.items()}}.items():
        assert stated[f"Character F1 of style{group}"] == pytest.approx(of.char.f1, abs=0.002)
        assert stated[f"Span F1 of style{group}"] == pytest.approx(of.span.f1, abs=0.005)
        within = of.boundary_words.within_1
        assert stated[f"First boundary within one word{group}"] == pytest.approx(within, abs=1.01 / of.segments)
    assert len(stated) == 3 * (1 + len(found.by_family)) == 9


def test_it_loads_as_a_stock_token_classifier():
    tag = pipeline("token-classification", model=str(FOLDER), aggregation_strategy="simple", device="cpu")
    found = tag("Okay, let me think. The capital of France is Paris. Wait, is that right?")
    style = [group["word"].strip() for group in found if group["entity_group"] == "style"]
    assert "Okay" in style[0] and not any("Paris" in text for text in style)
    assert any(text.startswith("Wait") for text in style)


def test_plain_counting_of_a_stock_pipelines_spans_gives_the_figure_of_the_card(found):
    tag = pipeline("token-classification", model=str(FOLDER), aggregation_strategy="simple", device="cpu")
    right = counted = 0
    for segment in read_segments(HELD_OUT):
        marked = {i for start, end in segment.spans for i in range(start, end)}
        spans = [(g["start"], g["end"]) for g in tag(segment.text) if g["entity_group"] == "style"]
        said = {i for start, end in spans for i in range(start, end)}
        right, counted = right + len(said & marked), counted + len(said) + len(marked)
    assert 2 * right / counted == pytest.approx(found.char_f1, abs=0.004)
