"""The last, incomplete block of each row's keys and values, kept for the row's next request.

vLLM's cache knows full blocks only, so each request of an alternation reads again what stands behind the last of them:
half a block on average, 16 tokens on a CPU, more than most requests generate. This connector, as vLLM calls what reads
keys and values from elsewhere, copies the block that a finished request leaves incomplete to a place of its own, and
back when the row goes on with the same text.

vLLM loads it where :mod:`tessy_hf.engines.vllm_worker` says so: on a CPU, whose blocks are large, in one process.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorMetadata, KVConnectorRole

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.forward_context import ForwardContext
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request

MOST = 1024
SHARE = 1 / 8
"""How many blocks are kept: so many, but no larger share of the cache's own; those asked for longest ago give way."""


class Tail(NamedTuple):
    """What is kept of a row.

    Attributes:
        full: How many full blocks are before it.
        before: vLLM's hash of these; ``None`` where there is none.
        ids: The ids in the block whose keys and values are known.
        slot: Where the block is.
    """

    full: int
    before: bytes | None
    ids: list[int]
    slot: int


@dataclass
class Copies(KVConnectorMetadata):  # type: ignore[misc]  # vLLM is not looked into
    """What is to be copied before the next forward pass: first out of vLLM's cache, then into it.

    Attributes:
        kept: By slot, the block to keep: of two that one step gives the same slot, the later.
        wanted: By block, the slot to take it from.
    """

    kept: dict[int, int] = field(default_factory=dict)
    wanted: dict[int, int] = field(default_factory=dict)


class Tails(KVConnectorBase_V1):  # type: ignore[misc]
    """See this module. vLLM makes one for its scheduler, which knows the rows, and one for the model, which copies.

    A request belongs to the row that its ``kv_transfer_params`` name.
    """

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._block = vllm_config.cache_config.block_size
        self._slots = max(1, min(MOST, int(SHARE * kv_cache_config.num_blocks)))
        self._free = list(range(self._slots))
        self._tails: OrderedDict[str, Tail] = OrderedDict()
        self._copies = Copies()
        self._layers: list[tuple[np.ndarray, np.ndarray]] = []

    @property
    def requires_kv_delivery(self) -> bool:
        """A block that is not kept is read again."""
        return False

    # --- the scheduler's

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int, bool]:
        """Return how many tokens are known beyond vLLM's full blocks."""
        tail = self._tails.get(_row(request))
        full = num_computed_tokens // self._block
        if tail is None or tail.full != full or tail.before != _hash(request, full):
            return 0, False
        last = request.num_tokens - 1  # one token is always read
        now = request.all_token_ids[num_computed_tokens : min(num_computed_tokens + len(tail.ids), last)]
        other = (at for at, (new, old) in enumerate(zip(now, tail.ids, strict=False)) if new != old)
        return next(other, len(now)), False

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        """Note where the kept block is wanted."""
        if num_external_tokens:
            tail = self._tails[_row(request)]
            self._copies.wanted[blocks.get_block_ids()[0][tail.full]] = tail.slot

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Keep the request's last block if it is incomplete. vLLM may have it back at once: it is copied before."""
        row = _row(request)
        if old := self._tails.pop(row, None):
            self._free.append(old.slot)
        # Of the last id nothing is known yet, nor of what a step that is under way adds.
        known = min(request.num_computed_tokens - request.num_in_flight_tokens, request.num_tokens - 1)
        full, rest = divmod(known, self._block)
        if row and known > 0 and rest and full < len(block_ids):
            if not self._free:
                self._free.append(self._tails.popitem(last=False)[1].slot)
            ids = list(request.all_token_ids[full * self._block : known])
            self._tails[row] = Tail(full, _hash(request, full), ids, self._free.pop())
            self._copies.kept[self._tails[row].slot] = block_ids[full]
        return False, None

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> Copies:
        """Hand over what is to be copied."""
        copies, self._copies = self._copies, Copies()
        return copies

    # --- the model's

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Make room in each layer for blocks like vLLM's own; memory is taken as they are used."""
        caches = [_array(cache) for cache in kv_caches.values()]
        self._layers = [(cache, np.empty((self._slots, *cache.shape[1:]), cache.dtype)) for cache in caches]

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        """Copy what the forward pass may overwrite, and what it needs. vLLM calls this before each."""
        assert isinstance(kv_connector_metadata, Copies)
        kept, wanted = kv_connector_metadata.kept, kv_connector_metadata.wanted
        for cache, own in self._layers:
            for slot, block in kept.items():  # one by one: numpy would gather all elsewhere first
                own[slot] = cache[block]
            for block, slot in wanted.items():
                cache[block] = own[slot]

    def start_load_kv(self, forward_context: ForwardContext, **_: Any) -> None:
        """All is copied by then."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing is under way."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **_: Any) -> None:
        """Blocks are copied when their request has finished."""

    def wait_for_save(self) -> None:
        """Nothing is under way."""


def _array(tensor: torch.Tensor) -> np.ndarray:
    """Return a tensor's memory as numpy sees it, which copies a few blocks in a third of torch's time."""
    words = {1: torch.int8, 2: torch.int16, 4: torch.int32}[tensor.itemsize]  # numpy knows no bfloat16
    return tensor.view(words).numpy()


def _row(request: Request) -> str:
    return str((request.kv_transfer_params or {}).get("row", ""))


def _hash(request: Request, full: int) -> bytes | None:
    return request.block_hashes[full - 1] if full else None
