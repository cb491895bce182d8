"""Upload the rows of a release to its side branch: shards of bounded size, then their manifest.

Submitted rows and the release they add to go in, a :class:`Candidate` comes out. Shards that an earlier attempt sent
are known by their hash and not sent again. Memory and disk are bounded, whatever the length of a stream. ``main`` is
not touched.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tessy_hf.errors import TessyError
from tessy_hf.hub import layout
from tessy_hf.hub.candidate import Candidate, branch_of
from tessy_hf.hub.repository import read_tables
from tessy_hf.manifest import Counts, Manifest, ShardRecord, SplitRecord, failures_split, libraries, now
from tessy_hf.report import figures
from tessy_hf.report.statistics import Statistics
from tessy_hf.rows import parquet
from tessy_hf.rows.datasets_internals import features_to_yaml
from tessy_hf.rows.parquet import ShardWriter
from tessy_hf.trajectory import RowKey

if TYPE_CHECKING:
    import pyarrow as pa
    from huggingface_hub import CommitOperationAdd

    from tessy_hf.hub.repository import Repository
    from tessy_hf.hub.submission import Submission
    from tessy_hf.hub.versions import Base, ReleaseSpec

SHARDS_PER_COMMIT = 50
"""Shards that go into one commit on the side branch; the Hub limits commits per hour."""

BYTES_PER_COMMIT = 5 << 30
"""Most bytes that wait on disk for their commit."""

Splits = dict[str, list[ShardRecord]]


def upload(
    repo: Repository,
    spec: ReleaseSpec,
    submission: Submission,
    base: Base | None,
    other_splits: Mapping[str, layout.Info],
) -> Candidate:
    """Send all rows to the side branch; go on with what an earlier attempt left there.

    Args:
        repo: The repository.
        spec: What is released.
        submission: The rows.
        base: The release they are added to.
        other_splits: Sizes of other splits, for the card.

    Returns:
        The candidate, whose manifest is not committed yet.
    """
    counts = _RowCounts()
    open_branch(repo, branch_of(spec))
    kept = list(base.manifest.splits[spec.split].shards) if base else []
    writers = _writers(repo, spec, submission, kept)
    sender = _Sender(repo, spec)
    sent: Splits = {split: [] for split in writers}
    for split, table in _rows(repo, spec, submission, base, counts):
        sent[split] += map(sender.send, writers[split].write(table))
    for split, writer in writers.items():
        sent[split] += map(sender.send, writer.close())
    if not (kept or sent[spec.split]):  # an empty file, for its schema
        sent[spec.split].append(sender.send(writers[spec.split].empty()))
    sender.commit()
    if spec.failures == "drop" and counts.failed:
        repo.say(f"{counts.failed} failed or incomplete rows are left out")
    sizes = {split: writer.uncompressed for split, writer in writers.items()}
    manifest = _describe(spec, submission, base, counts, {**sent, spec.split: kept + sent[spec.split]}, sizes)
    summary = counts.statistics.summary()
    return Candidate(repo, spec, manifest, summary, other_splits, _records(repo, spec, manifest, summary))


def open_branch(repo: Repository, branch: str) -> None:
    """Make a side branch at ``main``, or keep the one that is there."""
    from huggingface_hub import CommitOperationAdd

    branches = repo.refs()[0]
    if "main" not in branches:  # a Hub that makes repositories without a first commit
        rule = CommitOperationAdd(".gitattributes", b"*.parquet filter=lfs diff=lfs merge=lfs -text\n")
        repo.call("make the first commit", lambda: repo.commit("main", [rule], "Begin"))
    repo.say(f"{'resuming' if branch in branches else 'making'} the side branch {branch}")
    if branch not in branches:
        repo.make_branch(branch)


# --- which row goes into which split


class _RowCounts:
    """Counts of the rows that passed."""

    def __init__(self) -> None:
        self.begun, self.given, self.failed = now(), 0, 0
        self.finish_reasons: Counter[str] = Counter()
        self.runs: Counter[str] = Counter()
        self.statistics = Statistics()

    def add(self, table: pa.Table) -> None:
        self.finish_reasons.update(str(reason) for reason in table.column("finish_reason").to_pylist())
        self.runs.update(run for run in table.column("run_fingerprint").to_pylist() if run is not None)


def _rows(
    repo: Repository, spec: ReleaseSpec, submission: Submission, base: Base | None, counts: _RowCounts
) -> Iterator[tuple[str, pa.Table]]:
    """Iterate over the splits and their new rows: those the base lacks, and its failures that were not replaced."""
    present = _read_base(repo, spec, submission, base, counts) if base else _Present()
    corrected = 0
    for table in submission.rows.tables():
        counts.given += table.num_rows
        if base:
            keys = parquet.keys(table, submission.id_column, submission.hashed_columns)
            corrected += present.replace(keys)
            table = table.filter([key not in present.keys for key in keys])
        yield from _by_outcome(spec, table, counts)
    for table in present.failures.values():
        yield from _by_outcome(spec, table, counts)
    if corrected:
        repo.say(
            f"{corrected} ids are in {repo.id} already with another prompt: both rows are kept. A major version "
            "replaces all rows"
        )


def _by_outcome(spec: ReleaseSpec, table: pa.Table, counts: _RowCounts) -> Iterator[tuple[str, pa.Table]]:
    """Count a table's rows and put the failed and incomplete ones into their own split, or nowhere."""
    import pyarrow.compute as pc

    mask = parquet.is_complete(table, spec.complete)
    complete, failed = table.filter(mask), table.filter(pc.invert(mask))
    counts.add(table)
    counts.failed += failed.num_rows
    counts.statistics.add(complete)
    yield spec.split, complete
    if spec.failures == "split":
        counts.statistics.add(failed)
        yield failures_split(spec.split), failed


