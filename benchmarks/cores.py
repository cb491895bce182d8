"""A part of a processor core for each of some processes: replicas with hardware of their own, on one small machine.

By Linux control groups of version 1, which root may make. What a process started before goes with it, and all go
back where they were at the end.
"""

import os
from contextlib import contextmanager
from pathlib import Path

import psutil

ROOT = Path("/sys/fs/cgroup/cpu")

PERIOD = 10_000
"""Microseconds in which a process gets its part: short beside a request, long beside a change of processes."""


@contextmanager
def parts(wanted):
    """Let processes have so much of a core each, together with their children, and no more.

    Args:
        wanted: Pairs of a process id and of its part, in cores.
    """
    if not (os.access(ROOT, os.W_OK) and (ROOT / "cpu.cfs_quota_us").exists()):
        raise SystemExit(
            f"{ROOT} is no control group of version 1 that this user may divide. Become root there, or leave --parts "
            "out and give the servers a machine with cores enough."
        )
    groups = []
    try:
        for pid, part in wanted:
            groups.append(ROOT / f"tessy-bench-{os.getpid()}-{pid}")
            groups[-1].mkdir()
            (groups[-1] / "cpu.cfs_period_us").write_text(str(PERIOD))
            (groups[-1] / "cpu.cfs_quota_us").write_text(str(round(PERIOD * part)))
            family = [pid] if pid == os.getpid() else _family(pid)
            _move(family, groups[-1])
        yield
    finally:
        for group in groups:
            _move(map(int, (group / "cgroup.procs").read_text().split()), ROOT)
            group.rmdir()


def _family(pid):
    return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]


def _move(pids, group):
    for pid in pids:
        (group / "cgroup.procs").write_text(str(pid))
