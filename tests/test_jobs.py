"""The script for rented machines: its shards become one release, whichever job ends last."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from datasets import load_dataset
from packaging.requirements import Requirement

from tessy_hf import demo

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")]

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "recipes" / "jobs" / "synthesize.py"

VLLM = f"""#!{sys.executable}
import http.server, os, sys
open(os.environ["SERVED"], "a").write(os.environ["CUDA_VISIBLE_DEVICES"] + " " + " ".join(sys.argv[1:]) + "\\n")
port = int(sys.argv[sys.argv.index("--port") + 1])

class Healthy(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

http.server.HTTPServer(("127.0.0.1", port), Healthy).serve_forever()
"""


def job(hub, tmp_path, *words, **environment):
    given = {**hub.environment(tmp_path / "home"), "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *words], cwd=ROOT, env={**given, **environment}, capture_output=True, text=True
    )
    return done.returncode, done.stdout + done.stderr


def test_the_script_names_extras_that_the_package_has():
    head = re.search(r"^# /// script\n((?:#.*\n)*?)# ///$", SCRIPT.read_text(), re.M)[1]
    told = tomllib.loads(re.sub("^# ?", "", head, flags=re.M))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (named,) = [Requirement(one) for one in told["dependencies"]]
    assert named.name == project["name"] and named.extras <= project["optional-dependencies"].keys()
    assert told["requires-python"] == project["requires-python"]


def test_two_jobs_make_one_release(hub, tmp_path):
    demo.prompts(6, seed=8).push_to_hub("ada/prompts")
    words = (str(ROOT / "recipes" / "miniature" / "tessy.yaml"), "ada/prompts", "ada/rows")
    try:
        code, printed = job(hub, tmp_path, *words, "--shard", "0/2")
        assert code == 0 and "Other shards are not done yet" in printed, printed
        assert ("datasets", "ada/rows") not in hub.repos and hub.repo("ada/rows-parts").private
        code, printed = job(hub, tmp_path, *words, "--shard", "1/2")
        assert code == 0 and "6 rows, 0 failed" in printed, printed
    finally:
        (ROOT / "rows.parquet").unlink(missing_ok=True)
    rows = load_dataset("ada/rows", revision="v1.0.0", split="train")
    assert sorted(rows["id"]) == sorted(demo.prompts(6, seed=8)["id"])


def test_a_server_of_each_model_runs_while_rows_are_written(tmp_path, monkeypatch):
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        import synthesize
    finally:
        sys.path.remove(str(SCRIPT.parent))
    command = tmp_path / "bin" / "vllm"
    command.parent.mkdir()
    command.write_text(VLLM)
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{command.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("SERVED", str(tmp_path / "served"))
    from tests.engines.servers import free_ports

    ports = free_ports(2)
    recipe = {
        author: {"engine": "server", "model": author, "options": {"base_url": f"http://127.0.0.1:{port}/v1"}}
        for author, port in zip(("teacher", "student"), ports, strict=True)
    }
    given = synthesize.arguments(["r.yaml", "me/p", "me/r", "--teacher-gpus", "0,1", "--teacher-args", "--seed 3"])
    with synthesize.served(recipe, given):
        first, second = sorted((tmp_path / "served").read_text().splitlines())
    local = f"--host 127.0.0.1 --port {ports[0]} --tensor-parallel-size 2"
    options = "--enable-scale-out --enable-prompt-tokens-details --scheduling-policy priority"
    options += " --middleware tessy_hf.vllm_middleware.Deltas"
    assert first == f"0,1 serve teacher {local} {options} --seed 3"
    assert second.startswith("1 serve student ")
    command.write_text("#!/bin/sh\nexit 3\n")
    with pytest.raises(SystemExit, match="ended with 3"), synthesize.served(recipe, given):
        pass
