"""Servers that join and leave during a run: lists that are read again, with scripted servers on the loopback."""

import asyncio
import logging
import socket
import threading
import time

import pytest

from tessy_hf import demo
from tessy_hf.engines import membership
from tessy_hf.engines.server import ServerEngine
from tessy_hf.errors import EngineDeadError
from tests.engines import servers
from tests.engines.contract import request
from tests.engines.servers import FakeServer
from tests.engines.test_server import engine, expected, rows, rows_seen, run, together


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    """Look ten times a second."""
    monkeypatch.setattr(membership, "LOOK_SECONDS", 0.1)


@pytest.fixture
def file(tmp_path):
    """A file of servers."""

    class File:
        path = tmp_path / "servers.txt"
        url = f"file://{path}"

        def write(self, *listed):
            self.path.write_text("".join(f"{getattr(one, 'url', one)}\n" for one in listed))

        def engine(self, **options):
            given = {"tokenizer": str(demo.STUDENT), "timeout": 30.0, "retry_timeout": 60.0, **options}
            return ServerEngine("student", base_url=self.url, **given)

    return File()


async def until(condition):
    """Wait until something is so, and fail after a minute."""
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110 - no event tells
            await asyncio.sleep(0.02)


def urls_of(live):
    return list(live.servers)


def test_a_replica_that_comes_gets_the_new_rows_and_the_others_keep_theirs(file):
    async def then(live):
        started = [request(f"old {i}", prompt=i) for i in range(6)]
        await together(map(live.complete, started))
        file.write(one, two)
        await until(lambda: len(urls_of(live)) == 2)
        await together(live.complete(request(f"new {i}", prompt=100 + i)) for i in range(6))
        await together(map(live.complete, started))

    with FakeServer() as one, FakeServer() as two:
        file.write(one)
        run(file.engine(), then=then)
    assert len(rows_seen(two)) == 6 and not rows_seen(one) & rows_seen(two)
    assert len(one.texts) == 12  # each old row twice, and none of the new


def test_a_replica_that_leaves_ends_what_it_has_and_gets_nothing_more(file):
    async def then(live):
        begun = [asyncio.ensure_future(live.complete(request(f"r{i}", prompt=i))) for i in range(6)]
        await until(lambda: len(one.texts) == 3 and len(two.texts) == 3)
        file.write(two)
        await until(lambda: urls_of(live) == [two.url])
        assert not any(each.done() for each in begun)
        gate.set()
        answers = await together(begun)
        answers += await together(live.complete(request(f"r{i}", prompt=i)) for i in range(6))
        assert len(one.texts) == 3
        return answers

    gate = threading.Event()
    held = {"/inference/v1/generate": servers.held(gate)}
    with FakeServer(paths=held) as one, FakeServer(paths=held) as two:
        file.write(one, two)
        answers = run(file.engine(), then=then)
    assert [list(each.token_ids) for each in answers] == 2 * [expected(request(prompt=i)) for i in range(6)]


@pytest.mark.slow
def test_replicas_join_and_leave_in_mid_run_and_no_row_is_lost(file):
    live = file.engine()

    def first(handler, body):
        """Answer 20 requests, then name two more servers, and answer no more until the engine has both."""
        if len(one.texts) == 20:
            file.write(one, two, three)
        end = time.monotonic() + 60
        while len(one.texts) >= 20 and three.url not in live.servers:
            assert time.monotonic() < end, "the servers did not join"
            time.sleep(0.01)
        handler.answer(body)

    def without_the_first(handler, body):
        file.write(two, three)
        handler.answer(body)

    dying = [*[None] * 10, without_the_first, *[None] * 10, servers.die]
    with (
        FakeServer(paths={"/inference/v1/generate": first}) as one,
        FakeServer() as two,
        FakeServer(faults=dying) as three,
    ):
        file.write(one)
        written = rows(live, 90, rows_in_flight=12)
        assert all(each.texts for each in (one, two, three)) and three.closing.is_set()
    with FakeServer() as alone:
        assert written == rows(engine(alone), 90)


