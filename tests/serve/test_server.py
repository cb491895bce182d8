import json
import os
import re
import signal
import socket
import subprocess
import sys
from contextlib import closing, contextmanager
from http.client import HTTPConnection
from urllib.parse import urlsplit

import pytest
import yaml

from tessy_hf import demo
from tessy_hf.errors import SettingsError
from tests.serve.running import running

pytest.importorskip("uvicorn", reason='pip install "tessy-hf[serve]"')


def recipe(folder):
    """Write a recipe of the miniature models; return its path."""
    boundaries = {"teacher": demo.BOUNDARY_TEACHER, "student": demo.BOUNDARY_STUDENT}
    models = {"teacher": demo.TEACHER, "student": demo.STUDENT}
    authors = {
        name: {"engine": "transformers", "model": str(models[name]), "boundary": str(boundaries[name])}
        for name in models
    }
    settings = {"chunk_tokens": 8, "max_thinking_tokens": 160, "max_answer_tokens": 32, "rows_in_flight": 4}
    path = folder / "miniature.yaml"
    path.write_text(yaml.safe_dump({**authors, **settings}))
    return path


@contextmanager
def command(folder, *options):
    """Run ``tessy serve``; yield the process and the base URL once it is served."""
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "  # background jobs ignore it
    code += "from tessy_hf.cli.main import main; main()"
    words = [sys.executable, "-c", code, "serve", str(recipe(folder)), "--port", "0", *options]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env={**os.environ, "COLUMNS": "200"}) as process:
        try:
            told = ""
            while (found := re.search(r"is served at (\S+)", told)) is None:
                line = process.stderr.readline()
                assert line, told
                told += line
            yield process, found[1]
        finally:
            process.kill()


@pytest.mark.slow
@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_server_after_the_requests_in_flight(tmp_path, ending):
    with command(tmp_path) as (process, url):
        messages = [{"role": "user", "content": demo.prompts(1)["prompt"][0]}]
        asked = {"model": "miniature", "messages": messages, "temperature": 0, "stream": True}
        with closing(HTTPConnection(urlsplit(url).netloc, timeout=120)) as connection:
            connection.request("POST", "/v1/chat/completions", json.dumps(asked))
            with connection.getresponse() as response:
                first = response.readline()
                process.send_signal(ending)
                text = (first + response.read()).decode()
        assert text.endswith("data: [DONE]\n\n") and '"finish_reason": "stop"' in text
        _, told = process.communicate(timeout=120)
        assert process.returncode == {signal.SIGTERM: -15, signal.SIGINT: 130}[ending] and "Traceback" not in told


def test_a_port_that_is_taken_is_told_before_models_are_loaded():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with (
            pytest.raises(SettingsError, match=f"Cannot listen on 127.0.0.1:{port}"),
            running(demo.transform(), port=port),
        ):
            pass


def test_a_method_that_chooses_among_texts_is_refused():
    with (
        pytest.raises(SettingsError, match="'teacher-score' chooses among candidates"),
        running(demo.transform(method="teacher-score")),
    ):
        pass


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with (
        pytest.raises(SettingsError, match=r'needs uvicorn\. Run: pip install "tessy-hf\[serve\]"'),
        running(demo.transform()),
    ):
        pass
