"""A program that nobody has read, run apart: files and standard input go in, exit code and output come out.

It runs in a process of its own, in an empty folder, with an environment that holds nothing of ours, with limits on
time, memory and the size of files, and on Linux in namespaces of its own for the network and for processes: it reaches
no host, and nothing it starts outlives it. What it can still do is read the files that this user may read, and write
where this user may write: for programs that are out to do harm, run all of this in a container.

This file is also what runs inside, before the program: hence nothing but the standard library at the top.
"""

from __future__ import annotations

import ctypes
import os
import resource
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
        code: Its exit code, 128 and more for a signal; ``None`` where its time ran out.
        output: What it wrote to standard output.
    """

    code: int | None
    output: str


def run(
    files: Mapping[str, str], stdin: str = "", *, seconds: float = 10.0, memory_mb: int = 1024, network: bool = False
) -> Finished:
    """Run a Python program.

    Args:
        files: Its files by name; ``main.py`` is run.
        stdin: What it reads.
        seconds: How long it may take, over all its processes.
        memory_mb: The most memory each of its processes may address.
        network: Whether it may reach the network, which is also for systems without namespaces.

    Raises:
        SandboxError: This system permits no namespace without a network.
    """
    from tessy_hf.errors import SandboxError

    with tempfile.TemporaryDirectory(prefix="tessy-sandbox-", ignore_cleanup_errors=True) as folder:
        for name, text in files.items():
            (Path(folder) / name).write_bytes(text.encode("utf-8", "replace"))
        code, output = _run(folder, stdin, [str(int(seconds) + 1), str(memory_mb), str(int(network))], seconds)
    if code == _NO_NAMESPACE and not network:
        raise SandboxError(
            "This system permits no network namespace (unshare failed), so a program cannot be kept from the network. "
            "Run where user namespaces are permitted, or say network: true to run programs with the network."
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
    """Run ``main.py`` of this folder within limits and apart from others; end as it ends."""
    libc = ctypes.CDLL(None, use_errno=True)
    apart = _unshared(libc, network)
    if not apart and not network:
        os._exit(_NO_NAMESPACE)
    for what, most in (
        (resource.RLIMIT_CPU, cpu_seconds),
        (resource.RLIMIT_AS, memory_mb << 20),
        (resource.RLIMIT_FSIZE, _MOST_OUTPUT),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(what, (most, most))
    if apart:
        _wait_for_child()
        _wait_for_child()  # the parent is the first process of the namespace: all others end with it
    os.execv(sys.executable, [sys.executable, "-I", "main.py"])


def _wait_for_child() -> None:
    """Go on in a child process; the parent ends as it does."""
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        os._exit(code if code >= 0 else 128 - code)


def _unshared(libc: ctypes.CDLL, network: bool) -> bool:
    if not hasattr(libc, "unshare"):  # not Linux
        return False
    wanted = _CLONE_NEWPID | (0 if network else _CLONE_NEWNET)
    return any(libc.unshare(flags) == 0 for flags in (_CLONE_NEWUSER | wanted, wanted))


if __name__ == "__main__":
    _enter(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "1")
