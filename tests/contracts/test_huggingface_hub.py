"""huggingface_hub: the client that all of its requests go through."""

from __future__ import annotations

import httpx2
import huggingface_hub
from huggingface_hub.utils import _http

from tests.contracts.contract import Contract

HUB = Contract("huggingface_hub", "raysft/storage/hub.py")


def test_clients_are_made_by_a_factory_that_can_be_replaced():
    HUB.positional(HUB.name(huggingface_hub, "set_client_factory"), 1)
    with HUB.name(_http, "default_client_factory")() as client:
        assert isinstance(client, httpx2.Client), f"look at {HUB.line('httpx2')}"
        HUB.positional(HUB.name(client, "send"), 1, "made.send")


def test_a_request_knows_the_file_that_it_sends(tmp_path):
    (tmp_path / "file").write_bytes(b"content")
    with (tmp_path / "file").open("rb") as file:
        request = httpx2.Request("PUT", "http://hub", content=file)
        assert HUB.name(request.stream, "_stream") is file
