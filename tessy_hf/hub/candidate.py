"""The release candidate: a side branch whose tree is what ``main`` will be, checked there and then promoted.

Uploaded shards, a manifest and statistics go in; one commit on ``main`` comes out. A candidate follows ``main``: what
others change there meanwhile is taken over and checked again, never overwritten.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tessy_hf.errors import DatasetError, HubError
from tessy_hf.hub.cards import dataset_card, languages, sources
from tessy_hf.hub.repository import may_pass, other
from tessy_hf.hub.versions import Base, ReleaseSpec, other_rows, read_manifest
from tessy_hf.manifest import Manifest, ShardRecord
from tessy_hf.report.figures import describe

if TYPE_CHECKING:
    from datasets import Features
    from huggingface_hub import RepoFile

    from tessy_hf.hub.layout import Info
    from tessy_hf.hub.repository import Operation, Repository
    from tessy_hf.hub.submission import Submission

logger = logging.getLogger(__name__)


def branch_of(spec: ReleaseSpec) -> str:
    """Return the name of a release's side branch."""
    return f"tessy-{spec.tag}"


@dataclass
class Candidate:
    """A release on its side branch.

    Attributes:
        repo: The repository.
        spec: What is released.
        manifest: Its manifest.
        summary: The numbers of its rows, for the card.
        other_splits: Sizes of other splits, see :func:`tessy_hf.hub.neighbors.check_neighbors`.
        records: Files by path that are still to be committed: manifest, statistics, figures.
    """

    repo: Repository
    spec: ReleaseSpec
    manifest: Manifest
    summary: dict[str, Any]
    other_splits: Mapping[str, Info]
    records: dict[str, bytes] = field(default_factory=dict)
    main: str = ""
    """The commit of ``main`` that the branch was last brought up to."""
    commit: str = ""
    """The branch's own commit after that."""

    # --- prepare

    def prepare(self) -> None:
        """Make the branch's tree what ``main`` will be, with the manifest and the card, in one commit."""
        self.repo.call("commit to the side branch", self._prepare)

    def _prepare(self) -> None:
        from huggingface_hub import CommitOperationAdd

        branches = self.repo.refs()[0]
        main, side = branches["main"], branches[branch_of(self.spec)]
        on_side = {path: file for path, file in self.repo.files(side).items() if path != "README.md"}
        tree = self._tree(self.repo.files(main), on_side)
        card, old_card = self._card(main, {*tree, *self.records}), self.repo.read("README.md", side)
        operations = changes(on_side, tree, source=main)
        operations += [CommitOperationAdd(path, data) for path, data in self.records.items()]
        operations += [CommitOperationAdd("README.md", card.encode())] if card != old_card else []
        if operations:
            side = self.repo.commit(branch_of(self.spec), operations, f"Describe {self.spec.tag}")
        self.main, self.commit, self.records = main, side, {}

    def _tree(self, on_main: Mapping[str, RepoFile], on_side: Mapping[str, RepoFile]) -> dict[str, RepoFile]:
        """Return the files that are to be there beside the card: others as on ``main``, ours as on the branch."""
        folder, shards = f"{self.spec.records}/", {shard.path for shard in self.manifest.shards}
        replaced = ("README.md", folder, *self.spec.data_prefixes)
        others = {path: file for path, file in on_main.items() if path in shards or not path.startswith(replaced)}
        records = self.records or [path for path in on_side if path.startswith(folder)]
        return {**others, **{path: file for path, file in on_side.items() if path in shards or path in records}}

    def _card(self, main: str, paths: set[str]) -> str:
        figures = sorted(path for path in paths if path.startswith(f"{self.spec.records}/") and path.endswith(".png"))
        previous = self.repo.read("README.md", main)
        card = dataset_card(
            self.summary,
            self.manifest,
            self.repo.id,
            previous,
            figures={path: describe(Path(path).stem, self.summary) for path in figures},
            other_splits=self.other_splits,
            language=self.spec.language or languages(previous) or self._source_languages(),
        )
        return str(card)

    def _source_languages(self) -> list[str]:
        """Return the languages that the cards of the prompts' datasets state; a card that cannot be read has none."""
        found: list[str] = []
        for source in sources(self.manifest):
            try:
                found += languages(other(self.repo, str(source.id)).read("README.md", source.revision or "main"))
            except (DatasetError, HubError) as error:
                self.repo.say(f"the card gets no language: that of {source.id} cannot be read. {error}")
        return list(dict.fromkeys(found))

    # --- verify

    def verify(self, base: Base | None, features: Features) -> None:
        """Read back what was sent: sizes, hashes, rows and schema of each file, but for those of the base.

        Raises:
            HubError: A file is missing or is not what was sent. The side branch is deleted.
        """
        there = self.repo.files(self.commit)
        old = {shard.path for shard in base.manifest.splits[self.spec.split].shards} if base else set()
        shards = self.manifest.shards
        self.repo.say(f"reading back what was sent: {sum(shard.path not in old for shard in shards)} file(s)")
        for shard in shards:
            wrong = difference(shard, there.get(shard.path))
            if wrong is None and shard.path not in old:
                wrong = self._misfit(shard, features)
            if wrong is not None:
                self._reject(f"{shard.path} on the side branch of {self.repo.id} {wrong}. Run it again to resend it.")

    def _misfit(self, shard: ShardRecord, features: Features) -> str | None:
        from datasets import Features

        footer = self.repo.footer(shard.path, self.commit)
        if footer.num_rows != shard.rows:
            return f"has {footer.num_rows} rows, {shard.rows} were sent"
        same = Features.from_arrow_schema(footer.schema.to_arrow_schema()) == features
        return None if same else "has another schema than was sent"

    def load(self) -> None:
        """Load every split that the card names with plain ``datasets``, as far as its first row.

        Raises:
            HubError: One cannot be loaded. The side branch is deleted.
        """
        self.repo.say("loading every split of the side branch with plain datasets")
        for name in (".huggingface.yaml", "README.md", "dataset_infos.json"):
            self.repo.download(name, self.commit)  # `datasets` takes a busy Hub for one without these files
        if fault := self.repo.call("load the side branch", self._fault):
            self._reject(
                f"{fault} It could not be loaded from main either. Push to another config_name or repository."
            )

    def _fault(self) -> str | None:
        from datasets import get_dataset_config_names, load_dataset

        where: dict[str, Any] = {"revision": self.commit, "token": self.repo.token}
        place = "the card"
        try:
            with tempfile.TemporaryDirectory(dir=self.repo.folder) as cache:
                for name in get_dataset_config_names(self.repo.id, **where):
                    place = f"the configuration {name!r}"
                    splits = load_dataset(self.repo.id, name, streaming=True, cache_dir=cache, **where)
                    for split, rows in splits.items():
                        place = f"the split {split!r} of the configuration {name!r}"
                        next(iter(rows), None)
                        if rows.info.splits is not None and set(rows.info.splits) != set(splits):
                            raise ValueError(f"dataset_info counts {sorted(rows.info.splits)}, not {sorted(splits)}")
        except Exception as error:  # whatever `datasets` raises: nothing that it cannot load is promoted
            if may_pass(error):
                raise
            said = " ".join(str(error.__cause__ or error).strip().splitlines()[:1])
            return f"`datasets` cannot load {place} from the side branch: {type(error).__name__}: {said}."
        return None

    def _reject(self, reason: str) -> None:
        discard(self.repo, self.spec)
        raise HubError(f"{self.spec.tag} is not released, main is as it was: {reason}")

    # --- promote

    def promote(self, before: Manifest | None) -> str:
        """Make ``main`` what the branch is, in one commit; return it.

        Args:
            before: The manifest that was on ``main`` when the push began.

        Raises:
            HubError: Another release of the split got there first.
        """
        self.repo.say(f"putting {self.manifest.counts.rows} rows on main, in one commit")
        return self.repo.call("promote", self._promote, before)

    def _promote(self, before: Manifest | None) -> str:
        main = self.repo.refs()[0]["main"]
        now = read_manifest(self.repo, main, self.spec.config_name, self.spec.split)
        if now == self.manifest:  # done, and only the answer was lost
            return main
        if now != before:
            raise HubError(
                f"{self.repo.id} got version {now.version if now else 'none'} on main during this push. Nothing of "
                "this push is on main; run it again on top of that."
            )
        if main != self.main:
            self._prepare()
            self.load()
        operations = changes(self.repo.files(main), self.repo.files(self.commit), source=self.commit)
        return self.repo.commit("main", operations, f"Release {self.spec.tag}", parent=main)


