"""Follow a job to its end, through lost connections and restarts of the cluster's head."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress

from ray.job_submission import JobDetails, JobStatus

from raysft.errors import RunFailed
from raysft.submit.address import short_reason
from raysft.submit.following import INTERRUPTED, Lost
from raysft.submit.jobs_internals import Jobs, UnknownJob, Unreachable
from raysft.submit.shown_log import ShownLog, own_exit_code

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0
"""Seconds between two attempts; each wait is twice as long as the one before."""
LOST_SECONDS = 600.0
"""How long a cluster may not respond; a head that Kubernetes moves to another machine needs minutes."""
FORGOTTEN_SECONDS = 60.0
"""How long a cluster may not know a job that it has known: Kubernetes' operator submits it to a new head again."""
QUIET_SECONDS, LONGEST_QUIET = 60.0, 960.0
"""After so long without output the log is opened again, as a connection may die without a sign; doubles if nothing was lost."""
REST_SECONDS = 30.0
"""How long the log of a job that has ended is asked for."""


def exit_code(details: JobDetails, log: str = "") -> int:
    """The exit code for a job that has ended: its driver's own, if Ray knows it, or the end of its log names it."""
    code = details.driver_exit_code
    if code is not None:
        return code if code >= 0 else 128 - code  # as shells say it of a process that a signal has ended
    if details.status == JobStatus.STOPPED and (named := own_exit_code(log)) is not None:
        return named
    return {JobStatus.SUCCEEDED: 0, JobStatus.STOPPED: INTERRUPTED}.get(details.status, 1)


def follow(jobs: Jobs, job: str, log: ShownLog, notify: Callable[[str], None]) -> JobDetails:
    """Show what a job has printed and prints, until it has ended.

    Args:
        jobs: of its cluster.
        job: its submission id.
        log: shows its output; a second call with the same one shows nothing twice.
        notify: receives a line when the connection is lost and when it is back.

    Returns:
        What the cluster says of the job that has ended.

    Raises:
        UnknownJob: the cluster never had such a job.
        Lost: the cluster has not responded for a long time.
        RunFailed: it has lost the job.
    """
    patience, quiet = _Patience(jobs.url, job, notify), QUIET_SECONDS
    while True:
        try:
            details = jobs.details(job)
        except (Unreachable, UnknownJob) as error:
            patience.fail(error)
            continue
        patience.answer(details)
        if details.status.is_terminal():
            _show_rest(jobs, job, log, notify)
            return details
        before = log.shown
        try:
            asyncio.run(_tail(jobs, job, log, quiet))
        except Unreachable:
            with suppress(Unreachable, UnknownJob):  # some proxies let no web socket through
                log.restart()
                log.feed(jobs.log(job))
        grew = log.shown > before
        quiet = QUIET_SECONDS if grew else min(2 * quiet, LONGEST_QUIET)
        patience.wait(again=not grew)


async def _tail(jobs: Jobs, job: str, log: ShownLog, quiet: float) -> None:
    """Show a log until its connection ends, or has brought nothing for this many seconds."""
    log.restart()
    chunks, task = jobs.tail(job), None
    try:
        while True:
            task = asyncio.ensure_future(_next(chunks))
            done, _ = await asyncio.wait({task}, timeout=quiet)
            chunk = task.result() if done else None
            if chunk is None:
                return
            log.feed(chunk)
    finally:
        if task is not None and not task.done():
            task.cancel()
            await asyncio.wait({task})
        await chunks.aclose()


async def _next(chunks: AsyncIterator[str]) -> str | None:
    return await anext(chunks, None)


def _show_rest(jobs: Jobs, job: str, log: ShownLog, notify: Callable[[str], None]) -> None:
    """Show what a job has printed between the end of the last connection and its own end."""
    limit = time.monotonic() + REST_SECONDS
    while True:
        try:
            rest = jobs.log(job)
            log.restart()
            log.feed(rest)
            return
        except (Unreachable, UnknownJob) as error:
            if time.monotonic() > limit:
                notify(f"{job}: the end of its log cannot be read ({short_reason(str(error))})")
                return
            time.sleep(FIRST_PAUSE)


class _Patience:
    """Waits between two attempts, and knows when to give up."""

    def __init__(self, url: str, job: str, notify: Callable[[str], None]) -> None:
        self._url, self._job, self._notify = url, job, notify
        self._pause, self._answered = FIRST_PAUSE, time.monotonic()
        self._known = self._lost = False
        self._forgotten: float | None = None
        self._place = ""

    def answer(self, details: JobDetails) -> None:
        """Note what the cluster has told about the job."""
        self._place = (details.metadata or {}).get("run_directory", "")
        if self._lost:
            self._notify(f"{self._url} answers again")
            self._pause = FIRST_PAUSE
        self._known, self._lost, self._answered, self._forgotten = True, False, time.monotonic(), None

    def fail(self, error: Unreachable | UnknownJob) -> None:
        """Wait after an attempt that has failed.

        Raises:
            UnknownJob: the cluster never had the job.
            Lost: there was no answer for too long.
            RunFailed: the cluster has forgotten the job for too long.
        """
        unknown, silent = isinstance(error, UnknownJob), time.monotonic() - self._answered
        reason = short_reason(str(error))
        if unknown and not self._known:
            raise error
        if not unknown:
            self._forgotten = None
        elif self._forgotten is None:
            self._forgotten = (
                time.monotonic()
            )  # a head that is new has answered: from now on the job has time to come back
        if self._forgotten is not None and time.monotonic() - self._forgotten > FORGOTTEN_SECONDS:
            raise RunFailed(
                f"{self._url} no longer knows {self._job}, so its head was restarted and the job has ended; submit it again, "
                "and it resumes from its newest checkpoint"
            )
        if silent > LOST_SECONDS:
            raise Lost(
                f"{self._url} has not responded for {silent / 60:.0f} minutes ({reason}); the job may be running: "
                f"{come_back(self._job, self._url)}",
                self._place,
            )
        if not self._lost:
            what = f"no longer knows {self._job}" if unknown else f"does not respond ({reason})"
            limit = FORGOTTEN_SECONDS if unknown else LOST_SECONDS
            self._notify(f"{self._url} {what}; trying again for up to {limit:.0f} s")
        self._lost = True
        self.wait(again=True)

    def wait(self, again: bool) -> None:
        """Wait before the next attempt, longer each time that it is one again."""
        if not again:
            self._pause = FIRST_PAUSE
        time.sleep(self._pause)
        self._pause = min(2 * self._pause, LONGEST_PAUSE)


def come_back(job: str, url: str) -> str:
    """The command that follows a job."""
    return f"raysft follow {job} --to {url}"
