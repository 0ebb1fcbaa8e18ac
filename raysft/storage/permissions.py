"""Who may read files that libraries write."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path


def let_others_read(folder: Path) -> None:
    """Give files of weights the permissions of the other files of a model: safetensors lets nobody but their owner read them."""
    with suppress(OSError):
        usual = next(path for name in ("config.json", "adapter_config.json") if (path := folder / name).exists())
        for path in folder.glob("*.safetensors"):
            path.chmod(usual.stat().st_mode)
