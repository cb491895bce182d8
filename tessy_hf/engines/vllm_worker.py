"""The process that vLLM runs in: requests come in over a socket, what they led to goes out, a step at a time.

:class:`tessy_hf.engines.vllm.Core` starts it. Alternation asks for many short texts, and vLLM's own way of serving
them from another process (``AsyncLLM``) costs more for each than the model does; here one loop takes all requests that
have come, lets the engine make one step, and sends all that the step finished as one message.
"""

from __future__ import annotations

import gc
import math
import os
import pickle
import select
import socket
import sys
import threading
import time
from array import array
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

    from vllm import EngineArgs, LLMEngine
    from vllm.v1.request import Request

CPU_DEFAULTS: dict[str, Any] = {
    "block_size": 32,  # the CPU backend's own 128 reads up to 127 tokens of each chunk's prompt again
    "enforce_eager": True,
    "max_num_batched_tokens": 16384,  # a seeded request whose prompt is read in parts crashes the CPU backend
}

CPU_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB an engine
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # teacher and student share the cores
    "OMP_NUM_THREADS": "1",
}
"""Set on machines without a GPU where the user did not set them."""

IN_ONE_PROCESS = "vllm.v1.executor.uniproc_executor.UniProcExecutor"
"""vLLM's CPU backend runs the model in one more process, so as to bind its threads to cores. Where they are not bound,
and the model is not spread over several processes, that costs a fifth of the processor time for nothing."""

TAILS = "tessy_hf.engines.vllm_tails"
"""What keeps incomplete blocks on a CPU, unless the user gives a ``kv_transfer_config``, or ``None`` for nothing."""

SOON = 16
"""Tokens. Of a request for no more the end can be waited for."""

MANY = 16
"""How many requests that end soon are a group."""

LEFT = 0.7
"""What part of a group is still under way when the next requests are taken in."""

MOST_ROWS = 1024
"""Of how many rows blocks' hashes are kept; those asked for longest ago give way."""


class Ready(NamedTuple):
    """The engine has started.

    Attributes:
        context_length: The most tokens of prompt and completion.
        cache_tokens: How many tokens its blocks hold.
    """

    context_length: int
    cache_tokens: int | None


class Ask(NamedTuple):
    """A request.

    Attributes:
        name: Its name, for the answers: its row's, a dash, a number.
        kind: Whether all is wanted at once, or as it comes, or one label for each token.
        ids: The prompt.
        params: Of ``vllm.SamplingParams``, or of ``vllm.PoolingParams`` for labels.
        priority: Lower is served first.
    """

    name: str
    kind: Literal["complete", "stream", "classify"]
    ids: array[int]
    params: dict[str, Any]
    priority: int = 0

    @property
    def row(self) -> str:
        """The name of the row that it belongs to."""
        return self.name.rpartition("-")[0]


class Abort(NamedTuple):
    """A request whose answer is not wanted any more."""

    name: str


class Answer(NamedTuple):
    """What a request has led to.

    Attributes:
        name: The request's.
        ids: New ids; of a classifier none.
        finish: Why the text ended; ``None`` while it goes on.
        cached: How many ids of the prompt were in the cache, where vLLM says so.
        logits: Of a classifier, one row for each id that was not in the cache.
        refusal: Why vLLM does not take the request.
    """

    name: str
    ids: list[int]
    finish: str | None
    cached: int | None = None
    logits: Any = None
    refusal: str | None = None


class Wire:
    """Objects over a socket, each as its length in eight bytes and its pickle. Both ends are this program."""

    HEADER = 8

    def __init__(self, connected: socket.socket) -> None:
        self.socket = connected
        self._poll = select.poll()  # select() knows no descriptors above 1,023, which a busy parent may pass
        self._poll.register(connected, select.POLLIN)

    @classmethod
    def packed(cls, thing: Any) -> bytes:
        """Return an object as it goes over the socket."""
        data = pickle.dumps(thing, pickle.HIGHEST_PROTOCOL)
        return len(data).to_bytes(cls.HEADER, "big") + data

    @staticmethod
    def unpacked(data: bytes) -> Any:
        """Return the object of a message behind its header."""
        return pickle.loads(data)

    def send(self, thing: Any) -> None:
        """Send an object."""
        self.socket.sendall(self.packed(thing))

    def receive(self) -> Any:
        """Wait for an object.

        Raises:
            EOFError: The other end is gone.
        """
        return self.unpacked(self._exactly(int.from_bytes(self._exactly(self.HEADER), "big")))

    def _exactly(self, size: int) -> bytes:
        try:
            data = self.socket.recv(size, socket.MSG_WAITALL)
        except ConnectionError as error:
            raise EOFError from error
        if len(data) < size:
            raise EOFError
        return data

    def waiting(self) -> bool:
        """Whether an object, or the end, has come."""
        return bool(self._poll.poll(0))


