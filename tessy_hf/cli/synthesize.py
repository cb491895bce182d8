"""`tessy synthesize` and `tessy plan`: prompts in, finished rows or an estimate out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from tessy_hf.cli.ending import check_failures, most_failures, one_line_for_weights, show, stopping, tell_plan
from tessy_hf.cli.files import load
from tessy_hf.errors import SettingsError

if TYPE_CHECKING:
    from tessy_hf.pilot.estimate import Estimate
    from tessy_hf.transform import TessyTransform


def synthesize(
    recipe: Annotated[
        str, typer.Argument(help="A YAML recipe, or a release to reproduce: user/name@v1.0.0.", show_default=False)
    ],
    data: Annotated[
        str,
        typer.Argument(
            help="Prompts: a file (.jsonl, .json, .csv, .tsv, .parquet, or .txt with a prompt per line; also "
            "compressed), a saved folder, or a dataset on the Hub, user/name or user/name@revision."
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Argument(
            help="Where to write the finished rows: a .parquet or .jsonl file. Optional if the recipe has "
            "`parts`, which `tessy merge` reads."
        ),
    ] = None,
    split: Annotated[str, typer.Option(help="Which split of the prompts.")] = "train",
    config: Annotated[str | None, typer.Option(help="Which configuration of the prompts.")] = None,
    change: Annotated[
        list[str] | None, typer.Option("--set", help="Change the recipe: temperature=0.5, teacher.model=me/model.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Only the first rows, as a trial: the run without --limit reuses them.", min=1)
    ] = None,
    run: Annotated[str | None, typer.Option(help="Which run of a release, if it has several.")] = None,
    shard: Annotated[
        str | None, typer.Option(help="Only this shard of the prompts, RANK/WORLD: 0/8 to 7/8 for eight hosts.")
    ] = None,
    ray: Annotated[bool, typer.Option("--ray", help="On a Ray cluster, as the recipe's `cluster` says.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an output that is not of this run and these prompts.")
    ] = False,
    allow_failures: Annotated[
        str,
        typer.Option(help="How many rows may fail for good, a number or a share (5%), before the exit code is 1."),
    ] = "0",
) -> None:
    """Synthesize a finished row for each prompt, teacher and student together.

    Exit codes: 0, all rows are there; 1, more rows failed for good than --allow-failures permits (rows whose prompts
    cannot be used do not count); 2, the run could not start or continue, and one sentence says why; 130, Ctrl-C.
    """
    from tessy_hf.rows.output import Output
    from tessy_hf.rows.parquet import tables

    most_failures(allow_failures, 0)
    kept = _kept_by(shard)
    output = Output(out, [recipe, data], overwrite=overwrite) if out is not None else None
    with open_transform(recipe, change or [], run) as transform:
        if out is None and transform.settings.parts is None:
            raise SettingsError("No output path given. Pass a .parquet or .jsonl file, or --set parts=FOLDER.")
        prompts = load(data, split, config, line_column="prompt")
        if kept is not None:
            prompts = prompts.filter(kept, with_indices=True)
        prompts = prompts if limit is None else prompts.take(limit)
        if output is not None:
            output.check_prompts(transform.run_fingerprint, transform.settings, prompts)
        if ray:
            _synthesize_on_ray(prompts, transform, out, recipe, change or [], overwrite, allow_failures)
            return
        features = transform.features(prompts)
        tell_plan(transform, transform.plan(prompts))
        rows = prompts.map(transform, batched=True, features=features)
        with stopping(transform):
            if output is None:
                count = sum(1 for _ in rows)
            else:
                count = output.write(tables(rows, features), features, transform.record)
        summary = transform.summary()
    Console().print(f"{count} rows in {out or transform.settings.parts}", soft_wrap=True, highlight=False)
    show(summary, transform, data, out, trial=limit is not None)
    check_failures(summary.failed, summary.finished + summary.failed, allow_failures)


def _synthesize_on_ray(
    prompts: Any,
    transform: TessyTransform,
    out: Path | None,
    recipe: str,
    change: list[str],
    overwrite: bool,
    allow_failures: str,
) -> None:
    from tessy_hf.cluster import ray as distributed
    from tessy_hf.recipe import read_placement

    placement = read_placement(Path(recipe), change) if Path(recipe).exists() else distributed.Placement()
    written = distributed.synthesize(prompts, transform, out, placement=placement, overwrite=overwrite)
    report = written.merge.report
    Console().print(
        f"{report.prompts} rows in {out or transform.settings.parts}, {written.found} of them found, "
        f"{report.failed} failed, {report.unusable} refused for their prompts",
        soft_wrap=True,
        highlight=False,
    )
    check_failures(report.failed, report.prompts - report.unusable, allow_failures)


def _kept_by(shard: str | None) -> Callable[[Any, int], bool] | None:
    """Return which rows a shard keeps, by their numbers: every n-th.

    Not ``split_dataset_by_node``: in a stream of fewer files than hosts it skips rows only after they are mapped.
    """
    if shard is None:
        return None
    rank, _, world = shard.partition("/")
    if not (rank.isdecimal() and world.isdecimal() and int(rank) < int(world)):
        raise SettingsError(f"--shard {shard!r} is not RANK/WORLD. Use 0/8 for the first of eight hosts.")
    return lambda _, number: number % int(world) == int(rank)


def plan(
    recipe: Annotated[str, typer.Argument(help="A YAML recipe, or a release.", show_default=False)],
    data: Annotated[str, typer.Argument(help="Prompts, as for synthesize.")],
    rows: Annotated[int, typer.Option(help="Rows that the pilot writes; a few times rows_in_flight is best.")] = 64,
    prompts: Annotated[
        int | None, typer.Option(help="Prompts of the whole run; by default those of the file.")
    ] = None,
    teacher_gpus: Annotated[int, typer.Option(help="GPUs that the teacher has in the pilot.")] = 1,
    student_gpus: Annotated[int, typer.Option(help="GPUs that the student has in the pilot.")] = 1,
    split: Annotated[str, typer.Option(help="Which split of the prompts.")] = "train",
    config: Annotated[str | None, typer.Option(help="Which configuration of the prompts.")] = None,
    change: Annotated[list[str] | None, typer.Option("--set", help="Change the recipe.")] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the pilot's rows in the run's journal.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Estimate the cost of a run from a short pilot, whose rows are discarded unless --keep is given."""
    from tessy_hf.pilot.estimate import estimate

    given = load(data, split, config, streaming=prompts is not None, line_column="prompt")
    gpus = {"teacher": teacher_gpus, "student": student_gpus}
    with open_transform(recipe, change or [], None) as transform:
        if prompts is None:
            transform.plan(given)  # names other runs of these prompts
        one_line_for_weights(transform)
        found = estimate(transform, given, prompts, rows, gpus, keep=keep)
    if as_json:
        typer.echo(json.dumps(found.as_dict()))
        return
    _show_estimate(found)


