"""Show the progress of a run on the Hub while it goes on: rows go in one by one, commits of a card come out.

The card and a preview of finished rows are on a branch of their own. Data on ``main`` is never touched; its README may
be, between two marks. Trouble here never stops a run or its release.
"""

from __future__ import annotations

import io
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from tessy_hf.errors import HubError, SettingsError
from tessy_hf.hub import cards
from tessy_hf.hub.candidate import changes
from tessy_hf.hub.upload import open_branch
from tessy_hf.rows import run_record
from tessy_hf.rows.datasets_internals import table
from tessy_hf.run.finished import Rows
from tessy_hf.run.journal import Journal
from tessy_hf.run.progress import Summary
from tessy_hf.trajectory import RowKey

if TYPE_CHECKING:
    from datasets import Features
    from huggingface_hub import CommitOperationAdd

    from tessy_hf.hub.repository import Repository

CARD = Path(__file__).with_name("templates") / "live_card.md"
PREVIEW = "tessy/live/preview.parquet"
PREVIEW_ROWS = 20
FEWEST_MINUTES = 1.0
"""The Hub limits commits to about a hundred an hour."""


@dataclass(frozen=True)
class Live:
    """How a run's progress is shown.

    Attributes:
        minutes: Minutes between commits.
        rows: How many rows there will be, where the rows themselves do not tell.
        main: Whether the README on ``main`` shows the progress too, between two marks.
    """

    minutes: float = 10.0
    rows: int | None = None
    main: bool = False

    @classmethod
    def read(cls, given: Any) -> Self | None:
        """Return what ``live=`` means: ``True``, ``"main"`` or a :class:`Live`; ``None`` for ``False``.

        Raises:
            SettingsError: It is none of these, or asks for more commits than the Hub allows.
        """
        live = {False: None, True: cls(), "main": cls(main=True)}.get(given, given)
        if live is not None and (not isinstance(live, cls) or live.minutes < FEWEST_MINUTES):
            raise SettingsError(
                f"live={given!r} cannot be used. True, 'main' or Live(minutes=...) is expected, with at least "
                f"{FEWEST_MINUTES:g} minute(s) between commits, of which the Hub limits the number."
            )
        return live


