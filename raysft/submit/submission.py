"""Submit a config as a job of Ray's Jobs API, once: the same config again attaches to the job that runs."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import TypeVar

from ray.job_submission import JobDetails, JobStatus

from raysft.config import Config
from raysft.config.verb import verb_of
from raysft.errors import RequestError, RunFailed, one_line
from raysft.run.verb_checks import check_verb
from raysft.storage.path import StoragePath
from raysft.submit.address import dashboard_url, short_reason
from raysft.submit.follow import come_back, exit_code, follow
from raysft.submit.follow_run import go_on_from_files
from raysft.submit.following import INTERRUPTED, Lost, pressed_again
from raysft.submit.jobs_internals import Jobs, JobTaken, UnknownJob, Unreachable
from raysft.submit.request import CONFIG_NAME, STOP_SECONDS, JobRequest, commit_of, job_request
from raysft.submit.shown_log import ShownLog, own_exit_code, show

STOPPED_SECONDS = STOP_SECONDS + 30.0
"""How long a job that is asked to stop may run on."""
ANSWER_SECONDS = 60.0
"""How long a cluster that was reached may not respond a request of a command that does not follow a job."""
POLL_SECONDS = 1.0
STOPPED_EARLY = 75
"""Exit code of a run that ended before its end because it was asked to, with a checkpoint."""
ATTEMPTS = 3
"""Attempts at a number that another process takes at the same moment."""

Notify = Callable[[str], None]
Answer = TypeVar("Answer")


def submit(config: Config, address: str, folder: Path, following: bool, allow_changed: bool, notify: Notify) -> int:
    """Submit a config, attach to the job that runs it, or say that it is done.

    Args:
        config: the resolved config.
        address: of the cluster's dashboard.
        folder: that the config's file lies in.
        following: follow the job to its end.
        allow_changed: resume a run that started with other settings.
        notify: receives a line for each thing that happened.

    Returns:
        The exit code: that of the job if it was followed to its end, otherwise 0.

    Raises:
        RequestError: the config or the address is wrong, or the cluster refuses this machine.
        RunFailed: the cluster could not start the job, or was lost.
    """
    url = dashboard_url(address)
    check_verb(config, verb_of(config))
    request = job_request(config, allow_changed, commit_of(folder))
    jobs = Jobs(url)
    job, ended = _start_or_find(jobs, request, notify)
    if ended:
        return 0
    if following:
        return follow_to_end(jobs, job, notify, config.run_place)
    notify(f"follow it: {come_back(job, url)}")
    return 0


def _start_or_find(jobs: Jobs, request: JobRequest, notify: Notify) -> tuple[str, bool]:
    """Return the job of a request, started if need be, and whether it was done before."""
    for _ in range(ATTEMPTS):
        known = _ask(jobs, jobs.all)
        mine = {number: job for job in known if (number := request.number(job.submission_id or "")) is not None}
        last = mine[max(mine)] if mine else None
        if last is not None and last.submission_id and not last.status.is_terminal():
            notify(f"{last.submission_id}: is already {last.status.value.lower()}; nothing was submitted")
            return last.submission_id, False
        if last is not None and last.submission_id and last.status == JobStatus.SUCCEEDED:
            notify(f"{last.submission_id}: is done (run directory {request.place}); another run.name starts a new run")
            return last.submission_id, True
        refuse_taken(request, known, jobs.url)
        job = f"{request.prefix}{max(mine, default=0) + 1}"
        try:
            start(jobs, job, request)
        except JobTaken:
            continue  # by another process, just now
        after = f", as {last.submission_id} has {_ending(last)}" if last is not None else ""
        notify(f"{job}: submitted to {jobs.url} (run directory {request.place}){after}")
        return job, False
    raise RunFailed(
        f"{jobs.url}: other processes submit the same config; run the same command again to attach to their job"
    )


def refuse_taken(request: JobRequest, known: Sequence[JobDetails], url: str) -> None:
    """Refuse a run whose run directory a job with another config is working in."""
    for job in known:
        about = job.metadata or {}
        if about.get("run_directory") == request.place and not job.status.is_terminal():
            raise RequestError(
                f"run.name={request.name}: {job.submission_id} is {job.status.value.lower()} with another config in "
                f"{request.place}; stop it (raysft stop {job.submission_id} --to {url}), or choose another run.name"
            )


def start(jobs: Jobs, job: str, request: JobRequest) -> None:
    """Start a job under a name.

    Raises:
        JobTaken: there is a job of this name.
    """
    with tempfile.TemporaryDirectory(prefix="raysft-job-") as folder:
        (Path(folder) / CONFIG_NAME).write_text(request.config, encoding="utf-8", errors="backslashreplace")
        runtime_env = {"working_dir": folder, "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)}}
        _ask(jobs, lambda: jobs.submit(job, request.entrypoint, runtime_env, request.metadata))


def follow_to_end(jobs: Jobs, job: str, notify: Notify, place: StoragePath | None = None) -> int:
    """Show a job's output until it has ended, and return its exit code; Ctrl-C detaches, twice stops the job.

    If the cluster does not come back, its progress is shown from its run directory, where that can be seen.
    """
    log, stopping = ShownLog(show), False
    while True:
        try:
            details = follow(jobs, job, log, _complain)
            break
        except UnknownJob:
            raise _unknown(jobs, job) from None
        except Lost as lost:
            return go_on_from_files(place, lost, log.tail, notify)
        except KeyboardInterrupt:
            if stopping or not pressed_again(job):
                notify(f"\n{job}: is still running; come back with: {come_back(job, jobs.url)}")
                return INTERRUPTED
            stopping = True
            notify(f"\n{job}: was asked to stop; it has {STOP_SECONDS} s to write a checkpoint")
            with suppress(UnknownJob):  # its head has restarted, which following it tells
                _ask(jobs, lambda: jobs.stop(job))
    notify(f"{job}: has {_ending(details, log.tail)}{_reason(details)}")
    return exit_code(details, log.tail)


def job_status(address: str, job: str, notify: Notify) -> None:
    """Print what a cluster knows about a job, and what to do next."""
    jobs = _jobs(address, job)
    details = _details(jobs, job)
    ended = details.status.is_terminal()
    notify(f"{job}: {f'has {_ending(details)}' if ended else f'is {details.status.value.lower()}'}{_reason(details)}")
    for name, moment in (("submitted", details.start_time), ("ended", details.end_time)):
        if moment:
            notify(f"{name}: {datetime.fromtimestamp(moment / 1000).isoformat(' ', 'seconds')}")
    for name, value in (details.metadata or {}).items():
        notify(f"{name.replace('_', ' ')}: {value}")
    if line := _last_line(jobs, job):
        notify(f"last line: {line}")
    if not ended:
        notify(f"next: {come_back(job, jobs.url)}, or raysft stop {job} --to {jobs.url}")
    elif exit_code(details):
        notify("next: run the command that submitted it again, and it resumes from its newest checkpoint")


def follow_job(address: str, job: str, notify: Notify) -> int:
    """Show a job's output until it has ended, and return its exit code."""
    return follow_to_end(_jobs(address, job), job, notify)


