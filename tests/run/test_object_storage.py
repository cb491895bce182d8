"""Shared rows on object storage, over loopback: S3 with the real client, and repositories on two Hubs."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote

import pytest

from tessy_hf.cluster.merge import Merge
from tessy_hf.run.storage import file_system
from tests.hub_server import clients_of
from tests.second_hub import SecondHub
from tests.test_transform import prompts, rows_of, scripted

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning"),
]

ROWS = 48
HOST = f"""
import sys
from tests.test_transform import prompts, rows_of, scripted

def note(request):
    with open(sys.argv[2], "a") as log:
        log.write(request.row + "\\n")

latency = float(sys.argv[3])
transform = scripted(parts=sys.argv[1], fault=note, latency=latency, rows_in_flight=4)
rows_of(prompts({ROWS}), transform, batch_size=8)
"""


def host(parts, log, latency=0.0):
    """Begin a host, a process of its own."""
    words = [sys.executable, "-c", HOST, parts, str(log), str(latency)]
    return subprocess.Popen(words, env={**os.environ, "PYTHONPATH": os.getcwd() + ":" + ":".join(sys.path)})


def parts_in(folder):
    system, path = file_system(folder)
    system.invalidate_cache()
    try:
        return [name for name in system.ls(path, detail=False) if name.endswith(".parquet")]
    except FileNotFoundError:
        return []


@pytest.fixture
def bucket(monkeypatch):
    """A bucket on a server that speaks S3."""
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    keys = {"AWS_ACCESS_KEY_ID": "one", "AWS_SECRET_ACCESS_KEY": "two", "AWS_DEFAULT_REGION": "us-east-1"}
    for name, value in {"AWS_ENDPOINT_URL": f"http://{host}:{port}", **keys}.items():
        monkeypatch.setenv(name, value)
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    name = f"rows-{uuid.uuid4().hex}"  # servers of one process share what they hold
    s3fs.S3FileSystem().mkdir(name)
    yield f"s3://{name}/run"
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


def test_on_s3_one_host_dies_and_the_other_ends_the_run(bucket, tmp_path):
    first = host(bucket, tmp_path / "first.log", latency=0.05)
    while len(parts_in(bucket)) < 2:
        assert first.poll() is None, "the first host ended before it could die"
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    assert first.wait(60) == -signal.SIGKILL
    done = {row["key"] for row in stored(bucket)}
    assert 0 < len(done) < ROWS

    second = host(bucket, tmp_path / "second.log")
    assert second.wait(120) == 0
    assert not done & set((tmp_path / "second.log").read_text().split()), "finished rows were written again"
    merged = Merge([bucket], prompts(ROWS))
    assert list(merged.rows()) == rows_of(prompts(ROWS), scripted())
    assert not merged.report.duplicates and not merged.report.missing


def stored(folder):
    import pyarrow.parquet as pq

    system, _ = file_system(folder)
    for name in parts_in(folder):
        with system.open(name, "rb") as file:
            yield from pq.read_table(file).to_pylist()


def test_two_hosts_at_once_on_s3_leave_each_row_once(bucket, tmp_path):
    hosts = [host(bucket, tmp_path / f"{number}.log", latency=0.01) for number in range(2)]
    assert [one.wait(120) for one in hosts] == [0, 0]
    assert list(Merge([bucket], prompts(ROWS)).rows()) == rows_of(prompts(ROWS), scripted())


@pytest.fixture
def repository(hub, monkeypatch):
    """A dataset repository on a Hub that is busy now and then, or refuses a commit as another was faster."""
    import huggingface_hub.utils._http as client
    from huggingface_hub import HfApi

    monkeypatch.setattr(client.time, "sleep", lambda seconds: None)
    faults = [None, "503", None, "412"]
    HfApi(endpoint=hub.endpoint).create_repo("ada/rows", repo_type="dataset")
    hub.fault = lambda request: faults.pop(0) if "/commit/main" in request.path and faults else None
    if isinstance(hub, SecondHub):
        hub.limited_every = 9
    yield "hf://datasets/ada/rows/run"
    assert len(faults) < 3, "no commit met a fault"


def test_parts_in_a_repository_on_the_hub_are_gone_on_from(repository):
    go_on(repository)


def go_on(repository):
    rows_of(prompts(30), scripted(parts=repository, rows_in_flight=4), batch_size=8)
    assert len(parts_in(repository)) >= 2

    def asked(request):
        assert int(request.row[1:]) >= 30, f"{request.row} was written again"

    again = rows_of(prompts(36), scripted(parts=repository, fault=asked), batch_size=8)
    assert again == rows_of(prompts(36), scripted()) == list(Merge([repository], prompts(36)).rows())


class BucketHandler(BaseHTTPRequestHandler):
    """The Hub's side of a bucket; the store that the client's Xet library writes to is a folder, not a service."""

    protocol_version = "HTTP/1.1"
    files: dict
    store: str

    def do_GET(self):
        path = unquote(self.path.partition("?")[0])
        tree, resolve = "/api/buckets/ada/rows/tree", "/buckets/ada/rows/resolve/"
        if path.startswith(tree):
            inside = [name for name in sorted(self.files) if name.startswith(path.removeprefix(tree).lstrip("/"))]
            self.answer(json.dumps([self.row(name) for name in inside]).encode())
        elif path.startswith(resolve):
            data, asked = self.content(path.removeprefix(resolve)), self.headers.get("Range")
            first, last = map(int, asked.removeprefix("bytes=").split("-")) if asked else (0, len(data) - 1)
            self.answer(data[first : last + 1], 206 if asked else 200, f"bytes {first}-{last}/{len(data)}")
        elif path.endswith("/xet-write-token"):
            self.answer(json.dumps({"casUrl": self.store, "accessToken": "one", "exp": 1 << 32}).encode())
        else:
            info = {"id": "ada/rows", "private": False, "size": 0, "totalFiles": len(self.files)}
            self.answer(json.dumps({**info, "createdAt": "2026-01-02T03:04:05.000Z"}).encode())

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path.endswith("/batch"):
            added = [json.loads(line) for line in body.splitlines()]
            assert {one["type"] for one in added} == {"addFile"}
            self.files.update({one["path"]: (one["xetHash"], len(self.read(one["xetHash"]))) for one in added})
            return self.answer(b'{"failed": []}')
        return self.answer(
            json.dumps([self.row(name) for name in json.loads(body)["paths"] if name in self.files]).encode()
        )

    do_HEAD = do_GET

    def read(self, xet_hash, size=None):
        """Return the bytes of a file that the client has put into the store."""
        import hf_xet

        with tempfile.TemporaryDirectory() as folder:
            with hf_xet.XetSession().new_file_download_group(endpoint=self.store) as group:
                group.start_download_file(hf_xet.XetFileInfo(xet_hash, size), f"{folder}/file")
            return Path(folder, "file").read_bytes()

    def content(self, name):
        return self.read(*self.files[name])

    def row(self, name):
        xet_hash, size = self.files[name]
        return {"type": "file", "path": name, "size": size, "xetHash": xet_hash}

    def answer(self, data, status=200, content_range=None):
        self.send_response(status)
        ranges = {"Content-Range": content_range} if content_range else {}
        for name, value in {"Content-Length": str(len(data)), "ETag": '"0"', **ranges}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_):
        pass


def test_parts_in_a_bucket_are_gone_on_from(tmp_path, monkeypatch):
    """The real client writes through the real Xet library, which takes a folder for its store."""
    monkeypatch.setenv("HF_XET_CACHE", str(tmp_path / "xet"))
    given = {"files": {}, "store": f"local://{tmp_path / 'store'}"}
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bucket", (BucketHandler,), given))
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    place = SimpleNamespace(endpoint=f"http://127.0.0.1:{server.server_address[1]}")
    with clients_of(place, tmp_path, monkeypatch):
        go_on("hf://buckets/ada/rows/run")
    server.shutdown()
    server.server_close()
    assert given["files"] and all(name.startswith("run/part-") for name in given["files"])
