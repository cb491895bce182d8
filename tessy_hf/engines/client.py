"""A client of one server at a time: asks what it offers, and for completions.

The address of a server and a request go in, a completion comes out; what the server refuses is told apart: for the
server (:class:`ReplicaError`), for the row, for the run. Knows neither other servers nor retries.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from tessy_hf.engines import completions_api as api
from tessy_hf.engines.base import Completion, Request, Scores
from tessy_hf.engines.completions_api import STREAMS, AnswerError, CompletionsAPI, Protocol
from tessy_hf.engines.connections import Connections, Kind, ReplicaError, read_key
from tessy_hf.engines.deltas import Deltas, NoDeltasError
from tessy_hf.engines.replicas import Service
from tessy_hf.engines.sessions import SessionHeaders
from tessy_hf.errors import EngineDeadError, EngineError, RequestError
from tessy_hf.retries import TRANSIENT_STATUSES, retry_after

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

DOWN_STATUSES = frozenset({502, 503, 504, *range(520, 529), 530})
"""What gateways (Cloudflare too) answer for a server that is gone, and servers that are starting or stopping."""

BUSY_STATUSES = frozenset({429, 529})
"""What servers answer that want fewer requests."""

PRIORITIES = frozenset({"generate", "ids"})
"""Protocols with a priority for each request, where the server schedules by it; deltas have one too."""

KEY_STATUSES = frozenset({401, 402, 403})
"""What servers answer that do not know the key, or whose account is empty: so they will answer to all rows."""


class Client:
    """Asks one server: what it offers, and for completions. The arguments are those of a ``ServerEngine``.

    Attributes:
        roots: What each inspected server says is behind the model's name.

    Raises:
        ReplicaError: There is no answer now.
        RequestError: The server refuses the request.
        EngineDeadError: It refuses the key, serves something else, or its certificate is not trusted.
    """

    def __init__(
        self,
        model: str,
        tokenizer: PreTrainedTokenizerBase,
        api_key_env: str,
        timeout: float,
        context_length: int | None,
        protocols: Sequence[Protocol],
        session_headers: Sequence[str],
    ) -> None:
        self._model, self._tokenizer_name = model, tokenizer.name_or_path
        self._context, self._protocols, self._refusal = context_length, protocols, partial(_refusal, api_key_env)
        self._reading = partial(_reading, self._refusal)
        self._api = CompletionsAPI(model, tokenizer)
        self.roots: dict[str, str] = {}
        self._by_priority: set[str] = set()  # servers that take a request's priority
        self._connections = Connections(read_key(api_key_env), timeout)
        self._sessions = SessionHeaders(session_headers)
        self._deltas = Deltas(self._connections)
        self._failed_deltas: set[str] = set()  # servers at whose start deltas failed once
        self._instead: dict[str, Protocol] = {}  # how servers are asked that no longer take deltas

    async def close(self) -> None:
        """Close all connections."""
        await self._deltas.close()
        await self._connections.close()

    def release(self, row: str) -> None:
        """Forget what is kept for a row."""
        self._api.release(row)
        self._deltas.release(row)
        self._sessions.release(row)

    async def complete(self, server: str, protocol: Protocol, request: Request) -> Completion:
        """Ask for a completion."""
        protocol = await self._current(server, api.measuring(protocol, request), request)
        url = api.address(server, protocol)
        with self._reading(server, url):
            if protocol == "deltas":
                async with aclosing(self._deltas.answers(server, request, stream=False)) as batches:
                    (answer,) = await anext(batches)
            else:
                body = self._api.body(protocol, request, priority=server in self._by_priority)
                answer = api.parse(await self._send(server, "POST", url, body, request.row))
            return self._api.completion(protocol, answer, request)

    async def score(self, server: str, protocol: Protocol, request: Request, count: int) -> Scores:
        """Ask for the log-probabilities of a prompt's last ids."""
        protocol = api.measuring(protocol, request)
        url = api.address(server, protocol)
        content = await self._send(server, "POST", url, self._api.score_body(protocol, request, count), request.row)
        with self._reading(server, url):
            return self._api.scores(protocol, api.parse(content), request, count)

    async def stream(self, server: str, protocol: Protocol, request: Request) -> AsyncGenerator[Completion, None]:
        """Ask for one stream; what arrives at once is one piece."""
        protocol = await self._current(server, api.measuring(protocol, request), request)
        url, left = api.address(server, protocol), request.max_tokens
        by_delta = protocol == "deltas"
        answers = (
            self._deltas.answers(server, request, stream=True)
            if by_delta
            else self._events(server, url, protocol, request)
        )
        async with aclosing(answers) as batches:
            with self._reading(server, url):
                async for batch in batches:
                    if (piece := self._api.piece(protocol, batch, request, left)) is None:
                        continue
                    left -= len(piece.token_ids)
                    yield piece
                    if piece.stop_id is not None:
                        return
        if left:
            raise ReplicaError(f"The server at {server} ended its stream early.", "lost")

    async def _events(
        self, server: str, url: str, protocol: Protocol, request: Request
    ) -> AsyncGenerator[list[Any], None]:
        """Yield the events of a stream by HTTP, those that arrive at once in one list."""
        body = self._api.body(protocol, request, stream=True, priority=server in self._by_priority)
        headers = self._sessions.of(server, request.row)
        async with self._connections.request(server, "POST", url, body, headers) as reply:
            self._sessions.keep(server, request.row, reply.headers, reply.cookies)
            if reply.status != 200:
                raise self._refusal(server, url, reply.status, await reply.content(), reply.headers)
            async with aclosing(reply.events()) as batches:
                async for events in batches:
                    yield [api.parse(event) for event in events]

    async def _current(self, server: str, protocol: Protocol, request: Request) -> Protocol:
        """Return how a server is asked now: one that was started anew without the middleware, by another protocol."""
        if protocol == "deltas" and server not in self._instead:
            try:
                with self._reading(server, api.address(server, protocol)):
                    await self._deltas.connect(server, request.row)
            except NoDeltasError as error:
                others = [each for each in self._protocols if each != "deltas"]
                if not others or not request.row:  # it is a probe
                    raise
                protocol = await self._find_protocol(server, others)
                await self._try_priority(server, protocol)
                if server not in self._instead:  # else another row was first
                    self._instead[server] = protocol
                    logger.warning("%s It is asked by %s from now on.", error, protocol)
        return self._instead.get(server, protocol) if protocol == "deltas" else protocol

    async def inspect(self, server: str) -> Service:
        """Find out what a server offers."""
        length = await self._context_length(server)
        await self._check_tokenizer(server)
        self._instead.pop(server, None)
        protocol = await self._find_protocol(server, self._protocols)
        await self._try_priority(server, protocol)
        return Service(protocol, protocol in STREAMS, length, await self._cache_tokens(server))

    async def _context_length(self, server: str) -> int:
        answer = await self._json(server, "GET", server + "/models")
        self.roots[server] = api.roots(answer).get(self._model, self._model)
        return _context_length(server, self._model, api.served(answer), self._context)

    async def _check_tokenizer(self, server: str) -> None:
        """Compare the server's tokenizer with the local one, where the server shows it, as vLLM does."""
        try:
            answer = await self._json(server, "POST", _root(server) + "/tokenize", self._api.tokenize_body())
        except (ReplicaError, EngineError) as error:
            if _is_transient(error):
                raise
            return
        if (difference := self._api.other_tokens(answer)) is not None:
            raise EngineDeadError(
                f"The server at {server} does not tokenize as {self._tokenizer_name!r} does: {difference}. "
                "Pass ServerEngine(..., tokenizer=) with the tokenizer of the served model."
            )

    async def _find_protocol(self, server: str, protocols: Sequence[Protocol]) -> Protocol:
        """Return the first protocol in which the server answers a small request."""
        for protocol in protocols:
            try:
                await self.complete(server, protocol, self._api.probe())
                return protocol
            except (ReplicaError, EngineError) as error:  # some gateways answer 401 to paths they do not know
                if protocol == protocols[-1] and isinstance(error, NoDeltasError):
                    raise RequestError(str(error)) from error
                again, transient = protocol != "deltas" or server not in self._failed_deltas, _is_transient(error)
                self._failed_deltas |= {server} if protocol == "deltas" and transient else set()
                if protocol == protocols[-1] or again and transient:
                    raise
                if transient:
                    logger.warning("%s It is not asked by deltas, which send only what is new.", error)
        raise AssertionError("an engine has protocols")

    async def _try_priority(self, server: str, protocol: Protocol) -> None:
        """Find out whether a server takes priorities: vLLM refuses them without ``--scheduling-policy priority``."""
        self._by_priority.discard(server)
        if protocol in PRIORITIES:
            self._by_priority.add(server)
            try:
                await self.complete(server, protocol, replace(self._api.probe(), order=1))
            except (ReplicaError, EngineError) as error:
                self._by_priority.discard(server)
                if _is_transient(error):
                    raise

    async def _cache_tokens(self, server: str) -> int | None:
        try:
            metrics = await self._send(server, "GET", _root(server) + "/metrics")
            return api.cache_tokens(metrics.decode(errors="replace"))
        except (ReplicaError, EngineError):
            return None

    async def _json(self, server: str, method: str, url: str, content: bytes | None = None) -> Any:
        answer = await self._send(server, method, url, content)
        with self._reading(server, url):
            return api.parse(answer)

    async def _send(self, server: str, method: str, url: str, content: bytes | None = None, row: str = "") -> bytes:
        headers = self._sessions.of(server, row) if row else {}
        async with self._connections.request(server, method, url, content, headers) as reply:
            answer = await reply.content()
            if row:
                self._sessions.keep(server, row, reply.headers, reply.cookies)
            if reply.status != 200:
                raise self._refusal(server, url, reply.status, answer, reply.headers)
            return answer