def stop_job(address: str, job: str, notify: Notify) -> None:
    """Stop a job, wait until it has ended, and say how.

    Raises:
        RunFailed: it has not ended in time.
    """
    jobs = _jobs(address, job)
    details = _details(jobs, job)
    if details.status.is_terminal():
        notify(f"{job}: has {_ending(details)} before{_reason(details)}")
        return
    with suppress(UnknownJob):  # from one request to the next; the next one tells
        _ask(jobs, lambda: jobs.stop(job))
    notify(f"{job}: was asked to stop; it has {STOP_SECONDS} s to write a checkpoint")
    limit = time.monotonic() + STOPPED_SECONDS
    while not details.status.is_terminal():
        if time.monotonic() > limit:
            raise RunFailed(
                f"{job}: is {details.status.value.lower()} {STOPPED_SECONDS:.0f} s after it was asked to stop; look at its "
                f"nodes, or ask again: raysft stop {job} --to {jobs.url}"
            )
        time.sleep(POLL_SECONDS)
        try:
            details = jobs.details(job)
        except Unreachable:
            continue
        except UnknownJob:
            raise RunFailed(
                f"{jobs.url} no longer knows {job}, so its head was restarted and the job has ended; submit it again, and it "
                "resumes from its newest checkpoint"
            ) from None
    line = _last_line(jobs, job)
    notify(f"{job}: has {_ending(details)}" + (f"; its last line: {line}" if line else ""))


def _jobs(address: str, job: str) -> Jobs:
    """Connect to the cluster of a job."""
    if job in ("", ".", ".."):  # in a URL they name no job, but the list of all
        raise RequestError(f"{job!r} is not a job name; use the name that raysft submit prints")
    return Jobs(dashboard_url(address))


def _details(jobs: Jobs, job: str) -> JobDetails:
    try:
        return _ask(jobs, lambda: jobs.details(job))
    except UnknownJob:
        raise _unknown(jobs, job) from None


def _unknown(jobs: Jobs, job: str) -> RequestError:
    known = sorted(found.submission_id or "" for found in _ask(jobs, jobs.all))
    names = f"it knows {', '.join(known[-3:])}" if known else "it knows no job"
    return RequestError(f"{job}: {jobs.url} has no such job; {names}")


def _ask(jobs: Jobs, request: Callable[[], Answer]) -> Answer:
    """Make a request that may be made twice; a cluster that has just started has no agent yet that takes jobs."""
    limit = time.monotonic() + ANSWER_SECONDS
    while True:
        try:
            return request()
        except Unreachable as error:
            if time.monotonic() > limit:
                reason = short_reason(str(error))
                raise RunFailed(f"{jobs.url} does not respond ({reason}); run the same command again") from None
            time.sleep(POLL_SECONDS)


def _ending(details: JobDetails, log: str = "") -> str:
    """How a job has ended, as a participle; ``log`` is the end of what it has printed."""
    if details.status == JobStatus.SUCCEEDED:
        return "succeeded"
    if details.status == JobStatus.STOPPED:
        named = own_exit_code(log)
        return "been stopped" if named is None else f"ended with exit code {named}"
    if exit_code(details) == STOPPED_EARLY:
        return f"stopped early (exit code {STOPPED_EARLY}); the same command resumes it"
    return f"failed with exit code {exit_code(details)}"


def _reason(details: JobDetails) -> str:
    """Ray's own reason for a failure, if the job itself could not give one."""
    if details.status != JobStatus.FAILED or details.driver_exit_code is not None or not details.message:
        return ""
    return f" ({one_line(details.message)})"


def _last_line(jobs: Jobs, job: str) -> str:
    """The last line that a job has printed; empty if it cannot be read."""
    try:
        lines = [line for line in jobs.log(job).splitlines() if line.strip()]
    except (Unreachable, UnknownJob):
        return ""
    return lines[-1].strip() if lines else ""


def _complain(line: str) -> None:
    print(f"raysft: {line}", file=sys.stderr, flush=True)
