"""A predictor is trained from marked segments, states how it is to be read, and learns what it is shown."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForTokenClassification, AutoTokenizer, BertConfig, BertModel, pipeline

from tessy_hf.boundary.predictor import BoundaryPredictor
from tessy_hf.boundary_training.answers import locate
from tessy_hf.boundary_training.examples import IGNORED, Example, aligned_copies, collate, cut, encode, weight_of_style
from tessy_hf.boundary_training.fit import best_bias
from tessy_hf.boundary_training.metrics import evaluate, evaluate_readings
from tessy_hf.boundary_training.readings import Reading
from tessy_hf.boundary_training.segments import Segment, read_segments, word_kinds
from tessy_hf.boundary_training.settings import AnnotationSettings, TrainingSettings
from tessy_hf.boundary_training.train import train_boundary
from tessy_hf.errors import BoundaryError, DatasetError, SettingsError
from tessy_hf.recipe import read_annotation, read_training
from tessy_hf.text.vocabulary import words
from tests.boundary_training.bases import PATH, make_base
from tests.boundary_training.test_annotate import STYLE, mark, trace
from tests.rules import ids_of, vocabulary
from tests.worlds import TEXT, TOKENIZERS, make_tokenizer

ROOT = Path(__file__).parent.parent.parent
QUICK = {"epochs": 10, "batch_size": 8, "learning_rate": 5e-3, "validation_share": 0.2, "test_share": 0.2}


def segments(n=40):
    """Segments in which style is what a few phrases say."""
    made = []
    for i in range(n):
        text = trace(i, sentences=8)
        spans = locate(text, json.loads(mark(text)))
        about = {"problem": f"p{i}", "family": "ab"[i % 2], "source_model": f"m{i % 2}"}
        made.append(Segment(text, tuple(spans), key=f"s{i}", **about))
    return made


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Networks this small are slower on several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A small base model, made of the segments' text."""
    return make_base([s.text for s in segments()], tmp_path_factory.mktemp("base"), steps=40, batch_size=8)


@pytest.fixture(scope="module", params=[0, 1], ids=["own token", "next token"])
def trained(request, base, tmp_path_factory):
    """A predictor of each label convention."""
    folder = tmp_path_factory.mktemp(f"shift{request.param}")
    made = train_boundary(segments(), folder, base=base, label_shift=request.param, author="student", **QUICK)
    return made, request.param


@pytest.mark.slow
def test_it_learns_what_it_is_shown(trained):
    made, _ = trained
    assert made.evaluation.char_f1 > 0.97 and made.evaluation.span_f1 > 0.9
    assert made.evaluation.boundary_within_1_word > 0.9
    assert made.evaluation.char_f1_by_family.keys() == {"a", "b"}


def test_the_folder_is_a_stock_model_that_states_its_convention(trained):
    made, label_shift = trained
    network = AutoModelForTokenClassification.from_pretrained(made.folder)
    config = network.config
    assert (config.label_shift, config.window, config.author) == (label_shift, 200, "student")
    assert config.id2label == {0: "capability", 1: "style"}
    predictor = BoundaryPredictor.from_pretrained(str(made.folder))
    assert (predictor.label_shift, predictor.window) == (label_shift, 200)
    predictor.close()
    assert {file.name for file in made.folder.iterdir()} == {
        "README.md", "config.json", "model.safetensors", "report.json", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip


def test_the_pipeline_of_transformers_reads_it(trained):
    made, label_shift = trained
    text = segments()[0].text
    found = pipeline("token-classification", model=str(made.folder), aggregation_strategy="simple")(text)
    style = [text[group["start"] : group["end"]] for group in found if group["entity_group"] == "style"]
    assert len(style) >= 6
    if label_shift == 0:
        assert set(map(str.strip, style)) <= set(STYLE)


def test_the_report_tells_what_was_done_and_no_path(trained, base):
    made, label_shift = trained
    text = (made.folder / "report.json").read_text()
    report = json.loads(text)
    assert report["segments"] == {"train": 26, "extra": 0, "validation": 6, "test": 8}
    assert report["settings"]["label_shift"] == label_shift and str(Path(base).parent) not in text
    assert report["test"]["char_f1"] == made.evaluation.char_f1 and len(report["epochs"]) <= 10


@pytest.mark.slow
def test_the_same_seed_gives_the_same_weights(trained, base, tmp_path):
    made, label_shift = trained
    again = train_boundary(segments(), tmp_path, base=base, label_shift=label_shift, author="student", **QUICK)
    assert again.evaluation.overall == made.evaluation.overall
    one, other = ((folder / "model.safetensors").read_bytes() for folder in (made.folder, tmp_path))
    assert one == other


def test_a_checkpoint_of_the_upstream_kind_loads_once_its_shift_is_stated(trained, tmp_path):
    made, label_shift = trained
    if label_shift == 0:
        pytest.skip("upstream's labels look ahead")
    network = AutoModelForTokenClassification.from_pretrained(made.folder)
    for name in ("label_shift", "window", "author"):
        delattr(network.config, name)
    network.config.id2label, network.config.label2id = {0: "LABEL_0", 1: "LABEL_1"}, {"LABEL_0": 0, "LABEL_1": 1}
    network.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(made.folder).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps({k: v for k, v in config.items() if k not in ("id2label", "label2id")} | {"num_labels": 2})
    )
    with pytest.raises(BoundaryError, match="label_shift=1"):
        BoundaryPredictor.from_pretrained(str(tmp_path))
    right, wrong = (BoundaryPredictor(str(tmp_path), label_shift=shift) for shift in (1, 0))
    assert evaluate(right, segments()).char_f1 > 0.97 > 0.9 > evaluate(wrong, segments()).char_f1
    right.close()
    wrong.close()


