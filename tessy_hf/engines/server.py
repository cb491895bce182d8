"""Models behind HTTP: vLLM servers by token ids, and any OpenAI-compatible server by its `/v1/completions`.

How a server is asked is found out at the start, best way first: see :data:`WAYS`. Chat endpoints are never used:
their reasoning parsers mislabel thinking that is continued (vllm#38749, sglang#26176).

A row stays with one replica, for its prefix cache, until that replica fails it; a new row goes to the one with the
fewest. Where addresses may change, they are read again while the run goes on: replicas that came get rows once they
are found to serve the same model, and those that went are asked for nothing more.

Every failure is dealt with here, once: what may pass is tried again for ``patience`` seconds, with backoff and
``Retry-After``; what cannot pass ends the row (:class:`RequestError`) or the run (:class:`EngineDeadError`). Keys are
read from the environment at each start and are kept out of everything that is described, pickled or printed.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import re
import time
import zlib
from array import array
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import httpx2

from tessy_hf.engines.addresses import Addresses
from tessy_hf.engines.base import Completion, Request, derive_seed, load_tokenizer
from tessy_hf.errors import EngineDeadError, RequestError, TessyError
from tessy_hf.vocabulary import Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")

Kind = Literal["down", "busy", "lost", "wrong"]
Way = Literal["generate", "ids", "ids-to-text", "text"]
WAYS: tuple[Way, ...] = (
    "generate",  # ids in and out by `/inference/v1/generate`: vLLM started with --enable-scale-out
    "ids",  # ids in and out by `/v1/completions`: any vLLM; it sends the prompt back each time
    "ids-to-text",  # ids in, text out by `/v1/completions`: servers that take ids, as SGLang and OpenAI's own do
    "text",  # text in and out by `/v1/completions`: the rest, such as `transformers serve`
)
"""How a server can be asked to continue a text, best way first."""

_ID_WAYS: tuple[Way, ...] = ("generate", "ids")

PROBE = "Okay, so f(x) = x² + 3x.\n\n1. Wait,\tnaïve 123 你好 🙂<think>\n</think>\n"
"""What a server has to tokenise as the local tokenizer does, with the markers of the chat template."""

_SURROGATE = re.compile("[\ud800-\udfff]")
"""Half of a character, which JSON can spell but no text can hold."""

_PASSING = {408, 409, 425, 429, 500, 502, 503, 504}
_ABSENT = {502, 503, 504}  # what gateways say for a server that is gone, and servers that are starting or stopping
_LONGEST_REST = 60.0

LOOK_SECONDS = 10.0
"""How often addresses that may change are read again; besides, whenever a server is found gone."""

JOIN_SECONDS = 30.0
"""How long a server that came may take to show that it can be used, before the list is read again."""

POOL = 8
"""Requests that share a pool of connections: httpcore2 looks at each idle connection of a pool for each request."""

logger = logging.getLogger(__name__)


class _PassingError(Exception):
    """A failure that may pass.

    Attributes:
        kind: ``down``, no server there; ``busy``, it asks for less; ``lost``, its answer did not come; ``wrong``, its
            answer cannot be used.
        wait: Seconds the server asked for, or ``None``.
    """

    def __init__(self, message: str, kind: Kind = "wrong", wait: float | None = None) -> None:
        super().__init__(message)
        self.kind, self.wait = kind, wait


@dataclass(eq=False)
class _Replica:
    """One server: how it is asked, how much at once, and until when it is left alone."""

    url: str
    most: int
    way: Way = "text"
    down: bool = False
    cache_tokens: int | None = None
    rows: set[str] = field(default_factory=set)
    _resting_until: float = 0.0
    _rest: float = 1.0
    _limit: float = field(init=False)
    _halved: float = 0.0
    _busy: int = 0
    _changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    def __post_init__(self) -> None:
        self._limit = float(self.most)

    @property
    def root(self) -> str:
        """The address without the version."""
        return self.url.removesuffix("/v1")

    @property
    def rests(self) -> bool:
        return self._resting_until > time.monotonic()

    def rest(self, wait: float | None) -> None:
        """Leave it alone for as long as it asks, else twice as long as the last time."""
        self.down = True
        if not self.rests:
            self._resting_until = time.monotonic() + (self._rest if wait is None else wait)
            self._rest = min(self._rest * 2, _LONGEST_REST)

    def answered(self) -> None:
        """Take it for well again."""
        self.down, self._resting_until, self._rest = False, 0.0, 1.0

    async def enter(self) -> float:
        """Wait for a turn; return when it began."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._busy < max(1, int(self._limit)))
            self._busy += 1
        return time.monotonic()

    async def leave(self, entered: float, *, busy: bool = False) -> None:
        """Halve what may be asked at once where the server says 429, else let it grow back one by one.

        Requests sent before the last halving do not halve it again: they say nothing new.
        """
        async with self._changed:
            self._busy -= 1
            if not busy:
                self._limit = min(float(self.most), self._limit + 1 / self._limit)
            elif entered >= self._halved:
                self._limit, self._halved = max(1.0, self._limit / 2), time.monotonic()
            self._changed.notify_all()


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
        patience: Seconds, from its first failure, for which a request that may yet pass is tried again.
        max_connections: Most requests at once per replica.

    Raises:
        SettingsError: An address cannot be used.
    """

    _ways = WAYS

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
        patience: float = 120.0,
        max_connections: int = 256,
    ) -> None:
        self.model = str(model)
        self._addresses = Addresses(base_url)
        self._tokenizer_name = str(tokenizer or model)
        self._revision = revision
        self._api_key_env = api_key_env
        self._given_context_length = context_length
        self._timeout, self._patience, self._max_connections = timeout, patience, max_connections
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._live: _Live | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """The model and its tokenizer; where it is served does not change what it writes."""
        return {
            "engine": "server",
            "model": self.model,
            "tokenizer": self._tokenizer_name,
            "revision": self._revision,
        }

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        if self._tokenizer is None:
            hint = "Pass ServerEngine(..., tokenizer=) with the Hub id or folder of the served model's tokenizer."
            self._tokenizer = load_tokenizer(self._tokenizer_name, self._revision, hint)
        return self._tokenizer

    @property
    def context_length(self) -> int:
        """Most tokens of prompt and completion."""
        assert self._live is not None, "start() comes first"
        return self._live.context_length

    @property
    def cache_tokens(self) -> int | None:
        """How many tokens the caches of all replicas hold together, where they tell."""
        assert self._live is not None, "start() comes first"
        return self._live.cache_tokens

    @property
    def replicas(self) -> int:
        """Among how many servers the rows are spread."""
        return len(self._addresses.fixed) if self._live is None else self._live.replicas

    async def start(self) -> None:
        """Reach the servers and check that they serve this model with this tokenizer.

        Raises:
            EngineDeadError: A server cannot be reached, refuses the key, or serves something else.
        """
        if self._live is None:
            self._live = _Live(self)
        live = self._live
        try:
            await live.checked  # one check, also where teacher and student are one engine
        except BaseException:
            if self._live is live:
                self._live = None
            await live.close()
            raise

    async def complete(self, request: Request) -> Completion:
        """Continue a row on its replica, or on another where that fails."""
        assert self._live is not None, "start() comes first"
        return await self._live.complete(request)

    @property
    def streams(self) -> bool:
        """Whether all servers can stream ids."""
        assert self._live is not None, "start() comes first"
        return self._live.streams

    def stream(self, request: Request) -> AsyncGenerator[Completion, None]:
        """Continue a row piece by piece; a stream that breaks goes on in another one, after what came."""
        assert self._live is not None, "start() comes first"
        return self._live.stream(request)

    def release(self, row: str) -> None:
        """Forget which replica a row is with."""
        if self._live is not None:
            self._live.release(row)

    async def close(self) -> None:
        """Close the connections."""
        if self._live is not None:
            live, self._live = self._live, None
            await live.close()

    def __getstate__(self) -> dict[str, Any]:
        """Pickle the description only."""
        return {**self.__dict__, "_live": None, "_tokenizer": None}

    def __repr__(self) -> str:
        return f"ServerEngine({self.model!r}, base_url={self._addresses!r})"


class _Censor(logging.Filter):
    """Takes the key out of what the HTTP library logs: a server may send it back in its headers."""

    _LOGGERS = ("httpx2", *(f"httpcore2.{part}" for part in ("connection", "http11", "http2", "proxy", "socks")))

    def __init__(self, key: str) -> None:
        super().__init__()
        self._key = key
        for name in self._LOGGERS if key else ():
            logging.getLogger(name).addFilter(self)

    def end(self) -> None:
        for name in self._LOGGERS:
            logging.getLogger(name).removeFilter(self)

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        if self._key in message:
            record.msg, record.args = message.replace(self._key, "[key]"), ()
        return True


@dataclass
class _Pool:
    """Connections to any replica, and how many requests are under way on them."""

    client: httpx2.AsyncClient
    requests: int = 0


class _Live:
    """Open connections to the replicas, and what is known of them."""

    def __init__(self, engine: ServerEngine) -> None:
        self._engine = engine
        self._vocabulary = Vocabulary(engine.tokenizer, engine.model)
        self._last_id = max(engine.tokenizer.get_vocab().values())
        self._key = _key(engine._api_key_env)
        self._censor = _Censor(self._key)
        self._trusted = httpx2.create_ssl_context()
        self._pools: list[_Pool] = []
        self._replicas = [_Replica(url, engine._max_connections) for url in engine._addresses.fixed]
        self._answered = 0.0
        self.context_length = 0
        self._homes: dict[str, _Replica] = {}
        self._missed = asyncio.Event()
        self._refused: dict[str, str] = {}
        self._watching: asyncio.Task[None] | None = None
        self.checked = asyncio.ensure_future(self._check())

    async def close(self) -> None:
        self.checked.cancel()
        if self._watching is not None:
            self._watching.cancel()
        for pool in self._pools:
            await pool.client.aclose()
        self._censor.end()

    @contextmanager
    def _client(self) -> Iterator[httpx2.AsyncClient]:
        """Lend what a request is sent with, until its answer has come: of the first pool that has room."""
        pool = next((pool for pool in self._pools if pool.requests < POOL), None)
        if pool is None:
            pool = _Pool(self._open())
            self._pools.append(pool)
        pool.requests += 1
        try:
            yield pool.client
        finally:
            pool.requests -= 1

    def _open(self) -> httpx2.AsyncClient:
        return httpx2.AsyncClient(  # httpx 0.28 looks through all connections, squared, for each request
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            timeout=httpx2.Timeout(self._engine._timeout, connect=min(10.0, self._engine._timeout)),
            # uvicorn's servers hang up after 5: a request must not cross with that
            limits=httpx2.Limits(max_keepalive_connections=None, keepalive_expiry=3.0),
            verify=self._trusted,
        )

    # --- before the run

    async def _check(self) -> None:
        """Check each replica, of those that may change at least one. See :meth:`ServerEngine.start`."""
        if self._engine._addresses.change:
            try:
                await self._patiently(self._look, "its first request")
            except RequestError as error:
                raise EngineDeadError(str(error)) from error
            self._watching = asyncio.create_task(self._watch())
            return
        lengths = []
        for replica in self._replicas:
            try:
                lengths.append(await self._patiently(partial(self._reach, replica), "its first request"))
            except RequestError as error:
                raise EngineDeadError(str(error)) from error
        self.context_length = min(lengths)

    async def _reach(self, replica: _Replica) -> int:
        """Return the context length of a replica that can be used, and remember how to ask it."""
        length = self._served(replica, await self._send(replica, "GET", replica.url + "/models"))
        await self._check_tokenizer(replica)
        replica.way = await self._find_way(replica)
        replica.cache_tokens = await self._cache_of(replica)
        return length

    async def _cache_of(self, replica: _Replica) -> int | None:
        """Return how many tokens a replica's cache holds, where it tells it among its metrics, as vLLM does."""
        try:
            with self._client() as client:
                answer = await client.get(replica.root + "/metrics")
        except httpx2.HTTPError:
            return None
        found = re.search(r"^vllm:cache_config_info\{(.*)\}", answer.text, re.MULTILINE)
        said = dict(re.findall(r'(\w+)="(\d+)"', found[1])) if found else {}
        return int(said.get("num_gpu_blocks", 0)) * int(said.get("block_size", 0)) or None

    @property
    def replicas(self) -> int:
        """How many servers there are now."""
        return len(self._replicas)

    @property
    def cache_tokens(self) -> int | None:
        """How many tokens the caches of all replicas hold together."""
        held = [replica.cache_tokens for replica in self._replicas]
        return sum(one or 0 for one in held) if held and all(held) else None

    # --- addresses that change

    async def _watch(self) -> None:
        """Read the addresses again and again."""
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._missed.wait(), LOOK_SECONDS)
            self._missed.clear()
            try:
                await self._look()
            except (_PassingError, TessyError) as error:
                logger.warning("%s: %s What was there before is used.", self._engine.model, error)
            await asyncio.sleep(LOOK_SECONDS / 10)  # many rows may find the same server gone

    async def _look(self) -> None:
        """Take up the servers that came, leave those that went.

        Raises:
            _PassingError: There are no addresses, or none that can be used, at the moment.
            EngineDeadError: There is no server yet, and those that are there serve something else.
            SettingsError: The addresses are none.
        """
        urls = await self._read_addresses()
        there = {replica.url: replica for replica in self._replicas}
        new = [_Replica(url, self._engine._max_connections) for url in urls if url not in there]
        joins = (asyncio.wait_for(self._join(replica), JOIN_SECONDS) for replica in new)
        found = await asyncio.gather(*joins, return_exceptions=True)
        failures = {replica.url: error for replica, error in zip(new, found, strict=True) if error is not None}
        kept = [replica for replica in (*self._replicas, *new) if replica.url in urls and replica.url not in failures]
        for error in failures.values():
            if not isinstance(error, (_PassingError, TessyError, TimeoutError)):
                raise error
        if not kept:
            raise self._none_left(list(failures.values()))
        for url, error in failures.items():
            if self._refused.get(url) != str(error):  # told once
                logger.warning("The server at %s is not used yet: %s", url, error)
        self._refused = {url: str(error) for url, error in failures.items()}
        for what, one, other in (("came", kept, self._replicas), ("went", self._replicas, kept)):
            for replica in one:
                if replica not in other:
                    logger.info("%s: the server at %s %s.", self._engine.model, replica.url, what)
        self._replicas = kept

    @staticmethod
    def _none_left(failures: Sequence[BaseException]) -> BaseException:
        """Return why no server can be used: what one of them is, rather than that another does not answer."""
        told = next((error for error in failures if isinstance(error, TessyError)), failures[0])
        return _PassingError("a server did not answer in time.", "down") if isinstance(told, TimeoutError) else told

    async def _read_addresses(self) -> list[str]:
        try:
            urls = await self._engine._addresses.read()
        except (OSError, UnicodeError) as error:
            raise _PassingError(f"{self._engine._addresses} cannot be read ({error}).", "down") from error
        if not urls:
            raise _PassingError(f"{self._engine._addresses} names no server.", "down")
        return urls

    async def _join(self, replica: _Replica) -> None:
        """Check a server that came.

        Raises:
            EngineDeadError: It cannot take part.
        """
        length, first = await self._reach(replica), not self._replicas
        if first:
            self.context_length = min(length, self.context_length or length)
        elif length < self.context_length or (self.streams and replica.way not in _ID_WAYS):
            raise EngineDeadError(
                f"The server at {replica.url} takes {length} tokens, by {replica.way}. At least the "
                f"{self.context_length} of the others, and ids where they take ids, are expected; start it like them."
            )

    def _served(self, replica: _Replica, offered: Any) -> int:
        """Return the context length under which a replica offers the model."""
        models = [entry for entry in _list(offered, "data") if isinstance(entry, Mapping)]
        names = [str(entry.get("id")) for entry in models]
        if self._engine.model not in names:
            raise EngineDeadError(
                f"The server at {replica.url} serves {', '.join(names) or 'nothing'}, not {self._engine.model!r}. "
                "Pass the served name as the model, with tokenizer= for its tokenizer, or correct base_url."
            )
        said, given = models[names.index(self._engine.model)].get("max_model_len"), self._engine._given_context_length
        lengths = [length for length in (said, given) if isinstance(length, int) and length > 0]
        if not lengths:
            raise EngineDeadError(
                f"The server at {replica.url} does not say how long a context {self._engine.model!r} has. "
                "Pass ServerEngine(..., context_length=)."
            )
        return min(lengths)

    async def _check_tokenizer(self, replica: _Replica) -> None:
        """Compare the server's tokenizer with the local one, where the server lets it be seen, as vLLM does."""
        tokenizer = self._engine.tokenizer
        markers = (token for token in tokenizer.get_added_vocab() if token in str(tokenizer.chat_template))
        text = PROBE + "".join(markers)
        body = {"model": self._engine.model, "prompt": text, "add_special_tokens": False}
        try:
            tokens = _list(await self._send(replica, "POST", replica.root + "/tokenize", body), "tokens")
        except (RequestError, EngineDeadError):
            return
        except _PassingError as error:
            if error.kind != "wrong":
                raise
            return
        expected = self._vocabulary.encode_template(text)
        if tokens and tokens != expected:
            at = next((i for i, pair in enumerate(zip(tokens, expected, strict=False)) if pair[0] != pair[1]), 0)
            raise EngineDeadError(
                f"The server at {replica.url} does not tokenise as {self._engine._tokenizer_name!r} does: "
                f"{tokens[at : at + 5]} against {expected[at : at + 5]} at token {at} of the same text. Pass "
                "ServerEngine(..., tokenizer=) with the tokenizer of the served model."
            )

    async def _find_way(self, replica: _Replica) -> Way:
        """Return the first way in which the server answers a small request."""
        ids = self._vocabulary.encode("1 + 1 =").ids
        request = Request("", 0, "thinking", ids, 8, 0.0, 1.0, 0, self._vocabulary.special_ids)
        failure: Exception | None = None
        for way in self._engine._ways:
            try:
                await self._ask(replica, way, request)
                return way
            except _PassingError as error:
                if error.kind != "wrong":
                    raise
                failure = error
            except (RequestError, EngineDeadError) as error:  # some gateways answer 401 to paths they do not know
                failure = error
        assert failure is not None
        raise failure

    # --- during the run

    async def complete(self, request: Request) -> Completion:
        return await self._patiently(partial(self._once, request), f"row {request.row!r}")

    @property
    def streams(self) -> bool:
        return all(replica.way in _ID_WAYS for replica in self._replicas)

    async def stream(self, request: Request) -> AsyncGenerator[Completion, None]:
        ids, left = array("i", request.prompt_ids), request.max_tokens
        source: AsyncGenerator[Completion, None] | None = None

        async def piece() -> Completion:
            nonlocal source
            source = source or self._pieces(replace(request, prompt_ids=array("i", ids), max_tokens=left))
            try:
                return await anext(source)
            except BaseException:
                source = None  # it is closed: go on after what came
                raise

        try:
            while left:
                completion = await self._patiently(piece, f"row {request.row!r}")
                ids.extend(completion.token_ids)
                left -= len(completion.token_ids)
                yield completion
                if completion.stop_id is not None:
                    return
        finally:
            if source is not None:
                await source.aclose()

    async def _patiently(self, attempt: Callable[[], Awaitable[T]], what: str) -> T:
        """Try until it passes, fails for good, or patience ends: the one retry policy."""
        begin, first_failure, pause = time.monotonic(), None, 0.1
        while True:
            try:
                return await attempt()
            except _PassingError as error:
                now = time.monotonic()
                first_failure = first_failure or now  # waiting for a turn is no failure
                wait = random.uniform(pause / 2, pause) if error.wait is None else error.wait
                if now + wait - first_failure > self._engine._patience:
                    raise self._gave_up(error, what, begin) from error
                await asyncio.sleep(wait)
                pause = min(pause * 2, 10.0)

    def _gave_up(self, error: _PassingError, what: str, begin: float) -> EngineDeadError | RequestError:
        """Return the row's failure, or the engine's where all servers are down or none has answered anybody since."""
        message = (
            f"{self._engine.model!r} did not answer {what} within {time.monotonic() - begin:.1f} s: {error} "
            "Look at the server's log; timeout= and patience= of ServerEngine set how long it may take."
        )
        dead = all(replica.down for replica in self._replicas) or self._answered < begin
        return EngineDeadError(message) if dead else RequestError(message, retryable=True)

    async def _once(self, request: Request) -> Completion:
        async with self._at_replica(request.row) as replica:
            return await self._ask(replica, replica.way, request)

    @asynccontextmanager
    async def _at_replica(self, row: str) -> AsyncIterator[_Replica]:
        """Take a turn at the row's replica; move the row where that fails."""
        replica, entered = await self._enter(row)
        busy = False
        try:
            yield replica
        except _PassingError as error:
            busy = error.kind == "busy"
            if error.kind == "down":
                self._missed.set()
                replica.rest(error.wait)
                if not all(other.rests for other in self._replicas):
                    error.wait = None  # what this one asked for does not hold for the others
            if not busy:
                self._settle(row, but=replica)
            raise
        finally:
            await replica.leave(entered, busy=busy)

    async def _enter(self, row: str) -> tuple[_Replica, float]:
        """Wait for a turn at the row's replica; look again where it fell ill or went meanwhile."""
        while True:
            replica = self._home(row)
            entered = await replica.enter()
            if replica is self._home(row):
                return replica, entered
            await replica.leave(entered)

    def _home(self, row: str) -> _Replica:
        """Return the row's replica: where it is at home, unless that one rests while others are well, or went."""
        home = self._homes.get(row)
        if home is None or home not in self._replicas:
            return self._settle(row)
        return self._settle(row, but=home) if home.rests and not all(one.rests for one in self._replicas) else home

    def _settle(self, row: str, but: _Replica | None = None) -> _Replica:
        """Give a row a home: of the replicas that are well, one of those with the fewest rows."""
        others = [replica for replica in self._replicas if replica is not but] or self._replicas
        well = [replica for replica in others if not replica.rests] or others
        name = row.encode("utf-8", "surrogatepass")
        home = min(well, key=lambda one: (len(one.rows), zlib.crc32(name, zlib.crc32(one.url.encode()))))
        self.release(row)
        home.rows.add(row)
        self._homes[row] = home
        return home

    def release(self, row: str) -> None:
        """Forget where a row is at home."""
        home = self._homes.pop(row, None)
        if home is not None:
            home.rows.discard(row)

    # --- one request

    async def _ask(self, replica: _Replica, way: Way, request: Request) -> Completion:
        answer = await self._send(replica, "POST", _path(replica, way), self._body(way, request))
        read = self._read_ids if way in _ID_WAYS else self._read_text
        return replace(read(_choice(answer, replica), request, replica), prompt_tokens_read=_prompt_read(answer))

    async def _pieces(self, request: Request) -> AsyncGenerator[Completion, None]:
        """Ask for one stream and pass on what comes, all that came at once in one piece."""
        left = request.max_tokens
        async with self._at_replica(request.row) as replica:
            body = {**self._body(replica.way, request), "stream": True}
            async with aclosing(self._events(replica, _path(replica, replica.way), body)) as batches:
                async for batch in batches:
                    choices = [_choice(event, replica) for event in batch if _list(event, "choices")]
                    ids = [i for choice in choices for i in _list(choice, "token_ids")]
                    if not ids:  # the last event may have nothing but the reason
                        continue
                    together = {"token_ids": ids, "finish_reason": choices[-1].get("finish_reason")}
                    completion = self._read_ids(together, replace(request, max_tokens=left), replica)
                    left -= len(completion.token_ids)
                    yield completion
                    if completion.stop_id is not None:
                        return
        if left:
            raise _PassingError(f"the server at {replica.url} ended its stream early.", "lost")

    def _body(self, way: Way, request: Request) -> dict[str, Any]:
        sampling: dict[str, Any] = {
            "max_tokens": request.max_tokens,
            "temperature": request.temperature,
            "top_p": request.top_p,
        }
        if request.temperature:
            sampling["seed"] = derive_seed(request.seed, len(request.prompt_ids)) % 2**31
        ids, stop_ids = list(request.prompt_ids), sorted(request.stop_ids)
        if way == "generate":
            sampling = {**sampling, "stop_token_ids": stop_ids, "detokenize": False}
            return {"model": self._engine.model, "token_ids": ids, "sampling_params": sampling}
        body = {"model": self._engine.model, "prompt": self._prompt_text(ids) if way == "text" else ids, **sampling}
        if way == "ids":
            return {**body, "stop_token_ids": stop_ids, "return_token_ids": True}
        stops = self._stop_texts(request)[:4]  # the protocol takes four
        return {**body, "stop": stops} if stops else body

    def _prompt_text(self, ids: list[int]) -> str:
        """Return the prompt without what the server's tokenizer puts before each text of its own accord."""
        added = self._engine.tokenizer("").input_ids
        return self._vocabulary.decode(ids[len(added) :] if ids[: len(added)] == added else ids)

    def _stop_texts(self, request: Request) -> list[str]:
        """Return the stop ids as text, the end of thinking first. A server knows its own end of sequence."""
        others = request.stop_ids - {self._engine.tokenizer.eos_token_id}
        ids = sorted(others, key=lambda i: (i in self._vocabulary.special_ids, -i))
        return [text for text in (self._vocabulary.decode([i]) for i in ids) if text]

    def _read_ids(self, choice: Mapping[str, Any], request: Request, replica: _Replica) -> Completion:
        ids = choice.get("token_ids")
        if not isinstance(ids, list) or not ids or any(type(i) is not int or not 0 <= i <= self._last_id for i in ids):
            raise _PassingError(f"the server at {replica.url} answered without tokens of this vocabulary.")
        if len(ids) > request.max_tokens:
            raise _PassingError(
                f"the server at {replica.url} sent {len(ids)} tokens, {request.max_tokens} were asked for."
            )
        stop_at = next((at for at, token in enumerate(ids) if token in request.stop_ids), None)
        if stop_at is None and choice.get("finish_reason") == "stop":
            stop_at = len(ids) - 1  # an end of sequence that only the server's settings know
        return Completion(ids, None) if stop_at is None else Completion(ids[:stop_at], ids[stop_at])

    def _read_text(self, choice: Mapping[str, Any], request: Request, replica: _Replica) -> Completion:
        text, reason = choice.get("text"), choice.get("finish_reason")
        if not isinstance(text, str) or _SURROGATE.search(text) or reason not in ("stop", "length"):
            raise _PassingError(f"the server at {replica.url} answered without text (finish_reason {reason!r}).")
        found = [at for at in map(text.find, self._stop_texts(request)) if at >= 0]  # some send what stopped them
        stopped = bool(found) or reason == "stop"
        text = text[: min(found)] if found else text.rstrip("\ufffd")  # part of a character that was cut
        if not text and not stopped:
            raise _PassingError(f"the server at {replica.url} answered with an empty text.")
        ids = self._vocabulary.encode(text, request.prompt_ids[-1]).ids
        if len(ids) > request.max_tokens:
            return Completion(ids[: request.max_tokens], None)
        return Completion(ids, self._any_stop(request) if stopped else None)

    def _any_stop(self, request: Request) -> int | None:
        eos = self._engine.tokenizer.eos_token_id
        return int(eos) if eos is not None else min(request.stop_ids, default=None)

    async def _send(self, replica: _Replica, method: str, url: str, body: Any = None) -> Any:
        """Send one request and return the JSON that comes back; tell what may pass from what may not."""
        with self._client() as client:
            answer = await self._within(replica, client.request(method, url, json=body))
        answer.encoding = "utf-8"  # as JSON is, whatever the server calls it
        self._check_status(replica, answer)
        return _json(answer.text, replica)

    async def _events(self, replica: _Replica, url: str, body: Any) -> AsyncGenerator[list[Any], None]:
        """Send one request and yield the events that come back, those that came together in one list."""
        with self._client() as client:
            request = client.build_request("POST", url, json=body)
            answer = await self._within(replica, client.send(request, stream=True))
            answer.encoding = "utf-8"
            try:
                if answer.status_code != 200:
                    await self._within(replica, answer.aread())
                self._check_status(replica, answer)
                events = _together(answer.aiter_text())
                while (data := await self._within(replica, anext(events, None))) is not None:
                    yield [_json(event, replica) for event in data]
            finally:
                await answer.aclose()

    async def _within(self, replica: _Replica, sent: Awaitable[T]) -> T:
        """Wait for what a server sends, as long as it may take."""
        where = f"the server at {replica.url}"
        try:
            return await asyncio.wait_for(sent, self._engine._timeout)  # httpx2's own limit is on each read
        except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
            raise _PassingError(f"{where} cannot be reached ({type(error).__name__}).", "down") from error
        except (TimeoutError, httpx2.TimeoutException) as error:
            raise _PassingError(f"{where} did not answer within {self._engine._timeout} s.", "lost") from error
        except httpx2.RequestError as error:
            raise _PassingError(f"{where} cut the connection ({type(error).__name__}).", "lost") from error

    def _check_status(self, replica: _Replica, answer: httpx2.Response) -> None:
        status, where = answer.status_code, f"the server at {replica.url}"
        if status not in _ABSENT:
            self._answered = time.monotonic()
            replica.answered()
        if status in _PASSING:
            kind: Kind = "down" if status in _ABSENT else "busy" if status == 429 else "wrong"
            raise _PassingError(f"{where} answered {status}.", kind, _seconds(answer.headers.get("Retry-After")))
        if status in (401, 403):
            raise EngineDeadError(
                f"The server at {replica.url} refuses the key (status {status}). "
                f"Put a valid one into the environment variable {self._engine._api_key_env}."
            )
        if status != 200:
            said = answer.text.replace(self._key, "[key]") if self._key else answer.text
            raise RequestError(
                f"The server at {replica.url} refused a request to {answer.request.url.path} (status {status}): "
                f"{said[:300]!r}. An OpenAI-compatible completions server is expected; check base_url, which mostly "
                "ends in /v1, and the server's log."
            )


