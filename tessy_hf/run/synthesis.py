"""One row of a run: looked up where it is finished, else written, tried again after failures, and kept.

Prompts go in, the columns of finished rows come out. Knows the method and where rows are kept; knows nothing of
datasets, batches or how many rows are in flight.
"""

from __future__ import annotations

import asyncio
import math
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from tessy_hf.errors import PromptError, RequestError
from tessy_hf.method import methods
from tessy_hf.method.speaker import Speaker, check_pair
from tessy_hf.plan import Plan
from tessy_hf.retries import RetryPolicy
from tessy_hf.rows import columns
from tessy_hf.run.commits import Commits
from tessy_hf.run.live_answer import with_live_answer
from tessy_hf.run.metering import Meter
from tessy_hf.run.outbox import Outbox
from tessy_hf.run.progress import Origin
from tessy_hf.settings import Settings
from tessy_hf.trajectory import Draft, Prompt, RowKey, Span, Trajectory
from tessy_hf.verifiers import verifiers

RETRIES = RetryPolicy(first_pause=0.2)
"""The pauses between attempts at a row."""

BUSY_SECONDS = 0.2
"""How often to look whether another process has finished a row that it writes."""


class Asked(NamedTuple):
    """A row that is asked for by itself: how to write it, and who is told of each piece, and of its growing answer."""

    plan: Plan
    watch: methods.Record
    tell: Callable[[str], None] | None = None