# --- labels


@pytest.mark.parametrize("kind", sorted(TOKENIZERS))
@pytest.mark.parametrize("label_shift", [0, 1])
def test_labels_are_about_the_token_the_convention_says(kind, label_shift):
    text = "Okay, so 3 + 4\n\nis 7. Größe 🙂"
    example = encode(Segment(text, ((0, 8),), weight=0.5), vocabulary(kind), label_shift)
    offsets = vocabulary(kind).encode(text).offsets
    assert len(example.ids) == len(example.labels) == len(offsets) and example.weight == 0.5
    for label, (start, end) in zip(example.labels, offsets[label_shift:], strict=False):
        style = text[start:end].strip() and start < 8
        assert label == (1 if style else 0 if text[start:end].strip() else IGNORED)
    assert example.labels[len(offsets) - label_shift :] == [IGNORED] * label_shift


def test_each_token_weighs_by_its_kind_and_its_segment():
    examples = [Example([5, 6, 7], [1, 0, IGNORED], 0.5), Example([8], [1], 2.0)]
    batch = collate(examples, style_weight=3.0)
    assert batch["token_weights"].tolist() == [[1.5, 0.5, 0.0], [6.0, 0.0, 0.0]]
    assert batch["labels"].tolist() == [[1, 0, IGNORED], [1, IGNORED, IGNORED]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert weight_of_style(examples, "balanced") == 0.5 and weight_of_style(examples, 4) == 4


@pytest.mark.parametrize("kind", sorted(TOKENIZERS))
@pytest.mark.parametrize("window", [4, 13, 500])
def test_long_segments_are_cut_at_words_and_nothing_is_lost(kind, window):
    whole = Segment(TEXT, ((0, 8), (30, 90), (200, 260)), problem="p")
    pieces = cut(whole, vocabulary(kind), window)
    assert "".join(piece.text for piece in pieces).rstrip() == TEXT.rstrip()
    for piece in pieces:
        assert len(vocabulary(kind).encode(piece.text).ids) <= window or len(words(piece.text)) == 1
    assert sum(int(piece.style().sum()) for piece in pieces) == int(whole.style().sum())
    if window == 500:
        assert pieces == [whole]


def test_aligned_copies_begin_at_span_starts():
    aligned = aligned_copies(segments(5), copies=3, seed=1)
    assert len(aligned) == 15 and aligned == aligned_copies(segments(5), copies=3, seed=1)
    whole = {segment.problem: segment for segment in segments(5)}
    for part in aligned:
        before = whole[part.problem].part(0, len(whole[part.problem].text) - len(part.text))
        assert word_kinds(before)[-1] != word_kinds(part)[0]


def test_the_bias_goes_where_the_character_f1_is_best():
    said, many = segments(20), []
    for segment in said:
        offsets = vocabulary("qwen").encode(segment.text).offsets
        many.append(Reading(offsets, 0.05 + 0.15 * segment.style()[[start for start, _ in offsets]]))
    gain = best_bias(many, said)
    assert evaluate_readings(many, said).char_f1 == 0
    odds = [reading.style / (1 - reading.style) * torch.e**gain for reading in many]
    moved = [Reading(r.offsets, o / (1 + o)) for r, o in zip(many, odds, strict=True)]
    assert evaluate_readings(moved, said).char_f1 > 0.9


# --- data and base models


@pytest.mark.slow
def test_extra_segments_on_held_out_problems_are_left_out(base, tmp_path):
    held = segments(6)
    extra = [{"text": s.text, "style_spans": s.marked(), "problem_id": s.problem, "weight": 0.2} for s in segments(20)]
    options = {**QUICK, "epochs": 1}
    made = train_boundary(
        segments()[20:], tmp_path, extra=extra, test=held[:3], validation=held[3:], base=base, **options
    )
    report = json.loads((made.folder / "report.json").read_text())
    assert report["segments"] == {"train": 20, "extra": 14, "validation": 3, "test": 3}


@pytest.mark.slow
def test_any_token_classifier_can_be_the_base(tmp_path):
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=512, **shape)).save_pretrained(tmp_path / "bert")
    make_tokenizer("qwen").save_pretrained(tmp_path / "bert")
    made = train_boundary(
        segments(), tmp_path / "out", base=str(tmp_path / "bert"), window=64, save_dtype="float16", **QUICK
    )
    assert not made.evaluation.causal and made.evaluation.char_f1 > 0.5
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["model_type"], config["window"], config["dtype"]) == ("bert", 64, "float16")


