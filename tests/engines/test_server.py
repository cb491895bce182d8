"""The engine for models behind HTTP: with a scripted server that fails on demand, and real ones where installed."""

import asyncio
import importlib.util
import logging
import pickle
import time
import traceback
from array import array

import aiohttp
import pytest
from datasets import Dataset

from tessy_hf import Speaker, TessyTransform, TransformersEngine, demo
from tessy_hf.engines.completions_api import PROTOCOLS
from tessy_hf.engines.server import ServerEngine
from tessy_hf.errors import EngineDeadError, RequestError
from tests.engines import in_process, servers, virtual_time
from tests.engines.contract import VOCABULARY, EngineContract, ModelContract, reference, request
from tests.engines.in_process import Answer
from tests.engines.servers import FakeServer, status
from tests.test_retries import in_seconds

# Closing a transform cancels all tasks of its loop, those inside the HTTP library too, some before they began.


def engine(*replicas, **options):
    """Return an engine for scripted servers."""
    settings = {"tokenizer": str(demo.STUDENT), "timeout": 30.0, "retry_timeout": 60.0}
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

    return asyncio.run(asyncio.wait_for(session(), 120))


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


# --- the contract, in each protocol


MEASURES = frozenset({"logprobs", "score"})
"""What vLLM's servers measure."""


class FakeContract(EngineContract):
    ways, path = PROTOCOLS, "/v1/completions"

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def server(cls):
        with FakeServer(ways=cls.ways) as server:
            cls.replica = server
            yield server

    @classmethod
    def make(cls):
        return engine(cls.replica)

    def test_is_asked_in_the_best_protocol_offered(self, ask, server, live):
        (completion,) = ask(request(tokens=120))
        path, body = server.texts[-1]
        assert path == self.path
        assert ("prompt" in body and isinstance(body["prompt"], str)) == (self.ways == ("text",))
        assert list(completion.token_ids) == expected(request(tokens=120))


class TestGenerate(FakeContract):
    ways, path = ("generate", "ids"), "/inference/v1/generate"
    measures = MEASURES


class TestSGLang(FakeContract):
    """A stand-in: see :meth:`tests.engines.servers._Handler._sglang`."""

    ways, path = ("sglang", "ids-to-text"), "/generate"
    measures = frozenset({"score"})

    @pytest.mark.parametrize("count", [1, 7])
    def test_given_ids_are_scored_from_their_begin_alone(self, server, live, loop, count):
        prompt = request().prompt_ids
        ids = servers.VOCABULARY.encode("okay so 1 + 2 = 3 ? 8").ids[:count]
        told = loop.run_until_complete(live.score(prompt, ids, row="r"))
        logprobs, ranks, _ = reference(prompt, ids)
        assert told.logprobs == pytest.approx(logprobs, abs=1e-3)
        assert told.ranks == [min(rank, 101) for rank in ranks]
        body = server.texts[-1][1]
        assert body["logprob_start_len"] == len(prompt) - 1 and body["sampling_params"]["max_new_tokens"] == 1


class TestSGLangThatStreamsNewIdsOnly(TestSGLang):
    ways = ("sglang", "sglang-incremental")


class TestLlamaCpp(FakeContract):
    ways, path = ("llama.cpp", "ids-to-text"), "/completion"
    streams = False


class TestIds(FakeContract):
    ways = ("ids",)
    measures = MEASURES


class TestIdsToText(FakeContract):
    ways = ("ids-to-text", "text")
    streams = False


class TestText(FakeContract):
    ways = ("text",)
    streams = False


# --- what is transient is tried again and never taken for text

LOST = {"hangs": servers.hang, "sends drop by drop": servers.trickle, "cuts the connection": servers.cut}
DOWN = {str(code): status(code) for code in (502, 503, 504, 522)}
BUSY = {
    "429": status(429),
    "529": status(529),
    "429 under status 200": servers.replying({"error": {"message": "slow down", "code": 429}}),
}
WRONG = {
    "500": status(500),
    "507": status(507),
    "no json": servers.replying(b"<html>busy</html>"),
    "no utf-8": servers.replying(b'{"choices": "\xff\xfe"}'),
    "no choices": servers.replying({"choices": []}),
    "an error under status 200": servers.replying({"error": {"message": "out of memory"}}),
    "no tokens": servers.choosing(token_ids=[]),
    "too many tokens": servers.choosing(token_ids=[1] * 1000),
}
WRONG_TEXT = {
    "no text": servers.choosing(),
    "an empty text": servers.choosing(text=""),
    "an unknown end": servers.choosing(text="okay", finish_reason="abort"),
}
TRANSIENT = {**LOST, **DOWN, **BUSY, **WRONG}
QUICKLY = {"timeout": 1.0}  # for servers that hang