@dataclass
class _Present:
    """The rows of a base: the keys of those that are complete, and its failures by key, which may be replaced."""

    keys: set[RowKey] = field(default_factory=set)
    ids: set[str] = field(default_factory=set)
    failures: dict[RowKey, pa.Table] = field(default_factory=dict)

    def replace(self, keys: list[RowKey]) -> int:
        """Drop failures of new rows; return how many new rows have the id of another complete row."""
        for key in keys:
            self.failures.pop(key, None)
            self.failures.pop(key._replace(prompt_hash=""), None)  # its prompt could not be used
        return sum(key.id in self.ids and key not in self.keys for key in keys)


def _read_base(
    repo: Repository, spec: ReleaseSpec, submission: Submission, base: Base, counts: _RowCounts
) -> _Present:
    """Count the rows of the base, and remember which they are."""
    repo.say(f"reading {repo.id}@v{base.manifest.version}, to which the new rows are added")
    found, (column, hashed) = _Present(), (submission.id_column, submission.hashed_columns)
    for table in _base_tables(repo, base, spec.split):
        counts.add(table)
        counts.statistics.add(table)
        found.keys.update(parquet.keys(table, column, hashed))
    found.ids = {key.id for key in found.keys}
    if base.manifest.failures_split:
        for table in _base_tables(repo, base, base.manifest.failures_split):
            table = table.cast(submission.rows.features.arrow_schema)
            for number, key in enumerate(parquet.keys(table, column, hashed)):
                found.failures[key] = table.slice(number, 1)
    return found


def _base_tables(repo: Repository, base: Base, split: str) -> Iterator[pa.Table]:
    return read_tables(repo, [shard.path for shard in base.manifest.splits[split].shards], base.commit)


# --- files


def _writers(
    repo: Repository, spec: ReleaseSpec, submission: Submission, kept: list[ShardRecord]
) -> dict[str, ShardWriter]:
    """Make a writer for each split; files are numbered on from those that are kept."""
    following = 1 + max((int(shard.path[-13:-8]) for shard in kept), default=-1)
    return {
        split: ShardWriter(
            repo.folder,
            layout.data_prefix(spec.config_name, split),
            following if split == spec.split else 0,
            submission.rows.features,
            spec.max_bytes,
        )
        for split in (spec.split, failures_split(spec.split))
    }


