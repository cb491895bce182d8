"""The same transform on a Ray cluster: prompts go in, actors on many hosts write rows, one dataset comes out.

:class:`RowWriter` is the transform as Ray Data's ``map_batches`` takes it, over any Ray dataset::

    rows = ray.data.from_huggingface(prompts).map_batches(
        RowWriter, fn_constructor_kwargs={"transform": transform}, **map_options(transform, Placement(actors=4))
    )

:func:`synthesize` is the whole run: what is done is left out, actors put finished rows into parts on shared storage
(:mod:`tessy_hf.run.shared_rows`), and what they have put is matched with the prompts (:mod:`tessy_hf.cluster.merge`).
Ray may run a task twice and forgets what a dead node held; that each row is in the result, once, is decided by the
parts alone.

Engines are servers that all actors share, or live in each actor, on the GPUs that Ray has given it. Each actor has
its own window of ``rows_in_flight`` rows, over all batches it was given, and its own journal on its host's disk.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tessy_hf.cluster.merge import SHARD_BYTES, Merge
from tessy_hf.errors import DatasetError, PromptError, SettingsError, TessyError
from tessy_hf.recipe import Placement as Placement
from tessy_hf.rows.batch import Batch
from tessy_hf.rows.output import Output
from tessy_hf.rows.prompt import PromptReader
from tessy_hf.run.shared_rows import SharedRows

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset, IterableDataset

    from tessy_hf.transform import TessyTransform

BATCHES_IN_WINDOW = 8
"""How many of Ray's tasks make up an actor's window of rows. A task is done with its last row: small ones make room
for others early."""

WINDOWS_AHEAD = 4
"""How many windows of rows are given to an actor at a time. Those beyond the first are at hand when rows end; more of
them would only be missing where another actor has nothing left to do."""


class RowWriter:
    """The transform as a callable for ``map_batches(..., batch_format="pyarrow")`` of Ray Data, one per actor.

    Args:
        transform: The transform. Its engines are started in the actor, at the first batch.
        texts: Whether to return the rows. Without it only how each ended, for runs that put rows into parts.
    """

    def __init__(self, transform: TessyTransform, texts: bool = True) -> None:
        import datasets

        datasets.disable_progress_bars()
        self._transform, self._texts = transform, texts

    async def __call__(self, batch: pa.Table) -> pa.Table:
        """Write the rows of a batch, beside those of other batches.

        Raises:
            DatasetError: The batch is no Arrow table, or lacks a column.
            TessyError: What the transform raises.
        """
        import pyarrow as pa

        if not isinstance(batch, pa.Table):
            raise DatasetError(
                f"RowWriter got a {type(batch).__name__}. An Arrow table is expected: pass batch_format='pyarrow' to "
                "map_batches, or **map_options(transform, placement)."
            )
        given = Batch.read(batch)
        written = await asyncio.wrap_future(self._transform.submit(given.columns))
        if not self._texts:
            return pa.table({"finish_reason": pa.array(written["finish_reason"], pa.string())})
        layout = self._transform.settings.prompt_column, self._transform.student.thinking_format.key
        return given.returned(written, *layout)


def map_options(transform: TessyTransform, placement: Placement) -> dict[str, Any]:
    """Return the options of ``map_batches`` with which an actor's window of rows is always full."""
    from ray.data import ActorPoolStrategy

    tasks = WINDOWS_AHEAD * BATCHES_IN_WINDOW
    return {
        "batch_format": "pyarrow",
        "batch_size": _batch_rows(transform),
        "compute": ActorPoolStrategy(
            size=placement.actors, max_tasks_in_flight_per_actor=tasks, max_concurrent_calls_per_actor=tasks
        ),
        "num_cpus": placement.num_cpus,
        **({"num_gpus": placement.num_gpus} if placement.num_gpus else {}),
        **({"resources": placement.resources} if placement.resources else {}),
    }


