"""Any causal language model of `transformers`, with each row's keys and values kept across chunks.

Requests that wait while the model works are taken together in the next round: their kept keys and values are gathered
into one padded batch, the new prompt tokens are read, up to :data:`ROUND_TOKENS` are generated, and what is new is
written back. A chunk thus re-reads only what another author wrote. Knows nothing of thinking or authors.

The token at position p of a row is drawn with a number that depends on the row's seed and p alone, so a row does not
depend on how it was cut into requests or which rows it shared a batch with (up to floating-point noise).
"""

from __future__ import annotations

import asyncio
import ctypes
import os
from array import array
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tessy_hf.engines.base import Completion, Request, load_tokenizer
from tessy_hf.engines.forward import forward
from tessy_hf.errors import EngineDeadError, SettingsError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

ROUND_TOKENS = 32
"""Most tokens generated before new requests may join. Longer requests go on in the next round."""

PASS_TOKENS = 512
"""What a forward pass costs besides what it reads, in tokens read."""

PIECE_TOKENS = 6
"""Tokens of a stream that come at once. What is written while a piece is judged may be in vain."""

CACHE_SHARE = 0.2
"""The part of the memory that is planned for one engine's keys and values."""

_forked = False


def _note_fork() -> None:
    global _forked
    _forked = True


os.register_at_fork(after_in_child=_note_fork)