class LiveCard:
    """The progress of one run on the Hub; a context manager.

    Args:
        repo: The repository, used by nothing else: commits are made in a thread.
        tag: The release's tag.
        live: How it is shown.
        features: The types of the rows, for the preview.
        known: Counts rows sooner than they arrive here, if anything does.
    """

    def __init__(
        self,
        repo: Repository,
        tag: str,
        live: Live,
        features: Features,
        known: Callable[[], Summary] = Summary,
    ) -> None:
        self.repo, self._tag, self._live, self._features = repo, tag, live, features
        self._total, self._known = live.rows, known
        self.branch = _branch(tag)
        self.summary = Summary()
        self._preview: deque[dict[str, Any]] = deque(maxlen=PREVIEW_ROWS)
        self._begun, self._last_row = time.monotonic(), ""
        self._over, self._lock, self._following = threading.Event(), threading.Lock(), False
        self._thread = threading.Thread(target=self._keep_showing, name="tessy-live", daemon=True)

    @property
    def url(self) -> str:
        """Where the card is."""
        return f"{self.repo.api.endpoint}/datasets/{self.repo.id}/blob/{self.branch}/README.md"

    def __enter__(self) -> Self:
        """Make the branch, show the first card and go on doing so."""
        _attempt(self.repo, "make its branch", lambda: open_branch(self.repo, self.branch))
        self.show("running")
        self.repo.say(f"progress is shown at {self.url}")
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Stop showing; of a failure say that it stopped the run."""
        self.stop()
        if kind is not None and issubclass(kind, Exception):
            self.show(f"stopped by {kind.__name__}")

    def stop(self) -> None:
        """Make no more commits by itself."""
        self._over.set()
        self._thread.join()

    def add(self, row: Mapping[str, Any], *, found: bool = False) -> None:
        """Count a row, found finished at the begin or new, and keep it for the preview."""
        with self._lock:
            self.summary.add(row, "found" if found else "written")
            self._last_row = self._last_row if found else _time()
            if row["finish_reason"] != "error":
                self._preview.append(dict(row))

    def _keep_showing(self) -> None:
        while not self._over.wait(60 * self._live.minutes):
            if not self._following:
                self.show("running")

    def show(self, state: str) -> None:
        """Bring the card up to date, in one commit on each branch."""
        with self._lock:
            text, preview = self._text(state), list(self._preview)
        _attempt(self.repo, "show progress", lambda: self._commit(text, preview))
        if self._live.main:
            _attempt(self.repo, "show progress on main", lambda: self._commit_to_main(text))

    def _commit(self, text: str, preview: list[dict[str, Any]]) -> None:
        from huggingface_hub import CommitOperationAdd, DatasetCardData

        files = [{"split": "preview", "path": PREVIEW}]
        configs = [{"config_name": "default", "data_files": files}] if preview else []
        card = cards.make_card(DatasetCardData(configs=configs), f"# {self.repo.id}\n\n{text}")
        operations = [CommitOperationAdd("README.md", str(card).encode())]
        operations += [CommitOperationAdd(PREVIEW, _parquet(preview, self._features))] if preview else []
        self.repo.commit(self.branch, operations, f"Show the progress of {self._tag}")

    def _commit_to_main(self, text: str) -> None:
        from huggingface_hub import CommitOperationAdd

        main = self.repo.refs()[0]["main"]
        card = cards.with_part(self.repo.read("README.md", main) or "", "live", text)
        operation: CommitOperationAdd = CommitOperationAdd("README.md", card.encode())
        self.repo.commit("main", [operation], f"Show the progress of {self._tag}", parent=main)

    def _text(self, state: str) -> str:
        known = max(self.summary, self._known(), key=lambda one: one.rows)
        new = known.rows - known.found
        rate = new / max(time.monotonic() - self._begun, 1e-9)
        seconds = (self._total - known.rows) / rate if self._total and rate else None
        fields = {
            "tag": self._tag,
            "state": state,
            "done": known.rows,
            "total": self._total,
            "failed": known.failed + known.refused,
            "rate": 3600 * rate,
            "left": seconds is not None and cards.Markdown(str(timedelta(minutes=max(0, seconds // 60)))[:-3] + " h"),
            "teacher_share": known.teacher_share,
            "last_row": self._last_row,
            "now": _time(),
            "minutes": self._live.minutes,
        }
        return cards.render_parts(CARD.read_text(encoding="utf-8"), **fields)["live"]

    # --- a journal that a run is writing

    def follow(self, now: Rows, rows: Callable[[int], Rows], wait: Callable[[float], Any] = time.sleep) -> None:
        """Wait until a journal has a row for each of its prompts, and show them as they come.

        Args:
            now: The journal's rows.
            rows: Reads them again; those that failed count where they failed so many times.
            wait: Waits so many seconds.
        """
        settings = run_record.prompt_settings(now.own_record or {})
        attempts, seen = settings.max_attempts if settings is not None else 1, set[RowKey]()
        while True:
            now, first = rows(attempts), not seen
            assert isinstance(now.given, Journal), "only journals are followed"
            for key, _ in now.given.keys():
                if key not in seen and (row := now.given.row(key)) is not None:
                    seen.add(key)
                    self.add({"key": key.id, **row}, found=first)
            self._total = self._live.rows or (now.count or 0) + now.unfinished
            self._following = bool(now.unfinished)
            self.show("running")
            if not now.unfinished:
                return
            wait(60 * self._live.minutes)


def show_release(repo: Repository, tag: str, commit: str) -> None:
    """Make the branch that showed a run's progress, if any did, what was released: its card too."""
    branch = _branch(tag)

    def same() -> None:
        head = repo.refs()[0].get(branch)
        now = repo.files(head) if head is not None else {}
        if head is not None and (operations := changes(now, repo.files(commit), source=commit)):
            repo.commit(branch, operations, f"Release {tag}")

    _attempt(repo, "show the release", same)


def _branch(tag: str) -> str:
    return f"tessy-live-{tag}"


def _attempt(repo: Repository, what: str, function: Callable[[], Any]) -> None:
    try:
        repo.call(what, function)
    except HubError as error:  # the run goes on, and so does the next commit
        repo.say(str(error))


def _parquet(rows: list[dict[str, Any]], features: Features) -> bytes:
    import pyarrow.parquet as pq

    known = {name: kind for name, kind in features.items() if name in rows[0]}
    written = io.BytesIO()
    pq.write_table(table(({name: row.get(name) for name in known} for row in rows), type(features)(known)), written)
    return written.getvalue()


def _time() -> str:
    return cards.Markdown(datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"))
