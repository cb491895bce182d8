"""Whatever a recipe holds or a server answers: a row, or an error of ours, and never a hang."""

import asyncio
import json
import math

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tessy_hf import TessyTransform, demo, retries
from tessy_hf.engines import replicas
from tessy_hf.engines.completions_api import PROTOCOLS
from tessy_hf.engines.server import ServerEngine
from tessy_hf.errors import EngineDeadError, RequestError, TessyError
from tessy_hf.retries import RetryPolicy
from tests.engines.contract import VOCABULARY, request
from tests.engines.servers import FakeServer
from tests.test_recipe import RECIPE

NUMBERS = st.one_of(st.integers(), st.integers(-2, 300), st.sampled_from([10**30, math.nan, math.inf]), st.floats())
WORDS = st.sampled_from(["choices", "token_ids", "text", "finish_reason", "stop", "length", "index", "error"])
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=20), WORDS)


def nested(scalars, keys):
    return st.recursive(
        scalars,
        lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(keys, inner, max_size=4)),
        max_leaves=12,
    )


def put(value, draw, with_what):
    """Replace something somewhere in nested lists and dicts, or take it out."""
    places = [(value, key) for key in (value if isinstance(value, dict) else range(len(value)))]
    for container, key in places:
        inner = container[key]
        if isinstance(inner, dict | list):
            places.extend((inner, k) for k in (inner if isinstance(inner, dict) else range(len(inner))))
    if places:
        container, key = draw(st.sampled_from(places))
        if draw(st.integers(0, 5)) == 0:
            del container[key]
        elif isinstance(container, dict) and draw(st.integers(0, 4)) == 0:
            container[draw(st.text(max_size=8))] = draw(with_what)
        else:
            container[key] = draw(with_what)


# --- what a server answers

JSON = nested(SCALARS, st.one_of(WORDS, st.text(max_size=6)))
IDS = st.lists(st.one_of(st.integers(0, 300), st.sampled_from([-1, 10**9, True, 1.0, "1", None])), max_size=8)
TEXT = st.text("ab 01\n\ufffd<>/think", max_size=12)
REASONS = st.sampled_from(["stop", "length", None, "abort", 3])
LAST_ID = max(VOCABULARY.tokenizer.get_vocab().values())


@st.composite
def choices(draw):
    """An answer as it should be, or nearly."""
    good = draw(st.lists(st.integers(0, LAST_ID), min_size=1, max_size=8))
    choice = {"index": 0, "token_ids": good, "text": draw(TEXT), "finish_reason": draw(REASONS)}
    answer = {"id": "x", "choices": [choice]}
    for _ in range(draw(st.sampled_from([0, 0, 1, 2, 3]))):
        put(answer, draw, st.one_of(SCALARS, IDS, JSON))
    return answer


def encoded(value):
    return json.dumps(value).encode()


BODIES = st.one_of(
    choices().map(encoded), JSON.map(encoded), st.binary(max_size=40), st.text(max_size=40).map(str.encode)
)
STATUSES = st.one_of(st.just(200), st.just(200), st.just(200), st.integers(200, 599))
HEADERS = st.dictionaries(
    st.sampled_from(["Retry-After", "Content-Type", "Content-Encoding", "Location", "X-Other"]),
    st.one_of(
        st.sampled_from(["gzip", "br", "nan", "inf", "-1", "1e999", "application/json; charset=base64",
                         "x; charset=hex", "x; charset=undefined", "x; charset=rot13", "x; charset=utf-16", "/v1"]),
        st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=20),
    ),
    max_size=2,
)  # fmt: skip
EVENTS = st.lists(
    st.one_of(
        choices().map(lambda answer: b"data: " + encoded(answer) + b"\n\n"),
        JSON.map(lambda value: b"data:" + encoded(value) + b"\r\n\r\n"),
        st.sampled_from([b"data: [DONE]\n\n", b": ping\n\n", b"event: x\n", b"data:\n\n", b"\n", b"data: {"]),
        st.binary(max_size=20),
    ),
    max_size=6,
)  # fmt: skip


