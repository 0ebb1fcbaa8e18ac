"""ModelScope's hub on this machine: as much of its HTTP protocol as its library uses for reading."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit


@dataclass
class ModelScopeServer:
    """A hub, and what was asked of it."""

    repositories: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    """Files by path, by revision, by ``models/ORG/NAME`` or ``datasets/ORG/NAME``."""
    private: set[str] = field(default_factory=set)
    """Repositories that need the token ``secret``."""
    status: int = 0
    """Answer every request with this status instead."""
    cut_after: int | None = None
    """Hang up once after so many bytes of a file."""
    listed: int = 0
    """Lists of files that were given."""
    sent: Counter[str] = field(default_factory=Counter)
    """Bytes of each file that were sent."""
    url: str = ""

    def add(self, name: str, files: dict[str, bytes], revision: str = "master") -> None:
        """Add a repository, or a revision of it."""
        self.repositories.setdefault(name, {})[revision] = dict(files)


@contextmanager
def modelscope_server() -> Iterator[ModelScopeServer]:
    """Serve on a free port of the loopback interface."""
    hub = ModelScopeServer()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            with suppress(ConnectionError):
                _answer(self, hub)

        def log_message(self, *given: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=10)


def _answer(request: BaseHTTPRequestHandler, hub: ModelScopeServer) -> None:
    url = urlsplit(request.path)
    query = {key: values[0] for key, values in parse_qs(url.query).items()}
    kind, org, name, *verb = [*url.path.removeprefix("/api/v1/").split("/"), "", ""]
    verb = [part for part in verb if part]
    repository = f"{kind}/{org}/{name}"
    revision = hub.repositories.get(repository, {}).get(query.get("Revision", "master"))
    if hub.status:
        _send_json(request, hub.status, {"Code": hub.status, "Message": "no"})
    elif repository in hub.private and request.headers.get("Authorization") != "Bearer secret":
        _send_json(request, 403, {"Code": 403, "Message": "denied"})
    elif revision is None:
        _send_json(request, 404, {"Code": 10010205001, "Message": "no such repository"})
    elif verb == ["repo", "tree" if kind == "datasets" else "files"]:
        hub.listed += 1
        files = [
            {
                "Name": path.rpartition("/")[2],
                "Path": path,
                "Type": "blob",
                "Size": len(data),
                "Sha256": hashlib.sha256(data).hexdigest(),
                "Revision": "0" * 40,
                "CommittedDate": 1_700_000_000,
            }
            for path, data in sorted(revision.items())
        ]
        folders = sorted({path.rpartition("/")[0] for path in revision if "/" in path})
        files += [{"Name": folder, "Path": folder, "Type": "tree", "Size": 0} for folder in folders]
        page, size = int(query.get("PageNumber", 1)), int(query.get("PageSize", 1 << 30))
        _send_json(request, 200, {"Code": 200, "Data": {"Files": files[(page - 1) * size : page * size]}})
    elif verb == ["repo"] and query["FilePath"] in revision:
        _send_file(request, hub, query["FilePath"], revision[query["FilePath"]])
    else:
        _send_json(request, 404, {"Code": 404, "Message": "no such file"})


def _send_json(request: BaseHTTPRequestHandler, status: int, body: object) -> None:
    data = json.dumps(body).encode()
    request.send_response(status)
    request.send_header("Content-Type", "application/json")
    request.send_header("Content-Length", str(len(data)))
    request.end_headers()
    request.wfile.write(data)


def _send_file(request: BaseHTTPRequestHandler, hub: ModelScopeServer, path: str, data: bytes) -> None:
    start = int((request.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
    request.send_response(206 if start else 200)
    if start:
        request.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
    request.send_header("Content-Length", str(len(data) - start))
    request.end_headers()
    end, hub.cut_after = (len(data) if hub.cut_after is None else start + hub.cut_after), None
    request.wfile.write(data[start:end])
    hub.sent[path] += len(data[start:end])
    if end < len(data):
        request.close_connection = True
