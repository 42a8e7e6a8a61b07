"""The part of the Hub's HTTP API that publishing and downloading a model need, on this machine and in memory.

Faults are queued per route: a status code to answer with, `drop` to close the connection in the middle, None for none.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlparse

import huggingface_hub
import pytest
import yaml
from huggingface_hub import constants

WRITE_TOKEN, READ_TOKEN = "hf_write_secret", "hf_read_secret"
LARGE = (".safetensors", ".gguf", ".png")
REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
ROUTES = {
    "create": ("POST", r"/api/repos/create"),
    "validate": ("POST", r"/api/validate-yaml"),
    "preupload": ("POST", rf"/api/models/{REPO}/preupload/(?P<revision>[^/]+)"),
    "commit": ("POST", rf"/api/models/{REPO}/commit/(?P<revision>[^/]+)"),
    "branch": ("POST", rf"/api/models/{REPO}/branch/(?P<revision>[^/]+)"),
    "tree": ("GET", rf"/api/models/{REPO}/tree/(?P<revision>[^/]+)"),
    "info": ("GET", rf"/api/models/{REPO}(/revision/(?P<revision>[^/]+))?"),
    "batch": ("POST", rf"/{REPO}\.git/info/lfs/objects/batch"),
    "verify": ("POST", r"/lfs/(?P<oid>[0-9a-f]{64})/verify"),
    "upload": ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})"),
    "resolve": ("GET|HEAD", rf"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)"),
}


@dataclass
class Repository:
    """Branches with their files; every commit's files stay reachable by its hash."""

    private: bool
    branches: dict[str, str] = field(default_factory=lambda: {"main": "0" * 40})
    commits: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"0" * 40: {}})

    def commit_of(self, revision: str | None) -> str | None:
        name = unquote(revision or "main")
        return self.branches.get(name, name if name in self.commits else None)

    def files(self, revision: str = "main") -> dict[str, bytes]:
        commit = self.commit_of(revision)
        assert commit is not None, revision
        return self.commits[commit]