def test_a_server_that_was_replaced_under_way_is_found_at_once(file, monkeypatch):
    """All servers are gone, and a new one is listed: the run looks when it misses them, not only in a while."""
    monkeypatch.setattr(membership, "LOOK_SECONDS", 1000.0)

    async def then(live):
        await live.complete(request("a"))
        file.write(two)
        one.kill()
        return await live.complete(request("a"))

    with FakeServer() as one, FakeServer() as two:
        file.write(one)
        answer = run(file.engine(), then=then)
        assert two.texts
    assert list(answer.token_ids) == expected(request())


@pytest.mark.parametrize("content", [None, "", "# none\n", "ftp://one/v1\n", "\xff\xfe"])
def test_a_list_that_cannot_be_read_changes_nothing(file, content, caplog):
    async def then(live):
        file.path.unlink()
        if content is not None:
            file.path.write_bytes(content.encode("latin-1"))
        await until(lambda: "The servers known before are used" in caplog.text)
        return await live.complete(request())

    with FakeServer() as one:
        file.write(one)
        assert list(run(file.engine(), then=then).token_ids) == expected(request())


OTHERS = {
    "of another model": {"models": [{"id": "other", "max_model_len": 2048}]},
    "of a shorter context": {"models": [{"id": "student", "max_model_len": 64}]},
    "without ids": {"ways": ("text",)},
    "with another tokenizer": {"tokenize": lambda text: [1, 2, 3]},
    "that is not up yet": {"paths": {"/v1/models": servers.status(503)}},
}


@pytest.mark.slow
@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_a_server_that_cannot_take_part_gets_no_rows_until_it_can(file, other, caplog):
    async def then(live):
        file.write(one, two)
        await until(lambda: "is not used yet" in caplog.text)
        await together(live.complete(request(f"r{i}", prompt=i)) for i in range(6))
        assert not two.texts
        two.models, two.ways, two.tokenize, two.paths = one.models, one.ways, one.tokenize, {}
        await until(lambda: len(urls_of(live)) == 2)
        await together(live.complete(request(f"s{i}", prompt=i)) for i in range(6))

    with FakeServer() as one, FakeServer(**other) as two:
        file.write(one)
        run(file.engine(), then=then)
        assert two.texts
    assert caplog.text.count(f"{two.url} is not used yet") == 1


@pytest.mark.slow
def test_one_server_of_a_list_has_to_be_up_at_the_start(file):
    with FakeServer() as one, FakeServer(models=[]) as other:
        file.write(one, "http://127.0.0.1:1/v1", other)
        run(file.engine(), request())
        file.write(other, "http://127.0.0.1:1/v1")
        with pytest.raises(EngineDeadError, match="serves nothing, not 'student'"):
            run(file.engine(retry_timeout=0.5))
    for message in ("lists no server", "cannot be reached"):
        file.write(*(["http://127.0.0.1:1/v1"] if message == "cannot be reached" else []))
        with pytest.raises(EngineDeadError, match=message):
            run(file.engine(retry_timeout=0.5))
    file.path.unlink()
    with pytest.raises(EngineDeadError, match="servers.txt' cannot be read"):
        run(file.engine(retry_timeout=0.5))


def test_hosts_behind_a_name_come_and_go(monkeypatch, caplog):
    """What a cluster's DNS says is changed in the resolver's place; the hosts are two addresses of the loopback."""
    known = ["127.0.0.1"]

    async def getaddrinfo(self, host, port, **_):
        if host != "students.internal":
            return await resolve(self, host, port, **_)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in known]

    resolve = asyncio.BaseEventLoop.getaddrinfo
    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", getaddrinfo)
    caplog.set_level(logging.INFO, "tessy_hf")

    async def then(live):
        await live.complete(request("a"))
        known.append("127.0.0.2")
        await until(lambda: len(urls_of(live)) == 2)
        await together(live.complete(request(f"r{i}", prompt=i)) for i in range(6))
        known.remove("127.0.0.1")
        await until(lambda: urls_of(live) == [two.url])
        await live.complete(request("a"))

    with FakeServer() as one, FakeServer(at=("127.0.0.2", one.port)) as two:
        name = f"dns+http://students.internal:{one.port}/v1"
        run(ServerEngine("student", base_url=name, tokenizer=str(demo.STUDENT)), then=then)
        assert one.texts and two.texts
    assert f"{two.url} joined" in caplog.text and f"{one.url} left" in caplog.text
