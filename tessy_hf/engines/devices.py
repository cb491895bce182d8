"""Pick the device of a network, and limit the cores of its thread. Knows nothing of models."""

from __future__ import annotations

import os
from threading import Lock, Thread

from tessy_hf.errors import SettingsError

_IMPORTED_IN = os.getpid()
_setting = Lock()


def pick_device(device: str | None) -> str:
    """Return the device asked for, or the best there is: CUDA, MPS, CPU.

    Raises:
        SettingsError: The device is not there.
    """
    import torch

    if device is not None:
        try:
            torch.empty(0, device=device)
        except (AssertionError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise SettingsError(
                f"The device {device!r} cannot be used: {reason}. Pass one that this machine and this torch have, "
                "such as cuda, mps or cpu, or leave it out."
            ) from error
        return device
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def share_cores() -> None:
    """Let torch use half of the cores in the calling thread, and as many as before in all others.

    Two authors work at the same time, and OpenMP threads that outnumber the cores wait for each other (measured: up
    to 10 times slower). A forked process (``num_proc``) is one of many and gets one core for each of its networks.

    ``torch.set_num_threads`` sets OpenMP's count for the calling thread, and a default that every thread takes over
    at its first use of torch. The default is put back at once, from a thread that ends. What stays set for the
    process is what any call of it sets: MKL no longer adapts its own number of threads (``mkl_set_dynamic``).
    """
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with _setting:  # else a second thread could take the first one's count for the default
        default = torch.get_num_threads()
        torch.set_num_threads(max(1, cores // 2) if os.getpid() == _IMPORTED_IN else 1)
        restore = Thread(target=torch.set_num_threads, args=(default,))
        restore.start()
        restore.join()