class Waiting:
    """Requests that came, and those that the engine has.

    Rows that meet in one engine leave together, and the other author's engine is idle until they come: a step costs
    little more for all rows than for half of them, so nothing parts them again. Therefore what comes while a group is
    under way waits until that has begun to leave. (``benchmarks/README.md`` has what else was measured.)

    Args:
        apart: Whether groups are kept apart; else all that came is taken in before each step.

    Attributes:
        going: What the engine has, and whether it ends soon.
    """

    def __init__(self, apart: bool) -> None:
        self.going: dict[str, bool] = {}
        self._apart, self._group = apart, 0
        self._came: dict[str, Ask] = {}

    def __bool__(self) -> bool:
        """Whether there is anything to do."""
        return bool(self._came or self.going)

    def add(self, asked: Ask) -> None:
        """Note a request that came."""
        self._came[asked.name] = asked

    def end(self, name: str) -> None:
        """Forget a request that was answered or broken off."""
        self._came.pop(name, None)
        self.going.pop(name, None)

    def take(self) -> list[Ask]:
        """Return what the engine is to take in before its next step."""
        if not self._came or (self._apart and self._group >= MANY and self._soon > LEFT * self._group):
            return []
        taken, self._came = list(self._came.values()), {}
        self.going.update((asked.name, asked.params.get("max_tokens", 1) <= SOON) for asked in taken)
        self._group = self._soon
        return taken

    @property
    def _soon(self) -> int:
        return sum(self.going.values())


def main(descriptor: int) -> None:
    """Start the engine that the first message describes, and serve it until the other end closes or is gone."""
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    wire = Wire(socket.socket(fileno=descriptor))
    try:
        engine = _start(wire.receive())
    except Exception as error:  # noqa: BLE001 - vLLM raises whatever went wrong underneath
        wire.send(error if isinstance(error, ImportError) else RuntimeError(str(error)))
        return
    cache = engine.vllm_config.cache_config
    blocks = cache.num_gpu_blocks
    wire.send(Ready(int(engine.model_config.max_model_len), blocks * cache.block_size if blocks else None))
    gc.collect()
    gc.freeze()  # the model's objects are not looked through again
    try:
        _serve(engine, wire)
    except EOFError:
        engine.engine_core.shutdown()


def _end_with(parent: int) -> None:
    """End when the parent does, however it ends and whatever this process is at."""
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)


def _start(options: dict[str, Any]) -> LLMEngine:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine's loop is ours
    import torch
    from vllm.platforms import current_platform

    on_cpu = current_platform.is_cpu()
    if on_cpu:
        for name, value in CPU_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))  # torch has read its environment before
        options = {**_cpu_defaults(options), **options}
    from vllm import EngineArgs, LLMEngine

    described = EngineArgs(**options)
    if on_cpu and "kv_transfer_config" not in options and _keeps_tails(described):
        from vllm.config import KVTransferConfig

        described.kv_transfer_config = KVTransferConfig(
            kv_connector="Tails", kv_connector_module_path=TAILS, kv_role="kv_both"
        )
    return LLMEngine.from_engine_args(described)


def _cpu_defaults(options: dict[str, Any]) -> dict[str, Any]:
    spread = any(options.get(f"{way}_parallel_size", 1) > 1 for way in ("tensor", "pipeline"))
    if spread or os.environ["VLLM_CPU_OMP_THREADS_BIND"] != "nobind":
        return CPU_DEFAULTS
    return {**CPU_DEFAULTS, "distributed_executor_backend": IN_ONE_PROCESS}


def _keeps_tails(described: EngineArgs) -> bool:
    """Return whether keys and values of all layers are in blocks of this process, which hold the whole text."""
    if described.runner == "pooling" or not described.enable_prefix_caching:
        return False
    if described.distributed_executor_backend != IN_ONE_PROCESS:
        return False
    model = described.create_model_config()
    return not (model.is_hybrid or model.is_attention_free or model.is_encoder_decoder or model.get_sliding_window())


def _serve(engine: LLMEngine, wire: Wire) -> None:
    """Take requests and make steps.

    Raises:
        EOFError: The other end closed.
    """
    from vllm.exceptions import VLLMClientError

    waiting, texts = Waiting(apart=engine.vllm_config.device_config.device_type == "cpu"), Texts(engine)
    while True:
        while not waiting or wire.waiting():
            for message in wire.receive():
                if isinstance(message, Abort):
                    waiting.end(message.name)
                    texts.abort(message.name)
                else:
                    waiting.add(message)
        answers: list[Answer] = []
        for asked in waiting.take():
            try:
                texts.add(asked)
            except (ValueError, VLLMClientError) as error:
                answers.append(Answer(asked.name, [], "refused", refusal=str(error)))
                waiting.end(asked.name)
        if waiting.going:
            answers += texts.step()
        for answer in answers:
            if answer.finish is not None:
                waiting.end(answer.name)
        if answers:
            wire.send(answers)


