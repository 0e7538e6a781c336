"""A Hugging Face Hub on 127.0.0.1 that speaks the HTTP API which huggingface_hub uses to create, commit, tag and fetch.

Repositories live in memory. Tensors go through LFS, other files through the commit itself, as on the real one; hashes
of what is uploaded are checked.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Repo:
    private: bool
    commits: list[dict[str, bytes]] = field(default_factory=lambda: [{}])
    messages: list[str] = field(default_factory=lambda: ["initial commit"])
    tags: dict[str, str] = field(default_factory=dict)

    def oid(self, number: int = -1) -> str:
        number = range(len(self.commits))[number]
        return hashlib.sha1(f"commit {number} {self.messages[number]}".encode()).hexdigest()

    def files(self, revision: str) -> dict[str, bytes] | None:
        oid = self.oid() if revision == "main" else self.tags.get(revision, revision)
        return next((c for n, c in enumerate(self.commits) if self.oid(n) == oid), None)


@dataclass
class Hub:
    endpoint: str
    repos: dict[str, Repo] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)


def blob_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def is_lfs(path: str) -> bool:
    return path.endswith(".safetensors")


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        """Silence."""

    def answer(self, value: Any = None, status: int = 200, body: bytes | None = None, **headers: str) -> None:
        data = json.dumps(value if value is not None else {}).encode() if body is None else body
        self.send_response(status)
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def missing(self, code: str = "RepoNotFound") -> None:
        self.answer({"error": code}, 404, X_Error_Code=code)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_PUT(self) -> None:
        data, oid = self.body(), self.path.removeprefix("/lfs/")
        if hashlib.sha256(data).hexdigest() != oid:
            self.answer({"error": "hash"}, 400)
            return
        self.hub.objects[oid] = data
        self.answer()

    def do_POST(self) -> None:
        path, data = self.path.split("?")[0], self.body()
        self.hub.requests.append(f"POST {path}")
        if path == "/api/repos/create":
            said = json.loads(data)
            name = "/".join(filter(None, (said.get("organization"), said["name"])))
            there = name in self.hub.repos
            self.hub.repos.setdefault(name, Repo(bool(said.get("private") or said.get("visibility") == "private")))
            url = f"{self.hub.endpoint}/{name}"
            self.answer({"url": url, "name": name, "error": "exists" if there else ""}, 409 if there else 200)
        elif path == "/api/validate-yaml":
            head = json.loads(data)["content"]
            ok = head.startswith("---\n")
            self.answer({"errors": [] if ok else [{"message": "no front matter"}], "warnings": []}, 200 if ok else 400)
        elif found := re.fullmatch(r"/(.+)\.git/info/lfs/objects/batch", path):
            self.lfs(json.loads(data)["objects"])
        elif found := re.fullmatch(r"/api/models/(.+?)/(preupload|commit|tag)/(.+)", path):
            repo = self.hub.repos.get(found[1])
            if repo is None:
                self.missing()
            else:
                getattr(self, found[2])(repo, found[1], found[3], data)
        else:
            self.missing()

    def lfs(self, objects: list[dict[str, Any]]) -> None:
        told = []
        for one in objects:
            there = one["oid"] in self.hub.objects
            upload = {"upload": {"href": f"{self.hub.endpoint}/lfs/{one['oid']}"}}
            told.append({**one, **({} if there else {"actions": upload})})
        self.answer({"transfer": "basic", "objects": told})

    def preupload(self, repo: Repo, name: str, revision: str, data: bytes) -> None:
        told = []
        for one in json.loads(data)["files"]:
            path = one["path"]
            there = repo.commits[-1].get(path)
            oid = None if there is None else hashlib.sha256(there).hexdigest() if is_lfs(path) else blob_id(there)
            mode = "lfs" if is_lfs(path) else "regular"
            told.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.answer({"files": told})

    def commit(self, repo: Repo, name: str, revision: str, data: bytes) -> None:
        files, message = dict(repo.commits[-1]), ""
        for line in data.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                message = value["summary"]
            elif item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif item["key"] == "deletedFile":
                del files[value["path"]]
            else:
                self.answer({"error": item["key"]}, 400)
                return
        repo.commits.append(files)
        repo.messages.append(message)
        url = f"{self.hub.endpoint}/{name}/commit/{repo.oid()}"
        self.answer({"success": True, "commitUrl": url, "commitOid": repo.oid(), "hookOutput": ""})

    def tag(self, repo: Repo, name: str, revision: str, data: bytes) -> None:
        tag = json.loads(data)["tag"]
        if tag in repo.tags:
            self.answer({"error": "tag exists"}, 409)
            return
        repo.tags[tag] = revision
        self.answer()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        self.hub.requests.append(f"{self.command} {path}")
        if found := re.fullmatch(r"/api/models/(.+?)/(revision|tree)/([^/]+)", path):
            repo = self.hub.repos.get(found[1])
            files = repo.files(found[3]) if repo else None
            if repo is None or files is None:
                self.missing("RevisionNotFound" if repo else "RepoNotFound")
            elif found[2] == "tree":
                self.answer([{"type": "file", "path": p, "size": len(d), "oid": blob_id(d)} for p, d in files.items()])
            else:
                oid = next(repo.oid(n) for n, c in enumerate(repo.commits) if c is files)
                siblings = [{"rfilename": p} for p in files]
                self.answer({"_id": "1", "id": found[1], "modelId": found[1], "sha": oid, "private": repo.private,
                             "tags": [], "downloads": 0, "likes": 0, "siblings": siblings})  # fmt: skip
        elif found := re.fullmatch(r"/(.+?/.+?)/resolve/([^/]+)/(.+)", path):
            repo = self.hub.repos.get(found[1])
            files = repo.files(found[2]) if repo else None
            if repo is None or files is None or found[3] not in files:
                self.missing("EntryNotFound" if files is not None else "RevisionNotFound" if repo else "RepoNotFound")
                return
            data = files[found[3]]
            oid = next(repo.oid(n) for n, c in enumerate(repo.commits) if c is files)
            self.answer(body=data, ETag=f'"{hashlib.sha256(data).hexdigest()}"', X_Repo_Commit=oid)
        else:
            self.missing()

    do_HEAD = do_GET


@contextlib.contextmanager
def fake_hub() -> Iterator[Hub]:
    """A hub that ends with the block."""
    handler = type("Bound", (Handler,), {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub = Hub(f"http://127.0.0.1:{server.server_address[1]}")
    handler.hub = hub  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
