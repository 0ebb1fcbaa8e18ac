"""Ray Train's controller, as the driver holds it: the actor that starts the workers, and stops them when told to."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError

STOP_SECONDS = 30
"""How long the driver waits for the workers to stop."""


@dataclass(frozen=True)
class ControllerStarted:
    """Message of the controller to the driver: its own actor handle.

    Ray Train only provides the handle in a driver's main thread, and a trial of a sweep is driven from another thread.
    """

    actor: Any


class Controller:
    """Holds the actor handle once there is one."""

    actor: Any = None

    def abort(self) -> None:
        """Stop the workers; waits at most ``STOP_SECONDS``."""
        if self.actor is not None:
            with suppress(RayError):
                ray.get(self.actor.abort.remote(), timeout=STOP_SECONDS)
