"""What may ask a run to end early: signals, its time limit, a file in its run directory, and nodes that are drained."""

from __future__ import annotations

import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType

from raysft.errors import RunStopped
from raysft.run.stop_file import clear_stop_request, stop_requested
from raysft.stopping import Stopping, StopRequest, current, stoppable
from raysft.storage.lock import lost_lock
from raysft.storage.path import StoragePath

SIGNALS = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}
AGAIN_SECONDS = 1.0
"""A signal that comes this soon after the first is the same one: some programs send it to a process and to its group."""
NODE_SECONDS = 1.0
FILE_SECONDS, REMOTE_FILE_SECONDS = 1.0, 10.0
"""Time between two checks for the file, on a filesystem and in an object store."""
LOOK_SECONDS = 5.0
"""How long the run waits for the last check when it ends."""


@contextmanager
def watched(place: StoragePath, max_hours: float | None, notify: Callable[[str], None]) -> Iterator[None]:
    """Let signals, the time limit and the file in the run directory ask the block to end.

    Signals are handled in the main thread only, and their previous handlers are restored afterwards. The first one asks; where
    nothing is under way that could end in an orderly way, it interrupts as well. The second one always interrupts.

    Args:
        place: the run directory.
        max_hours: the time limit, from now on.
        notify: receives a line when the block is asked to end.

    Raises:
        RunStopped: the block was asked to end, and did.
        KeyboardInterrupt: it was interrupted by a second signal, or because another process took over the run directory.
    """
    every = FILE_SECONDS if place.local else REMOTE_FILE_SECONDS
    with stoppable() as stopping, ExitStack() as stack:
        signals = stack.enter_context(_signals(stopping))
        stack.enter_context(stopping.telling(lambda request: notify(_announcement(request, signals.active))))
        if max_hours is not None:
            stack.enter_context(
                asked_at(stopping, time.time() + 3600 * max_hours, f"train.max_hours={max_hours:g} is over")
            )
        file = stack.enter_context(_file(stopping, place))
        stack.enter_context(_repeated(file, every))
        try:
            stopping.check()
            yield
        except KeyboardInterrupt:
            if signals.insisted or not signals.first:
                raise
            raise RunStopped(f"stopped: {signals.first}") from None


def _announcement(request: StopRequest, signals: bool) -> str:
    left = (
        f", {request.until - time.time():.0f} s before the machine is taken away" if request.until is not None else ""
    )
    again = "; press Ctrl-C or send SIGTERM again to end it immediately" if signals else ""
    return f"{request.reason}: the run will end as soon as its work is saved{left}{again}"


class _Signals:
    """The handler of both signals. It takes no lock, since the code that it interrupts may hold it."""

    active = False
    """True if it is installed."""
    first = ""
    """The signal that came first."""
    insisted = False
    """True if a second one came."""

    def __init__(self, stopping: Stopping) -> None:
        self._stopping, self._at = stopping, 0.0
        self.received: queue.SimpleQueue[str] = queue.SimpleQueue()

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal."""
        now = time.monotonic()
        if lost_lock():
            self.insisted = True
            raise KeyboardInterrupt
        if self.first:
            if now - self._at < AGAIN_SECONDS:
                return
            self.insisted = True
            raise KeyboardInterrupt
        self.first, self._at = SIGNALS[signal.Signals(number)], now
        self.received.put(self.first)
        if not self._stopping.finishing:
            raise KeyboardInterrupt

    def ask(self) -> None:
        """Pass the signal on, in a separate thread."""
        if name := self.received.get():
            self._stopping.ask(name)


@contextmanager
def _signals(stopping: Stopping) -> Iterator[_Signals]:
    handler = _Signals(stopping)
    if threading.current_thread() is not threading.main_thread():
        yield handler
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    thread = threading.Thread(target=handler.ask, name="signals", daemon=True)
    thread.start()
    handler.active = True
    for number, old in before.items():
        if old != signal.SIG_IGN:  # a process in the background may ignore Ctrl-C
            signal.signal(number, handler)
    try:
        yield handler
    finally:
        for number, old in before.items():
            # A handler that was not installed from Python is unknown.
            signal.signal(number, signal.SIG_DFL if old is None else old)
        handler.received.put("")
        thread.join(LOOK_SECONDS)


@contextmanager
def asked_at(stopping: Stopping, moment: float, reason: str) -> Iterator[None]:
    """Ask the block to end at a given time, in seconds since 1970."""
    timer = threading.Timer(min(threading.TIMEOUT_MAX, max(0.0, moment - time.time())), stopping.ask, [reason])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def _file(stopping: Stopping, place: StoragePath) -> Iterator[Callable[[], None]]:
    """Yield a function that looks for the file; remove it at the end if it was found, so that the same command continues."""
    found: list[str] = []

    def look() -> None:
        if not found and (reason := stop_requested(place)):
            found.append(reason)
            stopping.ask(reason)

    try:
        look()
        yield look
    finally:
        if found or stop_requested(place):  # including one that came while the run was ending
            clear_stop_request(place)


@contextmanager
def watched_node() -> Iterator[None]:
    """Ask the block to end when the node that this process runs on is drained: a driver cannot move to another node.

    Workers on a drained node save a checkpoint, and restart on other nodes.
    """
    import ray

    from raysft.cluster.ray_internals import draining_nodes

    stopping = current()

    def look() -> None:
        try:
            if not ray.is_initialized():
                return
            own = ray.get_runtime_context().get_node_id()
            draining = draining_nodes()
        except Exception:  # the cluster does not respond; the next check may succeed
            return
        if own in draining:
            stopping.ask(f"the driver's node {own[:8]} is drained", draining[own], True)

    with _repeated(look, NODE_SECONDS):
        yield


@contextmanager
def _repeated(look: Callable[[], None], seconds: float) -> Iterator[None]:
    """Call a function repeatedly in a separate thread: one that waits for storage or a cluster does not delay the others."""
    done = threading.Event()

    def run() -> None:
        while not done.wait(seconds):
            look()

    thread = threading.Thread(target=run, name="stop", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(LOOK_SECONDS)
