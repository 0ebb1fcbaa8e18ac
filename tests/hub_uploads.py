"""The writing half of the hub on this machine: accounts, repositories, large files by Git LFS, and commits."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.hub_server import HubServer, Repository

JSON = {"Content-Type": "application/json"}


@dataclass(frozen=True)
class Account:
    """Who a token belongs to."""

    name: str = "me"
    writes: tuple[str, ...] = ("me", "org")
    """Names and organizations under which the token may write; none for one that may only read."""


@dataclass
class Store:
    """Large files that were uploaded, by SHA-256."""

    files: dict[str, bytes] = field(default_factory=dict)
    parts: dict[tuple[str, int], bytes] = field(default_factory=dict)
    part_bytes: int = 0
    """Ask for files in parts of this size; 0: whole."""


class Uploads(BaseHTTPRequestHandler):
    """Answers requests that write, and those about accounts."""

    hub: HubServer

    def send(self, status: int, body: bytes = b"", headers: Mapping[str, str] | None = None) -> None:
        """Answer."""
        raise NotImplementedError

    def account(self) -> Account | None:
        """Who asks."""
        return self.hub.accounts.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

    def writes(self, path: str, body: bytes) -> bool:
        """Answer a request of the writing half; False if it belongs to the other one."""
        parts = path.strip("/").split("/")
        if path == "/api/whoami-v2":
            self._whoami()
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif path == "/api/validate-yaml":
            self._answer_json({"warnings": [], "errors": []})
        elif parts[:2] == ["api", "models"] and parts[4:] in (
            ["auth-check", "write"],
            ["preupload", "main"],
            ["commit", "main"],
        ):
            self._for_writers(f"{parts[2]}/{parts[3]}", parts[4], body)
        elif path.endswith(".git/info/lfs/objects/batch"):
            self._for_writers(path.strip("/").partition(".git/")[0], "batch", body)
        elif parts[0] == "store":
            self._take(parts[1], int(parts[2]) if len(parts) > 2 else 0, body)
        elif parts[0] == "complete":
            self._complete(parts[1], json.loads(body))
        else:
            return False
        return True

    def _answer_json(self, answer: Any, status: int = 200) -> None:
        self.send(status, json.dumps(answer).encode(), JSON)

    def _whoami(self) -> None:
        account = self.account()
        if account is None:
            return self._answer_json({"error": "Invalid username or password."}, 401)
        orgs = [{"name": name} for name in account.writes if name != account.name]
        return self._answer_json({"type": "user", "name": account.name, "orgs": orgs})

    def _create(self, asked: dict[str, Any]) -> None:
        account = self.account()
        owner = asked["organization"] or (account.name if account else "")
        name = f"{owner}/{asked['name']}"
        if account is None or owner not in account.writes:
            return self._answer_json(
                {"error": f'You don\'t have the rights to create a model under the namespace "{owner}"'}, 403
            )
        url = {"url": f"{self.hub.url}/{name}", "name": name}
        if ("models", name) in self.hub.repositories:
            return self._answer_json({"error": "You already created this model repo", **url}, 409)
        self.hub.add(name, {".gitattributes": b"*.safetensors filter=lfs\n"}).private = (
            asked.get("visibility") == "private"
        )
        return self._answer_json(url)

    def _for_writers(self, name: str, what: str, body: bytes) -> None:
        account, repository = self.account(), self.hub.repositories.get(("models", name))
        if repository is None:
            self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif account is None or name.partition("/")[0] not in account.writes:
            self._answer_json({"error": "Your token has no right to write to this repository"}, 403)
        elif what == "auth-check":
            self._answer_json({})
        else:
            {"preupload": self._preupload, "batch": self._batch, "commit": self._commit_files}[what](repository, body)

    def _preupload(self, repository: Repository, body: bytes) -> None:
        files, known = json.loads(body)["files"], repository.commits[repository.refs["main"]]
        answers = []
        for file in files:
            large, data = is_large(file["path"], file["size"]), known.get(file["path"])
            answer = {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            if data is not None:
                answer["oid"] = hashlib.sha256(data).hexdigest() if large else git_hash(data)
            answers.append(answer)
        self._answer_json({"files": answers})

    def _batch(self, repository: Repository, body: bytes) -> None:
        self._answer_json(
            {"transfer": "basic", "objects": [self._upload_of(each) for each in json.loads(body)["objects"]]}
        )

    def _upload_of(self, asked: dict[str, Any]) -> dict[str, Any]:
        oid, size, store = asked["oid"], asked["size"], self.hub.uploads
        if oid in store.files:
            return asked
        if self.hub.largest is not None and size > self.hub.largest:
            return {**asked, "error": {"code": 422, "message": "You have run out of storage, buy more of it"}}
        upload: dict[str, Any] = {"href": f"{self.hub.store}/store/{oid}"}
        if store.part_bytes:
            count = -(-size // store.part_bytes)
            urls = {f"{number:05}": f"{self.hub.store}/store/{oid}/{number}" for number in range(1, count + 1)}
            upload = {"href": f"{self.hub.url}/complete/{oid}", "header": {"chunk_size": str(store.part_bytes), **urls}}
        return {**asked, "actions": {"upload": upload}}

    def _take(self, oid: str, number: int, body: bytes) -> None:
        store = self.hub.uploads
        if number:
            store.parts[oid, number] = body
        elif hashlib.sha256(body).hexdigest() != oid:
            return self.send(400, b"<Error>BadDigest</Error>")
        else:
            store.files[oid] = body
        return self.send(200, b"", {"ETag": hashlib.md5(body).hexdigest()})

    def _complete(self, oid: str, asked: dict[str, Any]) -> None:
        parts = [self.hub.uploads.parts[oid, part["partNumber"]] for part in asked["parts"]]
        whole = b"".join(parts)
        assert [part["etag"] for part in asked["parts"]] == [hashlib.md5(part).hexdigest() for part in parts]
        assert hashlib.sha256(whole).hexdigest() == oid
        self.hub.uploads.files[oid] = whole
        self._answer_json({"success": True})

    def _commit_files(self, repository: Repository, body: bytes) -> None:
        lines = [json.loads(line) for line in body.splitlines()]
        head, header = repository.refs["main"], lines[0]["value"]
        if header.get("parentCommit", head) != head:
            return self._answer_json({"error": "A commit has happened since. Please refresh and try again."}, 412)
        files = dict(repository.commits[head])
        for line in lines[1:]:
            kind, value = line["key"], line["value"]
            if kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                files[value["path"]] = self.hub.uploads.files[value["oid"]]
            else:
                assert kind == "deletedFile"
                del files[value["path"]]
        commit = repository.commit(files)
        repository.titles[commit] = header["summary"]
        url = f"{self.hub.url}/{repository.name}/commit/{commit}"
        return self._answer_json({"success": True, "commitOid": commit, "commitUrl": url})


def is_large(path: str, size: int) -> bool:
    """True for a file that goes to the store, as ``.gitattributes`` of a new repository says."""
    return size > 10_000_000 or path.endswith((".safetensors", ".bin", ".parquet", ".gguf"))


def git_hash(data: bytes) -> str:
    """Hash of a file as git has it."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
