"""The `tessy` command: thin words over the package."""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tessy_hf.errors import DatasetError, SettingsError, TessyError

if TYPE_CHECKING:
    from tessy_hf.cluster.merge import Report
    from tessy_hf.pilot.estimate import Estimate
    from tessy_hf.transform import TessyTransform

app = typer.Typer(
    help="Cooperative teacher-student synthesis of reasoning data (TESSY).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_KINDS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}

JournalPath = Annotated[Path, typer.Argument(help="A journal file.", show_default=False)]


@app.command()
def synthesize(
    recipe: Annotated[
        str, typer.Argument(help="A YAML recipe, or a release to make again: user/name@v1.0.0.", show_default=False)
    ],
    data: Annotated[
        str,
        typer.Argument(
            help="Prompts: a .jsonl, .json, .csv or .parquet file, or a dataset on the Hub, user/name or "
            "user/name@revision."
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Argument(
            help="Where to write the finished rows: a .parquet or .jsonl file. Not needed where the recipe has "
            "`parts`, which `tessy merge` reads."
        ),
    ] = None,
    split: Annotated[str, typer.Option(help="Which split of the prompts.")] = "train",
    config: Annotated[str | None, typer.Option(help="Which configuration of the prompts.")] = None,
    change: Annotated[
        list[str] | None, typer.Option("--set", help="Change the recipe: temperature=0.5, teacher.model=me/model.")
    ] = None,
    run: Annotated[str | None, typer.Option(help="Which run of a release, where it has several.")] = None,
    shard: Annotated[
        str | None, typer.Option(help="Only this part of the prompts, 0/8 to 7/8: one for each host.")
    ] = None,
    ray: Annotated[bool, typer.Option("--ray", help="On a Ray cluster, as the recipe's `cluster` says.")] = False,
) -> None:
    """Write an answer to each prompt, teacher and student together."""
    from datasets import Dataset

    if out is not None:
        _writer(out)
    with _transform(recipe, change or [], run) as transform:
        if out is None and transform.settings.parts is None:
            raise SettingsError("No place is named for the rows. Name a file, or pass --set parts= with a folder.")
        prompts = _shard(_load(data, split, config), shard)
        if ray:
            _synthesize_on_ray(prompts, transform, out, recipe, change or [])
            return
        features = transform.features(prompts)
        plan = transform.plan(prompts)
        Console(stderr=True).print(
            f"{plan.done} rows done, {plan.to_continue} to continue, {plan.to_do} to do, "
            f"{plan.failed_before} failed before",
            highlight=False,
        )
        rows = prompts.map(transform, batched=True, features=features)
        if out is None:
            Console().print(f"{sum(1 for _ in rows)} rows in {transform.settings.parts}", soft_wrap=True)
            return
        finished = Dataset.from_generator(_iterate, gen_kwargs={"rows": rows}, features=features)
    _write(finished, out)


def _synthesize_on_ray(
    prompts: Any, transform: TessyTransform, out: Path | None, recipe: str, change: list[str]
) -> None:
    from tessy_hf.cluster import ray as distributed
    from tessy_hf.recipe import read_placement

    if out is not None and out.suffix != ".parquet":
        raise TessyError(f"The output {str(out)!r} is no .parquet file, which a run with --ray writes. Name one.")
    placement = read_placement(Path(recipe), change) if Path(recipe).exists() else distributed.Placement()
    written = distributed.synthesize(prompts, transform, out, placement=placement)
    report = written.merge.report
    Console().print(
        f"{report.prompts} rows in {out or transform.settings.parts}, {written.found} of them there before, "
        f"{report.failed} failed",
        soft_wrap=True,
        highlight=False,
    )


@app.command()
def plan(
    recipe: Annotated[str, typer.Argument(help="A YAML recipe, or a release.", show_default=False)],
    data: Annotated[str, typer.Argument(help="Prompts, as for synthesize.")],
    rows: Annotated[int, typer.Option(help="How many rows the pilot writes; best a few times rows_in_flight.")] = 64,
    prompts: Annotated[
        int | None, typer.Option(help="How many prompts the whole run has; by default those of the file.")
    ] = None,
    teacher_gpus: Annotated[int, typer.Option(help="GPUs that the teacher has in the pilot.")] = 1,
    student_gpus: Annotated[int, typer.Option(help="GPUs that the student has in the pilot.")] = 1,
    split: Annotated[str, typer.Option(help="Which split of the prompts.")] = "train",
    config: Annotated[str | None, typer.Option(help="Which configuration of the prompts.")] = None,
    change: Annotated[list[str] | None, typer.Option("--set", help="Change the recipe.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Estimate what a run costs, from a short pilot whose rows are thrown away."""
    from tessy_hf.pilot.estimate import estimate

    given = _load(data, split, config, streaming=prompts is not None)
    gpus = {"teacher": teacher_gpus, "student": student_gpus}
    with _transform(recipe, change or [], None) as transform:
        found = estimate(transform, given, prompts, rows, gpus)
    if as_json:
        typer.echo(json.dumps(found.as_dict()))
        return
    _show_estimate(found)


def _show_estimate(found: Estimate) -> None:
    table = Table("", "kept tokens", "generated", "requests", "hours of work", "GPU-hours", box=None)
    for name, cost in (("teacher", found.teacher), ("student", found.student)):
        counts = (cost.kept_tokens, cost.generated_tokens, cost.requests)
        table.add_row(name, *(f"{count:,}" for count in counts), f"{cost.hours:.3g}", f"{cost.gpu_hours:.3g}")
    console, replicas = Console(), found.replicas
    console.print(f"{found.prompts:,} prompts, from a pilot of {found.pilot_rows} ({found.pilot_failed} failed)")
    console.print(table)
    waiting = ", ".join(f"{share:.0%} for {name}" for name, share in found.waiting.items())
    console.print(f"{found.hours:.3g} hours as the pilot was run; rows waited {waiting}: {found.bottleneck}-bound")
    console.print(
        f"as much work for both: {replicas['teacher']} teacher to {replicas['student']} student replicas",
        highlight=False,
    )


def _transform(recipe: str, changes: list[str], run: str | None) -> TessyTransform:
    """Read a transform from a file, or from the record of a release."""
    from tessy_hf.transform import TessyTransform

    if "@" not in recipe or Path(recipe).exists():
        return TessyTransform.from_yaml(recipe, *changes)
    from tessy_hf import recipe as recipes
    from tessy_hf.hub import releases

    described = releases.recipe(releases.run_of(recipe, run))
    teacher, student, settings = recipes.build(described, recipe, changes)
    return TessyTransform(teacher=teacher, student=student, **settings)


@app.command()
def status(journal: JournalPath) -> None:
    """Tell how far the runs in a journal are."""
    table = Table("run", "done", "to continue", "begun", "failed before")
    for fingerprint, counts in _open(journal).fingerprints().items():
        table.add_row(fingerprint, *map(str, (counts.done, counts.to_continue, counts.to_do, counts.failed_before)))
    Console().print(table)


@app.command()
def export(
    journal: JournalPath,
    out: Annotated[Path, typer.Argument(help="Where to write the rows: a .parquet or .jsonl file.")],
    run: Annotated[str | None, typer.Option(help="Which run, where the journal holds several.")] = None,
) -> None:
    """Write the finished rows of a journal as a dataset, even if the run never ended."""
    from tessy_hf.run.finished import Rows

    _writer(out)
    _write(Rows(journal, run, max_attempts=3).dataset(), out)


@app.command()
def merge(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="PARTS...",
            help="What the hosts wrote: folders of parts (a path, s3://...), journals, or .parquet files of rows.",
            show_default=False,
        ),
    ],
    data: Annotated[str, typer.Option("--prompts", help="All prompts of the run, as for synthesize.")],
    out: Annotated[
        Path | None, typer.Option(help="Where to write the rows: a .parquet file or a folder. Without it, only check.")
    ] = None,
    split: Annotated[str, typer.Option(help="Which split of the prompts.")] = "train",
    config: Annotated[str | None, typer.Option(help="Which configuration of the prompts.")] = None,
    recipe: Annotated[
        str | None, typer.Option(help="The recipe of the run, for .parquet files of rows; the others tell it.")
    ] = None,
    change: Annotated[list[str] | None, typer.Option("--set", help="Change the recipe, as for synthesize.")] = None,
    run: Annotated[str | None, typer.Option(help="Which run, where there are rows of several.")] = None,
    first: Annotated[
        bool, typer.Option("--first", help="Of rows that differ, take that of the source named first.")
    ] = False,
    incomplete: Annotated[
        bool, typer.Option("--incomplete", help="Write what is there though rows are missing; still exits with 1.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, with all ids.")] = False,
) -> None:
    """Make one dataset of what many hosts wrote, after proving that each prompt has its row, once."""
    from tessy_hf.cluster.merge import Merge

    settings = _transform(recipe, change or [], run).settings if recipe is not None else None
    merged = Merge(sources, _load(data, split, config), settings=settings, run=run, first=first, incomplete=incomplete)
    _tell_merge(merged.report, as_json)
    merged.check()
    if out is not None:
        count = merged.write(out)
        Console(stderr=as_json).print(f"{count} rows in {out}", soft_wrap=True)
    if merged.report.missing:
        raise typer.Exit(1)


def _tell_merge(report: Report, as_json: bool) -> None:
    """Print what a merge found."""
    from tessy_hf.cluster.merge import some

    told = dataclasses.asdict(report)
    if as_json:
        typer.echo(json.dumps(told))
        return
    console = Console()
    console.print(
        f"{report.prompts} prompts, {report.unusable} of them unusable; {report.failed} rows failed", highlight=False
    )
    for name, what in (
        ("missing", "prompts without a row"),
        ("duplicates", "rows there more than once, all the same"),
        ("differing", "rows there more than once that differ"),
        ("foreign", "rows without a prompt, left out"),
    ):
        ids = told[name]
        console.print(f"{len(ids)} {what}{': ' + some(ids) if ids else ''}", markup=False, soft_wrap=True)


def _shard(prompts: Any, shard: str | None) -> Any:
    """Return every n-th of the prompts.

    Not by ``split_dataset_by_node``: in a stream of fewer files than hosts it skips rows only after they are mapped.
    """
    if shard is None:
        return prompts
    rank, _, world = shard.partition("/")
    if not (rank.isdecimal() and world.isdecimal() and int(rank) < int(world)):
        raise SettingsError(f"--shard {shard!r} is none. The first of eight is 0/8, the last 7/8.")
    return prompts.filter(lambda _, number: number % int(world) == int(rank), with_indices=True)


@app.command()
def push(
    rows: Annotated[
        str, typer.Argument(help="Finished rows: a journal, a .parquet or .jsonl file, or a dataset on the Hub.")
    ],
    repo: Annotated[str, typer.Argument(help="The dataset repository, user/name. Made if it is not there.")],
    version: Annotated[
        str, typer.Option(help="The release. A minor step, 1.1.0, adds the rows that are new.")
    ] = "1.0.0",
    split: Annotated[str, typer.Option(help="The split's name.")] = "train",
    config: Annotated[str, typer.Option(help="The configuration (subset) of the dataset.")] = "default",
    private: Annotated[bool | None, typer.Option(help="Whether a repository that is made now is private.")] = None,
    append: Annotated[
        bool | None, typer.Option("--append/--replace", help="Add to the last release or replace it, in any case.")
    ] = None,
    failures: Annotated[str, typer.Option(help="Failed and incomplete rows: to their own split, or drop.")] = "split",
    license: Annotated[str | None, typer.Option(help="The data's licence, as the Hub names it.")] = None,
    license_name: Annotated[str | None, typer.Option(help="Its name, where --license is other.")] = None,
    license_link: Annotated[str | None, typer.Option(help="Where it stands.")] = None,
    recipe: Annotated[Path | None, typer.Option(help="The recipe the rows were made with; journals know it.")] = None,
    run: Annotated[str | None, typer.Option(help="Which run of a journal, where it holds several.")] = None,
    max_shard_size: Annotated[str, typer.Option(help="About how much a file holds, uncompressed.")] = "500MB",
) -> None:
    """Release finished rows on the Hub: data, manifest and card under one tag, complete or not at all."""
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


@app.command()
def show(
    release: Annotated[str, typer.Argument(help="A release, user/name@v1.0.0; without a tag, what is on main.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifests as they are stored.")] = False,
) -> None:
    """Tell what a release holds, where it comes from, and the command that makes it again."""
    from tessy_hf.hub import releases

    console = Console()
    for manifest in releases.manifests(release):
        if as_json:
            typer.echo(manifest.to_json(), nl=False)
            continue
        table = Table("", f"{release}, split {manifest.split} of {manifest.config_name}", show_edge=False)
        for name, told in releases.outline(manifest):
            table.add_row(name, Text(told))
        console.print(table)
        name = f"{release.partition('@')[0]}@v{manifest.version}"
        for run in manifest.runs:
            console.print("\nTo make these rows again:", highlight=False)
            told = releases.command(name, run, several=len(manifest.runs) > 1)
            console.print(told, markup=False, highlight=False, soft_wrap=True)


@app.command()
def diff(
    repo: Annotated[str, typer.Argument(help="The dataset repository, user/name.")],
    before: Annotated[str, typer.Argument(help="A release, v1.0.0.")],
    after: Annotated[str, typer.Argument(help="Another, v1.1.0.")],
) -> None:
    """Tell how two releases differ: rows added, removed and changed, settings, models, libraries."""
    from tessy_hf.hub import releases

    console = Console()
    for told in releases.diff(repo, before, after):
        table = Table(f"{told.split} of {told.config_name}", before, after, show_edge=False)
        table.add_row("rows", *map(str, told.rows))
        for fact in told.facts:
            table.add_row(*map(Text, fact))
        console.print(table)
        for what in ("added", "removed", "changed"):
            ids, count = getattr(told, what)
            some = f" ({', '.join(map(str, ids))}{', …' if count > len(ids) else ''})" if count else ""
            console.print(f"{what}: {count} rows{some}", markup=False, highlight=False, soft_wrap=True)


@app.command()
def report(
    source: Annotated[
        str,
        typer.Argument(
            metavar="PATH_OR_REPO",
            help="Finished rows: a .parquet or .jsonl file, a saved folder, or a dataset on the Hub (me/data@v1.0.0).",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The HTML file to write.")] = Path("report.html"),
    against: Annotated[
        str | None, typer.Option(help="A second dataset of the same prompts, to show beside the first.")
    ] = None,
    split: Annotated[str, typer.Option(help="Which split, where there are several.")] = "train",
    config_name: Annotated[str | None, typer.Option("--config", help="Which configuration, on the Hub.")] = None,
    rows: Annotated[int, typer.Option(help="Show so many rows at most. The numbers are of all.")] = 10_000,
) -> None:
    """Write one HTML file with a dataset's numbers, its figures and its rows coloured by author."""
    from tessy_hf.report import write_report

    shown = write_report(source, out, against=against, split=split, config_name=config_name, rows=rows)
    size = out.stat().st_size / 1e6
    Console().print(f"{shown:,} rows in {out} ({size:.1f} MB). Open it in a browser.", soft_wrap=True, highlight=False)


@app.command()
def analyze(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="A B [C]",
            help="Two or three datasets of the same prompts, tessy rows or plain traces: .parquet or .jsonl files, "
            "saved folders, or datasets on the Hub (me/data@v1.0.0).",
            show_default=False,
        ),
    ],
    tokenizer: Annotated[
        str | None, typer.Option(help="The student's tokenizer, a folder or a Hub id. --student is enough.")
    ] = None,
    student: Annotated[
        str | None, typer.Option(help="The student itself: how unlikely it finds the texts is measured too.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="The HTML file to write.")] = Path("analysis.html"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON and nothing else.")] = False,
    split: Annotated[str, typer.Option(help="Which split, where there are several.")] = "train",
    limit: Annotated[int, typer.Option(help="Most prompts to compare.")] = 10_000,
    nll_rows: Annotated[int, typer.Option(help="How many rows of each dataset the student reads.")] = 200,
) -> None:
    """Compare datasets of the same prompts: similarity, lengths, authors, words, and the student's own view."""
    from tessy_hf.report import compare_page as analysis
    from tessy_hf.report import open_dataset, short_names
    from tessy_hf.report.compare import analyze as compare

    if student is None and tokenizer is None:
        raise SettingsError("No tokenizer is named. Pass --student or --tokenizer with the model to be trained.")
    vocabulary, model = _student(tokenizer or str(student), student)
    datasets = {name: open_dataset(source, split) for name, source in zip(short_names(sources), sources, strict=True)}
    told = compare(datasets, vocabulary, limit=limit, student=model, nll_rows=nll_rows)
    if as_json:
        typer.echo(json.dumps(told))
        return
    analysis.write(out, told)
    for one in told["similarity"]:
        Console().print(f"{' and '.join(one['of'])}: similarity {one['mean']:.3f}", markup=False, soft_wrap=True)
    Console().print(f"{told['prompts']:,} prompts compared in {out}. Open it in a browser.", soft_wrap=True)


def _student(tokenizer: str, student: str | None) -> tuple[Any, Any]:
    """Load the student's tokenizer, and the student if it is to read."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tessy_hf.vocabulary import Vocabulary

    try:
        vocabulary = Vocabulary(AutoTokenizer.from_pretrained(tokenizer), tokenizer)
        model = AutoModelForCausalLM.from_pretrained(student, use_safetensors=True) if student else None
    except (OSError, ValueError) as error:
        seen = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise SettingsError(
            f"{student or tokenizer!r} cannot be loaded: {seen}. A folder or a Hub id with a tokenizer (for --student "
            "with weights as safetensors too) is expected; check the name and HF_TOKEN."
        ) from error
    return vocabulary, model.eval() if model is not None else None


def _finished(rows: str, split: str) -> Any:
    """Open what is to be pushed."""
    from tessy_hf.rows.columns import schema

    if Path(rows).suffix in _KINDS:
        dataset = _load(rows, "train", streaming=False)
        message = dataset.features.get("messages")
        keys = getattr(message, "feature", {})
        typed = {name: kind for name, kind in schema("thinking" not in keys).items() if name in dataset.features}
        return dataset.cast(type(dataset.features)({**dataset.features, **typed}))
    if Path(rows).exists() or rows.count("/") != 1:
        return Path(rows)
    return _load(rows, split, streaming=False)


@app.command()
def annotate(
    recipe: Annotated[Path, typer.Argument(help="A YAML recipe: the annotator, and what to draw from the traces.")],
    traces: Annotated[
        str, typer.Argument(help="Reasoning traces: a .jsonl, .json or .parquet file, or a dataset on the Hub.")
    ],
    out: Annotated[Path, typer.Argument(help="The folder to write the marked segments into, or to continue.")],
    limit: Annotated[int | None, typer.Option(help="Most segments altogether.")] = None,
    split: Annotated[str, typer.Option(help="Which split of the traces.")] = "train",
) -> None:
    """Let a model mark the style spans in segments of reasoning traces."""
    from tessy_hf.boundary_training import annotate as annotation
    from tessy_hf.recipe import read_annotation

    annotator, settings = read_annotation(recipe)
    settings |= {} if limit is None else {"limit": limit}
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    found = annotation.annotate(_load(traces, split), annotator, out, **settings)
    table = Table("answers", "")
    for outcome, count in found.counts.items():
        table.add_row(outcome, str(count))
    Console().print(table)
    Console().print(f"{len(found.rows)} segments in {found.folder}", soft_wrap=True)


@app.command("train-boundary")
def train_boundary(
    recipe: Annotated[Path, typer.Argument(help="A YAML recipe: training settings, and where the data are.")],
    out: Annotated[Path, typer.Argument(help="The folder to write the predictor into.")],
    data: Annotated[list[str] | None, typer.Option(help="Segments with marked style spans (again for more).")] = None,
    extra: Annotated[list[str] | None, typer.Option(help="More of them, for training only.")] = None,
    texts: Annotated[list[str] | None, typer.Option(help="Thinking to make a small base model from.")] = None,
    split: Annotated[str, typer.Option(help="Which split of the data.")] = "train",
) -> None:
    """Train a boundary predictor from segments whose style spans are marked."""
    from tessy_hf.boundary.traces import thinking
    from tessy_hf.boundary_training import train

    settings = train.read_recipe(recipe)
    told = {"data": data, "extra": extra, "texts": texts}
    places = {name: settings.pop(name, None) for name in told} | {name: told[name] for name in told if told[name]}
    rows = {name: _chain(place, split) for name, place in places.items() if place}
    if "data" not in rows:
        raise SettingsError(f"The recipe {str(recipe)!r} names no `data`. Add it, or pass --data with a file.")
    plain = (thinking(row) or row.get("text") or "" for row in rows["texts"]) if "texts" in rows else None
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    made = train.train_boundary(rows["data"], out, extra=rows.get("extra"), texts=plain, **settings)
    _show(made.evaluation)
    Console().print(f"The predictor is in {made.folder}", soft_wrap=True)


def _chain(places: str | list[str], split: str) -> Iterator[Any]:
    for place in [places] if isinstance(places, str) else places:
        yield from _load(place, split)


@app.command("push-boundary")
def push_boundary(
    folder: Annotated[Path, typer.Argument(help="A folder that train-boundary wrote.")],
    repo_id: Annotated[str, typer.Argument(help="Where to on the Hub, as name/model.")],
    private: Annotated[bool, typer.Option(help="Make it private where it is made.")] = False,
    tag: Annotated[str | None, typer.Option(help="A tag to set on the commit.")] = None,
    license: Annotated[str | None, typer.Option(help="The licence of the weights, by its name on the Hub.")] = None,  # noqa: A002
) -> None:
    """Publish a boundary predictor: weights, tokenizer, config and card in one commit."""
    from tessy_hf.hub import boundary_models as publish

    commit = publish.push_boundary(folder, repo_id, private=private, tag=tag, license=license)
    Console().print(f"{repo_id} at {commit}", soft_wrap=True)


@app.command("evaluate-boundary")
def evaluate_boundary(
    data: Annotated[
        str, typer.Option(help="Segments with marked style spans: a .jsonl or .parquet file, or a dataset on the Hub.")
    ],
    model: Annotated[
        str | None, typer.Argument(help="A Hub id or folder; by default the small predictor that comes along.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the model.")] = None,
    label_shift: Annotated[int | None, typer.Option(help="0 or 1, where the model's config does not say.")] = None,
    style_label: Annotated[int | None, typer.Option(help="The label number that means style, likewise.")] = None,
    window: Annotated[int | None, typer.Option(help="How many tokens are read at most, likewise.")] = None,
    split: Annotated[str, typer.Option(help="Which split of the data.")] = "train",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw calibration and boundary errors into this file.")] = None,
) -> None:
    """Measure a boundary predictor on segments whose style spans are marked."""
    from tessy_hf.boundary.predictor import SHIPPED, BoundaryPredictor
    from tessy_hf.boundary_training import metrics
    from tessy_hf.boundary_training.segments import read_segments

    segments = read_segments(_load(data, split))
    stated: Any = {"label_shift": label_shift, "style_label": style_label, "window": window}
    predictor = BoundaryPredictor.from_pretrained(model or SHIPPED, revision=revision, **stated)
    evaluation = metrics.evaluate(predictor, segments)
    predictor.close()
    if plot is not None:
        metrics.plot(evaluation, plot)
    if as_json:
        typer.echo(evaluation.model_dump_json())
    else:
        _show(evaluation)


def _show(evaluation: Any) -> None:
    """Print an evaluation as a table: a line for all segments, then one for each group."""
    table = Table(
        *("", "n", "char F1", "95%", "P", "R", "span F1", "±0", "±1", "±3"),
        title=f"{evaluation.model}: style, and the first boundary by words",
        box=None,
    )
    groups = {"all": evaluation.overall, **evaluation.by_family, **evaluation.by_source_model}
    groups |= {f"begins as {author}": figures for author, figures in evaluation.by_author.items()}
    for name, figures in groups.items():
        low, high = figures.char_f1_interval
        shares = (figures.char.precision, figures.char.recall, figures.span.f1)
        within = (figures.boundary_words.exact, figures.boundary_words.within_1, figures.boundary_words.within_3)
        cells = (*(f"{share:.2f}" for share in shares), *(f"{share:.0%}" for share in within))
        table.add_row(name, str(figures.segments), f"{figures.char.f1:.3f}", f"{low:.2f}-{high:.2f}", *cells)
    Console().print(table)
    if not evaluation.causal:
        Console().print("The model reads text on both sides: while a row is written it sees less than here.")


def _keys(rows: list[dict[str, Any]]) -> set[str]:
    return {key for row in rows for message in row["messages"] for key in message}


def _open(path: Path) -> Any:
    from tessy_hf.run.finished import open_journal

    return open_journal(path)


def _iterate(rows: Any) -> Iterator[Any]:
    yield from rows


def _load(data: str, split: str, config: str | None = None, *, streaming: bool = True) -> Any:
    from datasets import load_dataset

    kind = _KINDS.get(Path(data).suffix)
    if kind is None:
        name, _, revision = data.partition("@")
        return load_dataset(name, config, split=split, revision=revision or None, streaming=streaming)
    if not any(mark in data for mark in ("://", "*")) and not Path(data).is_file():
        raise DatasetError(f"There is no file {data!r}. Check the path, or name a dataset on the Hub.")
    return load_dataset(kind, data_files=data, split=split, streaming=streaming)


def _writer(out: Path) -> str:
    if out.suffix not in (".parquet", ".jsonl"):
        raise TessyError(
            f"The output {str(out)!r} is neither .parquet nor .jsonl. Name the file with one of these endings."
        )
    return out.suffix


def _write(dataset: Any, out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    (dataset.to_parquet if _writer(out) == ".parquet" else dataset.to_json)(str(out))
    Console().print(f"{len(dataset)} rows in {out}", soft_wrap=True)


def main() -> None:
    """Run the command; a mistake of the user's ends in a sentence, not in a traceback."""
    try:
        app()
    except TessyError as error:
        Console(stderr=True).print(f"[bold red]{type(error).__name__}[/]", end=": ")
        Console(stderr=True).print(str(error), markup=False, soft_wrap=True)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
