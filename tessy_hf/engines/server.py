"""Models behind HTTP: vLLM servers by token ids, and any OpenAI-compatible server by its `/v1/completions`.

Where a vLLM server offers `/inference/v1/generate` (started with ``--enable-scale-out``), ids go in and come out. Else
`/v1/completions` is used, with ids as prompt where the server takes them and text where it does not. Chat endpoints
are never used: their reasoning parsers mislabel thinking that is continued (vllm#38749, sglang#26176).

A row stays with one replica, for its prefix cache, until that replica fails. Every failure is dealt with here, once:
what may pass is tried again for ``patience`` seconds, with backoff and ``Retry-After``; what cannot pass ends the row
(:class:`RequestError`) or the run (:class:`EngineDeadError`). Keys are read from the environment at each start and
are kept out of everything that is described, pickled or printed.
"""

from __future__ import annotations

import asyncio
import os
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from tessy_hf.engines.base import Completion, Request, derive_seed
from tessy_hf.errors import EngineDeadError, RequestError, SettingsError
from tessy_hf.vocabulary import Vocabulary

if TYPE_CHECKING:
    import httpx
    from transformers import PreTrainedTokenizerBase

PROBE = "Okay, so f(x) = x² + 3x.\n\n1. Wait,\tnaïve 123 你好 🙂"
"""What a server has to tokenise as the local tokenizer does."""

_TRY_AGAIN = {408, 409, 425, 429, 500, 502, 503, 504}


class _PassingError(Exception):
    """A failure that may pass.

    Attributes:
        wait: Seconds the server asked for, or ``None``.
        elsewhere: Whether another replica should be tried.
    """

    def __init__(self, message: str, *, wait: float | None = None, elsewhere: bool = True) -> None:
        super().__init__(message)
        self.wait, self.elsewhere = wait, elsewhere


@dataclass
class _Replica:
    """One server: its address, how much may be asked of it at once, and until when it is left alone."""

    url: str
    limit: float
    busy: int = 0
    resting_until: float = 0.0
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def enter(self) -> None:
        async with self.changed:
            await self.changed.wait_for(lambda: self.busy < max(1, int(self.limit)))
            self.busy += 1

    async def leave(self, *, overloaded: bool, most: int) -> None:
        """Halve what may be asked at once where the server says 429, else let it grow back one by one."""
        async with self.changed:
            self.busy -= 1
            self.limit = max(1.0, self.limit / 2) if overloaded else min(float(most), self.limit + 1 / self.limit)
            self.changed.notify_all()


class ServerEngine:
    """A model behind one or more servers.

    Args:
        model: The name under which the servers offer the model; also the tokenizer's Hub id or folder.
        base_url: ``http://host:port/v1``, or a list of replicas of the same model.
        tokenizer: Hub id or folder of the tokenizer, where it is not ``model``.
        revision: The tokenizer's revision.
        api_key_env: The environment variable that holds the key, where one is needed.
        context_length: Most tokens of prompt and completion, where the servers do not say.
        timeout: Seconds a single request may take.
        patience: Seconds for which a request that may yet pass is tried again.
        max_connections: Most requests at once per replica.

    Raises:
        SettingsError: An address cannot be used.
    """

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
        self._urls = [_checked(url) for url in ([base_url] if isinstance(base_url, str) else base_url)]
        if not self._urls:
            raise SettingsError(
                'ServerEngine got no address. Pass base_url="http://127.0.0.1:8000/v1" or a list of such.'
            )
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
            from transformers import AutoTokenizer

            try:
                self._tokenizer = AutoTokenizer.from_pretrained(self._tokenizer_name, revision=self._revision)
            except (OSError, ValueError) as error:
                raise EngineDeadError(
                    f"The tokenizer of {self._tokenizer_name!r} could not be loaded: {error} Pass "
                    "ServerEngine(..., tokenizer=) with the Hub id or folder of the served model's tokenizer."
                ) from error
        return self._tokenizer

    @property
    def context_length(self) -> int:
        """Most tokens of prompt and completion."""
        if self._given_context_length is not None:
            return self._given_context_length
        assert self._live is not None, "start() comes first"
        return self._live.context_length

    async def start(self) -> None:
        """Reach the servers and check that they serve this model with this tokenizer.

        Raises:
            EngineDeadError: A server cannot be reached, refuses the key, or serves something else.
        """
        if self._live is None:
            live = _Live(self)
            try:
                await live.check()
            except BaseException:
                await live.close()
                raise
            self._live = live

    async def complete(self, request: Request) -> Completion:
        """Continue a row on its replica, or on another where that fails."""
        assert self._live is not None, "start() comes first"
        return await self._live.complete(request)

    def release(self, row: str) -> None:
        """Forget which replica a row was moved to."""
        if self._live is not None:
            self._live.moved.pop(row, None)

    async def close(self) -> None:
        """Close the connections."""
        if self._live is not None:
            live, self._live = self._live, None
            await live.close()

    def __getstate__(self) -> dict[str, Any]:
        """Pickle the description only."""
        return {**self.__dict__, "_live": None, "_tokenizer": None}

    def __repr__(self) -> str:
        return f"ServerEngine({self.model!r}, base_url={self._urls})"


