"""Messages between a driver and its workers: events to the driver, and its request to stop to them. One actor carries both."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


class _Actor:
    """What the mailbox holds. Calls that wait take no thread."""

    def __init__(self) -> None:
        self._messages: asyncio.Queue[Any] = asyncio.Queue()
        self._stop, self._reason = asyncio.Event(), ""

    async def put(self, message: Any) -> None:
        await self._messages.put(message)

    async def get(self, seconds: float) -> list[Any]:
        try:
            return [await asyncio.wait_for(self._messages.get(), seconds)]
        except TimeoutError:
            return []

    async def stop(self, reason: str) -> None:
        self._reason = reason
        self._stop.set()

    async def stopped(self) -> str:
        await self._stop.wait()
        return self._reason


class Mailbox:
    """A handle of the actor, which can be sent to other processes."""

    def __init__(self) -> None:
        """Create the actor on this node: it lives as long as the node, and reserves no CPU."""
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self._actor: Any = ray.remote(_Actor).options(num_cpus=0, scheduling_strategy=here).remote()

    def put(self, message: Any, timeout: float) -> None:
        """Send a message to the driver.

        Raises:
            RayError: the driver is gone, or does not take it in time.
        """
        ray.get(self._actor.put.remote(message), timeout=timeout)

    def get(self, timeout: float) -> Any:
        """Return the next message.

        Raises:
            queue.Empty: there is none in time.
            RayError: the actor is gone.
        """
        for message in ray.get(self._actor.get.remote(timeout)):
            return message
        raise queue.Empty

    def stop(self, reason: str) -> None:
        """Ask those who listen to stop; does not wait until they know."""
        with suppress(RayError):
            self._actor.stop.remote(reason)

    def listen(self, hear: Callable[[str], None]) -> None:
        """Call a function with the reason once the driver asks to stop. One call waits for it, and no step has to ask."""

        def wait() -> None:
            with suppress(RayError):  # the driver has ended
                hear(ray.get(self._actor.stopped.remote()))

        threading.Thread(target=wait, name="stop", daemon=True).start()

    def close(self) -> None:
        """End the actor."""
        ray.kill(self._actor)
