"""`tessy examples`: list the recipes of the installed package, and copy one."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from tessy_hf.errors import OutputError, SettingsError
from tessy_hf.settings import nearest

_PACKAGE = Path(__file__).parents[1]


def examples(
    name: Annotated[
        str | None,
        typer.Argument(
            help="The recipe to copy, as it is listed; without one, list them.", autocompletion=lambda: list(recipes())
        ),
    ] = None,
    out: Annotated[Path, typer.Argument(help="The folder to copy it to.")] = Path(),
) -> None:
    """List the recipes that come with this package, or copy one with its prompts."""
    found, console = recipes(), Console()
    if name is None:
        for one, path in found.items():
            console.print(Text().append(f"{one}\n", "bold").append(f"  {_purpose(path)}"), highlight=False)
        console.print("\nCopy one with: tessy examples NAME", highlight=False)
        return
    if name not in found:
        raise SettingsError(f"There is no example {name!r}. Known: {', '.join(found)}. {nearest(name, found)}")
    prompts = sorted(found[name].parent.glob("*.jsonl"))
    targets = [out / f"{name.replace('/', '-')}.yaml", *(out / path.name for path in prompts)]
    if there := [str(path) for path in targets if path.exists()]:
        raise OutputError(f"{', '.join(there)} is there already. Pass another folder: tessy examples {name} FOLDER.")
    out.mkdir(parents=True, exist_ok=True)
    for source, target in zip([found[name], *prompts], targets, strict=True):
        shutil.copyfile(source, target)
        console.print(str(target), highlight=False, soft_wrap=True)
    words = ["tessy", "synthesize", targets[0], targets[1] if prompts else "prompts.jsonl", "rows.parquet"]
    console.print(f"next: {shlex.join(map(str, words))} --limit 20", markup=False, highlight=False, soft_wrap=True)


def recipes() -> dict[str, Path]:
    """Return the recipes of runs by name: those in the package, or beside it in a checkout."""
    inside = _PACKAGE / "recipes"
    folder = inside if inside.is_dir() else _PACKAGE.parent / "recipes"
    found = {"miniature": folder / "miniature" / "tessy.yaml"}
    found |= {path.stem: path for path in sorted(folder.glob("*.yaml"))}
    found |= {f"cluster/{path.stem}": path for path in sorted((folder / "cluster").glob("*.yaml"))}
    if not found["miniature"].is_file():
        raise SettingsError("This installation has no recipes. Reinstall the package from a wheel or a checkout.")
    return found


def _purpose(path: Path) -> str:
    """Say which models a recipe has, and on what hardware, from its first line."""
    text = path.read_text("utf-8")
    models = " → ".join(re.findall(r"^  model: (\S+)", text, re.MULTILINE))
    hardware = text.splitlines()[0].removeprefix("# Hardware: ").partition("; hours:")[0].rstrip(":")
    return f"{models}; {hardware}"
