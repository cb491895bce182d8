"""Models behind HTTP: real servers where they are installed, and a scripted one that fails on demand."""

import asyncio
import importlib.util
import logging
import pickle
import time
import traceback
from array import array

import pytest
from datasets import Dataset

from tessy_hf import Speaker, TessyTransform, TransformersEngine, demo
from tessy_hf.engines.server import POOL, WAYS, ServerEngine, _Replica
from tessy_hf.errors import EngineDeadError, RequestError, SettingsError
from tests.engines import servers
from tests.engines.contract import VOCABULARY, EngineContract, ModelContract, request
from tests.engines.servers import FakeServer, status

# Closing a transform cancels all tasks of its loop, those inside the HTTP library too, some before they began.


def engine(*replicas, **options):
    """Return an engine for scripted servers. It is impatient."""
    settings = {"tokenizer": str(demo.STUDENT), "timeout": 5.0, "patience": 5.0}
    return ServerEngine("student", base_url=[replica.url for replica in replicas], **{**settings, **options})


def run(engine, *requests, then=None):
    """Start an engine, send requests at the same time, do what comes then, and close it."""

    async def session():
        try:
            await engine.start()
            completions = await together(map(engine.complete, requests))
            return completions if then is None else await then(engine)
        finally:
            await engine.close()

    return asyncio.run(asyncio.wait_for(session(), 60))


def stream(engine, asked):
    """Start an engine, read a stream to its end, and close it."""

    async def read(engine):
        return [piece async for piece in engine.stream(asked)]

    return run(engine, then=read)


async def together(coroutines):
    """Wait for all, then raise the first failure: nothing is left under way."""
    results = await asyncio.gather(*coroutines, return_exceptions=True)
    for failed in filter(lambda result: isinstance(result, BaseException), results):
        raise failed
    return results


def expected(asked):
    ids, _ = servers.go_on(list(asked.prompt_ids), asked.max_tokens)
    return [token for token in ids if token not in asked.stop_ids]


# --- the contract, in each of the ways in which a server can be asked


class FakeContract(EngineContract):
    ways = WAYS

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def server(cls):
        with FakeServer(ways=cls.ways) as server:
            cls.replica = server
            yield server

    @classmethod
    def make(cls):
        return engine(cls.replica)

    def test_is_asked_in_the_best_way_offered(self, ask, server, live):
        (completion,) = ask(request(tokens=120))
        path, body = server.texts[-1]
        assert path == ("/inference/v1/generate" if "generate" in self.ways else "/v1/completions")
        assert isinstance(body.get("token_ids") or body["prompt"], str) == (self.ways == ("text",))
        assert list(completion.token_ids) == expected(request(tokens=120))


class TestGenerate(FakeContract):
    ways = ("generate", "ids")


class TestIds(FakeContract):
    ways = ("ids",)


class TestIdsToText(FakeContract):
    ways = ("ids-to-text", "text")
    streams = False


class TestText(FakeContract):
    ways = ("text",)
    streams = False


# --- what may pass is tried again and never taken for text

LOST = {"hangs": servers.hang, "sends drop by drop": servers.trickle, "cuts the connection": servers.cut}
DOWN = {"502": status(502), "503": status(503), "504": status(504)}
WRONG = {
    "500": status(500),
    "no json": servers.replying(b"<html>busy</html>"),
    "half a json": servers.replying(b'{"choices": [{"token_ids": [1, 2'),
    "no utf-8": servers.replying(b'{"choices": "\xff\xfe"}'),
    "a deep json": servers.replying(b"[" * 100_000),
    "a list": servers.replying([1, 2, 3]),
    "null": servers.replying(None),
    "no choices": servers.replying({"choices": []}),
    "choices of a wrong type": servers.replying({"choices": "text"}),
    "a choice of a wrong type": servers.replying({"choices": ["text"]}),
    "two choices": servers.replying({"choices": [{"token_ids": [1]}, {"token_ids": [2]}]}),
    "no tokens": servers.choosing(token_ids=[]),
    "no token list": servers.choosing(token_ids=None),
    "text instead": servers.choosing(text="okay"),
    "tokens of a wrong type": servers.choosing(token_ids=["okay", "so"]),
    "tokens that are floats": servers.choosing(token_ids=[1.0]),
    "tokens that are truths": servers.choosing(token_ids=[True]),
    "negative tokens": servers.choosing(token_ids=[-1]),
    "tokens of no vocabulary": servers.choosing(token_ids=[10**12]),
    "too many tokens": servers.choosing(token_ids=[1] * 1000),
}
WRONG_TEXT = {
    "no text": servers.choosing(),
    "a text of a wrong type": servers.choosing(text=7),
    "an empty text": servers.choosing(text=""),
    "part of a character": servers.choosing(text="\ufffd"),
    "an unknown end": servers.choosing(text="okay", finish_reason="abort"),
    "no end": servers.choosing(text="okay", finish_reason=None),
}


