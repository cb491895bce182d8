"""Models behind HTTP: vLLM servers by token ids, and any OpenAI-compatible server by its `/v1/completions`.

What goes on the wire is in :mod:`tessy_hf.engines.completions_api`, which server gets a row in
:mod:`tessy_hf.engines.replicas`, how the network fails in :mod:`tessy_hf.engines.connections`. Here they are put
together as an engine, and every failure is dealt with, once: a transient one is retried for ``retry_timeout`` seconds;
a lasting one fails its row (:class:`RequestError`) or ends the run (:class:`EngineDeadError`). Servers that are all
down or busy, or answer all rows badly (status 500), are waited for by the run as a whole: no row fails for it, and the
run ends once none has answered for ``retry_timeout`` seconds.

Keys are read from the environment at each start and are kept out of all that is described, pickled or printed.
"""

from __future__ import annotations

import asyncio
import time
from array import array
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Sequence
from contextlib import aclosing, suppress
from dataclasses import replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from tessy_hf.engines.addresses import Addresses
from tessy_hf.engines.base import Completion, Measure, Request, Scores, load_tokenizer
from tessy_hf.engines.client import Client
from tessy_hf.engines.completions_api import MEASURED, PROTOCOLS, Protocol
from tessy_hf.engines.connections import Kind, ReplicaError
from tessy_hf.engines.membership import Membership
from tessy_hf.engines.model_files import ModelFiles
from tessy_hf.engines.notices import Notices
from tessy_hf.engines.replicas import Replicas
from tessy_hf.engines.served import ServedModel
from tessy_hf.engines.sessions import SESSION_HEADERS, check_names
from tessy_hf.errors import EngineDeadError, RequestError
from tessy_hf.retries import Failures, RetryPolicy

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")

MOST_REFUSALS = 10
"""So often in a row may one row find its server down or busy, for longer than ``retry_timeout``, while others are
answered; then it is the row's fault."""


