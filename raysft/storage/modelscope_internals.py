"""The private part of ModelScope's library that raysft uses; ``tests/contracts/test_modelscope_hub.py`` checks that it exists."""

from __future__ import annotations

from functools import partial


def hide_bars() -> None:
    """Draw no progress bar for each file, as on other hubs."""
    from modelscope_hub import _download  # pyright: ignore[reportMissingImports]
    from tqdm import tqdm

    _download.tqdm = partial(tqdm, disable=True)  # pyright: ignore[reportPrivateImportUsage, reportAttributeAccessIssue]