@pytest.mark.slow
@pytest.mark.parametrize("mishap", [*LOST.values(), *DOWN.values(), *WRONG.values()], ids=[*LOST, *DOWN, *WRONG])
def test_a_server_that_fails_for_a_while_is_asked_again(mishap):
    with FakeServer(faults=[mishap, mishap]) as server:
        (completion,) = run(engine(server, timeout=2), request())
        assert list(completion.token_ids) == expected(request())
        assert len(server.texts) == 3


STREAMS = {**LOST, **DOWN, **WRONG, "breaks off": servers.break_off}


@pytest.mark.slow
@pytest.mark.parametrize("ways", [("generate",), ("ids",)])
@pytest.mark.parametrize("mishap", STREAMS.values(), ids=STREAMS)
def test_a_stream_that_fails_goes_on_after_what_came(mishap, ways):
    with FakeServer(ways=ways, faults=[mishap, mishap]) as server:
        pieces = stream(engine(server, timeout=2), request(tokens=120))
        assert len(server.texts) == 3
        assert [i for piece in pieces for i in piece.token_ids] == expected(request(tokens=120))
        assert pieces[-1].stop_id is not None


def test_a_stream_that_fails_for_good_fails_its_row():
    with FakeServer(faults=[WRONG["500"]] * 100) as server, pytest.raises(RequestError, match="within .* log"):
        stream(engine(server, patience=0.2), request())


@pytest.mark.parametrize("mishap", WRONG_TEXT.values(), ids=WRONG_TEXT)
def test_a_text_that_is_none_is_asked_for_again(mishap):
    with FakeServer(ways=("text",), faults=[mishap, mishap]) as server:
        (completion,) = run(engine(server), request())
        assert list(completion.token_ids) == expected(request())


@pytest.mark.parametrize("mishap", WRONG.values(), ids=WRONG)
def test_a_server_that_fails_a_row_for_good_fails_that_row_only(mishap):
    with FakeServer(faults=[mishap] * 100) as server, pytest.raises(RequestError, match="within .* log") as caught:
        run(engine(server, patience=0.2), request())
    assert caught.value.retryable


@pytest.mark.parametrize("mishap", [*LOST.values(), *DOWN.values()], ids=[*LOST, *DOWN])
def test_a_server_that_is_gone_ends_the_run(mishap):
    with FakeServer(faults=[mishap] * 100) as server, pytest.raises(EngineDeadError, match="within .* log"):
        run(engine(server, timeout=0.2, patience=0.3), request())


def test_a_row_that_hangs_does_not_end_the_run_while_others_are_answered():
    with FakeServer(faults=[servers.hang] * 2) as server:
        live = engine(server, timeout=2, patience=0.2)

        async def session():
            await live.start()
            try:
                bad = asyncio.ensure_future(live.complete(request("bad")))
                while not bad.done():
                    if len(server.texts) >= 2:
                        await live.complete(request("good"))
                    await asyncio.sleep(0.02)
                return await bad
            finally:
                await live.close()

        with pytest.raises(RequestError, match="did not answer row 'bad'"):
            asyncio.run(session())


def test_what_the_server_refuses_fails_the_row_at_once():
    with FakeServer(faults=[status(400, "the prompt is too long")]) as server:
        with pytest.raises(RequestError, match="status 400.*the prompt is too long") as caught:
            run(engine(server), request())
        assert not caught.value.retryable and len(server.texts) == 1