class ServerEngine:
    """A model behind one or more servers.

    Args:
        model: The name under which the servers offer the model; also the tokenizer's Hub id or folder.
        base_url: ``http://host:port/v1``, or a list of replicas of the same model. A list that may change during the
            run is in a file, ``file:///path/servers.txt``, one address a line, or behind a DNS name,
            ``dns+http://host:port/v1``: all its addresses. One of them has to be up at the start.
        tokenizer: Hub id or folder of the tokenizer, where it is not ``model``.
        revision: The tokenizer's revision.
        api_key_env: The environment variable that holds the key, where one is needed.
        context_length: Most tokens of prompt and completion, where the servers do not say or less is wanted.
        timeout: Seconds a single request may take.
        retry_timeout: Seconds, from its first failure, for which a request that may succeed later is tried again; and
            for which a run waits for servers of which none answers.
        max_connections: Most requests at once per replica.
        session_headers: Headers that tell a router which requests belong to one row; their value is a hash.
        patience: Former name of ``retry_timeout``.

    Attributes:
        protocols: How servers may be asked, best first. A subclass may leave some out.

    Raises:
        SettingsError: An address or a header cannot be used.
    """

    protocols: ClassVar[Sequence[Protocol]] = ("deltas", *PROTOCOLS)

    def __init__(
        self,
        model: str,
        *,
        base_url: str | Sequence[str],
        tokenizer: str | None = None,
        revision: str | None = None,
        api_key_env: str = "OPENAI_API_KEY",
        context_length: int | None = None,
        timeout: float = 600.0,
        retry_timeout: float = 120.0,
        max_connections: int = 256,
        session_headers: str | Sequence[str] = SESSION_HEADERS,
        patience: float | None = None,
    ) -> None:
        self.model = str(model)
        self.addresses = Addresses(base_url)
        self.api_key_env = api_key_env
        self.timeout, self.max_connections = timeout, max_connections
        self.retry_timeout = retry_timeout if patience is None else patience
        self.given_context_length, self.session_headers = context_length, check_names(session_headers)
        self.files = ModelFiles(str(tokenizer or model), revision, weights=False)
        self._served = ServedModel(self.model, self.addresses, api_key_env)
        self._session: _Session | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """The model, what the servers say is behind its name, and its tokenizer; not where it is served.

        Servers do not tell the revision or the bytes of their weights: serve another checkpoint under another name or
        from another folder. Asks them once, for a second; then :meth:`start` does.
        """
        tokenizer, root = self.files.identity, self._served.root
        served = {"root": root} if root not in (None, self.model) else {}
        return {"engine": "server", **tokenizer, "model": self.model, "tokenizer": tokenizer["model"], **served}

    @property
    def identity_is_known(self) -> bool:
        """Whether a server has said what it serves."""
        return self._served.is_known

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        hint = "Pass ServerEngine(..., tokenizer=) with the Hub id or folder of the served model's tokenizer."
        return load_tokenizer(self.files.path, self.files.pinned, hint)

    @property
    def context_length(self) -> int:
        """Most tokens of prompt and completion."""
        return self._started.membership.context_length

    @property
    def cache_tokens(self) -> int | None:
        """How many tokens the caches of all replicas hold together, where they tell."""
        return self._started.replicas.cache_tokens

    @property
    def replicas(self) -> int:
        """Among how many servers the rows are spread."""
        return len(self.addresses.fixed) if self._session is None else len(self._session.replicas)

    @property
    def servers(self) -> dict[str, Protocol]:
        """The servers among which the rows are spread now, and how each is asked."""
        return {replica.url: replica.service.protocol for replica in self._started.replicas}

    @property
    def streams(self) -> bool:
        """Whether all servers can stream ids."""
        return self._started.replicas.exact

    @property
    def _started(self) -> _Session:
        assert self._session is not None, "start() comes first"
        return self._session

    async def start(self) -> None:
        """Reach the servers and check that they serve this model with this tokenizer.

        Raises:
            EngineDeadError: A server cannot be reached, refuses the key, or serves something else.
        """
        if self._session is None:
            self._session = _Session(self)
        session = self._session
        try:
            await session.ready  # one check, also where teacher and student are one engine
            self._served.check(session.roots)
        except BaseException:
            if self._session is session:
                self._session = None
            await session.close()
            raise

    @property
    def measures(self) -> frozenset[Measure]:
        """Log-probabilities of new and of given ids, where all servers tell them: vLLM's both, SGLang's the latter."""
        told = (MEASURED.get(replica.service.protocol, frozenset()) for replica in self._started.replicas)
        return frozenset[Measure](("logprobs", "score")).intersection(*told)

    async def score(self, prompt_ids: Sequence[int], ids: Sequence[int], *, row: str = "", order: int = 0) -> Scores:
        """Score a text on the row's replica, which reads all of it."""
        whole = array("i", prompt_ids) + array("i", ids)
        request = Request(row, order, "thinking", whole, 1, 0.0, 1.0, 0, frozenset(), logprobs=True)
        return await self._started.ask(self._started.client.score, request, len(ids))

    async def complete(self, request: Request) -> Completion:
        """Continue a row on its replica, or on another where that fails."""
        return await self._started.ask(self._started.client.complete, request)

    def stream(self, request: Request) -> AsyncGenerator[Completion, None]:
        """Continue a row piece by piece; a stream that breaks is resumed by another one after what arrived."""
        return self._started.stream(request)

    def release(self, row: str) -> None:
        """Forget which replica has a row, and its encoded prompt."""
        if self._session is not None:
            self._session.release(row)

    async def close(self) -> None:
        """Close the connections."""
        vars(self).pop("tokenizer", None)  # its folder may be another when it is opened again
        if self._session is not None:
            session, self._session = self._session, None
            await session.close()

    def __getstate__(self) -> dict[str, Any]:
        """Pickle the description only."""
        return {name: value for name, value in vars(self).items() if name != "tokenizer"} | {"_session": None}

    def __repr__(self) -> str:
        return f"ServerEngine({self.model!r}, base_url={self.addresses!r})"


