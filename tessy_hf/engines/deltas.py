"""Ask a vLLM server that runs :class:`tessy_hf.vllm_middleware.Deltas`: one WebSocket, and only the new end of a row.

A request goes in; answers come out as `/inference/v1/generate` words them. A row keeps its connection, and so the
server process that knows it; after a break all is sent once more. Knows no other servers.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import struct
import zlib
from array import array
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable
from typing import Any, NamedTuple

import aiohttp

from tessy_hf.engines.base import Request
from tessy_hf.engines.completions_api import MOST_ROWS, AnswerError, sampling, seed
from tessy_hf.engines.connections import Connections, ReplicaError
from tessy_hf.retries import TRANSIENT_STATUSES
from tessy_hf.text.growing_ids import Watch
from tessy_hf.vllm_middleware import frames
from tessy_hf.vllm_middleware.frames import HEAD, Ask, HashedIds, Piece

CONNECTIONS = 4
"""WebSockets to each server: a server of several processes (``--api-server-count``) takes each in one of them."""

REASONS = {frames.GOES_ON: None, frames.STOPPED: "stop", frames.OUT_OF_TOKENS: "length"}

UNAUTHORIZED = frozenset({401, 402})
"""What a server answers to a handshake whose key it does not know."""

RESENDS = 8
"""After so many resends for each row of a connection a server is said to forget too much: restarts take one each."""

FORGETS = (
    "The server at %s keeps forgetting rows: for %d rows of a connection, %d prompts were sent whole again. Give it "
    "more memory for rows: TESSY_DELTAS_MIB in its environment."
)

logger = logging.getLogger(__name__)


class NoDeltasError(ReplicaError):
    """A server refuses WebSockets, and not for the key: it has no middleware (Starlette answers 403), or no longer."""


class Deltas:
    """The connections to all servers that are asked so, each opened when it is needed."""

    def __init__(self, connections: Connections) -> None:
        self._connections = connections
        self._channels: dict[tuple[str, int], asyncio.Future[_Channel]] = {}

    async def answers(self, server: str, request: Request, *, stream: bool) -> AsyncGenerator[list[Any], None]:
        """Yield what a server answers, those that arrive together in one list.

        Raises:
            ReplicaError: No answer arrived: kind ``down`` or ``lost``.
            AnswerError: The server refuses the request, or WebSockets.
        """
        channel = await self._channel(server, request.row)
        number = next(channel.numbers) % (1 << 32)
        inbox = channel.inboxes[number] = asyncio.Queue[bytes | None]()
        at, resent, ended, unknown = 0, False, False, HEAD.pack(frames.UNKNOWN, 0, number)
        try:
            channel.ask(request, number, stream)
            while not ended:
                async with self._connections.limits(server):
                    arrived = [await inbox.get()]
                while not inbox.empty():
                    arrived.append(inbox.get_nowait())
                if unknown in arrived:
                    if resent:
                        raise AnswerError("does not take a prompt that was sent whole")
                    channel.ask_again(request, number, stream)
                    resent = True
                    continue
                answers = []
                while arrived and not ended:
                    piece = _piece(channel, arrived.pop(0))
                    if piece.at != at % frames.AT:
                        raise ReplicaError(f"The server at {server} left a piece of its answer out.", "lost")
                    at, ended = at + len(piece.ids), piece.ending != frames.GOES_ON
                    answers.append(_answer(piece, request))
                yield answers
        except AnswerError:
            ended = True
            raise
        finally:
            del channel.inboxes[number]
            if not ended:
                channel.cancel(number)

    async def connect(self, server: str, row: str) -> None:
        """Open the connection of a row, if it is not.

        Raises:
            NoDeltasError: The server has no middleware.
        """
        await self._channel(server, row)

    def release(self, row: str) -> None:
        """Forget a row."""
        for channel in self._open_channels():
            channel.release(row)

    async def close(self) -> None:
        """Close all connections."""
        for channel in self._open_channels():
            await channel.close()
        for opened in self._channels.values():
            opened.cancel()

    def _open_channels(self) -> list[_Channel]:
        done = (each for each in self._channels.values() if each.done() and not each.cancelled())
        return [each.result() for each in done if each.exception() is None]

    async def _channel(self, server: str, row: str) -> _Channel:
        key = server, zlib.crc32(row.encode("utf-8", "surrogatepass")) % CONNECTIONS
        opened = self._channels.get(key)
        if opened is None or opened.done() and (opened.exception() or opened.result().reading.done()):
            opened = self._channels[key] = asyncio.ensure_future(self._open(server))
        return opened.result() if opened.done() else await asyncio.shield(opened)

    async def _open(self, server: str) -> _Channel:
        url = server.removesuffix("/v1") + frames.PATH
        try:
            return _Channel(server, await self._connections.websocket(server, url), self._redacted)
        except aiohttp.WSServerHandshakeError as error:
            if error.status in UNAUTHORIZED or error.status in TRANSIENT_STATUSES:
                raise AnswerError("refused a WebSocket", error.status, self._redacted(error.message)) from None
            refused = f"The server at {server} refused a WebSocket (status {error.status})"
            raise NoDeltasError(f"{refused}: it has no middleware Deltas.", "invalid") from None

    def _redacted(self, words: str) -> str:
        return self._connections.redact(words.encode()).decode()


class _Slot(NamedTuple):
    """What the server knows of a row, by what number, and how much of it stands."""

    number: int
    known: HashedIds
    watch: Watch


class _Channel:
    """One connection: what the server knows by it, and who waits for an answer."""

    def __init__(self, server: str, socket: aiohttp.ClientWebSocketResponse, redacted: Callable[[str], str]) -> None:
        self.numbers, self.inboxes = itertools.count(), dict[int, asyncio.Queue[bytes | None]]()
        self.server, self.broken = server, ""  # and why the connection broke off
        self._socket, self.redacted = socket, redacted
        self._slots: OrderedDict[str, _Slot] = OrderedDict()
        self._free: list[int] = []
        self._profiles: dict[tuple[Any, ...], int] = {}
        self._resent, self._forgets = 0, False  # prompts that were sent whole again; whether too many were
        self._outgoing = frames.SendQueue(self._send)
        self.reading = asyncio.create_task(self._read())

    def ask(self, request: Request, number: int, stream: bool) -> None:
        """Send a request, of its prompt what the server does not have."""
        of = (request.temperature, request.top_p, request.top_k, request.min_p, request.repetition_penalty)
        profile = self._profiles.get((*of, request.stop_ids))
        if profile is None:
            profile = self._profiles[*of, request.stop_ids] = len(self._profiles)
            self._outgoing.put(HEAD.pack(frames.PROFILE, profile, 0) + sampling(request))
        slot, known, watch = self._slot(request.row)
        begin = known.common(request.prompt_ids, watch.unchanged(request.prompt_ids))
        new = array("i", request.prompt_ids[begin:])
        known.replace(begin, new)
        ask = Ask(
            number,
            profile,
            request.max_tokens,
            seed(request),
            request.order,
            stream,
            slot,
            begin,
            known.checksum(),
            new,
        )
        self._outgoing.put(ask.encode())

    def ask_again(self, request: Request, number: int, stream: bool) -> None:
        """Send a request with its whole prompt, which the server has forgotten."""
        self._resent += 1
        if self._resent.bit_count() == 1:
            logger.info("The server at %s did not know %d prompts; they were sent again.", self.server, self._resent)
        slots = len(self._slots) + len(self._free)
        if not self._forgets and self._resent > RESENDS * slots:
            self._forgets = True
            logger.warning(FORGETS, self.server, slots, self._resent)
        slot = self._slot(request.row)
        self._slots[request.row] = _Slot(slot.number, HashedIds(), Watch())
        self.ask(request, number, stream)

    def cancel(self, number: int) -> None:
        """Take a request back."""
        self._outgoing.put(HEAD.pack(frames.CANCEL, 0, number))

    def release(self, row: str) -> None:
        """Let another row have a row's slot."""
        if (slot := self._slots.pop(row, None)) is not None:
            self._free.append(slot.number)

    async def close(self) -> None:
        self._outgoing.close()
        self.reading.cancel()
        await self._socket.close()

    def _slot(self, row: str) -> _Slot:
        if row not in self._slots:
            if len(self._slots) >= MOST_ROWS:
                self.release(next(iter(self._slots)))
            number = self._free.pop() if self._free else len(self._slots)
            self._slots[row] = _Slot(number, HashedIds(), Watch())
        self._slots.move_to_end(row)
        return self._slots[row]

    async def _send(self, message: bytes) -> None:
        try:
            await self._socket.send_bytes(message)
        except (aiohttp.ClientError, ConnectionError):
            await asyncio.wait([self.reading], timeout=1.0)  # it hears why
            self._tell_broken()

    async def _read(self) -> None:
        """Hand out what arrives; once the connection breaks, tell all who wait."""
        try:
            while (message := await self._socket.receive()).type is aiohttp.WSMsgType.BINARY:
                for frame in frames.split(message.data):
                    inbox = self.inboxes.get(HEAD.unpack_from(frame.ljust(HEAD.size))[2])
                    if inbox is not None:  # else it was taken back
                        inbox.put_nowait(frame)
            self.broken = self.redacted(_closed(message))
        except ValueError as error:
            logger.warning("The server at %s sent a message that cannot be read: %s.", self.server, error)
        finally:
            await self._socket.close()
            self._tell_broken()

    def _tell_broken(self) -> None:
        for inbox in self.inboxes.values():
            inbox.put_nowait(None)


