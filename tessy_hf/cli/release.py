"""`tessy push`, `show` and `diff`: releases on the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tessy_hf.cli.files import load

if TYPE_CHECKING:
    pass


def push(
    rows: Annotated[
        str, typer.Argument(help="Finished rows: a journal, a .parquet or .jsonl file, or a dataset on the Hub.")
    ],
    repo: Annotated[str, typer.Argument(help="The dataset repository, user/name. Created if it does not exist.")],
    version: Annotated[
        str,
        typer.Option(help="The version. A minor step (1.1.0) appends new rows, a major one replaces all."),
    ] = "1.0.0",
    split: Annotated[str, typer.Option(help="The split's name.")] = "train",
    config: Annotated[str, typer.Option(help="The configuration (subset) of the dataset.")] = "default",
    private: Annotated[bool | None, typer.Option(help="Create the repository as private.")] = None,
    append: Annotated[
        bool | None,
        typer.Option("--append/--replace", help="Append to the last release or replace it."),
    ] = None,
    failures: Annotated[
        str,
        typer.Option(help="Failed and incomplete rows: into their own split, or drop."),
    ] = "split",
    license: Annotated[str | None, typer.Option(help="The data's license, as the Hub names it.")] = None,
    license_name: Annotated[str | None, typer.Option(help="The license's name, with --license other.")] = None,
    license_link: Annotated[str | None, typer.Option(help="A link to the license, with --license other.")] = None,
    recipe: Annotated[Path | None, typer.Option(help="The recipe of the rows; journals record it.")] = None,
    run: Annotated[str | None, typer.Option(help="Which run of a journal, if it holds several.")] = None,
    max_shard_size: Annotated[str, typer.Option(help="Maximum uncompressed size of a file.")] = "500MB",
) -> None:
    """Release finished rows on the Hub: data, manifest and card under one tag, all or nothing."""
    from tessy_hf.hub.push import push_to_hub
    from tessy_hf.transform import TessyTransform

    console = Console()
    release = push_to_hub(
        _finished(rows, split),
        repo,
        version,
        split=split,
        config_name=config,
        private=private,
        append=append,
        failures=failures,  # type: ignore[arg-type]
        license=license,
        license_name=license_name,
        license_link=license_link,
        manifest=TessyTransform.from_yaml(recipe).record() if recipe else None,
        run=run,
        max_shard_size=max_shard_size,
        say=lambda step: console.print(f"· {step}", markup=False, highlight=False, soft_wrap=True),
    )
    console.print(f"{release.rows} rows, {release.failed} failed or incomplete: {release.url}", soft_wrap=True)


def _finished(rows: str, split: str) -> Any:
    """Open the rows to push."""
    from tessy_hf.rows.columns import schema, thinking_key
    from tessy_hf.rows.loading import ending

    if ending(rows):
        dataset = load(rows, "train", streaming=False)
        message = dataset.features.get("messages")
        keys = getattr(message, "feature", {})
        kinds = schema(thinking_key(keys)).items()
        typed = {name: kind for name, kind in kinds if name in dataset.features}
        return dataset.cast(type(dataset.features)({**dataset.features, **typed}))
    if Path(rows).exists() or rows.count("/") != 1:
        return Path(rows)
    return load(rows, split, streaming=False)


def show(
    release: Annotated[str, typer.Argument(help="A release, user/name@v1.0.0; without a tag, the one on main.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the stored manifests.")] = False,
) -> None:
    """Show what a release holds, where it comes from, and the command that reproduces it."""
    from tessy_hf.hub import releases

    console = Console()
    for manifest in releases.manifests(release):
        if as_json:
            typer.echo(manifest.to_json(), nl=False)
            continue
        table = Table("", f"{release}, split {manifest.split} of {manifest.config_name}", show_edge=False)
        for name, value in releases.outline(manifest):
            table.add_row(name, Text(value))
        console.print(table)
        name = f"{release.partition('@')[0]}@v{manifest.version}"
        for run in manifest.runs:
            console.print("\nTo reproduce these rows:", highlight=False)
            command = releases.command(name, run, several=len(manifest.runs) > 1)
            console.print(command, markup=False, highlight=False, soft_wrap=True)


def diff(
    repo: Annotated[str, typer.Argument(help="The dataset repository, user/name.")],
    before: Annotated[str, typer.Argument(help="A release, v1.0.0.")],
    after: Annotated[str, typer.Argument(help="Another release, v1.1.0.")],
) -> None:
    """Compare two releases: rows added, removed and changed, settings, models, libraries."""
    from tessy_hf.hub import releases

    console = Console()
    for change in releases.diff(repo, before, after):
        table = Table(f"{change.split} of {change.config_name}", before, after, show_edge=False)
        table.add_row("rows", *map(str, change.rows))
        for fact in change.facts:
            table.add_row(*map(Text, fact))
        console.print(table)
        for what in ("added", "removed", "changed"):
            ids, count = getattr(change, what)
            some = f" ({', '.join(map(str, ids))}{', …' if count > len(ids) else ''})" if count else ""
            console.print(f"{what}: {count} rows{some}", markup=False, highlight=False, soft_wrap=True)
