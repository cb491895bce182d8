"""Whether actors on a Ray cluster keep servers as busy as one process does, and what they do when nodes die.

Four actors with a quarter of the rows in flight each, and one process with all of them, in turns on the same servers;
rates are those of the middle of a run, between a fifth and four fifths of its work, so that neither the start of
actors nor the last rows count. ``scripted`` servers take a lognormal time for each request, ``vllm`` ones really run
the miniature models. With ``--deaths`` an actor and a node are killed in mid-run, and the rows are compared with those
of one process::

    PYTHONPATH=. python benchmarks/cluster.py --servers scripted --repeats 3
    PYTHONPATH=. python benchmarks/cluster.py --servers vllm --rows 2000 --deaths
"""

import argparse
import asyncio
import contextlib
import json
import logging
import os
import random
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

import httpx2
from datasets import Dataset, disable_progress_bars

from tessy_hf import ServerEngine, Speaker, TessyTransform, demo
from tessy_hf.cluster.ray import Placement, synthesize
from tests import ray_cluster  # sets what Ray reads when it is imported
from tests.engines import servers

BUDGET = {"max_thinking_tokens": 160, "max_answer_tokens": 32}


# --- servers


def serve(port, mean):
    """Serve scripted texts; a request takes a lognormal time that depends on its prompt alone."""
    from aiohttp import web

    answered = []

    async def generate(request):
        body = await request.json()
        draw = random.Random(str(body["token_ids"]))
        if servers.THINK in body["token_ids"]:
            await asyncio.sleep(min(draw.lognormvariate(0, 0.7) * mean, 8 * mean))
            answered.append(time.monotonic())
        return web.json_response(
            {"choices": [servers._continue(body["token_ids"], body["sampling_params"], exact=True)]}
        )

    async def models(request):
        return web.json_response({"data": [{"id": "student", "max_model_len": 2048}]})

    async def stats(request):
        return web.json_response(answered)

    app = web.Application()
    app.add_routes([web.post("/inference/v1/generate", generate), web.get("/v1/models", models), web.get("/s", stats)])
    web.run_app(app, host="127.0.0.1", port=port, print=None)


class Scripted:
    """A scripted server in a process of its own."""

    def __init__(self, folder, arguments):
        [port] = servers.free_ports(1)
        command = [sys.executable, __file__, "--serve", str(port), "--mean", str(arguments.mean)]
        self._process = servers.Process(command, {"PYTHONPATH": os.getcwd()}, folder / "server.log")
        self.root = f"http://127.0.0.1:{port}"
        self._process.wait_for(f"{self.root}/v1/models")

    def transform(self, in_flight, **settings):
        """The transform over it."""
        student = Speaker(ServerEngine("student", base_url=f"{self.root}/v1", tokenizer=str(demo.STUDENT)))
        given = {"method": "student-only", "id_column": "id", "temperature": 0.0, **BUDGET, **settings}
        return TessyTransform(teacher=student, student=student, rows_in_flight=in_flight, **given)

    def prompts(self, rows):
        """Prompts for it."""
        texts = [f"calc {i} + 1 + 2" for i in range(rows)]
        return Dataset.from_dict({"id": [f"r{i}" for i in range(rows)], "prompt": texts})

    def work(self):
        """When requests were answered so far, as pairs of time and count."""
        return [(at, 1) for at in httpx2.get(f"{self.root}/s").json()]

    def close(self):
        """End it."""
        self._process.kill()


class VLLM:
    """Two vLLM servers with the miniature teacher and student."""

    def __init__(self, folder, arguments):
        described = [servers.vllm("--enable-scale-out", author=author) for author in ("teacher", "student")]
        described = [([arguments.python, *command[1:]], environment) for command, environment in described]
        self._exit = contextlib.ExitStack()
        running = self._exit.enter_context(servers.processes(*described, logs=folder, health="/health"))
        self._urls = [url for url, _ in running]
        self._seen, self._over = [], threading.Event()
        self._watch = threading.Thread(target=self._poll, daemon=True)
        self._watch.start()

    def _poll(self):
        before = 0.0
        while not self._over.wait(0.25):
            try:
                pages = [httpx2.get(f"{url.removesuffix('/v1')}/metrics", timeout=60).text for url in self._urls]
            except httpx2.TransportError:  # busy: the next look will tell
                continue
            lines = [line for page in pages for line in page.split("\n")]
            tokens = sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:generation_tokens_total"))
            if tokens != before:
                self._seen.append((time.monotonic(), tokens - before))
                before = tokens

    def transform(self, in_flight, **settings):
        """The transform over them."""
        boundaries = (demo.BOUNDARY_TEACHER, demo.BOUNDARY_STUDENT)
        teacher, student = (
            Speaker(ServerEngine(name, base_url=url, tokenizer=str(model)), boundary=str(boundary))
            for name, url, model, boundary in zip(
                ("teacher", "student"), self._urls, (demo.TEACHER, demo.STUDENT), boundaries, strict=True
            )
        )
        given = {"id_column": "id", "temperature": 0.0, "chunk_tokens": 8, **BUDGET, **settings}
        return TessyTransform(teacher=teacher, student=student, rows_in_flight=in_flight, **given)

    def prompts(self, rows):
        """Prompts for them."""
        return demo.prompts(rows, seed=17)

    def work(self):
        """When tokens were generated so far, as pairs of time and count."""
        return list(self._seen)

    def close(self):
        """End them."""
        self._over.set()
        self._watch.join()
        self._exit.close()