class Answering:
    """Started engines, one for each protocol, whose server answers what it is told to."""

    def __init__(self, server):
        self.next, self.asked, self.server = None, 0, server
        self.engines = {protocol: engine_by(protocol, server.url) for protocol in PROTOCOLS}

    def answer(self, handler, body):
        if self.next is None:
            choice = {"token_ids": [5], "text": "okay", "finish_reason": "length"}
            return handler.reply({"choices": [choice], "output_ids": [5], "tokens": [5], "stop_type": "limit"})
        self.asked += 1
        status, headers, pieces = self.next
        handler.send_response(status)
        for name, said in headers.items():
            handler.send_header(name, said)
        handler.send_header("Connection", "close")
        handler.end_headers()
        for piece in pieces:
            handler.wfile.write(piece)
            handler.wfile.flush()


def engine_by(protocol, url):
    class Engine(ServerEngine):
        protocols = (protocol,)

    return Engine("student", base_url=url, tokenizer=str(demo.STUDENT), timeout=5.0, retry_timeout=0.0)


@pytest.fixture(scope="module")
def answering():
    with pytest.MonkeyPatch.context() as patch, FakeServer() as fake:
        server = Answering(fake)
        paths = "/inference/v1/generate", "/v1/completions", "/generate", "/completion"
        fake.paths = dict.fromkeys(paths, server.answer)
        patch.setattr(replicas, "BACKOFF", RetryPolicy(first_pause=0.0))  # or most answers would not be asked for
        patch.setattr(retries, "LONGEST_ASKED_PAUSE", 0.0)
        loop = asyncio.new_event_loop()
        server.run = lambda work: loop.run_until_complete(asyncio.wait_for(work, 10))
        for engine in server.engines.values():
            server.run(engine.start())
        yield server
        for engine in server.engines.values():
            server.run(engine.close())
        loop.close()


def check(completion, asked):
    assert all(type(i) is int and 0 <= i <= LAST_ID for i in completion.token_ids)
    assert completion.stop_id is None or 0 <= completion.stop_id <= LAST_ID
    assert len(completion.token_ids) or completion.stop_id is not None
    assert len(completion.token_ids) <= asked.max_tokens


@pytest.mark.slow
@settings(max_examples=200)
@given(protocol=st.sampled_from(PROTOCOLS), status=STATUSES, headers=HEADERS, body=BODIES)
@example(protocol="generate", status=200, headers={}, body=b"[" * 100_000)
@example(protocol="generate", status=200, headers={}, body=b'{"choices": [{"token_ids": [' + b"9" * 5_000 + b"]}]}")
@example(protocol="text", status=200, headers={}, body=b'{"choices": [{"text": "\\ud800", "finish_reason": "stop"}]}')
@example(protocol="ids", status=200, headers={"Content-Encoding": "gzip"}, body=b"no gzip")
@example(protocol="ids", status=200, headers={"Content-Type": "application/json; charset=base64"}, body=b"{}")
@example(protocol="ids", status=400, headers={"Content-Type": "text/plain; charset=rot13"}, body=b"\xff")
def test_any_answer_is_a_completion_or_an_error_of_ours(answering, protocol, status, headers, body):
    answering.next = status, headers, [body]
    asked = request(tokens=6)
    answering.asked = 0
    try:
        completion = answering.run(answering.engines[protocol].complete(asked))
    except (RequestError, EngineDeadError) as error:
        assert len(str(error)) > 40
    else:
        check(completion, asked)
    assert answering.asked


