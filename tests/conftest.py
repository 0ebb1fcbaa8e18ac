"""What tests of several folders begin with."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from raysft.garbage import postpone_collection, resume_collection
from tests.objects import Server, s3_server
from tests.tiny import tiny_model, tiny_tokenizer


def pytest_configure() -> None:
    """Before tests import the libraries."""
    postpone_collection()


def pytest_collection_finish(session: pytest.Session) -> None:
    """When all are imported."""
    resume_collection()
    session.config.pluginmanager.register(LateImports())


class LateImports:
    """Libraries that tests import while they run are left out of collections too, once there are many.

    DeepSpeed collects garbage for each engine with ZeRO-3, which would take 0.2 s each time.
    """

    def __init__(self) -> None:
        self.known = len(sys.modules)

    def pytest_runtest_setup(self) -> None:
        if len(sys.modules) > self.known + 300:
            self.known = len(sys.modules)
            resume_collection()


@pytest.fixture(scope="module", autouse=True)
def products_of_torch() -> None:
    """Each file begins with torch's own products, whatever ran before it: on AMD processors, engines that tests make leave oneDNN's
    in the process, which round in another way, and whose buffers are larger than a tiny layer."""
    onednn = sys.modules.get("raysft.models.onednn")
    if onednn is not None and onednn._override.cache_info().currsize:
        onednn._override()._destroy()
        onednn._override.cache_clear()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A real S3 server on this machine, and credentials for it."""
    with s3_server() as server:
        yield server


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    """The folder of a tiny model, made once: a test that changes files changes those of a copy."""
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def tokenizer_with(tmp_path_factory) -> Callable[..., str]:
    """Save the tiny tokenizer, with changed attributes, and give its folder."""

    def save(**attributes: Any) -> str:
        tokenizer = tiny_tokenizer()
        for name, value in attributes.items():
            setattr(tokenizer, name, value)
        folder = str(tmp_path_factory.mktemp("tokenizer"))
        tokenizer.save_pretrained(folder)
        return folder

    return save