@pytest.mark.slow
def test_a_base_model_is_made_once_of_enough_text(tmp_path):
    texts = [s.text for s in segments()]
    weights = tmp_path / "base" / "model.safetensors"
    make_base(texts, tmp_path / "base", steps=3)
    made = weights.stat().st_mtime_ns
    make_base(iter(texts), tmp_path / "base", steps=3)
    assert weights.stat().st_mtime_ns == made
    make_base(texts, tmp_path / "base", steps=4)
    assert weights.stat().st_mtime_ns != made
    with pytest.raises(DatasetError, match="pass more thinking"):
        make_base(["Okay."], tmp_path / "short")


@pytest.mark.slow
def test_a_base_model_is_made_by_a_command(tmp_path):
    rows = ({"text": s.text} if i % 2 else {"thinking": s.text} for i, s in enumerate(segments()))
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [tmp_path / "texts.jsonl", "--out", tmp_path / "base", "--vocabulary", "300", "--steps", "1"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, PATH, *arguments], check=True, env=environment, timeout=200)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "base")) == 300


def test_the_tokenizer_of_a_made_base_is_exact(base):
    tokenizer = AutoTokenizer.from_pretrained(base)
    for text in (TEXT, "\n\n  \t x", "日本語 🙂 é"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"epoch": 3}, "Known: base"),
        ({"epoch": 3}, "Did you mean 'epochs'?"),
        ({"label_shift": 2}, "label_shift"),
        ({"base": {"steps": 3}}, "valid string"),
        ({"learning_rate": -1}, "greater than 0"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(settings, told):
    with pytest.raises(SettingsError) as caught:
        TrainingSettings.check(**settings)
    assert told in str(caught.value)


def test_a_base_that_is_none_is_refused(tmp_path):
    with pytest.raises(BoundaryError, match="could not be loaded"):
        train_boundary(segments(), tmp_path / "out", base=str(tmp_path / "nothing"), **QUICK)


KILLED = """
import os, signal, sys
import transformers
from tests.boundary_training.test_train import QUICK, segments
from tessy_hf.boundary_training.train import train_boundary

saved = transformers.Trainer._save_checkpoint

def save(self, *arguments, **options):
    saved(self, *arguments, **options)
    if self.state.epoch == 3:
        os.kill(os.getpid(), signal.SIGKILL)

transformers.Trainer._save_checkpoint = save
train_boundary(segments(), sys.argv[2], base=sys.argv[1], label_shift=0, author="student", **QUICK)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs POSIX signals")
def test_a_killed_training_goes_on_from_its_last_epoch(trained, base, tmp_path):
    made, label_shift = trained
    if label_shift:
        pytest.skip("once is enough")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    (tmp_path / "checkpoints").mkdir()  # of another training, whose folder this one is written into
    killed = subprocess.run([sys.executable, "-c", KILLED, base, str(tmp_path)], env=environment, timeout=200)
    assert killed.returncode == -signal.SIGKILL and not (tmp_path / "model.safetensors").exists()
    again = train_boundary(segments(), tmp_path, base=base, label_shift=0, author="student", **QUICK)
    assert again.evaluation.overall == made.evaluation.overall
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["checkpoints"]


# --- the recipes and the data that come with the package


def test_the_shipped_segments_are_whole():
    found = read_segments(ROOT / "dataset_cards" / "style-spans" / "train.jsonl")
    assert len(found) == 1127 and sum(len(segment.spans) for segment in found) == 4430
    assert {s.family for s in found} == {"gpt-oss", "qwen3", "deepseek", "other"} and all(s.problem for s in found)


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes" / "boundary").glob("*.yaml")), ids=lambda path: path.name)
def test_recipes_can_be_read(recipe):
    given = read_training(recipe)
    if "annotator" in given:
        annotator, settings = read_annotation(recipe)
        assert annotator.engine.model and AnnotationSettings.check(**settings)
    else:
        TrainingSettings.check(**{k: v for k, v in given.items() if k not in ("data", "extra")})


def test_ids_are_those_of_the_vocabulary():
    assert encode(Segment(TEXT, ()), vocabulary("qwen"), 0).ids == ids_of(TEXT)