@pytest.mark.parametrize("code", [401, 403])
def test_a_key_that_is_refused_ends_the_run_at_once(code):
    with FakeServer(faults=[status(code)]) as server:
        with pytest.raises(EngineDeadError, match="refuses the key.*OPENAI_API_KEY"):
            run(engine(server), request())
        assert len(server.texts) == 1


def test_a_text_that_is_too_long_is_cut_and_goes_on():
    long = servers.choosing(text="okay so " * 50, finish_reason="stop")
    with FakeServer(ways=("text",), faults=[long]) as server:
        (completion,) = run(engine(server), request(tokens=5))
    assert len(completion.token_ids) == 5 and completion.stop_id is None


def test_a_stop_that_the_server_leaves_in_the_text_is_taken_out():
    loose = servers.choosing(text=" okay\n</think>\n\n7", finish_reason="length")
    with FakeServer(ways=("text",), faults=[loose]) as server:
        (completion,) = run(engine(server), request())
    assert VOCABULARY.decode(completion.token_ids) == " okay\n" and completion.stop_id is not None


def usage(tokens, cached):
    return {"prompt_tokens": tokens, "prompt_tokens_details": {"cached_tokens": cached}}


@pytest.mark.parametrize(
    ("said", "read"),
    [
        (usage(40, 32), 8),
        (usage(40, 0), 40),
        (usage(40, 41), None),
        (usage(40, -1), None),
        (usage(40, "32"), None),
        (usage(40.0, 32), None),
        (usage(True, True), None),
        ({"prompt_tokens": 40}, None),
        ({"prompt_tokens": 40, "prompt_tokens_details": None}, None),
        ({"prompt_tokens_details": {"cached_tokens": 32}}, None),
        ([40, 32], None),
        (None, None),
    ],
)
@pytest.mark.parametrize("ways", [("generate",), ("text",)])
def test_what_was_not_in_the_cache_is_known_where_the_server_tells(said, read, ways):
    with FakeServer(ways=ways, usage=said) as server:
        (completion,) = run(engine(server), request())
    assert completion.prompt_tokens_read == read
    assert list(completion.token_ids) == expected(request())


def test_an_end_that_only_the_server_knows_is_no_text():
    with FakeServer(faults=[servers.choosing(token_ids=[304, 7], finish_reason="stop")]) as server:
        (completion,) = run(engine(server), request())
    assert (list(completion.token_ids), completion.stop_id) == ([304], 7)


# --- how often, how soon, how much at once


@pytest.mark.parametrize("code", [429, 503])
def test_retry_after_is_kept(code):
    with FakeServer(faults=[status(code, Retry_After="0.5")]) as server:
        begin = time.monotonic()
        run(engine(server), request())
        assert time.monotonic() - begin >= 0.5


@pytest.mark.parametrize("said", ["Fri, 31 Dec 1999 23:59:59 GMT", "-5", "nan", "soon", ""])
def test_a_retry_after_that_is_no_number_of_seconds_does_no_harm(said):
    with FakeServer(faults=[status(429, Retry_After=said)]) as server:
        run(engine(server), request())


def test_a_retry_after_beyond_patience_is_not_waited_for():
    with FakeServer(faults=[status(429, Retry_After="50")]) as server, pytest.raises(RequestError, match="429"):
        run(engine(server), request())


def test_a_busy_server_is_asked_for_less_until_all_rows_are_done():
    def at_most_four(handler, body):
        if handler.server.fake.at_once > 4:
            refused.append(body)
            return status(429, Retry_After="0")(handler, body)
        return servers.slowly(0.1)(handler, body)

    refused = []
    asked = [request(f"r{i}", prompt=i % 10) for i in range(60)]
    with FakeServer(paths={"/inference/v1/generate": at_most_four}) as server:
        completions = run(engine(server, max_connections=32, patience=30), *asked)
    assert [list(c.token_ids) for c in completions] == [expected(r) for r in asked]
    assert refused


def test_the_window_halves_once_for_what_was_sent_together():
    async def session():
        replica = _Replica("http://127.0.0.1", 8)
        entered = [await replica.enter() for _ in range(8)]
        for each in entered:
            await replica.leave(each, busy=True)
        halved = [await replica.enter() for _ in range(4)]
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(replica.enter(), 0.05)
        for each in halved:
            await replica.leave(each)
        return [await asyncio.wait_for(replica.enter(), 5) for _ in range(4)]

    asyncio.run(session())


