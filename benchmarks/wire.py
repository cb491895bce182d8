"""What a request costs the client as rows grow, and what goes over the wire: against a server without latency.

64 rows ask at once, 14 tokens of the 20 that come are kept. The server is another process; a relay in it counts the
bytes of both directions. With and without deltas, for rows of 1k, 10k and 40k tokens, in turns::

    python benchmarks/wire.py [--tokens 1000 10000 40000] [--repeats 5]
"""

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import time
from random import Random

import aiohttp
from aiohttp import web

from tessy_hf import ServerEngine, demo
from tessy_hf.engines.base import Request
from tessy_hf.text.growing_ids import GrowingIds
from tessy_hf.vllm_middleware.frames import OUT_OF_TOKENS, PATH, REQUEST, Ask, Piece, join, split

AT_ONCE, KEPT, ASKED = 64, 14, 20
STOP_IDS = frozenset(range(500, 528))
WAYS = {"deltas": ("deltas",), "generate": ("generate",)}


# --- the server


async def by_deltas(asked):
    """Answer all requests of a message in one, and keep nothing."""
    socket = web.WebSocketResponse(max_msg_size=1 << 30)
    await socket.prepare(asked)
    async for message in socket:
        asks = [Ask.decode(frame) for frame in split(message.data) if frame[0] == REQUEST]
        pieces = [Piece(ask.number, OUT_OF_TOKENS, 0, 20, range(100, 100 + ask.max_tokens)) for ask in asks]
        await socket.send_bytes(join(piece.encode() for piece in pieces))
    return socket


async def by_http(asked):
    """Answer `/inference/v1/generate`."""
    body = await asked.read()
    most = int(body[body.rindex(b'"max_tokens":') + 13 :].split(b",")[0])
    choice = {"index": 0, "token_ids": [*range(100, 100 + most)], "finish_reason": "length"}
    return web.json_response({"request_id": "x", "choices": [choice]})


async def serve():
    """Print a port behind which all bytes are counted; `/bytes` tells how many there were."""
    counted, app = 0, web.Application(client_max_size=1 << 30)

    async def relay(reader, writer):
        there = await asyncio.open_connection("127.0.0.1", port)

        async def copy(source, target):
            nonlocal counted
            while data := await source.read(1 << 20):
                counted += len(data)
                target.write(data)
                await target.drain()
            target.close()

        await asyncio.gather(copy(reader, there[1]), copy(there[0], writer), return_exceptions=True)

    app.router.add_get("/v1/models", lambda _: models())
    app.router.add_get("/bytes", lambda _: told())
    app.router.add_post("/inference/v1/generate", by_http)
    app.router.add_get(PATH, by_deltas)

    async def models():
        return web.json_response({"data": [{"id": "student", "max_model_len": 1 << 20}]})

    async def told():
        return web.json_response(counted)

    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await (site := web.TCPSite(runner, "127.0.0.1", 0)).start()
    port = site._server.sockets[0].getsockname()[1]
    async with await asyncio.start_server(relay, "127.0.0.1", 0, limit=1 << 20) as server:
        print(server.sockets[0].getsockname()[1], flush=True)
        await server.serve_forever()


# --- the client


async def counted(url):
    """Return how many bytes went over the wire so far."""
    async with aiohttp.request("GET", url.removesuffix("/v1") + "/bytes") as told:
        return await told.json()


async def measure(engine, url, tokens, steps):
    """Return processor microseconds a request, and bytes on the wire per kept token."""
    draw = Random(0)
    rows = [GrowingIds(draw.choices(range(300), k=tokens)) for _ in range(AT_ONCE)]  # as a run keeps them

    async def write(row, steps):
        for _ in range(steps):
            asked = Request(str(row), row, "thinking", rows[row], ASKED, 0.0, 1.0, 0, STOP_IDS)
            rows[row].extend((await engine.complete(asked)).token_ids)
            rows[row].cut(len(rows[row]) - ASKED + KEPT)

    await asyncio.gather(*(write(row, 2) for row in range(AT_ONCE)))
    sent, begin = await counted(url), time.process_time()
    await asyncio.gather(*(write(row, steps) for row in range(AT_ONCE)))
    spent, requests = time.process_time() - begin, steps * AT_ONCE
    sent = await counted(url) - sent
    for row in range(AT_ONCE):
        engine.release(str(row))
    return 1e6 * spent / requests, sent / requests / KEPT


async def compare(url, arguments):
    """Measure all, in turns, and print medians."""
    engines = {}
    for way, protocols in WAYS.items():
        engines[way] = ServerEngine("student", base_url=url, tokenizer=str(demo.STUDENT))
        engines[way].protocols = protocols
        await engines[way].start()
    found = {(way, tokens): [] for way in WAYS for tokens in arguments.tokens}
    for _ in range(arguments.repeats):
        for way, tokens in found:
            found[way, tokens].append(await measure(engines[way], url, tokens, arguments.steps))
    for engine in engines.values():
        await engine.close()
    for (way, tokens), figures in found.items():
        us, sent = (statistics.median(each) for each in zip(*figures, strict=True))
        first = statistics.median(figure[0] for figure in found[way, arguments.tokens[0]])
        figures = {"us_per_request": us, "us_per_kept": us / KEPT, "of_first": us / first, "bytes_per_kept": sent}
        print(json.dumps({"way": way, "tokens": tokens} | {name: round(value, 2) for name, value in figures.items()}))


def main():
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1_000, 10_000, 40_000])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60)
    arguments = parser.parse_args()
    if arguments.serve:
        asyncio.run(serve())
    else:
        server = subprocess.Popen([sys.executable, __file__, "--serve"], stdout=subprocess.PIPE, text=True)
        try:
            asyncio.run(compare(f"http://127.0.0.1:{server.stdout.readline().strip()}/v1", arguments))
        finally:
            server.kill()
            server.wait()


if __name__ == "__main__":
    main()
