"""The Hugging Face Hub: bounded requests, and one-line reasons for its errors. Imports nothing of raysft."""

from __future__ import annotations

import errno
import sys
import time
from collections.abc import Iterator
from functools import lru_cache, partial
from typing import Any

from raysft.errors import one_line

ATTEMPT_SECONDS = 10.0
"""Longest wait for a byte of one request."""
MIN_BYTES_PER_SECOND = 1024
"""Rate below which a response counts as no answer."""
RETRY_SECONDS = 25.0
"""Longest time to retry a request. The hub's library retries for minutes, file by file, or for as long as the server says."""
RETRY_AFTER_SECONDS = 310.0
"""The same if the server names a time (``Retry-After``); the hub's rate limits last five minutes."""
NAMED_SECONDS = 2.0
"""A wait that lasts so long is named."""
WRITE_SECONDS = 60.0
"""Longest wait for the answer to a request that writes: a commit of many large files takes the hub a while."""
AWAY_SECONDS = 60.0
"""Time without retries after a server did not respond: cached files load without it, others fail at once."""
UNUSABLE = "the Hub's response is not usable; check the name and HF_ENDPOINT, or give a folder"
CHUNK_BYTES = 1 << 20
"""Most bytes of a download that are lost when it breaks off; a connection that carries fewer would never end it."""
TRANSIENT = (408, 429, 500, 502, 503, 504)
"""HTTP status codes worth a retry."""
CONFLICT = 409
"""The status of a repository that exists, and of one that cannot be created while another one is: that, too, passes."""


@lru_cache(maxsize=1)
def bound_requests() -> dict[str, float]:
    """Bound all requests of this process to the hub, whichever library makes them.

    Returns:
        Server → when it last did not respond; kept up to date, and without servers that have answered since.
    """
    import logging

    from huggingface_hub import constants, set_client_factory
    from huggingface_hub.utils._http import default_client_factory

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it would log every attempt
    unreachable: dict[str, float] = {}

    def bounded_client() -> Any:
        client = default_client_factory()
        client.send = partial(_send, client.send, unreachable)  # all requests go through it
        return client

    set_client_factory(bounded_client)
    constants.DOWNLOAD_CHUNK_SIZE = CHUNK_BYTES
    return unreachable


def silent_server() -> str:
    """Return the hub's server if it did not respond just now; the library then says of files that they do not exist."""
    now = time.monotonic()
    return next((server for server, at in bound_requests().items() if now - at < AWAY_SECONDS), "")


def _send(send: Any, unreachable: dict[str, float], request: Any, **options: Any) -> Any:
    """Send a request, and retry it until it is answered or its time is up."""
    import httpx2
    from huggingface_hub.errors import OfflineModeIsEnabled

    server, started, pause = f"{request.url.scheme}://{request.url.netloc.decode()}", time.monotonic(), 0.5
    # Some requests of the library have no timeout.
    limits = dict.fromkeys(("connect", "read", "write", "pool"), ATTEMPT_SECONDS)
    if request.method not in ("GET", "HEAD") and "/paths-info/" not in request.url.path:
        limits["read"] = WRITE_SECONDS
    request.extensions["timeout"] = limits | {k: v for k, v in request.extensions.get("timeout", {}).items() if v}
    recently = started - unreachable.get(server, -AWAY_SECONDS) < AWAY_SECONDS
    retry_seconds = 0.0 if recently else RETRY_SECONDS
    file, paused = _file_of(request), 0.0
    begin = file.tell() if file else 0
    if file:
        request.stream = _require_rate(request.stream, httpx2.WriteTimeout, "took")
    while True:
        limit = retry_seconds
        try:
            response = send(request, **{**options, "stream": True})
            response.stream = _require_rate(response.stream, httpx2.ReadTimeout, "sent")
            if not options.get("stream"):
                response.read()
            if response.status_code not in TRANSIENT and not _creates_another(response):
                unreachable.pop(server, None)
                return response
            response.close()
            reason = f"{response.status_code} {response.reason_phrase}"
            retry_after = response.headers.get("retry-after", "")
            if retry_after.isdigit() and int(retry_after):
                pause, limit = float(retry_after), RETRY_AFTER_SECONDS
                reason += f", retry after {retry_after} s"
        except (httpx2.TimeoutException, httpx2.NetworkError, httpx2.RemoteProtocolError) as error:
            reason = one_line(error)
        # A large file may break off after hours; only the waits for another attempt are counted then.
        if (paused if file else time.monotonic() - started) + pause > limit:
            unreachable[server] = time.monotonic()
            # On this error, unlike on others, the libraries fall back to their caches.
            raise OfflineModeIsEnabled(f"{server} does not respond ({reason})")
        if pause >= NAMED_SECONDS:
            print(f"waiting for the Hub: {server} ({reason})", file=sys.stderr)
        time.sleep(pause)
        paused += pause
        pause = min(2 * pause, 8.0)
        if file:
            file.seek(begin)


