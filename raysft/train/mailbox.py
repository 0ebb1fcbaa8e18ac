"""Messages between a driver and its workers: events to the driver; its request to stop, and what it generates, to them. One actor
carries them all."""

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
    """The actor behind the mailbox. Calls that wait occupy no thread."""

    def __init__(self) -> None:
        self._messages: asyncio.Queue[Any] = asyncio.Queue()
        self._stop, self._reason = asyncio.Event(), ""
        self._news, self._told, self._number = asyncio.Event(), None, 0

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

    async def tell(self, state: Any) -> None:
        self._told, self._number = state, self._number + 1
        self._news.set()
        self._news = asyncio.Event()

    async def told(self, known: int) -> tuple[int, Any]:
        if self._number == known:
            await self._news.wait()
        return self._number, self._told


class Mailbox:
    """A handle to the actor, which can be sent to other processes."""

    def __init__(self) -> None:
        """Create the actor on this node: it lives as long as the node, and reserves no CPU."""
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self._actor: Any = ray.remote(_Actor).options(num_cpus=0, scheduling_strategy=here).remote()

    def put(self, message: Any, timeout: float) -> None:
        """Send a message to the driver.

        Raises:
            RayError: the driver is gone, or does not accept it in time.
        """
        ray.get(self._actor.put.remote(message), timeout=timeout)

    def post(self, message: Any) -> None:
        """Send a message to the driver that may be lost; does not wait for it to arrive."""
        with suppress(RayError):
            self._actor.put.remote(message)

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
        """Ask all listeners to stop; does not wait for them to hear it."""
        with suppress(RayError):
            self._actor.stop.remote(reason)

    def listen(self, hear: Callable[[str], None]) -> None:
        """Call a function with the reason once the driver asks to stop. One call waits for this, so no step has to ask."""

        def wait() -> None:
            with suppress(RayError):  # the driver has ended
                hear(ray.get(self._actor.stopped.remote()))

        threading.Thread(target=wait, name="stop", daemon=True).start()

    def tell(self, state: Any) -> None:
        """Tell all followers something new, replacing what they have not heard yet; does not wait for them to hear it."""
        with suppress(RayError):
            self._actor.tell.remote(state)

    def follow(self, hear: Callable[[Any], None]) -> None:
        """Call a function with each new thing that the driver says."""

        def wait() -> None:
            number = 0
            with suppress(RayError):  # the driver has ended
                while True:
                    number, state = ray.get(self._actor.told.remote(number))
                    hear(state)

        threading.Thread(target=wait, name="generation", daemon=True).start()

    def close(self) -> None:
        """End the actor."""
        ray.kill(self._actor)
