"""One repository on the Hub, dataset or model: its files, refs, commits and tags, every call under one retry policy.

The client itself retries uploads and listings but not commits, tags, branches and the rest. A step passed to
:meth:`Repository.call` may run twice when an answer is lost, so it must look at what is there first. Knows nothing of
versions and cards.
"""

from __future__ import annotations

import copy
import functools
import logging
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import httpx2

from tessy_hf.errors import HubError
from tessy_hf.retries import Failures, RetryPolicy, causes, is_transient, own_words, status_of

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, RepoFile

    Operation = CommitOperationAdd | CommitOperationCopy | CommitOperationDelete

T = TypeVar("T")

BASE_CHANGED = 412
"""The status of a commit whose parent is no longer the branch's head: worth another look and another try."""

logger = logging.getLogger(__name__)


class _Stale(HubError):
    """The Hub answered from a replica that does not know this process's last step yet."""


class Repository:
    """One repository on the Hub.

    Args:
        repo_id: ``user/name``.
        folder: Where downloads are kept. Files are only read at a commit, so nothing in it gets stale.
        repo_type: ``"dataset"``, ``"model"`` or ``"space"`` (a static one).
        token: The token, or ``None`` for the environment's.
        retry_timeout: Seconds for which a call is tried again.
        backoff: Seconds before the first retry; each further pause is twice as long.
        say: Called with a line for each retry.

    All methods raise :class:`HubError` where the Hub refuses or does not answer in time.
    """

    def __init__(
        self,
        repo_id: str,
        folder: Path,
        *,
        repo_type: Literal["dataset", "model", "space"] = "dataset",
        token: str | None = None,
        retry_timeout: float = 60.0,
        backoff: float = 1.0,
        say: Callable[[str], None] = logger.info,
    ) -> None:
        from huggingface_hub import HfApi, HfFileSystem

        from tessy_hf import __version__

        self.id, self.say, self.token = repo_id, say, token
        self.api = HfApi(token=token, library_name="tessy-hf", library_version=__version__)
        self._system = HfFileSystem(token=token, endpoint=self.api.endpoint, skip_instance_cache=True)
        self._where: dict[str, Any] = {"repo_id": repo_id, "repo_type": repo_type}
        self._policy = RetryPolicy(timeout=retry_timeout, first_pause=backoff)
        self.folder = folder
        # What this process did to branches and tags, to recognize answers from before it.
        self._heads: dict[str, str] = {}
        self._left: defaultdict[str, set[str | None]] = defaultdict(set)  # where branches no longer are
        self._own_tags: set[str] = set()

    def call(self, what: str, function: Callable[..., T], *args: Any, expected: Any = (), **kwargs: Any) -> T:
        """Call a function until it returns or fails for good.

        Args:
            what: What is attempted, for the message: "list the files".
            function: A method of the client, which gets the repository as an argument; or any other function.
            *args: Its arguments.
            expected: Exceptions for the caller to handle.
            **kwargs: Its arguments by name.

        Raises:
            HubError: It failed for good.
        """
        where = self._where if getattr(function, "__self__", None) is self.api else {}
        attempt = functools.partial(function, *args, **where, **kwargs)
        try:
            return self._policy.call(attempt, retry_on=may_pass, notify=self._announce_retry)
        except HubError:
            raise
        except expected:
            raise
        except (httpx2.HTTPError, OSError, RuntimeError, ValueError) as error:
            raise HubError(_explained(what, self.id, error)) from error

    def _announce_retry(self, failures: Failures) -> None:
        self.say(f"the Hub did not answer: {_seen(failures.error)}; trying again in {failures.pause:.0f} s")

    # --- reading

    def refs(self) -> tuple[dict[str, str], dict[str, str]]:
        """Return the branches with their commits, and the tags; never as before this process's own last step.

        Some Hubs give the id of a tag's own object: good for reading, but only :meth:`resolve` gives the commit.
        """

        def listing() -> tuple[dict[str, str], dict[str, str]]:
            found = self.api.list_repo_refs(**self._where)
            branches, tags = ({ref.name: ref.target_commit for ref in refs} for refs in (found.branches, found.tags))
            stale = [name for name, left in self._left.items() if branches.get(name) in left]
            if stale or not self._own_tags <= tags.keys():
                stale += sorted(self._own_tags.difference(tags))
                raise _Stale(f"The Hub lists old {', '.join(stale)} of {self.id}. Nothing is lost; run it again.")
            return branches, tags

        branches, tags = self.call("list branches and tags", listing)
        self._heads = branches
        return branches, tags

    def resolve(self, revision: str) -> str:
        """Return the commit of a tag, branch or commit."""
        from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

        absent = (RepositoryNotFoundError, RevisionNotFoundError)
        try:
            found = self.call("look up the revision", self.api.repo_info, revision=revision, expected=absent)
        except RepositoryNotFoundError as error:
            raise HubError(
                f"There is no {self._where['repo_type']} {self.id} on the Hub, or this token may not see it. Check "
                "the name user/name, and for a private one set HF_TOKEN."
            ) from error
        except RevisionNotFoundError as error:
            there = ", ".join(sorted(self.refs()[1])) or "none"
            raise HubError(f"{self.id} has no {revision!r}. Tags: {there}. Use one of them.") from error
        return str(found.sha)

    def download(self, path: str, commit: str, **options: Any) -> Path | None:
        """Download a file at a commit; ``None`` if there is none.

        Args:
            path: The file in the repository.
            commit: The commit.
            **options: ``cache_dir`` or ``local_dir`` of ``HfApi.hf_hub_download``.
        """
        from huggingface_hub.errors import RemoteEntryNotFoundError

        fetch = functools.partial(self.api.hf_hub_download, filename=path, revision=commit, **self._where, **options)
        try:
            return Path(self.call(f"send {path}", fetch, expected=RemoteEntryNotFoundError))
        except RemoteEntryNotFoundError:
            return None

    def read(self, path: str, commit: str) -> str | None:
        """Return a text file at a commit, or ``None`` if there is none."""
        file = self.download(path, commit, cache_dir=self.folder / "cache")
        return None if file is None else file.read_text(encoding="utf-8")

    def files(self, commit: str, folder: str | None = None) -> dict[str, RepoFile]:
        """Return the client's records of all files at a commit, by path."""
        from huggingface_hub import RepoFile
        from huggingface_hub.errors import RemoteEntryNotFoundError

        def listing() -> list[Any]:
            return list(self.api.list_repo_tree(path_in_repo=folder, recursive=True, revision=commit, **self._where))

        try:
            found = self.call("list the files", listing, expected=RemoteEntryNotFoundError)
        except RemoteEntryNotFoundError:
            return {}
        return {file.path: file for file in found if isinstance(file, RepoFile)}

    def glob(self, pattern: str, commit: str) -> list[str]:
        """Return the paths of a dataset's files at a commit that match a pattern, as ``datasets`` matches it."""
        root = f"datasets/{self.id}@{commit}/"
        found = self.call("list the files", lambda: list(self._system.glob(root + pattern)))
        return sorted(path.removeprefix(root) for path in found)

    def footer(self, path: str, commit: str) -> pq.FileMetaData:
        """Return the metadata of a dataset's Parquet file: rows and schema. Only its end is downloaded."""
        import pyarrow.parquet as pq

        def read() -> pq.FileMetaData:
            with self._system.open(f"datasets/{self.id}@{commit}/{path}", block_size=1 << 16) as file:
                return pq.read_metadata(file)

        return self.call(f"read back {path}", read)

    # --- writing

    def reach(self, private: bool | None) -> None:
        """Make the repository if it is not there, and check that this token may write to it."""
        from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

        try:
            self.call("check write access", self.api.auth_check, write=True, expected=HfHubHTTPError)
            return
        except RepositoryNotFoundError:
            self.say(f"making the repository {self.id}")
        except HfHubHTTPError as error:
            if error.response.status_code in (401, 403):
                raise HubError(_explained("grant write access", self.id, error)) from error
            # A Hub without this check: making the side branch, before any row is sent, shows it.
        sdk = {"space_sdk": "static"} if self._where["repo_type"] == "space" else {}
        self.call("make the repository", self.api.create_repo, private=private, exist_ok=True, **sdk)

    def commit(self, branch: str, operations: Sequence[Operation], message: str, parent: str | None = None) -> str:
        """Commit once, without retries; return the commit's id."""
        done = self.api.create_commit(
            operations=operations, commit_message=message, revision=branch, parent_commit=parent, **self._where
        )
        if done.oid != self._heads.get(branch):  # the same where nothing was to be changed
            self._left[branch].add(self._heads.get(branch))
            self._heads[branch] = done.oid
        return str(done.oid)

    def make_branch(self, branch: str) -> None:
        """Make a branch at ``main``, or keep the one that is there."""
        self.call("make a branch", self.api.create_branch, branch=branch, exist_ok=True)
        self._left[branch].add(None)

    def delete_branch(self, branch: str) -> None:
        """Delete a branch."""
        self._left.pop(branch, None)
        self.call("delete the side branch", self.api.delete_branch, branch=branch)

    def make_tag(self, tag: str, commit: str) -> None:
        """Tag a commit, unless the tag exists, wherever it points."""
        self.call("tag", self.api.create_tag, tag=tag, revision=commit, tag_message=f"Release {tag}", exist_ok=True)
        self._own_tags.add(tag)