class Hashes:
    """vLLM's hashes of full blocks, kept by row.

    vLLM knows blocks again by their hashes, and hashes the whole prompt of each request: most of what it costs to take
    in a long one (``benchmarks/chunk.py``). But a row's prompt begins with the row's last prompt. What is kept takes
    some 7 bytes a token.

    Args:
        engine: Whose hashes these are.
    """

    def __init__(self, engine: LLMEngine) -> None:
        core = engine.engine_core.engine_core
        self._hash: Callable[[Request], list[bytes]]
        if core.request_block_hasher is not None:  # vLLM caches prefixes
            self._hash, core.request_block_hasher = core.request_block_hasher, self._begun
        self._rows: OrderedDict[str, tuple[array[int], list[bytes]]] = OrderedDict()
        self._coming: Ask | None = None

    def expect(self, asked: Ask) -> None:
        """Note the request that vLLM is given next."""
        self._coming = asked

    def _begun(self, request: Request) -> list[bytes]:
        """Return the hashes that the request has not yet, as vLLM's own function does, from what is known."""
        asked = self._coming
        if asked is None or asked.name != request.request_id:  # it goes on
            return self._hash(request)
        self._coming = None
        before, known = self._rows.pop(asked.row, (asked.ids, []))
        if asked.ids[: len(before)] == before:
            request.block_hashes += known
        new = self._hash(request)
        self._rows[asked.row] = asked.ids, [*request.block_hashes, *new]
        if len(self._rows) > MOST_ROWS:
            self._rows.popitem(last=False)
        return new


@dataclass(slots=True)
class _Text:
    """What came of a request and is not told yet: it is with ``enough`` tokens, and at the end."""

    enough: float
    ids: list[int] = field(default_factory=list)
    cached: int | None = None


class Texts:
    """The requests that vLLM's engine has.

    ``LLMEngine.add_request`` and ``step`` would keep text, log probabilities and times of each besides, which nobody
    here asks for, and which cost a twentieth of this process's time where requests are short.

    Args:
        engine: Whose core, and whose checks of requests, are used. It makes its steps in this process.
    """

    def __init__(self, engine: LLMEngine) -> None:
        config = engine.vllm_config
        self._core, self._processor = engine.engine_core, engine.input_processor
        self._tasks = engine.get_supported_tasks()
        self._piece: int = config.scheduler_config.stream_interval
        kept = config.kv_transfer_config
        self._tails = kept is not None and kept.kv_connector_module_path == TAILS
        self._going: dict[str, _Text] = {}
        self._hashes = Hashes(engine)

    def add(self, asked: Ask) -> None:
        """Hand a request to the engine.

        Raises:
            ValueError: vLLM refuses it.
            vllm.exceptions.VLLMClientError: The same.
        """
        # Not from `vllm` itself, which would look its names up anew for each request: 4 % of this process's time.
        from vllm.inputs.engine import tokens_input
        from vllm.pooling_params import PoolingParams
        from vllm.sampling_params import SamplingParams

        params: Any
        if asked.kind == "classify":
            params = PoolingParams(**asked.params)
        else:
            params = SamplingParams(**asked.params, detokenize=False, skip_clone=True)  # nobody else's
            if self._tails:
                params.extra_args = {"kv_transfer_params": {"row": asked.row}}
        prompt = tokens_input(asked.ids.tolist())
        request = self._processor.process_inputs(asked.name, prompt, params, self._tasks, priority=asked.priority)
        self._hashes.expect(asked)
        self._core.add_request(request)
        self._going[asked.name] = _Text(enough=1 if asked.kind == "stream" else math.inf)

    def abort(self, name: str) -> None:
        """Break a request off, if it is under way."""
        if self._going.pop(name, None) is not None:
            self._core.abort_requests([name])

    def step(self) -> list[Answer]:
        """Let the engine make a step; return what is to be told."""
        answers = (self._answer(output) for output in self._core.get_output().outputs)
        return [answer for answer in answers if answer is not None]

    def _answer(self, output: Any) -> Answer | None:
        name, finish = output.request_id, output.finish_reason
        if (text := self._going.get(name)) is None:
            return None  # it was broken off
        text.ids += output.new_token_ids
        if output.prefill_stats is not None:
            text.cached = output.prefill_stats.num_cached_tokens
        if finish is not None:
            del self._going[name]
        elif len(text.ids) < text.enough:
            return None
        if output.pooling_output is not None:
            return Answer(name, [], "read", text.cached, output.pooling_output.float().cpu().numpy())
        ids, text.ids, text.enough = text.ids, [], self._piece
        return Answer(name, ids, None if finish is None else str(finish), text.cached)


if __name__ == "__main__":
    from tessy_hf.engines import vllm_worker  # under its own name, by which its objects are pickled

    vllm_worker.main(int(sys.argv[1]))
