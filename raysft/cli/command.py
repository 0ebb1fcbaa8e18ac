"""Run the command: parse its arguments, call the verb, and turn what it raises into one line and an exit code."""

from __future__ import annotations

import argparse
import errno
import io
import os
import sys
from collections.abc import Sequence

from raysft.cli import verbs
from raysft.cli.parser import parse
from raysft.config import masked
from raysft.errors import NotNow, RequestError, RunFailed, RunStopped, StorageFailed
from raysft.stopping import stoppable

FAULTS_OF_PATHS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP}
"""Errors of the operating system that the user can correct; a file that raysft itself misses is a bug."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb and return the exit code: 0 done, 1 the run failed, 2 the request was wrong, 75 stopped, 130
    interrupted.

    ``submit`` and ``follow`` return the exit code of the job that they followed.
    """
    if sys.stdout is None:  # closed by who called (>&-)
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without × or … must not end a run
    parsed = parse(arguments)
    with stoppable() as stopping:
        code = _exit_code(parsed)
    url = getattr(parsed, "rayjob", None)
    if url is not None and code:
        from raysft.submit.own_job import helps_again, stop_own_job

        if not (parsed.passes or helps_again(code, stopping.request)):
            stop_own_job(url, code)
    return code


def _exit_code(parsed: argparse.Namespace) -> int:
    """Call the verb, print what it raises, and return the exit code; ``parsed.passes`` says if what it raises may pass."""
    parsed.passes = False
    try:
        return parsed.verb(parsed) or 0
    except RequestError as error:
        print(f"raysft: error: {masked(str(error))}", file=sys.stderr)
        parsed.passes = isinstance(error, NotNow)
        return 2
    except (RunFailed, StorageFailed) as error:
        print(f"raysft: failed: {masked(str(error))}", file=sys.stderr)
        return 1
    except RunStopped as stopped:
        print(f"raysft: {masked(str(stopped))}; run the same command again to resume", file=sys.stderr)
        return 75
    except BrokenPipeError:
        return 0
    except OSError as error:
        print(f"raysft: failed: {_describe(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        resumed = " to resume from the newest checkpoint" if parsed.verb in (verbs.run, verbs.train, verbs.tune) else ""
        print(f"raysft: interrupted; run the same command again{resumed}", file=sys.stderr)
        return 130


def _describe(error: OSError) -> str:
    """Describe an error of the operating system in one line; raise it again if the user cannot do anything about it."""
    where = f"{error.filename}: " if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{where}{error.strerror}; free some space, then run the same command again to resume"
    if where and error.errno in FAULTS_OF_PATHS:
        return f"{where}{error.strerror}; correct the path or its permissions, then run the same command again"
    raise error
