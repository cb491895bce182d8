import asyncio
import json
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from http.client import HTTPConnection
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import urlopen

import pytest

from tessy_hf import ScriptedEngine, Speaker, TessyTransform, demo
from tessy_hf.engines import transformers
from tessy_hf.engines.scripted import Script
from tessy_hf.errors import EngineDeadError

openai = pytest.importorskip("openai", reason="pip install openai")
pytest.importorskip("uvicorn", reason='pip install "tessy-hf[serve]"')
from tessy_hf.serve.app import MOST_BYTES  # noqa: E402
from tests.serve.running import running  # noqa: E402

PROMPTS = demo.prompts(4)["prompt"]
ANSWER = "the answer is 5 ."
WHOLE = 'okay so it is "2" . and then "3" . okay that is all'


def client(url):
    return openai.OpenAI(base_url=url, api_key="none", max_retries=0)


def ask(url, prompt, **options):
    messages = [{"role": "user", "content": prompt}]
    return client(url).chat.completions.create(model="pair", messages=messages, **options)


@pytest.fixture(scope="module")
def pair():
    with running(demo.transform(rows_in_flight=4)) as url:
        yield url


@pytest.fixture(scope="module")
def rows():
    """What a dataset's rows are, of the same prompts: greedy, and sampled with the recipe's seed."""

    def write(**settings):
        with demo.transform(journal=None, id_column=None, **settings) as transform:
            written = transform({"prompt": PROMPTS})
        return [dict(zip(written, values, strict=True)) for values in zip(*written.values(), strict=True)]

    return {"greedy": write(temperature=0.0), "sampled": write(seed=3)}


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "options"), [("greedy", {"temperature": 0}), ("sampled", {"seed": 3})])
def test_a_response_is_the_row_that_a_dataset_gets(pair, rows, kind, options):
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        answers = list(pool.map(lambda prompt: ask(pair, prompt, **options), PROMPTS))
    for row, answer in zip(rows[kind], answers, strict=True):
        (choice,), spans = answer.choices, answer.tessy["spans"]
        assert (choice.message.reasoning_content, choice.message.content) == (row["thinking"], row["answer"])
        assert choice.finish_reason == "stop"
        assert "".join(span["text"] for span in spans) == row["thinking"] + row["answer"]
        assert [span["author"] for span in spans] == [span["author"] for span in row["spans"]]
        assert answer.usage.completion_tokens == row["teacher_tokens"] + row["student_tokens"]
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
        assert answer.tessy["generated_teacher_tokens"] == row["generated_teacher_tokens"]


@pytest.mark.slow
def test_a_stream_has_the_text_its_authors_and_usage(pair, rows):
    chunks = list(ask(pair, PROMPTS[0], temperature=0, stream=True, stream_options={"include_usage": True}))
    row = rows["greedy"][0]
    *pieces, end, used = chunks
    parts = [(piece.choices[0].delta, getattr(piece, "tessy", {"author": None})) for piece in pieces]
    texts = [
        "".join(getattr(delta, name, None) or "" for delta, _ in parts) for name in ("reasoning_content", "content")
    ]
    assert texts == [row["thinking"], row["answer"]]
    authors = [told["author"] for _, told in parts if told["author"]]
    assert authors[0] == "student" and set(authors) == {"teacher", "student"}
    assert end.choices[0].finish_reason == "stop"
    assert "".join(span["text"] for span in end.tessy["spans"]) == "".join(texts)
    assert not used.choices and used.usage.completion_tokens == row["teacher_tokens"] + row["student_tokens"]


@pytest.mark.slow
def test_budgets_and_stop_texts_bind(pair, rows):
    row = rows["greedy"][0]
    thought = ask(pair, PROMPTS[0], temperature=0, max_tokens=8)
    assert thought.choices[0].finish_reason == "length" and not thought.choices[0].message.content
    assert row["thinking"].startswith(thought.choices[0].message.reasoning_content)
    for most in (8, 33):  # the second ends within the answer
        answer = ask(pair, PROMPTS[0], temperature=0, max_completion_tokens=most)
        assert answer.usage.completion_tokens <= most and answer.choices[0].finish_reason == "length"
    cut = ask(pair, PROMPTS[0], temperature=0, stop=["nowhere", " is"])
    assert cut.choices[0].message.content == row["answer"].partition(" is")[0]
    assert cut.choices[0].finish_reason == "stop"
    assert "".join(span["text"] for span in cut.tessy["spans"]) == row["thinking"] + cut.choices[0].message.content


@pytest.mark.slow
def test_a_request_without_a_seed_is_told_the_one_that_repeats_it(pair):
    first = ask(pair, PROMPTS[1], temperature=1.5)
    again = ask(pair, PROMPTS[1], temperature=1.5, seed=first.tessy["seed"])
    assert first.choices[0].message == again.choices[0].message
    assert ask(pair, PROMPTS[1], temperature=1.5).tessy["seed"] != first.tessy["seed"]


