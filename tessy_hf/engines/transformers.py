"""A causal language model of `transformers` in this process, with keys and values kept of each row across chunks.

In: requests. Out: completions, at once or as streams. Requests that wait while the model works are taken together in
the next round, which generates up to :data:`ROUND_TOKENS` tokens; a chunk re-reads only what another author wrote.
Knows the event loop and nothing of networks (:mod:`tessy_hf.engines.generation`), thinking or authors.
"""

from __future__ import annotations

import asyncio
import json
from array import array
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tessy_hf.engines.base import Completion, Measure, Request, Scores, load_tokenizer
from tessy_hf.engines.devices import pick_device, share_cores
from tessy_hf.engines.model_files import ModelFiles, refuse_code
from tessy_hf.errors import EngineDeadError, SettingsError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tessy_hf.engines.generation import Generator, Given

ROUND_TOKENS = 32
"""Most tokens generated before new requests may join. Longer requests go on in the next round."""

PIECE_TOKENS = 6
"""Tokens of a stream that come at once. What is written while a piece is judged may be in vain."""

NOT_IDENTITY = frozenset(
    "cache_dir device_map force_download local_files_only low_cpu_mem_usage max_memory offload_buffers offload_folder "
    "offload_state_dict proxies token".split()
)
"""Options of ``from_pretrained`` that say where a model comes from or lies, not what it writes. Some are secret."""


class TransformersEngine:
    """A causal language model run by `transformers` in this process.

    Args:
        model: Hub id or folder.
        revision: Branch, tag or commit on the Hub.
        dtype: Precision, such as ``"bfloat16"``; ``"auto"`` takes the checkpoint's.
        device: Torch device; by default CUDA, then MPS, then CPU.
        max_batch: Most rows in one forward pass.
        context_length: Most tokens of prompt and completion; by default what the model's config says. Models whose
            rotary frequencies change with the longest row of a batch (``longrope``, ``dynamic``) take no more than
            they read with the first frequencies, else a row would depend on its company.
        **options: Passed to ``AutoModelForCausalLM.from_pretrained``, such as ``attn_implementation``,
            ``quantization_config`` or ``gguf_file``, of which the tokenizer is read too. Keys and values are always
            kept in the model's precision: a ``cache_implementation`` in the checkpoint is for ``generate``.

    Raises:
        SettingsError: An option is out of range, or would run code that comes with the model.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        revision: str | None = None,
        dtype: str = "auto",
        device: str | None = None,
        max_batch: int = 64,
        context_length: int | None = None,
        **options: Any,
    ) -> None:
        if max_batch < 1:
            raise SettingsError(
                f"max_batch is {max_batch}; at least one row must fit. Pass for instance max_batch=64."
            )
        refuse_code(options)
        self.model = str(model)
        self.files = ModelFiles(self.model, revision)
        self._dtype = dtype
        self._device = device
        self._max_batch = max_batch
        self._context_length = context_length
        self._options = options
        self.streams = True
        self.measures: frozenset[Measure] = frozenset(("logprobs", "entropies", "score"))
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._rounds: _Rounds | None = None
        self._row_length: int | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """Model (a folder by its content), revision, precision, and each option that may change the text."""
        options = {name: plain(value) for name, value in self._options.items() if name not in NOT_IDENTITY}
        identity = {"engine": "transformers", **self.files.identity}
        return {**identity, "dtype": str(self._dtype), **({"options": options} if options else {})}

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        if self._tokenizer is None:
            hint = "A Hub id or a folder is expected; check the name, and HF_TOKEN for gated models."
            own = {name: self._options[name] for name in ("gguf_file",) if name in self._options}
            self._tokenizer = load_tokenizer(self.files.path, self.files.pinned, hint, **own)
        return self._tokenizer

    @property
    def context_length(self) -> int:
        """Most tokens of prompt and completion."""
        length = self._context_length if self._row_length is None else self._row_length
        assert length is not None, "start() comes first"
        return length

    @property
    def cache_tokens(self) -> int | None:
        """How many tokens of keys and values fit into the memory it may take, a part of what there is."""
        return self._started.generator.cache_tokens

    async def start(self) -> None:
        """Load the model.

        Raises:
            EngineDeadError: The model cannot be loaded.
            SettingsError: A row would not be what it is alone: the model keeps more of a text than keys and values
                (linear attention, state space), or ``context_length`` passes what its rotary frequencies hold for.
        """
        if self._rounds is not None:
            return
        from tessy_hf.engines.generation import Generator
        from tessy_hf.engines.network import load, row_length

        network = load(self.files.path, self.files.pinned, self._dtype, pick_device(self._device), self._options)
        self._row_length = row_length(network, self._context_length)
        self._rounds = _Rounds(Generator(network), self._max_batch)

    @property
    def _started(self) -> _Rounds:
        assert self._rounds is not None, "start() comes first"
        return self._rounds

    async def complete(self, request: Request) -> Completion:
        """Continue a row in the next round."""
        return await self._started.submit(request)

    def stream(self, request: Request) -> AsyncGenerator[Completion, None]:
        """Continue a row round by round until it is broken off."""
        return self._started.stream(request)

    async def score(self, prompt_ids: Sequence[int], ids: Sequence[int], *, row: str = "", order: int = 0) -> Scores:
        """Score a text, of which only ids without cached keys and values are read."""
        from tessy_hf.engines.generation import Given

        whole = array("i", prompt_ids) + array("i", ids)
        return await self._started.score(Given(row, order, whole, len(prompt_ids)))

    def release(self, row: str) -> None:
        """Free a row's keys and values."""
        if self._rounds is not None:
            self._rounds.release(row)

    async def close(self) -> None:
        """Free the model, after the round that is under way."""
        self._tokenizer = None  # the folder may be another model when it is opened again
        if self._rounds is not None:
            rounds, self._rounds = self._rounds, None
            rounds.close()

    def __getstate__(self) -> dict[str, Any]:
        """Pickle the description only."""
        return {**self.__dict__, "_rounds": None, "_tokenizer": None}

    def __repr__(self) -> str:
        return f"TransformersEngine({self.model!r})"


