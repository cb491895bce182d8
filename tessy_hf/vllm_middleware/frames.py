"""What client and server send each other over a WebSocket: binary frames, with only the new end of each prompt.

The client names a row by a slot and sends where its new ids begin, the new ids, and a checksum of the whole prompt.
The server uses a prompt only where its checksum is the same; else it says so and gets the whole. A message has one or
more frames. Knows no sockets.
"""

from __future__ import annotations

import asyncio
import struct
from array import array
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

PATH = "/v1/deltas/2"
"""With the version of what is sent; below ``/v1``, which vLLM's own authentication guards."""

BLOCK = 256
"""Tokens for each of which a checksum is kept, so that one is told from its last block alone."""

TOKEN_BYTES, ROW_BYTES = 13, 500
"""What a kept row takes in the server: 4 bytes a token, 8 for a reference, and its checksums."""

MESSAGE_BYTES = 1 << 20
"""The most that frames are joined to: uvicorn, under vLLM, closes a WebSocket at a message of more than 16 MiB."""

PROFILE, REQUEST, CANCEL = 0, 1, 2
"""Kinds of frames to the server."""

ANSWER, UNKNOWN, ERROR = 0, 1, 2
"""Kinds of frames to the client."""

GOES_ON, STOPPED, OUT_OF_TOKENS = 0, 1, 2
"""Whether an answer goes on, ended by itself, or at ``max_tokens``."""

AT = 1 << 16

HEAD = struct.Struct("<BxHI")  # kind; profile or status; request
_REQUEST = struct.Struct("<BBHIIIIqq8s")
_ANSWER = struct.Struct("<BBHIi")
_LENGTH = struct.Struct("<I")


def join(frames: Iterable[bytes]) -> bytes:
    """Return a message: frames, each behind its length."""
    return b"".join(part for frame in frames for part in (_LENGTH.pack(len(frame)), frame))


def split(message: bytes) -> list[bytes]:
    """Return the frames of a message.

    Raises:
        ValueError: It is cut off.
    """
    frames, at = [], 0
    while at < len(message):
        length = int.from_bytes(message[at : at + _LENGTH.size], "little")
        begin = at + _LENGTH.size
        at = begin + length
        if at > len(message):
            raise ValueError(f"a frame of {length} bytes is cut off after {max(0, len(message) - begin)}")
        frames.append(message[begin:at])
    return frames


class SendQueue:
    """Sends the frames of one turn of the event loop as few messages: a message costs more than what is in it.

    A frame is never divided; one of more than ``MESSAGE_BYTES`` is a message of its own.

    Args:
        send: Sends a message.
    """

    def __init__(self, send: Callable[[bytes], Awaitable[None]]) -> None:
        self._send, self._frames = send, deque[bytes]()
        self._sending: asyncio.Task[None] | None = None
        self._closed = False

    def put(self, frame: bytes) -> None:
        """Send a frame soon, after those that were put before."""
        self._frames.append(frame)
        if self._sending is None and not self._closed:
            self._sending = asyncio.create_task(self._send_all())

    def close(self) -> None:
        """Send nothing more."""
        self._closed = True
        if self._sending is not None:
            self._sending.cancel()

    async def _send_all(self) -> None:
        try:
            while self._frames:
                frames = [self._frames.popleft()]
                size = len(frames[0])
                while self._frames and (size := size + len(self._frames[0])) <= MESSAGE_BYTES:
                    frames.append(self._frames.popleft())
                await self._send(join(frames))
        finally:
            self._sending = None


