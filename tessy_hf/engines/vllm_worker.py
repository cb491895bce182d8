"""The program of vLLM's process: take requests from the parent, step the engine, send outputs back.

:class:`tessy_hf.engines.vllm_process.VLLMProcess` starts it. It uses vLLM's public API (``LLMEngine.add_request``,
``step``, ``abort_request``) and reuses block hashes where it can (:mod:`tessy_hf.engines.vllm_internals`). One loop
calls vLLM directly: ``AsyncLLM`` would run its core in one more process and costs more for each short request.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from tessy_hf.engines.vllm_internals import BlockHashes
from tessy_hf.engines.vllm_process import Abort, Connection, Failed, Output, Started, Submit

if TYPE_CHECKING:
    from vllm import LLMEngine, PoolingParams, SamplingParams

CPU_DEFAULTS: dict[str, Any] = {
    "block_size": 32,  # the CPU backend's own 128 recomputes up to 127 tokens of each request's prompt
    "enforce_eager": True,
    "max_num_batched_tokens": 16384,  # a seeded request whose prompt is prefilled in parts crashes the CPU backend
}


def main(descriptor: int, parent: int) -> None:
    """Start the engine that the first message describes, and serve it until the parent closes the connection."""
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    connection = Connection(socket.socket(fileno=descriptor))
    with suppress(EOFError, ConnectionError):  # the parent closed it
        options = connection.receive()
        try:
            engine = _start(options)
        except Exception as error:  # noqa: BLE001 - vLLM raises whatever went wrong underneath
            connection.send(Failed(f"{type(error).__name__}: {error}", isinstance(error, ImportError)))
            return
        hashes = BlockHashes(engine)
        cache = engine.vllm_config.cache_config
        blocks = cache.num_gpu_blocks
        cache_tokens = blocks * cache.block_size if blocks else None
        connection.send(Started(int(engine.model_config.max_model_len), cache_tokens, hashes.fallback))
        _serve(engine, hashes, connection)


def _end_with(parent: int) -> None:
    """Kill this process and its children once the parent is gone, however it ended and whatever runs here."""
    while os.getppid() == parent:
        time.sleep(0.2)
    os.killpg(0, signal.SIGKILL)


def _start(options: dict[str, Any]) -> LLMEngine:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine's core runs in this process
    options = {**_cpu_defaults(), **options}
    from vllm import EngineArgs, LLMEngine

    return LLMEngine.from_engine_args(EngineArgs(**options))


def _cpu_defaults() -> dict[str, Any]:
    """Prepare vLLM's CPU backend, if it is the one installed, for two engines on a machine. Returns its defaults."""
    import torch
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return {}
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # teacher and student share the cores
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // 2)))
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))  # torch read the environment when it was imported
    return CPU_DEFAULTS


def _serve(engine: LLMEngine, hashes: BlockHashes, connection: Connection) -> None:
    """Take in the requests that have come, let the engine make one step, send its outputs; again and again.

    Raises:
        EOFError: The parent closed the connection.
    """
    while True:
        while connection.pending() or not engine.has_unfinished_requests():
            for message in connection.receive():
                if isinstance(message, Abort):
                    engine.abort_request([message.name])
                elif (refusal := _add(engine, hashes, message)) is not None:
                    connection.send([Output(message.name, [], "refused", refusal=refusal)])
        outputs = [_output(each) for each in engine.step()]
        if outputs:
            connection.send(outputs)


def _add(engine: LLMEngine, hashes: BlockHashes, submit: Submit) -> str | None:
    """Add a request to the engine. Returns why vLLM refuses it, if it does."""
    from vllm.exceptions import VLLMClientError
    from vllm.inputs import tokens_input

    try:
        prompt = tokens_input(submit.prompt_ids.tolist())
        with hashes.adding(submit.row, submit.prompt_ids):
            engine.add_request(submit.name, prompt, _params(submit), priority=submit.priority)
    except (ValueError, VLLMClientError) as error:
        return str(error)
    return None


def _params(submit: Submit) -> SamplingParams | PoolingParams:
    from vllm.pooling_params import PoolingParams
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    if submit.kind == "classify":
        return PoolingParams(**submit.params)
    kind = RequestOutputKind.DELTA if submit.kind == "stream" else RequestOutputKind.FINAL_ONLY
    flat = submit.params.get("logprobs") is not None
    return SamplingParams(**submit.params, detokenize=False, output_kind=kind, flat_logprobs=flat)


def _output(output: Any) -> Output:
    """Translate a ``vllm.RequestOutput`` or ``vllm.PoolingRequestOutput``."""
    cached = output.num_cached_tokens
    if not isinstance(output.outputs, list):
        return Output(output.request_id, [], "classified", cached, output.outputs.data.float().cpu().numpy())
    (completion,) = output.outputs
    told = Output(output.request_id, list(completion.token_ids), completion.finish_reason, cached)
    if output.prompt_logprobs:
        return told._replace(**_prompt_scores(output, cached))
    return told if completion.logprobs is None else told._replace(**_measured(completion))


def _prompt_scores(output: Any, cached: int) -> dict[str, Any]:
    """Return log-probabilities and ranks of the prompt's ids after the first uncached one; vLLM has no others.

    What it lists before them, on some devices, is memory that nobody wrote.
    """
    ids = output.prompt_token_ids[cached + 1 :]
    new = list(output.prompt_logprobs)[len(output.prompt_logprobs) - len(ids) :]
    told = [entry[token] for entry, token in zip(new, ids, strict=True)]
    return {"logprobs": [one.logprob for one in told], "ranks": [one.rank for one in told]}


def _measured(completion: Any) -> dict[str, Any]:
    """Return the log-probabilities of new ids, and entropies where all log-probabilities are there."""
    import numpy as np

    flat, tokens = completion.logprobs, completion.token_ids
    begins, ends = flat.start_indices, flat.end_indices
    logprobs = [flat.logprobs[begin] for begin in begins]  # the drawn id comes first
    if not tokens or ends[0] - begins[0] == 1:
        return {"logprobs": logprobs}
    every = [np.array(flat.logprobs[begin + 1 : end]) for begin, end in zip(begins, ends, strict=True)]
    possible = [own[np.isfinite(own)] for own in every]
    return {"logprobs": logprobs, "entropies": [float(-(np.exp(own) * own).sum()) for own in possible]}


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
