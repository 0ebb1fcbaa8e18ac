"""The subsets (configs) of a dataset on the Hugging Face Hub."""

from __future__ import annotations

from functools import lru_cache

from pyarrow import fs

from raysft.errors import RequestError
from raysft.storage import hub
from raysft.storage.filesystems import filesystem_of


def default_subset(dataset: str, where: str) -> str:
    """Return the subset that ``datasets`` takes where none is named: ``default``, or the only one.

    Args:
        dataset: ``OWNER/NAME`` on the Hub.
        where: the registry's entry, for messages.

    Raises:
        RequestError: there are several, or the hub does not say.
    """
    try:
        subsets = list_subsets(dataset)
    except hub.error_types() as error:
        reason = hub.reason_of(error) or hub.UNUSABLE
        raise RequestError(f"{where}: the subsets of {dataset} on the Hub cannot be listed: {reason}") from None
    if "default" in subsets:
        return "default"
    if len(subsets) == 1:
        return subsets[0]
    if not subsets:
        raise RequestError(
            f"{where}: the Hub has no Parquet files of {dataset} (branch ~parquet); set folder to read the dataset's own files"
        )
    names = f"{', '.join(subsets[:20])}{' …' if len(subsets) > 20 else ''}"
    raise RequestError(f"{where}: {dataset} has {len(subsets)} subsets; set subset to one of {names}")


@lru_cache(maxsize=64)
def list_subsets(dataset: str) -> tuple[str, ...]:
    """List the subsets, which are folders in the branch ``~parquet``."""
    filesystem, path = filesystem_of(f"hf://datasets/{dataset}@~parquet")
    infos = filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True))
    return tuple(sorted(info.base_name for info in infos if info.type == fs.FileType.Directory))
