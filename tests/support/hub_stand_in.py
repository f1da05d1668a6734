"""A stand-in for the Hub on this machine: what the client of huggingface_hub calls, kept in memory."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

Files = dict[str, bytes]
TOKEN = "hf_stand_in"


class Repository:
    """Commits and branches. A commit is a mapping of paths to contents."""

    def __init__(self, private: bool) -> None:
        self.private = private
        self.commits: dict[str, Files] = {}
        self.branches: dict[str, str] = {}
        self.messages: list[str] = []
        self.add("main", {}, "initial commit")

    def add(self, branch: str, files: Files, message: str) -> str:
        """Adds files to a branch as a commit."""
        whole = self.commits.get(self.branches.get(branch, ""), {}) | files
        commit = hashlib.sha1(repr((len(self.commits), sorted(whole))).encode()).hexdigest()
        self.commits[commit] = whole
        self.branches[branch] = commit
        self.messages.append(message)
        return commit

    def find(self, revision: str) -> str | None:
        return self.branches.get(revision, revision if revision in self.commits else None)


class HubStandIn:
    """Repositories, and the requests that were made."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.url = ""

    def files(self, repository: str, revision: str = "main") -> Files:
        found = self.repositories[repository]
        return found.commits[found.branches[revision]]

    def answer(self, path: str, query: str, body: bytes, token: str | None) -> tuple[int, Any, dict[str, str]]:
        """Status, JSON or bytes, and headers."""
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}, {}
        if path == "/api/repos/create":
            return self._create(json.loads(body), token)
        if match := re.fullmatch(r"/objects/(\w+)", path):
            self.objects[match[1]] = body
            return 200, {}, {}
        if match := re.fullmatch(r"/(\w+/[\w.-]+)\.git/info/lfs/objects/batch", path):
            return 200, {"transfer": "basic", "objects": [self._upload(one) for one in json.loads(body)["objects"]]}, {}
        match = re.fullmatch(r"/api/models/(\w+/[\w.-]+)(?:/(\w+)/([^/]+)(?:/.*)?)?", path)
        match = match or re.fullmatch(r"/(\w+/[\w.-]+)/(resolve)/([^/]+)/.+", path)
        repository = self.repositories.get(match[1]) if match is not None else None
        if match is None or repository is None or (repository.private and token != TOKEN):
            return 404 if token else 401, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
        action, revision = match[2] or "revision", unquote(match[3] or "main")
        if action == "branch":
            repository.branches.setdefault(revision, repository.branches["main"])
            return 201, {}, {}
        commit = repository.find(revision)
        if commit is None:
            return 404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"}
        if action == "resolve":
            return self._file(repository, commit, unquote(path.split("/", 5)[5]))
        if action == "commit":
            return self._commit(match[1], repository, revision, body, "create_pr=1" in query)
        return self._of_repository(action, match[1], repository, commit, body)

    def _create(self, asked: dict[str, Any], token: str | None) -> tuple[int, Any, dict[str, str]]:
        if token != TOKEN:
            return 401, {"error": "Invalid username or password."}, {}
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if name in self.repositories:
            return 409, {"error": "You already created this model repo", "url": f"{self.url}/{name}"}, {}
        self.repositories[name] = Repository(asked.get("private", False) or asked.get("visibility") == "private")
        return 200, {"url": f"{self.url}/{name}"}, {}

    def _upload(self, one: dict[str, Any]) -> dict[str, Any]:
        known = one["oid"] in self.objects
        return one if known else one | {"actions": {"upload": {"href": f"{self.url}/objects/{one['oid']}"}}}

    def _of_repository(
        self, action: str, name: str, repository: Repository, commit: str, body: bytes
    ) -> tuple[int, Any, dict[str, str]]:
        files = repository.commits[commit]
        if action == "revision":
            siblings = [{"rfilename": file} for file in files]
            return 200, {"id": name, "sha": commit, "private": repository.private, "siblings": siblings}, {}
        if action == "tree":
            entries = [
                {"type": "file", "path": file, "size": len(text), "oid": hashlib.sha1(text).hexdigest()}
                for file, text in files.items()
            ]
            return 200, entries, {}
        assert action == "preupload", action
        asked = [file["path"] for file in json.loads(body)["files"]]
        modes = {path: "lfs" if path.endswith(".safetensors") else "regular" for path in asked}
        return 200, {"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in modes.items()]}, {}

    def _commit(
        self, name: str, repository: Repository, branch: str, body: bytes, propose: bool
    ) -> tuple[int, Any, dict[str, str]]:
        added, message = {}, ""
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
            elif line["key"] == "file":
                added[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                added[value["path"]] = self.objects[value["oid"]]
        if propose:
            branch = "refs/pr/1"
            repository.branches[branch] = repository.branches["main"]
        new = repository.add(branch, added, message)
        answer = {"commitUrl": f"{self.url}/{name}/commit/{new}", "commitOid": new}
        return 200, answer | ({"pullRequestUrl": f"{self.url}/{name}/discussions/1"} if propose else {}), {}

    def _file(self, repository: Repository, commit: str, path: str) -> tuple[int, Any, dict[str, str]]:
        content = repository.commits[commit].get(path)
        if content is None:
            return 404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}
        return 200, content, {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'}


def _handler(hub: HubStandIn) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            address = urlsplit(self.path)
            hub.requests.append(f"{self.command} {address.path}")
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
            status, answer, headers = hub.answer(address.path, address.query, body, token)
            content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_HEAD = do_POST = do_PUT = do_any  # noqa: N815

        def log_message(self, *_: Any) -> None:
            """Writes nothing."""

    return Handler


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStandIn]:
    """A Hub on this machine with an empty cache; the current folder is empty too."""
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with running_hub() as running:
        use_hub(monkeypatch, running.url, tmp_path / "cache")
        yield running


@contextmanager
def running_hub() -> Iterator[HubStandIn]:
    """A stand-in that listens until the block ends."""
    hub = HubStandIn()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def use_hub(monkeypatch: pytest.MonkeyPatch, url: str, cache: Path, token: str | None = TOKEN) -> None:
    """Makes huggingface_hub talk to a server and keep its files in a folder, in this process and its children."""
    from huggingface_hub import constants, hf_api

    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(hf_api.api, "endpoint", url)  # that of the functions of huggingface_hub, which PEFT calls
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no-token"))
    for name, value in (("HF_ENDPOINT", url), ("HF_HUB_CACHE", str(cache)), ("HF_HUB_DISABLE_XET", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    if token is None:
        monkeypatch.delenv("HF_TOKEN", raising=False)
    else:
        monkeypatch.setenv("HF_TOKEN", token)