def test_connections_are_used_again():
    async def then(live):
        for i in range(10):
            await live.complete(request(f"r{i}"))

    with FakeServer() as server:
        run(engine(server), then=then)
        assert server.accepted == 1


def test_many_requests_at_once_share_pools_whose_connections_are_used_again():
    many = 2 * POOL + 4

    async def then(live):
        for _ in range(3):
            await together(live.complete(request(f"r{i}")) for i in range(many))
        return [pool.requests for pool in live._live._pools]

    with FakeServer() as server:
        assert run(engine(server), then=then) == [0, 0, 0]
        assert server.accepted <= many


# --- replicas


def chunks(rows):
    """Write rows in three chunks each, all at the same time; return their ids."""

    async def write(live, row, number):
        ids = array("i", request(prompt=number).prompt_ids)
        begin = len(ids)
        for _ in range(3):
            ids.extend((await live.complete(request(row, ids=ids, tokens=6))).token_ids)
        return list(ids[begin:])

    async def then(live):
        return await together(write(live, f"row {i}", i) for i in range(rows))

    return then


def whole(number):
    return expected(request(prompt=number, tokens=18))


def rows_seen(server):
    """The prompts of the rows that a server was asked for."""
    ids = [body["token_ids"] for _, body in server.texts]
    return {VOCABULARY.decode(each[: each.index(servers.THINK)]) for each in ids}


def test_a_row_stays_with_its_replica():
    with FakeServer() as one, FakeServer() as two:
        texts = run(engine(one, two), then=chunks(20))
    assert texts == [whole(i) for i in range(20)]
    assert rows_seen(one) and rows_seen(two) and not rows_seen(one) & rows_seen(two)


def test_rows_move_when_their_replica_dies_and_stay_where_they_went():
    with FakeServer(faults=[None] * 8 + [servers.die]) as one, FakeServer() as two:
        texts = run(engine(one, two), then=chunks(20))
    assert texts == [whole(i) for i in range(20)]
    assert len(rows_seen(two)) == 20 > len(rows_seen(one)) > 0


@pytest.mark.parametrize("mishap", [servers.hang, servers.cut, status(500), servers.choosing(token_ids=[])])
def test_a_row_that_its_replica_fails_is_done_by_another(mishap):
    def every_row(handler, body):
        if servers.THINK in body["token_ids"]:
            mishap(handler, body)
        else:
            handler.answer(body)

    broken = {"/inference/v1/generate": every_row}
    with FakeServer(paths=broken) as one, FakeServer() as two:
        completions = run(engine(one, two, timeout=2), *(request(f"r{i}", prompt=i) for i in range(6)))
        assert one.texts
    assert [list(c.token_ids) for c in completions] == [expected(request(prompt=i)) for i in range(6)]


def test_all_replicas_gone_end_the_run():
    with FakeServer(faults=[None] * 3 + [servers.die]) as one, FakeServer(faults=[None] * 3 + [servers.die]) as two:
        with pytest.raises(EngineDeadError, match="cannot be reached.*log"):
            run(engine(one, two, patience=1.0), then=chunks(20))


# --- before the run


def refused(message, *, options=None, **server):
    with FakeServer(**server) as fake:
        with pytest.raises(EngineDeadError, match=message) as caught:
            run(engine(fake, **{"patience": 0.3, **(options or {})}))
        assert not fake.texts
    return str(caught.value)


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ([{"id": "teacher"}, {"id": "other"}], "serves teacher, other, not 'student'.*Pass the served name"),
        ([], "serves nothing, not 'student'"),
        ("student", "serves nothing, not 'student'"),
        (["student"], "serves nothing, not 'student'"),
        ([{"id": "student"}], "does not say how long a context.*context_length="),
        ([{"id": "student", "max_model_len": "long"}], "does not say how long a context.*context_length="),
    ],
)
def test_a_server_of_something_else_is_told(models, message):
    refused(message, models=models)


def test_the_context_is_the_shorter_of_what_is_said():
    async def then(live):
        return live.context_length

    longer = [{"id": "student", "max_model_len": 4096}]
    with FakeServer() as one, FakeServer(models=longer) as two, FakeServer(models=[{"id": "student"}]) as silent:
        assert run(engine(one, two), then=then) == 2048
        assert run(engine(one, context_length=100), then=then) == 100
        assert run(engine(one, context_length=9000), then=then) == 2048
        assert run(engine(silent, context_length=9000), then=then) == 9000


