"""Token ids that grow at their end, and who read them last: long rows are not to be read again for each request."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn
from weakref import WeakSet


class GrowingIds(array):  # type: ignore[type-arg]
    """An array of token ids that is only appended to and cut back at its end: all else that would change it raises.

    Args:
        ids: What it begins with.
    """

    def __new__(cls, ids: Iterable[int] = ()) -> GrowingIds:
        """Make an array of C integers."""
        return super().__new__(cls, "i", ids)  # type: ignore[return-value]  # it is told to be a plain array

    def __init__(self, _: Iterable[int] = ()) -> None:
        self.watches = WeakSet[Watch]()

    def __deepcopy__(self, _: object) -> GrowingIds:
        """Return a copy, which an array would return as a plain one."""
        return GrowingIds(self)

    def __reduce_ex__(self, _: object) -> tuple[type[GrowingIds], tuple[Any]]:
        """Return what makes a copy, which nobody watches."""
        return GrowingIds, (array("i", self),)

    def cut(self, begin: int) -> None:
        """Drop all ids from an index on."""
        if not 0 <= begin <= len(self):
            raise IndexError(f"{len(self)} ids cannot be cut at {begin}")
        super().__delitem__(slice(begin, None))
        for watch in self.watches:
            watch.floor = min(watch.floor, begin)


def _refuse(*_: object) -> NoReturn:
    raise TypeError("growing ids are only appended to and cut at their end; make a plain array of them to change it")


for _name in ("__setitem__", "__delitem__", "__imul__", "insert", "pop", "remove", "reverse", "byteswap", "clear"):
    setattr(GrowingIds, _name, _refuse)


class Watch:
    """Tells a reader how much of what it read last still stands.

    Attributes:
        floor: How many ids have stood since the last call; lowered by each cut.
    """

    __slots__ = ("__weakref__", "_ids", "floor")

    def __init__(self) -> None:
        self._ids: GrowingIds | None = None
        self.floor = 0

    def unchanged(self, ids: Sequence[int]) -> int:
        """Return how many ids at the beginning are surely those of the last call: 0 where that is not known."""
        if ids is not self._ids:
            if self._ids is not None:
                self._ids.watches.discard(self)
            self._ids, self.floor = None, 0
            if isinstance(ids, GrowingIds):
                ids.watches.add(self)
                self._ids = ids
        begin, self.floor = self.floor, len(ids)
        return begin
