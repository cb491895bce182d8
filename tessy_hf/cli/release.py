"""`tessy push`, `show` and `diff`: releases on the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from tessy_hf.cli.files import load
from tessy_hf.cli.synthesize import open_transform


def push(
    rows: Annotated[
        str,
        typer.Argument(help="Finished rows: a file or folder that a run wrote, a journal, or a dataset on the Hub."),
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
    language: Annotated[
        list[str] | None,
        typer.Option(help="The rows' language, such as en; by default as the card or the prompts' dataset says."),
    ] = None,
    prompts: Annotated[
        str | None, typer.Option(help="The prompts of a journal's rows, as for synthesize; others are left out.")
    ] = None,
    prompts_split: Annotated[str, typer.Option(help="Which split of the prompts.")] = "train",
    prompts_config: Annotated[str | None, typer.Option(help="Which configuration of the prompts.")] = None,
    recipe: Annotated[
        str | None, typer.Option(help="The recipe of the rows, if neither they nor this machine have its record.")
    ] = None,
    change: Annotated[list[str] | None, typer.Option("--set", help="Change the recipe, as for synthesize.")] = None,
    run: Annotated[str | None, typer.Option(help="Which run of a journal, if it holds several.")] = None,
    live: Annotated[
        bool, typer.Option("--live", help="Show the progress of a run on a branch until its journal is complete.")
    ] = False,
    live_main: Annotated[bool, typer.Option("--live-main", help="Show it on the card of main, too.")] = False,
    live_minutes: Annotated[float, typer.Option(help="Minutes between two commits of the progress.")] = 10,
    space: Annotated[
        Path | None,
        typer.Option(help="A folder that `tessy report --space` wrote, to publish as a Space of the same name."),
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Maximum uncompressed size of a file.")] = "500MB",
) -> None:
    """Release finished rows on the Hub: data, manifest and card under one tag, all or nothing."""
    from tessy_hf.hub.folders import push_space, space_files
    from tessy_hf.hub.live import Live
    from tessy_hf.hub.push import push_to_hub

    if space is not None:
        space_files(space)  # a wrong folder ends here, not after the release
    console = Console()
    release = push_to_hub(
        rows if is_local(rows) else load(rows, split, streaming=False),
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
        language=language,
        manifest=open_transform(recipe, change or [], None).record() if recipe else None,
        prompts=load(prompts, prompts_split, prompts_config, line_column="prompt") if prompts else None,
        run=run,
        live=Live(live_minutes, main=live_main) if live or live_main else False,
        max_shard_size=max_shard_size,
        say=lambda step: console.print(f"· {step}", markup=False, highlight=False, soft_wrap=True),
    )
    console.print(f"{release.rows} rows, {release.failed} failed or incomplete: {release.url}", soft_wrap=True)
    if space is not None:
        console.print(f"the report: {push_space(space, repo, private=private)}", soft_wrap=True)


def is_local(rows: str) -> bool:
    """Whether rows are named by a path, not by a dataset on the Hub."""
    from tessy_hf.rows.loading import ending

    return Path(rows).exists() or rows.count("/") != 1 or ending(rows) is not None


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
        head = _plain(f"{release}, split {manifest.split} of {manifest.config_name}")
        table = Table("", Column(head), show_edge=False)
        for fact in releases.outline(manifest):
            table.add_row(*map(_plain, fact))
        console.print(table)
        name = f"{release.partition('@')[0]}@v{manifest.version}"
        for run in manifest.runs:
            console.print()
            for line in releases.how_to_reproduce(name, run, several=len(manifest.runs) > 1):
                console.print(_plain(line), soft_wrap=True)


def _plain(value: object) -> Text:
    """Return what a publisher wrote as text that neither styles nor drives the terminal."""
    from tessy_hf.report.show import visible

    return Text(visible(str(value)))


def diff(
    repo: Annotated[str, typer.Argument(help="The dataset repository, user/name.")],
    before: Annotated[str, typer.Argument(help="A release, v1.0.0.")],
    after: Annotated[str, typer.Argument(help="Another release, v1.1.0.")],
) -> None:
    """Compare two releases: rows added, removed and changed, settings, models, libraries."""
    from tessy_hf.hub import releases

    console = Console()
    for change in releases.diff(repo, before, after):
        table = Table(Column(_plain(f"{change.split} of {change.config_name}")), before, after, show_edge=False)
        table.add_row("rows", *map(str, change.rows))
        for fact in change.facts:
            table.add_row(*map(_plain, fact))
        console.print(table)
        for what in ("added", "removed", "changed"):
            ids, count = getattr(change, what)
            some = f" ({', '.join(map(str, ids))}{', …' if count > len(ids) else ''})" if count else ""
            console.print(_plain(f"{what}: {count} rows{some}"), soft_wrap=True)
