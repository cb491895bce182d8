"""A dataset repository on the Hub: its files, manifests and refs, with retries for what the client does not retry.

The client retries uploads and listings; commits, tags, branches and the rest it tries once. Each step that is passed
to :meth:`Repository.call` may be taken twice, where an answer was lost: it must look what is there first.
"""

from __future__ import annotations

import logging
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import httpx2
import tenacity

from tessy_hf import manifest as provenance
from tessy_hf.errors import HubError
from tessy_hf.manifest import Manifest

if TYPE_CHECKING:
    import pyarrow as pa

T = TypeVar("T")

_PASSING = {408, 409, 412, 425, 429, 500, 502, 503, 504}
_LONGEST_PAUSE = 30.0
_LIMIT = re.compile(r";\s*r\s*=\s*0\s*;\s*t\s*=\s*(?P<reset>\d+)")  # nothing remains, until so many seconds from now

logger = logging.getLogger(__name__)


def record_folder(config_name: str, split: str) -> str:
    """Return the folder of a split's manifest and statistics in the repository."""
    return f"tessy/{config_name}/{split}"


class _Lagging(HubError):
    """The Hub answered from a copy that does not know yet what this process has done."""


def may_pass(error: BaseException) -> bool:
    """Whether the same call may succeed when made again: by the status, or for lack of an answer."""
    if isinstance(error, _Lagging):
        return True
    root = _root(error)
    status = _status(root)
    if status is not None:
        return status in _PASSING
    return isinstance(root, httpx2.TransportError) and not isinstance(root, httpx2.UnsupportedProtocol)


def _root(error: BaseException) -> BaseException:
    """Return the answer or the lack of one that an error of the client is made of; the error itself if of neither."""
    seen: BaseException | None = error
    while seen is not None:
        if _status(seen) is not None or isinstance(seen, httpx2.TransportError):
            return seen
        seen = seen.__cause__ or seen.__context__
    return error


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


