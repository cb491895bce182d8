"""A trained predictor goes to the Hub in one commit, and comes back the same."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from transformers import AutoModelForTokenClassification, AutoTokenizer

from tessy_hf.boundary_training.card import render_card
from tessy_hf.boundary_training.train import train_boundary
from tessy_hf.errors import BoundaryError
from tessy_hf.hub.boundary_models import push_boundary
from tests.boundary_training.bases import make_base
from tests.boundary_training.test_train import QUICK, segments
from tests.hub_server import READ_TOKEN

pytestmark = [
    pytest.mark.slow,  # all of them together
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),  # the client's own
]

ROOT = Path(__file__).parent.parent.parent

LOAD = """
import json, sys
import torch
from tessy_hf import BoundaryPredictor
from transformers import pipeline

repo, revision, text = sys.argv[1:]
predictor = BoundaryPredictor.from_pretrained(repo, revision=revision)
ids = predictor.vocabulary.encode(text).ids
logits = predictor.live.reader._logits([ids])[0]
found = pipeline("token-classification", model=repo, revision=revision)(text)
print(json.dumps([predictor.label_shift, predictor.window, logits.tolist(), len(found)]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A trained predictor, with its base model beside it."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("trained") / "tiny"
    base = make_base([segment.text for segment in segments()], out / "base", steps=5)
    return train_boundary(segments(), out, base=base, label_shift=1, window=120, **QUICK).folder


def test_a_pushed_predictor_is_one_commit_and_loads_with_the_same_logits(folder, hub, tmp_path):
    commit = push_boundary(folder, "ada/tiny", tag="v1", license="mit", datasets=["ada/spans"])
    repo = hub.repos["models", "ada/tiny"]
    tree = repo.at("v1").tree
    assert repo.at("v1").id == commit == repo.branches["main"] and repo.at(repo.at(commit).parent).parent is None
    assert {path for path in tree if path != ".gitattributes"} == {
        "README.md", "config.json", "model.safetensors", "report.json", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    text = segments()[3].text
    network, tokenizer = (kind.from_pretrained(folder) for kind in (AutoModelForTokenClassification, AutoTokenizer))
    with torch.inference_mode():
        expected = network(torch.tensor([tokenizer(text)["input_ids"]])).logits[0]
    loaded = subprocess.run(
        [sys.executable, "-c", LOAD, "ada/tiny", commit, text],
        env={**hub.environment(tmp_path / "other"), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert loaded.returncode == 0, loaded.stderr
    label_shift, window, logits, found = json.loads(loaded.stdout)
    assert (label_shift, window, found) == (1, 120, len(logits))
    assert torch.equal(torch.tensor(logits), expected)


def test_a_second_push_is_a_second_commit_on_top(folder, hub):
    first, second = (push_boundary(folder, "ada/tiny", license=name) for name in ("mit", "apache-2.0"))
    assert hub.repos["models", "ada/tiny"].at(second).parent == first


def test_a_token_that_may_not_write_is_told_before_anything_is_sent(folder, hub):
    push_boundary(folder, "ada/tiny")
    sent = hub.uploaded()
    with pytest.raises(BoundaryError, match="HF_TOKEN"):
        push_boundary(folder, "ada/tiny", token=READ_TOKEN, license="mit")
    assert hub.uploaded() == sent and len(list(hub.repos["models", "ada/tiny"].history("main"))) == 2


def test_a_push_that_fails_leaves_nothing_half_there_and_can_be_repeated(folder, hub):
    hub.fault = lambda request: "503" if "/commit/" in request.path else None
    with pytest.raises(BoundaryError, match="status 503.*run it again"):
        push_boundary(folder, "ada/tiny", retry_timeout=0, backoff=0)
    assert "config.json" not in hub.repos["models", "ada/tiny"].at("main").tree
    hub.fault = lambda request: None
    push_boundary(folder, "ada/tiny")
    assert "config.json" in hub.repos["models", "ada/tiny"].at("main").tree


def test_a_busy_hub_is_tried_again_and_a_lost_answer_is_no_second_commit(folder, hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # the client's own retries
    busy = random.Random(3)
    hub.fault = lambda request: "503" if busy.random() < 0.3 else None
    commit = push_boundary(folder, "ada/tiny", tag="v1", backoff=0)
    repo = hub.repos["models", "ada/tiny"]
    assert repo.tags == {"v1": commit}
    faults = ["lost"]
    hub.fault = lambda request: faults.pop() if request.path.endswith("/commit/main") and faults else None
    push_boundary(folder, "ada/tiny", license="mit", backoff=0)
    assert len(list(repo.history("main"))) == 3 and not faults


def test_a_folder_that_holds_no_predictor_is_refused(folder, hub, tmp_path):
    with pytest.raises(BoundaryError, match="could be loaded"):
        push_boundary(tmp_path, "ada/none")
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(BoundaryError, match="holds no trained predictor"):
        push_boundary(tmp_path, "ada/none")
    assert not hub.repos


def test_the_card_tells_what_was_measured(folder):
    card = render_card(folder, "ada/tiny", license="mit", datasets=["ada/spans"])
    report = json.loads((folder / "report.json").read_text())
    results = {(r.dataset_name, r.metric_name): r.metric_value for r in card.data.eval_results}
    assert results["test segments", "Character F1 of style"] == round(report["test"]["char_f1"], 4)
    assert results["test segments", "Span F1 of style (a)"] == round(report["test"]["by_family"]["a"]["span"]["f1"], 4)
    told = yaml.safe_load(card.content.split("---")[1])
    assert told["widget"][0]["text"].startswith("Okay, so")
    assert told["model-index"][0]["name"] == "tiny" and told["pipeline_tag"] == "token-classification"
    assert (told["license"], told["datasets"], told["library_name"]) == ("mit", ["ada/spans"], "transformers")
    body = " ".join(card.text.split())
    for said in (
        f"{report['parameters']:,} parameters", "the label at a token is about the **next** token", "120 tokens",
        'BoundaryPredictor("ada/tiny")', 'pipeline("token-classification", model="ada/tiny"', "**It is small**",
        f"{report['test']['char_f1']:.3f}",
    ):  # fmt: skip
        assert said in body
    assert ModelCard(card.content).data.to_dict() == card.data.to_dict()


def test_the_card_is_there_from_the_start_and_shows_no_place(folder):
    text = (folder / "README.md").read_text()
    assert "# tiny" in text and str(folder.parent) not in text


def test_names_from_the_data_do_not_break_the_card(folder, tmp_path):
    for file in folder.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    report = json.loads((folder / "report.json").read_text())
    family = report["test"]["by_family"].pop("a")
    report["test"]["by_family"]['<img src=x>|"'] = family
    (tmp_path / "report.json").write_text(json.dumps(report))
    assert "<img" not in render_card(tmp_path).text
