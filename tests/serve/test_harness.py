"""EleutherAI's harness examines a served pair. It is an extra of its own: ``pip install "tessy-hf[harness]"``."""

import json
import os
import subprocess
import sys

import pytest
import yaml

from tessy_hf import demo
from tests.serve.running import running

pytest.importorskip("lm_eval", reason='pip install "tessy-hf[harness]"')
pytest.importorskip("uvicorn", reason='pip install "tessy-hf[serve]"')

TASK = {
    "task": "miniature",
    "dataset_path": "json",
    "output_type": "generate_until",
    "test_split": "test",
    "doc_to_text": "{{prompt}}",
    "doc_to_target": "{{reference_answer}}",
    "generation_kwargs": {"until": ["</s>"], "temperature": 0.0, "max_gen_toks": 200},
    "filter_list": [
        {
            "name": "digit",
            "filter": [{"function": "regex", "regex_pattern": r"answer is (\d)"}, {"function": "take_first"}],
        }
    ],
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}


@pytest.mark.slow
def test_the_harness_finds_the_score_that_the_verifier_gives(tmp_path):
    prompts = demo.prompts(12)
    prompts.to_json(tmp_path / "prompts.jsonl")
    task = {**TASK, "dataset_kwargs": {"data_files": {"test": str(tmp_path / "prompts.jsonl")}}}
    (tmp_path / "miniature.yaml").write_text(yaml.safe_dump(task))
    transform = demo.transform(rows_in_flight=4, temperature=0.0, journal=None)
    with transform:
        right = sum(map(demo.verify, transform.map(prompts)))
    with running(transform) as url:
        options = f"model=pair,base_url={url}/chat/completions,num_concurrent=4"
        words = ["--model", "local-chat-completions", "--model_args", options, "--tasks", "miniature"]
        words += ["--include_path", str(tmp_path), "--apply_chat_template", "--output_path", str(tmp_path / "out")]
        quiet = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache")}
        subprocess.run([sys.executable, "-m", "lm_eval", *words], check=True, env=quiet, cwd=tmp_path)
    (found,) = (tmp_path / "out").glob("*/results_*.json")
    assert json.loads(found.read_text())["results"]["miniature"]["exact_match,digit"] == right / len(prompts)
