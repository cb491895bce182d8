"""vLLM's process, as far as it can be tested without vLLM."""

import asyncio
import importlib.util
import socket
import threading

import pytest

from tessy_hf import demo
from tessy_hf.engines.vllm import VLLMEngine
from tessy_hf.engines.vllm_process import Connection, Output, VLLMProcess
from tessy_hf.errors import EngineDeadError, SettingsError


@pytest.fixture
def connections():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield Connection(ours), Connection(theirs)


def test_messages_arrive_in_order_and_whole(connections):
    ours, theirs = connections
    sent = [Output("a", list(range(300_000)), None), {"b": b"c" * 5_000_000}, None]
    sender = threading.Thread(target=lambda: [ours.send(each) for each in sent])
    assert not theirs.pending()
    sender.start()
    assert [theirs.receive() for _ in sent] == sent
    sender.join()
    assert not theirs.pending()


def test_a_closed_connection_raises_eof_even_within_a_message(connections):
    ours, theirs = connections
    ours.socket.sendall(Connection.packed("half")[:-1])
    ours.socket.close()
    assert theirs.pending()
    with pytest.raises(EOFError):
        theirs.receive()


def test_messages_are_read_in_an_event_loop(connections):
    ours, theirs = connections

    async def read():
        reader, writer = await asyncio.open_connection(sock=theirs.socket)
        ours.send({"b": b"c" * 1000})
        ours.socket.shutdown(socket.SHUT_WR)
        message = await Connection.read(reader)
        with pytest.raises(asyncio.IncompleteReadError):
            await Connection.read(reader)
        writer.close()
        return message

    assert asyncio.run(read()) == {"b": b"c" * 1000}


def test_replicas_of_a_model_are_left_to_servers():
    with pytest.raises(SettingsError, match="data_parallel_size=2.*ServerEngine"):
        VLLMEngine(demo.STUDENT, data_parallel_size=2)


def test_code_of_a_checkpoint_is_not_run():
    with pytest.raises(SettingsError, match="trust_remote_code"):
        VLLMEngine(demo.STUDENT, trust_remote_code=True)
    with pytest.raises(SettingsError, match="trust_remote_code"):
        VLLMProcess(demo.STUDENT, {"trust_remote_code": True})


def test_options_that_decide_the_text_are_in_the_identity():
    plain = VLLMEngine(demo.STUDENT, gpu_memory_utilization=0.4, hf_token="secret").identity
    assert plain == VLLMEngine(demo.STUDENT).identity
    for decisive in ({"hf_overrides": {"rope_theta": 5.0}}, {"kv_cache_dtype": "fp8"}, {"load_format": "dummy"}):
        assert VLLMEngine(demo.STUDENT, **decisive).identity == {**plain, "options": decisive}


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_without_vllm_the_start_says_what_to_install():
    with pytest.raises(EngineDeadError, match=r"could not be imported.*pip install .tessy-hf\[vllm\]"):
        asyncio.run(VLLMEngine(demo.STUDENT).start())
