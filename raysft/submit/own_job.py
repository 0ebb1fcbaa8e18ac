"""The end of a job that another start would not help, in a RayJob of KubeRay.

KubeRay looks at no exit code: it starts every job again that fails, on a new cluster, up to ``backoffLimit`` times. A job that was
stopped is left alone. So a command that must not start again asks for its own job to be stopped.
"""

from __future__ import annotations

import sys
import time

from raysft.errors import RequestError, one_line
from raysft.run.stop_sources import SIGNALS
from raysft.stopping import StopRequest
from raysft.submit.shown_log import STOPPED_WITH

SIGNAL_SECONDS = 60.0
"""How long the signal may take to arrive that a job is stopped with."""
WRONG_REQUEST, STOPPED_EARLY = 2, 75


def helps_again(code: int, request: StopRequest | None) -> bool:
    """Return True if another start of a command may end better, or continue.

    Args:
        code: its exit code.
        request: why it was to stop before its end.

    >>> helps_again(1, None), helps_again(2, None)
    (True, False)
    >>> helps_again(75, StopRequest("the driver's node is drained", elsewhere=True))
    True
    >>> helps_again(75, StopRequest("train.max_hours=8 is over"))
    False
    """
    if code != STOPPED_EARLY or request is None:
        return code != WRONG_REQUEST
    # A signal comes from whoever stops the job, which is not started again then, or from a machine that ends.
    return request.elsewhere or request.reason in SIGNALS.values()


def stop_own_job(url: str, code: int) -> None:
    """Ask for this process's job to be stopped, and wait for the signal, which ends this process.

    Args:
        url: the dashboard of its cluster.
        code: the exit code; the last line says it, as Ray keeps none of a job that was stopped.
    """
    from raysft.submit.jobs_internals import Jobs, UnknownJob, Unreachable, own_job

    _say(STOPPED_WITH.format(code=code))
    try:
        job = own_job()
        if job is None:
            raise RequestError("this process is not a Ray job")
        Jobs(url).stop(job)
        time.sleep(SIGNAL_SECONDS)
        reason = "no signal has come"
    except (RequestError, Unreachable, UnknownJob) as error:
        reason = one_line(error)
    _say(f"raysft: the job could not be stopped ({reason}), so KubeRay will restart it")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
