"""The subsets and splits of a dataset on ModelScope, which are known by the names of its files."""

from __future__ import annotations

import re

from raysft.data.sources.readers import COMPRESSIONS, READERS
from raysft.errors import RequestError
from raysft.storage.modelscope import list_files

SPLITS = ("train", "training", "test", "testing", "validation", "valid", "val", "dev", "eval", "evaluation")


def files_of_part(dataset: str, subset: str | None, split: str | None, where: str) -> str | list[str]:
    """Return the locations of the files of a subset and split.

    Args:
        dataset: ``ORG/NAME``, which may end with ``@REVISION``.
        subset: a folder, or a word of the files' names. Default: all.
        split: a word of the files' names or folders. Default: ``train``, or all files if none is named for a split.
        where: the registry's entry, for messages.

    Raises:
        RequestError: no file is named for them.
    """
    root = f"ms://datasets/{dataset}"
    endings = tuple(ending + more for ending in (e for es in READERS for e in es) for more in ("", *COMPRESSIONS))
    metadata = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
    files = [
        file
        for file in list_files(root)
        if file.lower().endswith(endings) and not file.startswith(".") and file.rpartition("/")[2] not in metadata
    ]
    chosen = [file for file in files if subset is None or _names(file, subset)]
    if any(_names(file, word) for file in files for word in SPLITS) or split not in (None, "train"):
        chosen = [file for file in chosen if _names(file, split or "train")]
    if not chosen:
        part = " and ".join(f"{key} {value!r}" for key, value in (("subset", subset), ("split", split)) if value)
        shown = f"{', '.join(files[:10])}{' …' if len(files) > 10 else ''}" or "none"
        raise RequestError(
            f"{where}: no data file in {root} has a name that matches {part or 'the split train'}; set folder to one of its "
            f"files: {shown}"
        )
    return [f"{root}/{file}" for file in chosen]


def _names(file: str, word: str) -> bool:
    """True if a path has the word as a separate part: ``data/train-00000.parquet`` has ``train``."""
    return re.search(rf"(?<![^\W_]){re.escape(word)}(?![^\W_])", file) is not None
