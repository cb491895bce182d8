"""Token classifiers behind vLLM's `/pooling`: windows of token ids go in, logits come out.

Knows nothing of labels or batching. Blocks, so it is called from threads; failures are retried as those of engines.
"""

from __future__ import annotations

import logging
import threading
from base64 import b64decode
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any, TypeVar

import httpx2
import numpy as np

from tessy_hf.engines import completions_api as api
from tessy_hf.engines.addresses import Addresses
from tessy_hf.engines.connections import CONNECT_SECONDS, read_key
from tessy_hf.engines.notices import FIRST_NOTICE, NEXT_NOTICE
from tessy_hf.errors import EngineDeadError, SettingsError
from tessy_hf.retries import TRANSIENT_STATUSES, Failures, RetryPolicy, TransientError, own_words, retry_after

T = TypeVar("T")

logger = logging.getLogger(__name__)


class PoolingClient:
    """One or more servers of the same token classifier.

    Args:
        model: The classifier's Hub id or folder; the servers offer it under this name, or say it is behind theirs.
        base_url: ``http://host:port/v1``, or a list of replicas.
        api_key_env: The environment variable that holds the key, where one is needed.
        timeout: Seconds a request may take.
        retry_timeout: Seconds for which a request that may succeed later is tried again, at the next replica.

    Raises:
        SettingsError: An address cannot be used.
    """

    def __init__(
        self,
        model: str,
        base_url: str | Sequence[str] = (),
        api_key_env: str = "OPENAI_API_KEY",
        timeout: float = 60.0,
        retry_timeout: float = 120.0,
    ) -> None:
        self._model, self._servers = model, Addresses(base_url).fixed
        if not self._servers:
            raise SettingsError(
                f"base_url={base_url!r} may change. A boundary predictor takes fixed addresses; list them."
            )
        key, self._turns = read_key(api_key_env), count()
        self._policy = RetryPolicy(timeout=retry_timeout, longest_pause=2.0)
        self._key, self._key_name = key, api_key_env
        self._http = httpx2.Client(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx2.Timeout(timeout, connect=min(CONNECT_SECONDS, timeout)),
            limits=httpx2.Limits(keepalive_expiry=3.0),  # uvicorn closes idle connections after 5 s
        )
        self._names: dict[str, str] = {}
        self._closed = threading.Event()

    def start(self, window: int) -> None:
        """Check that each server has this classifier, and room for windows of so many tokens.

        Raises:
            EngineDeadError: One does not, or cannot be reached.
        """
        for server in self._servers:
            answer = self._retry(lambda: self._ask(server, "GET", server + "/models"))  # noqa: B023 - at once
            roots, lengths = api.roots(answer), api.served(answer)
            names = [name for name, root in roots.items() if self._model in (name, root)]
            if not names or (lengths[names[0]] or window) < window:
                seen = ", ".join(f"{name!r} ({lengths[name]} tokens)" for name in roots) or "nothing"
                raise EngineDeadError(
                    f"The server at {server} serves {seen}. The token classifier {self._model!r} with windows of "
                    f"{window} tokens is expected: vllm serve {self._model} --runner pooling --max-model-len {window}."
                )
            self._names[server] = names[0]

    def logits(self, windows: Sequence[Sequence[int]]) -> list[Any]:
        """Return logits of shape (tokens, labels) for each window.

        Raises:
            EngineDeadError: The servers refuse the request, or have not answered for ``retry_timeout`` seconds.
        """
        ids = [list(map(int, window)) for window in windows]

        def attempt() -> list[Any]:
            server = self._servers[next(self._turns) % len(self._servers)]
            body = {"model": self._names[server], "input": ids, "task": "token_classify", "use_activation": False}
            answer = self._ask(
                server, "POST", server.removesuffix("/v1") + "/pooling", body | {"encoding_format": "base64"}
            )
            try:
                data = sorted(answer["data"], key=lambda entry: entry["index"])
                found = [np.frombuffer(b64decode(entry["data"]), "<f4") for entry in data]
                return [one.reshape(len(window), -1) for one, window in zip(found, ids, strict=True)]
            except (KeyError, TypeError, ValueError) as error:
                raise EngineDeadError(
                    f"The server at {server} did not answer with a label per token: {error!r}. Start it with "
                    f"vllm serve {self._model} --runner pooling, from a token classifier."
                ) from error

        return self._retry(attempt)

    def close(self) -> None:
        """Close the connections and try nothing again."""
        self._closed.set()
        self._http.close()

    def _retry(self, attempt: Callable[[], T]) -> T:
        noticed = FIRST_NOTICE - NEXT_NOTICE

        def note(failures: Failures) -> None:
            nonlocal noticed
            if failures.elapsed >= noticed + NEXT_NOTICE:
                noticed = failures.elapsed
                words = "boundary predictor %s: no answer for %.0f s. %s Giving up after %g s (retry_timeout)."
                logger.warning(words, self._model, failures.elapsed, failures.error, self._policy.timeout)

        try:
            return self._policy.call(attempt, notify=note, ended=self._closed)
        except TransientError as error:
            raise EngineDeadError(
                f"The boundary predictor {self._model!r} is gone: {error} Look at its log; retry_timeout= says how "
                "long it is waited for."
            ) from error

    def _ask(self, server: str, method: str, url: str, body: dict[str, Any] | None = None) -> Any:
        try:
            response = self._http.request(method, url, json=body)
        except httpx2.TransportError as error:
            raise TransientError(f"The server at {server} did not answer: {own_words(error)}.") from error
        content = response.content.replace(self._key.encode(), b"[key]") if self._key else response.content
        if response.status_code != 200:
            words = f"The server at {server} answered {response.status_code}: {api.server_words(content)!r}."
            if response.status_code in TRANSIENT_STATUSES:
                raise TransientError(words, retry_after(response.headers))
            raise EngineDeadError(f"{words} A vLLM pooling server and a key in {self._key_name} are expected.")
        try:
            return api.parse(content)
        except api.AnswerError as error:
            raise TransientError(f"The server at {server} {error}.") from error
