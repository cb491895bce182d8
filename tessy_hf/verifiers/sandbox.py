"""Run an untrusted Python program: files and standard input go in, exit code and output come out.

The program runs in its own process, in an empty folder, with a minimal environment, with limits on time, memory and
file size, and on Linux in its own network and process namespaces: it reaches no host, and nothing it starts outlives
it. It can still read and write every file that this user may; against hostile programs, run everything in a container.

This file is also the script that runs inside, before the program, so it imports only the standard library.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

_CLONE_NEWUSER, _CLONE_NEWPID, _CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
_MOST_OUTPUT = 16 << 20
_NO_NAMESPACE = 97


class Finished(NamedTuple):
    """How a program ended.

    Attributes:
        code: Its exit code, 128 plus the number of a signal, or ``None`` if its time ran out.
        output: Its standard output.
    """

    code: int | None
    output: str


def run(
    files: Mapping[str, str], stdin: str = "", *, seconds: float = 10.0, memory_mb: int = 1024, network: bool = False
) -> Finished:
    """Run a Python program.

    Args:
        files: Its files by name; ``main.py`` is run.
        stdin: Its standard input.
        seconds: The time limit.
        memory_mb: Address space of each of its processes, in MiB.
        network: Whether it may use the network; needed on systems without namespaces.

    Raises:
        SandboxError: This system permits no network namespace, and ``network`` is false.
    """
    from tessy_hf.errors import SandboxError

    if not hasattr(os, "fork"):
        raise SandboxError(
            f"Programs are run in processes of their own on Linux and macOS, not on {sys.platform}. Run there, or use "
            "a verifier that runs no program."
        )
    with tempfile.TemporaryDirectory(prefix="tessy-sandbox-", ignore_cleanup_errors=True) as folder:
        for name, text in files.items():
            (Path(folder) / name).write_bytes(text.encode("utf-8", "replace"))
        code, output = _run(folder, stdin, [str(int(seconds) + 1), str(memory_mb), str(int(network))], seconds)
    if code == _NO_NAMESPACE and not network:
        raise SandboxError(
            "This system permits no network namespace (unshare failed), so programs cannot be cut off from the "
            "network. Run where user namespaces are permitted, or set network: true to let programs use the network."
        )
    return Finished(code, output)


def _run(folder: str, stdin: str, limits: list[str], seconds: float) -> tuple[int | None, str]:
    environment = {
        "HOME": folder,
        "TMPDIR": folder,
        "PATH": os.defpath,
        "LANG": "C.UTF-8",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as written:
        given.write(stdin.encode("utf-8", "replace"))
        given.seek(0)
        process = subprocess.Popen(
            [sys.executable, "-I", __file__, *limits],
            cwd=folder,
            env=environment,
            stdin=given,
            stdout=written,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            code: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        written.seek(0)
        return code, written.read(_MOST_OUTPUT).decode("utf-8", "replace")


def _enter(cpu_seconds: int, memory_mb: int, network: bool) -> None:
    """Replace this process by ``main.py``, within limits and in namespaces of its own."""
    import resource  # not on Windows, where the rest of the package works

    libc = ctypes.CDLL(None, use_errno=True)
    isolated = _unshare(libc, network)
    if not isolated and not network:
        os._exit(_NO_NAMESPACE)
    for what, most in (
        (resource.RLIMIT_CPU, cpu_seconds),
        (resource.RLIMIT_AS, memory_mb << 20),
        (resource.RLIMIT_FSIZE, _MOST_OUTPUT),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(what, (most, most))
    if isolated:
        _continue_in_child()
        _continue_in_child()  # the parent is the namespace's init process: all others die with it
    os.execv(sys.executable, [sys.executable, "-I", "main.py"])


def _continue_in_child() -> None:
    """Continue in a child process; the parent exits with the child's code."""
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        os._exit(code if code >= 0 else 128 - code)


def _unshare(libc: ctypes.CDLL, network: bool) -> bool:
    """Move this process into new namespaces, inside a new user namespace or, as root, without one."""
    if not hasattr(libc, "unshare"):  # not Linux
        return False
    wanted = _CLONE_NEWPID | (0 if network else _CLONE_NEWNET)
    return any(libc.unshare(flags) == 0 for flags in (_CLONE_NEWUSER | wanted, wanted))


if __name__ == "__main__":
    _enter(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "1")
