from array import array

import pytest
import torch
from transformers import DynamicCache

from tessy_hf.engines.kv_pool import ROOM, KVPool

HEADS, SIZES = (2, 1), ((3, 2), (4, 4))  # of two layers: heads, and sizes of a key and of a value


def states(ids, layer, kind):
    """Keys or values that tell whose they are: of shape (rows, heads, columns, size)."""
    one = torch.tensor(ids, dtype=torch.float32)[:, None, :, None] * 10 + layer
    return one.expand(-1, HEADS[layer], -1, SIZES[layer][kind]) * (-1 if kind else 1)


def read(batch):
    """Do what a network does to a batch's cache: append a key and a value for each id that is read."""
    for layer in range(2):
        batch.cache.update(*(states(batch.ids.tolist(), layer, kind) for kind in (0, 1)), layer)


def cached(batch):
    """The ids whose keys and values a batch's cache begins with, by row; both layers must agree."""
    found = [[] for _ in batch.rows]
    for layer, own in enumerate(batch.cache.layers):
        for row, begin in enumerate(batch.begins):
            keys, values = own.keys[row : row + 1, :, begin:], own.values[row : row + 1, :, begin:]
            ids = ((keys[:, 0, :, 0] - layer) / 10).int().tolist()
            torch.testing.assert_close((keys, values), (states(ids, layer, 0), states(ids, layer, 1)))
            assert layer == 0 or ids[0] == found[row]
            found[row] = ids[0]
    return found


@pytest.fixture
def pool():
    sample = DynamicCache()
    for layer in range(2):
        sample.update(states([[0]], layer, 0), states([[0]], layer, 1), layer)
    return KVPool(sample)


def write(pool, texts):
    """Read rows whole, as one batch, and keep them."""
    rows = [pool.open(key, ids) for key, ids in texts.items()]
    batch = pool.batch(rows, [len(row.ids) for row in rows])
    read(batch)
    pool.store(batch)
    return rows


def test_a_token_takes_what_its_keys_and_values_take(pool):
    assert pool.token_bytes == 4 * (2 * (3 + 2) + 1 * (4 + 4))


def test_new_rows_are_aligned_at_their_last_id(pool):
    rows = [pool.open("a", [5, 6, 7]), pool.open("b", [8])]
    batch = pool.batch(rows, [3, 1])
    assert batch.ids.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert batch.positions.tolist() == [[0, 1, 2], [0, 0, 0]]
    assert batch.mask.tolist() == [[1, 1, 1], [0, 0, 1]]


def test_kept_and_new_ids_stand_side_by_side_without_a_gap(pool):
    write(pool, {"long": range(10, 20), "short": [1, 2, 3]})
    rows = [pool.open("long", [*range(10, 20), 50]), pool.open("short", [1, 2, 3, 4, 5, 6])]
    assert [row.kept for row in rows] == [10, 3]
    batch = pool.batch(rows, [11, 6])
    assert batch.ids.tolist() == [[18, 19, 50], [4, 5, 6]]
    assert batch.positions.tolist() == [[8, 9, 10], [3, 4, 5]]
    assert cached(batch) == [[*range(10, 18)], [1, 2, 3]]
    assert batch.mask.tolist() == [[1] * 11, [0] * 5 + [1] * 6]


def test_the_next_token_of_each_row_comes_behind_it(pool):
    batch = pool.batch([pool.open("a", [5, 6, 7]), pool.open("b", [8])], [3, 1])
    batch.append(torch.tensor([9, 10]))
    assert batch.ids.tolist() == [[9], [10]] and batch.positions.tolist() == [[3], [1]]
    assert batch.mask.tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]


def test_what_was_written_and_read_is_kept_and_the_rest_is_not(pool):
    """The last drawn token has no key yet; what a row went on with after its end is not its own."""
    rows = [pool.open("goes on", [5, 6]), pool.open("ended", [8])]
    batch = pool.batch(rows, [2, 1])
    for tokens in ([20, 30], [21, 31], [22, 32]):
        read(batch)
        batch.append(torch.tensor(tokens))
    rows[0].ids.extend([20, 21, 22])
    rows[1].ids.extend([30])
    pool.store(batch)
    assert [row.kept for row in rows] == [4, 2]
    after = [pool.open("goes on", [5, 6, 20, 21, 22, 1]), pool.open("ended", [8, 30, 99])]
    assert [row.kept for row in after] == [4, 2]
    assert cached(pool.batch(after, [6, 3])) == [[5, 6, 20, 21], [8]]


def test_a_rolled_back_row_keeps_its_beginning(pool):
    write(pool, {"a": range(1, 9)})
    assert pool.open("a", [1, 2, 3, 77, 5, 6]).kept == 3
    assert pool.open("a", [1, 2, 3]).kept == 2  # one is left to read: its logits are needed
    write(pool, {"a": [1, 2, 3, 77]})
    row = pool.open("a", [1, 2, 3, 77, 5])
    assert row.kept == 4 and cached(pool.batch([row], [5])) == [[1, 2, 3, 77]]


def test_a_row_outgrows_its_room(pool):
    ids = array("i")
    for step in range(3):
        ids.extend(range(step * 1000, step * 1000 + ROOM))
        write(pool, {"a": ids})
    assert cached(pool.batch([pool.open("a", [*ids, 1])], [len(ids) + 1])) == [list(ids)]


def test_a_released_row_is_read_anew(pool):
    write(pool, {"a": [1, 2, 3]})
    pool.release("a")
    pool.release("never seen")
    assert pool.open("a", [1, 2, 3, 4]).kept == 0