def plain(value: Any) -> Any:
    """Return an option's value as plain data, the same in every process."""
    return json.loads(json.dumps(value, default=lambda it: it.to_dict() if hasattr(it, "to_dict") else str(it)))


@dataclass
class _Job:
    """A request under way, over one or more rounds.

    Attributes:
        request: What is asked.
        future: Done when all is written; of a stream, when something is.
        streams: Whether it is a stream.
        new: What is written so far.
        delivered: How much of it a stream has passed on.
        uncached: How many ids of the prompt had to be read.
        measured: Log-probabilities and entropies of what is written, where asked for.
        stop_id: What ended it.
        ended: Whether it is all written, or nobody waits for it any more.
    """

    request: Request
    future: asyncio.Future[None]
    streams: bool = False
    new: array[int] = field(default_factory=lambda: array("i"))
    delivered: int = 0
    uncached: int | None = None
    measured: tuple[list[float], list[float]] = field(default_factory=lambda: ([], []))
    stop_id: int | None = None
    ended: bool = False

    @property
    def left(self) -> int:
        return self.request.max_tokens - len(self.new)

    def next_request(self) -> Request:
        """Return what to ask of the next round."""
        most = min(self.left, PIECE_TOKENS if self.streams else ROUND_TOKENS)
        return replace(self.request, prompt_ids=array("i", self.request.prompt_ids) + self.new, max_tokens=most)

    def take(self, completion: Completion) -> None:
        """Add what a round wrote."""
        if not self.new:
            self.uncached = completion.uncached_prompt_tokens
        self.new.extend(completion.token_ids)
        for values, more in zip(self.measured, (completion.logprobs, completion.entropies), strict=True):
            values.extend(more or ())
        self.stop_id = completion.stop_id
        self.ended = self.stop_id is not None or not self.left

    def piece(self) -> Completion:
        """Return what was not passed on yet."""
        start, self.delivered = self.delivered, len(self.new)
        logprobs, entropies = (values[start:] for values in self.measured)
        asked = self.request
        measured = logprobs if asked.logprobs else None, entropies if asked.entropies else None
        return Completion(self.new[start:], self.stop_id, self.uncached if start == 0 else 0, *measured)

    def fail(self, error: BaseException) -> None:
        """End it with an error, which need not be looked at."""
        self.ended = True
        if self.future.done():  # a stream that was not read on since
            self.future = asyncio.get_running_loop().create_future()
        self.future.set_exception(_broken(error))
        self.future.exception()


