"""A real S3 server on this machine, which answers with errors, or late, on demand."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import pytest

NUMBERS = count(1)
"""Numbers of servers: those of one process answer from the same objects."""


class Server:
    """moto's S3 behind what may go wrong on the way to it, with a bucket of its own."""

    def __init__(self) -> None:
        from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import make_server

        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self.bucket = f"bucket{next(NUMBERS)}"
        self._application = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True)
        self._faults: list[list[Any]] = []
        self.requests: list[str] = []
        """Method and path of each, with its query."""
        self.refused = 0
        """Requests that had a fault."""
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.options = f"endpoint_override=http://127.0.0.1:{self._server.server_port}&region=us-east-1"

    def uri(self, path: str) -> str:
        """The URI of a path in the bucket."""
        return f"s3://{self.bucket}/{path}?{self.options}"

    def fails(self, pattern: str, seconds: float, status: int = 503, late: float = 0.0) -> None:
        """From the first request that fits on, all that fit fail for so many seconds; ``late`` seconds after they came."""
        self._faults.append([re.compile(pattern), status, late, seconds, None])

    def heals(self) -> None:
        """No more faults."""
        self._faults = []

    def _answer(self, environment: dict[str, Any], start: Any) -> Any:
        request = f"{environment['REQUEST_METHOD']} {environment['PATH_INFO']}?{environment.get('QUERY_STRING', '')}"
        self.requests.append(request)
        fault = next((fault for fault in self._faults if fault[0].search(request)), None)
        if fault:
            _, status, late, seconds, begun = fault
            fault[-1] = begun = begun or time.monotonic()
            if time.monotonic() < begun + seconds:
                self.refused += 1
                length = int(environment.get("CONTENT_LENGTH") or 0)
                environment["wsgi.input"].read(length)
                time.sleep(late)
                start(f"{status} Fault", [("Content-Length", "0")])
                return [b""]
        return self._application(environment, start)

    def close(self) -> None:
        self._server.shutdown()


@contextmanager
def credentials() -> Iterator[None]:
    """What any S3 server of a test accepts, in the environment."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (
            ("AWS_ACCESS_KEY_ID", "somebody"),
            ("AWS_SECRET_ACCESS_KEY", "secret"),
            ("AWS_EC2_METADATA_DISABLED", "true"),
        ):
            patch.setenv(name, value)
        yield


@contextmanager
def s3_server() -> Iterator[Server]:
    """A server with one bucket, and credentials for it."""
    from pyarrow import fs

    with credentials():
        server = Server()
        filesystem, _ = fs.FileSystem.from_uri(f"s3://{server.bucket}?{server.options}&allow_bucket_creation=true")
        filesystem.create_dir(server.bucket)
        yield server
        server.close()
