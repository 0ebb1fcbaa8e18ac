"""ModelScope's hub: models (``ms://ORG/NAME``) and datasets (``ms://datasets/ORG/NAME``), fetched once per machine.

A revision and a path may follow: ``ms://ORG/NAME@REVISION/PATH``. A copy is known by what the hub lists, so content that
changes there is another copy; a process keeps to the first list that it sees.
"""

from __future__ import annotations

import fcntl
import fnmatch
import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote

from raysft.errors import NotNow, RequestError, one_line
from raysft.storage.cache_home import cache_home
from raysft.storage.hub_snapshots import BESIDE_WEIGHTS, OTHER_WEIGHTS, WEIGHTS
from raysft.storage.modelscope_internals import hide_bars

SCHEME = "ms://"
BOUNDS = {
    "MODELSCOPE_API_TIMEOUT": "20",
    "MODELSCOPE_API_CONNECT_TIMEOUT": "5",
    "MODELSCOPE_API_MAX_RETRIES": "2",
    "MODELSCOPE_REPO_TREE_PAGE_MAX_ATTEMPTS": "3",
    "MODELSCOPE_REPO_TREE_PAGE_RETRY_MAX_DELAY_SECONDS": "8",
    "MODELSCOPE_REPO_TREE_PAGE_TIMEOUT_SECONDS": "10",
    "MODELSCOPE_REPO_TREE_LIST_TIMEOUT_SECONDS": "300",
    "MODELSCOPE_DOWNLOAD_MAX_RETRIES": "3",
    "MODELSCOPE_DOWNLOAD_TIMEOUT": "20",
    "MODELSCOPE_DOWNLOAD_LOW_SPEED_WINDOW_SECONDS": "20",
    "MODELSCOPE_DOWNLOAD_RETRY_MAX_DELAY_SECONDS": "8",
    "MODELSCOPE_LOG_LEVEL": "CRITICAL",
}
"""Shorter waits than the library's own, which it reads from the environment when it is imported. The user's come first."""
_GLOB = re.compile(r"[*?\[]")


def prefers_modelscope() -> bool:
    """True if LLaMA-Factory's variable says that ModelScope comes before the Hugging Face Hub."""
    return os.environ.get("USE_MODELSCOPE_HUB", "0").lower() in ("1", "y", "true")


@dataclass(frozen=True)
class Location:
    """A repository on ModelScope, and a path or glob in it."""

    kind: str
    """``model`` or ``dataset``."""
    name: str
    """``ORG/NAME``."""
    revision: str | None
    """Branch, tag or commit. Default: ``master``."""
    inside: str
    """Path or glob; empty for the whole repository."""
    root: str
    """The location's part for the repository, without its scheme: ``datasets/ORG/NAME@REVISION``."""

    @classmethod
    def of(cls, location: str) -> Location:
        """Take a location apart.

        >>> Location.of("ms://datasets/org/name@v1/train/*.jsonl")
        Location(kind='dataset', name='org/name', revision='v1', inside='train/*.jsonl', root='datasets/org/name@v1')

        Raises:
            RequestError: it does not name a repository.
        """
        parts = unquote(location.removeprefix(SCHEME)).strip("/").split("/")
        kind, skipped = ("dataset", 1) if parts[0] == "datasets" else ("model", 0)
        repository = "/".join(parts[skipped : skipped + 2])
        name, _, revision = repository.partition("@")
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or any(part in ("", ".", "..") for part in parts):
            raise RequestError(
                f"{location}: does not name a ModelScope repository; write ms://ORG/NAME for a model, or "
                "ms://datasets/ORG/NAME for a dataset"
            )
        root = "/".join(parts[: skipped + 2])
        return cls(kind, name, revision or None, "/".join(parts[skipped + 2 :]), root)

    def __str__(self) -> str:
        return SCHEME + self.root + (f"/{self.inside}" if self.inside else "")

    def wanted(self, files: list[str]) -> list[str]:
        """Choose the files that it names; of a whole model, those that a Hugging Face Hub's would be fetched with."""
        if _GLOB.search(self.inside):
            # ``*`` matches slashes here, so that this is more than the caller's own glob matches, never less.
            pattern = self.inside.replace("**/", "*")
            return [file for file in files if fnmatch.fnmatchcase(file, pattern)]
        if self.inside:
            return [file for file in files if file == self.inside or file.startswith(f"{self.inside}/")]
        if self.kind == "dataset":
            return files
        weights = next((found for patterns in WEIGHTS if (found := _matching(files, patterns))), [])
        other = set(_matching(files, OTHER_WEIGHTS))
        return [file for file in [*_matching(files, BESIDE_WEIGHTS), *weights] if file not in other]


def _matching(files: list[str], patterns: tuple[str, ...]) -> list[str]:
    return [file for file in files if any(fnmatch.fnmatchcase(file, pattern) for pattern in patterns)]


def copy_of(location: str) -> Path:
    """Return where this machine has what a location names, after fetching what is missing.

    Raises:
        FileNotFoundError: the repository has no such file or folder.
        RequestError: ModelScope does not give it.
    """
    place = Location.of(location)
    path = _copies(place) / place.root / place.inside
    if not path.exists():
        raise FileNotFoundError(2, "no such file or folder", str(place))
    return path


