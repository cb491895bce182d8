"""Run an untrusted Python program: files and standard input go in, exit code and output come out.

The program sees its own folder and this Python installation, read-only: no other file, process, socket or host, and
no environment of ours. Its time, memory, processes, output and disk are limited, and nothing that it starts outlives
it. This takes Linux namespaces, as bubblewrap does it. Where these are forbidden, as in most containers, Landlock
keeps programs from files and seccomp from sockets; how many processes and files they make is not limited then.

This file is also the script that runs inside, before the program, so it imports only the standard library.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import signal
import struct
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

_MOST_OUTPUT, _MOST_DISK, _MOST_PROCESSES, _MOST_OPEN_FILES = 16 << 20, 64 << 20, 32, 256
_REFUSED = 97
_INSIDE = "/sandbox"
"""The program's folder, in a root directory of its own."""
_USER, _FIRST_USER = 1000, 1_000_000_000
"""The program's user id: in a user namespace of its own, or where root needs none, each program's another."""

_SYSTEM = (
    "/dev/null /dev/random /dev/urandom /dev/zero /etc/ld.so.cache /lib /lib64 /usr/lib /usr/lib64 /usr/share/zoneinfo"
)
_NETWORK = "/etc/hosts /etc/nsswitch.conf /etc/pki /etc/resolv.conf /etc/ssl"

# From the kernel's headers sched.h, mount.h, prctl.h, landlock.h and seccomp.h.
_NEW_MOUNTS, _NEW_IPC, _NEW_USER, _NEW_PIDS, _NEW_NETWORK = 0x20000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
_NOSUID, _NODEV, _BIND, _RECURSIVE, _PRIVATE, _WITH_SUBMOUNTS = 2, 4, 0x1000, 0x4000, 0x40000, 0x8000
_DIE_WITH_PARENT, _FILTER_CALLS, _DROP_CAPABILITY, _NO_NEW_PRIVILEGES = 1, 22, 24, 38
_IO_URING_SETUP, _MOUNT_SETATTR, _LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 425, 442, 444, 445, 446
_CALLS = {"x86_64": (0xC000003E, 29, 319, 41, 109, 112), "aarch64": (0xC00000B7, 194, 279, 198, 154, 157)}
"""By machine: its number, and those of its calls ``shmget``, ``memfd_create``, ``socket``, ``setpgid``, ``setsid``."""


class Finished(NamedTuple):
    """How a program ended.

    Attributes:
        code: Its exit code, 128 plus the number of a signal, or ``None`` if its time ran out.
        output: Its standard output.
    """

    code: int | None
    output: str


def run(
    sources: Mapping[str, str],
    stdin: str = "",
    *,
    seconds: float = 10.0,
    memory_mb: int = 1024,
    network: bool = False,
    files: bool = False,
) -> Finished:
    """Run a Python program.

    Args:
        sources: Its files by name; ``main.py`` is run.
        stdin: Its standard input.
        seconds: The time limit.
        memory_mb: Address space of each of its processes, in MiB.
        network: Whether it may use the network; elsewhere than on Linux it must.
        files: Whether it may read and write all that the user may; where neither namespaces nor Landlock work it must.

    Raises:
        SandboxError: This system cannot keep programs from the network or from files.
    """
    from tessy_hf.errors import SandboxError

    if not hasattr(os, "fork"):
        raise SandboxError(
            f"Programs are run in processes of their own on Linux and macOS, not on {sys.platform}. Run there, or use "
            "a verifier that runs no program."
        )
    with tempfile.TemporaryDirectory(prefix="tessy-sandbox-", ignore_cleanup_errors=True) as folder:
        for name, text in sources.items():
            (Path(folder) / name).write_bytes(text.encode("utf-8", "replace"))
        limits = [str(int(seconds) + 1), str(memory_mb), str(int(network)), str(int(files))]
        code, output, refusal = _run(folder, stdin, limits, seconds)
    if code == _REFUSED and refusal:
        raise SandboxError(refusal.strip())
    return Finished(code if code is None or code >= 0 else 128 - code, output)