@pytest.mark.slow
@pytest.mark.parametrize("mishap", TRANSIENT.values(), ids=TRANSIENT)
def test_a_server_that_fails_for_a_while_is_asked_again(mishap):
    with FakeServer(faults=[mishap, mishap]) as server:
        (completion,) = run(engine(server, **QUICKLY), request())
        assert list(completion.token_ids) == expected(request())
        assert len(server.texts) >= 3


STREAMS = {**TRANSIENT, "breaks off": servers.break_off}


@pytest.mark.slow
@pytest.mark.parametrize("ways", [("generate",), ("ids",)])
@pytest.mark.parametrize("mishap", STREAMS.values(), ids=STREAMS)
def test_a_stream_that_fails_is_resumed_after_what_arrived(mishap, ways):
    with FakeServer(ways=ways, faults=[mishap, mishap]) as server:
        pieces = stream(engine(server, **QUICKLY), request(tokens=120))
        assert len(server.texts) >= 3
        assert [i for piece in pieces for i in piece.token_ids] == expected(request(tokens=120))
        assert pieces[-1].stop_id is not None


def test_an_error_inside_a_stream_is_tried_again():
    def late(handler, body):
        handler.reply(b'data: {"error": {"message": "out of memory", "code": 500}}\n\n')

    with FakeServer(faults=[late]) as server:
        pieces = stream(engine(server), request())
    assert [i for piece in pieces for i in piece.token_ids] == expected(request())


def test_a_stream_that_fails_for_good_fails_its_row():
    with FakeServer(faults=[WRONG["500"]] * 100) as server, pytest.raises(RequestError, match="within .* log"):
        stream(engine(server, retry_timeout=0.2), request())


@pytest.mark.parametrize("mishap", WRONG_TEXT.values(), ids=WRONG_TEXT)
def test_a_text_that_cannot_be_used_is_asked_for_again(mishap):
    with FakeServer(ways=("text",), faults=[mishap, mishap]) as server:
        (completion,) = run(engine(server), request())
        assert list(completion.token_ids) == expected(request())


@pytest.mark.slow
@pytest.mark.parametrize("mishap", WRONG.values(), ids=WRONG)
def test_a_server_that_fails_a_row_for_good_fails_that_row_only(mishap):
    with FakeServer(faults=[mishap] * 100) as server, pytest.raises(RequestError, match="within .* log") as caught:
        run(engine(server, retry_timeout=0.2), request())
    assert caught.value.retryable


GONE = {**LOST, **DOWN, **BUSY}


@pytest.mark.slow
@pytest.mark.parametrize("mishap", GONE.values(), ids=GONE)
def test_a_server_that_answers_nobody_ends_the_run(mishap):
    with FakeServer(faults=[mishap] * 100) as server, pytest.raises(EngineDeadError, match="row 'r' within .* log"):
        run(engine(server, retry_timeout=0.3, **QUICKLY), request())


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


@pytest.mark.parametrize("ways", [("generate",), ("ids",)], ids=str)
@pytest.mark.parametrize("taken", [True, False])
def test_older_rows_come_first_where_the_server_schedules_by_priority(ways, taken):
    def fcfs(handler, body):
        (status(400, "priority scheduling is off") if body.get("priority") else servers._Handler.answer)(handler, body)

    paths = {} if taken else dict.fromkeys(("/inference/v1/generate", "/v1/completions"), fcfs)
    with FakeServer(ways=ways, paths=paths) as server:
        run(engine(server), request("a", order=7), request("b", order=0))
        sent = sorted(body.get("priority", -1) for _, body in server.texts)
    assert sent == ([0, 7] if taken else [-1, -1])


def test_what_was_not_in_the_cache_is_known_where_the_server_tells():
    told = {"prompt_tokens": 40, "prompt_tokens_details": {"cached_tokens": 32}}
    for usage, read in ((told, 8), (None, None)):
        with FakeServer(usage=usage) as server:
            (completion,) = run(engine(server), request())
        assert completion.uncached_prompt_tokens == read


@pytest.mark.parametrize("code", [401, 402, 403])
def test_the_servers_words_say_why_the_key_is_refused(code):
    with FakeServer(faults=[status(code, "no credit left")]) as server:
        with pytest.raises(EngineDeadError, match="no credit left.*OPENAI_API_KEY"):
            run(engine(server), request())


