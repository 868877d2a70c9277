"""A stand-in for the Hugging Face hub and for ModelScope: serves folders of this machine and keeps a list of requests.

It knows what their clients ask for when they list and download a model, and nothing else.
"""

import hashlib
import json
import re
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit

#: Repository to revision to folder. The first revision is the default branch.
Repositories = dict[str, dict[str, Path]]


def commit(repository: str, revision: str) -> str:
    """The commit that a branch stands for."""
    return hashlib.sha1(f"{repository}@{revision}".encode()).hexdigest()


class StandInHub:
    """`with StandInHub({"someone/model": {"main": folder}}) as hub:` serves at `hub.url`, on this machine only.

    Attributes:
        url: its address.
        requests: method and path of everything that was asked.
        closed: repositories that exist, but refuse whoever asks.
        mute: repositories that are listed and hand out files, but say nothing about themselves.

    """

    def __init__(self, repositories: Repositories) -> None:
        self.repositories = repositories
        self.requests: list[tuple[str, str]] = []
        self.closed: set[str] = set()
        self.mute: set[str] = set()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = _Server(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, trace: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()

    def since(self, mark: str) -> list[str]:
        """What was asked between a request for the path `mark` and the next mark."""
        paths = [f"{method} {path}" for method, path in self.requests]
        rest = paths[paths.index(f"GET /mark/{mark}") + 1 :]
        end = next((i for i, path in enumerate(rest) if path.startswith("GET /mark/")), len(rest))
        return rest[:end]


def files_sent(requests: list[str]) -> Counter[str]:
    """How often each file's content was sent."""
    contents = [r for r in requests if r.startswith("GET") and ("/resolve/" in r or "FilePath=" in r)]
    return Counter(re.split("[/=]", request)[-1] for request in contents)


class _Server(ThreadingHTTPServer):
    request_queue_size = 64  # clients come with many threads at once


class _Handler(BaseHTTPRequestHandler):
    hub: StandInHub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._answer()

    def log_message(self, *_: Any) -> None:
        """Say nothing; `requests` is the log."""

    def _answer(self) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path)
        self.hub.requests.append((self.command, unquote(self.path) if path.endswith("/repo") else path))
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            self._hugging_face_api("/".join(parts[2:4]), parts[4:])
        elif parts[:3] == ["api", "v1", "models"]:
            query = {name: values[0] for name, values in parse_qs(url.query).items()}
            self._modelscope("/".join(parts[3:5]), parts[5:], query)
        elif parts[2:3] == ["resolve"]:
            self._file("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        else:
            self._refuse(404, "EntryNotFound")

    def _find(self, repository: str, revision: str | None) -> tuple[str, Path] | None:
        """Commit and folder; None after an answer that says what is wrong."""
        revisions = self.hub.repositories.get(repository)
        if revisions is None:
            self._refuse(401, "RepoNotFound")
            return None
        if repository in self.hub.closed:
            self._refuse(403, "GatedRepo")
            return None
        for name, folder in revisions.items():
            if revision in {None, name, commit(repository, name)}:
                return commit(repository, name), folder
        self._refuse(404, "RevisionNotFound")
        return None

    def _hugging_face_api(self, repository: str, rest: list[str]) -> None:
        kind, revision = [*rest, None, None][:2]
        found = self._find(repository, revision)
        if found is None:
            return
        sha, folder = found
        files = sorted(p for p in folder.iterdir() if p.is_file())
        if kind in {None, "revision"} and repository in self.hub.mute:
            self._refuse(403, "Disabled")
        elif kind in {None, "revision"}:
            siblings = [{"rfilename": p.name} for p in files]
            self._json({"id": repository, "sha": sha, "siblings": siblings, "private": False, "tags": []})
        elif kind == "tree":
            self._json([_entry(p) for p in files])
        else:
            self._refuse(404, "EntryNotFound")

    def _file(self, repository: str, revision: str, name: str) -> None:
        found = self._find(repository, revision)
        if found is None:
            return
        sha, folder = found
        if not (folder / name).is_file():
            self._refuse(404, "EntryNotFound", {"X-Repo-Commit": sha})
            return
        content = (folder / name).read_bytes()
        self._send(200, content, {"ETag": f'"{_entry(folder / name)["oid"]}"', "X-Repo-Commit": sha})

    def _modelscope(self, repository: str, rest: list[str], query: dict[str, str]) -> None:
        revision = query.get("Revision")
        found = self._find(repository, None if revision == "master" else revision)
        if found is None:
            return
        sha, folder = found
        files = sorted(p for p in folder.iterdir() if p.is_file())
        name = query.get("FilePath", "")
        if rest == ["repo", "files"]:
            self._data({"Files": [_modelscope_entry(p, sha) for p in files]})
        elif rest == ["revisions"]:
            branches = [{"Revision": name, "CreatedAt": 0} for name in self.hub.repositories[repository]]
            self._data({"RevisionMap": {"Branches": branches, "Tags": []}})
        elif rest == ["repo"] and (folder / name).is_file():
            self._send(200, (folder / name).read_bytes(), {"Content-Type": "application/octet-stream"})
        elif not rest:
            self._data({"Path": repository, "Name": repository})
        else:
            self._refuse(404, "EntryNotFound")

    def _data(self, content: Any) -> None:
        self._json({"Code": 200, "Success": True, "Data": content})

    def _json(self, content: Any) -> None:
        self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _refuse(self, status: int, code: str, headers: dict[str, str] | None = None) -> None:
        self._send(status, b'{"error": "refused"}', {"X-Error-Code": code, **(headers or {})})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _entry(file: Path) -> dict[str, Any]:
    """A file in a listing of the hub."""
    return {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": _blob_id(file)}


def _modelscope_entry(file: Path, sha: str) -> dict[str, Any]:
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    name = {"Name": file.name, "Path": file.name, "Type": "blob", "Revision": sha}
    return {**name, "Size": file.stat().st_size, "Sha256": digest, "IsLFS": False, "CommittedDate": 0}


def _blob_id(file: Path) -> str:
    return hashlib.sha1(b"blob %d\0" % file.stat().st_size + file.read_bytes()).hexdigest()
