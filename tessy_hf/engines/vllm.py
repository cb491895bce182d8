"""The vLLM engine: token ids in and out, with rows kept in its prefix cache and the oldest rows served first.

The model runs in a process beside this one (:mod:`tessy_hf.engines.vllm_process`), which ends with this process,
however that ends. Our defaults are :data:`~tessy_hf.engines.vllm_process.DEFAULTS`; every other option is vLLM's own.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tessy_hf.engines.base import Completion, Measure, Request, Scores, derive_seed, load_tokenizer
from tessy_hf.engines.model_files import ModelFiles, refuse_code
from tessy_hf.engines.transformers import plain
from tessy_hf.engines.vllm_process import Kind, Output, Started, VLLMProcess, check_installed
from tessy_hf.errors import EngineDeadError, RequestError, SettingsError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DECISIVE = frozenset(
    "attention_backend attention_config calculate_kv_scales config_format disable_sliding_window generation_config "
    "hf_config_path hf_overrides kv_cache_dtype load_format logits_processors model_impl model_loader_extra_config "
    "override_generation_config quantization_config".split()
)
"""Options of vLLM that decide what a model writes, besides ``quantization``; most others are for speed and memory."""


class VLLMEngine:
    """A model run by vLLM.

    Args:
        model: Hub id or folder.
        revision: Branch, tag or commit on the Hub.
        dtype: Precision, such as ``"bfloat16"``; ``"auto"`` takes the checkpoint's.
        **options: Passed to ``vllm.EngineArgs``, for instance ``tensor_parallel_size=8``,
            ``gpu_memory_utilization=0.45`` or ``max_model_len=49152``. For gpt-oss leave
            ``prefix_cache_retention_interval`` at ``None``: otherwise its sliding-window layers keep only the end of
            the last prompt.

    Raises:
        SettingsError: ``data_parallel_size`` is above 1, or an option would run code that comes with the model.
    """

    MAX_RESTARTS = 2
    """How often a vLLM that died is started again. A fault that kills it more often will kill it again."""

    def __init__(self, model: str | Path, *, revision: str | None = None, dtype: str = "auto", **options: Any) -> None:
        if options.get("data_parallel_size", 1) > 1:
            raise SettingsError(
                f"VLLMEngine got data_parallel_size={options['data_parallel_size']}. It runs one replica of the "
                "model; start replicas with `vllm serve` and pass their addresses to ServerEngine."
            )
        refuse_code(options)
        self.model = str(model)
        self.streams = True
        self.measures: frozenset[Measure] = frozenset(("logprobs", "entropies", "score"))
        self.files = ModelFiles(self.model, revision)
        self._dtype = dtype
        self._options = options
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._process: VLLMProcess | None = None
        self._restarting: asyncio.Lock
        self._restarts = 0

    @property
    def identity(self) -> dict[str, Any]:
        """Model (a folder by its content), revision, precision, and each option of :data:`DECISIVE`."""
        options = {name: plain(value) for name, value in self._options.items() if name in DECISIVE}
        return {
            "engine": "vllm",
            **self.files.identity,
            "dtype": self._dtype,
            "quantization": self._options.get("quantization"),
            **({"options": options} if options else {}),
        }

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        if self._tokenizer is None:
            hint = "A Hub id or a folder is expected; check the name, and HF_TOKEN for gated models."
            self._tokenizer = load_tokenizer(self.files.path, self.files.pinned, hint)
        return self._tokenizer

    @property
    def context_length(self) -> int:
        """Most tokens of prompt and completion."""
        return self._started.context_length

    @property
    def cache_tokens(self) -> int | None:
        """How many tokens vLLM's KV cache holds."""
        return self._started.cache_tokens

    @property
    def _started(self) -> Started:
        assert self._process is not None and self._process.started is not None, "call start() first"
        return self._process.started

    def check(self) -> None:
        """Check before anything is loaded that vLLM is installed.

        Raises:
            EngineDeadError: It is not.
        """
        check_installed()

    async def start(self) -> None:
        """Start vLLM, which takes half a minute and more.

        Raises:
            EngineDeadError: vLLM is not installed or cannot run the model.
        """
        if self._process is None:
            self._process = await self._launch()
            self._restarting = asyncio.Lock()

    async def _launch(self) -> VLLMProcess:
        process = VLLMProcess(self.files.path, {"revision": self.files.pinned, "dtype": self._dtype, **self._options})
        try:
            await asyncio.to_thread(process.start)
        except BaseException:
            process.close()
            raise
        return process

    async def complete(self, request: Request) -> Completion:
        """Continue a row. If vLLM dies meanwhile, restart it and ask again.

        Raises:
            RequestError: vLLM refuses the request.
            EngineDeadError: vLLM died more than :attr:`MAX_RESTARTS` times.
        """
        params = self._sampling(request)
        output = await self._ask(request.row, "complete", request.prompt_ids, params, request.order)
        return _completion(output, request, first=True)

    async def _ask(
        self, row: str, kind: Kind, prompt_ids: Sequence[int], params: dict[str, Any], order: int
    ) -> Output:
        while True:
            process = self._process
            assert process is not None, "call start() first"
            try:
                return await process.ask(row, kind, prompt_ids, params, order)
            except EngineDeadError as death:
                await self._restart(process, death)

    async def score(self, prompt_ids: Sequence[int], ids: Sequence[int], *, row: str = "", order: int = 0) -> Scores:
        """Score a text as part of a prompt, whose cached beginning is read again only if it has some of ``ids``."""
        params = {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0, "skip_reading_prefix_cache": False}
        whole = [*prompt_ids, *ids]
        output = await self._ask(row, "score", whole, params, order)
        if output.cached_tokens >= len(prompt_ids):
            output = await self._ask(row, "score", whole, {**params, "skip_reading_prefix_cache": True}, order)
        _check(output, row)
        assert output.logprobs is not None and output.ranks is not None
        return Scores(output.logprobs[-len(ids) :], output.ranks[-len(ids) :])

    async def stream(self, request: Request) -> AsyncGenerator[Completion, None]:
        """Continue a row piece by piece; ``aclose()`` aborts it.

        Raises:
            RequestError: vLLM refuses the request; or it died and was restarted, and the request may be retried.
            EngineDeadError: vLLM died more than :attr:`MAX_RESTARTS` times.
        """
        process = self._process
        assert process is not None, "call start() first"
        params = self._sampling(request)
        first = True
        try:
            asked = process.stream(request.row, "stream", request.prompt_ids, params, request.order)
            async with aclosing(asked) as outputs:
                async for output in outputs:
                    yield _completion(output, request, first)
                    first = False
        except EngineDeadError as death:
            await self._restart(process, death)
            raise RequestError(str(death), retryable=True) from death

    def _sampling(self, request: Request) -> dict[str, Any]:
        """Return the arguments of ``vllm.SamplingParams``."""
        return {
            "max_tokens": request.max_tokens,
            "temperature": request.temperature,
            "top_p": request.top_p,
            **request.set_sampling,
            "seed": derive_seed(request.seed, len(request.prompt_ids)) if request.temperature else None,
            "stop_token_ids": list(request.stop_ids | ({self.tokenizer.eos_token_id} - {None})),
            "logprobs": -1 if request.entropies else 0 if request.logprobs else None,
        }

    async def _restart(self, dead: VLLMProcess, death: EngineDeadError) -> None:
        """Replace a vLLM that died, once for all requests that met its death."""
        async with self._restarting:
            if self._process is not dead:
                return
            if self._restarts >= self.MAX_RESTARTS:
                raise death
            self._restarts += 1
            await dead.aclose()
            self._process = await self._launch()

    def release(self, row: str) -> None:
        """Do nothing: vLLM's prefix cache evicts what is not used."""

    async def close(self) -> None:
        """Stop vLLM and wait until its process has ended."""
        self._tokenizer = None  # the folder may be another model when it is opened again
        if self._process is not None:
            process, self._process = self._process, None
            await process.aclose()

    def __getstate__(self) -> dict[str, Any]:
        """Pickle the description only."""
        return {**self.__dict__, "_process": None, "_tokenizer": None, "_restarting": None, "_restarts": 0}

    def __repr__(self) -> str:
        return f"VLLMEngine({self.model!r})"


def _check(output: Output, row: str) -> None:
    if output.finish not in (None, "stop", "length"):
        raise RequestError(
            f"vLLM ended a request of row {row!r} with {output.finish!r}; expected 'stop' or 'length'. Look at its "
            "log above.",
            retryable=True,
        )


def _completion(output: Output, request: Request, first: bool) -> Completion:
    """Translate an output; ``first`` if it is the request's first one, which tells what the prompt cost."""
    ids = output.token_ids
    uncached = len(request.prompt_ids) - output.cached_tokens if first else 0
    _check(output, request.row)
    stop_id = None
    if ids and ids[-1] in request.stop_ids:
        stop_id = ids[-1]
    elif output.finish == "stop":  # at an end token that only the model's generation config names
        stop_id = min(request.stop_ids, default=ids[-1])
    new = ids if stop_id is None else ids[:-1]
    logprobs = output.logprobs[: len(new)] if request.logprobs and output.logprobs is not None else None
    entropies = output.entropies[: len(new)] if request.entropies and output.entropies is not None else None
    return Completion(new, stop_id, uncached, logprobs, entropies)