@pytest.mark.parametrize(
    "mishap",
    [
        status(503, "the model is still loading"),
        status(500, "the model is still loading"),
        lambda handler, body: handler.reply(b"<html>the model is still loading</html>", 502),
        servers.replying({"error": {"message": "the model is still loading"}}),
        servers.replying({"error": "the model is still loading"}),
    ],
)
def test_the_servers_words_are_in_the_error(mishap):
    with FakeServer(faults=[mishap] * 100) as server:
        with pytest.raises((EngineDeadError, RequestError), match="the model is still loading"):
            run(engine(server, retry_timeout=0.1), request())


def test_what_a_server_refuses_under_status_200_is_refused():
    refusal = servers.replying({"error": {"message": "the prompt is too long", "code": 400}})
    with FakeServer(faults=[refusal]) as server, pytest.raises(RequestError, match="400.*the prompt is too long"):
        run(engine(server), request())
    assert len(server.texts) == 1


# --- waiting as a run, in virtual time


class InProcess:
    """A server in this process, asked without sockets: `answer` turns a prompt into status and headers, or hangs."""

    url = "http://server/v1"

    def __init__(self, monkeypatch, answer):
        self.answer, self.times = answer, []
        monkeypatch.setattr(
            aiohttp, "ClientSession", lambda **_: in_process.Session(lambda *asked: self.handle(*asked))
        )

    async def handle(self, path, body):
        if path == "/v1/models":
            return Answer(200, {"data": [{"id": "student", "max_model_len": 2048}]})
        if path != "/inference/v1/generate":
            return Answer(404)
        code, headers = 200, {}
        if servers.THINK in body["token_ids"]:
            self.times.append(time.monotonic())
            code, headers = self.answer(VOCABULARY.decode(body["token_ids"]))
            if code is None:
                await asyncio.Event().wait()
        if code != 200:
            return Answer(code, {"error": {"message": "not now"}}, headers)
        probe = [*VOCABULARY.encode("0 ").ids, servers.THINK]
        ids, reason = servers.go_on(body["token_ids"] if servers.THINK in body["token_ids"] else probe, 6)
        return Answer(200, {"choices": [{"token_ids": ids, "finish_reason": reason}]})


def write(server, rows, **options):
    """Complete rows at the same time, in virtual time; return results and failures, and how long it took."""
    live = engine(server, **{"retry_timeout": 120.0, **options})

    async def session():
        try:
            await live.start()
            server.begin = time.monotonic()
            asked = [live.complete(request(f"r{i}", prompt=i, tokens=6)) for i in range(rows)]
            return await asyncio.gather(*asked, return_exceptions=True), time.monotonic() - server.begin
        finally:
            await live.close()

    return virtual_time.run(session())


@pytest.mark.parametrize("code", [429, 503])
def test_all_rows_wait_while_the_server_wants_no_requests(monkeypatch, code):
    server = InProcess(monkeypatch, lambda _: (code if time.monotonic() < server.begin + 100 else 200, {}))
    written, seconds = write(server, 40)
    assert [list(each.token_ids) for each in written] == [expected(request(prompt=i, tokens=6)) for i in range(40)]
    assert 100 <= seconds < 115
    assert len(server.times) < 300, "it was asked now and then for all rows, not by each row"


@pytest.mark.parametrize("code", [429, 503])
def test_the_run_ends_once_nobody_was_answered_for_the_retry_timeout(monkeypatch, code):
    server = InProcess(monkeypatch, lambda _: (code, {}))
    failures, seconds = write(server, 40)
    assert all(type(each) is EngineDeadError and "not now" in str(each) for each in failures)
    assert 100 < seconds <= 121 and len(server.times) < 300


LASTING = [429, 500, 502, 503, 507, 520, 525, 529]


@pytest.mark.parametrize("code", LASTING)
def test_no_row_fails_for_what_the_server_answers_to_all_of_them(monkeypatch, code):
    server = InProcess(monkeypatch, lambda _: (code if time.monotonic() < server.begin + 60 else 200, {}))
    written, _ = write(server, 20)
    assert [list(each.token_ids) for each in written] == [expected(request(prompt=i, tokens=6)) for i in range(20)]


