"""Follow a RayJob to its end through kubectl: what KubeRay does with it, and what it prints."""

from __future__ import annotations

import time
from collections.abc import Callable

from raysft.errors import RequestError, RunFailed, one_line
from raysft.submit.following import INTERRUPTED, Lost, pressed_again
from raysft.submit.kubernetes.kubectl import KubectlFailed
from raysft.submit.kubernetes.log_stream import LogStream
from raysft.submit.kubernetes.ray_job_state import INVALID, RETRYING, RayJobState, ask
from raysft.submit.request import STOP_SECONDS
from raysft.submit.shown_log import ShownLog

POLL_SECONDS = 5.0
"""Time between two questions to Kubernetes."""
LOST_SECONDS = 600.0
"""How long Kubernetes may not respond."""
REST_SECONDS = 30.0
"""How long the log of a job that has ended is asked for."""

Notify = Callable[[str], None]


def follow_to_end(name: str, namespace: list[str], notify: Notify, log: ShownLog) -> int:
    """Show a job's output until it has ended, and return its exit code; Ctrl-C detaches, twice stops the job.

    Args:
        name: of the RayJob.
        namespace: option of kubectl.
        notify: receives a line for each thing that happens besides the output.
        log: shows the output.

    Raises:
        RequestError: kubectl may not do it, or KubeRay refuses the document.
        RunFailed: the job is gone.
        Lost: Kubernetes no longer answers.
    """
    followed = _Followed(name, namespace, notify, log)
    stopping = False
    while True:
        try:
            state = followed.to_end()
            break
        except KeyboardInterrupt:
            if stopping or not pressed_again(name):
                notify(f"\n{name}: is still running; the same command attaches to it again")
                return INTERRUPTED
            stopping = True
            followed.stop()
        finally:
            followed.close()
    if state.deployment == INVALID:
        raise RequestError(f"KubeRay rejects RayJob {name} ({one_line(state.message)}); install KubeRay 1.7 or newer")
    notify(f"{name}: has {state.ending(log.tail)}")
    return state.exit_code(log.tail)


class _Followed:
    """One RayJob, what is known of it, and its log."""

    def __init__(self, name: str, namespace: list[str], notify: Notify, log: ShownLog) -> None:
        self._name, self._namespace, self._notify, self._log = name, namespace, notify, log
        self._stream: LogStream | None = None
        self._state: RayJobState | None = None
        self._answered = time.monotonic()
        self._silent = self._unreadable = False
        """True once it was said that Kubernetes does not respond, or that the log cannot be read."""

    def to_end(self) -> RayJobState:
        """Show what happens until the job has ended; returns its last state."""
        while True:
            state = self._ask()
            if state is not None:
                self._tell(state)
                if state.ended:
                    return state
            began = time.monotonic()
            if self._stream is not None:
                self._show(self._stream)
            time.sleep(max(0.0, POLL_SECONDS - (time.monotonic() - began)))

    def _ask(self) -> RayJobState | None:
        """Ask Kubernetes; None if it does not respond now.

        Raises:
            RunFailed: the job is gone.
            Lost: Kubernetes has not responded for too long.
        """
        try:
            found = ask(self._name, self._namespace)
        except KubectlFailed as error:
            silent = time.monotonic() - self._answered
            if self._state is None:
                raise
            if silent > LOST_SECONDS:
                raise Lost(
                    f"Kubernetes has not responded for {silent / 60:.0f} minutes ({error.reason}); {self._name} may be running: "
                    "the same command attaches to it again"
                ) from None
            if not self._silent:
                self._notify(
                    f"Kubernetes does not respond ({error.reason}); trying again for up to {LOST_SECONDS:.0f} s"
                )
            self._silent = True
            return None
        if self._silent:
            self._notify("Kubernetes answers again")
        self._silent, self._answered = False, time.monotonic()
        if found is None:
            raise RunFailed(
                f"RayJob {self._name} no longer exists, because it was deleted; the same command starts it again"
            )
        return found

    def _tell(self, state: RayJobState) -> None:
        """Say what KubeRay does now, and take up the log of a new attempt."""
        before, self._state = self._state, state
        if state.deployment and (before is None or before.deployment != state.deployment) and not state.ended:
            again = ""
            if state.deployment == RETRYING:
                self._show_rest(state)
                again = f" (attempt {state.failures} of {state.attempts} has {state.ending(self._log.tail)})"
            self._notify(f"{self._name}: {state.deployment.lower()}{again}")
        if state.ended:
            self._show_rest(state)
        elif state.head and state.job_id and state.job and state.deployment != RETRYING:
            stream = self._stream
            if stream is None or (stream.pod, stream.job_id) != (state.head, state.job_id):
                self.close()
                self._stream = LogStream(state.head, state.job_id, self._namespace, self._log)

    def _show(self, stream: LogStream) -> None:
        reason = stream.read(POLL_SECONDS)
        if reason and not self._unreadable:
            self._notify(f"the log in pod {stream.pod} cannot be read now ({reason}); trying again")
        elif reason is None and self._unreadable:
            self._notify(f"the log in pod {stream.pod} can be read again")
        if reason != "":
            self._unreadable = bool(reason)

    def _show_rest(self, state: RayJobState) -> None:
        """Show what an attempt that has ended has printed since its log was read last."""
        stream, limit = self._stream, time.monotonic() + REST_SECONDS
        self.close()
        self._stream = None
        if stream is None and state.head and state.job_id:
            stream = LogStream(state.head, state.job_id, self._namespace, self._log)
        while stream is not None and (reason := stream.rest()):
            if time.monotonic() > limit or "not found" in reason.lower():
                self._notify(f"{self._name}: the end of its log cannot be read ({reason})")
                return
            time.sleep(1)

    def stop(self) -> None:
        """Have the job stopped."""
        stream = self._stream
        if stream is None:
            delete = " ".join(["kubectl delete rayjob", self._name, *self._namespace])
            raise RequestError(f"{self._name}: is not running yet, so there is nothing to stop; {delete} removes it")
        stream.stop_job()
        self._notify(f"\n{self._name}: was asked to stop; it has {STOP_SECONDS} s to write a checkpoint")

    def close(self) -> None:
        """End the connection to the log."""
        if self._stream is not None:
            self._stream.close()
