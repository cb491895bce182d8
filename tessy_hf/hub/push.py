"""Release finished rows on the Hub: data, manifest, statistics and card under one tag, complete or not at all.

Rows go in; a tagged version comes out. This room is the only one that writes to the Hub; it knows no engine. A push
that dies leaves ``main`` as it was or with the complete release; a rerun looks at what is there and resumes.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from datasets import Dataset

from tessy_hf.errors import VersionError
from tessy_hf.hub.candidate import discard, resume
from tessy_hf.hub.live import Live, LiveCard, show_release
from tessy_hf.hub.neighbors import check_neighbors
from tessy_hf.hub.repository import Repository
from tessy_hf.hub.submission import Submission
from tessy_hf.hub.upload import upload
from tessy_hf.hub.versions import (
    Found,
    ReleaseSpec,
    Standing,
    choose_base,
    find_release,
    read_manifest,
    read_standing,
)
from tessy_hf.manifest import License, Manifest, RunRecord
from tessy_hf.run.finished import Rows
from tessy_hf.run.journal import Journal
from tessy_hf.run.progress import Summary

if TYPE_CHECKING:
    from datasets import IterableDataset

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Release:
    """The result of a push.

    Attributes:
        repo_id: The dataset repository.
        version: The release; its tag is ``v`` and this.
        commit: The tagged commit.
        url: Its page.
        rows: Rows in the split.
        failed: Failed or incomplete rows, in their own split or left out.
        created: ``False`` if the release was there already and nothing was done.
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
    language: str | Sequence[str] | None = None,
    manifest: Manifest | RunRecord | None = None,
    prompts: Dataset | IterableDataset | None = None,
    run: str | None = None,
    live: bool | Literal["main"] | Live = False,
    max_shard_size: int | str = "500MB",
    token: str | None = None,
    retry_timeout: float = 300.0,
    backoff: float = 1.0,
    say: Callable[[str], None] = logger.info,
    patience: float | None = None,
) -> Release:
    """Release finished rows as one tagged version of a dataset on the Hub.

    The version is complete or absent, for readers of ``main`` and of the tag alike, and is loaded with plain
    ``datasets`` before it is on ``main``. If a push dies, run it again: what is there is not sent again. Load a
    release with ``load_dataset(repo_id, revision="v1.0.0")``.

    Args:
        rows: A ``Dataset``, a stream (generated while it is uploaded, in bounded memory), a journal with ``prompts``,
            or the path of a journal or of files that a run wrote, which carry its record.
        repo_id: The dataset repository, ``user/name``. Made if it is not there.
        version: ``major.minor.patch``, above those that are there. A minor step (1.1.0 after 1.0.0) adds the rows that
            are new, by id and prompt, and keeps what is there; a major step or a patch replaces the split.
        split: The split's name.
        config_name: The configuration (subset) of the dataset. All splits of one have the same columns.
        private: Whether a repository that is made now is private.
        append: Add to the last release, or replace it, whatever the version says.
        failures: What happens to failed and incomplete rows: ``"split"`` puts them into a split ``failures``,
            ``"drop"`` leaves them out. Both are counted on the card.
        complete: The finish reasons of rows that are neither failed nor incomplete.
        license: The license of the data, as the Hub names it.
        license_name: Its name, where ``license="other"``.
        license_link: Its URL.
        language: The rows' languages as the Hub names them, such as ``"en"``. By default what the dataset's card says,
            else what the card of the prompts' dataset says; left out where neither does.
        manifest: The record of the run, where neither the rows nor this machine have it: ``transform.record()``, or
            the manifest of another release.
        prompts: The prompts of a journal's rows, whose columns are released with them; rows of others are left out.
        run: Which run of a journal, where it holds several.
        live: Whether to show the run's progress on a branch of its own, or on the card of ``main`` too (``"main"``),
            until it is released. A journal is waited for until it has a row for each prompt.
        max_shard_size: About how many bytes, uncompressed, a file holds.
        token: A token that may write; by default ``HF_TOKEN`` or the one of ``hf auth login``. Never stored.
        retry_timeout: Seconds for which a call that fails for the moment is tried again.
        backoff: Seconds before the first retry; each further pause is twice as long.
        say: Called with a line for each step.
        patience: Former name of ``retry_timeout``.

    Raises:
        VersionError: The version is not valid, exists with other rows, or lies below one that exists.
        DatasetError: The rows lack columns or a schema, or the repository could not be loaded with them in it.
        JournalError: The journal cannot be read, or comes without its prompts.
        HubError: The Hub refuses, or does not answer. ``main`` and the tags are as before, or hold the release.
    """
    terms = License(license=license, license_name=license_name, license_link=license_link)
    spec = ReleaseSpec.checked(
        version, split, config_name, append, failures, complete, terms, language, max_shard_size
    )
    shown = Live.read(live)
    submission = Submission(Rows(rows, run, prompts=prompts), manifest)
    with tempfile.TemporaryDirectory(prefix="tessy-push-") as folder, ExitStack() as running:
        timeout = retry_timeout if patience is None else patience
        reach = partial(Repository, repo_id, token=token, backoff=backoff, say=say)
        repo = reach(Path(folder), retry_timeout=timeout)

        for line in submission.remarks():
            say(line)

        # 1. Check write access and the version, before a stream begins to generate.
        repo.reach(private)
        standing = read_standing(repo, spec)
        card = _live_card(reach(Path(folder, "live"), retry_timeout=min(timeout, 60.0)), spec, shown, submission)
        if found := find_release(repo, spec, submission, standing):
            return _finish(repo, spec, found, card)
        if card is not None:
            running.enter_context(card)
            submission = _followed(card, submission, manifest, lambda n: Rows(rows, run, n, prompts=prompts))

        # 2. Choose the release that the rows are added to; refuse what could not be loaded beside its neighbors.
        _restore_tag(repo, standing)
        base = choose_base(repo, spec, submission, standing)
        other_splits = check_neighbors(repo, standing.main, spec, submission.rows.features) if standing.main else {}

        # 3. Upload all rows to a side branch, then manifest and card; resume what an earlier attempt left.
        candidate = resume(repo, spec, submission, base, other_splits) or upload(
            repo, spec, submission, base, other_splits
        )
        if card is not None:
            card.stop()
        candidate.prepare()

        # 4. Read every file back, and load every split that the card names with plain `datasets`.
        candidate.verify(base, submission.rows.features)
        candidate.load()

        # 5. Put all of it on main in one commit, and tag it.
        commit = candidate.promote(standing.manifest)
        return _finish(repo, spec, Found(commit, candidate.manifest, tagged=False), card)