@pytest.mark.slow
def test_completions_answer_a_prompt(pair, rows):
    made = {"model": "pair", "prompt": PROMPTS[0], "temperature": 0}
    assert client(pair).completions.create(**made).choices[0].text == rows["greedy"][0]["answer"]
    pieces = client(pair).completions.create(**made, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == rows["greedy"][0]["answer"]


class Gated(ScriptedEngine):
    """Writes only while the gate is open."""

    def __init__(self, **options):
        super().__init__(lambda row: Script(WHOLE, ANSWER), **options)
        self.gate, self.asked, self.released = threading.Event(), threading.Semaphore(0), threading.Semaphore(0)

    async def complete(self, request):
        self.asked.release()
        await asyncio.to_thread(self.gate.wait)
        return await super().complete(request)

    def release(self, row):
        super().release(row)
        self.released.release()


@pytest.fixture
def gated():
    """A student that writes alone, and its URL: one row in flight, and one that may wait."""
    engine = Gated()
    made = TessyTransform(
        teacher=Speaker(ScriptedEngine({})), student=Speaker(engine), method="student-only", rows_in_flight=1
    )
    with running(made, max_waiting=1) as url:
        try:
            yield engine, url
        finally:
            engine.gate.set()


@pytest.mark.slow
def test_an_answer_streams_as_it_is_written(pair, rows, monkeypatch):
    monkeypatch.setattr(transformers, "PIECE_TOKENS", 2)
    whole = rows["greedy"][0]["answer"]
    for stop, answer in ((None, whole), ("swer is", whole.partition("swer is")[0])):
        chunks = list(ask(pair, PROMPTS[0], temperature=0, stream=True, stop=stop))
        pieces = [text for chunk in chunks if (text := chunk.choices[0].delta.content)]
        assert "".join(pieces) == answer and (stop or len(pieces) > 1)
        assert "".join(span["text"] for span in chunks[-1].tessy["spans"]).endswith(answer)


REFUSED = {
    "another model": ({"model": "other"}, openai.NotFoundError, "'other' is not served here"),
    "two choices": ({"n": 2}, openai.BadRequestError, "n: input should be 1"),
    "log-probabilities": ({"logprobs": True}, openai.BadRequestError, "logprobs: .*not served"),
    "tools": ({"tools": [{"type": "function"}]}, openai.BadRequestError, "tools: .*not served"),
    "an unknown parameter": ({"extra_body": {"best": 1}}, openai.BadRequestError, "best: extra inputs"),
    "a temperature": ({"temperature": -1}, openai.BadRequestError, "temperature=-1.0 cannot be used"),
    "an empty chat": ({"messages": []}, openai.BadRequestError, "is not a prompt"),
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, openai.BadRequestError, "only text",
    ),
    "a last turn": ({"messages": [{"role": "assistant", "content": "Hi"}]}, openai.BadRequestError, "the user's turn"),
}  # fmt: skip


def test_what_is_not_served_is_refused_by_name(gated):
    _, url = gated
    for changed, kind, told in REFUSED.values():
        with pytest.raises(kind, match=told):
            made = {"model": "pair", "messages": [{"role": "user", "content": "calc"}], **changed}
            client(url).chat.completions.create(**made)
    assert [model.id for model in client(url).models.list()] == ["pair"]


def test_a_full_server_says_so_and_waiting_requests_are_answered(gated):
    engine, url = gated
    with ThreadPoolExecutor(3) as pool:
        asked = [pool.submit(ask, url, f"calc {number}") for number in range(3)]
        refused = next(as_completed(asked))  # the others are in flight and waiting
        engine.gate.set()
        with pytest.raises(openai.RateLimitError, match="Try again later") as error:
            refused.result()
        assert error.value.response.headers["retry-after"] == "1"
        texts = [one.result().choices[0].message.content for one in asked if one is not refused]
    assert texts == [ANSWER] * 2


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_stops_its_row(gated, stream):
    engine, url = gated
    body = {"model": "pair", "messages": [{"role": "user", "content": "calc 1"}], "stream": stream}
    with closing(HTTPConnection(urlsplit(url).netloc)) as connection:
        connection.request("POST", "/v1/chat/completions", json.dumps(body))
        assert engine.asked.acquire(timeout=60)
    assert engine.released.acquire(timeout=60)
    engine.gate.set()
    assert ask(url, "calc 2").choices[0].message.content == ANSWER


def test_a_body_that_is_too_large_is_refused_and_the_next_is_answered(gated):
    engine, url = gated
    engine.gate.set()
    with closing(HTTPConnection(urlsplit(url).netloc, timeout=60)) as connection:
        connection.request("POST", "/v1/chat/completions", b" " * (MOST_BYTES + 1))
        response = connection.getresponse()
        told = json.loads(response.read())["error"]
    assert response.status == told["code"] == 413 and told["type"] == "invalid_request_error"
    assert told["message"] == "The request has more than 16,777,216 bytes. Send a shorter one."
    assert ask(url, "calc 1").choices[0].message.content == ANSWER


def test_an_engine_that_is_gone_is_told_by_every_way():
    def fault(request):
        return EngineDeadError("The server is gone.")

    engine = ScriptedEngine(lambda row: Script(WHOLE), fault=fault)
    made = TessyTransform(teacher=Speaker(ScriptedEngine({})), student=Speaker(engine), method="student-only")
    with running(made) as url:
        health = url.removesuffix("/v1") + "/health"
        assert urlopen(health).status == 200
        with pytest.raises(openai.InternalServerError, match="The server is gone"):
            ask(url, "calc")
        with pytest.raises(openai.APIError, match="The server is gone"):
            list(ask(url, "calc", stream=True))
        with pytest.raises(HTTPError, match="503"):
            urlopen(health)


def test_a_pair_whose_recipe_chooses_among_candidates_answers_with_one_text():
    """Its engines need not measure anything."""
    engine = ScriptedEngine(lambda row: Script(WHOLE, ANSWER))
    given = {"method": "student-only", "best_of": 4, "chosen_by": "rsr"}
    with running(TessyTransform(teacher=Speaker(ScriptedEngine({})), student=Speaker(engine), **given)) as url:
        before = engine.requests
        assert ask(url, "calc").choices[0].message.content == ANSWER
        once = engine.requests - before
        assert ask(url, "calc").choices[0].message.content == ANSWER and engine.requests == before + 2 * once
