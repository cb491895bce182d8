"""Servers for tests, all on the loopback: real ones as child processes, and a scripted one that can be made to fail.

None outlives its test: what a server starts is ended with it, by process id, also where the test run is killed.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from base64 import b64encode
from collections import deque
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx2
import numpy as np
import psutil

from tessy_hf import demo
from tests.engines.contract import TOKENIZER, VOCABULARY, network

# --- real servers


def free_ports(count):
    """Return ports nobody listens on. They are looked up together, so that they differ."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


_REAPER = """
import os, signal, sys, time
parent, group = map(int, sys.argv[1:])
while os.getppid() == parent:
    time.sleep(0.2)
os.killpg(group, signal.SIGKILL)
"""


class Process:
    """A server in its own process group, with a reaper that ends the group should the test run be killed."""

    def __init__(self, command, environment, log):
        self._log = log
        with log.open("wb") as output:
            self._popen = subprocess.Popen(
                command,
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        watch = [sys.executable, "-c", _REAPER, str(os.getpid()), str(self._popen.pid)]
        self._reaper = subprocess.Popen(watch, stdin=subprocess.DEVNULL)

    @property
    def pid(self):
        return self._popen.pid

    def wait_for(self, url, seconds=300):
        """Wait until the server answers."""
        end = time.monotonic() + seconds
        while True:
            assert self._popen.poll() is None, f"the server ended:\n{self._log.read_text()[-3000:]}"
            assert time.monotonic() < end, f"the server did not answer in time:\n{self._log.read_text()[-3000:]}"
            try:
                if httpx2.get(url, timeout=5).status_code == 200:
                    return
            except httpx2.TransportError:
                time.sleep(0.5)

    def kill(self):
        """End the server and all it started, at once."""
        try:
            family = [psutil.Process(self._popen.pid), *psutil.Process(self._popen.pid).children(recursive=True)]
        except psutil.NoSuchProcess:
            family = []
        for each in family:
            try:
                each.kill()
            except psutil.NoSuchProcess:
                pass
        try:
            os.killpg(self._popen.pid, signal.SIGKILL)  # what its parent left behind before
        except ProcessLookupError:
            pass
        self._popen.wait()
        psutil.wait_procs(family, timeout=60)
        self._reaper.kill()
        self._reaper.wait()


@contextmanager
def processes(*described, logs, health):
    """Run servers side by side, each described by its command and environment and given a port of its own."""
    ports, running = free_ports(len(described)), []
    try:
        for port, (command, environment) in zip(ports, described, strict=True):
            running.append(Process([*command, "--port", str(port)], environment, logs / f"{port}.log"))
        for port, process in zip(ports, running, strict=True):
            process.wait_for(f"http://127.0.0.1:{port}{health}")
        yield [(f"http://127.0.0.1:{port}/v1", process) for port, process in zip(ports, running, strict=True)]
    finally:
        for process in running:
            process.kill()


@contextmanager
def restartable(command, environment, logs):
    """Yield the address of a server and how to start it, at the same port each time. Those that were started end."""
    port, running = free_ports(1)[0], []

    def start():
        log, given = logs / f"{port}-{len(running)}.log", {**environment, "PYTHONPATH": os.getcwd()}
        running.append(Process([*command, "--port", str(port)], given, log))
        running[-1].wait_for(f"http://127.0.0.1:{port}/health")
        return running[-1]

    try:
        yield f"http://127.0.0.1:{port}/v1", start
    finally:
        for process in running:
            process.kill()


def vllm(*options, author="student", model=None):
    """Describe a vLLM server of one of the miniature models, or of another one, under the name of its folder."""
    module = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1"]
    path = demo.TEACHER if author == "teacher" else demo.STUDENT
    model = ["--model", model or str(path), "--served-model-name", model or author, "--dtype", "float32"]
    cpu = ["--enforce-eager", "--block-size", "32", "--max-num-batched-tokens", "16384"]
    # A worker process of its own would poll without a pause, which other tests feel.
    cpu += ["--distributed-executor-backend", "vllm.v1.executor.uniproc_executor.UniProcExecutor"]
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
    }
    return [*module, *model, *cpu, *options], environment


SERVE = """
from importlib import metadata
own = metadata.version

def version(name):  # vLLM for CPUs is a package of another name, which its command does not know
    try:
        return own(name)
    except metadata.PackageNotFoundError:
        return own(name + "-cpu") + "+cpu"

metadata.version = version
from vllm.entrypoints.cli.main import main
if __name__ == "__main__":
    main()
"""


