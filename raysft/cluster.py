"""The Ray cluster that a run works on."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from raysft.config import Config, RequestError


@contextmanager
def cluster(config: Config) -> Iterator[list[dict[str, float]]]:
    """Join or start the Ray cluster; gives the resources of each of its nodes, and leaves it as it was found."""
    import logging

    import ray

    mine = not ray.is_initialized()
    if mine:
        for name in ("ray", "ray.data", "ray.train", "ray.tune"):
            logging.getLogger(name).setLevel(logging.ERROR)
        # A cluster of the run's own ends with it: nobody looks at its dashboard, and each of its processes takes a part of a
        # step's cores, before which its workers would have to step back (Ray starts them with niceness 15).
        os.environ.setdefault("RAY_worker_niceness", "0")
        try:
            ray.init(
                address=config.scaling.address,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        except ConnectionError as error:
            reason = str(error).splitlines()[0]
            if config.scaling.address is None:
                raise RequestError(
                    f"the Ray cluster that this machine knows of does not answer ({reason:.120}); "
                    "`ray stop` forgets it, or set scaling.address=local for one of this run's own"
                ) from None
            raise RequestError(
                f"scaling.address={config.scaling.address}: no Ray cluster answers there ({reason:.120})"
            ) from None
    # Ray Data sets its own loggers up when it is imported.
    import ray.data

    for name in ("ray.data", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if threading.current_thread() is threading.main_thread():
        # Kubernetes ends a pod with SIGTERM, at which Ray would dump its stack; it is to end like Ctrl-C.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]
    finally:
        if mine:
            ray.shutdown()