def filesystem_of(location: str) -> tuple[Any, str]:
    """Return a filesystem of what a location names, and the path in it, which is that of the location."""
    from pyarrow import fs

    place = Location.of(location)
    return fs.SubTreeFileSystem(str(_copies(place)), fs.LocalFileSystem()), str(place).removeprefix(SCHEME)


def list_files(location: str) -> list[str]:
    """List the files of a repository by their paths.

    Raises:
        RequestError: ModelScope does not list them.
    """
    place = Location.of(location)
    return sorted(_listing(place.kind, place.name, place.revision, os.environ.get("MODELSCOPE_ENDPOINT")))


def _copies(place: Location) -> Path:
    """Return the folder in which the repository's copy lies, once it has all that is wanted."""
    files = _listing(place.kind, place.name, place.revision, os.environ.get("MODELSCOPE_ENDPOINT"))
    identity = hashlib.sha256(repr((place.root, sorted(files.items()))).encode()).hexdigest()[:16]
    target = cache_home() / "copies" / identity
    folder, wanted = target / place.root, place.wanted(sorted(files))
    folder.mkdir(parents=True, exist_ok=True)
    if not all((folder / file).exists() for file in wanted):
        with (target / ".lock").open("w") as lock, _reasons(place):
            # Only processes that need this copy wait here, while one of them makes it.
            fcntl.flock(lock, fcntl.LOCK_EX)
            api = _api(place.kind, place.name)
            for file in wanted:
                if not (folder / file).exists():
                    _fetch(api, place, file, files[file], target / ".drafts")
                    (folder / file).parent.mkdir(parents=True, exist_ok=True)
                    (target / ".drafts" / file).replace(folder / file)
    os.utime(target)
    return target


def _fetch(api: Any, place: Location, file: str, entry: tuple[int, str], drafts: Path) -> None:
    size, digest = entry
    options = {"revision": place.revision, "local_dir": drafts, "cache_dir": drafts, "file_size": size or None}
    api.download_file(place.name, place.kind, file, expected_sha256=digest or None, **options)
    # Fingerprints take a file's time for its content, and the hub gives none that all machines agree on.
    seconds = int(digest[:7] or "0", 16)
    os.utime(drafts / file, (seconds, seconds))


@lru_cache(maxsize=64)
def _listing(kind: str, name: str, revision: str | None, endpoint: str | None) -> dict[str, tuple[int, str]]:
    """Return size and hash of each file; if the hub does not respond, as it was when it last did."""
    root = ("datasets/" if kind == "dataset" else "") + name + (f"@{revision}" if revision else "")
    place = Location(kind, name, revision, "", root)
    key = hashlib.sha256(repr((kind, name, revision, endpoint)).encode()).hexdigest()[:16]
    kept = cache_home() / "modelscope" / f"{key}.json"
    try:
        with _reasons(place):
            listed = _api(kind, name).list_repo_files(name, kind, revision=revision)
            files = {
                file.path: (int(file.size), file.sha256 or "")
                for file in listed
                if not file.is_dir and ".." not in PurePosixPath(file.path).parts and not file.path.startswith("/")
            }
    except NotNow:
        if not kept.exists():
            raise
        return {path: (size, digest) for path, (size, digest) in json.loads(kept.read_text()).items()}
    kept.parent.mkdir(parents=True, exist_ok=True)
    draft = kept.with_name(f".{key}.{os.getpid()}")
    draft.write_text(json.dumps(files))
    draft.replace(kept)
    return files


def _api(kind: str, name: str) -> Any:
    from modelscope_hub import HubApi  # pyright: ignore[reportMissingImports]

    hide_bars()
    return HubApi(endpoint=HubApi().resolve_endpoint_for_read(name, repo_type=kind))


@contextmanager
def _reasons(place: Location) -> Iterator[None]:
    """Turn the errors of ModelScope's library into one line each."""
    for variable, value in BOUNDS.items():
        os.environ.setdefault(variable, value)
    try:
        import requests
        from modelscope_hub import errors  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise RequestError(f"{place} needs pip install 'raysft[modelscope]' on every node") from None
    try:
        yield
    except (errors.NotExistError, errors.AuthenticationError, errors.PermissionDeniedError) as error:
        status = getattr(error, "status_code", None)
        fact = "does not have it" if isinstance(error, errors.NotExistError) else "denies access"
        remedy = "check the name, and whether MODELSCOPE_API_TOKEN may read it"
        raise RequestError(f"{place}: ModelScope {fact}{f' ({status})' if status else ''}; {remedy}") from None
    except (errors.HubError, requests.RequestException, ValueError, LookupError, TypeError, AttributeError) as error:
        status = getattr(error, "status_code", None)
        reason = one_line(getattr(error, "message", "") or error)
        if isinstance(error, errors.FileIntegrityError):
            raise RequestError(
                f"{place}: ModelScope serves a different file than it lists ({reason}); try again later"
            ) from None
        away = (errors.NetworkError, errors.ServerError, errors.RateLimitError, requests.RequestException)
        if isinstance(error, away) or getattr(error, "retryable", False):
            reason = f"{status}" if status else reason
            remedy = "check the network and MODELSCOPE_ENDPOINT, or run the same command again"
            raise NotNow(f"{place}: ModelScope does not respond ({reason}); {remedy}") from None
        raise RequestError(
            f"{place}: ModelScope's response is not usable ({reason}); check the name and MODELSCOPE_ENDPOINT"
        ) from None