class Hub:
    """The server's state.

    Attributes:
        repositories: By id.
        stored: Uploaded large files by SHA-256.
        faults: What to answer next, by route: status codes, `drop`, or None.
        requests: How often each route was called.
        sent: Bytes received by `upload`.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.stored: dict[str, bytes] = {}
        self.faults: dict[str, list[int | str | None]] = defaultdict(list)
        self.requests: Counter[str] = Counter()
        self.sent = 0
        self.url = ""
        self.guard = threading.Lock()  # the client sends several files at once


@contextlib.contextmanager
def serve() -> Iterator[Hub]:
    """Runs a Hub on a free port of the loopback interface."""
    hub = Hub()

    class Handler(_Handler):
        state = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


@contextlib.contextmanager
def client_of_its_own(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Iterator[Hub]:
    """A Hub, and a client that knows no other; with a token that may write."""
    with serve() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder / "no-token"))
        monkeypatch.setenv("HF_TOKEN", WRITE_TOKEN)
        monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
        monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client waits between its retries
        huggingface_hub.close_session()
        yield server
        huggingface_hub.close_session()


class _Handler(BaseHTTPRequestHandler):
    state: Hub
    protocol_version = "HTTP/1.1"

    def _handle(self) -> None:
        url = urlparse(self.path)
        matches = {
            name: match
            for name, (methods, pattern) in ROUTES.items()
            if self.command in methods.split("|") and (match := re.fullmatch(pattern, url.path))
        }
        if not matches:
            return self._json({"error": f"no route {self.command} {url.path}"}, 404)
        name, match = next(iter(matches.items()))
        with self.state.guard:
            self.state.requests[name] += 1
            fault = self.state.faults[name].pop(0) if self.state.faults[name] else None
        if fault == "drop":
            self.rfile.read(min(1000, int(self.headers.get("Content-Length", 0))))
            self.close_connection = True
            return self.connection.close()
        body = self._body()
        if fault is not None:
            return self._json({"error": "as the test wants it"}, int(fault))
        if name in ("create", "preupload", "commit", "branch", "batch") and not self._may("write"):
            return self._json({"error": "no write permission"}, 403 if self._may("read") else 401)
        parts = match.groupdict()
        repository = self.state.repositories.get(parts.get("repo") or "")
        if "repo" in parts and (repository is None or (repository.private and not self._may("read"))):
            return self._json({"error": "Repository not found"}, 401, {"X-Error-Code": "RepoNotFound"})
        getattr(self, f"_{name}")(body, repository, parts, parse_qs(url.query))

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def log_message(self, *arguments: Any) -> None:
        """Silence."""

    def _may(self, what: str) -> bool:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        return token == WRITE_TOKEN or (what == "read" and token == READ_TOKEN)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            data = b""
            while size := int(self.rfile.readline(), 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return data
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _send(self, content: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(json.dumps(value).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def _create(self, body: bytes, repository: None, parts: dict[str, str], query: Any) -> None:
        wanted = json.loads(body)
        name = f"{wanted['organization'] or 'me'}/{wanted['name']}"
        found = name in self.state.repositories
        if not found:
            self.state.repositories[name] = Repository(wanted.get("visibility") == "private")
        self._json({"url": f"{self.state.url}/{name}"}, 409 if found else 200)

    def _validate(self, body: bytes, repository: None, parts: dict[str, str], query: Any) -> None:
        """As the Hub does it: a base that is no Hub id makes it refuse the card."""
        metadata = yaml.safe_load(json.loads(body)["content"].split("---")[1])
        base = metadata.get("base_model", "a/b")
        errors = [] if re.fullmatch(r"[\w.-]+/[\w.-]+", base) else [{"message": f'"base_model" is no Hub id: {base}'}]
        self._json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def _preupload(self, body: bytes, repository: Repository, parts: dict[str, str], query: Any) -> None:
        commit = repository.commit_of(parts["revision"])
        if commit is None:
            return self._json({"error": "no such revision"}, 404, {"X-Error-Code": "RevisionNotFound"})
        held = repository.commits[commit]
        answers = []
        for file in json.loads(body)["files"]:
            path = file["path"]
            large = path.endswith(LARGE)
            oid = None if path not in held else (_sha256(held[path]) if large else _blob_id(held[path]))
            answers.append(
                {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid}
            )
        self._json({"files": answers})

    def _batch(self, body: bytes, repository: Repository, parts: dict[str, str], query: Any) -> None:
        objects = []
        for wanted in json.loads(body)["objects"]:
            href = f"{self.state.url}/lfs/{wanted['oid']}"
            missing = wanted["oid"] not in self.state.stored
            actions = {"actions": {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}} if missing else {}
            objects.append({**wanted, **actions})
        self._json({"transfer": "basic", "objects": objects})

    def _upload(self, body: bytes, repository: None, parts: dict[str, str], query: Any) -> None:
        if _sha256(body) != parts["oid"]:
            return self._json({"error": "wrong hash"}, 400)
        with self.state.guard:
            self.state.stored[parts["oid"]] = body
            self.state.sent += len(body)
        self._send(b"", 200, {})

    def _verify(self, body: bytes, repository: None, parts: dict[str, str], query: Any) -> None:
        self._json({}, 200 if parts["oid"] in self.state.stored else 404)

    def _branch(self, body: bytes, repository: Repository, parts: dict[str, str], query: Any) -> None:
        name = unquote(parts["revision"])
        found = name in repository.branches
        repository.branches.setdefault(name, repository.branches["main"])
        self._json({}, 409 if found else 200)

    def _commit(self, body: bytes, repository: Repository, parts: dict[str, str], query: Any) -> None:
        revision = unquote(parts["revision"])
        files = dict(repository.files(revision))
        for line in body.decode().splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.state.stored[value["oid"]]
        oid = hashlib.sha1(body).hexdigest()
        repository.commits[oid] = files
        answer = {"commitUrl": f"{self.state.url}/{parts['repo']}/commit/{oid}", "commitOid": oid}
        if query.get("create_pr"):
            repository.branches[f"refs/pr/{len(repository.commits)}"] = oid
            answer["pullRequestUrl"] = f"{self.state.url}/{parts['repo']}/discussions/{len(repository.commits)}"
        else:
            repository.branches[revision] = oid
        self._json(answer)

    def _info(self, body: bytes, repository: Repository, parts: dict[str, str], query: Any) -> None:
        commit = repository.commit_of(parts.get("revision"))
        if commit is None:
            return self._json({"error": "no such revision"}, 404, {"X-Error-Code": "RevisionNotFound"})
        names = [{"rfilename": path} for path in repository.commits[commit]]
        self._json({"id": parts["repo"], "sha": commit, "private": repository.private, "siblings": names, "tags": []})

    def _tree(self, body: bytes, repository: Repository, parts: dict[str, str], query: Any) -> None:
        entries = []
        for path, content in repository.files(parts["revision"]).items():
            entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": _blob_id(content)}
            if path.endswith(LARGE):
                entry["lfs"] = {"oid": _sha256(content), "size": len(content), "pointerSize": 130}
            entries.append(entry)
        self._json(entries)

    def _resolve(self, body: bytes, repository: Repository, parts: dict[str, str], query: Any) -> None:
        commit = repository.commit_of(parts["revision"])
        content = repository.commits[commit].get(unquote(parts["path"])) if commit else None
        if content is None:
            return self._json({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
        etag = _sha256(content) if parts["path"].endswith(LARGE) else _blob_id(content)
        self._send(content, 200, {"X-Repo-Commit": str(commit), "ETag": f'"{etag}"'})


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