def resume(
    repo: Repository, spec: ReleaseSpec, submission: Submission, base: Base | None, other_splits: Mapping[str, Info]
) -> Candidate | None:
    """Return the candidate that an earlier attempt uploaded completely: the same rows, pushed with the same words."""
    side = repo.refs()[0].get(branch_of(spec))
    there = read_manifest(repo, side, spec.config_name, spec.split)
    adds_to = base.manifest.version if base else None
    asked = (spec.version, adds_to, spec.failures, list(spec.complete), spec.license)
    if there is None or asked != (there.version, there.appends_to, there.failures, there.complete, there.license):
        return None
    if side is None or other_rows(submission, there):
        return None
    repo.say(f"the side branch {branch_of(spec)} is complete from an earlier attempt")
    summary = json.loads(repo.read(f"{spec.records}/statistics.json", side) or "{}")
    return Candidate(repo, spec, there, summary, other_splits)


def discard(repo: Repository, spec: ReleaseSpec) -> None:
    """Delete the side branch. No harm if that fails: nobody reads it."""
    try:
        if branch_of(spec) in repo.refs()[0]:
            repo.delete_branch(branch_of(spec))
    except HubError as error:
        logger.warning("The side branch %s of %s could not be deleted: %s", branch_of(spec), repo.id, error)


def changes(now: Mapping[str, RepoFile], then: Mapping[str, RepoFile], source: str) -> list[Operation]:
    """Return what to commit so that the files that are there become others, which are at the commit ``source``."""
    from huggingface_hub import CommitOperationCopy, CommitOperationDelete

    copied = [path for path, file in then.items() if path not in now or now[path].blob_id != file.blob_id]
    return [
        *(CommitOperationDelete(path) for path in now if path not in then),
        *(CommitOperationCopy(path, path, src_revision=source) for path in copied),
    ]


def difference(shard: ShardRecord, there: RepoFile | None) -> str | None:
    """Return how a file in the repository differs from what was sent, or ``None``."""
    if there is None:
        return "is missing"
    if there.size != shard.bytes:
        return f"has {there.size} bytes, {shard.bytes} were sent"
    if there.lfs is not None and there.lfs.sha256 != shard.sha256:
        return "has another hash than what was sent"
    return None