@pytest.mark.parametrize("code", LASTING)
@pytest.mark.parametrize("good", [0, 3])
def test_a_lasting_answer_to_all_rows_ends_the_run(monkeypatch, code, good):
    server = InProcess(monkeypatch, lambda _: (code if len(server.times) > good else 200, {}))
    written, seconds = write(server, 20)
    failures = [type(each) for each in written if isinstance(each, Exception)]
    assert len(failures) == 20 - good and 100 < seconds < 135
    assert failures.count(EngineDeadError) >= len(failures) - 1, "the first one ends the run"


def test_rows_that_a_server_fails_alone_fail_even_if_they_are_the_last(monkeypatch):
    server = InProcess(monkeypatch, lambda text: (500 if "calc 1" in text else 200, {}))
    live = engine(server, retry_timeout=60.0)

    async def session():
        await live.start()
        await live.complete(request("good", prompt=7, tokens=6))
        bad = [live.complete(request(f"bad {i}", prompt=i)) for i in (1, 11, 12)]
        failures = await asyncio.gather(*bad, return_exceptions=True)
        await live.close()
        return failures

    assert [type(each) for each in virtual_time.run(session())] == [RequestError] * 3


@pytest.mark.parametrize("code", [429, 503])
def test_one_row_that_is_always_refused_fails_alone(monkeypatch, code):
    server = InProcess(monkeypatch, lambda text: (code if "calc 7 +" in text else 200, {}))
    live = engine(server, retry_timeout=60.0)

    async def others(done):
        number = 100
        while not done.is_set():
            await live.complete(request(f"r{number}", prompt=number % 10 + 100, tokens=6))
            await asyncio.sleep(1)
            live.release(f"r{number}")
            number += 1

    async def session():
        await live.start()
        done = asyncio.Event()
        going_on = asyncio.ensure_future(others(done))
        with pytest.raises(RequestError, match="not now") as caught:
            await live.complete(request("bad", prompt=7))
        done.set()
        await going_on
        await live.close()
        return caught.value.retryable

    assert virtual_time.run(session())


def test_one_row_that_hangs_fails_alone(monkeypatch):
    server = InProcess(monkeypatch, lambda text: (None if "calc 7 +" in text else 200, {}))
    live = engine(server, timeout=600.0)

    async def session():
        await live.start()
        bad = asyncio.ensure_future(live.complete(request("bad", prompt=7)))
        await asyncio.sleep(1)
        await live.complete(request("good", tokens=6))
        with pytest.raises(RequestError, match="did not answer row 'bad' within .* s.*within 600.0 s"):
            await bad
        await live.close()

    virtual_time.run(session())


def test_a_server_that_is_idle_is_not_in_an_outage(monkeypatch):
    """A row that was given up an hour ago says nothing about the server now."""
    codes = [503, 503, 503, 200]
    server = InProcess(monkeypatch, lambda _: (codes.pop(0), {}))
    live = engine(server, retry_timeout=60.0)

    async def session():
        await live.start()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(live.complete(request("a")), 0.15)
        await asyncio.sleep(3600)
        await live.complete(request("b", tokens=6))
        await live.close()

    virtual_time.run(session())


@pytest.mark.parametrize("code", [429, 503])
@pytest.mark.parametrize("kind", ["seconds", "a date"])
def test_retry_after_is_kept_by_all_rows(monkeypatch, code, kind):
    said = {"seconds": "50", "a date": in_seconds(50)}[kind]
    server = InProcess(monkeypatch, lambda _: (code if len(server.times) == 1 else 200, {"Retry-After": said}))
    written, seconds = write(server, 10, max_connections=1)
    assert 45 < seconds < 51 and len(written) == 10 and len(server.times) == 11


def test_a_retry_after_beyond_the_retry_timeout_is_not_waited_for(monkeypatch):
    server = InProcess(monkeypatch, lambda _: (429, {"Retry-After": "50"}))
    (failure,), seconds = write(server, 1, retry_timeout=5.0)
    assert isinstance(failure, EngineDeadError) and "429" in str(failure) and seconds < 1


def test_waiting_is_logged_soon_and_every_ten_seconds_once_for_all_rows(monkeypatch, caplog):
    server = InProcess(monkeypatch, lambda _: (429 if time.monotonic() < server.begin + 42 else 200, {}))
    write(server, 20)
    told = [record.getMessage() for record in caplog.records if "no answer for" in record.getMessage()]
    seconds = [text.split("no answer for ")[1].split(" s.")[0] for text in told]
    assert seconds == ["1", "11", "21", "31", "41", "51"][: len(told)]
    assert len(told) in (5, 6) and all("answered 429: 'not now'" in text for text in told)


