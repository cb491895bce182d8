"""The main job on the miniature world: real cooperative synthesis with tiny models, on any CPU."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import datasets
import transformers
import typer
from rich.console import Console
from rich.table import Table

from tessy_hf import demo, show
from tessy_hf.report.show import legend
from tessy_hf.report.statistics import summarize
from tessy_hf.report.tables import percent


def main(
    rows: Annotated[int, typer.Option(help="How many prompts.", min=1)] = 256,
    family: Annotated[str, typer.Option(help="Which problems: calc, dot, max, map or sort.")] = "calc",
    seed: Annotated[int, typer.Option(help="Seed of the prompts and of the run.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for the Parquet datasets.")] = Path("output/demo"),
) -> None:
    """Let a tiny teacher and a tiny student write answers together, and compare with the student alone."""
    console = Console()
    transformers.utils.logging.disable_progress_bar()
    caption = "right: share of right answers; teacher: its share of the thinking; tokens/s: of kept tokens"
    table = Table(title=f"{rows} {family} prompts, temperature 0.6", caption=caption)
    for heading in ("method", "right", "teacher", "tokens/row", "tokens/s", "ended"):
        table.add_column(heading, justify="left" if heading in ("method", "ended") else "right")
    paths = []
    for method in ("tessy", "student-only"):
        dataset, seconds = _synthesize(method, rows, family, seed)
        out.mkdir(parents=True, exist_ok=True)
        paths.append(out / f"{method}-{family}.parquet")
        datasets.disable_progress_bars()  # the status line has been drawn; nothing comes between what is printed
        dataset.to_parquet(paths[-1])
        datasets.enable_progress_bars()
        table.add_row(method, *_figures(dataset, seconds))
        if method == "tessy":
            right = [row for row in dataset if demo.verify(row)]
            example = next((row for row in right if "&" in row["prompt"]), dataset[0])  # "&" only the teacher knows
            console.print(legend(colored=console.is_terminal and not console.no_color))
            console.print(show(example), soft_wrap=True)
    console.print(table)
    console.print("Dataset:", *(str(path) for path in paths), soft_wrap=True)
    console.print(f"Load it with: datasets.load_dataset('parquet', data_files={str(paths[0])!r})", soft_wrap=True)


def _synthesize(method: str, rows: int, family: str, seed: int) -> tuple[Any, float]:
    """Stream prompts through the transform; return the finished dataset and the seconds it took."""
    from datasets import Dataset

    prompts = demo.prompts(rows, seed=seed, family=family).to_iterable_dataset()
    with demo.transform(method=method, seed=seed, journal=None) as tessy_transform:
        features = tessy_transform.features(prompts)
        begin = time.monotonic()
        stream = prompts.map(tessy_transform, batched=True, features=features)
        finished = list(stream)
        seconds = time.monotonic() - begin
    return Dataset.from_list(finished, features=features), seconds


def _figures(dataset: Any, seconds: float) -> list[str]:
    summary = summarize(dataset)
    tokens = summary["tokens"]["all"]
    return [
        percent(sum(map(demo.verify, dataset)) / len(dataset)),
        percent(summary["teacher_share"]["thinking"]["mean"]),
        f"{tokens / len(dataset):.1f}",
        f"{tokens / seconds:.0f}",
        ", ".join(f"{reason} {rows}" for reason, rows in summary["finish_reasons"].items()),
    ]


if __name__ == "__main__":
    typer.run(main)