class HashedIds:
    """Token ids that change at their end, with a checksum of all of them that costs no more than what changed."""

    def __init__(self) -> None:
        self.ids = array("i")
        self._blocks = [b""]  # the checksum of so many full blocks

    def replace(self, begin: int, new: Sequence[int]) -> None:
        """Put new ids in place of all from an index on."""
        del self.ids[begin:], self._blocks[begin // BLOCK + 1 :]
        self.ids.extend(new)

    def common(self, ids: Sequence[int], begin: int = 0) -> int:
        """Return how many ids both begin with, of which the first ``begin`` are known to be the same."""
        most = min(len(ids), len(self.ids))
        differ = np.asarray(self.ids)[begin:most] != np.asarray(ids)[begin:most]
        return begin + int(differ.argmax()) if differ.any() else most

    def checksum(self) -> bytes:
        """Return the checksum of all ids."""
        blocks = self._blocks
        for begin in range((len(blocks) - 1) * BLOCK, len(self.ids) - BLOCK + 1, BLOCK):
            blocks.append(_hash(blocks[-1], self.ids[begin : begin + BLOCK]))
        return _hash(blocks[-1], self.ids[(len(blocks) - 1) * BLOCK :])


def _bytes(ids: Sequence[int]) -> bytes:
    return array("i", ids).tobytes()


def _hash(before: bytes, ids: array[int]) -> bytes:
    return blake2b(before + ids.tobytes(), digest_size=8).digest()


@dataclass(frozen=True, slots=True)
class Ask:
    """A request as it is sent: with the new end of its row.

    Attributes:
        number: Names the request on its connection.
        profile: Names its sampling parameters, sent before.
        max_tokens: The most new tokens wanted.
        seed: Its seed; -1 for none.
        priority: Lower is served first, where the server schedules by priority.
        stream: Whether tokens are sent as they come.
        slot: Names the row on its connection.
        begin: How many ids of the row the server is to have already.
        checksum: Of all ids.
        new: The ids that follow.
    """

    number: int
    profile: int
    max_tokens: int
    seed: int
    priority: int
    stream: bool
    slot: int
    begin: int
    checksum: bytes
    new: array[int]

    def encode(self) -> bytes:
        """Return the frame."""
        head = (REQUEST, self.stream, self.profile, self.number, self.slot, self.begin)
        rest = (self.max_tokens, self.seed, self.priority, self.checksum)
        return _REQUEST.pack(*head, *rest) + self.new.tobytes()

    @classmethod
    def decode(cls, frame: bytes) -> Ask:
        """Read a frame."""
        _, stream, profile, number, slot, begin, most, seed, priority, checksum = _REQUEST.unpack_from(frame)
        new = array("i", frame[_REQUEST.size :])
        return cls(number, profile, most, seed, priority, bool(stream), slot, begin, checksum, new)


@dataclass(frozen=True, slots=True)
class Piece:
    """New tokens of a request.

    Attributes:
        number: The request.
        ending: How it goes on or ended.
        at: How many tokens of the answer came before, modulo 65,536: none is taken twice or left out.
        uncached: How much of the prompt was not cached; -1 where that is not told.
        ids: The tokens.
    """

    number: int
    ending: int
    at: int
    uncached: int
    ids: Sequence[int]

    def encode(self) -> bytes:
        """Return the frame."""
        return _ANSWER.pack(ANSWER, self.ending, self.at % AT, self.number, self.uncached) + _bytes(self.ids)

    @classmethod
    def decode(cls, frame: bytes) -> Piece:
        """Read a frame."""
        _, ending, at, number, uncached = _ANSWER.unpack_from(frame)
        return cls(number, ending, at, uncached, array("i", frame[_ANSWER.size :]).tolist())


class Row:
    """A kept row: its ids with their checksum, and as a list, which vLLM wants."""

    def __init__(self) -> None:
        self.hashed, self.ids = HashedIds(), list[int]()

    @property
    def bytes(self) -> int:
        """The memory it takes, about."""
        return ROW_BYTES + TOKEN_BYTES * len(self.ids)


class Rows:
    """The rows of all connections of a server process, of which those asked for longest ago are forgotten.

    Args:
        most_bytes: The memory that they may take.
    """

    def __init__(self, most_bytes: int) -> None:
        self._rows: OrderedDict[tuple[object, int], Row] = OrderedDict()
        self._bytes, self._most_bytes = 0, most_bytes
        self._same: dict[int, int] = {}  # one object for each id, or a list takes 40 bytes a token

    def prompt(self, connection: object, ask: Ask) -> list[int] | None:
        """Return the whole prompt of a request; ``None`` where it is not known.

        Nothing else than what the client meant is returned: its checksum is over the whole.
        """
        if (row := self._rows.pop((connection, ask.slot), None)) is not None:
            self._bytes -= row.bytes
        else:
            row = Row()
        if ask.begin > len(row.ids):
            return None
        row.hashed.replace(ask.begin, ask.new)
        if row.hashed.checksum() != ask.checksum:
            return None
        row.ids[ask.begin :] = map(self._same.setdefault, ask.new, ask.new)
        self._rows[connection, ask.slot] = row
        self._bytes += row.bytes
        self._evict()
        return row.ids.copy()

    def drop(self, connection: object) -> None:
        """Forget the rows of a connection that was closed."""
        for key in [key for key in self._rows if key[0] is connection]:
            self._bytes -= self._rows.pop(key).bytes

    def _evict(self) -> None:
        while self._bytes > self._most_bytes and len(self._rows) > 1:
            _, row = self._rows.popitem(last=False)
            self._bytes -= row.bytes
        if len(self._same) > 1 << 20:  # more than any vocabulary has
            self._same.clear()