def test_a_wait_of_a_moment_is_not_logged(monkeypatch, caplog):
    server = InProcess(monkeypatch, lambda _: (429 if len(server.times) % 2 else 200, {}))
    write(server, 100)
    assert "no answer for" not in caplog.text


def test_a_server_that_is_not_up_is_named_soon(monkeypatch, caplog):
    async def starting(*asked):
        if time.monotonic() < 1000 + 20:
            raise in_process.refused()
        return await up(*asked)

    server = InProcess(monkeypatch, lambda _: (200, {}))
    up, server.handle = server.handle, starting
    write(server, 1)
    told = [record.getMessage() for record in caplog.records if "no answer for" in record.getMessage()]
    assert len(told) in (2, 3) and all(
        "http://server/v1 cannot be reached: [Errno 111] Connection refused" in text for text in told
    )
    assert "no answer for 1 s" in told[0] and "after 120 s" in told[0]


# --- how much at once


@pytest.mark.slow
def test_a_busy_server_is_asked_for_less_until_all_rows_are_done():
    def at_most_four(handler, body):
        if handler.server.fake.at_once > 4:
            refused.append(body)
            return status(429, Retry_After="0")(handler, body)
        return servers.slowly(0.1)(handler, body)

    refused = []
    asked = [request(f"r{i}", prompt=i % 10) for i in range(60)]
    with FakeServer(paths={"/inference/v1/generate": at_most_four}) as server:
        completions = run(engine(server, max_connections=32, retry_timeout=30), *asked)
    assert [list(c.token_ids) for c in completions] == [expected(r) for r in asked]
    assert refused


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
    """Two answers are too few for any row to be finished before the death, so that all of them move."""
    with FakeServer(faults=[None, None, servers.die]) as one, FakeServer() as two:
        texts = run(engine(one, two), then=chunks(20))
        assert one.closing.is_set()
    assert texts == [whole(i) for i in range(20)]
    assert len(rows_seen(two)) == 20


@pytest.mark.slow
@pytest.mark.parametrize("mishap", [servers.hang, servers.cut, status(500), servers.choosing(token_ids=[])])
def test_a_row_that_its_replica_fails_is_done_by_another(mishap):
    def every_row(handler, body):
        if servers.THINK in body["token_ids"]:
            mishap(handler, body)
        else:
            handler.answer(body)

    broken = {"/inference/v1/generate": every_row}
    with FakeServer(paths=broken) as one, FakeServer() as two:
        completions = run(engine(one, two, **QUICKLY), *(request(f"r{i}", prompt=i) for i in range(6)))
        assert one.texts
    assert [list(c.token_ids) for c in completions] == [expected(request(prompt=i)) for i in range(6)]


def test_all_replicas_gone_end_the_run():
    with FakeServer(faults=[None] * 3 + [servers.die]) as one, FakeServer(faults=[None] * 3 + [servers.die]) as two:
        with pytest.raises(EngineDeadError, match="cannot be reached.*log"):
            run(engine(one, two, retry_timeout=1.0), then=chunks(20))


# --- before the run


def refused(message, *, options=None, **server):
    with FakeServer(**server) as fake:
        with pytest.raises(EngineDeadError, match=message) as caught:
            run(engine(fake, **{"retry_timeout": 0.3, **(options or {})}))
        assert not fake.texts
    return str(caught.value)


@pytest.mark.slow
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
        refused("does not tokenize as .*against.*Pass ServerEngine\\(..., tokenizer=\\)", tokenize=tokenize)


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


@pytest.mark.slow
@pytest.mark.parametrize("mishap", [servers.hang, servers.cut, status(503), servers.replying(b"{")])
def test_a_server_that_does_not_come_up_is_told(mishap):
    refused("did not answer its first request.*log", paths={"/v1/models": mishap}, options={"timeout": 0.2})


def test_a_server_that_is_not_there_is_told():
    with FakeServer() as server:
        pass
    with pytest.raises(EngineDeadError, match="cannot be reached.*timeout= and retry_timeout="):
        run(engine(server, retry_timeout=0.3))


def test_a_key_that_is_refused_is_told():
    refused("refuses the key.*environment variable MY_KEY", paths={"/v1/models": status(401)},
            options={"api_key_env": "MY_KEY"})  # fmt: skip


@pytest.mark.slow
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
        live = engine(server, retry_timeout=0)

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


