"""A release on the Hub: data, manifest, statistics and card, complete under one tag or not there at all.

The only module that writes to the Hub. Rows go in; what happens to the repository, in this order:

1. write access and the version are checked, before a stream begins to generate;
2. shards of bounded size go to a side branch, ``tessy-v1.0.0``, with the manifest last;
3. they are read back: sizes, hashes, row counts, schema;
4. ONE commit puts all of it on ``main`` (files in storage are not sent again), with the card;
5. the tag ``v1.0.0`` is made, and the side branch goes.

A death before 4 leaves ``main`` as it was, one after it leaves it with the complete release. A rerun looks what is
there and goes on: shards are known by their hash, a complete branch is only promoted, a promoted release only tagged.
"""

from __future__ import annotations

import json
import logging
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tessy_hf import manifest as provenance
from tessy_hf.errors import DatasetError, HubError, TessyError, VersionError
from tessy_hf.hub.repository import Repository, record_folder
from tessy_hf.manifest import Counts, Licence, Manifest, RunRecord, ShardRecord, SplitRecord
from tessy_hf.rows import parquet as shards
from tessy_hf.rows.datasets_internals import stream_steps
from tessy_hf.rows.parquet import ShardWriter
from tessy_hf.run.finished import Rows

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset, Features, IterableDataset
    from huggingface_hub import CommitOperationAdd

    from tessy_hf.run.journal import Journal

SHARDS_PER_COMMIT = 50
"""Shards that go into one commit on the side branch; the Hub limits commits per hour."""

BYTES_PER_COMMIT = 5 << 30
"""Nor does more than this wait on disk for its commit."""

_VERSION = re.compile(r"v?(\d+)\.(\d+)\.(\d+)")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Release:
    """What a push has led to.

    Attributes:
        repo_id: The dataset repository.
        version: The release; its tag is ``v`` and this.
        commit: The tagged commit.
        url: Where to look at it.
        rows: Rows in the split.
        failed: Failed or incomplete rows, in their own split or left out.
        created: ``False`` if the release was there already and nothing was to be done.
    """

    repo_id: str
    version: str
    commit: str
    url: str
    rows: int
    failed: int
    created: bool


def push_to_hub(
    rows: Dataset | IterableDataset | Journal | str | Path,
    repo_id: str,
    version: str = "1.0.0",
    *,
    split: str = "train",
    config_name: str = "default",
    private: bool | None = None,
    append: bool | None = None,
    failures: Literal["split", "drop"] = "split",
    complete: Sequence[str] = ("stop",),
    license: str | None = None,
    license_name: str | None = None,
    license_link: str | None = None,
    manifest: Manifest | RunRecord | None = None,
    run: str | None = None,
    max_shard_size: int | str = "500MB",
    token: str | None = None,
    patience: float = 300.0,
    backoff: float = 1.0,
    say: Callable[[str], None] = logger.info,
) -> Release:
    """Release finished rows as one tagged version of a dataset on the Hub.

    The version is complete or absent, for readers of ``main`` and of the tag alike. If it dies, run it again: what is
    there is not sent again. Load it with ``load_dataset(repo_id, revision="v1.0.0")``.

    Args:
        rows: A ``Dataset``, a stream (generated while it is uploaded, in bounded memory), a journal or its path.
        repo_id: The dataset repository, ``user/name``. Made if it is not there.
        version: ``major.minor.patch``, above those that are there. A minor step (1.1.0 after 1.0.0) adds the rows that
            are new, by their id, and keeps what is there; a major step or a patch replaces the split.
        split: The split's name.
        config_name: The configuration (subset) of the dataset.
        private: Whether a repository that is made now is private.
        append: Add to the last release, or replace it, whatever the version says.
        failures: What is done with failed and incomplete rows: ``"split"`` puts them into a split ``failures``,
            ``"drop"`` leaves them out. Both are counted on the card.
        complete: The finish reasons of rows that are neither failed nor incomplete.
        license: The licence of the data, as the Hub names it.
        license_name: Its name, where ``license="other"``.
        license_link: Where it stands.
        manifest: What describes the run, where the rows do not come from a transform of this process or a journal:
            ``transform.record()``, or the manifest of another release.
        run: Which run of a journal, where it holds several.
        max_shard_size: About how many bytes, uncompressed, a file holds.
        token: A token that may write; by default ``HF_TOKEN`` or the one of ``hf auth login``. Never stored.
        patience: Seconds for which a call that may yet pass is tried again.
        backoff: Seconds before the first such try; each further one waits twice as long.
        say: Is told each step.

    Raises:
        VersionError: The version is none, is there with other rows, or lies below one that is there.
        DatasetError: The rows lack columns or a schema.
        JournalError: The journal cannot be read.
        HubError: The Hub refuses, or does not answer. ``main`` and the tags are as before, or hold the release.
    """
    licence = Licence(license=license, license_name=license_name, license_link=license_link)
    options = _Options(
        version=_checked_version(version),
        split=_checked_name("split", split),
        config_name=_checked_name("config_name", config_name),
        append=append,
        failures=failures,
        complete=list(complete),
        licence=licence,
        max_bytes=shards.checked_size(max_shard_size),
    )
    given = _Given(Rows(rows, run), manifest)
    with tempfile.TemporaryDirectory(prefix="tessy-push-") as folder:
        repo = Repository(repo_id, Path(folder), token=token, patience=patience, backoff=backoff, say=say)
        return _Push(repo, given, options, Path(folder), private).run()


