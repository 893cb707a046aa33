"""A model hub on this machine, which speaks as much of the Hub's HTTP API as downloads and uploads take."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" * 6 + "beef"
TOKEN = "hf_test"


@dataclass
class Repository:
    """The files of a repository at its one commit."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)


class Hub(ThreadingHTTPServer):
    """The server; what was uploaded lies in `repositories`."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.unknown: list[str] = []

    def hold(self, name: str, folder: Path, *, private: bool = False) -> None:
        """Put a folder's files into a repository."""
        files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        self.repositories[name] = Repository(private, files)


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: Hub

    def do_HEAD(self) -> None:
        self.answer(*self.find())

    def do_GET(self) -> None:
        self.answer(*self.find())

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        if self.headers.get("authorization") != f"Bearer {TOKEN}":
            self.answer(401, {"error": "Invalid credentials"})
        else:
            self.answer(*self.take(urlsplit(self.path).path, body))

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers["content-length"]))
        assert hashlib.sha256(content).hexdigest() == self.path.rpartition("/")[2]
        self.server.blobs[self.path.rpartition("/")[2]] = content
        self.answer(200, {})

    def find(self) -> tuple[int, Any]:
        """Return a repository's facts, or one of its files."""
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        name = "/".join(parts[2:4] if api else parts[:2])
        repository = self.server.repositories.get(name)
        if repository is None or (repository.private and self.headers.get("authorization") != f"Bearer {TOKEN}"):
            return 404, {"error": "Repository not found"}
        if api and (len(parts) == 4 or parts[4] == "revision"):
            siblings = [{"rfilename": path} for path in repository.files]
            return 200, {"id": name, "sha": COMMIT, "private": repository.private, "siblings": siblings}
        if api and parts[4] == "tree":
            return 200, [
                {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for path, content in repository.files.items()
            ]
        if parts[2:3] == ["resolve"] and "/".join(parts[4:]) in repository.files:
            return 200, repository.files["/".join(parts[4:])]
        if not api:
            return 404, {"error": "Entry not found"}
        self.server.unknown.append(self.path)
        return 404, {"error": "no such route"}

    def take(self, path: str, body: bytes) -> tuple[int, Any]:
        """Make a repository, say how files are sent, or take a commit."""
        hub, parts = self.server, path.strip("/").split("/")
        if path == "/api/repos/create":
            said = json.loads(body)
            name = f"{said['organization']}/{said['name']}"
            there = name in hub.repositories
            if not there:
                hub.repositories[name] = Repository(private=said.get("visibility") == "private")
            return 409 if there else 200, {"url": f"{hub.url}/{name}", "error": "exists"}
        if path == "/api/validate-yaml":
            assert json.loads(body)["content"].startswith("---\n")
            return 200, {}
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {**each, "actions": {"upload": {"href": f"{hub.url}/lfs/{each['oid']}"}}}
                for each in json.loads(body)["objects"]
            ]
            return 200, {"transfer": "basic", "objects": objects}
        if parts[4:5] == ["preupload"]:
            files = [
                {
                    "path": each["path"],
                    "uploadMode": "lfs" if each["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for each in json.loads(body)["files"]
            ]
            return 200, {"files": files}
        if parts[4:5] == ["commit"]:
            name = "/".join(parts[2:4])
            for line in body.splitlines():
                kind, value = (said := json.loads(line))["key"], said["value"]
                if kind == "file":
                    hub.repositories[name].files[value["path"]] = base64.b64decode(value["content"])
                elif kind == "lfsFile":
                    hub.repositories[name].files[value["path"]] = hub.blobs[value["oid"]]
            return 200, {"commitUrl": f"{hub.url}/{name}/commit/{COMMIT}", "commitOid": COMMIT}
        hub.unknown.append(path)
        return 404, {"error": "no such route"}

    def answer(self, status: int, content: Any) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.send_header("x-repo-commit", COMMIT)
        self.send_header("etag", f'"{hashlib.sha256(data).hexdigest()}"')
        if status == 404:
            self.send_header("x-error-code", "EntryNotFound" if "Entry" in content["error"] else "RepoNotFound")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Keep the test's output clean."""


@contextmanager
def running_hub() -> Iterator[Hub]:
    """Run a hub while the block lasts."""
    hub = Hub()
    threading.Thread(target=hub.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
