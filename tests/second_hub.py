"""A second Hub on loopback, written from the clients' source alone: it shares nothing with ``hub_server``.

What holds against one stand-in may hold because of how that one was made. This one decides otherwise wherever the
clients leave it open: large files go up in parts and lie on another origin that refuses a token; small ones are
redirected within the origin; which files are large is read from ``.gitattributes``; listings come in short pages,
packed; what cannot be found is 404 with a code, a repository that may not be seen 401; deleting a file that is not
there, or naming one that was never uploaded, fails the commit; connections are closed now and then; it limits the
rate, in either of the two ways the clients know; and it may answer from a copy that lags behind. Only what tests look
at and how they order faults is named as there, so that a test runs on either.
"""

from __future__ import annotations

import base64
import fnmatch
import gzip
import hashlib
import hmac
import json
import os
import re
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qs, quote, unquote, urlencode, urlsplit

RULES = "".join(
    f"*.{kind} filter=lfs diff=lfs merge=lfs -text\n"
    for kind in ("parquet", "arrow", "safetensors", "bin", "zip", "png", "jpg", "wav")
).encode()
PAGE = 5
PART = 64 << 10
Tree = dict[str, dict[str, Any]]


class Refusal(Exception):
    """An answer that is not 2xx."""

    def __init__(self, status: int, message: str, code: str = "", **headers: str) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
        self.headers |= {name.replace("_", "-"): value for name, value in headers.items()}


class Request(NamedTuple):
    """What was asked, as faults and tests see it."""

    number: int
    method: str
    path: str
    size: int


@dataclass(frozen=True)
class Commit:
    """A state of all files, and the one before it."""

    id: str
    parent: str | None
    title: str
    tree: Tree
    date: str


class Repo:
    """Commits with parents, branches, tags with objects of their own, and which large files were sent to it."""

    def __init__(self, name: str, private: bool) -> None:
        self.name, self.private = name, private
        self.commits: dict[str, Commit] = {}
        self.branches: dict[str, str] = {}
        self.tagged: dict[str, str] = {}
        self.objects: dict[str, str] = {}
        self.large: set[str] = set()
        self.commit("main", "initial commit", {".gitattributes": blob(RULES)})

    @property
    def tags(self) -> dict[str, str]:
        """The commit of each tag."""
        return {tag: self.objects.get(oid, oid) for tag, oid in self.tagged.items()}

    def commit(self, branch: str, title: str, tree: Tree) -> str:
        date = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=len(self.commits))
        parent = self.branches.get(branch)
        oid = _sha1("commit", json.dumps([self.name, len(self.commits), title, parent]).encode())
        self.commits[oid] = Commit(oid, parent, title, tree, date.isoformat()[:19] + ".000Z")
        self.branches[branch] = oid
        return oid

    def at(self, revision: str) -> Commit | None:
        """Return the commit of a branch, a tag, a tag's object or an id, or ``None``."""
        for kind in ("refs/heads/", "refs/tags/"):
            revision = revision.removeprefix(kind)
        found = self.branches.get(revision) or self.tagged.get(revision, revision)
        return self.commits.get(self.objects.get(found, found))

    def history(self, revision: str) -> Iterator[Commit]:
        """Yield a commit and those before it."""
        commit = self.at(revision)
        while commit is not None:
            yield commit
            commit = self.at(commit.parent) if commit.parent else None

    def find(self, revision: str) -> str:
        found = self.at(revision)
        if found is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found.id

    def tree(self, revision: str) -> Tree:
        return self.commits[self.find(revision)].tree


def _sha1(kind: str, data: bytes) -> str:
    return hashlib.sha1(f"{kind} {len(data)}\0".encode() + data).hexdigest()


def _folder(path: str) -> dict[str, Any]:
    return {"type": "directory", "path": path, "oid": _sha1("tree", path.encode()), "size": 0}


def blob(data: bytes, lfs: str | None = None, size: int | None = None) -> dict[str, Any]:
    if lfs is None:
        return {"oid": _sha1("blob", data), "size": len(data), "data": data}
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{lfs}\nsize {size}\n".encode()
    return {
        "oid": _sha1("blob", pointer),
        "size": size,
        "lfs": {"oid": lfs, "size": size, "pointerSize": len(pointer)},
    }


