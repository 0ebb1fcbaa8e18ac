"""The log of a job on Kubernetes, read by kubectl from the file that Ray writes in the head's pod.

KubeRay starts the job by HTTP, so that no pod has its log as its own. A connection that breaks is opened again from the log's
beginning.
"""

from __future__ import annotations

import codecs
import os
import select
import subprocess
import tempfile
import time

from raysft.errors import one_line
from raysft.submit.kubernetes.kubectl import KubectlFailed, kubectl, program
from raysft.submit.shown_log import ShownLog

CONTAINER = "ray-head"
QUIET_SECONDS, LONGEST_QUIET = 60.0, 960.0
"""After so long without output the log is opened again, as a connection may die without a sign; doubles if nothing was lost."""
BYTES = 1 << 16


def log_file(job_id: str) -> str:
    """Where Ray writes what a job prints."""
    return f"/tmp/ray/session_latest/logs/job-driver-{job_id}.log"


class LogStream:
    """Shows a job's log while it grows; a process of kubectl reads it."""

    def __init__(self, pod: str, job_id: str, namespace: list[str], log: ShownLog) -> None:
        """
        Args:
            pod: of the head.
            job_id: submission id of the job.
            namespace: option of kubectl.
            log: shows each part once.
        """
        self.pod, self.job_id = pod, job_id
        self._namespace, self._log = namespace, log
        self._process: subprocess.Popen[bytes] | None = None
        self._quiet, self._shown = QUIET_SECONDS, log.shown

    def read(self, seconds: float) -> str | None:
        """Show what comes within a time.

        Returns:
            Why the log cannot be read now; empty if it can, None if it can and something new was shown.
        """
        limit, before = time.monotonic() + seconds, self._log.shown
        process = self._process or self._open()
        assert process.stdout
        while (left := limit - time.monotonic()) > 0:
            if not select.select([process.stdout], [], [], left)[0]:
                break
            part = os.read(process.stdout.fileno(), BYTES)
            if not part:
                reason = self._reason()
                self.close()
                return reason
            self._heard = time.monotonic()
            self._log.feed(self._decoder.decode(part))
        if time.monotonic() - self._heard > self._quiet:
            grew = self._log.shown > self._shown
            self._quiet = QUIET_SECONDS if grew else min(2 * self._quiet, LONGEST_QUIET)
            self.close()
        return None if self._log.shown > before else ""

    def _open(self) -> subprocess.Popen[bytes]:
        self._log.restart()
        self._shown, self._heard = self._log.shown, time.monotonic()
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed in ``close``
        # By name, as the file may not be there yet.
        tail = ["tail", "-n", "+1", "-F", log_file(self.job_id)]
        self._process = subprocess.Popen(
            [program(), "exec", self.pod, *self._namespace, "--container", CONTAINER, "--", *tail],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            start_new_session=True,  # Ctrl-C is for this process
        )
        return self._process

    def _reason(self) -> str:
        """Why kubectl has ended."""
        assert self._process
        self._process.wait()
        self._errors.seek(0)
        lines = [line for line in self._errors.read().decode(errors="replace").splitlines() if line.strip()]
        return one_line(lines[-1]) if lines else "the connection was closed"

    def close(self) -> None:
        """End the connection."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            assert self._process.stdout
            self._process.stdout.close()
            self._errors.close()
            self._process = None

    def rest(self) -> str:
        """Show what is left of the log of a job that has ended; returns why it cannot be read, empty if it can."""
        self.close()
        where = (self.pod, *self._namespace, "--container", CONTAINER)
        try:
            whole = kubectl("exec", *where, "--", "cat", log_file(self.job_id))
        except KubectlFailed as error:
            return error.reason
        self._log.restart()
        self._log.feed(whole)
        return ""

    def stop_job(self) -> None:
        """Have the job stopped, by Ray's own command in the head's pod.

        Raises:
            RequestError: it could not be asked to stop.
        """
        where = (self.pod, *self._namespace, "--container", CONTAINER)
        kubectl("exec", *where, "--", "ray", "job", "stop", "--no-wait", self.job_id)
