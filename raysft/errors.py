"""The errors that raysft raises on purpose, each with its exit code, and the text of those that libraries raise."""

from __future__ import annotations

import errno
import os

NO_SPACE = tuple(map(os.strerror, (errno.ENOSPC, errno.EDQUOT)))


class RequestError(ValueError):
    """The request is wrong. One line holds the fact, the value and the remedy; the command exits with code 2."""


class NotNow(RequestError):
    """A request that may be right later: another process works in the folder, or what the request needs does not respond."""


class RunFailed(RuntimeError):
    """The request was right, but the run failed. The command exits with code 1."""


class RunStopped(Exception):
    """The run ended before its end because it was asked to, and kept its work; the same command resumes it. Exit code 75."""


class StorageFailed(RuntimeError):
    """A storage refused a request, or did not respond within the time limit. The command exits with code 1."""


class StorageSilent(StorageFailed):
    """A storage did not respond within the time limit."""


def lacks_space(error: BaseException) -> bool:
    """Return True if a disk is full; each library has its own error for that."""
    return any(text in str(error) for text in NO_SPACE)


def as_yaml(value: object) -> str:
    """Write a value as a config has it: ``null`` and ``true``, not ``None`` and ``True``.

    >>> as_yaml((1, 2))
    '[1, 2]'
    """
    if isinstance(value, tuple):
        return repr(list(value))
    return (
        {None: "null", True: "true", False: "false"}[value] if value is None or isinstance(value, bool) else repr(value)
    )


def as_override(value: object) -> str:
    """Write a value as after the ``=`` of an override on the command line: text stands without quotes.

    >>> as_override("cpu"), as_override(None), as_override(8)
    ('cpu', 'null', '8')
    """
    return value if isinstance(value, str) else as_yaml(value)


def unreadable(message: str, cause: BaseException) -> RequestError:
    """Make the error of a request whose place cannot be read or written: one that may be right later if a storage is silent.

    >>> type(unreadable("s3://b: no answer", StorageSilent("no answer"))).__name__
    'NotNow'
    """
    return (NotNow if isinstance(cause, StorageSilent) else RequestError)(message)


def one_line(error: BaseException | str, length: int = 200) -> str:
    """First line of an error's message, for use inside a message of our own.

    A line that ends with a colon, or inside brackets, is joined with the next one. An error without a message gives the name of
    its type. A final full stop is removed, and longer text is cut to ``length`` characters.

    >>> one_line(ValueError("Not a number: \\n  'x'.\\nSee the manual."))
    "Not a number: 'x'"
    >>> one_line("Module Experts(\\n  (act): SiLU()\\n) is not supported.")
    'Module Experts( (act): SiLU() ) is not supported'
    >>> one_line(KeyboardInterrupt()), one_line("0123456789", length=6)
    ('KeyboardInterrupt', '01234…')
    """
    lines = [stripped for line in str(error).splitlines() if (stripped := " ".join(line.split()))]
    text = ""
    for line in lines:
        text = f"{text} {line}".lstrip()
        if not text.endswith(":") and text.count("(") <= text.count(")"):
            break
    text = text.rstrip(".:") or ("no message" if isinstance(error, str) else type(error).__name__)
    return text if len(text) <= length else f"{text[: length - 1]}…"
