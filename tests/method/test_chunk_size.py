"""Chunks that fit the spans."""

import pytest

from tessy_hf.method.chunk_size import CANDIDATES, MEMORY, PRIOR, REQUEST_COST, ChunkSizes


def cost(lengths, size):
    """What turns of these lengths cost in chunks of one size: whole chunks, and a request each."""
    return sum(-(-length // size) * (size + REQUEST_COST) for length in lengths)


def after(*lengths, author="student"):
    sizes = ChunkSizes(None)
    for length in lengths:
        sizes.observe(author, length)
    return sizes


def test_a_fixed_size_is_always_that():
    sizes = ChunkSizes(20)
    sizes.observe("teacher", 3)
    assert [sizes.next("teacher", so_far) for so_far in (0, 7, 500)] == [20, 20, 20]


@pytest.mark.parametrize("lengths", [(5,) * MEMORY, (60,) * MEMORY, (3, 40) * MEMORY, tuple(range(4, 30))])
def test_the_size_is_the_one_that_costs_least_for_turns_like_the_last_ones(lengths):
    best = min(CANDIDATES, key=lambda size: cost(lengths[-MEMORY:], size))
    assert after(*lengths).next("student", 0) == best


def test_each_author_has_its_own():
    sizes = after(*[4] * MEMORY)
    for _ in range(MEMORY):
        sizes.observe("teacher", 61)
    assert sizes.next("student", 0) == 4 and sizes.next("teacher", 0) == 64


def test_what_is_left_of_a_turn_decides_about_its_next_chunk():
    sizes = after(*[4, 65] * MEMORY)
    assert sizes.next("student", 4) == 64 > sizes.next("student", 0)
    assert sizes.next("student", 60) == 6
    longest = min(CANDIDATES, key=lambda size: cost([65], size))
    assert sizes.next("student", 1000) == longest, "a turn longer than all others goes on like the longest"


def test_it_begins_with_a_guess():
    assert ChunkSizes(None).next("teacher", 0) == min(CANDIDATES, key=lambda size: cost(PRIOR["teacher"], size))