class SecondHub:
    """The Hub and its storage, two servers; a context manager.

    Attributes:
        fault: Says what becomes of a request: ``None``; a status; ``cut`` before it is done; ``lost`` after.
        limited_every: Every so many requests one is answered 429; 0 for none.
        lag: So many listings of refs after each change still tell what was before it.
        refs_tell_objects: Whether the target of a tag with a message is told as the tag's own object.
        requests: Every request as it came.
        seen: Every request that was answered: method, path, status.
    """

    def __init__(self, tokens: dict[str, str] | None = None) -> None:
        self.tokens = {"hf_writes": "write", "hf_reads": "read"} if tokens is None else tokens
        self.repos: dict[tuple[str, str], Repo] = {}
        self.store: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.fault: Callable[[Request], str | None] = lambda request: None
        self.limited_every = self.lag = 0
        self.refs_tell_objects = False
        self.requests: list[Request] = []
        self.seen: list[tuple[str, str, int]] = []
        self.lock = threading.RLock()
        self._old: dict[int, tuple[Any, int]] = {}
        self._asked = 0
        self._servers = [_server(_Api, self), _server(_Storage, self)]
        self.endpoint, self.storage = (f"http://127.0.0.1:{server.server_address[1]}" for server in self._servers)

    def __enter__(self) -> SecondHub:
        for server in self._servers:
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def environment(self, home: object) -> dict[str, str]:
        """Return what a client's environment needs, before it imports anything."""
        given = {name: value for name, value in os.environ.items() if not name.endswith("OFFLINE")}
        switches = ("XET", "TELEMETRY", "UPDATE_CHECK", "PROGRESS_BARS")
        hub = {"HF_ENDPOINT": self.endpoint, "HF_TOKEN": next(iter(self.tokens)), "HF_HOME": str(home)}
        return {**given, **hub, "OMP_NUM_THREADS": "1", **{f"HF_HUB_DISABLE_{name}": "1" for name in switches}}

    # --- for tests

    def repo(self, name: str) -> Repo:
        return self.repos["datasets", name]

    def add(self, name: str, files: dict[str, bytes]) -> None:
        self.repos["datasets", name] = Repo(name, False)
        self.repo(name).commit("main", "more", {path: blob(data) for path, data in files.items()})

    def read(self, name: str, revision: str, path: str) -> bytes:
        return self.content(self.repo(name).tree(revision)[path])

    def paths(self, name: str, revision: str) -> list[str]:
        return sorted(self.repo(name).tree(revision))

    def uploaded(self, since: int = 0) -> int:
        """Return how many bytes were sent to storage."""
        return sum(request.size for request in self.requests[since:] if request.method == "PUT")

    def content(self, entry: dict[str, Any]) -> bytes:
        return self.store[entry["lfs"]["oid"]] if "lfs" in entry else entry["data"]

    def keep(self, data: bytes) -> dict[str, Any]:
        return blob(data)

    # --- what it does by itself

    def signed(self, path: str) -> str:
        return f"{self.storage}{path}?sig={hmac.new(b'storage', path.encode(), 'sha256').hexdigest()[:16]}"

    def limits(self) -> None:
        """Answer 429 where it is time to."""
        self._asked += 1
        if self.limited_every and self._asked % self.limited_every == 0:
            raise self.limited(self._asked // self.limited_every)

    def limited(self, number: int) -> Refusal:
        """Return a 429, in one of the two ways in turn."""
        if number % 2:
            return Refusal(429, "We had to rate limit you", Retry_After="0")
        policy = '"fixed window";"api";q=500;w=300'
        return Refusal(429, "We had to rate limit you", RateLimit='"api";r=0;t=0', RateLimit_Policy=policy)

    def changing(self, repo: Repo) -> None:
        """Remember the refs, for a copy that lags."""
        if self.lag:
            self._old[id(repo)] = (self.refs(repo), self.lag)

    def told_refs(self, repo: Repo) -> Any:
        old, left = self._old.pop(id(repo), (None, 0))
        if left > 1:
            self._old[id(repo)] = (old, left - 1)
        return old if left else self.refs(repo)

    def refs(self, repo: Repo) -> Any:
        told = {"heads": repo.branches, "tags": repo.tagged if self.refs_tell_objects else repo.tags}
        rows = {
            kind: [{"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": oid} for name, oid in found.items()]
            for kind, found in told.items()
        }
        return {"branches": rows["heads"], "tags": rows["tags"], "converts": []}


def _server(handler: type[_Handler], hub: SecondHub) -> ThreadingHTTPServer:
    server = ThreadingHTTPServer(("127.0.0.1", 0), type(handler.__name__, (handler,), {"hub": hub}))
    server.daemon_threads = True
    return server


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: SecondHub

    def log_message(self, *_: Any) -> None:
        pass

    def handle_any(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        while self.headers.get("Transfer-Encoding", "") == "chunked" and (size := int(self.rfile.readline(), 16)) >= 0:
            body += self.rfile.read(size)
            self.rfile.readline()
            if not size:
                break
        url = urlsplit(self.path)
        self.query = {name: values[-1] for name, values in parse_qs(url.query).items()}
        with self.hub.lock:
            request = Request(len(self.hub.requests), self.command, self.path, len(body))
            self.hub.requests.append(request)
            fault = self.hub.fault(request)
            try:
                if fault and fault.isdigit():
                    raise self.hub.limited(request.number) if fault == "429" else Refusal(int(fault), "Not now.")
                status, headers, data = self.answer(url.path, body) if fault != "cut" else (0, {}, b"")
            except Refusal as refusal:
                status, headers = refusal.status, refusal.headers
                data = json.dumps({"error": str(refusal)}).encode()
        if fault in ("cut", "lost"):
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        self.hub.seen.append((self.command, url.path, status))
        if "gzip" in self.headers.get("Accept-Encoding", "") and headers.pop("Packed", None):
            data, headers = gzip.compress(data, 1), {**headers, "Content-Encoding": "gzip"}
        headers.pop("Packed", None)
        if len(self.hub.seen) % 13 == 0:
            headers["Connection"] = "close"
            self.close_connection = True
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any  # noqa: N815 - the names that http.server calls

    def answer(self, path: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        raise NotImplementedError

    def sent(self, data: bytes, headers: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
        """Answer with bytes, or the range of them that is asked for."""
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or "")
        headers = {"Accept-Ranges": "bytes", **headers}
        if not asked:
            return 200, headers, data
        first, last = asked.groups()
        start = int(first) if first else max(0, len(data) - int(last))
        end = min(len(data), int(last) + 1) if first and last else len(data)
        if start >= len(data):
            raise Refusal(416, "Range Not Satisfiable", Content_Range=f"bytes */{len(data)}")
        return 206, {**headers, "Content-Range": f"bytes {start}-{end - 1}/{len(data)}"}, data[start:end]


class _Storage(_Handler):
    """Where large files lie: signed addresses, and no token."""

    def answer(self, path: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        if self.headers.get("Authorization"):
            raise Refusal(400, "Only one auth mechanism allowed")
        if not self.hub.signed(path).endswith(f"sig={self.query.get('sig')}"):
            raise Refusal(403, "SignatureDoesNotMatch")
        oid, _, part = path.strip("/").partition("/")
        if self.command == "PUT":
            self.hub.parts.setdefault(oid, {})[int(part)] = body
            return 200, {"ETag": f'"{hashlib.md5(body).hexdigest()}"'}, b""
        if oid not in self.hub.store:
            raise Refusal(404, "NoSuchKey")
        return self.sent(self.hub.store[oid], {"ETag": f'"storage-{oid[:8]}"'})


class _Api(_Handler):
    """What the clients call of the Hub itself."""

    def answer(self, path: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        self.hub.limits()
        words = path.strip("/").split("/")
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        self.role = self.hub.tokens.get(token) if token else ""
        if self.role is None:
            raise Refusal(401, "Invalid credentials in Authorization header")
        data = json.loads(body) if "json" in (self.headers.get("Content-Type") or "") and b"\n{" not in body else body
        if words[:2] == ["api", "whoami-v2"]:
            return self.packed({"type": "user", "name": "ann", "orgs": [], "auth": {"type": "access_token"}})
        if words == ["api", "repos", "create"]:
            return self.create(data)
        if words == ["api", "validate-yaml"]:
            return self.packed({"errors": [], "warnings": []})
        if words[0] == "api" and words[1] in ("models", "datasets", "spaces") and len(words) > 3:
            repo = self.repo(words[1], f"{words[2]}/{words[3]}")
            verb, rest = words[4] if len(words) > 4 else "revision", [unquote(word) for word in words[5:]]
            method = getattr(self, f"{self.command.lower()}_{verb.replace('-', '_')}", None)
            if method is not None:
                return method(repo, rest, data)  # type: ignore[no-any-return]
        if words[0] == "lfs-complete":
            return self.complete(self.hub.repos[words[1], "/".join(words[2:])], data)  # comes without a token
        kind = words[0] if words[0] in ("datasets", "spaces") else "models"
        words = words[1:] if kind != "models" else words
        if words[2:6] == ["info", "lfs", "objects", "batch"]:
            name = f"{words[0]}/{words[1].removesuffix('.git')}"
            return self.batch(self.repo(kind, name, write=True), f"{kind}/{name}", data)
        if words[2:3] == ["resolve"] and len(words) > 4:
            name = f"{words[0]}/{words[1]}"
            return self.resolve(self.repo(kind, name), unquote(words[3]), unquote("/".join(words[4:])), kind, name)
        if words[0] in ("parquet", "info", "first-rows", "splits", "is-valid"):
            raise Refusal(501, "The dataset viewer is not available")
        raise Refusal(404, "Sorry, we can't find the page you are looking for.")

    def packed(self, value: Any, **headers: str) -> tuple[int, dict[str, str], bytes]:
        return 200, {"Content-Type": "application/json", "Packed": "yes", **headers}, json.dumps(value).encode()

    def repo(self, kind: str, name: str, write: bool = False) -> Repo:
        found = self.hub.repos.get((kind, name))
        if found is None or (found.private and not self.role):
            raise Refusal(404 if self.role else 401, "Repository not found", "RepoNotFound")
        if (write or self.command in ("POST", "DELETE")) and "/paths-info/" not in self.path:
            self.may_write()
        return found

    def may_write(self) -> None:
        if self.role != "write":
            raise Refusal(403 if self.role else 401, "You don't have the required permissions to perform this action")

    def create(self, data: Any) -> tuple[int, dict[str, str], bytes]:
        self.may_write()
        owner = data.get("organization") or "ann"
        if owner not in ("ann", "ada"):  # the user's, and an organization's that she is in
            raise Refusal(403, f"You don't have the rights to create a repository under the namespace {owner}")
        kind, name = f"{data.get('type') or 'model'}s", f"{owner}/{data['name']}"
        url = f"{self.hub.endpoint}/{'datasets/' if kind == 'datasets' else ''}{name}"
        if (kind, name) in self.hub.repos:
            answer = {"error": "You already created this repo", "url": url}
            return 409, {"Content-Type": "application/json"}, json.dumps(answer).encode()
        self.hub.repos[kind, name] = Repo(name, data.get("visibility") == "private")
        return self.packed({"url": url, "name": name, "id": "6" * 24})

    # --- reading

    def get_auth_check(self, repo: Repo, rest: list[str], _: Any) -> Any:
        if rest == ["write"]:
            self.may_write()
        return 200, {}, b"OK"

    def get_revision(self, repo: Repo, rest: list[str], _: Any) -> Any:
        sha = repo.find("/".join(rest) or "main")
        told: dict[str, Any] = {"_id": "6" * 24, "id": repo.name, "sha": sha, "private": repo.private, "gated": False}
        told |= {"author": repo.name.split("/")[0], "disabled": False, "tags": [], "downloads": 0, "likes": 0}
        told["lastModified"] = told["createdAt"] = repo.commits[sha].date
        return self.packed({**told, "siblings": [{"rfilename": path} for path in sorted(repo.tree(sha))]})

    def get_refs(self, repo: Repo, *_: Any) -> Any:
        return self.packed(self.hub.told_refs(repo))

    def row(self, path: str, entry: dict[str, Any]) -> dict[str, Any]:
        return {"type": "file", "path": path, **{key: entry[key] for key in ("oid", "size", "lfs") if key in entry}}

    def get_tree(self, repo: Repo, rest: list[str], _: Any) -> Any:
        tree, folder = repo.tree(rest[0]), "".join(f"{word}/" for word in rest[1:])
        inside = {path: entry for path, entry in tree.items() if path.startswith(folder)}
        if not inside:
            raise Refusal(404, f"{folder} does not exist on {rest[0]}", "EntryNotFound")
        deep = self.query.get("recursive", "").lower() in ("1", "true")
        above = {path[: found.start()] for path in inside for found in re.finditer("/", path)}
        folders = {path for path in above if path.startswith(folder) and path + "/" != folder}
        rows = [
            {"type": "directory", "path": path, "oid": _sha1("tree", path.encode()), "size": 0} for path in folders
        ]
        rows += [self.row(path, entry) for path, entry in inside.items()]
        return self.paged(
            sorted((row for row in rows if deep or "/" not in row["path"][len(folder) :]), key=lambda row: row["path"])
        )

    def paged(self, rows: list[Any]) -> Any:
        at = int(base64.b64decode(self.query.get("cursor") or "MA=="))
        headers = {}
        if at + PAGE < len(rows):
            query = urlencode({**self.query, "cursor": base64.b64encode(str(at + PAGE).encode()).decode()})
            headers["Link"] = f'<{self.hub.endpoint}{urlsplit(self.path).path}?{query}>; rel="next"'
        return self.packed(rows[at : at + PAGE], **headers)

    def post_paths_info(self, repo: Repo, rest: list[str], body: Any) -> Any:
        asked = body["paths"] if isinstance(body, dict) else parse_qs(body.decode())["paths"]
        tree, rows = repo.tree("/".join(rest)), []
        for path in asked:
            if path in tree:
                rows.append(self.row(path, tree[path]))
            elif any(other.startswith(f"{path}/") for other in tree):
                rows.append(_folder(path))
        return self.packed(rows)

    def resolve(self, repo: Repo, revision: str, path: str, kind: str, name: str) -> Any:
        sha = repo.find(revision)
        headers = {"X-Repo-Commit": sha}
        entry = repo.tree(sha).get(path)
        if entry is None:
            raise Refusal(404, "Entry not found", "EntryNotFound", **headers)
        if "lfs" in entry:
            oid = entry["lfs"]["oid"]
            headers |= {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(entry["size"]), "ETag": f'"{entry["oid"]}"'}
            return 302, {**headers, "Location": self.hub.signed(f"/{oid}")}, b"Found. Redirecting"
        if "cached" not in self.query:  # a redirect that stays here, and is told without the origin
            where = f"{'' if kind == 'models' else '/' + kind}/{name}/resolve/{sha}/{quote(path)}?cached=1"
            return 307, {**headers, "Location": where}, b"Temporary Redirect"
        return self.sent(entry["data"], {**headers, "ETag": f'W/"{entry["oid"]}"', "Content-Type": "text/plain"})

    # --- writing

    def post_branch(self, repo: Repo, rest: list[str], data: Any) -> Any:
        name = "/".join(rest)
        if name in repo.branches:
            raise Refusal(409, f"Reference already exists: refs/heads/{name}")
        self.hub.changing(repo)
        repo.branches[name] = repo.find(data.get("startingPoint") or "main")
        return 201, {}, b"{}"

    def delete_branch(self, repo: Repo, rest: list[str], _: Any) -> Any:
        if repo.branches.get("/".join(rest)) is None:
            raise Refusal(404, "Reference does not exist", "RevisionNotFound")
        self.hub.changing(repo)
        del repo.branches["/".join(rest)]
        return 200, {}, b""

    def post_tag(self, repo: Repo, rest: list[str], data: Any) -> Any:
        target = repo.find("/".join(rest))
        if data["tag"] in repo.tagged:
            raise Refusal(409, f"Tag reference exists already: refs/tags/{data['tag']}")
        self.hub.changing(repo)
        repo.tagged[data["tag"]] = target
        if data.get("message"):
            own = _sha1("tag", f"{target}{data['tag']}".encode())
            repo.objects[own], repo.tagged[data["tag"]] = target, own
        return 201, {}, b"{}"

    def post_preupload(self, repo: Repo, rest: list[str], data: Any) -> Any:
        tree, rows = repo.tree("/".join(rest)), []
        for file in data["files"]:
            there, large = tree.get(file["path"]), self.is_large(tree, file["path"]) or file["size"] > 10 << 20
            row = {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            if there:
                row["oid"] = there["lfs"]["oid"] if "lfs" in there else there["oid"]
            rows.append(row)
        return self.packed({"files": rows})

    def is_large(self, tree: Tree, path: str) -> bool:
        lines = tree[".gitattributes"]["data"].decode().splitlines() if ".gitattributes" in tree else []
        name = path.rsplit("/", 1)[-1]
        return any("filter=lfs" in line and fnmatch.fnmatch(name, line.split()[0]) for line in lines)

    def batch(self, repo: Repo, name: str, data: Any) -> Any:
        objects = []
        for asked in data["objects"]:
            oid, size = asked["oid"], asked["size"]
            row: dict[str, Any] = {"oid": oid, "size": size}
            if oid not in repo.large:
                urls = {str(n + 1): self.hub.signed(f"/{oid}/{n + 1}") for n in range(max(1, -(-size // PART)))}
                header = {"chunk_size": str(PART), **urls}
                row["actions"] = {"upload": {"href": f"{self.hub.endpoint}/lfs-complete/{name}", "header": header}}
            objects.append(row)
        return self.packed({"transfer": "multipart", "objects": objects})

    def complete(self, repo: Repo, data: Any) -> Any:
        there = self.hub.parts.get(data["oid"], {})
        tags = {n: f'"{hashlib.md5(part).hexdigest()}"' for n, part in there.items()}
        whole = b"".join(there.get(part["partNumber"], b"") for part in data["parts"])
        if any(tags.get(part["partNumber"]) != part["etag"] for part in data["parts"]):
            raise Refusal(400, "InvalidPart")
        if hashlib.sha256(whole).hexdigest() != data["oid"]:
            raise Refusal(400, "The content is not what its name says")
        self.hub.store[data["oid"]] = whole
        repo.large.add(data["oid"])
        return self.packed({"success": True})

    def post_commit(self, repo: Repo, rest: list[str], body: Any) -> Any:
        branch = "/".join(rest)
        lines = [body] if isinstance(body, dict) else [json.loads(line) for line in body.splitlines() if line]
        if branch not in repo.branches:
            raise Refusal(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        header, tree = lines[0]["value"], dict(repo.tree(branch))
        if header.get("parentCommit") not in (None, repo.branches[branch]):
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        for line in lines[1:]:
            kind, path = line["key"], line["value"]["path"]
            if kind == "deletedFolder":
                tree = {name: entry for name, entry in tree.items() if not name.startswith(f"{path.rstrip('/')}/")}
            elif kind == "deletedFile":
                if tree.pop(path, None) is None:
                    raise Refusal(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
            elif kind == "lfsFile":
                data = self.hub.store.get(line["value"]["oid"]) if line["value"]["oid"] in repo.large else None
                if data is None:
                    raise Refusal(400, f"LFS pointer pointed to a file that does not exist: {path}")
                tree[path] = blob(b"", line["value"]["oid"], len(data))
            else:
                data = base64.b64decode(line["value"]["content"])
                if data and (self.is_large(tree, path) or len(data) > 10 << 20):
                    raise Refusal(400, f"Your push was rejected because it contains binary files: {path}")
                tree[path] = blob(data)
        self.hub.changing(repo)
        oid = repo.commit(branch, header["summary"], tree)
        url = f"{self.hub.endpoint}/{repo.name}/commit/{oid}"
        return self.packed({"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})
