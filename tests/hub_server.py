"""A Hub on 127.0.0.1, good enough for the real `huggingface_hub` and `datasets` clients, with faults on order.

Files are content-addressed on disk; commits, branches and tags are real and immutable. Storage is another origin (a
second port), as on the Hub, with signed addresses in place of tokens. Every request of either origin has a number, and
:attr:`HubServer.fault` decides what becomes of it.
"""

import base64
import hashlib
import json
import os
import re
import secrets
import socket
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

WRITE_TOKEN, READ_TOKEN = "hf_write_of_ada", "hf_read_of_ada"
DATE = "2026-01-02T03:04:05.000Z"


@dataclass(frozen=True)
class Entry:
    """A file in a commit; ``sha256`` for those in storage."""

    oid: str
    size: int
    sha256: str | None = None


@dataclass(frozen=True)
class Commit:
    id: str
    parent: str | None
    title: str
    tree: dict


@dataclass
class Repo:
    name: str
    private: bool = False
    commits: dict = field(default_factory=dict)
    branches: dict = field(default_factory=dict)
    tags: dict = field(default_factory=dict)
    stored: set = field(default_factory=set)  # SHA-256 of what was uploaded and verified

    def commit(self, branch, title, tree):
        parent = self.branches.get(branch)
        told = json.dumps(
            [parent, title, sorted((path, entry.oid) for path, entry in tree.items()), len(self.commits)]
        )
        commit = Commit(hashlib.sha1(told.encode()).hexdigest(), parent, title, tree)
        self.commits[commit.id] = commit
        self.branches[branch] = commit.id
        return commit

    def at(self, revision):
        """Return the commit of a branch, a tag or an id, or ``None``."""
        return self.commits.get(self.branches.get(revision, self.tags.get(revision, revision)))

    def history(self, revision):
        commit = self.at(revision)
        while commit is not None:
            yield commit
            commit = self.commits.get(commit.parent)


@dataclass
class Request:
    """What was asked, as faults and tests see it."""

    number: int
    method: str
    path: str
    size: int


class HubError(Exception):
    """An answer that is an error."""

    def __init__(self, status, message, code=None):
        super().__init__(message)
        self.status, self.code = status, code