class Repository:
    """A dataset repository on the Hub, with retries for what the client does not retry.

    Args:
        repo_id: ``user/name``.
        folder: Where downloads are kept; files are only ever read at a commit, so nothing in it grows stale.
        token: The token, or ``None`` for the environment's.
        patience: Seconds for which a call is tried again.
        backoff: Seconds before the first retry.
        say: Is told of retries.
    """

    def __init__(
        self,
        repo_id: str,
        folder: Path,
        *,
        token: str | None = None,
        patience: float = 60.0,
        backoff: float = 1.0,
        say: Callable[[str], None] = logger.info,
    ) -> None:
        from huggingface_hub import HfApi, HfFileSystem

        from tessy_hf import __version__

        self.id, self.say = repo_id, say
        self._cache = folder / "cache"
        self.api = HfApi(token=token, library_name="tessy-hf", library_version=__version__)
        self._system = HfFileSystem(token=token, endpoint=self.api.endpoint, skip_instance_cache=True)
        self._where: dict[str, Any] = {"repo_id": repo_id, "repo_type": "dataset"}
        self._last: dict[str, str] = {}  # where each branch was when last listed
        self._left: dict[str, set[str | None]] = {}  # where branches no longer are, by this process's own doing
        self._tags: set[str] = set()
        self._retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(may_pass),
            wait=lambda state: _pause(state, backoff),
            stop=tenacity.stop_after_delay(patience),
            before_sleep=self._tell_retry,
            reraise=True,
        )

    def call(self, what: str, function: Callable[..., T], *args: Any, expected: Any = (), **kwargs: Any) -> T:
        """Call a function until it answers or fails for good.

        Args:
            what: What is attempted, for the user: "list the files".
            function: A method of the client, which is told the repository; or any function of no arguments.
            *args: Its arguments.
            expected: Exceptions that are the caller's business.
            **kwargs: Its arguments by name.

        Raises:
            HubError: It failed for good.
        """
        where = self._where if getattr(function, "__self__", None) is self.api else {}
        try:
            return self._retrying(function, *args, **where, **kwargs)
        except HubError:
            raise
        except expected:
            raise
        except (httpx2.HTTPError, OSError, RuntimeError, ValueError) as error:
            raise HubError(self._explained(what, error)) from error

    def _explained(self, what: str, error: BaseException) -> str:
        root = _root(error)
        status, said = _status(root), getattr(root, "server_message", None)
        seen = f"status {status}" if status else type(root).__name__
        hint = "Check the connection and https://status.huggingface.co, and run it again; it goes on where it ended."
        if status in (401, 403):
            hint = (
                f"A token that may write to {self.id} is expected: set HF_TOKEN, run `hf auth login`, or pass token=."
            )
        elif status is not None and status not in _PASSING:
            hint = "An answer of 200 is expected; check the repository's name and state, and run it again."
        return f"The Hub did not {what} for {self.id}: {seen}{f' ({said})' if said else ''}. {hint}"

    def _tell_retry(self, state: tenacity.RetryCallState) -> None:
        error = (state.outcome and state.outcome.exception()) or HubError()
        self.say(f"the Hub did not answer well ({type(_root(error)).__name__}); trying again")

    # --- reading

    def refs(self) -> tuple[dict[str, str], dict[str, str]]:
        """Return the branches with their commits, and the tags; never as they were before this process's own steps.

        A tag may be told by the id of its own object: to be read at, but :meth:`resolve` tells the commit.
        """

        def listing() -> tuple[dict[str, str], dict[str, str]]:
            found = self.api.list_repo_refs(**self._where)
            branches, tags = ({ref.name: ref.target_commit for ref in refs} for refs in (found.branches, found.tags))
            late = [name for name, left in self._left.items() if branches.get(name) in left]
            if late := [*late, *self._tags.difference(tags)]:
                raise _Lagging(
                    f"The Hub keeps telling {', '.join(late)} of {self.id} as before the last step. Nothing is lost; "
                    "run it again in a minute."
                )
            return branches, tags

        branches, tags = self.call("list branches and tags", listing)
        self._last = branches
        return branches, tags

    def resolve(self, revision: str) -> str:
        """Return the commit of a tag, branch or commit.

        Raises:
            HubError: There is none.
        """
        from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

        absent = (RepositoryNotFoundError, RevisionNotFoundError)
        try:
            found = self.call("tell the revision", self.api.repo_info, revision=revision, expected=absent)
        except RepositoryNotFoundError as error:
            raise HubError(
                f"There is no dataset {self.id} on the Hub, or this token may not see it. Check the name user/name, "
                "and for a private one set HF_TOKEN."
            ) from error
        except RevisionNotFoundError as error:
            there = ", ".join(sorted(self.refs()[1])) or "none"
            raise HubError(f"{self.id} has no {revision!r}. Tags: {there}. Give one of them.") from error
        return str(found.sha)

    def read(self, path: str, commit: str) -> str | None:
        """Return a text file at a commit, or ``None`` if there is none."""
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        def download() -> str:
            try:
                file = self.api.hf_hub_download(filename=path, revision=commit, cache_dir=self._cache, **self._where)
            except LocalEntryNotFoundError as error:  # the client's word for no connection
                raise ConnectionError(f"{path} could not be downloaded.") from error
            return Path(file).read_text(encoding="utf-8")

        try:
            return self.call(f"send {path}", download, expected=EntryNotFoundError)
        except EntryNotFoundError:
            return None

    def manifest(self, commit: str | None, config_name: str, split: str) -> Manifest | None:
        """Return the manifest of a split at a commit, if there is one.

        Raises:
            HubError: It is there but cannot be read.
        """
        text = self.read(f"{record_folder(config_name, split)}/manifest.json", commit) if commit else None
        if text is None:
            return None
        try:
            return Manifest.model_validate_json(text)
        except ValueError as error:
            raise HubError(
                f"The manifest of {self.id} at {commit} cannot be read: {error} One of schema version "
                f"{provenance.SCHEMA_VERSION} is expected; upgrade tessy-hf."
            ) from error

    def files(self, commit: str, folder: str | None = None) -> dict[str, Any]:
        """Return what the client tells of each file at a commit, by path."""
        from huggingface_hub import RepoFile
        from huggingface_hub.errors import EntryNotFoundError

        def listing() -> list[Any]:
            return list(self.api.list_repo_tree(path_in_repo=folder, recursive=True, revision=commit, **self._where))

        try:
            found = self.call("list the files", listing, expected=EntryNotFoundError)
        except EntryNotFoundError:
            return {}
        return {file.path: file for file in found if isinstance(file, RepoFile)}

    def footer(self, path: str, commit: str) -> tuple[int, Any]:
        """Return the number of rows and the schema of a Parquet file; only its end is downloaded."""
        import pyarrow.parquet as pq

        def read() -> tuple[int, Any]:
            with self._system.open(f"datasets/{self.id}@{commit}/{path}", block_size=1 << 16) as file:
                metadata = pq.read_metadata(file)
            return metadata.num_rows, metadata.schema.to_arrow_schema()

        return self.call(f"read back {path}", read)

    def tables(self, shard_paths: Sequence[str], commit: str, columns: list[str] | None = None) -> Iterator[pa.Table]:
        """Iterate over the rows of files at a commit, one file on disk and one row group in memory at a time."""
        import pyarrow.parquet as pq

        for path in shard_paths:
            with tempfile.TemporaryDirectory(dir=self._cache.parent) as folder:
                file = self.call(
                    f"send {path}", self.api.hf_hub_download, filename=path, revision=commit, local_dir=folder
                )
                with pq.ParquetFile(file) as parquet:
                    for number in range(parquet.num_row_groups):
                        yield parquet.read_row_group(number, columns=columns)

    # --- writing

    def reach(self, private: bool | None) -> None:
        """Make the repository if it is not there, and check that this token may write to it.

        Raises:
            HubError: It may not.
        """
        from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

        try:
            self.call("check write access", self.api.auth_check, write=True, expected=HfHubHTTPError)
        except RepositoryNotFoundError:
            self.say(f"making the repository {self.id}")
            self.call("make the repository", self.api.create_repo, private=private, exist_ok=True)
        except HfHubHTTPError as error:
            if error.response.status_code in (401, 403):
                raise HubError(self._explained("grant write access", error)) from error
            # A Hub without this check: the side branch, which is made before any row, shows it.
            self.call("make the repository", self.api.create_repo, private=private, exist_ok=True)

    def commit(self, branch: str, operations: list[Any], message: str, parent: str | None = None) -> str:
        """Commit once, without retries; return the commit's id."""
        done = self.api.create_commit(
            operations=operations, commit_message=message, revision=branch, parent_commit=parent, **self._where
        )
        if done.oid != self._last.get(branch):  # it is the same where nothing was to be changed
            self._left.setdefault(branch, set()).add(self._last.get(branch))
            self._last[branch] = str(done.oid)
        return str(done.oid)

    def make_branch(self, branch: str) -> None:
        """Make a branch at ``main``, or keep the one that is there."""
        self.call("make a branch", self.api.create_branch, branch=branch, exist_ok=True)
        self._left.setdefault(branch, set()).add(None)

    def delete_branch(self, branch: str) -> None:
        """Take a branch away."""
        from huggingface_hub.errors import HfHubHTTPError

        self._left.pop(branch, None)
        self.call("take the side branch away", self.api.delete_branch, branch=branch, expected=HfHubHTTPError)

    def make_tag(self, tag: str, commit: str) -> None:
        """Tag a commit, unless there is such a tag, wherever that is."""
        self.call("tag", self.api.create_tag, tag=tag, revision=commit, tag_message=f"Release {tag}", exist_ok=True)
        self._tags.add(tag)


def _pause(state: tenacity.RetryCallState, backoff: float) -> float:
    """Return the seconds to wait: what the server asks for, in either of its ways, else twice as long as before."""
    error = (state.outcome and state.outcome.exception()) or HubError()
    headers = getattr(getattr(_root(error), "response", None), "headers", {})
    asked, limit = headers.get("Retry-After", ""), _LIMIT.search(headers.get("RateLimit", ""))
    pause = float(asked) if asked.isdigit() else backoff * 2.0 ** (state.attempt_number - 1)
    return min(_LONGEST_PAUSE, max(pause, float(limit["reset"])) if limit else pause)
