"""llama.cpp's own HTTP server on the loopback, for tests: ``python -m tests.llama_cpp MODEL.gguf --port PORT``."""

import signal
import sys

import xllamacpp


def main(model, _, port):
    """Serve a model until the process is ended."""
    params = xllamacpp.CommonParams()
    params.model.path, params.model_alias = model, {model}
    params.hostnames, params.port = ["127.0.0.1"], int(port)
    params.n_ctx, params.n_parallel, params.cpuparams.n_threads = 8192, 4, 1
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    signal.pause()


if __name__ == "__main__":
    main(*sys.argv[1:])