def _show_estimate(found: Estimate) -> None:
    table = Table("", "kept tokens", "generated", "requests", "busy hours", "GPU-hours", box=None)
    for name, cost in (("teacher", found.teacher), ("student", found.student)):
        counts = (cost.kept_tokens, cost.generated_tokens, cost.requests)
        table.add_row(name, *(f"{count:,}" for count in counts), f"{cost.hours:.3g}", f"{cost.gpu_hours:.3g}")
    console, replicas = Console(), found.replicas
    console.print(f"{found.prompts:,} prompts, from a pilot of {found.pilot_rows} ({found.pilot_failed} failed)")
    console.print(table)
    waiting = ", ".join(f"{share:.0%} for {name}" for name, share in found.waiting.items())
    console.print(f"{found.hours:.3g} hours with the pilot's setup; rows waited {waiting}: {found.bottleneck}-bound")
    console.print(
        f"balanced: {replicas['teacher']} teacher replicas to {replicas['student']} student replicas",
        highlight=False,
    )


def open_transform(recipe: str, changes: list[str], run: str | None) -> TessyTransform:
    """Read a transform from a file, or from the record of a release."""
    from tessy_hf.transform import TessyTransform

    if "@" not in recipe or Path(recipe).exists():
        return TessyTransform.from_yaml(recipe, *changes)
    from tessy_hf import recipe as recipes
    from tessy_hf.hub import releases

    described = releases.recipe(releases.run_of(recipe, run), changes)
    teacher, student, settings = recipes.build(described, recipe, changes)
    transform = TessyTransform(teacher=teacher, student=student, **settings)
    transform.recipe = recipe
    return transform