def _file_of(request: Any) -> Any:
    """Return the file that a request sends, which must be read from where it began if the request is sent again."""
    file = getattr(request.stream, "_stream", None)
    return file if hasattr(file, "seek") else None


def _creates_another(response: Any) -> bool:
    """True if the hub creates no repository because it is creating another one; its library would ask again at once, forever."""
    return response.status_code == CONFLICT and b"another conflicting operation is in progress" in response.read()


def _require_rate(stream: Any, timeout: type[Exception], did: str) -> Any:
    """Return a body that raises a timeout if the server only trickles, or takes it as slowly, as if it did nothing."""
    import httpx2

    class RateChecked(httpx2.SyncByteStream):
        def __iter__(self) -> Iterator[bytes]:
            since, passed = time.monotonic(), 0
            for chunk in stream:
                yield chunk
                passed += len(chunk)
                seconds = time.monotonic() - since
                if seconds > ATTEMPT_SECONDS:
                    if passed < MIN_BYTES_PER_SECOND * seconds:
                        raise timeout(f"it {did} {passed} bytes in {seconds:.0f} s")
                    since, passed = time.monotonic(), 0

        def close(self) -> None:
            stream.close()

    return RateChecked()


def error_types() -> tuple[type[Exception], ...]:
    """Types of the errors that the hub's library raises: its own, of broken downloads, and of answers it cannot parse."""
    import httpx2
    from huggingface_hub.errors import RevisionResolutionError

    return OSError, ValueError, LookupError, TypeError, AttributeError, httpx2.HTTPError, RevisionResolutionError


def reason_of(error: BaseException) -> str | None:
    """Return why a request to the hub failed, as "FACT; REMEDY"; None if the error is not of the hub."""
    import httpx2
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RevisionNotFoundError,
    )

    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    not_cached = (OfflineModeIsEnabled, LocalEntryNotFoundError)
    if constants.HF_HUB_OFFLINE and any(isinstance(cause, not_cached) for cause in chain):
        return "HF_HUB_OFFLINE is set, but the cache does not have it; unset HF_HUB_OFFLINE, or download it first"
    for cause in chain:
        if isinstance(cause, OfflineModeIsEnabled):
            return f"{cause}; check the network and HF_ENDPOINT, or give a folder"
        if isinstance(cause, HfHubHTTPError):
            status = f"{cause.response.status_code} {cause.response.reason_phrase}"
            if isinstance(cause, GatedRepoError):
                page = f"{constants.ENDPOINT}/{cause.repo_id or ''}".rstrip("/")
                return (
                    f"it is gated ({status}); accept its terms at {page}, and set HF_TOKEN to a token of that account"
                )
            if isinstance(cause, RevisionNotFoundError):
                return f"the Hub has no such revision of it ({status}); check the branch, tag or commit"
            if cause.response.status_code in (401, 403):
                # The hub gives this answer for missing repositories too.
                return f"the Hub denies access ({status}); check the name, and whether HF_TOKEN may read it"
            if cause.response.status_code == 404:
                return f"the Hub does not have it ({status}); check the name"
            return f"the Hub responds with {status}; try again later, or give a folder"
        if isinstance(cause, httpx2.TransportError):
            return (
                f"the download was interrupted ({cause}); run the same command again, which keeps complete files, or give a "
                "folder"
            )
        if isinstance(cause, OSError) and "Consistency check failed" in str(cause):
            sizes = one_line(cause).partition(": ")[2].partition(". ")[0]
            return f"the Hub sent a different number of bytes than announced ({sizes}); run the same command again"
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            return f"the Hub cache cannot be written ({cause.strerror}: {constants.HF_HUB_CACHE}); set HF_HOME to another folder"
    return None
