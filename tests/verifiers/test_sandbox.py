"""What a program in the sandbox cannot do. Each of these programs would succeed outside of it."""

import http.server
import os
import subprocess
import threading
import time
from pathlib import Path

import psutil
import pytest

from tessy_hf.errors import SandboxError
from tessy_hf.verifiers import sandbox

pytestmark = pytest.mark.skipif(
    subprocess.run(["unshare", "--user", "--net", "true"], capture_output=True).returncode != 0,
    reason="this system permits no network namespace",
)


def run(program, stdin="", **limits):
    return sandbox.run({"main.py": program}, stdin, **limits)


def test_a_program_reads_and_prints_and_ends_as_it_says():
    assert run("import sys; print(input()[::-1]); sys.exit(3)", "äbc\n") == (3, "cbä\n")
    assert run("raise ValueError")[0] == 1
    assert run("import os; os.kill(os.getpid(), 15)")[0] == 128 + 15


def test_its_time_is_limited():
    assert run("while True: pass", seconds=1.0).code is None
    assert run("import time; time.sleep(60)", seconds=0.5).code is None


def test_its_memory_is_limited():
    program = "x = bytearray(300 << 20); print(len(x))"
    assert run(program, memory_mb=128).code == 1
    assert run(program, memory_mb=1024).code == 0


def test_its_output_is_limited():
    assert len(run("while True: print('x' * 10_000)", seconds=5.0).output) <= 16 << 20


def test_it_reaches_no_network_not_even_this_machine():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        program = f"import socket; socket.create_connection(('127.0.0.1', {server.server_port}), 3)"
        assert run(program).code == 1
        assert run(program, network=True).code == 0
        server.shutdown()


def test_no_secret_is_in_its_environment(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    found = run("import os; print(os.environ)")
    assert found.code == 0 and "secret" not in found.output and os.environ["HF_TOKEN"]


def test_its_folder_is_its_own_and_gone_afterwards():
    found = run("import os; open('x', 'w').write('x'); print(os.getcwd(), sorted(os.listdir()))")
    where, files = found.output.split(" ", 1)
    assert files.strip() == "['main.py', 'x']" and where != os.getcwd() and not os.path.exists(where)


@pytest.mark.parametrize("seconds", [0.8, 30.0])
def test_nothing_that_it_starts_outlives_it(seconds):
    """Neither where it is stopped nor where it leaves by itself; not even what left its session."""
    mark = f"sleep-{os.getpid()}-{seconds}"
    wait = "time.sleep(60)" if seconds < 1 else ""
    run(
        "import subprocess, sys, time\n"
        f"subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)', {mark!r}], start_new_session=True)\n"
        f"{wait}",
        seconds=seconds,
    )
    end = time.monotonic() + 10
    while living := [p for p in psutil.process_iter(["cmdline"]) if mark in (p.info["cmdline"] or [])]:
        assert time.monotonic() < end, living


def test_where_the_network_cannot_be_kept_away_nothing_is_run(monkeypatch, tmp_path):
    """As in a container whose rules forbid namespaces: the runner is one for which unshare always fails."""
    broken = tmp_path / "sandbox.py"
    source = Path(sandbox.__file__).read_text()
    broken.write_text(source.replace("libc.unshare(flags) == 0", "libc.unshare(-1) == 0"))
    monkeypatch.setattr(sandbox, "__file__", str(broken))
    with pytest.raises(SandboxError, match="network: true"):
        run("print(1)")
    assert run("print(1)", network=True) == (0, "1\n")
