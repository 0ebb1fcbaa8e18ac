"""The Hugging Face hub: asked with a patience that ends, and its errors said in one line. Imports nothing of raysft."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from functools import lru_cache, partial
from typing import Any

ATTEMPT_SECONDS = 10.0
"""How long one request may wait without a byte."""
SLOWEST_BYTES = 1024
"""Bytes per second below which a response counts as no answer."""
PATIENCE_SECONDS = 25.0
"""How long a hub that fails is asked again. Its library would ask for minutes, file by file, and wait for as long as a server
tells it to."""
TOLD_SECONDS = 310.0
"""How long to wait where the hub itself says when it will answer again; its limits hold for five minutes."""
AWAY_SECONDS = 60.0
"""How long a hub that did not answer is not asked again: what the cache has is loaded without it, and the rest fails at once."""
NONSENSE = "what the hub answers is of no use; check its name and HF_ENDPOINT, or give a folder"
PASSING = (408, 429, 500, 502, 503, 504)
"""HTTP states that pass."""


@lru_cache(maxsize=1)
def be_patient() -> None:
    """Have all that this process asks of the hub, through whichever library, asked with a patience that ends."""
    import logging

    from huggingface_hub import set_client_factory
    from huggingface_hub.utils._http import default_client_factory

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it would report each of its attempts
    away: dict[str, float] = {}

    def client() -> Any:
        made = default_client_factory()
        made.send = partial(_send, made.send, away)  # all requests go through it
        return made

    set_client_factory(client)


def _send(once: Any, away: dict[str, float], request: Any, **options: Any) -> Any:
    """Send a request until it is answered, or until the patience for its server ends."""
    import httpx2
    from huggingface_hub.errors import OfflineModeIsEnabled

    server, begun, pause = f"{request.url.scheme}://{request.url.netloc.decode()}", time.monotonic(), 0.5
    # Some of the library's requests have no limit.
    limits = dict.fromkeys(("connect", "read", "write", "pool"), ATTEMPT_SECONDS)
    request.extensions["timeout"] = limits | {k: v for k, v in request.extensions.get("timeout", {}).items() if v}
    patience = 0.0 if begun - away.get(server, -AWAY_SECONDS) < AWAY_SECONDS else PATIENCE_SECONDS
    while True:
        limit = patience
        try:
            response = once(request, **{**options, "stream": True})
            response.stream = _paced(response.stream)
            if not options.get("stream"):
                response.read()
            if response.status_code not in PASSING:
                away.pop(server, None)
                return response
            response.close()
            reason = f"{response.status_code} {response.reason_phrase}"
            told = response.headers.get("retry-after", "")
            if told.isdigit() and int(told) > pause:
                pause, limit = float(told), TOLD_SECONDS
                reason += f", to be asked again in {told} s"
        except (httpx2.TimeoutException, httpx2.NetworkError, httpx2.RemoteProtocolError) as error:
            reason = str(error) or type(error).__name__
        if time.monotonic() - begun + pause > limit:
            away[server] = time.monotonic()
            # At this error, unlike at others, the libraries look into their caches.
            raise OfflineModeIsEnabled(f"{server} does not answer ({reason})")
        if pause > PATIENCE_SECONDS:
            print(f"waiting for the hub: {server} ({reason})", file=sys.stderr)
        time.sleep(pause)
        pause = min(2 * pause, 8.0)


def _paced(stream: Any) -> Any:
    """The body of a response; a server that only trickles raises ``ReadTimeout``, as one that sends nothing does."""
    import httpx2

    class Paced(httpx2.SyncByteStream):
        def __iter__(self) -> Iterator[bytes]:
            since, received = time.monotonic(), 0
            for chunk in stream:
                yield chunk
                received += len(chunk)
                seconds = time.monotonic() - since
                if seconds > ATTEMPT_SECONDS:
                    if received < SLOWEST_BYTES * seconds:
                        raise httpx2.ReadTimeout(f"it sent {received} bytes in {seconds:.0f} s")
                    since, received = time.monotonic(), 0

        def close(self) -> None:
            stream.close()

    return Paced()


def failures() -> tuple[type[Exception], ...]:
    """What the hub's library raises: errors of its own, of a download that breaks off, and what it stumbles over in an answer
    that is nonsense."""
    import httpx2

    return OSError, ValueError, LookupError, TypeError, AttributeError, httpx2.HTTPError


def reason_of(error: BaseException) -> str | None:
    """Why the hub did not give something, and what to do about it, as "FACT; REMEDY"; None where it is not the hub's fault."""
    import httpx2
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    if constants.HF_HUB_OFFLINE and any(
        isinstance(each, OfflineModeIsEnabled | LocalEntryNotFoundError) for each in chain
    ):
        return "HF_HUB_OFFLINE is set, and the cache does not hold it; unset it, or fetch it before"
    for each in chain:
        if isinstance(each, OfflineModeIsEnabled):
            return f"{each}; check the network and HF_ENDPOINT, or give a folder"
        if isinstance(each, HfHubHTTPError):
            state = f"{each.response.status_code} {each.response.reason_phrase}"
            if each.response.status_code in (401, 403):
                # It says so of what is not there, too.
                return f"the hub refuses ({state}); check its name, and whether HF_TOKEN may read it"
            if each.response.status_code == 404:
                return f"the hub does not have it ({state}); check its name"
            return f"the hub answers {state}; try again later, or give a folder"
        if isinstance(each, httpx2.TransportError):
            return f"the download broke off ({each}); start again, which goes on with it, or give a folder"
    return None
