"""Rows by deltas: with a scripted engine behind the middleware's WebSocket, and with vLLM where it is installed."""

import asyncio
import importlib.util
import logging
import traceback
from array import array
from contextlib import asynccontextmanager
from dataclasses import replace
from types import SimpleNamespace

import aiohttp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tessy_hf import ServerEngine, demo
from tessy_hf.engines import deltas
from tessy_hf.errors import EngineDeadError, RequestError
from tessy_hf.text.transcript import TokenList
from tessy_hf.vllm_middleware.frames import HEAD, OUT_OF_TOKENS, PATH, REQUEST, UNKNOWN, Ask, Piece, Rows, join, split
from tests.engines import servers
from tests.engines.contract import VOCABULARY, EngineContract, ModelContract, request
from tests.engines.delta_server import MOST_BYTES, DeltaServer
from tests.engines.test_server import engine, expected, run, together


class TestDeltas(EngineContract):
    measures = frozenset({"logprobs", "score"})

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def server(cls):
        with DeltaServer() as cls.replica:
            yield cls.replica

    @classmethod
    def make(cls):
        return engine(cls.replica)

    def test_is_asked_in_the_best_protocol_offered(self, ask, live):
        (completion,) = ask(request(tokens=120))
        assert live.servers == {self.replica.url: "deltas"} and completion.uncached_prompt_tokens == 3