def _live_card(repo: Repository, spec: ReleaseSpec, live: Live | None, submission: Submission) -> LiveCard | None:
    """Return what shows the progress of rows that are being written; those of a ``Dataset`` are there."""
    rows, mapped = submission.rows, submission.mapped
    if live is None or isinstance(rows.given, Dataset):
        repo.say("these rows are finished: no progress is shown") if live is not None else None
        return None
    card = LiveCard(repo, spec.tag, live, rows.features, mapped.summary if mapped is not None else Summary)
    rows.watch = card.add
    return card


def _followed(
    card: LiveCard, submission: Submission, manifest: Manifest | RunRecord | None, rows: Callable[[int], Rows]
) -> Submission:
    """Return what is to be released: of a journal, once its run has written all rows."""
    if not isinstance(submission.rows.given, Journal):
        return submission
    card.follow(submission.rows, rows)
    return Submission(rows(1), manifest)


def _restore_tag(repo: Repository, standing: Standing) -> None:
    """Tag the release on ``main`` if its push died before that."""
    there = standing.manifest
    if there is not None and f"v{there.version}" not in standing.tags:
        repo.make_tag(f"v{there.version}", standing.branches["main"])


def _finish(repo: Repository, spec: ReleaseSpec, found: Found, card: LiveCard | None) -> Release:
    """Tag a release that is on ``main`` unless it is tagged, delete the side branch, end what shows progress.

    Raises:
        VersionError: The tag appeared meanwhile with another release.
    """
    counts = found.manifest.counts
    if found.tagged:
        repo.say(f"{repo.id}@{spec.tag} is there already, with {counts.rows} rows of this run")
    else:
        repo.make_tag(spec.tag, found.commit)
        there = read_manifest(repo, repo.refs()[1].get(spec.tag), spec.config_name, spec.split)
        if there != found.manifest:
            raise VersionError(
                f"{repo.id} got another {spec.tag} during this push. The rows are on main; push them as a higher one."
            )
        repo.say(f"{repo.id}@{spec.tag} is released")
    discard(repo, spec)
    show_release(repo if card is None else card.repo, spec.tag, found.commit)
    url = f"{repo.api.endpoint}/datasets/{repo.id}/tree/{spec.tag}"
    return Release(repo.id, spec.version, found.commit, url, counts.rows, counts.failed, created=not found.tagged)
