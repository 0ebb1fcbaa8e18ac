"""The log of a job, which is read again from its beginning after each lost connection, and shown once."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable

HEAD_CHARACTERS = 4096
"""Characters at the beginning of a log by which it is told from another; its first line has the time of the job's start."""
TAIL_CHARACTERS = 8192
"""Characters at its end that are remembered."""
STOPPED_WITH = "raysft: exit code {code} as a stopped job, which KubeRay does not start again"
"""The last line of a job that has itself stopped, of which Ray keeps no exit code."""


class ShownLog:
    """Shows a log that is read from its beginning again and again, each part once."""

    def __init__(self, show: Callable[[str], None]) -> None:
        self._show = show
        self._head, self._at = "", 0
        self.shown = 0
        """Characters that were shown."""
        self.tail = ""
        """The end of what was shown."""

    def restart(self) -> None:
        """Expect the beginning of the log next."""
        self._at = 0

    def feed(self, text: str) -> None:
        """Show what is new in the next part of the log.

        >>> log = ShownLog(lambda new: print(repr(new)))
        >>> log.feed("step 1\\nst")
        'step 1\\nst'
        >>> log.restart()
        >>> log.feed("step 1\\n"); log.feed("step 2\\n")
        'ep 2\\n'
        """
        start = self._at
        if not text.startswith(self._head[start : start + len(text)]):
            # Another log under the same name: a new head has started the job again.
            text, start = self._head[:start] + text, 0
            self._head, self.shown = "", 0
        self._at = start + len(text)
        if len(self._head) < min(self._at, HEAD_CHARACTERS):
            self._head = (self._head[:start] + text)[:HEAD_CHARACTERS]
        if self._at > self.shown:
            new = text[self.shown - start :]
            self._show(new)
            self.shown, self.tail = self._at, (self.tail + new)[-TAIL_CHARACTERS:]


def own_exit_code(tail: str) -> int | None:
    """The exit code that a job has named at the end of its log because it had itself stopped; None if it has named none.

    >>> own_exit_code("raysft: error: x\\n" + STOPPED_WITH.format(code=2) + "\\n")
    2
    """
    before, after = map(re.escape, STOPPED_WITH.split("{code}"))
    found = re.search(rf"^{before}(\d+){after}$\n?\Z", tail, re.MULTILINE)
    return int(found[1]) if found else None


def show(text: str) -> None:
    """Print a part of a job's output as it is."""
    sys.stdout.write(text)
    sys.stdout.flush()
