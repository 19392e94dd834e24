"""The few routes of the Hugging Face Hub that are used here, on loopback, for the real client."""

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import urlsplit

import huggingface_hub.constants as hub
import pytest

COMMIT = hashlib.sha1(b"a commit").hexdigest()
TOKEN = "hf_" + "fake" * 8
_API = re.compile(
    r"/api/(?:models|datasets)/(?P<repo>[^/]+/[^/]+)(?:/(?P<verb>\w+)/(?P<revision>[^/]+))?"
)
_FILE = re.compile(r"/(?:datasets/)?(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")


class FakeHub:
    """Serves ``root/org/name`` as repositories of one commit.

    ``downloads`` has the files that were sent, ``gated`` the repositories that need a token, and
    ``commits`` what was pushed: files by name, for each repository.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.url = ""
        self.gated: set[str] = set()
        self.read_only: set[str] = set()
        self.downloads: list[str] = []
        self.created: list[dict[str, Any]] = []
        self.commits: dict[str, dict[str, bytes]] = {}

    def files(self, repo: str) -> list[Path] | None:
        directory = self.root / repo
        return (
            sorted(p for p in directory.rglob("*") if p.is_file()) if directory.is_dir() else None
        )


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        if found := _FILE.fullmatch(path):
            self._send_file(**found.groupdict())
        elif found := _API.fullmatch(path):
            self._describe(**found.groupdict())
        else:
            self._answer(404, {"error": path})

    do_HEAD = do_GET  # noqa: N815

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        path = urlsplit(self.path).path
        if path == "/api/validate-yaml":
            self._answer(200, {"errors": [], "warnings": []})
        elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer(401, {"error": "Invalid username or password."})
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif found := _API.fullmatch(path):
            self._push(found["repo"], found["verb"], body)
        else:
            self._answer(404, {"error": path})

    def _send_file(self, repo: str, revision: str, path: str) -> None:
        file = self.hub.root / repo / path
        if repo in self.hub.gated and not self.headers.get("Authorization"):
            self._answer(401, {}, **{"X-Error-Code": "GatedRepo"})
        elif not file.is_file():
            self._answer(404, {}, **{"X-Error-Code": "EntryNotFound"})
        else:
            content = file.read_bytes()
            if self.command == "GET":
                self.hub.downloads.append(f"{repo}/{path}")
            etag = hashlib.sha1(content).hexdigest()
            self._answer(200, content, **{"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})

    def _describe(self, repo: str, verb: str | None, revision: str | None) -> None:
        files = self.hub.files(repo)
        if files is None:
            self._answer(404, {}, **{"X-Error-Code": "RepoNotFound"})
        elif revision not in (None, "main", COMMIT):
            self._answer(404, {}, **{"X-Error-Code": "RevisionNotFound"})
        elif verb == "tree":
            self._answer(200, [self._entry(repo, path) for path in files])
        else:
            names = [{"rfilename": self._entry(repo, path)["path"]} for path in files]
            self._answer(200, {"id": repo, "sha": COMMIT, "siblings": names, "private": False})

    def _entry(self, repo: str, path: Path) -> dict[str, Any]:
        name = path.relative_to(self.hub.root / repo).as_posix()
        oid = hashlib.sha1(path.read_bytes()).hexdigest()
        return {"type": "file", "path": name, "size": path.stat().st_size, "oid": oid}

    def _create(self, wanted: dict[str, Any]) -> None:
        repo = f"{wanted['organization']}/{wanted['name']}"
        if wanted["organization"] in self.hub.read_only:
            self._answer(403, {"error": "You don't have the rights to create a model here"})
            return
        self.hub.created.append(wanted)
        self._answer(200, {"url": f"{self.hub.url}/{repo}", "id": repo, "name": repo})

    def _push(self, repo: str, verb: str, body: bytes) -> None:
        if verb == "preupload":
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                for f in json.loads(body)["files"]
            ]
            self._answer(200, {"files": files})
            return
        lines = [json.loads(line) for line in body.splitlines() if line.strip()]
        self.hub.commits[repo] = {
            line["value"]["path"]: base64.b64decode(line["value"]["content"])
            for line in lines
            if line["key"] == "file"
        }
        url = f"{self.hub.url}/{repo}/commit/{COMMIT}"
        self._answer(200, {"success": True, "commitOid": COMMIT, "commitUrl": url})

    def _answer(self, status: int, content: Any, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        """Nothing."""


@contextmanager
def serving(root: Path) -> Iterator[FakeHub]:
    """Serve the repositories below a directory."""
    fake = FakeHub(root)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": fake}))
    fake.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield fake
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def use(monkeypatch: pytest.MonkeyPatch, url: str, home: Path, *, offline: bool = False) -> None:
    """Let huggingface_hub in this process use a server, with an empty cache and no token."""
    monkeypatch.setattr(hub, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(hub, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(hub, "HF_TOKEN_PATH", str(home / "token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
