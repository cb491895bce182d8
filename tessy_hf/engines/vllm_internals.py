"""Reuse a row's block hashes from request to request: the only code of ours that is not vLLM's public API.

vLLM looks cached blocks up by their hashes, and hashes the whole prompt of each request, so hashing costs O(n²) over a
row that is written in short requests. But a row's prompt begins with its last prompt: only new blocks need hashing.
The processor time to add a request with 10,000 cached tokens falls to a third, with 40,000 to a sixth
(``benchmarks/chunk.py``). Outputs are the same.

vLLM's internals may change in any release. They are used only in :data:`TESTED_VERSIONS` and after a check with the
installed vLLM; everywhere else vLLM hashes each prompt itself. ``TESSY_VLLM_INTERNALS=0`` turns them off.
"""

from __future__ import annotations

import os
from array import array
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm import LLMEngine
    from vllm.v1.request import Request

TESTED_VERSIONS = ("0.32.", "0.33.")

SWITCH = "TESSY_VLLM_INTERNALS"
"""Environment variable; ``0`` restricts us to vLLM's public API."""

MAX_ROWS = 1024
"""Rows whose hashes are kept, about 8 bytes a token; the least recently used are dropped."""


class BlockHashes:
    """Block hashes of each row's last prompt, installed in a vLLM engine.

    Args:
        engine: An engine whose core runs in this process.

    Attributes:
        fallback: Why vLLM hashes each prompt itself; ``None`` where it does not have to.
    """

    def __init__(self, engine: LLMEngine) -> None:
        self._rows: OrderedDict[str, tuple[array[int], list[bytes]]] = OrderedDict()
        self._adding: tuple[str, array[int]] | None = None
        self.fallback = self._install(engine)

    def _install(self, engine: LLMEngine) -> str | None:
        """Replace the core's hash function. Returns why it was not done."""
        from vllm import __version__ as version

        if os.environ.get(SWITCH) == "0":
            return f"{SWITCH}=0"
        if not version.startswith(TESTED_VERSIONS):
            return f"block hashes are reused in vLLM {', '.join(f'{v}x' for v in TESTED_VERSIONS)}; this is {version}"
        try:
            core = engine.engine_core.engine_core
            self._hash_blocks = core.request_block_hasher
            if self._hash_blocks is not None:  # None: prefix caching is off, nothing is hashed
                self._check()
                core.request_block_hasher = self
        except (AttributeError, ImportError, TypeError, ValueError) as error:
            return f"the internals of vLLM {version} are not as expected: {error}"
        return None

    def _check(self) -> None:
        """Hash a prompt as two requests of a row, and at once.

        Raises:
            ValueError: The hashes differ.
        """
        from vllm import SamplingParams
        from vllm.v1.request import Request

        def hashes(ids: list[int], block_hasher: object) -> list[bytes]:
            params = SamplingParams(max_tokens=1)
            request = Request(
                request_id="check",
                prompt_token_ids=ids,
                sampling_params=params,
                pooling_params=None,
                block_hasher=block_hasher,
            )
            return list(request.block_hashes)

        ids = list(range(4096))
        for end in (2048, 4096):
            with self.adding("check", array("i", ids[:end])):
                grown = hashes(ids[:end], self)
        if not grown or grown != hashes(ids, self._hash_blocks):
            raise ValueError("a prompt hashed in two steps has other hashes than one hashed at once")
        self._rows.clear()

    @contextmanager
    def adding(self, row: str, prompt_ids: array[int]) -> Iterator[None]:
        """While the context is open, the request that vLLM creates belongs to ``row`` and has this prompt."""
        self._adding = row, prompt_ids
        try:
            yield
        finally:
            self._adding = None

    def __call__(self, request: Request) -> list[bytes]:
        """Return the hashes of the request's full blocks that it does not have yet. vLLM appends them to it."""
        if self._adding is None:  # it has generated tokens
            new: list[bytes] = self._hash_blocks(request)
            return new
        (row, ids), self._adding = self._adding, None
        last_ids, known = self._rows.pop(row, (ids, []))
        if ids[: len(last_ids)] == last_ids:
            request.block_hashes += known
        new = self._hash_blocks(request)
        self._rows[row] = ids, [*request.block_hashes, *new]
        if len(self._rows) > MAX_ROWS:
            self._rows.popitem(last=False)
        return new