def share_cores() -> None:
    """Let torch, in this thread, use half of the cores: the two authors work at the same time.

    Threads of OpenMP that outnumber the cores wait for each other, which was measured to cost up to 10 times. And
    they do not survive a fork, so a forked worker (``num_proc``) gets one.
    """
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(1 if _forked else max(1, cores // 2))


KEPT_FREE = 512 << 20
"""Bytes of freed memory that glibc may keep."""

_LARGEST_IN_HEAP = 32 << 20  # bytes; glibc takes no more
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of <malloc.h>
_SET_BY_USER = ("GLIBC_TUNABLES", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")


@cache
def keep_freed_memory() -> None:
    """Let glibc keep what a forward pass on a CPU frees, up to :data:`KEPT_FREE`, for the next one.

    Else it gives all but a little back, and the system hands the same pages out anew: hundreds of page faults in each
    forward pass of a small model, a third of its processor time. Settings in the user's environment come first;
    where there is no glibc, nothing happens.
    """
    if any(name in os.environ for name in _SET_BY_USER):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_IN_HEAP)
        mallopt(_M_TRIM_THRESHOLD, KEPT_FREE)


def pick_device(device: str | None) -> str:
    """Return the device asked for, or the best there is: CUDA, MPS, CPU."""
    import torch

    if device is not None:
        return device
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


class TransformersEngine:
    """A causal language model run by `transformers` in this process.

    Args:
        model: Hub id or folder.
        revision: Branch, tag or commit on the Hub.
        dtype: Precision, such as ``"bfloat16"``; ``"auto"`` takes the checkpoint's.
        device: Torch device; by default CUDA, then MPS, then CPU.
        max_batch: Most rows in one forward pass.
        context_length: Most tokens of prompt and completion; by default what the model's config says.
        **options: Passed to ``AutoModelForCausalLM.from_pretrained``.
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
        self.model = str(model)
        self._revision = revision
        self._dtype = dtype
        self._device = device
        self._max_batch = max_batch
        self._context_length = context_length
        self._options = options
        self.streams = True
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._live: _Live | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """Model, revision and precision."""
        return {"engine": "transformers", "model": self.model, "revision": self._revision, "dtype": self._dtype}

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
        if self._context_length is not None:
            return self._context_length
        assert self._live is not None, "start() comes first"
        return self._live.context_length

    @property
    def cache_tokens(self) -> int | None:
        """How many tokens of keys and values fit into the memory it may take, a part of what there is."""
        assert self._live is not None, "start() comes first"
        return self._live.cache_tokens()

    async def start(self) -> None:
        """Load the model."""
        if self._live is None:
            self._live = _Live(self)

    async def complete(self, request: Request) -> Completion:
        """Continue a row in the next round."""
        assert self._live is not None, "start() comes first"
        return await self._live.submit(request)

    def stream(self, request: Request) -> AsyncGenerator[Completion, None]:
        """Continue a row round by round until it is broken off."""
        assert self._live is not None, "start() comes first"
        return self._live.stream(request)

    def release(self, row: str) -> None:
        """Free a row's keys and values."""
        if self._live is not None:
            self._live.release(row)

    async def close(self) -> None:
        """Let go of the model."""
        if self._live is not None:
            live, self._live = self._live, None
            live.close()

    def __getstate__(self) -> dict[str, Any]:
        """Pickle the description only."""
        return {**self.__dict__, "_live": None, "_tokenizer": None}

    def __repr__(self) -> str:
        return f"TransformersEngine({self.model!r})"


@dataclass
class _Job:
    """A request under way, over one or more rounds.

    Attributes:
        request: What is asked.
        future: Done when all is written; of a stream, when something is.
        streams: Whether it is a stream.
        new: What is written so far.
        told: How much of it a stream has passed on.
        read: How many ids of the prompt were read for it.
        stop_id: What ended it.
        ended: Whether it is all written.
    """

    request: Request
    future: asyncio.Future[None]
    streams: bool = False
    new: array[int] = field(default_factory=lambda: array("i"))
    told: int = 0
    read: int | None = None
    stop_id: int | None = None
    ended: bool = False

    @property
    def ids(self) -> array[int]:
        ids = array("i", self.request.prompt_ids)
        ids.extend(self.new)
        return ids

    @property
    def left(self) -> int:
        return self.request.max_tokens - len(self.new)

    @property
    def wanted(self) -> int:
        return min(self.left, PIECE_TOKENS) if self.streams else self.left

    def piece(self) -> Completion:
        """Return what was not passed on yet."""
        told, self.told = self.told, len(self.new)
        return Completion(self.new[told:], self.stop_id, self.read if told == 0 else 0)


class _Slot(NamedTuple):
    """A row's place in the pool of keys and values, and the ids it holds them for."""

    place: int
    ids: array[int]


class _Batch(NamedTuple):
    """Rows laid out for the network.

    Attributes:
        ids: What is to be read, of shape (rows, width).
        positions: Their positions, of the same shape.
        attention: Which columns of the cache are a row's own.
        cache: Keys and values, those that were kept first.
        begin: The column of each row's first new id.
        edge: The column of what is generated first.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    attention: torch.Tensor
    cache: Any
    begin: np.ndarray[Any, Any]
    edge: int


class _Live:
    """The loaded model, one worker thread, and the pool of keys and values."""

    def __init__(self, engine: TransformersEngine) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self._device = pick_device(engine._device)
        if self._device == "cpu":
            keep_freed_memory()
        try:
            network = AutoModelForCausalLM.from_pretrained(
                engine.model,
                revision=engine._revision,
                dtype=engine._dtype,
                use_safetensors=True,
                **engine._options,
            )
        except (OSError, ValueError) as error:
            raise EngineDeadError(
                f"The model {engine.model!r} could not be loaded: {error} A Hub id or a folder with config.json and "
                "safetensors is expected; check the name, and HF_TOKEN for gated models."
            ) from error
        self.network = network.to(self._device).eval()
        self.context_length = int(getattr(network.config.get_text_config(), "max_position_embeddings", 1 << 30))
        self._torch = torch
        self._max_batch = engine._max_batch
        self._waiting: list[_Job] = []
        self._busy = False
        self._slots: dict[str, _Slot] = {}
        self._pool = _Pool(torch, self._device)
        self._released: list[str] = []
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="tessy-transformers", initializer=share_cores)

    def cache_tokens(self) -> int:
        """Return how many tokens fit. A row takes as much as the longest does, and the pool grows by being copied."""
        config = self.network.config.get_text_config()
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        token = 2 * config.num_hidden_layers * heads * head * self.network.dtype.itemsize
        if self._device.startswith("cuda"):
            free = self._torch.cuda.mem_get_info(self._device)[0]
        else:
            free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return int(CACHE_SHARE * free / token)

    # --- on the event loop

    def _add(self, job: _Job) -> None:
        self._waiting.append(job)
        if not self._busy:
            self._busy = True
            loop = asyncio.get_running_loop()
            loop.call_soon(self._next_round, loop)  # later in this turn of the loop: let the others join first

    async def submit(self, request: Request) -> Completion:
        job = _Job(request, asyncio.get_running_loop().create_future())
        self._add(job)
        try:
            await job.future
        finally:
            job.ended = True  # nobody waits any more
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

    def release(self, row: str) -> None:
        self._released.append(row)

    def _next_round(self, loop: asyncio.AbstractEventLoop) -> None:
        waiting = sorted((job for job in self._waiting if not job.ended), key=lambda job: job.request.order)
        jobs, self._waiting = waiting[: self._max_batch], waiting[self._max_batch :]
        released, self._released = self._released, []
        if not jobs:
            self._released, self._busy = released, False
            return
        work = loop.run_in_executor(self._worker, self._round, jobs, released)
        work.add_done_callback(lambda done: self._deliver(loop, jobs, done))

    def _deliver(
        self, loop: asyncio.AbstractEventLoop, jobs: list[_Job], done: asyncio.Future[list[Completion]]
    ) -> None:
        error = done.exception()
        for index, job in enumerate(jobs):
            if job.ended:
                continue
            if error is not None:
                self._fail(job, error)
                continue
            completion = done.result()[index]
            job.read = completion.prompt_tokens_read if not job.new else job.read
            job.new.extend(completion.token_ids)
            job.stop_id = completion.stop_id
            job.ended = job.stop_id is not None or not job.left
            if not job.ended:
                self._waiting.append(job)
            if (job.ended or job.streams) and not job.future.done():
                job.future.set_result(None)
        loop.call_soon(self._next_round, loop)

    @staticmethod
    def _fail(job: _Job, error: BaseException) -> None:
        job.ended = True
        if job.future.done():  # a stream that was not read on since
            job.future = asyncio.get_running_loop().create_future()
        job.future.set_exception(EngineDeadError(f"The model broke down: {error!r}. See the traceback for where."))
        job.future.exception()

    def close(self) -> None:
        self._worker.shutdown(wait=True, cancel_futures=True)

    # --- on the worker thread

    def _round(self, jobs: list[_Job], released: list[str]) -> list[Completion]:
        for row in released:
            slot = self._slots.pop(row, None)
            if slot is not None:
                self._pool.free(slot.place)
        with self._torch.inference_mode():
            return self._generate(jobs)

    def _generate(self, jobs: list[_Job]) -> list[Completion]:
        """Read what is new in each job's ids and generate until all have ended or the round is over."""
        torch, device = self._torch, self._device
        all_ids = [job.ids for job in jobs]
        slots = [self._slot(job.request.row) for job in jobs]
        kept = np.array([_common(slot.ids, ids) for slot, ids in zip(slots, all_ids, strict=True)])
        read = np.array([len(ids) for ids in all_ids]) - kept
        kept = kept + self._read_apart(all_ids, slots, kept, read)
        fresh = np.array([len(ids) for ids in all_ids]) - kept
        wanted = np.array([job.wanted for job in jobs])
        steps = int(min(ROUND_TOKENS, wanted.max()))
        batch = self._lay_out(all_ids, slots, kept, fresh, steps)
        pick = _Sampler(torch, device, [job.request for job in jobs], kept + fresh)
        stops = _StopIds(
            torch, device, [job.request for job in jobs], self.network.config.get_text_config().vocab_size
        )

        step_ids, step_positions = batch.ids, batch.positions
        limit = torch.from_numpy(wanted).to(device)
        done = torch.zeros(len(jobs), dtype=torch.bool, device=device)
        written = []
        for step in range(steps):
            logits, _ = forward(
                self.network,
                step_ids,
                batch.cache,
                attention_mask=batch.attention[:, : batch.edge + step],
                position_ids=step_positions,
                logits_to_keep=1,
            )
            token = pick(logits[:, -1], step)
            written.append(token)
            done |= stops(token) | (step + 1 >= limit)
            if bool(done.all()):
                break
            step_ids, step_positions = token[:, None], step_positions[:, -1:] + 1
        tokens = torch.stack(written, 1).cpu().numpy()
        return self._keep(jobs, all_ids, slots, kept, read, tokens, batch)

    def _read_apart(
        self,
        all_ids: list[array[int]],
        slots: list[_Slot],
        kept: np.ndarray[Any, Any],
        fresh: np.ndarray[Any, Any],
    ) -> np.ndarray[Any, Any]:
        """Read the prompts of rows that begin, all but their last id, before the others join.

        In one batch with them all rows would be as wide as the longest prompt. Returns how much was read of each row.
        """
        count = np.zeros_like(fresh)
        while len(apart := _apart(fresh - count)):
            count[apart] = fresh[apart] - 1
            own_slots = [slots[row] for row in apart]
            batch = self._lay_out([all_ids[row] for row in apart], own_slots, kept[apart], count[apart])
            forward(
                self.network,
                batch.ids,
                batch.cache,
                attention_mask=batch.attention,
                position_ids=batch.positions,
                logits_to_keep=1,
            )
            self._store(own_slots, kept[apart], count[apart], batch)
        return count

    def _lay_out(
        self,
        all_ids: list[array[int]],
        slots: list[_Slot],
        kept: np.ndarray[Any, Any],
        fresh: np.ndarray[Any, Any],
        steps: int = 0,
    ) -> _Batch:
        """Make a batch of the ids after the kept ones, with room for ``steps`` more.

        Its columns: the kept ids from the left, then the new ids up to a common right edge, then what is generated.
        Everything between is masked; positions are given, not counted.
        """
        longest, width = int(kept.max()), int(fresh.max())
        columns = np.arange(longest + width + steps)
        begin = longest + width - fresh
        mask = (columns < kept[:, None]) | (columns >= begin[:, None])
        ids = np.zeros((len(all_ids), width), dtype=np.int64)
        for row, new in enumerate(all_ids):
            ids[row, width - fresh[row] :] = new[kept[row] : kept[row] + fresh[row]]
        positions = np.maximum(kept[:, None] + np.arange(width) - (width - fresh[:, None]), 0)
        cache = self._pool.gather([slot.place for slot in slots], longest)
        tensors = (self._torch.from_numpy(each).to(self._device) for each in (ids, positions, mask))
        step_ids, step_positions, attention = tensors
        return _Batch(step_ids, step_positions, attention.long(), cache, begin, longest + width)

    def _store(
        self, slots: list[_Slot], kept: np.ndarray[Any, Any], count: np.ndarray[Any, Any], batch: _Batch
    ) -> None:
        """Write ``count`` new keys and values of each row back, behind the kept ones."""
        rows = np.repeat(np.arange(len(slots)), count)
        offset = np.arange(len(rows)) - np.repeat(np.cumsum(count) - count, count)
        places = np.array([slot.place for slot in slots])
        self._pool.scatter(batch.cache, places[rows], kept[rows] + offset, rows, batch.begin[rows] + offset)

    def _keep(
        self,
        jobs: list[_Job],
        all_ids: list[array[int]],
        slots: list[_Slot],
        kept: np.ndarray[Any, Any],
        read: np.ndarray[Any, Any],
        tokens: np.ndarray[Any, Any],
        batch: _Batch,
    ) -> list[Completion]:
        """Write new keys and values back and read off what each job got."""
        completions: list[Completion] = []
        count = np.empty_like(kept)
        for row, (job, ids, slot) in enumerate(zip(jobs, all_ids, slots, strict=True)):
            new = array("i", tokens[row, : job.wanted].astype(np.int32).tobytes())
            stop_at = next((at for at, token in enumerate(new) if token in job.request.stop_ids), None)
            stop_id = None if stop_at is None else new[stop_at]
            new = new[:stop_at]
            count[row] = len(ids) - kept[row] + min(len(new), tokens.shape[1] - 1)
            ids.extend(new)
            self._slots[job.request.row] = _Slot(slot.place, ids[: int(kept[row] + count[row])])
            completions.append(Completion(new, stop_id, int(read[row])))
        self._store(slots, kept, count, batch)
        return completions

    def _slot(self, row: str) -> _Slot:
        if row not in self._slots:
            self._slots[row] = _Slot(self._pool.take(), array("i"))
        return self._slots[row]


def _common(held: array[int], ids: array[int]) -> int:
    """Return how many leading ids agree, leaving at least one to read."""
    length = min(len(held), len(ids) - 1)
    if length <= 0 or held[:length] == ids[:length]:
        return max(length, 0)
    differ = np.frombuffer(held, np.int32, length) != np.frombuffer(ids, np.int32, length)
    return int(differ.argmax())


def _apart(fresh: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return which rows, of those with so many ids to read, are better read before the others join them."""
    order = np.argsort(-fresh, kind="stable")
    widths, apart = fresh[order], np.arange(len(fresh))
    cost = apart * widths[0] + len(fresh) * widths + PASS_TOKENS * (apart > 0)
    best: np.ndarray[Any, Any] = order[: int(cost.argmin())]
    return best


class _Pool:
    """Keys and values of all rows under way: per layer one tensor of shape (slots, places, heads, head size)."""

    def __init__(self, torch: Any, device: str) -> None:
        self._torch, self._device = torch, device
        self._free: list[int] = []
        self._slots = self._places = 0
        self._layers: list[tuple[torch.Tensor, torch.Tensor]] = []

    def take(self) -> int:
        if not self._free:
            self._free = list(range(self._slots, max(8, 2 * self._slots)))[::-1]
            self._grow(max(8, 2 * self._slots), self._places)
        return self._free.pop()

    def free(self, slot: int) -> None:
        self._free.append(slot)

    def _grow(self, slots: int, places: int) -> None:
        grown = []
        for pair in self._layers:
            bigger = tuple(tensor.new_zeros((slots, places, *tensor.shape[2:])) for tensor in pair)
            for new, old in zip(bigger, pair, strict=True):
                new[: self._slots, : self._places] = old
            grown.append((bigger[0], bigger[1]))
        self._layers, self._slots, self._places = grown, slots, places

    def gather(self, slots: list[int], places: int) -> Any:
        """Return a `transformers` cache with the first ``places`` of some slots."""
        from transformers import DynamicCache

        cache = DynamicCache()
        if places:
            index = self._torch.tensor(slots, device=self._device)
            for layer, (keys, values) in enumerate(self._layers):
                cache.update(
                    keys[:, :places].index_select(0, index).transpose(1, 2),
                    values[:, :places].index_select(0, index).transpose(1, 2),
                    layer,
                )
        return cache

    def scatter(
        self,
        cache: Any,
        into_slots: np.ndarray[Any, Any],
        into_places: np.ndarray[Any, Any],
        from_rows: np.ndarray[Any, Any],
        from_columns: np.ndarray[Any, Any],
    ) -> None:
        """Copy columns of a cache to places of slots."""
        if not self._layers:
            shapes = [(layer.keys, layer.values) for layer in cache.layers]
            self._layers = [
                (
                    k.new_zeros((self._slots, self._places, k.shape[1], k.shape[3])),
                    v.new_zeros((self._slots, self._places, v.shape[1], v.shape[3])),
                )
                for k, v in shapes
            ]
        needed = int(into_places.max()) + 1
        if needed > self._places:
            self._grow(self._slots, max(256, -(-needed * 5 // 4 // 64) * 64))
        to = [self._torch.from_numpy(index).to(self._device) for index in (into_slots, into_places)]
        of = [self._torch.from_numpy(index).to(self._device) for index in (from_rows, from_columns)]
        for (keys, values), layer in zip(self._layers, cache.layers, strict=True):
            keys[to[0], to[1]] = layer.keys.transpose(1, 2)[of[0], of[1]]
            values[to[0], to[1]] = layer.values.transpose(1, 2)[of[0], of[1]]


class _StopIds:
    """Whether a token stops its row."""

    def __init__(self, torch: Any, device: str, requests: list[Request], vocabulary_size: int) -> None:
        sets = list(dict.fromkeys(request.stop_ids for request in requests))
        size = max(vocabulary_size, 1 + max((max(ids, default=0) for ids in sets), default=0))
        table = np.zeros((len(sets), size), dtype=bool)
        for row, ids in enumerate(sets):
            table[row, list(ids)] = True
        self._table = torch.from_numpy(table).to(device)
        self._row = torch.tensor([sets.index(request.stop_ids) for request in requests], device=device)

    def __call__(self, token: torch.Tensor) -> torch.Tensor:
        return self._table[self._row, token]  # type: ignore[no-any-return]


class _Sampler:
    """Draws each row's next token with one number made of the row's seed and the token's position."""

    def __init__(self, torch: Any, device: str, requests: list[Request], lengths: np.ndarray[Any, Any]) -> None:
        self._torch, self._device = torch, device
        self._seeds = np.array([request.seed for request in requests], dtype=np.uint64)
        self._lengths = lengths.astype(np.uint64)
        self._greedy = all(request.temperature == 0 for request in requests)
        temperature = [request.temperature or 1.0 for request in requests]
        self._temperature = torch.tensor(temperature, device=device, dtype=torch.float32)[:, None]
        self._is_greedy = torch.tensor([request.temperature == 0 for request in requests], device=device)
        self._nucleus = min(request.top_p for request in requests) < 1
        self._top_p = torch.tensor([request.top_p for request in requests], device=device, dtype=torch.float32)[
            :, None
        ]

    def __call__(self, logits: torch.Tensor, step: int) -> torch.Tensor:
        torch = self._torch
        if self._greedy:
            return logits.argmax(-1)
        probabilities = torch.softmax(logits.float() / self._temperature, -1)
        order = None
        if self._nucleus:
            probabilities, order = probabilities.sort(-1, descending=True)
            before = probabilities.cumsum(-1) - probabilities
            probabilities = probabilities.masked_fill(before >= self._top_p, 0.0)
        mass = probabilities.cumsum(-1)
        drawn = torch.from_numpy(_uniform(self._seeds, self._lengths + np.uint64(step))).to(self._device)
        target = drawn[:, None].float() * mass[:, -1:]
        token = torch.searchsorted(mass, target, right=True).clamp_(max=logits.shape[-1] - 1)
        token = (token if order is None else order.gather(-1, token))[:, 0]
        return torch.where(self._is_greedy, logits.argmax(-1), token)  # type: ignore[no-any-return]


def _uniform(seeds: np.ndarray[Any, Any], positions: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Hash seeds and positions to numbers in [0, 1) (the finaliser of SplitMix64)."""
    x: np.ndarray[Any, Any] = seeds + (positions + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    uniform: np.ndarray[Any, Any] = (x ^ (x >> np.uint64(31))) / np.float64(2**64)
    return uniform
