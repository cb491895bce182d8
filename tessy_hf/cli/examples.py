"""`tessy examples`: list the recipes of the installed package, and copy one."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from tessy_hf.errors import OutputError, SettingsError

_PACKAGE = Path(__file__).parents[1]


def examples(
    name: Annotated[
        str | None, typer.Argument(help="The recipe to copy, as it is listed; without one, list them.")
    ] = None,
    out: Annotated[Path, typer.Argument(help="The folder to copy it to.")] = Path(),
) -> None:
    """List the recipes that come with this package, or copy one with its prompts."""
    found, console = recipes(), Console()
    if name is None:
        for one, path in found.items():
            text = Text(f"{one}\n", style="bold").append(f"  {_purpose(path)}", "not bold")
            console.print(text, highlight=False)
        console.print("\nCopy one with: tessy examples NAME", highlight=False)
        return
    if name not in found:
        from tessy_hf.settings import nearest

        raise SettingsError(f"There is no example {name!r}. Known: {', '.join(found)}. {nearest(name, found)}")
    sources = [found[name], *found[name].parent.glob("*.jsonl")] if name == MINIATURE else [found[name]]
    targets = [out / f"{name.replace('/', '-')}.yaml", *(out / path.name for path in sources[1:])]
    if there := [str(path) for path in targets if path.exists()]:
        raise OutputError(
            f"{' and '.join(there)} is there already. Pass another folder: tessy examples {name} FOLDER."
        )
    out.mkdir(parents=True, exist_ok=True)
    for source, target in zip(sources, targets, strict=True):
        shutil.copyfile(source, target)
        console.print(f"{target}", highlight=False, soft_wrap=True)
    rows = targets[1] if len(targets) > 1 else "prompts.jsonl"
    console.print(
        f"next: tessy synthesize {targets[0]} {rows} rows.parquet --limit 20", highlight=False, soft_wrap=True
    )


MINIATURE = "miniature"
"""The example of models that come with the package, hence with prompts."""


def recipes() -> dict[str, Path]:
    """Return the recipes of runs by name: those in the package, or beside it in a checkout."""
    inside = _PACKAGE / "recipes"
    folder = inside if inside.is_dir() else _PACKAGE.parent / "recipes"
    found = {MINIATURE: folder / "miniature" / "tessy.yaml"}
    found |= {path.stem: path for path in sorted(folder.glob("*.yaml"))}
    found |= {f"cluster/{path.stem}": path for path in sorted((folder / "cluster").glob("*.yaml"))}
    if not found[MINIATURE].is_file():
        raise SettingsError("This installation has no recipes. Reinstall the package from a wheel or a checkout.")
    return found


def _purpose(path: Path) -> str:
    """Return the hardware that a recipe's first line names."""
    return re.sub(r"^# Hardware: ", "", path.read_text("utf-8").splitlines()[0])
