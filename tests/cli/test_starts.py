"""Starts of `tessy synthesize` that fail: exit code 2 and one sentence, before any model is loaded."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tessy_hf import demo
from tests.cli.test_cli import tessy as tessy  # noqa: PLC0414 - a fixture

PROJECT = Path(__file__).parents[2]
SERVER = {"engine": "server", "model": "student"}
GONE = {"base_url": "http://127.0.0.1:9/v1", "retry_timeout": 0.2}
DOWN = {"base_url": "http://127.0.0.1:9/v1", "tokenizer": str(demo.STUDENT), "retry_timeout": 0.2}

RECIPES = {
    "a setting": ({"methodx": "tessy"}, "Unknown setting 'methodx'.*Did you mean 'method'"),
    "a value": ({"temperature": "warm"}, "temperature='warm' cannot be used"),
    "a key of an author": ({"teacher": {"modelx": "x"}}, "invalid at teacher.modelx"),
    "a key of a predictor": ({"teacher": {"boundary": {"modelx": "x"}}}, "invalid at teacher.boundary"),
    "a key of its engine": (
        {"teacher": {"boundary": {"model": "x", "base_url": "http://t1/v1"}}},
        "invalid at teacher.boundary.base_url: .*under `options`: base_url",
    ),
    "an option": ({"teacher": {"options": {"max_bacth": 4}}}, "'max_bacth'.*Did you mean 'max_batch'"),
    "a server's option": ({"teacher": {**SERVER, "options": {"base_ulr": "x"}}}, "Did you mean 'base_url'"),
    "an engine": ({"teacher": {"engine": "vlm"}}, "asks for the engine 'vlm'"),
    "a verifier": ({"verifier": "nope"}, "Unknown verifier 'nope'"),
    "the prompt column": ({"prompt_column": "promptx"}, "no column 'promptx'"),
    "the id column": ({"id_column": "idd"}, "no column 'idd'"),
    "a model's folder": (
        {"teacher": {"model": "/no/such/model"}},
        "tokenizer of '/no/such/model' could not be loaded",
    ),
    "a model on the Hub": ({"teacher": {"model": "me/none"}}, "tokenizer of 'me/none' could not be loaded"),
    "a predictor's folder": (
        {"student": {"boundary": "/no/such"}},
        "No boundary predictor could be loaded from '/no/s",
    ),
    "a predictor on the Hub": (
        {"teacher": {"boundary": "me/none"}},
        "No boundary predictor could be loaded from 'me/n",
    ),
    "another model": ({"teacher": {"boundary": str(demo.STUDENT)}}, "does not state whether a label"),
    "a template's file": (
        {"teacher": {"chat_template": "/no/such.jinja"}},
        "drops the prompt.*not the name of a file",
    ),
    "a server": (
        {"method": "student-only", "student": {**SERVER, "options": DOWN}},
        "127.0.0.1:9/v1 cannot be reached",
    ),
    "a predictor's server": (
        {"teacher": {"boundary": {"model": str(demo.BOUNDARY_TEACHER), "engine": "server", "options": GONE}}},
        "boundary predictor .* is gone: The server at http://127.0.0.1:9/v1 did not answer",
    ),
    "a device": ({"student": {"options": {"device": "gpu"}}}, "device 'gpu' cannot be used"),
    "a precision": ({"student": {"options": {"dtype": "float17"}}}, "could not be loaded.*float17"),
    "a journal": ({"journal": "/proc/none/rows.journal"}, "journal /proc/none/rows.journal cannot be made"),
}


def files(folder, change=None):
    """Write a recipe of the miniature models with something changed, and prompts; return the command's words."""
    authors = {"teacher": (demo.TEACHER, demo.BOUNDARY_TEACHER), "student": (demo.STUDENT, demo.BOUNDARY_STUDENT)}
    recipe = {"id_column": "id", "journal": None, "max_thinking_tokens": 20, **(change or {})}
    for author, (model, boundary) in authors.items():
        own = {"engine": "transformers", "model": str(model), "boundary": str(boundary)}
        recipe[author] = {**own, **(change or {}).get(author, {})}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    demo.prompts(2, seed=3).to_json(folder / "prompts.jsonl")
    return [str(folder / name) for name in ("recipe.yaml", "prompts.jsonl", "rows.parquet")]


def sentence(printed):
    """Return the last line, which is all there is of the error."""
    assert "Traceback" not in printed
    return printed.strip().splitlines()[-1]


@pytest.mark.parametrize(("change", "told"), RECIPES.values(), ids=RECIPES)
def test_what_is_wrong_in_a_recipe_is_said(tessy, tmp_path, monkeypatch, change, told):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, printed = tessy("synthesize", *files(tmp_path, change))
    assert code == 2 and not (tmp_path / "rows.parquet").exists()
    assert re.search(told, sentence(printed)), printed


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
@pytest.mark.parametrize("change", [{"engine": "vllm"}, {"boundary": {"model": "x", "engine": "vllm"}}])
def test_a_missing_vllm_is_said(tessy, tmp_path, change):
    code, printed = tessy("synthesize", *files(tmp_path, {"student": change}))
    assert code == 2 and "vLLM is needed and could not be imported" in sentence(printed)


def test_what_is_wrong_on_the_command_line_is_said(tessy, tmp_path):
    recipe, prompts, out = files(tmp_path)
    (tmp_path / "bad.yaml").write_text("a: [1\nb: }\n")
    (tmp_path / "empty.jsonl").write_text("")
    for words, told in [
        ((recipe, tmp_path / "none.jsonl", out), "there is no such file"),
        ((recipe, tmp_path / "empty.jsonl", out), "it is empty"),
        ((recipe, "me/none", out), "'me/none' cannot be read"),
        ((tmp_path / "none.yaml", prompts, out), "none.yaml' cannot be read"),
        ((tmp_path / "bad.yaml", prompts, out), "bad.yaml' cannot be read"),
        ((recipe, prompts, tmp_path / "rows.txt"), "neither .parquet nor .jsonl"),
        ((recipe, prompts), "No output path given"),
        ((recipe, prompts, out, "--set", "temperature"), "is not an override"),
        ((recipe, prompts, out, "--set", "temperature=[1"), "is not an override"),
        ((recipe, prompts, out, "--shard", "9"), "is not RANK/WORLD"),
        ((recipe, prompts, out, "--allow-failures", "few"), "neither a number nor a share"),
    ]:
        code, printed = tessy("synthesize", *words)
        assert code == 2 and told in sentence(printed), printed
    assert tessy("synthesize", "--no-such-option")[0] == 2


QUIET = """
import sys
from tessy_hf.cli.main import main
try:
    main()
finally:
    print(sorted({"torch", "vllm"} & sys.modules.keys()))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a setting", "an option"])
def test_nothing_heavy_is_imported_for_it(tmp_path, name):
    command = [sys.executable, "-c", QUIET, "synthesize", *files(tmp_path, RECIPES[name][0])]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), "HF_HUB_OFFLINE": "1"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2 and ended.stdout.splitlines()[-1] == "[]", ended.stderr
