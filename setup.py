"""Put the recipes of the checkout into wheels, for `tessy examples`. All else about building is in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

RECIPES = ("*.yaml", "cluster/*.yaml", "miniature/tessy.yaml", "miniature/prompts.jsonl")


class BuildPy(build_py):
    """Copies the recipes beside the modules, where the build does not only link to the checkout."""

    def run(self) -> None:
        """Copy."""
        super().run()
        if self.editable_mode:
            return
        for source in (path for pattern in RECIPES for path in Path("recipes").glob(pattern)):
            target = Path(self.build_lib, "tessy_hf", source)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)


setup(cmdclass={"build_py": BuildPy})