@pytest.mark.slow
@settings(max_examples=200)
@given(data=st.data(), protocol=st.sampled_from(["generate", "ids"]), status=STATUSES, headers=HEADERS, events=EVENTS)
def test_any_stream_is_made_of_completions_or_ends_in_an_error_of_ours(
    answering, data, protocol, status, headers, events
):
    body = b"".join(events)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(body)), max_size=4)))
    pieces = [body[a:b] for a, b in zip([0, *cuts], [*cuts, len(body)], strict=True)]
    answering.next = status, headers, pieces
    asked, came = request(tokens=6), []

    async def read():
        async for piece in answering.engines[protocol].stream(asked):
            came.append(piece)

    try:
        answering.run(read())
    except (RequestError, EngineDeadError) as error:
        assert len(str(error)) > 40
    else:
        assert sum(len(piece.token_ids) for piece in came) == 6 or came[-1].stop_id is not None
    for piece in came:
        check(piece, asked)
    assert sum(len(piece.token_ids) for piece in came) <= 6


# --- what a recipe holds

NAMES = st.sampled_from(
    ["teacher", "student", "engine", "model", "options", "boundary", "template_options", "method", "dtype", "server",
     "vllm", "transformers", "base_url", "max_batch", "device", "context_length", "revision", "window"]
)  # fmt: skip
YAML_SCALARS = st.one_of(SCALARS, NAMES, st.dates(), st.datetimes(), st.binary(max_size=5))
YAML_VALUES = nested(YAML_SCALARS, st.one_of(NAMES, st.text(max_size=6), st.integers(), st.booleans(), st.none()))
OPTIONS = {
    "transformers": ["revision", "dtype", "device", "max_batch", "context_length", "trust_remote_code"],
    "vllm": ["revision", "dtype", "max_model_len", "model"],
    "server": ["base_url", "tokenizer", "revision", "api_key_env", "context_length", "timeout", "patience",
               "retry_timeout", "max_connections"],
}  # fmt: skip


@st.composite
def recipes(draw):
    """A recipe as it should be, with a few changes."""
    recipe = yaml.safe_load(RECIPE)
    for author in ("teacher", "student"):
        if draw(st.booleans()):
            engine = draw(st.sampled_from(sorted(OPTIONS)))
            options = draw(st.dictionaries(st.sampled_from(OPTIONS[engine]), YAML_VALUES, max_size=3))
            recipe[author] |= {"engine": engine, "options": options}
    for _ in range(draw(st.integers(0, 3))):
        put(recipe, draw, YAML_VALUES)
    return yaml.safe_dump(recipe, allow_unicode=True)


YAML = st.one_of(
    recipes(), recipes(), YAML_VALUES.map(yaml.safe_dump), st.text("ab:-[]{}&*!|>#%@'\"\n 0.", max_size=40)
)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*the small one that comes with tessy-hf:UserWarning")
@settings(max_examples=200)
@given(text=YAML)
@example(text="[" * 5_000)
@example(text="{" * 5_000)
@example(text="a: &a [*a]")
@example(text="&a {teacher: *a, student: *a}")
@example(text="seed: 2001-99-99")
@example(text="seed: !!int x")
@example(text="seed: !!float x")
@example(text="seed: !!timestamp x")
@example(text="seed: 0b")
@example(text="? [a]\n: 1")
@example(text="? {a: 1}\n: 1")
@example(text="<<: 1")
@example(text="!!python/name:os.system")
@example(text="a: \x00")
@example(text=RECIPE.replace("{enable_thinking: true}", "{a: {1: x, b: y}}"))
@example(text=RECIPE.replace("{enable_thinking: true}", "&a {b: *a}"))
@example(text=RECIPE.replace("max_batch: 3", "max_batch: x"))
@example(text=RECIPE.replace("window: 64", "window: -64"))
def test_any_recipe_is_a_transform_or_an_error_of_ours(tmp_path_factory, text):
    file = tmp_path_factory.getbasetemp() / "fuzzed.yaml"
    file.write_text(text, encoding="utf-8", errors="surrogatepass")
    try:
        transform = TessyTransform.from_yaml(file)
        described = transform.run_fingerprint, repr(transform)
    except TessyError as error:
        assert len(str(error)) > 20
    else:
        assert all(described)
