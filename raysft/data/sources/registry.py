"""Look up datasets by name in a ``dataset_info.json``, the registry of LLaMA-Factory.

Each key of an entry means what it means there, or is refused by name; none is ignored.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from raysft.config import Config, Source, refuse_secrets
from raysft.config.data import Column, Tag
from raysft.data.sources.hub_subsets import default_subset
from raysft.data.sources.json_stream import JSON
from raysft.data.sources.modelscope_parts import files_of_part
from raysft.errors import RequestError, one_line
from raysft.storage.modelscope import prefers_modelscope

FIELDS = {
    "prompt": "instruction",
    "query": "input",
    "response": "output",
    "history": "history",
    "messages": "conversations",
    "system": "system",
    "tools": "tools",
}
"""Column name in a registry → field of a source."""
COLUMNS = {
    "alpaca": {"prompt": "instruction", "query": "input", "response": "output"},
    "sharegpt": {"messages": "conversations"},
    "openai": {"messages": "conversations"},
}
"""Formatting → columns of an entry that has no ``columns``. An entry with ``columns`` has only those."""
FOREIGN_COLUMNS = {"alpaca": ("messages",), "sharegpt": ("prompt", "query", "response", "history")}
"""Shape of records → columns that only records of the other shape have."""
TAGS = {f"{tag}_tag": tag for tag in get_args(Tag)}
"""Tag in a registry → tag of a source."""
PREFERENCES = "preferences"
UNSUPPORTED_COLUMNS = {
    "chosen": PREFERENCES,
    "rejected": PREFERENCES,
    "kto_tag": PREFERENCES,
    "images": "images",
    "videos": "videos",
    "audios": "audio",
}
"""Column that is not supported → what a dataset with it contains."""
LOCATION_KEYS = ("hf_hub_url", "script_url", "cloud_file_name", "file_name")
"""Keys that locate a dataset. LLaMA-Factory uses the first; raysft refuses several, as the intended one is unclear."""
MODELSCOPE_KEY = "ms_hub_url"
"""A dataset on ModelScope: used if there is no other location, or instead of ``hf_hub_url`` with ``USE_MODELSCOPE_HUB=1``."""
OTHER_HUB_KEYS = ("om_hub_url",)
"""Mirrors on other hubs, which are not used."""
HUB_KEYS = ("subset", "split", "folder")
"""Keys that select a part of a dataset on the hub."""
ENTRY_KEYS = (
    *LOCATION_KEYS,
    MODELSCOPE_KEY,
    *OTHER_HUB_KEYS,
    *HUB_KEYS,
    "formatting",
    "ranking",
    "columns",
    "tags",
    "num_samples",
)


def resolve_source(config: Config, source: Source) -> Source:
    """Fill in the path and format of a source from the registry, unless the source has a path.

    Values of the config take precedence over the registry, separately for each column and tag.

    Raises:
        RequestError: the registry cannot be read, lacks the name, or has an entry that cannot be used.
    """
    if source.path is not None or config.data.registry is None:
        return source
    path = Path(config.data.registry)
    path = path / "dataset_info.json" if path.is_dir() else path
    entries = _read(path)
    if source.name not in entries:
        raise RequestError(f"{path}: no dataset is named {source.name!r}; {_suggestion(source.name, entries)}")
    where = f"{path}: dataset {source.name!r}"
    settings = _source_settings(entries[source.name], config.stage, where, path.parent)
    refuse_secrets(settings, lambda place: where)
    # exclude_unset would not do: a saved config, or one with overrides, sets every field.
    from_config = source.model_dump(exclude_defaults=True, exclude={"name"})
    for key in ("columns", "tags"):
        from_config[key] = {**settings.get(key, {}), **from_config.get(key, {})}
    try:
        return Source.model_validate({"name": source.name, **settings, **from_config})
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(map(str, problem["loc"]))
        raise RequestError(
            f"{where}: {key}={problem['input']!r:.40}: {problem['msg'].lower()}; correct the entry"
        ) from None


def _read(path: Path) -> dict[str, Any]:
    try:
        entries = JSON.decode(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise RequestError(
            f"data.registry={path} cannot be read ({error.strerror}); set it to the path of a registry"
        ) from None
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{path}: invalid JSON ({one_line(error)}); correct the file") from None
    if not isinstance(entries, dict):
        raise RequestError(f"{path}: must be a mapping of names to datasets, but is {entries!r:.40}; correct the file")
    return entries


def _source_settings(entry: Any, stage: str, where: str, folder: Path) -> dict[str, Any]:
    if not isinstance(entry, Mapping):
        raise RequestError(f'{where} must be a mapping, but is {entry!r:.40}; write it as {{"file_name": …}}')
    entry = {key: value for key, value in entry.items() if value is not None}
    _refuse_unknown(entry, ENTRY_KEYS, where, "")
    columns, tags = (_mapping(entry, key, where) for key in ("columns", "tags"))
    _refuse_unknown(columns, (*FIELDS, *UNSUPPORTED_COLUMNS), where, "columns.")
    _refuse_unknown(tags, TAGS, where, "tags.")
    if entry.get("ranking"):
        raise RequestError(f"{where} contains {PREFERENCES} (ranking), which raysft does not support; choose another")
    for column, content in UNSUPPORTED_COLUMNS.items():
        if column in columns:
            raise RequestError(
                f"{where} contains {content} (columns.{column}), which raysft does not support; choose another"
            )
    form = entry.get("formatting", "alpaca")
    if form not in COLUMNS:
        raise RequestError(f"{where} has the unknown formatting {form!r}; use one of {', '.join(COLUMNS)}")
    columns = columns if "columns" in entry else COLUMNS[form]
    _refuse_other_shape(form, columns, tags, where)
    if stage == "pt" and form == "alpaca":
        # For pre-training, LLaMA-Factory takes the text from the prompt column.
        shape = {"format": "text", "columns": {"text": _only_prompt(columns, where)}}
    else:
        fields = {**FIELDS, "messages": "messages"} if form == "openai" else FIELDS
        shape = {
            "format": form,
            "columns": {fields[name]: column for name, column in columns.items()},
            "tags": {TAGS[name]: value for name, value in tags.items()},
        }
    # Fields that the entry does not map are not read, even if the file has a column of that name.
    shape["columns"] = {**dict.fromkeys(get_args(Column)), **shape["columns"]}
    entry, part = _without_slice(entry, where)
    return {**shape, "path": _path(entry, where, folder), "slice": part, "num_samples": entry.get("num_samples")}


def _without_slice(entry: dict[str, Any], where: str) -> tuple[dict[str, Any], str | None]:
    """Take the slice of its records from the split of an entry: ``train[:1000]`` is the slice ``:1000`` of ``train``."""
    split = entry.get("split")
    if not isinstance(split, str) or not set("[]+") & set(split):
        return entry, None
    found = re.fullmatch(r"(\w[\w.-]*)\[([^\[\]]*)\]", split)
    if not found:
        raise RequestError(
            f"{where} has split={split!r}, but a source is one split or a slice of it; name one, such as train or train[:1000], "
            "and give others an entry of their own"
        )
    return {**entry, "split": found[1]}, found[2]


def _only_prompt(columns: Mapping[str, Any], where: str) -> Any:
    if list(columns) != ["prompt"]:
        names = ", ".join(f"columns.{name}" for name in columns) or "no columns"
        raise RequestError(
            f"{where} must have one text column for stage: pt, but has {names}; "
            'map the text alone, as "columns": {"prompt": …}'
        )
    return columns["prompt"]


def _refuse_unknown(given: Iterable[str], known: Iterable[str], where: str, prefix: str) -> None:
    known = list(known)
    for key in given:
        if key not in known:
            raise RequestError(f"{where}: unknown key {prefix}{key}; {_suggestion(key, known, prefix)}")


def _suggestion(name: str, known: Iterable[str], prefix: str = "") -> str:
    known = list(known)
    matches = difflib.get_close_matches(name, known, n=1)
    if matches:
        return f"did you mean {prefix}{matches[0]}?" if prefix else f"did you mean {matches[0]!r}?"
    return f"known: {', '.join(known[:20])}{' …' if len(known) > 20 else ''}"


def _refuse_other_shape(form: str, columns: Mapping[str, Any], tags: Mapping[str, Any], where: str) -> None:
    """Refuse columns and tags of another shape: LLaMA-Factory ignores them, but they suggest a missing ``formatting``."""
    shape = "alpaca" if form == "alpaca" else "sharegpt"
    other = [f"columns.{name}" for name in columns if name in FOREIGN_COLUMNS[shape]]
    other += ["tags"] if tags and form == "alpaca" else []
    if other:
        remedy = "set formatting to sharegpt or openai" if form == "alpaca" else "set formatting to alpaca"
        raise RequestError(f"{where} has {other[0]}, which formatting {form} does not use; {remedy}, or remove it")


def _mapping(entry: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
    """A mapping of names inside an entry, without names that are null or empty."""
    value = entry.get(key, {})
    if not isinstance(value, Mapping):
        raise RequestError(f"{where}: {key} must be a mapping of names, but is {value!r:.40}; correct the entry")
    return {name: inner for name, inner in value.items() if inner not in (None, "")}


def _path(entry: Mapping[str, Any], where: str, folder: Path) -> str | list[str]:
    locations = [key for key in LOCATION_KEYS if key in entry]
    if MODELSCOPE_KEY in entry and (not locations or (locations == ["hf_hub_url"] and prefers_modelscope())):
        locations = [MODELSCOPE_KEY]
    for key in (*locations, *(key for key in HUB_KEYS if key in entry)):
        if not isinstance(entry[key], str) or not entry[key]:
            raise RequestError(f"{where}: {key} must be a name, but is {entry[key]!r:.40}; correct the entry")
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
                f"{where} has {key}={entry[key]!r}, but is a file; remove {key}, and name the file of that part"
            )
    return str(folder / entry["file_name"]) if locations == ["file_name"] else entry["cloud_file_name"]


def _in_hub(entry: Mapping[str, Any], where: str) -> str:
    dataset, (subset, split, folder) = entry["hf_hub_url"], (entry.get(key) for key in HUB_KEYS)
    if not folder:
        # The hub converts every dataset to Parquet in the branch ``~parquet``, by subset and split.
        return f"hf://datasets/{dataset}@~parquet/{subset or default_subset(dataset, where)}/{split or 'train'}"
    _refuse_part_of_folder(subset, split, where)
    return f"hf://datasets/{dataset}/{folder}"


def _in_modelscope(entry: Mapping[str, Any], where: str) -> str | list[str]:
    dataset, (subset, split, folder) = entry[MODELSCOPE_KEY], (entry.get(key) for key in HUB_KEYS)
    if not folder:
        return files_of_part(dataset, subset, split, where)
    _refuse_part_of_folder(subset, split, where)
    return f"ms://datasets/{dataset}/{folder}"


def _refuse_part_of_folder(subset: str | None, split: str | None, where: str) -> None:
    if subset or split:
        raise RequestError(
            f"{where} has both folder and {'subset' if subset else 'split'}, but a folder is read as a whole; remove one of them"
        )
