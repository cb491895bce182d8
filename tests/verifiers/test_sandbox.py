"""What a program in the sandbox cannot do. Each of these programs would succeed outside of it."""

import ctypes
import http.server
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from tessy_hf.errors import SandboxError
from tessy_hf.verifiers import sandbox, verifiers

pytestmark = pytest.mark.slow  # all of them together

NO_NAMESPACES = ('hasattr(libc, "unshare")', "False")
NO_LANDLOCK = ('sys.platform == "linux" else -1', "False else -1")
NO_SECCOMP = ("os.uname().machine not in _CALLS", "True")


def permitted(means):
    if means == "namespaces":
        return subprocess.run(["unshare", "--user", "--net", "--mount", "true"], capture_output=True).returncode == 0
    return sys.platform == "linux" and ctypes.CDLL(None).syscall(444, None, 0, 1) >= 6


MEANS = [
    pytest.param(means, marks=pytest.mark.skipif(not permitted(means), reason=f"this system permits no {means}"))
    for means in ("namespaces", "landlock")
]


@pytest.fixture
def lacking(monkeypatch, tmp_path):
    """Make this system one that lacks some means, as a container whose rules forbid them."""

    def patch(*means):
        source = Path(sandbox.__file__).read_text()
        for present, absent in means:
            assert present in source
            source = source.replace(present, absent)
        (tmp_path / "lacking.py").write_text(source)
        monkeypatch.setattr(sandbox, "__file__", str(tmp_path / "lacking.py"))

    return patch


@pytest.fixture(params=MEANS)
def run(request, lacking):
    """Run a program by each means that this system has."""
    if request.param == "landlock":
        lacking(NO_NAMESPACES)

    def run(program, stdin="", **limits):
        return sandbox.run({"main.py": program}, stdin, **limits)

    run.means = request.param
    return run


def needs_namespaces(run):
    if run.means != "namespaces":
        pytest.skip("only namespaces limit this")


def test_a_program_reads_and_prints_and_ends_as_it_says(run):
    assert run("import sys; print(input()[::-1]); sys.exit(3)", "äbc\n") == (3, "cbä\n")
    assert run("raise ValueError")[0] == 1
    assert run("import os; os.kill(os.getpid(), 15)")[0] == 128 + 15
    assert run("import sys; print('x', file=sys.stderr); sys.exit(97)") == (97, "")


def test_what_ordinary_programs_need_is_there(run):
    program = (
        "import asyncio, datetime, numpy, random, sys, tempfile, threading, zoneinfo\n"
        "async def main(): await asyncio.sleep(0)\n"
        "asyncio.run(main())\n"
        "thread = threading.Thread(target=print, args=('thread',)); thread.start(); thread.join()\n"
        "with tempfile.TemporaryFile() as file: file.write(b'x')\n"
        "open('/dev/null', 'w').write('x')\n"
        "print(numpy.ones(3).sum(), datetime.datetime.now(zoneinfo.ZoneInfo('Asia/Tokyo')).utcoffset())"
    )
    assert run(program) == (0, "thread\n3.0 9:00:00\n")


def test_its_time_is_limited(run):
    assert run("while True: pass", seconds=1.0).code is None
    assert run("import time; time.sleep(60)", seconds=0.5).code is None


def test_its_memory_is_limited(run):
    program = "x = bytearray(300 << 20); print(len(x))"
    assert run(program, memory_mb=128).code == 1
    assert run(program, memory_mb=1024).code == 0
    beside = "import os; os.write(os.memfd_create('x'), b'x')"  # not in its address space
    assert run(beside).code == 1


def test_its_output_is_limited(run):
    assert len(run("while True: print('x' * 10_000)", seconds=5.0).output) <= 16 << 20


def test_its_disk_is_limited(run):
    assert run("open('x', 'wb').write(bytes(20 << 20))").code == 1
    needs_namespaces(run)
    program = "for i in range(40): open(str(i), 'wb').write(bytes(8 << 20))"
    assert run(program).code == 1
    assert run("for i in range(100_000): open(str(i), 'w')").code == 1


def test_its_processes_are_limited(run):
    needs_namespaces(run)
    program = (
        "import os, time\nmade = 0\n"
        "try:\n    while made < 1000:\n        os.fork() or time.sleep(60)\n        made += 1\n"
        "except BlockingIOError:\n    print(made)"
    )
    assert 1 <= int(run(program).output) < 64


