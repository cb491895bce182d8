"""Token ids that grow at their end, and who read them last: long rows are not to be read again for each request."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import NoReturn


class GrowingIds(array):  # type: ignore[type-arg]
    """An array of token ids that is only appended to and cut back at its end: all else that would change it raises.

    Args:
        ids: What it begins with.
    """

    def __new__(cls, ids: Iterable[int] = ()) -> GrowingIds:
        """Make an array of C integers."""
        return super().__new__(cls, "i", ids)  # type: ignore[return-value]  # it is told to be a plain array

    def __init__(self, _: Iterable[int] = ()) -> None:
        self.cuts: list[int] = []

    def __deepcopy__(self, _: object) -> GrowingIds:
        """Return a copy, which an array would return as a plain one."""
        return GrowingIds(self)

    def cut(self, begin: int) -> None:
        """Drop all ids from an index on."""
        if not 0 <= begin <= len(self):
            raise IndexError(f"{len(self)} ids cannot be cut at {begin}")
        super().__delitem__(slice(begin, None))
        self.cuts.append(begin)


def _refuse(*_: object) -> NoReturn:
    raise TypeError("growing ids are only appended to and cut at their end; make a plain array of them to change it")


for _name in ("__setitem__", "__delitem__", "__imul__", "insert", "pop", "remove", "reverse", "byteswap", "clear"):
    setattr(GrowingIds, _name, _refuse)


class Watch:
    """Tells a reader how much of what it read last still stands."""

    __slots__ = ("_cuts", "_ids", "_length")

    def __init__(self) -> None:
        self._ids: Sequence[int] | None = None
        self._cuts = self._length = 0

    def unchanged(self, ids: Sequence[int]) -> int:
        """Return how many ids at the beginning are surely those of the last call: 0 where that is not known."""
        if not isinstance(ids, GrowingIds):
            self._ids = None
            return 0
        begin = min([self._length, *ids.cuts[self._cuts :]]) if ids is self._ids else 0
        self._ids, self._cuts, self._length = ids, len(ids.cuts), len(ids)
        return begin
