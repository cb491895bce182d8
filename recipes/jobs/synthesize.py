# /// script
# requires-python = ">=3.11"
# dependencies = ["tessy-hf[report,vllm]"]
# ///
"""Write a shard of a dataset's rows on a rented machine, and release all rows once no shard is missing.

    hf jobs uv run --flavor h200x2 --timeout 12h --secrets HF_TOKEN recipes/jobs/synthesize.py \
        https://example.org/code.yaml me/prompts me/tessy-code --shard 0/8

Serves each model of the recipe that has ``engine: server`` with vLLM on this machine, on its own GPUs. Finished
rows go to ``--parts``, by default a dataset on the Hub, from which any other job goes on: begin a job that was ended
again with the same words. The job that finds all rows there releases them.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import urlsplit

import yaml

TESSY = [sys.executable, "-m", "tessy_hf.cli.main"]


def main(words: Sequence[str] | None = None) -> int:
    """Serve, synthesize, and release where all shards are done; return the exit code."""
    given = arguments(words)
    recipe = fetch(given.recipe)
    parts = given.parts or f"hf://datasets/{given.release}-parts/v{given.version}"
    if parts.startswith("hf://datasets/"):
        from huggingface_hub import HfApi

        name = "/".join(parts.removeprefix("hf://datasets/").split("/")[:2])
        HfApi().create_repo(name, repo_type="dataset", private=True, exist_ok=True)
    changes = [word for change in (f"parts={parts}", *given.set) for word in ("--set", change)]
    with served(yaml.safe_load(recipe.read_text(encoding="utf-8")), given):
        run = subprocess.run([*TESSY, "synthesize", str(recipe), given.prompts, "--shard", given.shard, *changes])
    if run.returncode:
        return run.returncode
    rows = "rows.parquet"
    merge = ["merge", parts, "--prompts", given.prompts, "--out", rows, "--overwrite", "--json"]
    merged = subprocess.run([*TESSY, *merge], stdout=subprocess.PIPE, text=True)
    missing = json.loads(merged.stdout or "{}").get("missing", [])
    if merged.returncode and not missing:  # whatever the other shards write, these rows cannot be merged
        return merged.returncode
    if missing:
        print("Other shards are not done yet; the last job releases the rows.")
        return 0
    return subprocess.run([*TESSY, "push", rows, given.release, "--version", given.version]).returncode


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipe", help="a file or URL")
    parser.add_argument("prompts", help="a dataset on the Hub, or a file")
    parser.add_argument("release", help="the dataset to release to, user/name")
    parser.add_argument("--shard", default="0/1", help="RANK/WORLD")
    parser.add_argument("--version", default="1.0.0")
    parser.add_argument("--parts", help="where all jobs put finished rows: hf://..., s3://...")
    parser.add_argument("--set", action="append", default=[], help="change the recipe")
    for author, gpus in (("teacher", "0"), ("student", "1")):
        parser.add_argument(f"--{author}-gpus", default=gpus, help="GPUs of its server, comma-separated")
        parser.add_argument(f"--{author}-args", default="", help="more words for its `vllm serve`")
    parser.add_argument("--ready", type=float, default=3600, help="seconds in which servers must be there")
    return parser.parse_args(words)


def fetch(recipe: str) -> Path:
    """Return the recipe as a local file."""
    if "://" not in recipe:
        return Path(recipe)
    path = Path("recipe.yaml")
    with urllib.request.urlopen(recipe) as response:
        path.write_bytes(response.read())
    return path


@contextmanager
def served(recipe: Mapping[str, Any], given: argparse.Namespace) -> Iterator[None]:
    """Run a server for each model that the recipe expects on this machine, until the end."""
    running: list[tuple[subprocess.Popen[bytes], str]] = []
    try:
        for author in ("teacher", "student"):
            speaker = recipe[author]
            if speaker["engine"] == "server":
                address = urlsplit(speaker["options"]["base_url"])
                words = command(speaker["model"], address.port or 80, getattr(given, f"{author}_gpus"))
                words += shlex.split(getattr(given, f"{author}_args"))
                gpus = {"CUDA_VISIBLE_DEVICES": getattr(given, f"{author}_gpus")}
                running.append(
                    (subprocess.Popen(words, env={**os.environ, **gpus}), f"http://{address.netloc}/health")
                )
        for process, health in running:
            wait(process, health, given.ready)
        yield
    finally:
        for process, _ in running:
            process.terminate()
        for process, _ in running:
            process.wait()


def command(model: str, port: int, gpus: str) -> list[str]:
    """Return the words that serve a model."""
    size = str(len(gpus.split(",")))
    local = ["--host", "127.0.0.1", "--port", str(port), "--tensor-parallel-size", size]
    told = ["--enable-scale-out", "--enable-prompt-tokens-details", "--scheduling-policy", "priority"]
    return ["vllm", "serve", model, *local, *told, "--middleware", "tessy_hf.vllm_middleware.Deltas"]


def wait(process: subprocess.Popen[bytes], health: str, seconds: float) -> None:
    """Wait until a server answers."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if process.poll() is not None:
            raise SystemExit(f"The server of {health} ended with {process.returncode}. Its words are above.")
        try:
            with urllib.request.urlopen(health, timeout=5):
                return
        except (URLError, OSError):
            time.sleep(1)
    raise SystemExit(f"The server of {health} did not answer in {seconds:.0f} s. Pass --ready with more.")


if __name__ == "__main__":
    sys.exit(main())