def test_another_tokenizer_is_told():
    def shifted(text):
        return [token + 1 for token in VOCABULARY.encode_template(text)]

    def without_think(text):  # the base model's tokenizer: the same but for the markers
        return [i for piece in text.split("<think>") for i in VOCABULARY.encode_template(piece)]

    for tokenize in (shifted, without_think):
        refused("does not tokenise as .*against.*Pass ServerEngine\\(..., tokenizer=\\)", tokenize=tokenize)


@pytest.mark.parametrize(
    "paths",
    [
        {"/tokenize": servers.replying({"tokens": []})},  # llama.cpp's, which wants another field
        {"/tokenize": servers.replying(b"no json")},
        {"/tokenize": status(401), "/inference/v1/generate": status(403)},  # gateways that do not know the path
        {"/tokenize": status(500), "/inference/v1/generate": status(500)},
        {"/tokenize": status(307, Location="/"), "/inference/v1/generate": servers.replying({"ok": True})},
    ],
)
def test_what_is_only_offered_by_some_need_not_be_there(paths):
    with FakeServer(paths=paths) as server:
        (completion,) = run(engine(server), request())
        generates = "/inference/v1/generate" not in paths
        assert server.texts[-1][0] == ("/inference/v1/generate" if generates else "/v1/completions")
    assert list(completion.token_ids) == expected(request())


def test_a_server_without_completions_is_told():
    refused("refused a request to /v1/completions .status 404.*completions server is expected", ways=(), tokenize=None,
            paths={"/v1/completions": status(404)})  # fmt: skip


def test_an_address_without_its_version_is_told():
    with FakeServer() as server:
        live = ServerEngine("student", base_url=server.url.removesuffix("/v1"), tokenizer=str(demo.STUDENT))
        with pytest.raises(EngineDeadError, match="/models .status 404.*base_url, which mostly ends in /v1"):
            run(live)


@pytest.mark.parametrize("mishap", [servers.hang, servers.cut, status(503), servers.replying(b"{")])
def test_a_server_that_does_not_come_up_is_told(mishap):
    refused("did not answer its first request.*log", paths={"/v1/models": mishap}, options={"timeout": 0.2})


def test_a_server_that_is_not_there_is_told():
    with FakeServer() as server:
        pass
    with pytest.raises(EngineDeadError, match="cannot be reached.*timeout= and patience="):
        run(engine(server, patience=0.3))


def test_a_key_that_is_refused_is_told():
    refused("refuses the key.*environment variable MY_KEY", paths={"/v1/models": status(401)},
            options={"api_key_env": "MY_KEY"})  # fmt: skip


def test_a_server_that_is_still_starting_is_waited_for():
    loading = [status(503), servers.cut, servers.replying(b"starting"), status(500)]

    def models(handler, body):
        (loading.pop(0) if loading else type(handler).answer)(handler, body)

    with FakeServer(paths={"/v1/models": models}) as server:
        run(engine(server), request())
    assert not loading


def test_teacher_and_student_may_be_one_engine():
    async def session():
        with FakeServer() as server:
            live = engine(server)
            await asyncio.gather(live.start(), live.start())
            await live.complete(request())
            await live.close()
            return [path for path, _, _ in server.requests].count("/v1/models")

    assert asyncio.run(session()) == 1


def test_a_start_that_failed_can_be_tried_again():
    async def session():
        with FakeServer(models=[]) as server:
            live = engine(server)
            for failed in await asyncio.gather(live.start(), live.start(), return_exceptions=True):
                assert isinstance(failed, EngineDeadError)
            server.models = [{"id": "student", "max_model_len": 64}]
            await live.start()
            await live.close()

    asyncio.run(session())


def test_a_tokenizer_that_is_not_there_is_told(tmp_path):
    with FakeServer() as server, pytest.raises(EngineDeadError, match="could not be loaded.*tokenizer="):
        run(engine(server, tokenizer=str(tmp_path / "nothing")))


# --- keys and addresses

SECRET = "sk-planted-0123456789abcdef"


