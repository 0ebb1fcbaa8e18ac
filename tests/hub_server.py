"""The Hugging Face hub on this machine: as much of its HTTP protocol as its library uses, and its faults.

What writes is in ``hub_uploads``.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from tests.hub_uploads import Account, Store, Uploads

LARGE = (".safetensors", ".bin", ".parquet", ".gguf")
"""Endings of files that lie in another store, to which the hub redirects."""
PARQUET = "refs/convert/parquet"
"""The branch with a dataset as Parquet files, ``SUBSET/SPLIT/0000.parquet``, which the hub writes."""
LAST_COMMIT = {"id": "0" * 40, "title": "a commit", "date": "2026-01-02T03:04:05.000Z"}


@dataclass
class Repository:
    """A repository: its commits, and what its branches and tags name."""

    kind: str
    """``models``, ``datasets`` or ``spaces``."""
    name: str
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """Files by path, by commit."""
    refs: dict[str, str] = field(default_factory=dict)
    private: bool = False
    titles: dict[str, str] = field(default_factory=dict)
    """Titles of the commits that were pushed."""

    def commit(self, files: Mapping[str, bytes], *refs: str) -> str:
        """Add a commit, and have ``main`` or other branches and tags name it."""
        content = repr((len(self.commits), sorted((name, _sha1(data)) for name, data in files.items())))
        commit = _sha1(content.encode())
        self.commits[commit] = dict(files)
        self.refs |= dict.fromkeys(refs or ("main",), commit)
        if PARQUET in refs:
            self.refs["~parquet"] = commit  # as the hub calls it, too
        return commit


@dataclass
class Fault:
    """What is wrong with the answers to requests that match."""

    pattern: str
    """Regular expression for ``METHOD PATH``."""
    times: int = 1 << 30
    status: int = 0
    """Answer with this status instead."""
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b"{}"
    """What the answer with that status says."""
    cut_after: int | None = None
    """Hang up after so many bytes of the body, of the answer or of a file that is uploaded."""
    loses_answer: bool = False
    """Do what is asked, but hang up before the answer."""
    length: int | None = None
    """Announce and give so many bytes only, as a proxy that kept half a file does."""
    ignores_ranges: bool = False
    seconds: float = 0.0
    """Wait so long before answering."""


@dataclass
class HubServer:
    """A hub, and what was asked of it."""

    repositories: dict[tuple[str, str], Repository] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    """``METHOD PATH`` of every request."""
    ranges: list[tuple[str, str]] = field(default_factory=list)
    """Name of a file, and the header ``Range`` with which it was asked for."""
    sent: Counter[str] = field(default_factory=Counter)
    """Bytes of each file's content that were sent."""
    url: str = ""
    store: str = ""
    """Where large files lie: another host, as those of the hub do."""
    token: str = "hf_good"
    """The token of an account that has accepted the terms of gated repositories."""
    accounts: dict[str, Account] = field(default_factory=dict)
    """Accounts by their tokens."""
    uploads: Store = field(default_factory=Store)
    largest: int | None = None
    """Bytes of the largest file that there is room for."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(
        self, name: str, files: Mapping[str, bytes] | Path, kind: str = "models", gated: bool = False
    ) -> Repository:
        """Add a repository with one commit on ``main``."""
        repository = self.repositories[kind, name] = Repository(kind, name, gated)
        repository.commit(files_of(files) if isinstance(files, Path) else files)
        return repository

    def downloads(self, ending: str = "") -> Counter[str]:
        """Count the GET requests that delivered files, by name."""
        names = (line.rpartition("/")[2] for line in self.asked if line.startswith(("GET /lfs/", "GET /plain/")))
        return Counter(name for name in names if name.endswith(ending))

    def forget(self) -> None:
        """Forget what was asked, and mend all faults."""
        self.asked.clear()
        self.ranges.clear()
        self.sent.clear()
        self.faults.clear()
        self.largest = None

    def fault_of(self, line: str) -> Fault | None:
        """Return the first fault that is left for a request, and count it."""
        with self._lock:
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.pattern, line):
                    fault.times -= 1
                    return fault
        return None


def files_of(folder: Path) -> dict[str, bytes]:
    """The content of a folder's files by their relative paths."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@contextmanager