def _batch_rows(transform: TessyTransform) -> int:
    rows = transform.settings.rows_in_flight
    if rows == "auto":
        raise SettingsError(
            "rows_in_flight=\"auto\" fills the engines' caches from one process, and actors do not see each other's "
            "rows. Pass how many rows each actor is to have in flight, for instance rows_in_flight=64."
        )
    return max(1, rows // BATCHES_IN_WINDOW)


@dataclass
class Written:
    """What a run on a cluster has led to.

    Attributes:
        merge: All rows, for ``merge.write(path)`` or ``push_to_hub(merge.dataset(), ..., manifest=merge.record)``.
        found: How many rows were in parts before the run began.
        finish_reasons: How those ended that actors returned, rows that Ray asked for twice included.
    """

    merge: Merge
    found: int = 0
    finish_reasons: Counter[str] = field(default_factory=Counter)


def synthesize(
    dataset: Dataset | IterableDataset,
    transform: TessyTransform,
    out: str | Path | None = None,
    *,
    parts: str | None = None,
    placement: Placement | None = None,
    actors: int | None = None,
    overwrite: bool = False,
) -> Written:
    """Write an answer to each prompt on a Ray cluster: the one that is initialised, else the one Ray finds.

    Actors and nodes may die: Ray gives their work to others, and rows that were finished are not written again. If the
    run itself ends early, call it again, on any cluster.

    Args:
        dataset: The prompts.
        transform: What writes them, for instance ``TessyTransform.from_yaml(...)``.
        out: A ``.parquet`` or ``.jsonl`` file or a folder on this host for the rows; without it they stay in parts.
        parts: The folder for parts, as fsspec names it, that all nodes see; by default the transform's.
        placement: What the run takes of the cluster.
        actors: How many actors, where that is not in the placement.
        overwrite: Whether to replace an output that is not of this run and these prompts.

    Raises:
        OutputError: The output cannot be written, or is something else.
        SettingsError: No folder for parts is named.
        MergeError: Rows are missing in the end.
        TessyError: What the transform raises in an actor.
    """
    _check_ray()
    placement = placement or Placement()
    placement = placement if actors is None else placement.model_copy(update={"actors": actors})
    parts = parts or transform.settings.parts
    if parts is None:
        raise SettingsError(
            "A run on a cluster needs a folder that all nodes see. Pass parts= with one, or put `parts` into the "
            "recipe: a path on shared storage, or an address such as s3://bucket/run."
        )
    # A path is made absolute, so that it means the same to other processes.
    transform = transform.with_settings(parts=parts if "://" in parts else str(Path(parts).absolute()))
    transform.features(dataset)  # its columns are checked here, before anything starts
    if out is not None:
        output = Output(out, overwrite=overwrite, shard_bytes=SHARD_BYTES)
        output.check_prompts(transform.run_fingerprint, transform.settings, dataset)
    there = _there(transform)
    reasons = _write(_to_do(dataset, transform, there), transform, placement)
    merge = Merge([str(transform.settings.parts)], dataset, settings=transform.settings, first=True)
    merge.check()
    if out is not None:
        merge.write(out, overwrite=overwrite)
    return Written(merge, len(there), reasons)


def _check_ray() -> None:
    try:
        import ray.data  # noqa: F401
    except ImportError as error:
        raise SettingsError('A run on a cluster needs Ray Data. Install it: pip install "tessy-hf[ray]".') from error


def _there(transform: TessyTransform) -> SharedRows:
    """Return the shared rows of earlier runs."""
    found = SharedRows(str(transform.settings.parts), transform.run_fingerprint)
    found.refresh()
    return found


def _to_do(
    dataset: Dataset | IterableDataset, transform: TessyTransform, there: SharedRows
) -> Iterator[Mapping[str, Any]]:
    """Iterate over the prompts whose rows are not done. Those that cannot be used are left to the merge."""
    reader: PromptReader | None = None
    for row in dataset:
        reader = reader or PromptReader(transform.settings, list(row))
        try:
            key = reader.read(row).row_key
        except PromptError:
            continue
        if not there.done(key):
            yield {name: row[name] for name in reader.read_columns}


def _write(rows: Iterator[Mapping[str, Any]], transform: TessyTransform, placement: Placement) -> Counter[str]:
    """Let actors write rows; count how they ended."""
    import pyarrow as pa
    import ray

    batches = []
    while batch := list(islice(rows, _batch_rows(transform))):
        batches.append(pa.Table.from_pylist(batch))
    if not batches:
        return Counter()
    given = ray.data.from_arrow(batches)
    given.context.raise_original_map_exception = True  # else our errors' words are lost on their way
    written = given.map_batches(
        RowWriter,
        fn_constructor_kwargs={"transform": transform, "texts": False},
        **map_options(transform, placement),
    )
    reasons: Counter[str] = Counter()
    try:
        for ended in written.iter_batches(batch_size=None, batch_format="pyarrow"):
            reasons.update(ended.column("finish_reason").to_pylist())
    except ray.exceptions.RayError as error:
        raise _ours(error) from error
    return reasons


def _ours(error: BaseException) -> BaseException:
    """Return the error of ours that an actor has raised; the given one where there is none."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, TessyError):
            return type(seen)(*seen.args)
        seen = getattr(seen, "cause", None) or seen.__cause__
    return error
