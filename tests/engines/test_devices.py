import asyncio
from concurrent.futures import ThreadPoolExecutor
from threading import Thread

import pytest
import torch

from tessy_hf import TransformersEngine, demo
from tessy_hf.engines.devices import share_cores
from tests.engines.contract import request

CORES = 5  # a number that nothing else sets


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(CORES)
    yield
    torch.set_num_threads(before)


def in_a_thread(function, **options):
    with ThreadPoolExecutor(1, **options) as pool:
        return pool.submit(function).result()


def test_cores_are_shared_in_the_calling_thread_only():
    assert in_a_thread(torch.get_num_threads) == CORES
    assert in_a_thread(torch.get_num_threads, initializer=share_cores) < CORES
    assert torch.get_num_threads() == in_a_thread(torch.get_num_threads) == CORES


def test_threads_that_begin_at_the_same_time_leave_the_default_alone():
    begun = [Thread(target=share_cores) for _ in range(20)]
    for thread in begun:
        thread.start()
    for thread in begun:
        thread.join()
    assert torch.get_num_threads() == in_a_thread(torch.get_num_threads) == CORES


def test_an_open_engine_changes_the_threads_of_nobody():
    async def session():
        engine = TransformersEngine(demo.STUDENT, device="cpu")
        await engine.start()
        await engine.complete(request(tokens=2))
        found = torch.get_num_threads(), in_a_thread(torch.get_num_threads)
        await engine.close()
        return found

    assert asyncio.run(session()) == (CORES, CORES)