# --- files


def attempts(*calls):
    """A program that makes calls, and prints which of them succeed."""
    return "import os\n" + "".join(
        f"try: {call}\nexcept OSError: pass\nelse: print({number})\n" for number, call in enumerate(calls)
    )


def test_it_reads_no_file_of_the_user(run, tmp_path):
    beside = tmp_path.parent / "beside"
    beside.write_text("secret")
    files = [beside, Path(__file__), Path(sandbox.__file__), "/etc/passwd", "/proc/self/environ"]
    folders = [tmp_path.parent, Path(__file__).parent, "/var", "/proc"]
    program = attempts(
        *(f"open({str(name)!r}).read()" for name in files), *(f"os.listdir({str(n)!r})" for n in folders)
    )
    everything = "".join(f"{number}\n" for number in range(len(files) + len(folders)))
    assert run(program, files=True) == (0, everything)
    assert run(program) == (0, "")


def test_links_lead_nowhere(run, tmp_path):
    secret = tmp_path / "token"
    secret.write_text("secret")
    for link in ("os.symlink", "os.link"):
        program = f"import os\n{link}({str(secret)!r}, 'x')\nprint(open('x').read())"
        assert run(program) == (1, "")
    assert run(f"import os; os.chdir('..'); print(open({os.path.relpath(secret, '/')!r}).read())") == (1, "")


def test_it_changes_nothing_outside_its_folder(run, tmp_path):
    kept = tmp_path / "kept"
    kept.write_text("x")
    places = [
        tmp_path,
        Path.home(),
        "/var/tmp",
        "/usr/lib",
        sys.prefix,
        sys.base_prefix,
        Path(sandbox.__file__).parent,
    ]
    written = [f"{place}/written-in-a-sandbox" for place in places]
    name = str(kept)
    changes = [
        f"os.remove({name!r})",
        f"os.truncate({name!r}, 0)",
        f"os.rename({name!r}, 'x')",
        f"open({name!r}, 'w')",
    ]
    if run.means == "namespaces":  # Landlock does not guard a file's mode
        changes.append(f"os.chmod({name!r}, 0)")
    assert run(attempts(*(f"open({path!r}, 'w')" for path in written), *changes)) == (0, "")
    assert kept.read_text() == "x" and not any(map(os.path.exists, written))


def test_its_folder_is_its_own_and_gone_afterwards(run):
    found = run("import os; open('x', 'w').write('x'); print(os.getcwd(), sorted(os.listdir()))")
    where, files = found.output.split(" ", 1)
    assert files.strip() == "['main.py', 'x']" and where != os.getcwd() and not os.path.exists(where)


def test_it_cannot_undo_what_shuts_it_in(run, tmp_path):
    """Neither as a root user nor in namespaces of its own."""
    secret = tmp_path / "token"
    secret.write_text("secret")
    program = (
        "import ctypes, os\nlibc = ctypes.CDLL(None)\n"
        "libc.unshare(0x10000000)\nlibc.unshare(0x20000)\nlibc.umount2(b'/usr/lib', 2)\nlibc.umount2(b'/', 2)\n"
        "libc.mount(b'/', b'.', b'', 4096, b'')\nlibc.mount(b'proc', b'.', b'proc', 0, b'')\n"
        "for _ in range(9):\n"
        "    try: os.mkdir('x'); os.chroot('x'); os.chdir('../..')\n"
        "    except OSError: pass\n"
        f"for root in ('.', '/', '..', 'x'):\n    path = root + {str(secret)!r}\n"
        "    try: print(open(path).read())\n"
        "    except OSError: pass"
    )
    assert "secret" not in run(program).output


# --- the network, other processes


def test_it_reaches_no_network_not_even_this_machine(run):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        program = f"import socket; socket.create_connection(('127.0.0.1', {server.server_port}), 3)"
        assert run(program).code == 1
        assert run(program, network=True).code == 0
        server.shutdown()


@pytest.mark.parametrize("address", ["file", "\0tessy-sandbox-test"])
def test_it_reaches_no_local_socket(run, tmp_path, address):
    """Such as those of Docker, of a desktop, or of an SSH agent."""
    name = str(tmp_path / "socket") if address == "file" else address
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(name)
        server.listen()
        program = f"import socket; socket.socket(socket.AF_UNIX).connect({name!r})"
        assert run(program).code == 1
        assert run(program, network=True, files=True).code == 0