# --- what is asked for


@dataclass(frozen=True)
class _Options:
    version: str
    split: str
    config_name: str
    append: bool | None
    failures: Literal["split", "drop"]
    complete: list[str]
    licence: Licence
    max_bytes: int

    @property
    def tag(self) -> str:
        return f"v{self.version}"

    @property
    def failures_split(self) -> str:
        return provenance.failures_split(self.split)

    def prefix(self, split: str) -> str:
        """Return where a split's files are, up to their number; as `datasets` lays them out."""
        return f"{'data' if self.config_name == 'default' else self.config_name}/{split}-"

    @property
    def folder(self) -> str:
        return record_folder(self.config_name, self.split)

    def is_minor_step(self, base: str) -> bool:
        """Whether this version adds to that one."""
        (major, minor, _), (base_major, base_minor, _) = _numbers(self.version), _numbers(base)
        return major == base_major and minor > base_minor


def _numbers(version: str) -> tuple[int, ...]:
    found = _VERSION.fullmatch(version)
    return tuple(map(int, found.groups())) if found else (-1, -1, -1)


def _checked_version(version: str) -> str:
    if not _VERSION.fullmatch(str(version)):
        raise VersionError(
            f"{version!r} is no version. Three numbers are expected; pass for instance version='1.0.0'."
        )
    return ".".join(map(str, _numbers(version)))


def _checked_name(what: str, name: str) -> str:
    if not re.fullmatch(r"\w+(\.\w+)*", name) or (what == "config_name" and name in ("data", "tessy")):
        raise DatasetError(
            f"{what}={name!r} cannot be used. Letters, digits and _ are expected (and for a configuration, neither "
            f"'data' nor 'tessy'); choose another {what}."
        )
    return name


class _Given:
    """The rows, and who can tell what run they are of."""

    def __init__(self, rows: Rows, manifest: Manifest | RunRecord | None) -> None:
        self.rows = rows
        self._told = manifest.runs if isinstance(manifest, Manifest) else [manifest] if manifest else []

    def fingerprints(self) -> set[str]:
        """Return the fingerprints of the runs, generating rows only of a stream that nothing is known of."""
        known = self.rows.fingerprints()
        if known is None:
            known = {transform.run_fingerprint for transform in self._mapped()} or {
                run.fingerprint for run in self._told
            }
        if not known:
            first = next(self.rows.tables(), None)
            known = set(first.column("run_fingerprint").to_pylist()) if first is not None else set()
        return known - {None}

    def _mapped(self) -> list[Any]:
        """Return the transforms that write a stream, the last first."""
        from datasets import IterableDataset

        from tessy_hf.transform import TessyTransform

        if not isinstance(self.rows.given, IterableDataset):
            return []
        mapped = (getattr(step, "function", None) for step in stream_steps(self.rows.given))
        return [function for function in mapped if isinstance(function, TessyTransform)][:1]

    def record(self, fingerprint: str) -> RunRecord:
        """Describe a run as well as anyone here can."""
        from tessy_hf.run.journal import Journal
        from tessy_hf.transform import TRANSFORMS

        told = [run for run in self._told if run.fingerprint == fingerprint]
        if told:
            return told[0]
        alive = [transform for transform in (*self._mapped(), *TRANSFORMS) if transform.run_fingerprint == fingerprint]
        known = [transform for transform in alive if transform.source is not None]
        if known or alive:
            return (known or alive)[0].record()  # type: ignore[no-any-return]
        described = self.rows.given.description() if isinstance(self.rows.given, Journal) else None
        return RunRecord.model_validate_json(described) if described else RunRecord(fingerprint=fingerprint)