def written(live, rows=12, before_last=lambda: None):
    """Write rows in three chunks each, with something cut off between them; return the texts."""

    async def row(number, at):
        ids, text = array("i", request(prompt=number).prompt_ids), []
        for step in range(3):
            asked = request(f"r{number}", ids=ids, tokens=9)
            completion = await live.complete(asked)
            assert list(completion.token_ids) == expected(asked)
            text.append(list(completion.token_ids))
            ids.extend(completion.token_ids[:-2])  # the rest is rolled back
            if step == 1 and number == at:
                before_last()
        live.release(f"r{number}")
        return text

    async def session():
        await live.start()
        try:
            return await together(row(number, rows // 2) for number in range(rows))
        finally:
            await live.close()

    return asyncio.run(asyncio.wait_for(session(), 120))


def test_only_what_is_new_is_sent():
    ids = request().prompt_ids
    long = ids[: ids.index(servers.THINK)] * 100 + ids
    asked = [request(ids=array("i", [*long, *[300] * more]), tokens=1) for more in range(4)]

    async def after_another(live):
        return [await live.complete(each) for each in asked]

    with DeltaServer() as server:
        run(engine(server), then=after_another)
        assert server.prompts == [list(each.prompt_ids) for each in asked]
        assert server.received[-4] > 4 * len(long) and max(server.received[-3:]) < 60


@pytest.mark.parametrize(
    "copies",
    [lambda number: number % 10 != 7, lambda number: 1 + (number % 3 == 0)],
    ids=["every tenth answer is lost", "every third answer comes twice"],
)
def test_no_text_is_wrong_for_answers_that_are_lost_or_repeated(copies):
    with DeltaServer(copies=copies) as server:
        live = engine(server, timeout=0.3)
        live.protocols = ("deltas",)
        assert len(written(live)) == 12


def test_rows_that_the_server_forgot_are_sent_again_and_that_is_told(caplog):
    caplog.set_level(logging.INFO)
    with DeltaServer(most_bytes=1) as server:
        written(engine(server))
    assert "did not know 1 prompts; they were sent again" in caplog.text


@pytest.mark.parametrize(("asks", "told"), [(4, 0), (20, 1)])
def test_a_server_that_keeps_forgetting_rows_is_told_of_once(asks, told, caplog, monkeypatch):
    monkeypatch.setattr(deltas, "CONNECTIONS", 1)

    async def in_turn(live):
        for step in range(asks):
            for row in ("a", "b"):
                await live.complete(request(row, ids=array("i", [*request(row).prompt_ids, *[300] * step]), tokens=1))

    with DeltaServer(most_bytes=1) as server:
        run(engine(server), then=in_turn)
    assert caplog.text.count("keeps forgetting rows") == caplog.text.count("TESSY_DELTAS_MIB") == told


def test_many_long_prompts_at_once_are_no_message_that_a_server_refuses(monkeypatch):
    monkeypatch.setattr(deltas, "CONNECTIONS", 1)
    asked = [request(f"r{row}", prompt=row, tokens=3) for row in range(24)]
    long = [replace(each, prompt_ids=array("i", [300] * 200_000 + list(each.prompt_ids))) for each in asked]
    assert sum(len(each.prompt_ids) for each in long) * 4 > MOST_BYTES

    with DeltaServer(most_bytes=1) as server:
        live = engine(server, retry_timeout=2.0)
        live.protocols = ("deltas",)
        completions = run(live, *long)
        assert len(server.connections) == 1  # none broke off
    assert [list(completion.token_ids) for completion in completions] == [expected(each) for each in long]


def test_why_a_connection_broke_off_is_told():
    with DeltaServer(longest=1000) as server:
        live = engine(server, retry_timeout=1.0)
        live.protocols = ("deltas",)
        with pytest.raises(EngineDeadError, match=r"broke the connection off \(code 1009\)"):
            run(live, request(ids=[300] * 1000))


def test_a_server_that_is_started_anew_in_mid_run_gets_the_rows_again():
    with DeltaServer() as first:
        again = []

        def restart():
            first.kill()
            again.append(DeltaServer(port=first.port))

        try:
            written(engine(first), before_last=restart)
            assert again[0].prompts
        finally:
            for server in again:
                server.kill()


def test_clients_that_name_their_rows_alike_do_not_share_them():
    async def both(live):
        other = engine(server)
        await other.start()
        asked = [request("r", prompt=i % 7, tokens=9) for i in range(20)]
        try:
            return [await (other if i % 2 else live).complete(each) for i, each in enumerate(asked)]
        finally:
            await other.close()

    with DeltaServer() as server:
        completions = run(engine(server), then=both)
        assert [list(c.token_ids) for c in completions] == [
            expected(request("r", prompt=i % 7, tokens=9)) for i in range(20)
        ]


def test_what_the_engine_refuses_fails_the_row():
    async def refused(live):
        server.refusal = "the prompt is too long"
        return await live.complete(request())

    with DeltaServer() as server, pytest.raises(RequestError, match="status 400.*the prompt is too long"):
        run(engine(server), then=refused)


def test_a_key_that_a_server_sends_back_is_not_told(monkeypatch):
    key = "-".join(["hush"] * 3)
    monkeypatch.setenv("OPENAI_API_KEY", key)

    async def again(live):
        server.refusal = f"who is {key}?"
        return await live.complete(request())

    with DeltaServer() as server, pytest.raises(RequestError, match=r"who is \[key\]\?") as caught:
        run(engine(server), then=again)
    assert key not in "".join(traceback.format_exception(caught.value))


def test_a_server_that_no_longer_takes_deltas_is_asked_by_another_protocol(caplog):
    """It answers 403 to the handshake, as Starlette does where there is no such route."""
    with DeltaServer() as first:
        others = []

        def restart():
            first.kill()
            others.append(servers.FakeServer(at=("127.0.0.1", first.port), paths={PATH: servers.status(403)}))

        try:
            written(engine(first), before_last=restart)
        finally:
            for server in others:
                server.kill()
    assert caplog.text.count("It is asked by generate from now on") == 1


def test_deltas_that_fail_for_a_moment_at_the_start_are_tried_again():
    async def asked(live):
        return live.servers

    with DeltaServer(failures=1) as server:
        assert run(engine(server), then=asked) == {server.url: "deltas"}


def test_deltas_that_go_on_failing_at_the_start_are_given_up_and_that_is_told(caplog):
    async def asked(live):
        return live.servers

    with servers.FakeServer(paths={PATH: servers.status(503)}) as server:
        assert run(engine(server), then=asked) == {server.url: "generate"}
    assert caplog.text.count("It is not asked by deltas") == 1


# --- rows as they grow


class Wire:
    """Connections and a socket in one, to a server that keeps rows: what it understands as prompts is kept."""

    def __init__(self):
        self.rows, self.prompts, self._arrives = Rows(1 << 30), [], asyncio.Queue()

    async def websocket(self, server, url):
        return self

    @asynccontextmanager
    async def limits(self, server):
        yield

    def redact(self, content):
        return content

    async def send_bytes(self, message):
        for frame in split(message):
            if frame[0] == REQUEST:
                asked = Ask.decode(frame)
                known = (prompt := self.rows.prompt(self, asked)) is not None
                self.prompts.extend([prompt] * known)
                piece = Piece(asked.number, OUT_OF_TOKENS, 0, -1, [])
                answer = piece.encode() if known else HEAD.pack(UNKNOWN, 0, asked.number)
                self._arrives.put_nowait(SimpleNamespace(type=aiohttp.WSMsgType.BINARY, data=join([answer])))

    async def receive(self):
        return await self._arrives.get()

    async def close(self):
        pass


WRITING = st.one_of(
    st.sampled_from(["drop", "retry", "release", "evict", "forget"]),
    st.tuples(
        st.sampled_from(["append", "push", "commit", "cut"]),
        st.sampled_from([" okay", " 1 + 2", ".", "\n wait", " and then" * 150]),  # the last fills blocks
        st.integers(0, 1000),
    ),
)


def write(row, step):
    """Change a row as its authors do."""
    if step == "drop":
        row.drop()
    elif isinstance(step, tuple):
        kind, text, at = step
        row.push(VOCABULARY.encode(text).ids)
        tentative, ends = row.tentative()
        if kind == "append":
            row.drop()
            row.append(text)
        elif kind == "commit":
            end = ends[at % len(ends)]
            row.commit(ends, end, tentative[:end])
        elif kind == "cut":
            end = at % (len(tentative) + 1)
            row.cut(ends, end, tentative[:end])


@given(
    st.lists(st.tuples(st.sampled_from([0, 0, 0, 1, 2]), WRITING, st.sampled_from("aaap-")), min_size=9, max_size=40),
    st.integers(1, 2),
)
@settings(max_examples=100, deadline=None)
def test_a_server_understands_the_rows_as_they_are_written(steps, most_rows):
    def new(number):
        return TokenList(VOCABULARY, request(prompt=number).prompt_ids)

    async def session():
        wire, rows, meant = Wire(), [new(number) for number in range(3)], []
        client = deltas.Deltas(wire)
        for number, step, asks in steps:
            write(rows[number], step)
            if step == "retry":
                rows[number] = new(number)
            elif step == "release":
                client.release(f"r{number}")
            elif step in ("evict", "forget"):
                wire.rows = Rows(1 if step == "evict" else 1 << 30)
            if asks != "-":
                ids = rows[number].ids if asks == "a" else array("i", rows[number].ids)  # a plain array
                asked = replace(request(f"r{number}"), prompt_ids=ids)
                async for _ in client.answers("server", asked, stream=False):
                    meant.append(list(ids))
        await client.close()
        assert wire.prompts == meant

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deltas, "MOST_ROWS", most_rows)
        patch.setattr(deltas, "CONNECTIONS", 1)
        asyncio.run(session())


# --- vLLM


@pytest.fixture(scope="module")
def vllm_server(tmp_path_factory):
    """Start a vLLM server with the middleware and a key, at the same port each time. Yields how, and its address."""
    described = servers.vllm("--middleware", "tessy_hf.vllm_middleware.Deltas", "--api-key", "key")
    with (
        pytest.MonkeyPatch.context() as patch,
        servers.restartable(*described, logs=tmp_path_factory.mktemp("vllm")) as (url, start),
    ):
        patch.setenv("OPENAI_API_KEY", "key")
        yield start, url, start()


def real(url, **options):
    return ServerEngine("student", base_url=url, tokenizer=str(demo.STUDENT), retry_timeout=120.0, **options)


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
class TestVLLMDeltas(ModelContract):
    measures = frozenset({"logprobs", "score"})  # by the protocol beside it
    knows_its_cache = True
    fewest_pieces = 1

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def served(cls, vllm_server):
        start, cls.url, cls.process = vllm_server
        cls.start = staticmethod(start)

    @classmethod
    def make(cls):
        return real(cls.url)

    def test_is_asked_by_deltas(self, live):
        assert live.servers == {self.url: "deltas"}

    @pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer other"}], ids=["no key", "another key"])
    def test_nobody_gets_in_without_the_key(self, headers):
        async def connect():
            async with aiohttp.ClientSession(headers=headers) as session:
                await session.ws_connect(self.url.removesuffix("/v1") + PATH)

        with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
            asyncio.run(connect())
        assert caught.value.status in (401, 403)

    def test_a_prompt_beyond_the_context_fails_its_row(self, ask):
        with pytest.raises(RequestError, match="status 400"):
            ask(request(ids=[300] * 3000))

    def test_rows_are_the_same_while_the_server_is_killed_and_started_anew(self):
        healthy = greedy(self.url)
        assert greedy(self.url, self.restart) == healthy

    def restart(self):
        self.process.kill()
        type(self).process = self.start()


def greedy(url, restart=lambda: None):
    """Write rows in chunks, restarting the server in the midst."""

    async def row(live, number):
        ids, asked = array("i", request(prompt=number).prompt_ids), 0
        while asked < 6:
            completion, asked = await live.complete(request(f"r{number}", ids=ids, tokens=6)), asked + 1
            ids.extend(completion.token_ids[:4])
            if number == 5 and asked == 3:
                await asyncio.get_running_loop().run_in_executor(None, restart)
        return ids.tolist()

    async def rows(live):
        return await together(row(live, number) for number in range(12))

    return run(real(url), then=rows)


def test_without_the_middleware_another_protocol_is_found():
    with servers.FakeServer() as server, pytest.raises(EngineDeadError, match="status 404|refused"):
        live = engine(server)
        live.protocols = ("deltas",)
        run(live, request())