def test_it_reaches_no_host_of_a_virtual_machine(run):
    assert run("import socket; socket.socket(40, socket.SOCK_STREAM)").code == 1


def test_no_secret_is_in_its_environment_nor_in_that_of_others(run, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    found = run("import os; print(os.environ)")
    assert found.code == 0 and "secret" not in found.output and os.environ["HF_TOKEN"]
    for process in (os.getpid(), "self", 1):
        assert run(f"print(open('/proc/{process}/environ').read())") == (1, "")


def test_it_sends_no_signal_to_others(run):
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as other:
        for process in (os.getpid(), other.pid):
            assert run(f"import os; os.kill({process}, 0)").code == 1
        run("import os; os.kill(os.getppid(), 9)")
        if run.means == "namespaces":
            run("import os; os.kill(-1, 9)")
        assert other.poll() is None
        other.kill()


@pytest.mark.parametrize("seconds", [0.8, 30.0])
def test_nothing_that_it_starts_outlives_it(run, seconds):
    """Neither where it is stopped nor where it leaves by itself; not even what left its session."""
    mark = f"sleep-{os.getpid()}-{seconds}-{run.means}"
    wait = "time.sleep(60)" if seconds < 1 else ""
    run(
        "import os, subprocess, sys, time\n"
        f"command = [sys.executable, '-c', 'import time; time.sleep(60)', {mark!r}]\n"
        "subprocess.Popen(command)\n"
        "if os.fork() == 0:\n"
        "    try: os.setsid()\n"
        "    except PermissionError: pass\n"
        "    if os.fork() == 0: os.execv(command[0], command)\n"
        "    os._exit(0)\n"
        f"os.wait()\n{wait}",
        seconds=seconds,
    )
    end = time.monotonic() + 10
    while living := [p for p in psutil.process_iter(["cmdline"]) if mark in (p.info["cmdline"] or [])]:
        assert time.monotonic() < end, living


def test_it_dies_with_us(run):
    """Where this process is killed while a program runs."""
    code = (
        f"from tessy_hf.verifiers import sandbox; sandbox.__file__ = {sandbox.__file__!r}\n"
        "sandbox.run({'main.py': 'import time; time.sleep(60)'}, seconds=60)"
    )
    with subprocess.Popen([sys.executable, "-c", code]) as parent:
        children = psutil.Process(parent.pid).children
        wait_for(lambda: any(process.cmdline()[-1:] == ["main.py"] for process in children(recursive=True)))
        made = children(recursive=True)
        os.kill(parent.pid, signal.SIGKILL)
    wait_for(lambda: not any(process.is_running() and process.status() != "zombie" for process in made))


def wait_for(condition):
    end = time.monotonic() + 30
    while not (found := condition()):
        assert time.monotonic() < end
        time.sleep(0.01)
    return found


# --- where there is no means


@pytest.mark.parametrize(
    ("means", "told"),
    [
        ([NO_LANDLOCK], "from your files: .* Landlock .* files: true"),
        ([NO_SECCOMP], "from your network: .* seccomp.* network: true"),
        ([NO_LANDLOCK, NO_SECCOMP], "from your network and files: .* network: true and files: true"),
    ],
)
def test_where_programs_cannot_be_shut_in_nothing_is_run(lacking, means, told):
    lacking(NO_NAMESPACES, *means)
    verifier = verifiers.build("python-tests")
    with pytest.raises(SandboxError, match=told):
        verifiers.check(verifier)
    with pytest.raises(SandboxError, match=told):
        sandbox.run({"main.py": "print(1)"})
    allowed = {"network": NO_SECCOMP in means, "files": NO_LANDLOCK in means}
    assert sandbox.run({"main.py": "print(1)"}, **allowed) == (0, "1\n")
    assert verifiers.build({"name": "python-tests", **allowed})(
        {"answer": "```python\nx = 1\n```", "tests": "assert x"}
    )


def test_what_programs_may_is_part_of_the_fingerprint():
    kinds = [{"name": "python-tests"}, {"name": "python-tests", "files": True}]
    closed, opened = map(verifiers.describe, kinds)
    assert closed == {**opened, "files": False}