def _broken(error: BaseException) -> EngineDeadError:
    return EngineDeadError(f"The model broke down: {error!r}. See the traceback for where.")


class _Rounds:
    """The requests under way, and the worker thread that serves them round by round.

    Args:
        generator: What writes.
        max_batch: Most requests in a round; the oldest rows come first.
    """

    def __init__(self, generator: Generator, max_batch: int) -> None:
        self.generator = generator
        self._max_batch = max_batch
        self._waiting: list[_Job] = []
        self._to_score: list[tuple[Given, asyncio.Future[Scores]]] = []
        self._busy = False
        self._released: list[str] = []
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="tessy-transformers", initializer=share_cores)

    async def submit(self, request: Request) -> Completion:
        job = _Job(request, asyncio.get_running_loop().create_future())
        self._add(job)
        try:
            await job.future
        finally:
            job.ended = True
        return job.piece()

    async def stream(self, request: Request) -> AsyncGenerator[Completion, None]:
        loop = asyncio.get_running_loop()
        request = replace(request, prompt_ids=array("i", request.prompt_ids))
        job = _Job(request, loop.create_future(), streams=True)
        self._add(job)
        try:
            while not job.ended or job.future.done():
                await job.future
                job.future = loop.create_future()
                yield job.piece()
        finally:
            job.ended = True

    async def score(self, given: Given) -> Scores:
        future: asyncio.Future[Scores] = asyncio.get_running_loop().create_future()
        self._to_score.append((given, future))
        self._wake()
        return await future

    def release(self, row: str) -> None:
        self._released.append(row)

    def close(self) -> None:
        self._worker.shutdown(wait=True, cancel_futures=True)

    def _add(self, job: _Job) -> None:
        self._waiting.append(job)
        self._wake()

    def _wake(self) -> None:
        if not self._busy:
            self._busy = True
            loop = asyncio.get_running_loop()
            loop.call_soon(self._next_round, loop)  # later in this turn of the loop: let the others join first

    def _next_round(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._to_score:  # first: it takes one pass, and rows wait for it before they go on
            self._score_round(loop)
            return
        waiting = sorted((job for job in self._waiting if not job.ended), key=lambda job: job.request.order)
        jobs, self._waiting = waiting[: self._max_batch], waiting[self._max_batch :]
        if not jobs:
            self._busy = False
            return
        requests = [job.next_request() for job in jobs]
        self._work(loop, self.generator.generate, requests, lambda done: self._deliver(loop, jobs, done))

    def _score_round(self, loop: asyncio.AbstractEventLoop) -> None:
        waiting = sorted(self._to_score, key=lambda asked: asked[0].order)
        asked, self._to_score = waiting[: self._max_batch], waiting[self._max_batch :]

        def deliver(done: asyncio.Future[list[Scores]]) -> None:
            error = done.exception()
            for at, (_, future) in enumerate(asked):
                if future.done():  # nobody waits for it any more
                    continue
                if error is not None:
                    future.set_exception(_broken(error))
                else:
                    future.set_result(done.result()[at])
            loop.call_soon(self._next_round, loop)

        self._work(loop, self.generator.score, [given for given, _ in asked], deliver)

    def _work(
        self,
        loop: asyncio.AbstractEventLoop,
        work: Callable[..., Any],
        asked: list[Any],
        deliver: Callable[[Any], None],
    ) -> None:
        """Have the worker do something for rows, after it forgot those that have ended."""
        released, self._released = self._released, []
        loop.run_in_executor(self._worker, work, asked, released).add_done_callback(deliver)

    def _deliver(
        self, loop: asyncio.AbstractEventLoop, jobs: list[_Job], done: asyncio.Future[list[Completion]]
    ) -> None:
        error = done.exception()
        for index, job in enumerate(jobs):
            if job.ended:
                continue
            if error is not None:
                job.fail(error)
                continue
            job.take(done.result()[index])
            if not job.ended:
                self._waiting.append(job)
            if (job.ended or job.streams) and not job.future.done():
                job.future.set_result(None)
        loop.call_soon(self._next_round, loop)
