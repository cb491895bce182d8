"""A secret that is planted wherever one may be is found in nothing that a run writes, shows or logs."""

import json
import logging
import os
import traceback
from pathlib import Path

import datasets
import pytest
from datasets import Dataset
from typer.testing import CliRunner

from tessy_hf import Speaker, TessyTransform, demo
from tessy_hf.cli.main import app
from tessy_hf.engines.server import ServerEngine
from tessy_hf.errors import EngineDeadError, SettingsError
from tests.engines import servers
from tests.engines.servers import FakeServer, status

KEY, HUB, USER = "sk-planted-0123456789abcdef", "hf_PlantedPlantedPlanted", "planted-password-42"
PLANTED = (KEY, HUB, USER)
PART = 10
"""So many characters of a secret in a row are a leak."""

# Closing a transform cancels all tasks of its loop, those inside the HTTP library too, some before they began.


def shown(handler):
    return handler.headers["Authorization"]


def echo(code, before=""):
    """Send back, in body and headers, what was sent along, as a careless server or proxy does."""

    def mishap(handler, body):
        status(code, f"{before}bad key: {shown(handler)}", X_Key=shown(handler), WWW_Authenticate=shown(handler))(
            handler, body
        )

    return mishap


def echo_as_text(handler, body):
    handler.reply(f"<html>{shown(handler)}</html>".encode())


def echo_as_choice(handler, body):
    handler.reply({"choices": [{"token_ids": shown(handler), "text": None, "finish_reason": shown(handler)}]})


def echo_as_retry_after(handler, body):
    status(503, Retry_After=shown(handler))(handler, body)


MISHAPS = [echo(500), echo(429), echo_as_text, echo_as_choice, echo_as_retry_after, servers.cut, echo(400),
           echo(400, "x" * 270), echo(500), echo(422)]  # fmt: skip


def transform(server, journal, **options):
    engine = ServerEngine(
        "student", base_url=server.url, tokenizer=str(demo.STUDENT), **{"timeout": 5.0, "patience": 5.0, **options}
    )
    speaker = Speaker(engine)
    return TessyTransform(
        teacher=speaker, student=speaker, method="student-only", id_column="id", temperature=0.0, journal=str(journal),
        max_thinking_tokens=160, max_answer_tokens=32, max_attempts=2,
    )  # fmt: skip


def rows(count):
    prompts = [f"calc {i} + 1 + 2" for i in range(count)]
    return Dataset.from_dict({"id": [f"r{i}" for i in range(count)], "prompt": prompts})


@pytest.fixture
def everything(monkeypatch, caplog, tmp_path):
    """Plant the secrets, log all there is to log to a file as well, and keep the cache in the test's folder."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("HF_TOKEN", HUB)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache" / "datasets")
    monkeypatch.setattr(datasets.config, "HF_CACHE_HOME", str(tmp_path / "cache"))
    file = logging.FileHandler(tmp_path / "debug.log")
    root, names = (
        logging.getLogger(),
        ("aiohttp", "asyncio", "httpx2", "huggingface_hub", "datasets", "transformers", "tessy_hf"),
    )
    levels = {name: logging.getLogger(name).level for name in names}
    caplog.set_level(logging.DEBUG)
    for name in names:
        logging.getLogger(name).setLevel(logging.DEBUG)
    root.addHandler(file)
    yield tmp_path
    root.removeHandler(file)
    file.close()
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def leaks(texts):
    """Return the names of the texts that hold a part of a secret."""
    parts = {secret[at : at + PART] for secret in PLANTED for at in range(len(secret) - PART + 1)}
    return [name for name, text in texts.items() if any(part in text for part in parts)]


def written(folder):
    """Return what is in all files under a folder."""
    files = (os.path.join(where, name) for where, _, names in os.walk(folder) for name in names)
    return {file: Path(file).read_bytes().decode("latin-1") for file in files}


@pytest.mark.slow
def test_nothing_planted_is_found_in_what_a_run_leaves(everything, capfd):
    folder, texts = everything, {}
    with FakeServer(faults=MISHAPS) as server:
        with transform(server, folder / "journal") as run:
            texts["repr"] = repr(run) + run.run_fingerprint + repr(vars(run.student.engine))
            mapped = rows(12).map(
                run,
                batched=True,
                batch_size=4,
                features=run.features(rows(12)),  # the first batch may have no error
                cache_file_name=str(folder / "rows.arrow"),
            )
            texts.update({f"under way: {name}": text for name, text in written(folder).items()})
        assert any(name.endswith("journal-wal") for name in texts)
        mapped.to_json(str(folder / "rows.jsonl"))
        assert {headers["Authorization"] for _, _, headers in server.requests} == {f"Bearer {KEY}"}
    assert not server.faults, "not all of the mishaps happened"
    errors = [row["error"] for row in mapped if row["error"]]
    assert any("[key]" in error for error in errors), "the server's words are kept, without the key"
    for arguments in (["status", "journal"], ["export", "journal", "out.jsonl"], ["export", "journal", "out.parquet"]):
        done = CliRunner().invoke(app, [str(folder / name) if name[0] in "jo" else name for name in arguments])
        assert done.exit_code == 0
        texts[str(arguments)] = done.output
    with FakeServer(faults=[servers.die]) as server, pytest.raises(EngineDeadError) as caught:
        with transform(server, folder / "journal", patience=0.2) as run:
            run(rows(20)[:])
    texts["traceback"] = "".join(traceback.format_exception(caught.value))
    with FakeServer(paths={"/v1/models": echo(401)}) as server, pytest.raises(EngineDeadError) as caught:
        with transform(server, folder / "journal") as run:
            run(rows(20)[:])
    texts["refused"] = "".join(traceback.format_exception(caught.value))
    texts["stdout"], texts["stderr"] = capfd.readouterr()
    texts.update(written(folder))
    log = texts[str(folder / "debug.log")]
    assert "Using selector" in log, "all there is to log was logged"
    assert json.loads(texts[str(folder / "out.jsonl")].splitlines()[0])["key"]
    assert leaks(texts) == []


def test_a_password_in_an_address_is_refused_and_found_nowhere(everything, capfd):
    recipe = everything / "recipe.yaml"
    speaker = {"engine": "server", "model": "student"}
    texts = {}
    for address in (f"http://me:{USER}@127.0.0.1:9/v1", f"http://127.0.0.1:9/v1?key={USER}", f"http://{USER}@h:x/v1"):
        described = {**speaker, "options": {"base_url": address}}
        recipe.write_text(json.dumps({"method": "student-only", "teacher": described, "student": described}))
        for make in (
            lambda url=address: ServerEngine("student", base_url=url),
            lambda: TessyTransform.from_yaml(recipe),
        ):
            with pytest.raises(SettingsError, match="environment variable api_key_env names|api_key_env") as caught:
                make()
            texts[f"{address[:8]} {len(texts)}"] = "".join(traceback.format_exception(caught.value))
        recipe.unlink()
    texts["stdout"], texts["stderr"] = capfd.readouterr()
    texts.update(written(everything))
    assert leaks(texts) == []
