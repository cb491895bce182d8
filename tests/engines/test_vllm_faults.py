"""A vLLM server of two API server processes, behind a relay that spoils answers; it and the client are killed.

Rows are the same as without all that, with deltas and without.
"""

import asyncio
import importlib.util
import logging
import signal
import threading
from array import array

import aiohttp
import pytest
from aiohttp import WSMsgType, web

from tessy_hf import ServerEngine, demo
from tests import crashes
from tests.crashes import Work
from tests.engines import servers
from tests.engines.contract import request
from tests.engines.test_server import run, together

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]


class Relay:
    """Stands before a server; of ten answers it loses one, with its connection, and repeats one.

    Attributes:
        lost: How many answers were lost.
        repeated: How many came twice, or were asked for twice.
    """

    def __init__(self, server):
        self._server, self._answers, self.lost, self.repeated = server.removesuffix("/v1"), 0, 0, 0
        self._loop, started = asyncio.new_event_loop(), threading.Event()
        self._thread = threading.Thread(target=lambda: self._loop.run_until_complete(self._serve(started)))
        self._thread.start()
        started.wait()
        self.url = f"http://127.0.0.1:{self._port}/v1"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join()

    async def _serve(self, started):
        self._end, app = asyncio.Event(), web.Application(client_max_size=1 << 30)
        app.router.add_route("*", "/{path:.*}", self._carry)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        await (site := web.TCPSite(runner, "127.0.0.1", 0)).start()
        self._port = site._server.sockets[0].getsockname()[1]
        async with aiohttp.ClientSession() as self._session:
            started.set()
            await self._end.wait()
            await runner.cleanup()

    async def _carry(self, asked):
        try:
            is_socket = asked.headers.get("Upgrade") == "websocket"
            return await (self._socket(asked) if is_socket else self._request(asked))
        except aiohttp.ClientError:  # the server was killed
            return web.Response(status=502)

    async def _request(self, asked):
        content, copies = await asked.read(), self._copies() if asked.method == "POST" else 1
        for _ in range(max(1, copies)):
            async with self._session.request(
                asked.method, self._server + asked.path, data=content, headers={"content-type": "application/json"}
            ) as answer:
                found = web.Response(body=await answer.read(), status=answer.status)
        if not copies:
            asked.transport.abort()
        return found

    async def _socket(self, asked):
        client = web.WebSocketResponse(compress=False, max_msg_size=0)
        await client.prepare(asked)
        async with self._session.ws_connect(self._server + asked.path, max_msg_size=0) as server:
            upwards = asyncio.create_task(self._upwards(client, server))
            async for message in server:
                if not (copies := self._copies()):
                    asked.transport.abort()
                    break
                for _ in range(copies):
                    await client.send_bytes(message.data)
            upwards.cancel()
        await client.close()
        return client

    async def _upwards(self, client, server):
        async for message in client:
            if message.type is WSMsgType.BINARY:
                await server.send_bytes(message.data)
        await server.close()

    def _copies(self):
        """How often the next answer is sent."""
        self._answers += 1
        self.lost, self.repeated = self._answers // 10, (self._answers + 5) // 10
        return {0: 0, 5: 2}.get(self._answers % 10, 1)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Start the server. Yields its address, and how it is killed and started anew."""
    described = servers.vllm_serve(
        "--enable-scale-out", "--middleware", "tessy_hf.vllm_middleware.Deltas", "--api-server-count", "2"
    )
    with servers.restartable(*described, logs=tmp_path_factory.mktemp("vllm")) as (url, start):
        running = [start()]
        yield url, lambda: running.pop().kill(), lambda: running.append(start())


def test_rows_stay_with_the_server_process_that_knows_them(server, caplog):
    caplog.set_level(logging.INFO)

    async def row(live, number):
        ids = array("i", request(prompt=number).prompt_ids)
        for _ in range(6):
            ids.extend((await live.complete(request(f"r{number}", ids=ids, tokens=6))).token_ids[:4])
        return ids.tolist()

    async def rows(live):
        return await together(row(live, number) for number in range(16))

    def written(protocol):
        live = ServerEngine("student", base_url=server[0], tokenizer=str(demo.STUDENT))
        live.protocols = (protocol,)
        return run(live, then=rows)

    assert written("deltas") == written("generate")
    assert "sent again" not in caplog.text


@pytest.mark.parametrize("protocol", ["deltas", "generate"])
def test_rows_are_the_same_after_all_that_can_go_wrong(tmp_path, server, protocol):
    url, kill, start = server
    direct = Work("served", tmp_path / "work", tuple(range(24)), {"url": url, "protocol": protocol, "chunk_tokens": 8})
    expected, calls = crashes.unbroken(direct, tmp_path / "unbroken")
    total = crashes.size(direct._replace(folder=tmp_path / "unbroken"))
    with Relay(url) as relay:
        work = direct._replace(settings={**direct.settings, "url": relay.url})
        first = crashes.begin(work)
        assert crashes.kill_when(first, work, total // 4, 0.0) == -signal.SIGKILL
        second = crashes.begin(work)
        assert crashes.kill_when(second, work, total // 4, 0.0) == -signal.SIGKILL
        kill()
        third = crashes.begin(work)  # finds no server, and waits
        start()
        assert crashes.end(third, work) == expected
        assert relay.lost > 5 and relay.repeated > 5
    assert {call.row for call in calls} == {row for row, *_ in expected}