def _checked(url: str) -> str:
    """Check an address.

    Raises:
        SettingsError: It is not http(s), names no host, or carries a secret.
    """
    parts = urlsplit(str(url))
    if parts.username or parts.password:
        raise SettingsError(
            f"The address of the server at {parts.hostname!r} carries user information, which would end up in logs. "
            "Put the key into the environment variable that api_key_env names (OPENAI_API_KEY by default)."
        )
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise SettingsError(f"base_url={str(url)!r} cannot be used. Pass an address like http://127.0.0.1:8000/v1.")
    return str(url).rstrip("/")


class _Live:
    """Open connections to the replicas, and what is known of them."""

    def __init__(self, engine: ServerEngine) -> None:
        try:
            import httpx
        except ImportError as error:
            raise EngineDeadError('ServerEngine needs httpx. Install it: pip install "tessy-hf[server]".') from error
        self._httpx = httpx
        self._engine = engine
        key = os.environ.get(engine._api_key_env)
        self._client = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(engine._timeout, connect=10.0),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=engine._max_connections),
        )
        self._replicas = [_Replica(url, float(engine._max_connections)) for url in engine._urls]
        self._vocabulary = Vocabulary(engine.tokenizer, engine.model)
        self._generates = False
        self._takes_ids = True
        self.context_length = 0
        self.moved: dict[str, int] = {}

    async def close(self) -> None:
        await self._client.aclose()

    # --- before the run

    async def check(self) -> None:
        """Check each replica. See :meth:`ServerEngine.start`."""
        lengths, generates = [], []
        for replica in self._replicas:
            offered = await self._patiently(
                lambda replica=replica: self._get(replica, "/models"), "listing its models"
            )
            lengths.append(self._served(replica, offered))
            await self._check_tokenizer(replica)
            generates.append(await self._offers_generate(replica))
        self.context_length = min(lengths)
        self._generates = all(generates)

    def _served(self, replica: _Replica, offered: Any) -> int:
        """Return the context length under which a replica offers the model."""
        models = [entry for entry in _list(offered, "data") if isinstance(entry, Mapping)]
        names = [str(entry.get("id")) for entry in models]
        if self._engine.model not in names:
            raise EngineDeadError(
                f"The server at {replica.url} serves {', '.join(names) or 'nothing'}, not {self._engine.model!r}. "
                "Pass the served name as the model, with tokenizer= for its tokenizer, or correct base_url."
            )
        length = self._engine._given_context_length or models[names.index(self._engine.model)].get("max_model_len")
        if not isinstance(length, int) or length < 1:
            raise EngineDeadError(
                f"The server at {replica.url} does not say how long a context {self._engine.model!r} has. "
                "Pass ServerEngine(..., context_length=)."
            )
        return length

    async def _check_tokenizer(self, replica: _Replica) -> None:
        """Compare the server's tokenizer with the local one, where the server lets it be seen."""
        root = replica.url.removesuffix("/v1")
        body = {"model": self._engine.model, "prompt": PROBE, "add_special_tokens": False}
        answer = await self._client.post(f"{root}/tokenize", json=body)
        if answer.status_code != 200:
            return  # not a vLLM server; there is nothing to compare with
        tokens, expected = _list(_json(answer, replica), "tokens"), self._vocabulary.encode(PROBE).ids
        if tokens != expected:
            raise EngineDeadError(
                f"The server at {replica.url} does not tokenise as {self._engine._tokenizer_name!r} does: "
                f"{tokens[:8]}... against {expected[:8]}... for the same text. Pass "
                "ServerEngine(..., tokenizer=) with the tokenizer of the served model."
            )

    async def _offers_generate(self, replica: _Replica) -> bool:
        body = {"token_ids": self._vocabulary.encode("a b").ids, "sampling_params": {"max_tokens": 1}}
        answer = await self._client.post(f"{replica.url.removesuffix('/v1')}/inference/v1/generate", json=body)
        return answer.status_code == 200

    async def _get(self, replica: _Replica, path: str) -> Any:
        return _json(await self._send(replica, "GET", path, None), replica)

    # --- during the run

    async def complete(self, request: Request) -> Completion:
        return await self._patiently(lambda: self._once(request), f"row {request.row!r}")

    async def _patiently(self, attempt: Any, what: str) -> Any:
        """Try until it passes, fails for good, or patience ends: the one retry policy."""
        begin, wait = time.monotonic(), 0.1
        while True:
            try:
                return await attempt()
            except _PassingError as error:
                spent = time.monotonic() - begin
                pause = error.wait if error.wait is not None else wait
                if spent + pause > self._engine._patience:
                    raise self._gave_up(error, what, spent) from error
                await asyncio.sleep(pause)
                wait = min(wait * 2, 10.0)

    def _gave_up(self, error: _PassingError, what: str, spent: float) -> Exception:
        message = (
            f"{self._engine.model!r} could not answer {what} within {spent:.0f} s: {error} "
            "Look at the server's log; patience= and timeout= of ServerEngine set how long it may take."
        )
        now = time.monotonic()
        all_rest = all(replica.resting_until > now for replica in self._replicas)
        return (
            EngineDeadError(message)
            if all_rest or what.startswith("listing")
            else RequestError(message, retryable=True)
        )

    def _replica(self, row: str) -> _Replica:
        """Return the row's replica: its own by hash, or the one it was moved to."""
        count, now = len(self._replicas), time.monotonic()
        first = self.moved.get(row, zlib.crc32(row.encode("utf-8", "surrogatepass")) % count)
        for step in range(count):
            index = (first + step) % count
            if self._replicas[index].resting_until <= now:
                if step:
                    self.moved[row] = index
                return self._replicas[index]
        return self._replicas[first]

    async def _once(self, request: Request) -> Completion:
        replica = self._replica(request.row)
        await replica.enter()
        overloaded = False
        try:
            return await (
                self._by_ids(replica, request) if self._generates else self._by_completions(replica, request)
            )
        except _PassingError as error:
            overloaded = error.wait is not None or not error.elsewhere
            if error.elsewhere:
                replica.resting_until = time.monotonic() + 5.0
            raise
        finally:
            await replica.leave(overloaded=overloaded, most=self._engine._max_connections)

    def _sampling(self, request: Request) -> dict[str, Any]:
        return {
            "max_tokens": request.max_tokens,
            "temperature": request.temperature,
            "top_p": request.top_p,
            "seed": derive_seed(request.seed, len(request.prompt_ids)) % 2**31,
        }

    async def _by_ids(self, replica: _Replica, request: Request) -> Completion:
        """Ask vLLM's token endpoint."""
        sampling = {**self._sampling(request), "stop_token_ids": sorted(request.stop_ids), "detokenize": False}
        body = {"model": self._engine.model, "token_ids": list(request.prompt_ids), "sampling_params": sampling}
        answer = await self._send(replica, "POST", "/../inference/v1/generate", body)
        choice = _choice(_json(answer, replica), replica)
        return self._ids(choice.get("token_ids"), choice, request, replica)

    def _ids(self, ids: Any, choice: Mapping[str, Any], request: Request, replica: _Replica) -> Completion:
        if not isinstance(ids, list) or not ids or not all(isinstance(i, int) for i in ids):
            raise _PassingError(f"the server at {replica.url} answered without tokens.")
        if len(ids) > request.max_tokens:
            raise _PassingError(
                f"the server at {replica.url} sent {len(ids)} tokens, {request.max_tokens} were asked for."
            )
        stop_at = next((at for at, token in enumerate(ids) if token in request.stop_ids), None)
        if stop_at is not None:
            return Completion(ids[:stop_at], ids[stop_at])
        ended = choice.get("finish_reason") == "stop"
        return Completion(ids, self._any_stop(request) if ended else None)

    def _any_stop(self, request: Request) -> int:
        eos = self._engine.tokenizer.eos_token_id
        return int(eos) if eos in request.stop_ids else min(request.stop_ids)

    async def _by_completions(self, replica: _Replica, request: Request) -> Completion:
        """Ask the completions endpoint, which every OpenAI-compatible server has."""
        prompt = list(request.prompt_ids) if self._takes_ids else self._vocabulary.decode(request.prompt_ids)
        body = {
            "model": self._engine.model,
            "prompt": prompt,
            **self._sampling(request),
            "stop": self._stop_texts(request),
        }
        try:
            answer = await self._send(replica, "POST", "/completions", body)
        except RequestError:
            if not self._takes_ids:
                raise
            body["prompt"] = self._vocabulary.decode(request.prompt_ids)
            answer = await self._send(replica, "POST", "/completions", body)
            self._takes_ids = False  # text was taken where ids were not
        choice = _choice(_json(answer, replica), replica)
        text, reason = choice.get("text"), choice.get("finish_reason")
        if not isinstance(text, str) or reason not in ("stop", "length") or (not text and reason == "length"):
            raise _PassingError(f"the server at {replica.url} answered without text (finish_reason {reason!r}).")
        ids = self._vocabulary.encode(text).ids
        return Completion(ids, self._any_stop(request) if reason == "stop" else None)

    def _stop_texts(self, request: Request) -> list[str]:
        """Return the stop ids that a completions endpoint needs as text: it knows its own end of sequence."""
        eos = self._engine.tokenizer.eos_token_id
        tokens = [self._vocabulary.decode([i]) for i in sorted(request.stop_ids - {eos})]
        return tokens[-4:]  # the protocol takes four; markers of thinking come last in a vocabulary

    async def _send(self, replica: _Replica, method: str, path: str, body: Any) -> httpx.Response:
        """Send one request; tell what may pass from what may not."""
        url = (
            replica.url.removesuffix("/v1") + path.removeprefix("/..")
            if path.startswith("/..")
            else replica.url + path
        )
        try:
            answer = await self._client.request(method, url, json=body)
        except self._httpx.TimeoutException as error:
            raise _PassingError(f"the server at {replica.url} did not answer in time.") from error
        except self._httpx.TransportError as error:
            raise _PassingError(f"the server at {replica.url} cannot be reached ({type(error).__name__}).") from error
        status = answer.status_code
        if status == 200:
            return answer
        if status in (401, 403):
            raise EngineDeadError(
                f"The server at {replica.url} refuses the key (status {status}). "
                f"Put a valid one into the environment variable {self._engine._api_key_env}."
            )
        if status in _TRY_AGAIN:
            wait = _seconds(answer.headers.get("Retry-After"))
            raise _PassingError(f"the server at {replica.url} answered {status}.", wait=wait, elsewhere=status != 429)
        raise RequestError(
            f"The server at {replica.url} refused a request (status {status}): {answer.text[:300]!r}. "
            "The prompt or a setting is not to its liking; its log may say more."
        )


def _json(answer: httpx.Response, replica: _Replica) -> Any:
    try:
        return answer.json()
    except ValueError as error:
        raise _PassingError(f"the server at {replica.url} answered with something that is not JSON.") from error


def _list(value: Any, key: str) -> list[Any]:
    found = value.get(key) if isinstance(value, Mapping) else None
    return found if isinstance(found, list) else []


def _choice(value: Any, replica: _Replica) -> Mapping[str, Any]:
    choices = _list(value, "choices")
    if not choices or not isinstance(choices[0], Mapping):
        raise _PassingError(f"the server at {replica.url} answered without a choice.")
    return choices[0]


def _seconds(header: str | None) -> float | None:
    """Read a ``Retry-After`` in seconds; dates are left to the backoff."""
    try:
        return min(60.0, max(0.0, float(header))) if header is not None else None
    except ValueError:
        return None