class _Session:
    """A started engine: which servers there are, and what is tried again how long."""

    def __init__(self, engine: ServerEngine) -> None:
        self._engine = engine
        self._policy = RetryPolicy(timeout=engine.retry_timeout, longest_pause=10.0)
        self.client = Client(
            engine.model,
            engine.tokenizer,
            engine.api_key_env,
            engine.timeout,
            engine.given_context_length,
            engine.protocols,
            engine.session_headers,
        )
        self.replicas = Replicas(engine.retry_timeout)
        self.membership = Membership(
            engine.model, engine.addresses, self.replicas, self.client.inspect, engine.max_connections
        )
        self._asking = 0  # rows
        self._failing: dict[str, float] = {}  # of these, what no server answers well, and since when
        self._good: Request | None = None  # the first that was answered
        self._notices = Notices(engine.model, engine.retry_timeout, self.replicas)
        self._watching: asyncio.Task[None] | None = None
        self.ready = asyncio.ensure_future(self._start())

    async def close(self) -> None:
        self.ready.cancel()
        if self._watching is not None:
            self._watching.cancel()
        self._notices.stop()
        await self.client.close()

    @property
    def roots(self) -> list[str]:
        """What the servers in use say they serve."""
        return [self.client.roots[replica.url] for replica in self.replicas]

    def release(self, row: str) -> None:
        self.replicas.release(row)
        self.client.release(row)

    async def _start(self) -> None:
        """Inspect each server, of those that may change at least one. See :meth:`ServerEngine.start`."""
        addresses = self._engine.addresses
        self._notices.wait(f"No answer yet from {addresses}.")
        if addresses.dynamic:
            await self._first(self.membership.look)
            self._watching = asyncio.create_task(self.membership.watch())
        else:
            try:
                async with asyncio.TaskGroup() as group:
                    inspected = [
                        group.create_task(self._first(partial(self.client.inspect, url))) for url in addresses.fixed
                    ]
            except ExceptionGroup as errors:
                raise errors.exceptions[0]  # noqa: B904 - it has a cause of its own
            self.membership.start({url: task.result() for url, task in zip(addresses.fixed, inspected, strict=True)})
        self._notices.stop()

    async def _first(self, attempt: Callable[[], Coroutine[Any, Any, T]]) -> T:
        try:
            return await self._retry(attempt, "its first request", self._policy.exhausted)
        except RequestError as error:
            raise EngineDeadError(str(error)) from error

    async def ask(self, ask: Callable[..., Awaitable[T]], request: Request, *more: Any) -> T:
        async def attempt() -> T:
            async with self.replicas.turn(request.row) as turn:
                answer = await ask(turn.url, turn.service.protocol, request, *more)
            self._good = self._good or replace(request, prompt_ids=array("i", request.prompt_ids))
            return answer

        return await self._retry(attempt, f"row {request.row!r}", self._gives_up)

    async def stream(self, request: Request) -> AsyncGenerator[Completion, None]:
        ids, left = array("i", request.prompt_ids), request.max_tokens
        source: AsyncGenerator[Completion, None] | None = None

        async def piece() -> Completion:
            nonlocal source
            source = source or self._pieces(replace(request, prompt_ids=array("i", ids), max_tokens=left))
            try:
                return await anext(source)
            except BaseException:
                source = None  # it is closed: resume after what arrived
                raise

        try:
            while left:
                completion = await self._retry(piece, f"row {request.row!r}", self._gives_up)
                ids.extend(completion.token_ids)
                left -= len(completion.token_ids)
                yield completion
                if completion.stop_id is not None:
                    return
        finally:
            if source is not None:
                await source.aclose()

    async def _pieces(self, request: Request) -> AsyncGenerator[Completion, None]:
        async with self.replicas.turn(request.row) as turn:
            async with aclosing(self.client.stream(turn.url, turn.service.protocol, request)) as pieces:
                async for piece in pieces:
                    turn.answered()
                    self._good = self._good or replace(request, prompt_ids=array("i", request.prompt_ids))
                    yield piece

    async def _retry(self, attempt: Callable[[], Awaitable[T]], what: str, stop: Callable[[Failures], bool]) -> T:
        if not self._asking:
            self.replicas.idle()
        begin, self._asking = time.monotonic(), self._asking + 1
        try:
            return await self._policy.call_async(attempt, stop=stop, notify=partial(self._note, what))
        except ReplicaError as error:
            message = (
                f"{self._engine.model!r} did not answer {what} within {time.monotonic() - begin:.1f} s: {error} "
                "Look at the server's log; timeout= and retry_timeout= of ServerEngine set how long it may take."
            )
            nobody = self.replicas.given_up or self.replicas.answered_at < begin
            if nobody if error.kind != "invalid" else await self._fails_all(what):
                raise EngineDeadError(message) from error
            raise RequestError(message, retryable=True) from error
        finally:
            self._asking -= 1
            self._failing.pop(what, None)

    async def _fails_all(self, what: str) -> bool:
        """Whether servers that answer badly do so to any row: to one they answered before, or else to all that ask."""
        if self.replicas.answered_at > self._failing.get(what, 0.0):
            return False
        if self._good is None:
            return 1 < self._asking == len(self._failing)
        for replica in self.replicas:
            with suppress(ReplicaError, RequestError):
                await self.client.complete(replica.url, replica.service.protocol, self._good)
                return False
        return True

    def _note(self, what: str, failures: Failures) -> None:
        """Log what is waited for."""
        self._failing.setdefault(what, time.monotonic())
        self._notices.wait(str(failures.error))

    def _gives_up(self, failures: Failures) -> bool:
        """Whether a row is tried no more. Where no server answers anybody, all rows wait, until the run ends."""
        if _kind(failures.error) not in ("down", "busy"):
            return self._policy.exhausted(failures)
        return self.replicas.given_up or failures.count >= MOST_REFUSALS and self._policy.exhausted(failures)


def _kind(error: BaseException) -> Kind | None:
    return error.kind if isinstance(error, ReplicaError) else None