class Synthesis:
    """Writes the rows of a run. Used by one event loop.

    The speakers are metered; the verifier's time counts in ``meter``. ``commits`` has the journal, ``outbox`` the
    shared rows, where there are any. ``asked`` replaces the plan that the settings make.
    """

    def __init__(
        self,
        teacher: Speaker,
        student: Speaker,
        settings: Settings,
        fingerprint: str,
        meter: Meter,
        commits: Commits | None,
        outbox: Outbox | None,
        asked: Asked | None = None,
    ) -> None:
        self._asked = asked
        if asked is not None and asked.tell is not None:
            teacher, student = (with_live_answer(speaker, asked.tell) for speaker in (teacher, student))
        self._teacher, self._student, self._settings, self._fingerprint = teacher, student, settings, fingerprint
        self._meter, self._commits, self._outbox = meter, commits, outbox
        self._verifier = verifiers.build(settings.verifier)
        self._writing: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()

    def check(self) -> None:
        """Check that the chat templates keep the thinking and that the verifier works, before anything is loaded.

        Raises:
            TessyError: An engine or predictor is not there, or a chat template would lose the thinking.
            SettingsError: The verifier does not work, or the models cannot write by this method.
            SandboxError: The verifier needs more than this system permits.
        """
        self._teacher.check(student=False)
        self._student.check(student=True)
        for plan in map(self._settings.plan, map(str, range(16))):  # teacher-mix has rows of two plans
            check_pair(self._teacher, self._student, plan)
        verifiers.check(self._verifier)

    def enroll(self, keys: Iterable[RowKey], other_prompts: dict[str, str]) -> None:
        """Give rows their places in the journal; see :meth:`tessy_hf.run.journal.Journal.plan`."""
        if self._commits is not None and self._outbox is None:  # shared rows have no place in the journal
            keys = list(keys)
            self._commits.journal.plan(keys, other_prompts)
            self._commits.journal.enroll(keys)

    async def row(self, prompt: Prompt, inputs: Mapping[str, Any]) -> tuple[dict[str, Any], Origin]:
        """Return the columns of a row, written if need be, and where they come from.

        ``inputs`` are the columns that its verifier may read.

        Raises:
            TessyError: The run cannot go on.
        """
        # Engines know a row by its id: two rows of one id, of two passes, are written one after the other.
        async with self._writing.setdefault(prompt.key, asyncio.Lock()):
            if self._outbox is None:
                return await self._journaled(prompt, inputs)
            found = await self._outbox.find(prompt.row_key)
            if found is not None:
                return found, "found"
            row, origin = await self._journaled(prompt, inputs)
            self._outbox.add(prompt.row_key, row)
            return row, origin

    async def stored(self) -> None:
        """Wait until all rows written so far are durable.

        Raises:
            TessyError: The journal or the shared rows cannot be written.
        """
        if self._commits is not None:
            self._commits.journal.flush()
        if self._outbox is not None:
            await self._outbox.stored()

    def unusable(self, error: PromptError) -> dict[str, Any]:
        """Return the columns of a row whose prompt cannot be used."""
        return self._columns(Trajectory("", finish_reason="error", error=str(error)), Prompt("", []))

    def _columns(self, trajectory: Trajectory, prompt: Prompt, draft: Draft | None = None) -> dict[str, Any]:
        return columns.row(
            trajectory,
            prompt.messages,
            self._student.vocabulary,
            self._student.thinking_format,
            method=self._settings.method,
            run_fingerprint=self._fingerprint,
            draft=draft,
            tools=prompt.tools,
        )

    async def _journaled(self, prompt: Prompt, inputs: Mapping[str, Any]) -> tuple[dict[str, Any], Origin]:
        """Look a row up in the journal, or try to write it until it is finished or out of attempts."""
        draft = Draft(prompt.key, prompt.seed, self._settings.judged)
        attempts = 0
        while True:
            if self._commits is not None:
                journal = self._commits.journal  # other processes send no event when they have finished a row
                while (claim := journal.claim(prompt.row_key)).status == "busy":  # noqa: ASYNC110
                    await asyncio.sleep(BUSY_SECONDS)
                if claim.status == "finished":
                    return claim.columns, "found"
                draft = Draft.resume(prompt.key, prompt.seed, self._settings.judged, claim.spans, claim.state)
                attempts = claim.attempts
            row, written = await self._attempt(prompt, inputs, draft)
            attempts += 1
            if not written.retryable or attempts >= self._settings.max_attempts:
                return row, "refused" if written.refused else "written"
            await asyncio.sleep(RETRIES.pause(attempts))

    async def _attempt(
        self, prompt: Prompt, inputs: Mapping[str, Any], draft: Draft
    ) -> tuple[dict[str, Any], Trajectory]:
        """Write a row, on from its draft; return its columns, and what was written."""
        commits, key = self._commits, prompt.row_key

        def keep(draft: Draft, piece: Span | None) -> None:
            if self._asked is not None:
                self._asked.watch(draft, piece)
            if commits is not None:
                commits.journal.append(key, [piece] if piece is not None and piece.text else [], draft.state())
                commits.soon()

        verify = self._verifier and self._verify_with(self._verifier, prompt.key, inputs)
        plan = self._asked.plan if self._asked is not None else self._settings.plan(prompt.key)
        try:
            written = await methods.write(
                prompt, self._teacher, self._student, plan, draft, verify=verify, record=keep
            )
            row = self._columns(written, prompt, draft)
        except BaseException:
            if commits is not None:
                commits.journal.release(key)
            raise
        if commits is not None:
            if written.finish_reason == "error":
                commits.journal.fail(key, row, final=written.final)
            else:
                commits.journal.finish(key, row)
            commits.soon()
        return row, written

    def _verify_with(self, verifier: verifiers.Verifier, key: str, inputs: Mapping[str, Any]) -> methods.Verify:
        """Return a function that judges finished texts of one row, in a thread."""

        async def verify(written: Mapping[str, Any]) -> float:
            answer = asyncio.to_thread(verifier, {**inputs, **written})
            try:
                verdict = await self._meter.wait(answer, "the verifier", of="verifier", row=key)
            except RequestError:
                raise
            except Exception as error:  # noqa: BLE001 - a verifier may be anybody's code
                raise RequestError(
                    f"Row {key!r}: the verifier raised {type(error).__name__}: {error}. Fix the verifier or the "
                    "column it reads."
                ) from error
            if isinstance(verdict, (bool, int, float)) and math.isfinite(verdict):
                return float(verdict)
            raise RequestError(
                f"Row {key!r}: the verifier returned {verdict!r} ({type(verdict).__name__}). True, False or a finite "
                "number is expected, where 1 means right."
            )

        return verify