def hub_server() -> Iterator[HubServer]:
    """A hub on loopback."""
    hub = HubServer()
    server = ThreadingHTTPServer(("", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url, hub.store = (f"http://{host}:{server.server_address[1]}" for host in ("127.0.0.1", "127.0.0.2"))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _sha1(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


class _Handler(Uploads):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        self._answer()

    do_GET = do_POST = do_PUT = do_HEAD

    def _answer(self) -> None:
        path = urlsplit(self.path).path
        line = f"{self.command} {unquote(path)}"
        self.hub.asked.append(line)
        fault = self.hub.fault_of(line) or Fault("")
        size = int(self.headers.get("Content-Length", 0))
        cut = fault.cut_after is not None and self.command == "PUT"
        body = self.rfile.read(min(size, fault.cut_after or 0) if cut else size)
        time.sleep(fault.seconds)
        if cut:
            self.close_connection = True
            return
        with suppress(OSError):
            if fault.status:
                self.send(fault.status, fault.body, fault.headers)
            elif fault.loses_answer:
                self.wfile = io.BytesIO()
                self.writes(unquote(path), body)
                self.close_connection = True
            elif self.writes(unquote(path), body):
                pass
            elif path.startswith("/api/"):
                self._api([unquote(part) for part in path.split("/")[2:]], body)
            elif path.startswith(("/lfs/", "/plain/")):
                self._content(unquote(path), fault)
            else:
                self._resolve(unquote(path), fault)

    def send(
        self, status: int, body: bytes = b"", headers: Mapping[str, str] | None = None, length: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body) if length is None else length), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _refuse(self, status: int, code: str) -> None:
        self.send(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code})

    def _repository(self, kind: str, name: str) -> Repository | None:
        """Return a repository that may be read, or answer why not."""
        repository = self.hub.repositories.get((kind, name))
        authorization = self.headers.get("Authorization", "")
        if repository is None or (repository.private and self.account() is None):
            self._refuse(404 if authorization else 401, "RepoNotFound")
            return None
        return repository

    def _may_read(self, repository: Repository) -> bool:
        authorization = self.headers.get("Authorization", "")
        if repository.gated and authorization != f"Bearer {self.hub.token}":
            self._refuse(403 if authorization else 401, "GatedRepo")
            return False
        return True

    def _commit(self, repository: Repository, revision: str) -> str | None:
        commit = repository.refs.get(revision, revision)
        if commit not in repository.commits:
            self._refuse(404, "RevisionNotFound")
            return None
        return commit

    def _api(self, parts: list[str], body: bytes) -> None:
        kind, name, rest = parts[0], "/".join(parts[1:3]), parts[3:]
        repository = self._repository(kind, name)
        if repository is None:
            return None
        what, revision, *_ = *rest, "", ""
        # The branch that the library names ``~parquet`` has slashes of its own.
        if what and "/".join(rest[1:4]) == PARQUET:
            revision, rest = PARQUET, [what, PARQUET, *rest[4:]]
        commit = self._commit(repository, revision or "main")
        if commit is None:
            return None
        files = repository.commits[commit]
        if what in ("", "revision"):  # a gated repository can be described, but not read
            siblings = [{"rfilename": file} for file in sorted(files)]
            answer: Any = {
                "id": name, "sha": commit, "siblings": siblings, "private": repository.private, "tags": [], "downloads": 0,
                "likes": 0, "gated": "manual" if repository.gated else False, "lastModified": LAST_COMMIT["date"],
            }  # fmt: skip
        elif what == "commits":
            answer = [{**LAST_COMMIT, "id": commit, "message": "", "authors": []}]
        elif not self._may_read(repository):
            return None
        elif what == "tree":
            found = _listed(files, "/".join(rest[2:]), "recursive=true" in self.path.lower())
            if not found and rest[2:]:
                return self._refuse(404, "EntryNotFound")
            answer = found
        elif what != "paths-info":
            return self._refuse(404, "EntryNotFound")
        else:
            answer = _entries(files, json.loads(body)["paths"] if body.startswith(b"{") else _form(body))
        return self.send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _resolve(self, path: str, fault: Fault) -> None:
        """Answer for ``/ORG/NAME/resolve/REVISION/FILE``: as the hub does, with a redirect to the store of large files."""
        found = re.fullmatch(rf"/(datasets/|spaces/)?([^/]+/[^/]+)/resolve/({PARQUET}|[^/]+)/(.+)", path)
        if found is None:
            return self._refuse(404, "RepoNotFound")
        kind, name, revision, file = (found[1] or "models/")[:-1], found[2], found[3], found[4]
        repository = self._repository(kind, name)
        if (
            repository is None
            or not self._may_read(repository)
            or (commit := self._commit(repository, revision)) is None
        ):
            return None
        data = repository.commits[commit].get(file)
        if data is None:
            return self._refuse(404, "EntryNotFound")
        store, etag = ("lfs", hashlib.sha256(data).hexdigest()) if file.endswith(LARGE) else ("plain", _sha1(data))
        headers = {
            "X-Repo-Commit": commit,
            "X-Linked-Size": str(len(data)),
            "X-Linked-ETag": f'"{etag}"',
            "ETag": f'"{etag}"',
        }
        where = f"/{store}/{kind}/{name}/{commit}/{file}"
        if store == "lfs":
            return self.send(302, b"", {**headers, "Location": self.hub.store + where})
        if self.command == "HEAD":
            return self.send(200, b"", headers, length=len(data))
        self.hub.asked.append(f"GET {where}")
        return self._content(where, fault, headers)

    def _content(self, where: str, fault: Fault, headers: Mapping[str, str] | None = None) -> None:
        _, _, kind, org, name, commit, file = where.split("/", 6)
        data = self.hub.repositories[kind, f"{org}/{name}"].commits[commit][file]
        data = data if fault.length is None else data[: fault.length]
        asked, status, sent = self.headers.get("Range"), 200, dict(headers or {})
        self.hub.ranges.append((file, asked or ""))
        if asked and not fault.ignores_ranges:
            first, last = re.fullmatch(r"bytes=(\d+)-(\d*)", asked).groups()  # type: ignore[union-attr]
            start, end = int(first), min(int(last or len(data)), len(data) - 1)
            if start >= len(data):
                return self.send(416, b"", {"Content-Range": f"bytes */{len(data)}"})
            sent["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
            data, status = data[start : end + 1], 206
        part = data if fault.cut_after is None else data[: fault.cut_after]
        self.hub.sent[file] += len(part)
        self.send(status, part, {**sent, "Accept-Ranges": "bytes"}, length=len(data))
        if len(part) < len(data):
            self.close_connection = True
        return None


def _form(body: bytes) -> list[str]:
    from urllib.parse import parse_qs

    return parse_qs(body.decode())["paths"]


def _listed(files: Mapping[str, bytes], folder: str, recursive: bool) -> list[dict[str, Any]]:
    prefix = f"{folder}/" if folder else ""
    inside = [file for file in files if file.startswith(prefix)]
    folders = {file[: -len(rest)] for file in inside for rest in [file[len(prefix) :].partition("/")[2]] if rest}
    paths = {"/".join(file.split("/")[:depth]) for file in inside for depth in range(1, file.count("/") + 2)}
    inner = {path for path in paths if path.startswith(prefix)}
    if not recursive:
        inner = {path for path in inner if "/" not in path[len(prefix) :]} | {path.rstrip("/") for path in folders}
    return _entries(files, sorted(inner))


def _entries(files: Mapping[str, bytes], paths: list[str]) -> list[dict[str, Any]]:
    entries = []
    for path in paths:
        if path in files:
            data = files[path]
            entry = {"type": "file", "path": path, "size": len(data), "oid": _sha1(data), "lastCommit": LAST_COMMIT}
            if path.endswith(LARGE):
                entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
            entries.append(entry)
        elif any(file.startswith(f"{path}/") for file in files):
            entries.append(
                {"type": "directory", "path": path, "size": 0, "oid": _sha1(path.encode()), "lastCommit": LAST_COMMIT}
            )
    return entries
