"""modelscope_hub: the bars that its downloads draw."""

from __future__ import annotations

import inspect

import pytest

from tests.contracts.contract import Contract

MODELSCOPE = Contract("modelscope-hub", "raysft/storage/modelscope_internals.py")


def test_bars_are_drawn_by_the_name_that_is_replaced():
    download = pytest.importorskip("modelscope_hub._download")
    MODELSCOPE.name(download, "tqdm")
    assert "with tqdm(" in inspect.getsource(download.DownloadManager._download_with_resume)