class _Sender:
    """Sends files to the side branch, and commits when enough have come together."""

    def __init__(self, repo: Repository, spec: ReleaseSpec) -> None:
        self._repo, self._spec, self._branch = repo, spec, branch_of(spec)
        self._there = repo.files(repo.refs()[0][self._branch])
        self._pending: list[tuple[CommitOperationAdd, Path]] = []

    def send(self, written: tuple[ShardRecord, Path]) -> ShardRecord:
        """Upload a file unless it is there already; return its record."""
        from huggingface_hub import CommitOperationAdd

        shard, path = written
        there = self._there.get(shard.path)
        if there is not None and there.lfs is not None and there.lfs.sha256 == shard.sha256:
            self._repo.say(f"{shard.path} is there already")
            path.unlink()
            return shard
        self._repo.say(f"sending {shard.path}: {shard.rows} rows, {shard.bytes / 1e6:.2f} MB")
        operation = CommitOperationAdd(shard.path, path)
        send = self._repo.api.preupload_lfs_files
        self._repo.call(f"take {shard.path}", send, additions=[operation], revision=self._branch)
        self._pending.append((operation, path))
        waiting = sum(file.stat().st_size for _, file in self._pending)
        if len(self._pending) >= SHARDS_PER_COMMIT or waiting > BYTES_PER_COMMIT:
            self.commit()
        return shard

    def commit(self) -> None:
        """Commit what was uploaded since the last commit."""
        if self._pending:
            operations = [operation for operation, _ in self._pending]
            message = f"Add {len(operations)} files of {self._spec.tag}"
            self._repo.call("commit", lambda: self._repo.commit(self._branch, operations, message))
            for _, path in self._pending:
                path.unlink()
            self._pending = []


# --- the records


def _describe(
    spec: ReleaseSpec,
    submission: Submission,
    base: Base | None,
    counts: _RowCounts,
    sent: Splits,
    sizes: dict[str, int],
) -> Manifest:
    submission.check_records(counts.runs)  # a stream tells its runs only now
    before = base.manifest if base else None
    splits = {
        split: SplitRecord(
            rows=sum(shard.rows for shard in shards),
            bytes=sum(shard.bytes for shard in shards),
            uncompressed_bytes=sizes[split]
            + (before.splits[split].uncompressed_bytes if before and split == spec.split else 0),
            shards=shards,
        )
        for split, shards in sent.items()
        if shards
    }
    known = {run.fingerprint: run for run in (before.runs if before else [])}
    return Manifest(
        version=spec.version,
        appends_to=before.version if before else None,
        config_name=spec.config_name,
        split=spec.split,
        failures_split=failures_split(spec.split) if failures_split(spec.split) in splits else None,
        failures=spec.failures,
        complete=list(spec.complete),
        runs=[known.get(fingerprint) or submission.record(fingerprint) for fingerprint in counts.runs],
        counts=Counts(
            rows=splits[spec.split].rows,
            failed=counts.failed + (before.counts.failed if before and before.failures == "drop" else 0),
            given=counts.given,
            unfinished=submission.rows.unfinished,
            finish_reasons=dict(counts.finish_reasons.most_common()),
            runs=dict(counts.runs.most_common()),
        ),
        splits=splits,
        features=features_to_yaml(submission.rows.features),
        license=spec.license,
        begun=counts.begun,
        finished=now(),
        pushed_with=libraries(),
    )


def _records(repo: Repository, spec: ReleaseSpec, manifest: Manifest, summary: dict[str, Any]) -> dict[str, bytes]:
    """Return the files that describe the release, by path."""
    files = {
        "manifest.json": manifest.to_json().encode(),
        "statistics.json": (json.dumps(summary, indent=2) + "\n").encode(),
    }
    try:
        files |= {f"{name}.png": figures.image(name, summary, kind="png") for name in figures.names(summary)}
    except TessyError as error:
        repo.say(f"the card goes without figures: {error}")
    return {f"{spec.records}/{name}": data for name, data in files.items()}