def vllm_serve(*options):
    """Describe `vllm serve`, which has options that its module ignores, such as ``--api-server-count``."""
    (python, _, _, *rest), environment = vllm(*options)
    return [python, "-c", SERVE, "serve", *rest], environment


def transformers_serve(cache):
    """Describe a `transformers serve` of the miniature student, under the name ``tessy/student``.

    It lists the models of the Hub's cache only, so the student is laid down there as if it had been downloaded.
    """
    commit = "0" * 40
    repository = cache / "models--tessy--student"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots").mkdir()
    (repository / "snapshots" / commit).symlink_to(demo.STUDENT, target_is_directory=True)
    module = [sys.executable, "-m", "transformers.cli.transformers", "serve", "tessy/student"]
    environment = {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return [*module, "--host", "127.0.0.1", "--device", "cpu"], environment


# --- a scripted server

THINK, END_OF_THINKING = VOCABULARY.token_id("<think>"), VOCABULARY.token_id("</think>")
END = TOKENIZER.eos_token_id


class FakeServer:
    """Answers as vLLM and its kin do, with a text that depends on the prompt alone, unless told to fail.

    Args:
        ways: The ways, named as in `tessy_hf.engines.completions_api.PROTOCOLS`, in which it can be asked.
        faults: What to do to the first requests for a text, in their order: a function from below, or ``None`` to
            answer well. The request with which an engine finds out how to ask is not counted.
        paths: What to do to every request to a path, where no fault comes first.
        models: What `/v1/models` says.
        tokenize: Turns text into ids, as `/tokenize` shows them; ``None`` where there is no such path.
        usage: What it says of the tokens of a request, if anything.
        classify: Turns a window of ids into logits, as vLLM's `/pooling` shows them; ``None`` where there is none.
        at: The host and port to listen at; by default any free port.
        tls: An ``ssl.SSLContext``, for a server behind https.
    """

    def __init__(
        self,
        *,
        ways=("generate", "ids"),
        faults=(),
        paths=None,
        models=None,
        tokenize="own",
        usage=None,
        classify=None,
        at=("127.0.0.1", 0),
        tls=None,
    ):
        self.ways, self.faults, self.paths = ways, deque(faults), paths or {}
        self.models = [{"id": "student", "max_model_len": 2048}] if models is None else models
        self.tokenize = VOCABULARY.encode_template if tokenize == "own" else tokenize
        self.usage, self.classify = usage, classify
        self.requests, self.connections, self.accepted = [], set(), 0
        self.closing, self.dying = threading.Event(), False
        self.lock = threading.Lock()
        self.at_once = 0
        self._server = _Listener(at, _Handler)
        self._server.fake = self
        self.host, self.port = self._server.server_address
        self.url = f"{'http' if tls is None else 'https'}://{self.host}:{self.port}/v1"
        if tls is not None:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()

    @property
    def texts(self):
        """The requests for a text, as (path, body), without those by which an engine finds out how to ask."""
        return [(path, body) for path, body, _ in self.requests if is_row(path, body)]

    def kill(self):
        """Stop listening and cut all connections, as a server that dies does."""
        with self.lock:
            if self.closing.is_set():
                return
            self.closing.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        with self.lock:
            for connection in self.connections:
                try:
                    connection.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass

    @contextmanager
    def counted(self):
        with self.lock:
            self.at_once += 1
        try:
            yield
        finally:
            with self.lock:
                self.at_once -= 1


def is_row(path, body):
    prompt = next((body[name] for name in ("token_ids", "input_ids", "prompt") if body and body.get(name)), None)
    marked = "<think>" in prompt if isinstance(prompt, str) else THINK in (prompt or [])
    return marked and path != "/tokenize"


def go_on(ids, max_tokens):
    """Go on as a model would that says, of the first number in its prompt, always the same."""
    begin = ids.index(THINK) + 1
    number = next(word for word in VOCABULARY.decode(ids).split() if word.isdigit())
    thinking = f"okay so {number} + 1 = 2 okay good , and then 2 + 3 = 5 okay that is all\n"
    answer = f"\n\n{number} is what it is ."
    whole = [*VOCABULARY.encode("\n" + thinking).ids, END_OF_THINKING, *VOCABULARY.encode(answer).ids, END]
    rest = whole[len(ids) - begin :][:max_tokens]
    stop = next((at for at, token in enumerate(rest) if token in (END_OF_THINKING, END)), None)
    return (rest, "length") if stop is None else (rest[: stop + 1], "stop")


class _Listener(ThreadingHTTPServer):
    daemon_threads, block_on_close, request_queue_size = True, False, 128

    def handle_error(self, request, client_address):
        pass  # connections are cut on purpose


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1
    disable_nagle_algorithm = True

    def setup(self):
        super().setup()
        with self.server.fake.lock:
            self.server.fake.connections.add(self.connection)
            self.server.fake.accepted += 1

    def finish(self):
        with self.server.fake.lock:
            self.server.fake.connections.discard(self.connection)
        super().finish()

    def log_message(self, *_):
        pass

    def do_GET(self):
        self._handle(None)

    def do_POST(self):
        self._handle(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def _handle(self, body):
        fake = self.server.fake
        with fake.counted():
            with fake.lock:
                fake.requests.append((self.path, body, dict(self.headers)))
                mishap = fake.faults.popleft() if fake.faults and is_row(self.path, body) else None
                mishap = die if fake.dying else mishap or fake.paths.get(self.path)
                fake.dying |= mishap is die  # from now on nobody is answered
            if mishap is not None:
                mishap(self, body)
            else:
                self.answer(body)

    def answer(self, body):
        fake = self.server.fake
        if self.path == "/v1/models":
            self.reply({"object": "list", "data": fake.models})
        elif self.path == "/tokenize" and fake.tokenize is not None:
            self.reply({"tokens": fake.tokenize(body["prompt"])})
        elif self.path == "/inference/v1/generate" and "generate" in fake.ways:
            self._choose(body, _continue(body["token_ids"], body["sampling_params"], exact=True))
        elif self.path == "/pooling" and fake.classify is not None:
            logits = [np.asarray(fake.classify(window), "<f4") for window in body["input"]]
            data = [{"index": i, "data": b64encode(one.tobytes()).decode()} for i, one in enumerate(logits)]
            self.reply({"object": "list", "model": body["model"], "data": data[::-1]})
        elif self.path == "/generate" and "sglang" in fake.ways:
            self._sglang(body)
        elif self.path == "/completion" and "llama.cpp" in fake.ways:
            self._llama_cpp(body)
        elif self.path == "/v1/completions":
            self._complete(body, fake.ways)
        else:
            self.reply({"detail": "Not Found"}, 404)

    def _complete(self, body, ways):
        exact = bool(body.get("return_token_ids"))
        if "text" in ways and isinstance(body["prompt"], str):
            ids = VOCABULARY.encode_template(body["prompt"])
        elif {"ids", "ids-to-text"} & set(ways) and isinstance(body["prompt"], list):
            ids = body["prompt"]
        else:
            return self.reply({"error": {"message": "prompt: this type is not supported"}}, 400)
        self._choose(body, _continue(ids, body, exact=exact and "ids" in ways))

    def _sglang(self, body):
        """Answer as the sources of SGLang 0.5.23 do: no real one runs here. It refuses parameters it does not know."""
        sampling, ids = body["sampling_params"], body["input_ids"]
        known = {"max_new_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "stop_token_ids"}
        if unknown := sampling.keys() - known - {"sampling_seed"}:
            return self.reply({"error": {"message": f"unexpected keyword argument {unknown}"}}, 400)
        choice = _continue(ids, {**sampling, "max_tokens": sampling["max_new_tokens"]}, exact=True)
        written, reason = choice["token_ids"], {"type": choice["finish_reason"]}

        def so_far(count, since=0):
            meta = {"prompt_tokens": len(ids), "completion_tokens": count, "cached_tokens": len(ids) - 1}
            finish = reason if count == len(written) else None
            return {"text": "", "output_ids": written[since:count], "meta_info": {**meta, "finish_reason": finish}}

        if body.get("return_logprob"):
            told = {**so_far(len(written))["meta_info"], **_input_logprobs(ids, body)}
            self.reply({"text": "", "output_ids": written, "meta_info": told})
        elif body.get("stream"):
            step = 3 if "sglang-incremental" in self.server.fake.ways else len(written)
            ends = [*range(3, len(written), 3), len(written)]
            self.send_events([so_far(end, max(0, end - 1) // step * step) for end in ends])
        else:
            self.reply(so_far(len(written)))

    def _llama_cpp(self, body):
        choice = _continue(body["prompt"], {"max_tokens": body["n_predict"]}, exact=True)
        ended = choice["token_ids"][-1] == END
        stop_type = "limit" if choice["finish_reason"] == "length" else "eos" if ended else "word"
        told = {"tokens_evaluated": len(body["prompt"]), "timings/cache_n": len(body["prompt"]) - 1}
        self.reply({"tokens": choice["token_ids"], "stop_type": stop_type, **told})

    def _choose(self, body, choice):
        if body.get("stream"):
            self.stream(choice)
        else:
            self.reply({"choices": [choice], "usage": self.server.fake.usage})

    def stream(self, choice, events=1000):
        """Send a choice in events of three tokens, and no more of these than so many."""
        ids = choice["token_ids"]
        reasons = {len(ids) - 1 - (len(ids) - 1) % 3: choice["finish_reason"]}
        parts = [
            {"choices": [{"index": 0, "token_ids": ids[at : at + 3], "finish_reason": reasons.get(at)}]}
            for at in range(0, len(ids), 3)
        ]
        self.send_events(parts[:events] if events < len(parts) else [*parts, {"choices": []}], events >= len(parts))

    def send_events(self, events, done=True):
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        for event in events:
            self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
            self.wfile.flush()
            time.sleep(0.005)  # or all would come together
        if done:
            self.wfile.write(b"data: [DONE]\n\n")
        self.close_connection = True

    def reply(self, value, status=200, **headers):
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        for name, said in headers.items():
            self.send_header(name.replace("_", "-"), said)
        self.end_headers()
        self.wfile.write(content)
        self.wfile.flush()


def _continue(ids, sampling, *, exact):
    if THINK not in ids:  # an engine finds out how to ask
        ids = [*VOCABULARY.encode("0 ").ids, THINK]
    written, reason = go_on(ids, sampling["max_tokens"])
    if exact:
        return {"index": 0, "token_ids": written, "finish_reason": reason}
    text = VOCABULARY.decode([token for token in written if token not in (END_OF_THINKING, END)])
    return {"index": 0, "text": text, "finish_reason": reason}


def _input_logprobs(ids, body):
    """Log-probabilities of a prompt from an id on, as SGLang lists them: the first has none."""
    import torch

    start, most = body["logprob_start_len"], body["top_logprobs_num"]
    with torch.inference_mode():
        scores = network()(torch.tensor([ids])).logits[0, start:-1].log_softmax(-1)
    best = [[*zip(*one, strict=True)] for one in zip(*(x.tolist() for x in scores.topk(most)), strict=True)]
    own = scores.gather(-1, torch.tensor(ids[start + 1 :])[:, None])[:, 0].tolist()
    return {
        "input_token_logprobs": [
            [None, ids[start], None],
            *([lp, i, None] for lp, i in zip(own, ids[start + 1 :], strict=True)),
        ],
        "input_top_logprobs": [None, *([[lp, i, None] for lp, i in each] for each in best)],
    }


# --- mishaps: what may be done to a request


def status(code, message="it broke", **headers):
    return lambda handler, body: handler.reply({"error": {"message": message}}, code, **headers)


def replying(value):
    """Answer with this, whatever was asked."""
    return lambda handler, body: handler.reply(value)


def choosing(**choice):
    return replying({"choices": [{"index": 0, "finish_reason": "length", **choice}]})


def hang(handler, body):
    """Never answer."""
    handler.server.fake.closing.wait()
    handler.close_connection = True


def trickle(handler, body):
    """Send a byte now and then, so that no single read takes long."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000000")
    handler.end_headers()
    while not handler.server.fake.closing.wait(0.05):
        handler.wfile.write(b" ")
        handler.wfile.flush()


def cut(handler, body):
    """Hang up in the middle of the answer."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [{"token_ids": [1, 2')
    handler.wfile.flush()
    handler.close_connection = True
    handler.connection.shutdown(socket.SHUT_RDWR)


def break_off(handler, body):
    """Send two events of a stream, then no more."""
    given = body if "token_ids" not in body else {"prompt": body["token_ids"], **body["sampling_params"]}
    handler.stream(_continue(given["prompt"], given, exact=True), events=2)


def die(handler, body):
    """End the whole server, at once for all requests."""
    threading.Thread(target=handler.server.fake.kill).start()
    handler.server.fake.closing.wait()
    handler.close_connection = True
    handler.connection.shutdown(socket.SHUT_RDWR)


def slowly(seconds):
    def mishap(handler, body):
        time.sleep(seconds)
        handler.answer(body)

    return mishap


def held(gate):
    """Answer requests of rows once an event is set."""

    def mishap(handler, body):
        while is_row(handler.path, body) and not gate.wait(0.1) and not handler.server.fake.closing.is_set():
            pass
        handler.answer(body)

    return mishap
