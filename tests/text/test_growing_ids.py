"""Readers of a long row look only at what has changed, and miss nothing."""

import copy
import gc
import json
import operator
import pickle
from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tessy_hf.engines.encoded_prompt import EncodedPrompt
from tessy_hf.text.growing_ids import GrowingIds, Watch
from tessy_hf.vllm_middleware.frames import HashedIds

IDS = st.lists(st.integers(0, 3), max_size=6)  # few values: what replaces an id is often the same
EDITS = st.lists(st.tuples(st.integers(0, 8), IDS, st.booleans()), max_size=30)
LOOKS = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 8), IDS, st.sets(st.integers(0, 2))), max_size=30)


@given(IDS, EDITS)
def test_a_watch_never_calls_changed_ids_unchanged(begin, edits):
    ids, watch, seen = GrowingIds(begin), Watch(), []
    for removed, added, looks in edits:
        if removed:
            ids.cut(max(0, len(ids) - removed))
        ids.extend(added)
        if looks:
            unchanged = watch.unchanged(ids)
            assert list(ids[:unchanged]) == seen[:unchanged]
            assert len(seen) >= unchanged
            seen = list(ids)


@given(IDS, IDS, LOOKS)
def test_each_of_several_watches_knows_what_it_saw(one, other, looks):
    rows, watches = [GrowingIds(one), GrowingIds(other)], [Watch() for _ in range(3)]
    seen, floors = [[None, []] for _ in watches], [0] * 3  # whose ids each saw, and how many of them still stand
    for row, removed, added, who in looks:
        ids = rows[row]
        ids.cut(kept := max(0, len(ids) - removed))
        ids.extend(added)
        floors = [min(floor, kept) if last[0] == row else floor for floor, last in zip(floors, seen, strict=True)]
        for at in who:
            before, saw = seen[at]
            unchanged = watches[at].unchanged(ids)
            assert unchanged == (floors[at] if before == row else 0)
            assert list(ids[:unchanged]) == saw[:unchanged]
            seen[at], floors[at] = [row, list(ids)], len(ids)


def test_a_watch_that_is_dropped_or_looks_elsewhere_leaves_nothing_behind():
    ids, other, dropped, moved, copied = GrowingIds([1, 2]), GrowingIds(), Watch(), Watch(), Watch()
    for watch in (dropped, moved, copied):
        watch.unchanged(ids)
    del dropped, watch
    gc.collect()
    assert set(ids.watches) == {moved, copied}
    moved.unchanged(other)
    copied.unchanged(array("i", [1, 2]))
    assert not ids.watches and set(other.watches) == {moved}


def test_cuts_are_not_kept():
    ids, watch = GrowingIds([1, 2, 3]), Watch()
    watch.unchanged(ids)
    before = len(pickle.dumps(ids.__dict__ | {"watches": None}))
    for _ in range(100):
        ids.cut(2)
        ids.append(3)
    assert len(pickle.dumps(ids.__dict__ | {"watches": None})) == before


@given(IDS, EDITS)
def test_copies_of_growing_ids_are_those_of_plain_ones(begin, edits):
    ids, watch, hashed, fresh = GrowingIds(begin), Watch(), HashedIds(), HashedIds()
    prompt = EncodedPrompt()
    for removed, added, looks in edits:
        ids.cut(max(0, len(ids) - removed))
        ids.extend(added)
        if looks:
            common = hashed.common(ids, watch.unchanged(ids))
            assert common == hashed.common(list(ids))
            hashed.replace(common, ids[common:])
            fresh.replace(0, list(ids))
            assert hashed.checksum() == fresh.checksum()
            assert json.loads(prompt.update(ids)) == list(ids)


def test_only_what_changed_is_looked_at():
    ids, watch = GrowingIds(range(100)), Watch()
    assert watch.unchanged(ids) == 0
    ids.extend([1, 2, 3])
    assert watch.unchanged(ids) == 100
    ids.cut(98)
    ids.extend([98, 99, 1, 2])
    assert watch.unchanged(ids) == 98
    assert watch.unchanged(ids) == 102


def test_other_ids_and_plain_arrays_are_read_whole():
    ids, watch = GrowingIds([1, 2, 3]), Watch()
    watch.unchanged(ids)
    assert watch.unchanged(GrowingIds([1, 2, 3])) == 0
    assert watch.unchanged(ids) == 0
    assert watch.unchanged(array("i", ids)) == 0
    assert watch.unchanged(ids) == 0


CHANGES = {
    "an id": lambda ids: operator.setitem(ids, 0, 9),
    "a slice": lambda ids: operator.setitem(ids, slice(0, 1), array("i", [9])),
    "del": lambda ids: operator.delitem(ids, 0),
    "*=": lambda ids: operator.imul(ids, 2),
    "insert": lambda ids: ids.insert(0, 9),
    "pop": lambda ids: ids.pop(),
    "remove": lambda ids: ids.remove(1),
    "reverse": lambda ids: ids.reverse(),
    "byteswap": lambda ids: ids.byteswap(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_ids_change_in_no_other_way(change):
    ids = GrowingIds([1, 2, 3])
    with pytest.raises(TypeError, match="only appended to and cut"):
        change(ids)
    assert list(ids) == [1, 2, 3]


@pytest.mark.parametrize("begin", [-1, 4])
def test_ids_are_not_cut_outside(begin):
    with pytest.raises(IndexError, match=f"3 ids cannot be cut at {begin}"):
        GrowingIds([1, 2, 3]).cut(begin)


def test_ids_grow_by_all_that_appends():
    ids = GrowingIds([1])
    ids.append(2)
    ids += array("i", [3])
    ids.extend([4])
    ids.fromlist([5])
    assert list(ids) == [1, 2, 3, 4, 5] and ids == array("i", [1, 2, 3, 4, 5]) and isinstance(ids, GrowingIds)


def test_copies_can_be_cut():
    ids = GrowingIds([1, 2, 3])
    watch = Watch()
    ids.cut(2)
    watch.unchanged(ids)
    for other in (copy.deepcopy(ids), pickle.loads(pickle.dumps(ids))):
        assert type(other) is GrowingIds and not other.watches
        other.cut(1)
        assert list(other) == [1]
    assert list(ids) == [1, 2] and watch.unchanged(ids) == 2