def test_the_key_is_sent_and_shown_nowhere(monkeypatch, caplog):
    def echo(handler, body):
        status(400, f"bad header: {handler.headers['Authorization']} " + "x" * 300)(handler, body)

    def echo_where_it_is_cut(handler, body):
        status(400, "x" * 260 + handler.headers["Authorization"])(handler, body)

    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    caplog.set_level(logging.DEBUG)
    shown = []
    mishaps = [echo, echo_where_it_is_cut, status(401, SECRET), status(500, SECRET), servers.cut, servers.die]
    with FakeServer(faults=mishaps) as server:
        live = engine(server, patience=0)

        async def session():
            await live.start()
            shown.extend([repr(live), repr(pickle.dumps(live)), repr(live.identity), str(vars(live))])
            for _ in mishaps:
                with pytest.raises((RequestError, EngineDeadError)) as caught:
                    await live.complete(request())
                shown.extend(traceback.format_exception(caught.value))
                shown.append(repr(caught.value))
            await live.close()

        asyncio.run(session())
    assert server.requests[-1][2]["Authorization"] == f"Bearer {SECRET}"
    assert not [text for text in [*shown, caplog.text] if SECRET[:12] in text]
    assert "[key]" in "".join(shown)


def test_a_key_that_no_header_can_carry_is_not_shown(monkeypatch):
    for odd in ("\n", "…"):
        monkeypatch.setenv("OPENAI_API_KEY", SECRET + odd + SECRET)
        with FakeServer() as server, pytest.raises(EngineDeadError, match="OPENAI_API_KEY.*ASCII") as caught:
            run(engine(server))
        assert SECRET not in "".join(traceback.format_exception(caught.value))


def test_the_line_end_of_a_key_read_from_a_file_is_no_part_of_it(monkeypatch):
    monkeypatch.setenv("MY_KEY", SECRET + "\n")
    with FakeServer() as server:
        run(engine(server, api_key_env="MY_KEY"))
    assert {headers["Authorization"] for _, _, headers in server.requests} == {f"Bearer {SECRET}"}


