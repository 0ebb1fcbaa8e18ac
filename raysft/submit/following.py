"""What all ways to follow a job share: Ctrl-C, which once leaves it running and twice stops it, and a cluster that is lost."""

from __future__ import annotations

import time

from raysft.errors import RunFailed

SECOND_SECONDS = 3.0
"""Time for a second Ctrl-C after the first."""
INTERRUPTED = 130
"""Exit code of a command that was interrupted, and of a job that was stopped, for which Ray keeps none."""


class Lost(RunFailed):
    """A cluster has not responded for so long that its job can no longer be followed there."""

    def __init__(self, text: str, run_directory: str = "") -> None:
        super().__init__(text)
        self.run_directory = run_directory
        """That of the job, as the cluster has told it."""


def pressed_again(job: str) -> bool:
    """Wait a moment for a second Ctrl-C, and return True if it comes."""
    try:
        print(f"\n{job}: press Ctrl-C again within {SECOND_SECONDS:.0f} s to stop it", flush=True)
        time.sleep(SECOND_SECONDS)
    except KeyboardInterrupt:
        return True
    return False