# --- the push


@dataclass
class _Tally:
    """What is counted while rows pass."""

    given: int = 0
    failed: int = 0
    finish_reasons: Counter[str] = field(default_factory=Counter)
    runs: Counter[str] = field(default_factory=Counter)

    def add(self, table: pa.Table) -> None:
        self.finish_reasons.update(str(reason) for reason in table.column("finish_reason").to_pylist())
        self.runs.update(run for run in table.column("run_fingerprint").to_pylist() if run is not None)


class _Push:
    """One push, step by step."""

    def __init__(self, repo: Repository, given: _Given, options: _Options, folder: Path, private: bool | None) -> None:
        self.repo, self.given, self.options, self.folder, self.private = repo, given, options, folder, private
        self.branch = f"tessy-{options.tag}"
        self.on_main: Manifest | None = None
        self.base: Manifest | None = None
        self.base_commit: str | None = None
        self.there: dict[str, Any] = {}
        self.pending: list[tuple[CommitOperationAdd, Path]] = []

    def run(self) -> Release:
        """Take all steps that are still to be taken."""
        self.repo.reach(self.private)
        branches, tags = self.repo.refs()
        on_main = self._manifest(branches.get("main"))
        done = self._released(on_main, branches, tags)
        if done is None:
            self._choose_base(on_main, branches.get("main"), tags)
            manifest = self._branched(branches) or self._upload(branches)
            side = self._verify(manifest)
            commit = self._promote(manifest, side)
            done = self._tag(commit, manifest)
        self._close_branch()
        return done

    def _manifest(self, commit: str | None) -> Manifest | None:
        return self.repo.manifest(commit, self.options.config_name, self.options.split)

    # --- is there anything to do?

    def _released(self, on_main: Manifest | None, branches: dict[str, str], tags: dict[str, str]) -> Release | None:
        """Return the release if it is there with the same rows; finish one that lacks only its tag.

        Raises:
            VersionError: It is there with other rows, or a later one is.
        """
        version, tag = self.options.version, self.options.tag
        if tag in tags:
            there = self._manifest(tags[tag])
            if there is None:
                raise VersionError(
                    f"{self.repo.id} has a tag {tag} without the split {self.options.split!r} of the configuration "
                    f"{self.options.config_name!r}. Releases do not change; push it as a higher version."
                )
            self._must_be_the_same(there, f"{self.repo.id}@{tag}")
            self.repo.say(f"{self.repo.id}@{tag} is there already, with {there.counts.rows} rows of this run")
            return self._release(self.repo.resolve(tag), there, created=False)
        newer = [name for name in tags if _numbers(name) > _numbers(version)]
        if newer:
            raise VersionError(
                f"{self.repo.id} has {', '.join(sorted(newer))} already; {tag} would lie below. Pass a higher version."
            )
        if on_main is not None and on_main.version == version:
            self._must_be_the_same(on_main, f"{self.repo.id}@main")
            self.repo.say(f"{version} is on main, complete but without its tag")
            return self._tag(branches["main"], on_main)
        return None

    def _must_be_the_same(self, there: Manifest, name: str) -> None:
        """Raise a VersionError where a release is not what these rows would give, as far as that can be told."""
        mine, theirs = self.given.fingerprints(), set(there.fingerprints)
        if not (mine <= theirs if there.appends_to else mine == theirs):
            told = (
                f"it is of run {', '.join(sorted(theirs)) or '?'}, these rows are of {', '.join(sorted(mine)) or '?'}"
            )
        elif (count := self.given.rows.count) not in (None, there.counts.given):
            told = f"it was made of {there.counts.given} rows, these are {count}"
        elif source := self._other_source(there):
            told = f"its prompts have the fingerprint {source[0]}, these {source[1]}"
        else:
            return
        raise VersionError(
            f"{name} exists and holds other rows: {told}. A version never changes; push these as a higher one."
        )

    def _other_source(self, there: Manifest) -> tuple[str, str] | None:
        for run in there.runs:
            if run.fingerprint in self.given.fingerprints():
                mine = self.given.record(run.fingerprint).source
                theirs = run.source
                if (
                    mine
                    and theirs
                    and mine.fingerprint
                    and theirs.fingerprint
                    and mine.fingerprint != theirs.fingerprint
                ):
                    return theirs.fingerprint, mine.fingerprint
        return None

    def _choose_base(self, on_main: Manifest | None, main: str | None, tags: dict[str, str]) -> None:
        """Decide which release is added to, if any; give it the tag that it lost where its push died."""
        self.on_main = on_main
        if on_main is None or main is None:
            return
        if f"v{on_main.version}" not in tags:
            self.repo.make_tag(f"v{on_main.version}", main)
        append = self.options.is_minor_step(on_main.version) if self.options.append is None else self.options.append
        if append:
            self.base, self.base_commit = on_main, main
            if on_main.features != self.given.rows.features._to_yaml_list():
                raise DatasetError(
                    f"The rows have other columns than {self.repo.id}@v{on_main.version}, to which they are to be "
                    f"added: {', '.join(self.given.rows.features)}. Give them the same, or pass append=False to "
                    "replace what is there."
                )

    def _branched(self, branches: dict[str, str]) -> Manifest | None:
        """Return the manifest on the side branch if an earlier attempt completed it with the same rows."""
        there = self._manifest(branches.get(self.branch))
        base = self.base.version if self.base else None
        if there is None or there.version != self.options.version or there.appends_to != base:
            return None
        try:
            self._must_be_the_same(there, self.branch)
        except VersionError:
            return None
        self.repo.say(f"the side branch {self.branch} is complete from an earlier attempt")
        return there

    # --- upload

    def _upload(self, branches: dict[str, str]) -> Manifest:
        """Send all rows to the side branch, then their manifest."""
        from tessy_hf.report.statistics import Statistics

        begun, tally, statistics = provenance.now(), _Tally(), Statistics()
        self._open_branch(branches)
        self.there = self.repo.files(self.repo.refs()[0][self.branch])
        kept = list(self.base.splits[self.options.split].shards) if self.base else []
        writers = {name: self._writer(name, kept) for name in (self.options.split, self.options.failures_split)}
        written: dict[str, list[ShardRecord]] = {name: [] for name in writers}
        for name, table in self._parts(tally, statistics):
            for shard, path in writers[name].write(table):
                written[name].append(self._send(shard, path))
        for name, writer in writers.items():
            empty = name == self.options.split and not (kept or written[name] or writer.has_rows)
            for shard, path in [writer.empty()] if empty else writer.close():
                written[name].append(self._send(shard, path))
        self._flush()
        manifest = self._describe(
            begun, tally, writers, {**written, self.options.split: kept + written[self.options.split]}
        )
        self._finish_branch(manifest, statistics.summary())
        return manifest

    def _open_branch(self, branches: dict[str, str]) -> None:
        from huggingface_hub import CommitOperationAdd

        if "main" not in branches:  # a Hub that makes repositories without a first commit
            rule = b"*.parquet filter=lfs diff=lfs merge=lfs -text\n"
            operation = CommitOperationAdd(".gitattributes", rule)
            self.repo.call("make the first commit", lambda: self.repo.commit("main", [operation], "Begin"))
        if self.branch not in branches:
            self.repo.say(f"making the side branch {self.branch}")
            self.repo.make_branch(self.branch)
        else:
            self.repo.say(f"going on with the side branch {self.branch}")

    def _writer(self, split: str, kept: list[ShardRecord]) -> ShardWriter:
        first = 1 + max((int(shard.path[-13:-8]) for shard in kept), default=-1) if split == self.options.split else 0
        prefix = self.options.prefix(split)
        return ShardWriter(self.folder, prefix, first, self.given.rows.features, self.options.max_bytes)

    def _parts(self, tally: _Tally, statistics: Any) -> Iterator[tuple[str, pa.Table]]:
        """Iterate over what goes into which split; rows of the base are counted, and those it has are left out."""
        old, failed_before = self._read_base(tally, statistics)
        for table in self.given.rows.tables():
            tally.given += table.num_rows
            if self.base is not None:
                keys = shards.keys(table, self.id_column)
                for key in keys:
                    failed_before.pop(key, None)
                table = table.filter([key not in old for key in keys])
            yield from self._split(table, tally, statistics)
        for table in failed_before.values():
            yield from self._split(table, tally, statistics)
        if self.options.failures == "drop" and tally.failed:
            self.repo.say(f"{tally.failed} failed or incomplete rows are left out")

    def _split(self, table: pa.Table, tally: _Tally, statistics: Any) -> Iterator[tuple[str, pa.Table]]:
        import pyarrow.compute as pc

        mask = shards.is_complete(table, self.options.complete)
        whole, failed = table.filter(mask), table.filter(pc.invert(mask))
        tally.add(table)
        tally.failed += failed.num_rows
        statistics.add(whole)
        yield self.options.split, whole
        if self.options.failures == "split":
            statistics.add(failed)
            yield self.options.failures_split, failed

    def _read_base(self, tally: _Tally, statistics: Any) -> tuple[set[Any], dict[Any, pa.Table]]:
        """Read the release that is added to: its rows' keys, and its failures, which these rows may replace."""
        if self.base is None or self.base_commit is None:
            return set(), {}
        self.repo.say(f"reading {self.repo.id}@v{self.base.version}, to which the new rows are added")
        old: set[Any] = set()
        for table in self.repo.tables(_paths(self.base, self.options.split), self.base_commit):
            tally.add(table)
            statistics.add(table)
            old.update(shards.keys(table, self.id_column))
        failures: dict[Any, pa.Table] = {}
        if self.base.failures_split:
            for table in self.repo.tables(_paths(self.base, self.base.failures_split), self.base_commit):
                table = table.cast(self.given.rows.features.arrow_schema)
                for number, key in enumerate(shards.keys(table, self.id_column)):
                    failures[key] = table.slice(number, 1)
        return old, failures

    @cached_property
    def id_column(self) -> str | None:
        """The column that tells rows apart, where the run has one."""
        runs = [self.given.record(fingerprint) for fingerprint in sorted(self.given.fingerprints())]
        return next((run.settings["id_column"] for run in runs if run.settings.get("id_column")), None)

    def _send(self, shard: ShardRecord, path: Path) -> ShardRecord:
        """Upload a file, unless it is there, and commit when enough have come together."""
        from huggingface_hub import CommitOperationAdd

        there = self.there.get(shard.path)
        if there is not None and there.lfs is not None and there.lfs.sha256 == shard.sha256:
            self.repo.say(f"{shard.path} is there already")
            path.unlink()
            return shard
        self.repo.say(f"sending {shard.path}: {shard.rows} rows, {shard.bytes / 1e6:.2f} MB")
        operation = CommitOperationAdd(shard.path, path)
        self.repo.call(
            f"take {shard.path}", self.repo.api.preupload_lfs_files, additions=[operation], revision=self.branch
        )
        self.pending.append((operation, path))
        if (
            len(self.pending) >= SHARDS_PER_COMMIT
            or sum(file.stat().st_size for _, file in self.pending) > BYTES_PER_COMMIT
        ):
            self._flush()
        return shard

    def _flush(self) -> None:
        if self.pending:
            operations = [operation for operation, _ in self.pending]
            message = f"Add {len(operations)} files of {self.options.tag}"
            self.repo.call("commit", lambda: self.repo.commit(self.branch, list(operations), message))
            for _, path in self.pending:
                path.unlink()
            self.pending = []

    def _describe(
        self, begun: str, tally: _Tally, writers: dict[str, ShardWriter], written: dict[str, list[ShardRecord]]
    ) -> Manifest:
        options, base = self.options, self.base
        splits = {
            name: SplitRecord(
                rows=shards.total(files, "rows"),
                bytes=shards.total(files, "bytes"),
                uncompressed_bytes=writers[name].uncompressed
                + (base.splits[name].uncompressed_bytes if base and name == options.split else 0),
                shards=files,
            )
            for name, files in written.items()
            if files
        }
        known = {run.fingerprint: run for run in (base.runs if base else [])}
        runs = [known.get(fingerprint) or self.given.record(fingerprint) for fingerprint in tally.runs]
        counts = Counts(
            rows=splits[options.split].rows,
            failed=tally.failed + (base.counts.failed if base and base.failures == "drop" else 0),
            given=tally.given,
            unfinished=self.given.rows.unfinished,
            finish_reasons=dict(tally.finish_reasons.most_common()),
            runs=dict(tally.runs.most_common()),
        )
        return Manifest(
            version=options.version,
            appends_to=base.version if base else None,
            config_name=options.config_name,
            split=options.split,
            failures_split=options.failures_split if options.failures_split in splits else None,
            failures=options.failures,
            complete=options.complete,
            runs=runs,
            counts=counts,
            splits=splits,
            features=self.given.rows.features._to_yaml_list(),
            licence=options.licence,
            begun=begun,
            finished=provenance.now(),
            pushed_with=provenance.libraries(),
        )

    def _finish_branch(self, manifest: Manifest, summary: dict[str, Any]) -> None:
        """Commit manifest and statistics, and take away what an earlier attempt left."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        texts = {"manifest.json": manifest.to_json(), "statistics.json": json.dumps(summary, indent=2) + "\n"}
        files = {name: text.encode() for name, text in texts.items()} | self._figures(summary)

        def finish() -> str:
            there = self.repo.files(self.repo.refs()[0][self.branch])
            operations: list[Any] = [CommitOperationDelete(path) for path in self._stale(there, manifest)]
            operations += [CommitOperationAdd(f"{self.options.folder}/{name}", data) for name, data in files.items()]
            return self.repo.commit(self.branch, operations, f"Describe {self.options.tag}")

        self.repo.call("commit", finish)

    def _figures(self, summary: dict[str, Any]) -> dict[str, bytes]:
        """Draw the figures of the card, where what draws them is installed."""
        from tessy_hf.report import figures

        try:
            return {f"{name}.png": figures.image(name, summary, kind="png") for name in figures.NAMES}
        except TessyError as error:
            self.repo.say(f"the card goes without figures: {error}")
            return {}

    def _stale(self, there: dict[str, Any], manifest: Manifest) -> list[str]:
        """Return the data files of these splits that are not of this release."""
        kept = {shard.path for split in manifest.splits.values() for shard in split.shards}
        prefixes = tuple(self.options.prefix(name) for name in (self.options.split, self.options.failures_split))
        return [path for path in there if path.startswith(prefixes) and path not in kept]

    # --- verify, promote, tag

    def _verify(self, manifest: Manifest) -> str:
        """Read back what is on the side branch; return its commit.

        Raises:
            HubError: Something is missing or is not what was sent. The side branch is taken away.
        """
        side = self.repo.refs()[0][self.branch]
        there = self.repo.files(side)
        old = {shard.path for shard in self.base.splits[self.options.split].shards} if self.base else set()
        self.repo.say(f"reading back what was sent: {len(_all_shards(manifest)) - len(old)} file(s)")
        for shard in _all_shards(manifest):
            wrong = _difference(shard, there.get(shard.path))
            if wrong is None and shard.path not in old:
                rows, schema = self.repo.footer(shard.path, side)
                wrong = self._misfit(shard, rows, schema)
            if wrong is not None:
                self._close_branch()
                raise HubError(
                    f"{shard.path} on the side branch of {self.repo.id} {wrong}. It is not released and the branch is "
                    "taken away; run it again to send it anew."
                )
        return side

    def _misfit(self, shard: ShardRecord, rows: int, schema: Any) -> str | None:
        from datasets import Features

        if rows != shard.rows:
            return f"has {rows} rows, {shard.rows} were sent"
        features: Features = Features.from_arrow_schema(schema)
        return None if features == self.given.rows.features else "has another schema than was sent"

    def _promote(self, manifest: Manifest, side: str) -> str:
        """Put the release on main in one commit, on top of what is there; return the commit."""
        summary = json.loads(self.repo.read(f"{self.options.folder}/statistics.json", side) or "{}")
        self.repo.say(f"putting {manifest.counts.rows} rows on main, in one commit")

        def promote() -> str:
            main = self.repo.refs()[0]["main"]
            now = self._manifest(main)
            if now == manifest:  # done, and only the answer was lost
                return main
            if now != self.on_main:
                raise HubError(
                    f"{self.repo.id} has got version {now.version if now else 'none'} on main while this was on its "
                    "way. Nothing of this push is on main; run it again on top of that."
                )
            operations = self._promotion(manifest, side, main, summary)
            return self.repo.commit("main", operations, f"Release {self.options.tag}", parent=main)

        return self.repo.call("promote", promote)

    def _promotion(self, manifest: Manifest, side: str, main: str, summary: dict[str, Any]) -> list[Any]:
        from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete

        from tessy_hf.hub.cards import dataset_card
        from tessy_hf.report.figures import describe

        on_main, on_side = self.repo.files(main), self.repo.files(side)
        data = [shard.path for shard in _all_shards(manifest) if _difference(shard, on_main.get(shard.path))]
        records = [path for path in on_side if path.startswith(self.options.folder + "/")]
        gone = [path for path in on_main if path.startswith(self.options.folder + "/") and path not in on_side]
        figures = {path: describe(Path(path).stem, summary) for path in records if path.endswith(".png")}
        previous = self.repo.read("README.md", main)
        card = dataset_card(summary, manifest, self.repo.id, previous, figures=figures)
        return [
            *(CommitOperationDelete(path) for path in (*self._stale(on_main, manifest), *gone)),
            *(CommitOperationCopy(path, path, src_revision=side) for path in (*data, *records)),
            CommitOperationAdd("README.md", str(card).encode()),
        ]

    def _tag(self, commit: str, manifest: Manifest) -> Release:
        self.repo.make_tag(self.options.tag, commit)
        there = self._manifest(self.repo.refs()[1].get(self.options.tag))
        if there != manifest:
            raise VersionError(
                f"{self.repo.id} has got another {self.options.tag} while this was on its way. The rows are on main; "
                "push them as a higher version."
            )
        self.repo.say(f"{self.repo.id}@{self.options.tag} is released")
        return self._release(commit, manifest, created=True)

    def _close_branch(self) -> None:
        """Take the side branch away. It is no harm if that fails: nobody reads it."""
        from huggingface_hub.errors import HfHubHTTPError

        try:
            if self.branch in self.repo.refs()[0]:
                self.repo.delete_branch(self.branch)
        except (HubError, HfHubHTTPError) as error:
            logger.warning("The side branch %s of %s could not be taken away: %s", self.branch, self.repo.id, error)

    def _release(self, commit: str, manifest: Manifest, *, created: bool) -> Release:
        url = f"{self.repo.api.endpoint}/datasets/{self.repo.id}/tree/{self.options.tag}"
        counts = manifest.counts
        return Release(self.repo.id, self.options.version, commit, url, counts.rows, counts.failed, created)


def _paths(manifest: Manifest, split: str) -> list[str]:
    return [shard.path for shard in manifest.splits[split].shards]


def _all_shards(manifest: Manifest) -> list[ShardRecord]:
    return [shard for split in manifest.splits.values() for shard in split.shards]


def _difference(shard: ShardRecord, there: Any) -> str | None:
    """Return how a file in the repository differs from what it should be, or ``None``."""
    if there is None:
        return "is missing"
    if there.size != shard.bytes:
        return f"has {there.size} bytes, {shard.bytes} were sent"
    if there.lfs is not None and there.lfs.sha256 != shard.sha256:
        return "has another hash than what was sent"
    return None
