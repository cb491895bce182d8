"""An OpenAI-compatible HTTP endpoint: requests in, rows of a run out, as one body or as server-sent events.

Starlette and uvicorn speak HTTP; the run writes the rows, on its own loop and in its own window. A client that goes
away stops its row; more requests than may wait are answered with 429.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from tessy_hf.engines.base import derive_seed
from tessy_hf.errors import EngineDeadError, PromptError, SettingsError
from tessy_hf.rows.prompt import PromptReader
from tessy_hf.run.synthesis import Asked as Row
from tessy_hf.serve.protocol import Asked, ChatRequest, CompletionRequest, Reply, Stops
from tessy_hf.trajectory import Author, Draft, Prompt, Span

if TYPE_CHECKING:
    from tessy_hf.run.runner import Run
    from tessy_hf.transform import TessyTransform

    Written = Future[tuple[dict[str, Any], Literal["written", "found", "refused"]]]

MOST_BYTES = 16 << 20
"""The largest body of a request."""

Kind = TypeVar("Kind", bound=Asked)


class Endpoint:
    """The routes of one pair of models.

    Args:
        transform: The pair; its rows are kept nowhere.
        run: Its run, started.
        name: The model's name for clients.
        max_waiting: Most requests that wait for a place in the run's window.
    """

    def __init__(self, transform: TessyTransform, run: Run, name: str, max_waiting: int) -> None:
        self._run, self._student, self._name, self._max_waiting = run, transform.student, name, max_waiting
        self._settings = transform.settings
        self._reader = PromptReader(self._settings, [self._settings.prompt_column])
        self._requests = 0
        self._dead: str | None = None
        self._began = int(time.time())

    def app(self, closing: Callable[[], object]) -> Starlette:
        """Return the ASGI application; ``closing`` is called once all requests have ended."""

        @asynccontextmanager
        async def lifespan(_: Starlette) -> AsyncGenerator[None]:
            yield
            await asyncio.to_thread(closing)

        routes = [
            Route("/health", self.health),
            Route("/v1/models", self.models),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/completions", self.completions, methods=["POST"]),
        ]
        handlers: dict[Any, Any] = {HTTPException: _refused, Exception: _broken}
        return Starlette(routes=routes, exception_handlers=handlers, lifespan=lifespan)

    async def health(self, _: Request) -> Response:
        """Say whether requests can be answered."""
        return JSONResponse({"status": "ok"}) if self._dead is None else JSONResponse(_body(503, self._dead), 503)

    async def models(self, _: Request) -> Response:
        """List the one model."""
        model = {"id": self._name, "object": "model", "created": self._began, "owned_by": "tessy-hf"}
        return JSONResponse({"object": "list", "data": [model]})

    async def chat(self, request: Request) -> Response:
        """Answer a chat."""
        return await self._answer(request, await self._read(request, ChatRequest), chat=True)

    async def completions(self, request: Request) -> Response:
        """Answer a prompt as a chat of one message."""
        return await self._answer(request, await self._read(request, CompletionRequest), chat=False)

    async def _read(self, request: Request, kind: type[Kind]) -> Kind:
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > MOST_BYTES:
                raise HTTPException(413, f"The request has more than {MOST_BYTES:,} bytes. Send a shorter one.")
        try:
            asked = kind.model_validate_json(bytes(body))
        except ValidationError as error:
            raise _invalid(error) from error
        if asked.model != self._name:
            raise HTTPException(404, f"The model {asked.model!r} is not served here. Ask for {self._name!r}.")
        return asked

    async def _answer(self, request: Request, asked: Any, *, chat: bool) -> Response:
        try:
            prompt, reply = await asyncio.to_thread(self._open, asked, chat)
            plan = asked.plan(self._settings, prompt.key)
        except (PromptError, SettingsError) as error:
            raise HTTPException(400, str(error)) from error
        if self._requests >= self._run.window.limit + self._max_waiting:
            told = f"{self._requests} requests are being answered or wait. Try again later."
            raise HTTPException(429, told, {"Retry-After": "1"})
        answer = Answer(reply, Stops(asked.stops), plan.answer, self._student.thinking_format.thinks)
        tell = answer.tell if asked.stream and answer.thinks else None
        written = self._run.write(prompt, Row(plan, answer.watch, tell))
        self._requests += 1
        answer.begin(written, self._done)
        if asked.stream:
            usage = asked.stream_options is not None and asked.stream_options.include_usage
            events = self._events(request, answer, usage)
            return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        async with self._connected(request, written):
            return JSONResponse(await answer.whole())

    def _done(self, written: Written) -> None:
        """Count a row as done, and remember that an engine is gone."""
        self._requests -= 1
        if not written.cancelled() and isinstance(error := written.exception(), EngineDeadError):
            self._dead = str(error)

    def _open(self, asked: Any, chat: bool) -> tuple[Prompt, Reply]:
        """Read a prompt; a request without a seed gets one of its own.

        Raises:
            PromptError: The prompt cannot be used.
        """
        prompt = self._reader.read({self._settings.prompt_column: asked.prompt_messages})
        ids, _ = self._student.open_turn(prompt.messages)
        seed = secrets.randbits(31) if asked.seed is None else asked.seed
        reply = Reply(self._name, chat, len(ids), self._run.fingerprint, seed)
        return replace(prompt, key=reply.id, seed=derive_seed(seed, prompt.key)), reply

    async def _events(self, request: Request, answer: Answer, usage: bool) -> AsyncGenerator[str]:
        async with self._connected(request, answer.written):
            try:
                async for chunk in answer.chunks(usage):
                    yield _event(chunk)
                yield "data: [DONE]\n\n"
            except HTTPException as error:  # the status line is out already
                yield _event(_body(error.status_code, error.detail))

    @asynccontextmanager
    async def _connected(self, request: Request, written: Written) -> AsyncGenerator[None]:
        """Stop the row when the client goes away."""

        async def watch() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass
            written.cancel()

        watching = asyncio.create_task(watch())
        try:
            yield
        finally:
            watching.cancel()
            written.cancel()


class Answer:
    """One row as the bodies of its response.

    Args:
        reply: Makes the bodies.
        stops: Ends the answer.
        author: Who writes the answer.
        thinks: Whether the row's format marks the thinking; else all of the text is the answer.
    """

    written: Written

    def __init__(self, reply: Reply, stops: Stops, author: Author, thinks: bool) -> None:
        self._reply, self._stops, self._author, self.thinks = reply, stops, author, thinks
        self._loop = asyncio.get_running_loop()
        self._pieces: asyncio.Queue[Span | None] = asyncio.Queue()  # kept thinking, or the answer so far; None: all

    def begin(self, written: Written, done: Callable[[Written], None]) -> None:
        """Follow a row; call ``done`` on this loop when it has ended."""

        def end(written: Written) -> None:
            self._loop.call_soon_threadsafe(done, written)
            self._put(None)

        self.written = written
        written.add_done_callback(end)

    def watch(self, _: Draft, piece: Span | None) -> None:
        """Take a piece that was kept; called on the run's thread, as :meth:`tell` is."""
        if piece is not None and piece.text:
            self._put(piece)

    def tell(self, text: str) -> None:
        """Take the answer so far."""
        self._put(Span(self._author, "answer", text))

    def _put(self, piece: Span | None) -> None:
        self._loop.call_soon_threadsafe(self._pieces.put_nowait, piece)

    async def whole(self) -> dict[str, Any]:
        """Return the one body of a response that is not a stream.

        Raises:
            HTTPException: The row failed.
        """
        row, thinking, text = await self._row()
        return self._reply.whole(row, thinking, self._stops.feed(text, last=True), self._stops.hit)

    async def chunks(self, usage: bool) -> AsyncGenerator[dict[str, Any]]:
        """Iterate over the bodies of a stream.

        Raises:
            HTTPException: The row failed.
        """
        reply, stops, length, seen = self._reply, self._stops, 0, 0
        if reply.chat:
            yield reply.begin()
        while (piece := await self._pieces.get()) is not None:
            part = "reasoning_content" if self.thinks and piece.part == "thinking" else "content"
            shown = piece.text
            if part == "content":
                new = piece.text[seen:] if piece.part == "answer" else piece.text
                seen, shown = seen + len(new), stops.feed(new)
            length += len(shown)
            if shown:
                yield reply.piece(part, shown, piece.author)
        row, _, text = await self._row()
        rest = stops.feed(text[seen:], last=True)
        if rest:
            yield reply.piece("content", rest, row["spans"][-1]["author"])
        yield reply.end(row, length + len(rest), stops.hit)
        if usage:
            yield reply.used(row)

    async def _row(self) -> tuple[dict[str, Any], str, str]:
        """Return the columns of the row, its thinking, and its answer."""
        waiting = asyncio.wrap_future(self.written)
        await asyncio.wait([waiting])
        if waiting.cancelled():
            raise HTTPException(503, "The text was stopped: the client went away, or the server is shutting down.")
        try:
            row, origin = waiting.result()
        except EngineDeadError as error:
            raise HTTPException(503, str(error)) from error
        if row["finish_reason"] == "error":
            raise HTTPException(400 if origin == "refused" else 500, row["error"])
        thinking, answer = row["thinking"], row["answer"]
        return (row, thinking, answer) if self.thinks else (row, "", thinking + answer)


TYPES = {400: "invalid_request_error", 404: "not_found_error", 429: "rate_limit_error"}
"""OpenAI's names for kinds of errors; those of the server have one name."""


def _body(status: int, message: str) -> dict[str, Any]:
    kind = TYPES.get(status, "server_error" if status >= 500 else TYPES[400])
    return {"error": {"message": message, "type": kind, "param": None, "code": status}}


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse(_body(error.status_code, error.detail), error.status_code, error.headers)


async def _broken(_: Request, error: Exception) -> Response:
    return JSONResponse(_body(500, f"{type(error).__name__}: see the log of the server."), 500)


def _invalid(error: ValidationError) -> HTTPException:
    """Return what is wrong with a body: the first fault, of several alternatives the closest."""
    first = max(error.errors(), key=lambda fault: len(fault["loc"]))
    where = ".".join(str(part) for part in first["loc"]) or "the body"
    return HTTPException(400, f"{where}: {first['msg'].lower()}. Leave it out, or see the guide for what is served.")
