"""Download images from hosts that the config allows, and from no other: records of strangers name addresses, too."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from http.client import HTTPException
from threading import Thread
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from raysft.errors import NotNow, one_line
from raysft.media.files import Unreadable

MAX_BYTES = 64 << 20
"""Most bytes of a download."""
WAIT_SECONDS, TOTAL_SECONDS = 20.0, 60.0
"""Longest wait for an answer or the next bytes, and longest time for a file."""
PAUSES = (1.0, 4.0)
"""Seconds before the second and the third attempt."""
CHUNK_BYTES = 1 << 16
BUSY = (408, 425, 429)
"""Answers below 500 after which it is worth asking again."""
PORTS = {"http": 80, "https": 443}


def download(url: str, hosts: Sequence[str]) -> bytes:
    """Return what is at a URL.

    Args:
        url: http or https.
        hosts: the names of hosts that are allowed, with ``:port`` if it is an unusual one.

    Raises:
        Unreadable: its host is not allowed, leads elsewhere, has no such file, or one that is too large.
        NotNow: the host does not respond.
    """
    refuse_host(url, hosts)
    reason = ""
    for pause in (0.0, *PAUSES):
        time.sleep(pause)
        try:
            return _within(TOTAL_SECONDS, partial(_fetch, url, hosts))
        except Unreadable:
            raise
        except HTTPError as error:
            if error.code < 500 and error.code not in BUSY:
                raise Unreadable(f"{url}: cannot be read (HTTP status {error.code})") from None
            reason = f"HTTP status {error.code}"
        except URLError as error:
            reason = one_line(str(error.reason))
        except (OSError, HTTPException) as error:
            reason = one_line(error)
        except ValueError as error:  # a URL with blanks, for example
            raise Unreadable(f"{url}: cannot be read ({one_line(error)})") from None
    # A record that is left out because a server is down would be missing for good: tokens are kept.
    raise NotNow(f"{url}: does not respond ({reason}); try again, or download the images and set data.media_dir")


def refuse_host(url: str, hosts: Sequence[str]) -> None:
    """Raise ``Unreadable`` if a URL is of no host that is allowed.

    >>> refuse_host("https://a.org/x.png", ["a.org"])
    """
    try:
        parts = urlsplit(url)
        host, port = (parts.hostname or "").lower(), parts.port
    except ValueError as error:
        raise Unreadable(f"{url}: is not a valid URL ({one_line(error)})") from None
    if parts.scheme.lower() not in PORTS or not host:
        raise Unreadable(f"{url}: is not an http or https URL")
    usual = PORTS[parts.scheme.lower()]
    named = host if port in (None, usual) else f"{host}:{port}"
    if named not in [allowed.lower() for allowed in hosts]:
        raise Unreadable(
            f"{url}: {named} is not among data.media_hosts; add it, or download the images and set data.media_dir"
        )
    if parts.username is not None:
        raise Unreadable(
            f"{named}: URLs with credentials are not supported; download the images and set data.media_dir"
        )


class _Redirects(HTTPRedirectHandler):
    """Follows redirects to allowed hosts alone."""

    max_redirections = 5

    def __init__(self, hosts: Sequence[str]) -> None:
        self.hosts = hosts

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        refuse_host(newurl, self.hosts)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _fetch(url: str, hosts: Sequence[str]) -> bytes:
    request = Request(url, headers={"User-Agent": "raysft"})
    content = bytearray()
    with build_opener(_Redirects(hosts)).open(request, timeout=WAIT_SECONDS) as answer:
        expected = answer.headers.get("Content-Length")
        while chunk := answer.read1(CHUNK_BYTES):
            content += chunk
            if len(content) > MAX_BYTES:
                raise Unreadable(f"{url}: has more than {MAX_BYTES >> 20} MiB; scale the image down")
    if expected and expected.isdigit() and len(content) < int(expected):
        raise OSError(f"the connection ended after {len(content):,} of {expected} bytes")
    return bytes(content)


def _within(seconds: float, function: Any) -> bytes:
    """Call a function in a thread that is left behind if it takes longer: a server may send a byte at a time."""
    results: list[Any] = []

    def call() -> None:
        try:
            results.append(function())
        except BaseException as error:
            results.append(error)

    thread = Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    if not results:
        raise TimeoutError(f"no complete response within {seconds:.0f} s")
    if isinstance(results[0], BaseException):
        raise results[0]
    return results[0]