def test_a_key_that_no_header_can_carry_ends_the_start(monkeypatch):
    monkeypatch.setenv("MY_KEY", "a\nb")
    with FakeServer() as server, pytest.raises(EngineDeadError, match="MY_KEY.*ASCII"):
        run(engine(server, api_key_env="MY_KEY"))
    assert not server.requests


def test_redirects_are_not_followed(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    with FakeServer() as other:
        away = status(307, Location=other.url + "/completions")
        with FakeServer(faults=[away]) as server, pytest.raises(RequestError, match="status 307"):
            run(engine(server), request())
        refused("status 307", paths={"/v1/models": away})
        assert not other.requests


def test_the_retry_timeout_goes_by_its_former_name_too():
    url = "http://one/v1"
    assert ServerEngine("student", base_url=url, patience=7.0).retry_timeout == 7.0
    assert ServerEngine("student", base_url=url, retry_timeout=8.0).retry_timeout == 8.0
    assert ServerEngine("student", base_url=url).retry_timeout == 120.0


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


@pytest.mark.slow
def test_a_replica_that_dies_in_mid_run_costs_no_row():
    with FakeServer() as one, FakeServer() as two:
        healthy = texts(rows(engine(one, two), 60))
    with FakeServer(faults=[None] * 15 + [servers.die]) as one, FakeServer() as two:
        shaken = texts(rows(engine(one, two), 60, rows_in_flight=16))
        assert one.closing.is_set()
    assert healthy == shaken
    assert [row for row, *_ in shaken] == [f"r{i}" for i in range(60)]
    assert {finish for *_, finish in shaken} == {"stop"} and "okay so 7 + 1" in shaken[7][1]


def test_the_only_server_that_dies_in_mid_run_ends_it():
    with FakeServer(faults=[None] * 15 + [servers.die]) as server:
        with pytest.raises(EngineDeadError, match="cannot be reached.*server's log"):
            rows(engine(server, retry_timeout=0.5), 60, rows_in_flight=16)


def test_a_row_that_no_server_can_write_is_recorded_and_the_others_are_written():
    def poison(handler, body):
        poisoned = " 7 +" in VOCABULARY.decode(body["token_ids"])
        (status(500) if poisoned else type(handler).answer)(handler, body)

    with FakeServer(paths={"/inference/v1/generate": poison}) as one:
        written = rows(engine(one, retry_timeout=0.2), 20, max_attempts=2)
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
    protocols = PROTOCOLS[PROTOCOLS.index("ids") :]


class TextOnly(ServerEngine):
    protocols = PROTOCOLS[PROTOCOLS.index("ids-to-text") :]


class VLLMContract(ModelContract):
    knows_its_cache = True
    fewest_pieces = 1
    measures = MEASURES
    engine = ServerEngine

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def replicas(cls, vllm_replicas):
        cls.urls = [url for url, _ in vllm_replicas]

    @classmethod
    def make(cls):
        return cls.engine("student", base_url=cls.urls, tokenizer=str(demo.STUDENT))

    def test_is_asked_in_the_best_protocol_offered(self, live):
        best = next(one for one in self.engine.protocols if one != "deltas")  # these servers have no middleware
        assert live.servers == {url: best for url in self.urls}

    def test_tells_how_much_of_a_prompt_was_not_in_the_cache(self, ask):
        ids = VOCABULARY.encode(" ".join([self.engine.__name__, *map(str, range(40))])).ids  # one for each class
        (first,), (again,) = ask(request(self.engine.__name__, ids=ids)), ask(request(self.engine.__name__, ids=ids))
        assert first.uncached_prompt_tokens > 32 >= again.uncached_prompt_tokens > 0


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
    measures = frozenset()


@needs_vllm
@slow
def test_another_model_or_tokenizer_than_vllm_serves_is_told(vllm_replicas, tmp_path):
    url = vllm_replicas[0][0]
    with pytest.raises(EngineDeadError, match="serves student, not 'Qwen/Qwen3-8B'"):
        run(ServerEngine("Qwen/Qwen3-8B", base_url=url, tokenizer=str(demo.STUDENT)))
    with pytest.raises(EngineDeadError, match="does not tokenize as"):
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

    settings = {"tokenizer": str(demo.STUDENT), "retry_timeout": 10.0}
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
        assert live.servers == {self.url: "text"}

    def test_rows_are_those_of_transformers_in_this_process(self):
        written = texts(rows(self.make(), 6))
        assert written == texts(rows(TransformersEngine(demo.STUDENT), 6))
        assert {finish for *_, finish in written} == {"stop"}
