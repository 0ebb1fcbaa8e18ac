"""The address of a cluster's dashboard, and what may be wrong with it. Nothing here imports Ray."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from raysft.errors import RequestError, one_line

EXAMPLE = "http://HOST:8265"
PORTS = f"use the dashboard's port, {EXAMPLE} (10001 is for Ray Clients, 6379 for the cluster's own nodes)"


def dashboard_url(address: str) -> str:
    """Return the address of a dashboard as the Jobs API takes it, without a slash at the end.

    >>> dashboard_url("http://head:8265/")
    'http://head:8265'

    Raises:
        RequestError: it is not the URL of an HTTP server.
    """
    named = f"--to {address}"
    scheme, found, _ = address.partition("://")
    if scheme == "ray" and found:
        raise RequestError(f"{named}: the address of a Ray Client, which cannot accept jobs; {PORTS}")
    if scheme not in ("http", "https") or not found:
        raise RequestError(f"{named}: is not a dashboard URL; use {EXAMPLE}, or kubernetes")
    try:
        parts = urlsplit(address)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise RequestError(f"{named}: is not a URL ({one_line(error)}); use {EXAMPLE}") from None
    labels = [] if not host or ":" in host else host.removesuffix(".").split(".")
    if not host or not address.isprintable() or " " in address or not all(0 < len(label) < 64 for label in labels):
        raise RequestError(f"{named}: is not a URL with a host; use {EXAMPLE}")
    if parts.username is not None:
        raise RequestError(
            f"--to {scheme}://…@{host}: credentials in an address are shown in messages; remove them, and set RAY_AUTH_TOKEN"
        )
    if parts.query or parts.fragment:
        raise RequestError(f"{named}: has a query or a fragment; use only {EXAMPLE}")
    return address.rstrip("/")


def why_no_answer(url: str, reason: str) -> str:
    """Say in one line what may be wrong with an address, from the text of the error that a request ended with.

    >>> why_no_answer("https://head:8265", "[SSL: WRONG_VERSION_NUMBER] wrong version number")
    '--to https://head:8265: the server speaks HTTP without TLS; use http://head:8265'
    """
    named, lower = f"--to {url}", reason.lower()
    plain, secure = url.replace("https://", "http://"), url.replace("http://", "https://")
    if "wrong_version_number" in lower or "record layer failure" in lower or "packet length too long" in lower:
        return f"{named}: the server speaks HTTP without TLS; use {plain}"
    if "certificate" in lower:
        return (
            f"{named}: the server's certificate cannot be verified ({short_reason(reason)}); set SSL_CERT_FILE to the CA "
            "certificate file that signed it"
        )
    if "\\x15\\x03" in reason or "https server" in lower or "to https port" in lower:
        return f"{named}: the server speaks HTTPS; use {secure}"
    if any(
        sign in lower for sign in ("badstatusline", "remote end closed", "reset by peer", "http/0.9", "invalid http")
    ):
        tls = f", or {secure} if it speaks TLS" if plain == url else ""
        return f"{named}: something responds there, but it is not an HTTP server; {PORTS}{tls}"
    return f"{named}: no Ray cluster answers ({short_reason(reason)}); check the address, and that this machine can reach it"


def short_reason(reason: str) -> str:
    """The last cause in the text of an error of ``requests``, which nests them.

    >>> short_reason("Max retries exceeded (Caused by NewError('[Errno 111] Connection refused'))")
    'Connection refused'
    >>> short_reason("('Connection aborted.', ConnectionResetError(104, 'Connection reset by peer'))")
    'Connection reset by peer'
    """
    if quoted := re.search(r"""(['"])((?:(?!\1).)*)\1\)+$""", reason):
        reason = quoted[2]
    last = reason.rpartition("Errno ")[2] if "Errno " in reason else reason.rpartition(": ")[2]
    return one_line(last.partition("] ")[2] or last).rstrip("')\"")
