"""Replicas that come and go during a run: lists of servers that are read again, with real servers on the loopback."""

import asyncio
import logging
import pickle
import socket

import pytest

from tessy_hf import demo
from tessy_hf.engines import server as server_module
from tessy_hf.engines.addresses import Addresses
from tessy_hf.engines.server import ServerEngine
from tessy_hf.errors import EngineDeadError, SettingsError
from tests.engines import servers
from tests.engines.contract import request
from tests.engines.servers import FakeServer
from tests.engines.test_server import chunks, engine, expected, rows, rows_seen, run, together, whole

SLOWLY = {"/inference/v1/generate": servers.slowly(0.02)}


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    """Look ten times a second."""
    monkeypatch.setattr(server_module, "LOOK_SECONDS", 0.1)


@pytest.fixture
def file(tmp_path):
    """A file of servers."""

    class File:
        path = tmp_path / "servers.txt"
        url = f"file://{path}"

        def write(self, *listed):
            self.path.write_text("".join(f"{getattr(one, 'url', one)}\n" for one in listed))

        def engine(self, **options):
            given = {"tokenizer": str(demo.STUDENT), "timeout": 5.0, "patience": 5.0, **options}
            return ServerEngine("student", base_url=self.url, **given)

    return File()


async def until(condition):
    """Wait until something is so."""
    end = asyncio.get_running_loop().time() + 20
    while not condition():
        assert asyncio.get_running_loop().time() < end, "it did not come about"
        await asyncio.sleep(0.02)


def urls_of(live):
    return [replica.url for replica in live._live._replicas]


def test_a_file_is_read_with_comments_and_repetitions(tmp_path):
    path = tmp_path / "servers.txt"
    path.write_text("# teachers\nhttp://one:8000/v1  # the first\n\n  http://two:8000/v1/\nhttp://one:8000/v1\n")
    given = Addresses(f"file://{path}")
    assert given.change and asyncio.run(given.read()) == ["http://one:8000/v1", "http://two:8000/v1"]
    assert asyncio.run(pickle.loads(pickle.dumps(given)).read()) == asyncio.run(given.read())
    assert f"base_url='file://{path}'" in repr(ServerEngine("student", base_url=f"file://{path}"))


def test_a_name_stands_for_all_its_addresses(monkeypatch):
    read = asyncio.run(Addresses("dns+http://localhost:8000/v1/").read())
    assert "http://127.0.0.1:8000/v1" in read
    assert set(read) <= {"http://127.0.0.1:8000/v1", "http://[::1]:8000/v1"}
    with pytest.raises(OSError):
        asyncio.run(Addresses("dns+http://nobody.invalid/v1").read())


@pytest.mark.parametrize(
    "address", ["file://servers.txt", "file://", "dns+http://", "dns+https://host/v1", "dns+http://me:sk-1@host/v1"]
)
def test_places_for_lists_that_cannot_be_used_are_refused(address):
    with pytest.raises(SettingsError, match="expected") as caught:
        ServerEngine("student", base_url=address)
    assert "sk-1" not in str(caught.value)


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


def test_rows_are_spread_as_they_end(file):
    async def then(live):
        replicas = live._live._replicas
        for i in range(20):
            before = [len(replica.rows) for replica in replicas]
            await live.complete(request(f"r{i}", prompt=i))
            (home,) = (at for at, replica in enumerate(replicas) if f"r{i}" in replica.rows)
            assert before[home] == min(before)
            live.release(f"r{i - 4}")
        assert sum(len(replica.rows) for replica in replicas) == 4

    with FakeServer() as one, FakeServer() as two:
        file.write(one, two)
        run(file.engine(), then=then)


def test_a_replica_that_goes_ends_what_it_has_and_is_asked_for_nothing_more(file):
    async def then(live):
        begun = [asyncio.ensure_future(live.complete(request(f"r{i}", prompt=i))) for i in range(6)]
        await until(lambda: len(one.texts) == 3 and len(two.texts) == 3)
        file.write(two)
        await until(lambda: urls_of(live) == [two.url])
        assert not any(each.done() for each in begun)
        answers = await together(begun)
        before = len(one.texts)
        answers += await together(live.complete(request(f"r{i}", prompt=i)) for i in range(6))
        assert len(one.texts) == before == 3
        return answers

    slow = {"/inference/v1/generate": servers.slowly(1.5)}
    with FakeServer(paths=slow) as one, FakeServer(paths=slow) as two:
        file.write(one, two)
        answers = run(file.engine(), then=then)
    assert [list(each.token_ids) for each in answers] == 2 * [expected(request(prompt=i)) for i in range(6)]


@pytest.mark.slow
def test_replicas_come_and_go_in_mid_run_and_no_row_is_lost(file):
    def change(at, *listed):
        def mishap(handler, body):
            file.write(*listed)
            handler.answer(body)

        return [None] * at + [mishap]

    with FakeServer(paths=SLOWLY) as one, FakeServer(paths=SLOWLY) as two, FakeServer(paths=SLOWLY) as three:
        file.write(one)
        one.faults.extend(change(20, one, two, three))
        three.faults.extend(change(10, two, three) + [None] * 10 + [servers.die])
        written = rows(file.engine(), 90, rows_in_flight=12)
        assert all(each.texts for each in (one, two, three)) and three.closing.is_set()
    with FakeServer() as alone:
        assert written == rows(engine(alone), 90)


def test_a_server_that_was_replaced_under_way_is_found_at_once(file, monkeypatch):
    """All servers are gone, and a new one is listed: the run looks when it misses them, not only in a while."""
    monkeypatch.setattr(server_module, "LOOK_SECONDS", 1000.0)

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
        await until(lambda: "What was there before is used" in caplog.text)
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


def test_one_server_of_a_list_has_to_be_up_at_the_start(file):
    with FakeServer() as one, FakeServer(models=[]) as other:
        file.write(one, "http://127.0.0.1:1/v1", other)
        run(file.engine(), request())
        file.write(other, "http://127.0.0.1:1/v1")
        with pytest.raises(EngineDeadError, match="serves nothing, not 'student'"):
            run(file.engine(patience=0.5))
    for message in ("names no server", "cannot be reached"):
        file.write(*(["http://127.0.0.1:1/v1"] if message == "cannot be reached" else []))
        with pytest.raises(EngineDeadError, match=message):
            run(file.engine(patience=0.5))
    file.path.unlink()
    with pytest.raises(EngineDeadError, match="servers.txt' cannot be read"):
        run(file.engine(patience=0.5))


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
    assert f"{two.url} came" in caplog.text and f"{one.url} went" in caplog.text


def test_rows_of_a_fixed_list_are_spread_evenly_too():
    with FakeServer() as one, FakeServer() as two:
        assert run(engine(one, two), then=chunks(20)) == [whole(i) for i in range(20)]
        assert len(rows_seen(one)) == len(rows_seen(two)) == 10