class HubServer:
    """The Hub.

    Args:
        folder: Where files are kept.
        regular_parquet: Whether Parquet files are plain files in a commit, as on servers without rules for storage.
        initial_commit: Whether a new repository has a first commit, as on the Hub, or nothing at all.
    """

    def __init__(self, folder, *, regular_parquet=False, initial_commit=True):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.regular_parquet, self.initial_commit = regular_parquet, initial_commit
        self.repos = {}
        self.requests = []
        self.fault = lambda request: None
        """Says what becomes of a request: ``None``; a status; ``cut``, before it is done; ``lost``, after."""
        self.lock = threading.RLock()
        self._secret = secrets.token_bytes(16)
        self._servers = []

    def __enter__(self):
        for role in (Api, Storage):
            server = ThreadingHTTPServer(("127.0.0.1", 0), type(role.__name__, (role,), {"hub": self}))
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
            self._servers.append(server)
        self.endpoint, self.storage = (f"http://127.0.0.1:{server.server_address[1]}" for server in self._servers)
        return self

    def __exit__(self, *_):
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def environment(self, home, token=WRITE_TOKEN):
        """Return what a client's environment needs, before it imports anything."""
        given = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")}
        switches = ("HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_UPDATE_CHECK")
        hub = {"HF_ENDPOINT": self.endpoint, "HF_TOKEN": token, "HF_HOME": str(home)}
        return {**given, **hub, **dict.fromkeys(switches, "1"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}

    # --- for tests

    def repo(self, name):
        return self.repos["datasets", name]

    def add(self, name, files):
        """Make somebody's dataset of files."""
        self.repos["datasets", name] = Repo(name)
        self.repo(name).commit("main", "Add files", {path: self.keep(data) for path, data in files.items()})

    def read(self, name, revision, path):
        """Return a file's bytes."""
        return self.content(self.repo(name).at(revision).tree[path])

    def paths(self, name, revision):
        return sorted(self.repo(name).at(revision).tree)

    def uploaded(self, since=0):
        """Return how many bytes were put into storage."""
        return sum(request.size for request in self.requests[since:] if request.method == "PUT")

    # --- content

    def keep(self, data):
        oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        (self.folder / oid).write_bytes(data)
        return Entry(oid, len(data))

    def content(self, entry):
        return (self.folder / (entry.sha256 or entry.oid)).read_bytes()

    def sign(self, text):
        return hashlib.blake2b(text.encode(), key=self._secret, digest_size=12).hexdigest()


class Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def handle_any(self):
        length = int(self.headers.get("Content-Length") or 0)
        body = self._chunks() if "chunked" in self.headers.get("Transfer-Encoding", "") else self.rfile.read(length)
        with self.hub.lock:
            request = Request(len(self.hub.requests), self.command, self.path, len(body))
            self.hub.requests.append(request)
            fault = self.hub.fault(request)
            if fault and fault.isdigit():
                status, value, headers = int(fault), {"error": "The server is overloaded."}, {}
            elif fault != "cut":
                status, value, headers = self.respond_or_refuse(body)
        if fault in ("cut", "lost"):
            return self._close()
        return self.answer(status, value, headers)

    def respond_or_refuse(self, body):
        try:
            return self.respond(body)
        except HubError as error:
            code = {"X-Error-Code": error.code} if error.code else {}
            return error.status, {"error": str(error)}, {**code, "X-Error-Message": str(error)}

    do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = handle_any

    def _chunks(self):
        body = b""
        while size := int(self.rfile.readline().strip() or b"0", 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _close(self):
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def answer(self, status, value, headers=None):
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        headers = headers or {}
        if status == 200 and self.command in ("GET", "HEAD") and isinstance(value, bytes) and "Range" in self.headers:
            first, last = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers["Range"]).groups()
            start = int(first) if first else len(data) - int(last)
            end = min(int(last) + 1 if first and last else len(data), len(data))
            status, headers = 206, {**headers, "Content-Range": f"bytes {start}-{end - 1}/{len(data)}"}
            data = data[start:end]
        self.send_response(status)
        kind = "application/octet-stream" if isinstance(value, bytes) else "application/json"
        for name, text in {"Content-Type": kind, "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_):
        pass


class Storage(Handler):
    """The other origin: knows no tokens, only signatures."""

    def respond(self, body):
        url = urlsplit(self.path)
        sha256, given = url.path[1:], parse_qs(url.query).get("signature", [""])[0]
        if given != self.hub.sign(f"{'PUT' if self.command == 'PUT' else 'GET'} {sha256}"):
            raise HubError(403, "The signature is wrong.")
        path = self.hub.folder / sha256
        if self.command == "PUT":
            path.write_bytes(body)
            return 200, b"", {"ETag": f'"{hashlib.md5(body).hexdigest()}"'}
        return 200, path.read_bytes(), {"ETag": f'"{sha256}"', "Accept-Ranges": "bytes"}


API = re.compile(r"/api/(models|datasets|spaces)/([^/]+/[^/]+)(?:/(.*))?")
RESOLVE = re.compile(r"/(?:(datasets|spaces)/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
BATCH = re.compile(r"/(?:(datasets|spaces)/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch")


class Api(Handler):
    """The Hub's own origin."""

    def respond(self, body):
        self.body = body
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        if url.path == "/api/whoami-v2":
            return self._whoami()
        if url.path == "/api/repos/create":
            return self._create()
        if url.path == "/api/validate-yaml":
            return self._validate()
        if found := re.fullmatch(r"/verify/(.+)", url.path):
            return self._verify(found[1])
        for pattern, answer in ((RESOLVE, self._resolve), (BATCH, self._batch)):
            if found := pattern.fullmatch(url.path):
                return answer(*found.groups())
        found = API.fullmatch(url.path)
        if not found:
            raise HubError(404, f"Nothing is at {url.path}.")
        kind, name, rest = found.groups()
        return self._repo_api(kind, name, *[unquote(part) for part in (rest or "").split("/", 2)])

    # --- who, and which repository

    def _token(self):
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def _must_write(self):
        if self._token() != WRITE_TOKEN:
            raise HubError(403 if self._token() == READ_TOKEN else 401, "This token may not write.")

    def _find(self, kind, name):
        repo = self.hub.repos.get((kind, name))
        if repo is None or (repo.private and self._token() not in (WRITE_TOKEN, READ_TOKEN)):
            raise HubError(404 if self._token() else 401, "Repository not found", "RepoNotFound")
        return repo

    def _at(self, repo, revision):
        commit = repo.at(revision)
        if commit is None:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def _json(self):
        return json.loads(self.body or b"{}")

    def _whoami(self):
        if self._token() not in (WRITE_TOKEN, READ_TOKEN):
            raise HubError(401, "Invalid username or password.")
        role = "write" if self._token() == WRITE_TOKEN else "read"
        access = {"type": "access_token", "accessToken": {"displayName": "t", "role": role}}
        return 200, {"type": "user", "name": "ada", "orgs": [], "auth": access}, {}

    def _create(self):
        given = self._json()
        kind = given.get("type", "model") + "s"
        name = f"{given.get('organization') or 'ada'}/{given['name']}"
        url = f"{self.hub.endpoint}/{'' if kind == 'models' else kind + '/'}{name}"
        if (kind, name) in self.hub.repos:
            return 409, {"error": "You already created this repo", "url": url}, {}
        self._must_write()
        if not name.startswith("ada/"):
            raise HubError(403, "You may not create repositories in this namespace.")
        private = given.get("visibility") == "private" or bool(given.get("private"))
        repo = self.hub.repos[kind, name] = Repo(name, private)
        if self.hub.initial_commit:
            repo.commit("main", "initial commit", {".gitattributes": self.hub.keep(b"*.parquet filter=lfs\n")})
        return 200, {"url": url, "id": name, "name": name}, {}

    def _validate(self):
        text = self._json()["content"]
        found = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
        try:
            yaml.safe_load(found[1]) if found else None
        except yaml.YAMLError as error:
            return 400, {"errors": [{"message": str(error)}], "warnings": []}, {}
        return 200, {"errors": [], "warnings": []}, {}

    # --- /api/datasets/ada/name/...

    def _repo_api(self, kind, name, what="", *rest):
        repo = self._find(kind, name)
        if what in ("", "revision"):
            return self._info(repo, rest[0] if rest else "main")
        if what == "auth-check":
            if rest:
                self._must_write()
            return 200, {}, {}
        return getattr(self, "_" + what.replace("-", "_"))(repo, *rest)

    def _info(self, repo, revision):
        commit = repo.at(revision)
        if commit is None and revision != "main":
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        tree = commit.tree if commit else {}
        told = {"id": repo.name, "private": repo.private, "tags": [], "downloads": 0, "lastModified": DATE}
        sha = {"sha": commit.id} if commit else {}
        return 200, {**told, **sha, "siblings": [{"rfilename": path} for path in sorted(tree)]}, {}

    def _row(self, path, entry):
        lfs = {"lfs": {"oid": entry.sha256, "size": entry.size, "pointerSize": 130}} if entry.sha256 else {}
        return {"type": "file", "path": path, "size": entry.size, "oid": entry.oid, **lfs}

    def _rows(self, tree, folder, recursive):
        prefix, folders, rows = folder + "/" if folder else "", set(), []
        for path, entry in sorted(tree.items()):
            if not path.startswith(prefix):
                continue
            first, *more = path.removeprefix(prefix).split("/")
            above = [prefix + first] if more else []
            if recursive and more:
                parts = path.split("/")
                above = ["/".join(parts[:n]) for n in range(prefix.count("/") + 1, len(parts))]
            for name in above:
                if name not in folders:
                    folders.add(name)
                    rows.append(
                        {"type": "directory", "path": name, "size": 0, "oid": hashlib.sha1(name.encode()).hexdigest()}
                    )
            if recursive or not more:
                rows.append(self._row(path, entry))
        return rows

    def _tree(self, repo, revision, folder=""):
        tree = self._at(repo, revision).tree
        rows = self._rows(tree, folder, self.query.get("recursive", ["false"])[0].lower() == "true")
        if folder and not rows:
            raise HubError(404, f"{folder} does not exist", "EntryNotFound")
        page, size = int(self.query.get("cursor", ["0"])[0]), int(self.query.get("limit", ["1000"])[0])
        more = {}
        if page + size < len(rows):
            url = urlsplit(self.path)
            kept = "&".join(f"{k}={v[0]}" for k, v in self.query.items() if k != "cursor")
            more = {"Link": f'<{self.hub.endpoint}{url.path}?{kept}&cursor={page + size}>; rel="next"'}
        return 200, rows[page : page + size], more

    def _paths_info(self, repo, revision, *_):
        tree = self._at(repo, revision).tree
        rows = []
        for path in parse_qs(self.body.decode()).get("paths", []):
            if path in tree:
                rows.append(self._row(path, tree[path]))
            elif any(name.startswith(path + "/") for name in tree):
                rows.append(
                    {"type": "directory", "path": path, "size": 0, "oid": hashlib.sha1(path.encode()).hexdigest()}
                )
        return 200, rows, {}

    def _refs(self, repo, *_):
        def told(refs, kind):
            return [{"name": n, "ref": f"refs/{kind}/{n}", "targetCommit": sha} for n, sha in refs.items()]

        return 200, {"branches": told(repo.branches, "heads"), "tags": told(repo.tags, "tags"), "converts": []}, {}

    def _commits(self, repo, revision, *_):
        self._at(repo, revision)
        told = {"message": "", "date": DATE, "authors": [{"user": "ada"}]}
        return 200, [{"id": c.id, "title": c.title, **told} for c in repo.history(revision)], {}

    def _branch(self, repo, *parts):
        self._must_write()
        name = "/".join(parts)
        if self.command == "DELETE":
            if name not in repo.branches:
                raise HubError(404, f"Invalid rev id: {name}", "RevisionNotFound")
            del repo.branches[name]
            return 200, {}, {}
        if name in repo.branches:
            raise HubError(409, "Reference already exists")
        repo.branches[name] = self._at(repo, self._json().get("startingPoint", "main")).id
        return 200, {}, {}

    def _tag(self, repo, *parts):
        self._must_write()
        name = "/".join(parts)
        if self.command == "DELETE":
            if repo.tags.pop(name, None) is None:
                raise HubError(404, f"Invalid rev id: {name}", "RevisionNotFound")
            return 200, {}, {}
        tag = self._json()["tag"]
        if tag in repo.tags:
            raise HubError(409, "Tag reference exists already")
        repo.tags[tag] = self._at(repo, name).id
        return 200, {}, {}

    # --- writing

    def _in_storage(self, path):
        return path.endswith((".parquet", ".arrow", ".safetensors", ".png")) and not self.hub.regular_parquet

    def _preupload(self, repo, revision, *_):
        self._must_write()
        commit = repo.at(revision)
        if commit is None and revision != "main":
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        files = []
        for file in self._json()["files"]:
            mode = "lfs" if self._in_storage(file["path"]) or file["size"] > 10_000_000 else "regular"
            entry = commit.tree.get(file["path"]) if commit else None
            oid = {"oid": entry.sha256 or entry.oid} if entry else {}
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, **oid})
        return 200, {"files": files}, {}

    def _batch(self, kind, name):
        self._must_write()
        repo = self._find(kind or "models", name)
        objects = []
        for wanted in self._json()["objects"]:
            sha256, size = wanted["oid"], wanted["size"]
            told = {"oid": sha256, "size": size}
            if sha256 not in repo.stored:
                href = f"{self.hub.storage}/{sha256}?signature={self.hub.sign('PUT ' + sha256)}"
                verify = f"{self.hub.endpoint}/verify/{kind or 'models'}/{name}"
                told["actions"] = {"upload": {"href": href, "header": {}}, "verify": {"href": verify}}
            objects.append(told)
        return 200, {"transfer": "basic", "objects": objects}, {}

    def _verify(self, repo):
        self._must_write()
        given = self._json()
        path = self.hub.folder / given["oid"]
        if not path.is_file() or path.stat().st_size != given["size"]:
            raise HubError(404, "The object was not uploaded.")
        if hashlib.sha256(path.read_bytes()).hexdigest() != given["oid"]:
            raise HubError(400, "The object is not what it was said to be.")
        kind, name = repo.split("/", 1)
        self._find(kind, name).stored.add(given["oid"])
        return 200, {}, {}

    def _commit(self, repo, branch, *_):
        self._must_write()
        if branch not in repo.branches and not (branch == "main" and not repo.branches):
            raise HubError(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        lines = [json.loads(line) for line in self.body.splitlines() if line.strip()]
        head = lines[0]["value"]
        if head.get("parentCommit") not in (None, repo.branches.get(branch)):
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        before = repo.at(branch)
        tree = dict(before.tree) if before else {}
        for line in lines[1:]:
            self._apply(repo, tree, line["key"], line["value"])
        commit = repo.commit(branch, head["summary"], tree)
        url = f"{self.hub.endpoint}/datasets/{repo.name}/commit/{commit.id}"
        return 200, {"success": True, "commitOid": commit.id, "commitUrl": url}, {}

    def _apply(self, repo, tree, key, value):
        path = value["path"]
        if key == "file":
            data = (
                value["content"].encode() if value.get("encoding") != "base64" else base64.b64decode(value["content"])
            )
            tree[path] = self.hub.keep(data)
        elif key == "lfsFile":
            if value["oid"] not in repo.stored:
                raise HubError(400, f"The object of {path} was not uploaded to this repository.")
            size = (self.hub.folder / value["oid"]).stat().st_size
            pointer = hashlib.sha1(f"pointer {value['oid']} {size}".encode()).hexdigest()
            tree[path] = Entry(pointer, size, value["oid"])
        elif key in ("deletedFile", "deletedFolder"):
            gone = [name for name in tree if name == path or name.startswith(path.rstrip("/") + "/")]
            if not gone:
                raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
            for name in gone:
                del tree[name]
        else:
            raise HubError(400, f"An operation {key!r} is not known.")

    # --- reading

    def _resolve(self, kind, name, revision, path):
        repo = self._find(kind or "models", name)
        commit = self._at(repo, unquote(revision))
        entry = commit.tree.get(unquote(path))
        seen = {"X-Repo-Commit": commit.id}
        if entry is None:
            answer = {"error": "Entry not found"}
            return 404, answer, {**seen, "X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
        if entry.sha256 is None:
            return 200, self.hub.content(entry), {**seen, "ETag": f'"{entry.oid}"', "Accept-Ranges": "bytes"}
        href = f"{self.hub.storage}/{entry.sha256}?signature={self.hub.sign('GET ' + entry.sha256)}"
        linked = {"X-Linked-Etag": f'"{entry.sha256}"', "X-Linked-Size": str(entry.size), "Location": href}
        return 302, {}, {**seen, **linked, "ETag": f'"{entry.sha256}"'}


@contextmanager
def clients_of(hub, home, monkeypatch, token=WRITE_TOKEN):
    """Point this process' clients at the Hub, for as long as it lasts. Child processes get ``hub.environment``."""
    import datasets
    import huggingface_hub
    from huggingface_hub import HfFileSystem, constants

    for name, value in {"ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}.items():
        monkeypatch.setattr(constants, name, value)
    template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setenv("HF_TOKEN", token)
    for name, value in {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": False, "HF_DATASETS_OFFLINE": False}.items():
        monkeypatch.setattr(datasets.config, name, value)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", home / "datasets")
    monkeypatch.setattr(datasets.config, "HF_MODULES_CACHE", str(home / "modules"))
    HfFileSystem.clear_instance_cache()
    huggingface_hub.close_session()
    try:
        yield
    finally:
        HfFileSystem.clear_instance_cache()
        huggingface_hub.close_session()
