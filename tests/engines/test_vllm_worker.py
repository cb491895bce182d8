"""vLLM's process, as far as it can be tried without vLLM."""

import asyncio
import importlib.util
import socket
import threading
from array import array

import pytest

from tessy_hf import demo
from tessy_hf.engines.vllm import VLLMEngine
from tessy_hf.engines.vllm_worker import MANY, Answer, Ask, Waiting, Wire
from tessy_hf.errors import EngineDeadError, SettingsError


@pytest.fixture
def wires():
    here, there = socket.socketpair()
    with here, there:
        yield Wire(here), Wire(there)


def test_objects_cross_the_wire_in_order_and_whole(wires):
    here, there = wires
    sent = [Answer("a", list(range(300_000)), None), {"b": b"c" * 5_000_000}, None]
    sender = threading.Thread(target=lambda: [here.send(each) for each in sent])
    assert not there.waiting()
    sender.start()
    assert [there.receive() for _ in sent] == sent
    sender.join()
    assert not there.waiting()


def test_the_end_of_the_other_side_is_told(wires):
    here, there = wires
    here.socket.sendall(Wire.packed("half")[:-1])
    here.socket.close()
    assert there.waiting()
    with pytest.raises(EOFError):
        there.receive()


def asks(names, max_tokens=6):
    return [Ask(str(name), "complete", array("i", [1]), {"max_tokens": max_tokens}) for name in names]


def come(waiting, asked):
    for each in asked:
        waiting.add(each)
    return asked


def test_a_group_waits_until_the_one_before_it_has_begun_to_leave():
    waiting, first, second = Waiting(apart=True), asks(range(MANY)), asks(range(MANY, 2 * MANY))
    come(waiting, first)
    assert waiting.take() == first
    come(waiting, second)
    taken_when_left = None
    for left in range(MANY - 1, -1, -1):
        waiting.end(str(left))
        if taken := waiting.take():
            taken_when_left = left
            break
    assert taken == second
    assert taken_when_left == 11  # of 16
    assert waiting.take() == []


def test_nobody_waits_for_few_rows_nor_for_long_requests_nor_where_groups_are_not_kept_apart():
    for apart, first in ((True, asks(range(MANY - 1))), (True, asks(range(99), 17)), (False, asks(range(99)))):
        waiting, late = Waiting(apart), asks(["late"])
        assert come(waiting, first) == waiting.take()
        assert come(waiting, late) == waiting.take()


def test_what_is_broken_off_is_waited_for_no_more_and_taken_in_no_more():
    waiting = Waiting(apart=True)
    come(waiting, asks(range(MANY)))
    waiting.take()
    come(waiting, asks(["broken off"]))
    assert waiting.take() == []
    for name in ("broken off", *map(str, range(MANY))):
        assert waiting
        waiting.end(name)
    assert not waiting
    assert waiting.take() == []


def test_copies_of_a_model_are_left_to_servers():
    with pytest.raises(SettingsError, match="data_parallel_size=2.*ServerEngine"):
        VLLMEngine(demo.STUDENT, data_parallel_size=2)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_without_vllm_the_start_says_what_to_install():
    with pytest.raises(EngineDeadError, match=r"could not be imported.*pip install .tessy-hf\[vllm\]"):
        asyncio.run(VLLMEngine(demo.STUDENT).start())
