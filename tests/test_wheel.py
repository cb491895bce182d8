"""The built wheel works on its own: outside the checkout, in an environment that holds nothing else of ours."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
import typer

import tessy_hf
from tessy_hf.cli.main import app
from tests.documents import blocks

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
SOURCES = ("tessy_hf", "recipes", "setup.py", "MANIFEST.in", "pyproject.toml", "README.md", "LICENSE", "NOTICE")


def run(*command, cwd):
    """Run a command without this checkout in its path."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"COLUMNS": "200"}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """An environment with the wheel in it; its dependencies are those of the environment that runs this test."""
    work = tmp_path_factory.mktemp("wheel")
    source = work / "source"
    source.mkdir()
    for name in SOURCES:  # setuptools leaves files beside what it builds
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", source, cwd=work)
    [wheel] = work.glob("*.whl")
    environment = work / "environment"
    venv.create(environment, symlinks=True)
    python = environment / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=work).strip())
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", wheel, cwd=work)
    # A .pth file adds the folder but reads no .pth file in it, so the editable install there stays out.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    place = run(python, "-c", "import tessy_hf; print(tessy_hf.__file__)", cwd=work).strip()
    assert Path(place).is_relative_to(site)
    return python


def test_the_demo_in_the_readme_runs_outside_the_checkout(installed, tmp_path):
    block = next(block.code for block in blocks(ROOT / "README.md") if "demo.transform" in block.code)
    assert "tokens are the teacher's" in run(installed, "-c", block, cwd=tmp_path)


def test_the_recipes_come_with_the_package(installed, tmp_path):
    command = installed.parent / "tessy"
    listed = run(command, "examples", cwd=tmp_path)
    assert "miniature\n" in listed and "qwen3-8b--gpt-oss-120b--code\n" in listed and "cluster/slurm\n" in listed
    run(command, "examples", "miniature", cwd=tmp_path)
    done = run(command, "synthesize", "miniature.yaml", "prompts.jsonl", "rows.jsonl", "--limit", "2", cwd=tmp_path)
    assert "2 rows in rows.jsonl" in done
    assert f"tessy-hf {tessy_hf.__version__}" in run(command, "--version", cwd=tmp_path)


@pytest.mark.parametrize("command", [None, *sorted(typer.main.get_command(app).commands)])
def test_every_command_has_a_help_page(installed, tmp_path, command):
    words = [command] if command else []
    assert "Usage: tessy" in run(installed.parent / "tessy", *words, "--help", cwd=tmp_path)
