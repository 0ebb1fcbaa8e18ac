"""What tests of several folders begin with."""

from collections.abc import Iterator

import pytest

from tests.objects import Server, s3_server


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A real S3 server on this machine, and credentials for it."""
    with s3_server() as server:
        yield server