def _closed(message: aiohttp.WSMessage) -> str:
    """Return the code and reason with which a connection was closed, or the error that broke it; empty for none."""
    if message.type is aiohttp.WSMsgType.CLOSE:
        return f" (code {message.data}: {message.extra})" if message.extra else f" (code {message.data})"
    return f" ({message.data!r})" if message.type is aiohttp.WSMsgType.ERROR else ""


def _piece(channel: _Channel, frame: bytes | None) -> Piece:
    if frame is None:
        raise ReplicaError(f"The server at {channel.server} broke the connection off{channel.broken}.", "lost")
    kind, status, _ = HEAD.unpack_from(frame)
    if kind == frames.ERROR:
        words = channel.redacted(frame[HEAD.size :].decode(errors="replace"))
        raise AnswerError(f"answered with an error: {words!r}", status, words)
    try:
        return Piece.decode(frame)
    except (struct.error, ValueError) as error:
        raise AnswerError(f"sent {len(frame)} bytes that are no answer") from error


def _answer(piece: Piece, request: Request) -> dict[str, Any]:
    """Return a piece as `/inference/v1/generate` words it."""
    choice, tokens = {"token_ids": piece.ids, "finish_reason": REASONS.get(piece.ending)}, len(request.prompt_ids)
    usage = {"prompt_tokens": tokens, "prompt_tokens_details": {"cached_tokens": tokens - piece.uncached}}
    return {"choices": [choice], "usage": usage if piece.uncached >= 0 else None}