# --- what is measured


def rate(work):
    """Return how much was done per second between a fifth and four fifths of it."""
    total, done, times = sum(count for _, count in work), 0.0, {}
    for at, count in work:
        done += count
        for share in (0.2, 0.8):
            if done >= share * total:
                times.setdefault(share, (at, done))
    (begin, before), (end, after) = times[0.2], times[0.8]
    return (after - before) / (end - begin)


def one_process(server, rows, in_flight):
    """Write the rows in this process; return them and the rate."""
    before = len(server.work())
    with server.transform(in_flight, journal=None) as transform:
        given = server.prompts(rows)
        written = given.map(transform, batched=True, features=transform.features(given), load_from_cache_file=False)
    return written.to_list(), rate(server.work()[before:])


def on_cluster(server, rows, in_flight, actors, kill=None):
    """Write the rows with actors; return them, the rate, and what the merge found."""
    before = len(server.work())
    with tempfile.TemporaryDirectory() as folder:
        if kill is not None:
            kill(Path(folder, "parts"))
        transform = server.transform(in_flight // actors)
        done = synthesize(server.prompts(rows), transform, parts=f"{folder}/parts", placement=Placement(actors=actors))
        return list(done.merge.rows()), rate(server.work()[before:]), done.merge.report


def killer(cluster, rows, deaths):
    """Return what begins to kill an actor and then a node in the course of a run, told the folder of its parts."""

    def kill(parts):
        from tessy_hf.run.shared_rows import list_shared
        from tessy_hf.run.storage import ParquetRows, file_system

        for share, death in ((0.3, cluster.kill_actor), (0.6, cluster.kill_node)):
            count = 0
            while count < share * rows:
                time.sleep(0.5)
                system, path = file_system(str(parts))
                count = len({key for part in list_shared(system, path) for key, *_ in ParquetRows(system).keys(part)})
            deaths.append({"death": death.__name__, "rows_done": count, "what": death()})

    return lambda parts: threading.Thread(target=kill, args=(parts,), daemon=True).start()


def main():
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--servers", choices=("scripted", "vllm"), default="scripted")
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--in-flight", type=int, default=64, help="altogether")
    parser.add_argument("--actors", type=int, default=4)
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--mean", type=float, default=0.5, help="seconds of a scripted request, in the median")
    parser.add_argument("--deaths", action="store_true", help="kill an actor and a node in mid-run, instead")
    parser.add_argument("--python", default=sys.executable, help="the Python that has vLLM")
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        return serve(arguments.serve, arguments.mean)
    disable_progress_bars()
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as name, ray_cluster.nodes(arguments.nodes, Path(name)) as cluster:
        server = {"scripted": Scripted, "vllm": VLLM}[arguments.servers](Path(name), arguments)
        try:
            print(json.dumps(deaths(server, cluster, arguments) if arguments.deaths else ratio(server, arguments)))
        finally:
            server.close()


def ratio(server, arguments):
    """Compare the rates, in turns."""
    rates = {"one_process": [], "actors": []}
    for _ in range(arguments.repeats):
        single, alone = one_process(server, arguments.rows, arguments.in_flight)
        together, shared, _ = on_cluster(server, arguments.rows, arguments.in_flight, arguments.actors)
        assert together == single, "the rows differ"
        rates["one_process"].append(alone)
        rates["actors"].append(shared)
        print(f"one process {alone:.1f}, actors {shared:.1f} a second", file=sys.stderr, flush=True)
    ratios = [a / b for a, b in zip(rates["actors"], rates["one_process"], strict=True)]
    return {"ratio": statistics.median(ratios), "ratios": ratios, "per_second": rates, **vars(arguments)}


def deaths(server, cluster, arguments):
    """Compare the rows of a run in which an actor and a node die."""
    single, _ = one_process(server, arguments.rows, arguments.in_flight)
    told = []
    begin = time.monotonic()
    kill = killer(cluster, arguments.rows, told)
    together, _, report = on_cluster(server, arguments.rows, arguments.in_flight, arguments.actors, kill)
    seconds = time.monotonic() - begin
    differing = [one["id"] for one, other in zip(single, together, strict=True) if said(one) != said(other)]
    return {
        "rows": len(together),
        "unique": len({row["id"] for row in together}),
        "differing": differing,
        "duplicates_in_parts": len(report.duplicates),
        "differing_in_parts": len(report.differing),
        "killed": told,
        "seconds": seconds,
        **vars(arguments),
    }


def said(row):
    """Return a row without what it had cost: a row that was taken up again cost more."""
    return {name: row[name] for name in row if not name.startswith(("discarded_", "generated_"))}


if __name__ == "__main__":
    main()