@contextmanager
def _reading(refusal: Callable[..., Exception], server: str, url: str) -> Iterator[None]:
    """Raise what is wrong with an answer as an error of its server."""
    try:
        yield
    except AnswerError as error:
        if error.status is not None:
            raise refusal(server, url, error.status, error.words.encode(), {}) from error
        raise ReplicaError(f"The server at {server} {error}.", "invalid") from error


def _refusal(key_env: str, server: str, url: str, status: int, answer: bytes, headers: Mapping[str, str]) -> Exception:
    """Return what a status other than 200 means: for the server, for the row, or for the run."""
    words = api.server_words(answer)
    if status in KEY_STATUSES:
        return EngineDeadError(
            f"The server at {server} refuses the key (status {status}): {words!r}. Put a valid one, of an account "
            f"that may use the model, into the environment variable {key_env}."
        )
    if status in TRANSIENT_STATUSES:
        kind: Kind = "down" if status in DOWN_STATUSES else "busy" if status in BUSY_STATUSES else "invalid"
        return ReplicaError(f"The server at {server} answered {status}: {words!r}.", kind, retry_after(headers))
    return RequestError(
        f"The server at {server} refused a request to {urlsplit(url).path} (status {status}): {words!r}. "
        "An OpenAI-compatible completions server is expected; check base_url, which mostly ends in /v1, and the "
        "server's log."
    )


def _context_length(server: str, model: str, models: Mapping[str, int | None], most: int | None) -> int:
    """Return how long a context is, by what a server says of its models and by what the user says."""
    if model not in models:
        raise EngineDeadError(
            f"The server at {server} serves {', '.join(models) or 'nothing'}, not {model!r}. "
            "Pass the served name as the model, with tokenizer= for its tokenizer, or correct base_url."
        )
    lengths = [length for length in (models[model], most) if length and length > 0]
    if not lengths:
        raise EngineDeadError(
            f"The server at {server} does not say how long a context {model!r} has. "
            "Pass ServerEngine(..., context_length=)."
        )
    return min(lengths)


def _is_transient(error: Exception) -> bool:
    """Whether a server may offer what it was asked for, though it did not answer now."""
    return isinstance(error, ReplicaError) and error.kind != "invalid"


def _root(server: str) -> str:
    """Return the address without the version."""
    return server.removesuffix("/v1")