def _run(folder: str, stdin: str, limits: list[str], seconds: float) -> tuple[int | None, str, str]:
    """Run the program in a folder; return its exit code, its output, and why it was not run."""
    environment = {
        "HOME": folder,
        "TMPDIR": folder,
        "PATH": os.defpath,
        "LANG": "C.UTF-8",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as written, tempfile.TemporaryFile() as refusal:
        given.write(stdin.encode("utf-8", "replace"))
        given.seek(0)
        process = subprocess.Popen(
            [sys.executable, "-I", __file__, *limits],
            cwd=folder,
            env=environment,
            stdin=given,
            stdout=written,
            stderr=refusal,
            start_new_session=True,
        )
        try:
            code: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with contextlib.suppress(ProcessLookupError):  # none is left
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        written.seek(0)
        refusal.seek(0)
        return code, written.read(_MOST_OUTPUT).decode("utf-8", "replace"), refusal.read().decode("utf-8", "replace")


# --- inside, before the program


def _enter(cpu_seconds: int, memory_mb: int, network: bool, files: bool) -> None:
    """Replace this process by ``main.py``, shut in and within limits."""
    libc = ctypes.CDLL(None, use_errno=True)
    _die_with_parent(libc)
    folder, sources = os.getcwd(), {name: Path(name).read_bytes() for name in os.listdir()}
    user = _new_namespaces(libc, network)
    mounted = False
    if user is not None:
        mounted = not files and _mount_root(libc, folder, user, network)
        _continue_in_child(libc)
        _continue_in_child(libc)  # the parent is the namespace's init process: all others die with it
        os.setsid()
        if mounted:
            _move_in(folder, user, sources)
    _limit(libc, cpu_seconds, memory_mb, counted_alone=mounted)
    filtered = _filter_calls(libc, network, alone=user is not None)
    _check(network or filtered or user is not None, files or mounted or _landlock(libc, folder, network))
    sys.stderr = os.fdopen(os.dup(2), "w")  # closed for the program
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    os.execv(sys.executable, [sys.executable, "-I", "main.py"])


def _check(network: bool, files: bool) -> None:
    """Check that network and files are closed to the program, or meant to be open.

    Raises:
        OSError: They are not.
    """
    closed = {"network": (network, "seccomp"), "files": (files, "Landlock (Linux 6.12 or newer)")}
    lacking = {name: means for name, (fine, means) in closed.items() if not fine}
    if lacking:
        raise OSError(
            f"This system cannot keep programs from your {' and '.join(lacking)}: it permits neither namespaces nor "
            f"{' and '.join(lacking.values())}. Run where it does, or let programs use what you may by the verifier's "
            f"{' and '.join(f'{name}: true' for name in lacking)}."
        )


def _new_namespaces(libc: ctypes.CDLL, network: bool) -> int | None:
    """Move this process into new namespaces; return the user id for the program, or ``None`` if that is forbidden."""
    if not hasattr(libc, "unshare"):  # not Linux
        return None
    spaces = _NEW_MOUNTS | _NEW_IPC | _NEW_PIDS | (0 if network else _NEW_NETWORK)
    uid, gid = os.geteuid(), os.getegid()
    if uid == 0 and libc.unshare(spaces) == 0:
        return _FIRST_USER + os.getpid()
    if libc.unshare(_NEW_USER | spaces) != 0:
        return None
    for name, text in (("setgroups", "deny"), ("uid_map", f"{_USER} {uid} 1"), ("gid_map", f"{_USER} {gid} 1")):
        Path("/proc/self", name).write_text(text)
    return _USER


def _continue_in_child(libc: ctypes.CDLL) -> None:
    """Continue in a child process; the parent exits with the child's code."""
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        os._exit(code if code >= 0 else 128 - code)
    _die_with_parent(libc)


def _die_with_parent(libc: ctypes.CDLL) -> None:
    if hasattr(libc, "prctl"):
        libc.prctl(_DIE_WITH_PARENT, signal.SIGKILL, 0, 0, 0)


def _readable(network: bool) -> list[str]:
    """Return the files and folders that a program may read, outer ones first: Python's and the system's libraries."""
    python = {sys.prefix, sys.base_prefix, os.path.realpath(sys.prefix), os.path.realpath(sys.base_prefix)}
    return sorted(filter(os.path.exists, {*_SYSTEM.split(), *(_NETWORK.split() if network else ()), *python} - {"/"}))


def _mount_root(libc: ctypes.CDLL, root: str, user: int, network: bool) -> bool:
    """Mount a root directory over a folder: a small one in memory, with what is readable and nothing else.

    Without ``/proc``, which for root's processes would hold the settings of the whole machine.
    """

    def mount(source: str, target: str, kind: str, flags: int, options: str = "") -> bool:
        return bool(libc.mount(source.encode(), target.encode(), kind.encode(), flags, options.encode()) == 0)

    options = f"size={_MOST_DISK},nr_inodes=4096,mode=755,uid={user},gid={user}"
    if not mount("", "/", "", _RECURSIVE | _PRIVATE) or not mount("tmpfs", root, "tmpfs", _NOSUID | _NODEV, options):
        return False
    read_only = struct.pack("4Q", 1, 0, 0, 0)
    for path in _readable(network):
        target = root + path
        os.makedirs(target if os.path.isdir(path) else os.path.dirname(target), exist_ok=True)
        if not os.path.isdir(path):
            Path(target).touch()
        change = (_MOUNT_SETATTR, -1, target.encode(), _WITH_SUBMOUNTS, read_only, len(read_only))
        if not mount(path, target, "", _BIND | _RECURSIVE) or libc.syscall(*change) != 0:
            raise OSError(ctypes.get_errno(), "Cannot be mounted read-only", path)
    for path in (_INSIDE, "/tmp", "/dev/shm"):
        os.makedirs(root + path, exist_ok=True)
        os.chown(root + path, user, user)
    return True


def _move_in(root: str, user: int, sources: Mapping[str, bytes]) -> None:
    """Make a folder the root directory, become the program's user, and write its files."""
    os.chroot(root)
    os.chdir(_INSIDE)
    if user != _USER:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    for name, content in sources.items():
        Path(name).write_bytes(content)
    os.environ.update(HOME=_INSIDE, TMPDIR=_INSIDE)


def _landlock(libc: ctypes.CDLL, folder: str, network: bool) -> bool:
    """Keep this process from all files but those of a folder and those that are readable."""
    version = libc.syscall(_LANDLOCK_CREATE, None, 0, 1) if sys.platform == "linux" else -1
    if version < 6:  # the first that also keeps a program from sending signals to others
        return False
    of_files, read, everything = 0b1100000000000111, 0b1101, 0xFFFF | (version >= 9) << 16
    handled = struct.pack("3Q", everything, 0, 0b11)
    rules = libc.syscall(_LANDLOCK_CREATE, handled, len(handled), 0)
    for path, access in ((folder, everything), (os.devnull, of_files), *((path, read) for path in _readable(network))):
        opened = os.open(path, os.O_PATH)
        rule = struct.pack("=Qi", access if os.path.isdir(path) else access & of_files, opened)
        libc.syscall(_LANDLOCK_ADD, rules, 1, rule, 0)
        os.close(opened)
    return bool(libc.syscall(_LANDLOCK_RESTRICT, rules, 0) == 0)


def _filter_calls(libc: ctypes.CDLL, network: bool, alone: bool) -> bool:
    """Make system calls fail: for memory beyond the limit, for sockets, and by which processes leave their group.

    Sockets may also be files, or lead to the host of a virtual machine. In a namespace of its own all processes end
    with the first, whatever their group.
    """
    if sys.platform != "linux" or os.uname().machine not in _CALLS:
        return False
    machine, shmget, memfd_create, socket, *leaving = _CALLS[os.uname().machine]
    denied = [shmget, memfd_create, *(() if network else (socket, _IO_URING_SETUP)), *(() if alone else leaving)]
    load, equal, above, end, most = 0x20, 0x15, 0x35, 0x06, len(denied)
    steps = [
        (load, 0, 0, 4),
        (equal, 0, most + 3, machine),  # programs of other machines have other numbers, and so have
        (load, 0, 0, 0),
        (above, most + 1, 0, 1 << 30),  # those with short addresses
        *((equal, most - place, 0, call) for place, call in enumerate(denied)),
        (end, 0, 0, 0x7FFF0000),
        (end, 0, 0, 0x50000 | errno.EACCES),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    return bool(libc.prctl(_FILTER_CALLS, 2, struct.pack("HP", len(steps), ctypes.addressof(code)), 0, 0) == 0)


def _limit(libc: ctypes.CDLL, cpu_seconds: int, memory_mb: int, counted_alone: bool) -> None:
    """Set limits, and give up a root user's rights for good."""
    import resource  # not on Windows, where the rest of the package works

    limits = {
        resource.RLIMIT_CPU: cpu_seconds,
        resource.RLIMIT_AS: memory_mb << 20,
        resource.RLIMIT_FSIZE: _MOST_OUTPUT,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NOFILE: _MOST_OPEN_FILES,
    }
    if counted_alone:  # else those of all processes of this user
        limits[resource.RLIMIT_NPROC] = _MOST_PROCESSES
    for what, most in limits.items():
        resource.setrlimit(what, (most, most))
    if hasattr(libc, "prctl"):
        for capability in range(64):
            libc.prctl(_DROP_CAPABILITY, capability, 0, 0, 0)
        libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0)


if __name__ == "__main__":
    try:
        _enter(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "1", sys.argv[4] == "1")
    except OSError as error:
        sys.stderr.write(str(error) if error.errno is None else f"The sandbox cannot be set up: {error}.")
        sys.stderr.flush()
        os._exit(_REFUSED)