def other(repo: Repository, repo_id: str) -> Repository:
    """Return another repository of the same kind, to be read with the same token and retries."""
    found = copy.copy(repo)
    found.id, found._where = repo_id, {**repo._where, "repo_id": repo_id}
    return found


def read_tables(repo: Repository, paths: Sequence[str], commit: str) -> Iterator[pa.Table]:
    """Iterate over the rows of Parquet files, one file on disk and one row group in memory at a time.

    Raises:
        HubError: A file is not there.
    """
    import pyarrow.parquet as pq

    for path in paths:
        with tempfile.TemporaryDirectory(dir=repo.folder) as folder:
            file = repo.download(path, commit, local_dir=folder)
            if file is None:
                raise HubError(f"{path} is missing in {repo.id} at {commit}. Restore it, or push a new version.")
            with pq.ParquetFile(file) as parquet:
                yield from (parquet.read_row_group(number) for number in range(parquet.num_row_groups))


def _explained(what: str, repo_id: str, error: BaseException) -> str:
    hint = "Check the connection and https://status.huggingface.co, then run it again; it resumes."
    if status_of(error) in (401, 403):
        hint = f"It takes a token that may write to {repo_id}: set HF_TOKEN, run `hf auth login`, or pass token=."
    elif status_of(error) is not None and not may_pass(error):
        hint = "Check the repository's name and state, then run it again."
    return f"The Hub did not {what} for {repo_id}: {_seen(error)}. {hint}"


def _seen(error: BaseException) -> str:
    """Return the status and what the server said; without a status (whose error may quote a signed URL) its cause."""
    status, said = status_of(error), getattr(error, "server_message", None)
    if status is None:
        return f"{type(error).__name__} ({own_words(error)})"
    return f"status {status}{f' ({said})' if said else ''}"


def may_pass(error: BaseException) -> bool:
    """Whether another try may succeed; a :class:`HubError` has been through the retries of an inner call."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    if isinstance(error, HubError):
        return isinstance(error, _Stale)
    if any(isinstance(one, OfflineModeIsEnabled) for one in causes(error)):
        return False
    return is_transient(error) or status_of(error) == BASE_CHANGED
