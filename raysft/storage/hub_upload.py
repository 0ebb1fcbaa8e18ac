"""Models are pushed to the Hugging Face Hub: whether the token may, and the files as one commit.

Large files go the way of Git LFS, which all hubs know: a hub has a file already if it knows its SHA-256. The library's other way,
``hf_xet``, fails on a hub that does not speak its protocol, and its waits can be neither bounded nor named.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from raysft.errors import NotNow, RequestError, RunFailed, one_line
from raysft.storage import hub

LOADED = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model.bin.index.json", "adapter_*",
          "config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json",
          "*.jinja")  # fmt: skip
"""Patterns of the files at the top of a repository that would be loaded with a model, or in its place."""
COMMITS = 5
"""Attempts to commit while others commit to the same repository."""
LOGIN = "set HF_TOKEN to your token, or run hf auth login"


def open_repository(name: str, private: bool) -> str:
    """Return ``ORG/NAME`` of a model repository to which this machine's token may write; it is created if there is none.

    Args:
        name: ``ORG/NAME``, or ``NAME`` of the token's own account.
        private: create it as a private one.

    Raises:
        RequestError: it is no name, there is no token, the token may not write there, or the repository is there and public
            although a private one is asked for.
        NotNow: the hub does not respond.
    """
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise RequestError(
            f"--push {name}: must be the ORG/NAME of a repository, but is not ({one_line(error)}); correct it"
        ) from None
    if constants.is_offline_mode():
        raise RequestError(f"--push {name}: needs the Hub, but HF_HUB_OFFLINE is set; unset it, or use --output alone")
    hub.bound_requests()
    api, stage = HfApi(endpoint=constants.ENDPOINT), "token"
    try:
        token = get_token()
        if not token:
            raise RequestError(f"--push {name}: needs a Hub token, but none is set; {LOGIN}")
        if not re.fullmatch("[!-~]+", token):  # no request could carry it
            raise RequestError(f"--push {name}: the token contains characters that no Hub token has; {LOGIN}")
        account = api.whoami()["name"]
        name, stage = name if "/" in name else f"{account}/{name}", "repository"
        api.create_repo(name, private=private or None, exist_ok=True)
        _check_right(api, name)
        if private and not api.repo_info(name).private:
            raise RequestError(
                f"--private: {name} already exists, but is public; make it private on the Hub, or remove --private"
            )
    except RequestError:
        raise
    except hub.error_types() as error:
        raise _refusal(name, error, stage) from None
    return name


def _check_right(api: Any, name: str) -> None:
    """Ask whether the token may write: creating a repository that exists says nothing about it."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        api.auth_check(name, write=True)
    except HfHubHTTPError as error:
        if error.response.status_code != 404:  # a hub that cannot be asked refuses what comes next
            raise


def _refusal(name: str, error: BaseException, stage: str) -> RequestError:
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled):
        return NotNow(f"--push {name}: {error}; check the network and HF_ENDPOINT, or use --output alone")
    if not isinstance(error, HfHubHTTPError):
        return RequestError(
            f"--push {name}: the Hub's response is not usable ({type(error).__name__}); check HF_ENDPOINT={constants.ENDPOINT}"
        )
    answer = _answer(error)
    if stage == "token" and error.response.status_code in (401, 403):
        return RequestError(f"--push {name}: the Hub rejects the token ({answer}); {LOGIN}")
    if error.response.status_code in (401, 403, 404):
        return RequestError(
            f"--push {name}: the token may not write there ({answer}); use a token with write access, or another ORG/NAME"
        )
    return RequestError(f"--push {name}: the Hub does not open the repository ({answer}); correct that, or use another")