def test_no_key_sends_none(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with FakeServer() as server:
        run(engine(server))
    assert not any("Authorization" in headers for _, _, headers in server.requests)


def test_redirects_are_not_followed(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    with FakeServer() as other:
        away = status(307, Location=other.url + "/completions")
        with FakeServer(faults=[away]) as server, pytest.raises(RequestError, match="status 307"):
            run(engine(server), request())
        refused("status 307", paths={"/v1/models": away})
        assert not other.requests


@pytest.mark.parametrize(
    "address",
    [
        f"http://me:{SECRET}@127.0.0.1:8000/v1",
        f"me:{SECRET}@127.0.0.1:8000/v1",
        f"http://127.0.0.1:8000/v1?api_key={SECRET}",
        f"http://127.0.0.1:8000/v1#{SECRET}",
    ],
)
def test_an_address_that_carries_a_secret_is_refused_without_showing_it(address):
    with pytest.raises(SettingsError, match="environment variable") as caught:
        ServerEngine("student", base_url=address)
    assert SECRET not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize(
    "address", ["", "127.0.0.1:8000/v1", "ftp://host/v1", "http://", "http://host:port/v1", "http://[::1/v1",
                "http://host:99999/v1", "http://ho st/v1", "http://host/v1\n", "file:///etc/passwd", None]
)  # fmt: skip
def test_an_address_that_cannot_be_used_is_refused(address):
    with pytest.raises(SettingsError, match="base_url=.*is expected"):
        ServerEngine("student", base_url=[address])


def test_no_address_is_refused():
    with pytest.raises(SettingsError, match="got no address"):
        ServerEngine("student", base_url=[])


def test_where_a_model_is_served_does_not_tell_runs_apart():
    one = ServerEngine("student", base_url="http://one/v1/", tokenizer="x")
    two = ServerEngine("student", base_url=["https://two:8/v1", "http://[::1]:80/v1"], tokenizer="x")
    assert one.identity == two.identity and "http://one/v1'" in repr(one)


# --- inside a run


def transform(live, **settings):
    speaker = Speaker(live)
    given = {"method": "student-only", "id_column": "id", "temperature": 0.0, "max_thinking_tokens": 160,
             "max_answer_tokens": 32, "journal": None, **settings}  # fmt: skip
    return TessyTransform(teacher=speaker, student=speaker, **given)


def rows(live, count, **settings):
    prompts = [f"calc {i} + 1 + 2" for i in range(count)]
    dataset = Dataset.from_dict({"id": [f"r{i}" for i in range(count)], "prompt": prompts})
    with transform(live, **settings) as under_way:
        options = {"features": under_way.features(dataset), "load_from_cache_file": False}
        return list(dataset.map(under_way, batched=True, batch_size=16, **options))


def texts(written):
    return [(row["id"], row["thinking"], row["answer"], row["finish_reason"]) for row in written]


SLOWLY = {"/inference/v1/generate": servers.slowly(0.005)}


def test_a_replica_that_dies_in_mid_run_costs_no_row():
    with FakeServer() as one, FakeServer() as two:
        healthy = texts(rows(engine(one, two), 60))
    with FakeServer(paths=SLOWLY, faults=[None] * 15 + [servers.die]) as one, FakeServer(paths=SLOWLY) as two:
        shaken = texts(rows(engine(one, two), 60, rows_in_flight=16))
        assert one.closing.is_set()
    assert healthy == shaken
    assert [row for row, *_ in shaken] == [f"r{i}" for i in range(60)]
    assert {finish for *_, finish in shaken} == {"stop"} and "okay so 7 + 1" in shaken[7][1]


def test_the_only_server_that_dies_in_mid_run_ends_it():
    with FakeServer(paths=SLOWLY, faults=[None] * 15 + [servers.die]) as server:
        begin = time.monotonic()
        with pytest.raises(EngineDeadError, match="cannot be reached.*server's log"):
            rows(engine(server, patience=0.5), 60, rows_in_flight=16)
        assert time.monotonic() - begin < 30


def test_a_row_that_no_server_can_write_is_recorded_and_the_others_are_written():
    def poison(handler, body):
        poisoned = " 7 +" in VOCABULARY.decode(body["token_ids"])
        (status(500) if poisoned else type(handler).answer)(handler, body)

    with FakeServer(paths={"/inference/v1/generate": poison}) as one:
        written = rows(engine(one, patience=0.2), 20, max_attempts=2)
    assert [row["id"] for row in written if row["finish_reason"] != "stop"] == ["r7"]
    assert "answered 500" in written[7]["error"] and len(written) == 20


# --- real servers


needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
slow = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def vllm_replicas(tmp_path_factory):
    """Two real vLLM servers, as (address, process)."""
    described = [servers.vllm("--enable-scale-out", "--enable-prompt-tokens-details")] * 2
    with servers.processes(*described, logs=tmp_path_factory.mktemp("vllm"), health="/health") as running:
        yield running


class CompletionsOnly(ServerEngine):
    _ways = WAYS[1:]


class TextOnly(ServerEngine):
    _ways = WAYS[2:]


class VLLMContract(ModelContract):
    knows_its_cache = True
    engine = ServerEngine

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def replicas(cls, vllm_replicas):
        cls.urls = [url for url, _ in vllm_replicas]

    @classmethod
    def make(cls):
        return cls.engine("student", base_url=cls.urls, tokenizer=str(demo.STUDENT))

    def test_is_asked_in_the_best_way_offered(self, live):
        assert {replica.way for replica in live._live._replicas} == {self.engine._ways[0]}

    def test_tells_how_much_of_a_prompt_was_not_in_the_cache(self, ask):
        ids = VOCABULARY.encode(" ".join([self.engine.__name__, *map(str, range(40))])).ids  # one for each class
        (first,), (again,) = ask(request(self.engine.__name__, ids=ids)), ask(request(self.engine.__name__, ids=ids))
        assert first.prompt_tokens_read > 32 >= again.prompt_tokens_read > 0


@needs_vllm
@slow
class TestVLLMServer(VLLMContract):
    def test_a_prompt_beyond_the_context_fails_its_row(self, ask):
        with pytest.raises(RequestError, match="status 400"):
            ask(request(ids=[300] * 3000))


@needs_vllm
@slow
class TestVLLMCompletions(VLLMContract):
    engine = CompletionsOnly


@needs_vllm
@slow
class TestVLLMText(VLLMContract):
    engine = TextOnly
    streams = False


@needs_vllm
@slow
def test_another_model_or_tokenizer_than_vllm_serves_is_told(vllm_replicas, tmp_path):
    url = vllm_replicas[0][0]
    with pytest.raises(EngineDeadError, match="serves student, not 'Qwen/Qwen3-8B'"):
        run(ServerEngine("Qwen/Qwen3-8B", base_url=url, tokenizer=str(demo.STUDENT)))
    with pytest.raises(EngineDeadError, match="does not tokenise as"):
        run(ServerEngine("student", base_url=url, tokenizer=str(demo.TEACHER)))


@needs_vllm
@slow
def test_greedy_rows_are_those_of_transformers(vllm_replicas, tmp_path):
    """The whole method with two vocabularies: by ids in chunks, by ids in streams, by text."""
    prompts = demo.prompts(24, seed=9)

    def written(made):
        with made:
            mapped = prompts.map(made, batched=True, load_from_cache_file=False)
            return [(row["id"], row["messages"], row["spans"], row["finish_reason"]) for row in mapped]

    greedy = {"temperature": 0, "journal": None}
    expected = written(demo.transform("transformers", **greedy))
    described = servers.vllm("--enable-scale-out", author="teacher")
    with servers.processes(described, logs=tmp_path, health="/health") as ((teacher_url, _),):
        for kind, settings in ((ServerEngine, {}), (ServerEngine, {"stream": True}), (TextOnly, {})):
            made = demo.transform("transformers", **greedy, **settings)
            made.teacher.engine = kind("teacher", base_url=teacher_url, tokenizer=str(demo.TEACHER))
            made.student.engine = kind("student", base_url=vllm_replicas[0][0], tokenizer=str(demo.STUDENT))
            assert written(made) == expected, (kind, settings)


@needs_vllm
@slow
def test_a_vllm_replica_killed_in_mid_run_costs_no_row_and_the_last_one_ends_the_run(vllm_replicas):
    """The last test with these servers: it kills them."""
    (one, first), (two, second) = vllm_replicas

    class Killing(ServerEngine):
        asked, at, victim = 0, 0, None

        async def complete(self, request):
            self.asked += 1
            if self.asked == self.at:
                await asyncio.get_running_loop().run_in_executor(None, self.victim.kill)
            return await super().complete(request)

    settings = {"tokenizer": str(demo.STUDENT), "patience": 10.0}
    healthy = texts(rows(ServerEngine("student", base_url=[one, two], **settings), 48))
    killing = Killing("student", base_url=[one, two], **settings)
    killing.at, killing.victim = 40, first
    assert texts(rows(killing, 48, rows_in_flight=12)) == healthy
    assert {finish for *_, finish in healthy} == {"stop"}
    alone = Killing("student", base_url=two, **settings)
    alone.at, alone.victim = 40, second
    with pytest.raises(EngineDeadError, match="server's log"):
        rows(alone, 48, rows_in_flight=12)


NEEDED = ("openai", "uvicorn", "fastapi", "accelerate")


@pytest.mark.skipif(not all(map(importlib.util.find_spec, NEEDED)), reason='needs pip install "transformers[serving]"')
@slow
class TestTransformersServe(EngineContract):
    """A server that is not vLLM: text in and out, the stop left in the text, no seed to rely on."""

    streams = False

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def served(cls, tmp_path_factory):
        described = servers.transformers_serve(tmp_path_factory.mktemp("hub"))
        logs = tmp_path_factory.mktemp("serve")
        with servers.processes(described, logs=logs, health="/health") as ((cls.url, _),):
            yield

    @classmethod
    def make(cls):
        return ServerEngine("tessy/student", base_url=cls.url, tokenizer=str(demo.STUDENT), context_length=2048)

    test_goes_on_after_foreign_ids = ModelContract.test_goes_on_after_foreign_ids
    test_greedy_text_is_that_of_generate = ModelContract.test_greedy_text_is_that_of_generate

    def test_is_asked_by_text(self, live):
        assert live._live._replicas[0].way == "text"

    def test_rows_are_those_of_transformers_in_this_process(self):
        written = texts(rows(self.make(), 6))
        assert written == texts(rows(TransformersEngine(demo.STUDENT), 6))
        assert {finish for *_, finish in written} == {"stop"}
