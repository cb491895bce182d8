"""vLLM's process, as far as it can be tried without vLLM."""

import asyncio
import importlib.util
import socket
import threading

import pytest

from tessy_hf import demo
from tessy_hf.engines.vllm import VLLMEngine
from tessy_hf.engines.vllm_worker import Answer, Wire
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


def test_copies_of_a_model_are_left_to_servers():
    with pytest.raises(SettingsError, match="data_parallel_size=2.*ServerEngine"):
        VLLMEngine(demo.STUDENT, data_parallel_size=2)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_without_vllm_the_start_says_what_to_install():
    with pytest.raises(EngineDeadError, match=r"could not be imported.*pip install .tessy-hf\[vllm\]"):
        asyncio.run(VLLMEngine(demo.STUDENT).start())