def push(name: str, folder: Path, message: str, notify: Callable[[str], None]) -> str:
    """Upload a model's folder as one commit, and return the commit's address; files that the hub has are not sent again.

    What the repository has at its top from another model, and what would be loaded with this one or in its place, is removed in
    the same commit. If it holds all of the folder already, there is no commit.

    Args:
        name: ``ORG/NAME``, from ``open_repository``.
        folder: the model.
        message: title of the commit.
        notify: receives a line about what is removed, and if there is nothing to commit.

    Raises:
        RunFailed: the Hub does not accept it; the same call resumes the upload.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError

    hub.bound_requests()
    api = HfApi(endpoint=constants.ENDPOINT)
    files = files_to_push(folder)
    try:
        with _by_lfs():
            first = None
            for _ in range(COMMITS):
                known = api.repo_info(name)
                first = first or known.sha
                try:
                    made = _commit(api, name, files, known, message)
                except HfHubHTTPError as error:
                    if error.response.status_code != 412:
                        raise
                    continue  # another commit came between, or the answer to this one was lost
                stale = _stale(known, files)
                if made.oid == first:
                    notify(f"{name}: the Hub already has all of it")
                elif stale:
                    notify(f"{name}: removed files of another model: {', '.join(stale)}")
                return f"{constants.ENDPOINT}/{name}/commit/{made.oid}"
    except (*hub.error_types(), RuntimeError) as error:
        raise RunFailed(f"{name}: {_fault(error)}") from error
    raise RunFailed(f"{name}: others keep committing to it; run the same command again when they have finished")


def files_to_push(folder: Path) -> dict[str, Path]:
    """Return the files of a model's folder by their paths in a repository; hidden ones, such as caches, stay here."""
    files = {path.relative_to(folder): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name.as_posix(): path for name, path in files.items() if not any(part[0] == "." for part in name.parts)}


def _commit(api: Any, name: str, files: dict[str, Path], known: Any, message: str) -> Any:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    added = [CommitOperationAdd(path_in_repo=path, path_or_fileobj=str(file)) for path, file in files.items()]
    for operation in added:
        # Each by itself: the library's threads for several files would outlive Ctrl-C until they had sent theirs.
        api.preupload_lfs_files(name, [operation], free_memory=False)
    removed = [CommitOperationDelete(path_in_repo=path, is_folder=False) for path in _stale(known, files)]
    return api.create_commit(name, [*removed, *added], commit_message=message, parent_commit=known.sha)


def _stale(known: Any, files: dict[str, Path]) -> list[str]:
    there = [sibling.rfilename for sibling in known.siblings or () if "/" not in sibling.rfilename]
    return [path for path in there if path not in files and any(fnmatch(path, pattern) for pattern in LOADED)]


@contextmanager
def _by_lfs() -> Iterator[None]:
    """Send large files by Git LFS, with bars on a terminal alone, and show no warnings of the library."""
    from huggingface_hub import constants
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    hides = not (sys.stderr.isatty() or are_progress_bars_disabled())
    before, constants.HF_HUB_DISABLE_XET = constants.HF_HUB_DISABLE_XET, True
    if hides:
        disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        constants.HF_HUB_DISABLE_XET = before
        if hides:
            enable_progress_bars()


def _fault(error: BaseException) -> str:
    """Return why an upload failed, as "FACT; REMEDY"."""
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    again = "run the same command again, which sends only what the Hub does not have yet"
    cause: BaseException | None = error
    while isinstance(cause, RuntimeError) and cause.__cause__ is not None:
        cause = cause.__cause__  # it says which file, and this one why
    if isinstance(cause, OfflineModeIsEnabled):
        return f"{cause}; check the network, and {again}"
    if isinstance(cause, HfHubHTTPError):
        return f"the Hub rejects the upload ({_answer(cause)}); correct that, and {again}"
    if isinstance(cause, httpx2.TransportError):
        return f"the upload was interrupted ({one_line(cause)}); {again}"
    refused = re.search(r"LFS batch API returned errors[^`]*`([^`]+)", str(cause))
    if refused:
        return f"the Hub rejects the upload ({one_line(refused[1])}); correct that, and {again}"
    return f"the upload failed ({one_line(cause or error)}); {again}"


def _answer(error: Any) -> str:
    """The status of a hub's answer, and its own words."""
    status, words = f"{error.response.status_code} {error.response.reason_phrase}", error.server_message or ""
    return f"{status}: {one_line(words)}" if words.strip() else status
