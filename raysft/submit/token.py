"""The access token of a cluster, found where Ray looks for it: the environment, then a file."""

from __future__ import annotations

import os
from pathlib import Path

from raysft.errors import RequestError

HOW = "set RAY_AUTH_TOKEN, or put the cluster's token into ~/.ray/auth_token (`ray get-auth-token` prints it on the cluster)"


def token_asked_for() -> bool:
    """Return True if ``RAY_AUTH_MODE`` says that every request carries the token."""
    return os.environ.get("RAY_AUTH_MODE", "").lower() == "token"


def find_token() -> tuple[str, str] | None:
    """Return the token and where it was found; None if there is none.

    Raises:
        RequestError: ``RAY_AUTH_TOKEN_PATH`` names a file that cannot be read, or it is not a token.
    """
    if token := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return _checked(token, "RAY_AUTH_TOKEN")
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named or "~/.ray/auth_token")
    try:
        path = path.expanduser()
        token = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError, RuntimeError) as error:  # a user without a home folder
        if named:
            reason = getattr(error, "strerror", None) or "not text"
            raise RequestError(
                f"RAY_AUTH_TOKEN_PATH={named}: cannot be read ({reason}); correct it, or unset it"
            ) from None
        return None
    return _checked(token, str(path)) if token else None


def _checked(token: str, where: str) -> tuple[str, str]:
    """Refuse what no request can carry; the error for it would show the token."""
    if not (token.isascii() and token.isprintable()) or " " in token:
        raise RequestError(f"{where}: is not a token, but text with spaces, line breaks or other letters; {HOW}")
    return token, where
