"""Where the dataset of a registry's entry lies: its path, and the slice that its split names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raysft.data.sources.hub_subsets import default_subset
from raysft.data.sources.modelscope_parts import files_of_part
from raysft.errors import RequestError
from raysft.storage.modelscope import prefers_modelscope
from raysft.storage.path import SCHEMES

LOCATION_KEYS = ("hf_hub_url", "script_url", "cloud_file_name", "file_name")
"""Keys that locate a dataset. LLaMA-Factory takes one of several; raysft refuses them, as the intended one is unclear."""
MODELSCOPE_KEY = "ms_hub_url"
"""A dataset on ModelScope: used if there is no ``hf_hub_url``, or instead of it with ``USE_MODELSCOPE_HUB=1``."""
OTHER_HUB_KEYS = ("om_hub_url",)
"""Mirrors on other hubs, which are not used."""
MIRROR_KEYS = ("hf_hub_url", MODELSCOPE_KEY, *OTHER_HUB_KEYS)
"""Keys that may stand side by side, as they give the same dataset on several hubs."""
HUB_KEYS = ("subset", "split", "folder")
"""Keys that select a part of a dataset on the hub."""


def without_slice(entry: dict[str, Any], where: str) -> tuple[dict[str, Any], str | None]:
    """Take the slice of its records from the split of an entry: ``train[:1000]`` is the slice ``:1000`` of ``train``.

    Raises:
        RequestError: the split is neither a name nor a slice of one.
    """
    split = entry.get("split")
    if not isinstance(split, str) or not set("[]+") & set(split):
        return entry, None
    found = re.fullmatch(r"(\w[\w.-]*)\[([^\[\]]*)\]", split)
    if not found:
        raise RequestError(
            f"{where} has split={split!r}, but a source must be one split or a slice of one; name one, such as train or "
            "train[:1000], and add separate entries for others"
        )
    return {**entry, "split": found[1]}, found[2]


def location(entry: Mapping[str, Any], where: str, folder: Path) -> str | list[str]:
    """Return the path of an entry's dataset, or the paths of its files.

    Args:
        entry: the entry, without keys that are null.
        where: the entry, for messages.
        folder: the registry's folder.

    Raises:
        RequestError: the entry names no place, several, or one that cannot be read.
    """
    locations = [key for key in (*LOCATION_KEYS, MODELSCOPE_KEY, *OTHER_HUB_KEYS) if key in entry]
    for key in (*locations, *(key for key in HUB_KEYS if key in entry)):
        if not isinstance(entry[key], str) or not entry[key]:
            raise RequestError(f"{where}: {key} must be a name, but is {entry[key]!r:.40}; correct the entry")
    if set(locations) <= set(MIRROR_KEYS):
        preferred = [MODELSCOPE_KEY, "hf_hub_url"] if prefers_modelscope() else ["hf_hub_url", MODELSCOPE_KEY]
        locations = [key for key in preferred if key in entry][:1]
    if len(locations) > 1:
        raise RequestError(f"{where} must have one location, but has {' and '.join(locations)}; remove one of them")
    if not locations or locations == ["script_url"]:
        kinds = ", ".join(key for key in (*locations, *OTHER_HUB_KEYS) if key in entry) or "no location"
        download = ", or download the dataset and set file_name to its folder" if kinds != "no location" else ""
        raise RequestError(
            f"{where} has {kinds}; set file_name, cloud_file_name, hf_hub_url or ms_hub_url instead{download}"
        )
    if locations == ["hf_hub_url"]:
        return _in_hub(entry, where)
    if locations == [MODELSCOPE_KEY]:
        return _in_modelscope(entry, where)
    for key in HUB_KEYS:
        if key in entry and (key, entry[key]) != ("split", "train"):
            raise RequestError(
                f"{where} has {key}={entry[key]!r}, but names a single file; remove {key}, and name the file of that part "
                "instead"
            )
    if locations == ["cloud_file_name"]:
        return _in_cloud(entry["cloud_file_name"], where)
    if "://" in entry["file_name"]:
        raise RequestError(
            f"{where}: file_name must be a path, but is {entry['file_name']!r:.60}; "
            "set cloud_file_name, hf_hub_url or ms_hub_url instead"
        )
    return str(folder / entry["file_name"])


def _in_cloud(uri: str, where: str) -> str:
    scheme, found, _ = uri.partition("://")
    if not found or scheme not in SCHEMES:
        raise RequestError(
            f"{where}: cloud_file_name must begin with one of {', '.join(f'{known}://' for known in SCHEMES)}, but is "
            f"{uri!r:.60}; use file_name for files on this machine"
        )
    return uri


def _hub_id(entry: Mapping[str, Any], key: str, where: str) -> str:
    """The dataset that an entry takes from a hub, once it is certain that the entry's names do not change the path's meaning."""
    revision = r"(@[\w.-]+)?" if key == MODELSCOPE_KEY else ""
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?" + revision, entry[key]):
        raise RequestError(
            f"{where}: {key} must be OWNER/NAME, but is {entry[key]!r:.60}; use file_name for files on this machine"
        )
    for part in HUB_KEYS:
        value = entry.get(part, "")
        if re.search(r"[*?\[\]@]", value) or ".." in value.split("/") or (part != "folder" and "/" in value):
            raise RequestError(
                f"{where}: {part} must be a name in the dataset, but is {value!r:.60}; correct the entry"
            )
    return entry[key]


def _in_hub(entry: Mapping[str, Any], where: str) -> str:
    dataset, (subset, split, folder) = _hub_id(entry, "hf_hub_url", where), (entry.get(key) for key in HUB_KEYS)
    if not folder:
        # The hub converts every dataset to Parquet in the branch ``~parquet``, by subset and split.
        return f"hf://datasets/{dataset}@~parquet/{subset or default_subset(dataset, where)}/{split or 'train'}"
    _refuse_part_of_folder(subset, split, where)
    return f"hf://datasets/{dataset}/{folder}"


def _in_modelscope(entry: Mapping[str, Any], where: str) -> str | list[str]:
    dataset, (subset, split, folder) = _hub_id(entry, MODELSCOPE_KEY, where), (entry.get(key) for key in HUB_KEYS)
    if not folder:
        return files_of_part(dataset, subset, split, where)
    _refuse_part_of_folder(subset, split, where)
    return f"ms://datasets/{dataset}/{folder}"


def _refuse_part_of_folder(subset: str | None, split: str | None, where: str) -> None:
    if subset or split:
        raise RequestError(
            f"{where} has both folder and {'subset' if subset else 'split'}, but a folder is read as a whole; remove one of them"
        )