def _path(replica: _Replica, way: Way) -> str:
    return replica.root + "/inference/v1/generate" if way == "generate" else replica.url + "/completions"


async def _together(texts: AsyncIterator[str]) -> AsyncGenerator[list[str], None]:
    """Yield the data of a stream's events, of those that come together in one list."""
    rest = ""
    async for text in texts:
        *lines, rest = (rest + text).split("\n")
        data = [line.removeprefix("data:").strip() for line in lines if line.startswith("data:")]
        if events := [event for event in data if event != "[DONE]"]:
            yield events


def _json(text: str, replica: _Replica) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _PassingError(f"the server at {replica.url} answered with something that is not JSON.") from error


def _choice(answer: Any, replica: _Replica) -> Mapping[str, Any]:
    choices = _list(answer, "choices")
    if len(choices) != 1 or not isinstance(choices[0], Mapping):
        raise _PassingError(f"the server at {replica.url} sent {len(choices)} choices, not one.")
    return choices[0]


def _prompt_read(answer: Mapping[str, Any]) -> int | None:
    """Return how many tokens of the prompt were not in the server's cache, where it tells.

    vLLM does with ``--enable-prompt-tokens-details``, SGLang with ``--enable-cache-report``; of a stream only at its
    end, which the row does not wait for.
    """
    usage = answer.get("usage")
    details = usage.get("prompt_tokens_details") if isinstance(usage, Mapping) else None
    cached = details.get("cached_tokens") if isinstance(details, Mapping) else None
    tokens = usage.get("prompt_tokens") if isinstance(usage, Mapping) else None
    if type(tokens) is not int or type(cached) is not int or not 0 <= cached <= tokens:
        return None
    return tokens - cached


def _key(name: str) -> str:
    """Read the key from the environment.

    Raises:
        EngineDeadError: No header can carry it.
    """
    key = os.environ.get(name, "").strip()
    if not key.isascii() or not key.isprintable():
        raise EngineDeadError(
            f"The key in the environment variable {name} has characters that no HTTP header can carry. "
            "A line of ASCII is expected; set it again."
        )
    return key


def _list(value: Any, key: str) -> list[Any]:
    found = value.get(key) if isinstance(value, Mapping) else None
    return found if isinstance(found, list) else []


def _seconds(header: str | None) -> float | None:
    """Read a ``Retry-After`` in seconds; dates are left to the backoff."""
    try:
        return min(60.0, max(0.0, float(header))) if header is not None else None
    except ValueError:
        return None
