"""Datasets by name from a ``dataset_info.json``, the registry that LLaMA-Factory's users have.

What an entry says is done as there, or refused by name: none of it is passed over.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from raysft.config import Config, Source, refuse_secrets
from raysft.config.data import Column, Tag
from raysft.data.sources.json_stream import JSON, first_line
from raysft.errors import RequestError

FIELDS = {
    "prompt": "instruction",
    "query": "input",
    "response": "output",
    "history": "history",
    "messages": "conversations",
    "system": "system",
    "tools": "tools",
}
"""Names of columns there → fields here."""
COLUMNS = {
    "alpaca": {"prompt": "instruction", "query": "input", "response": "output"},
    "sharegpt": {"messages": "conversations"},
    "openai": {"messages": "conversations"},
}
"""formatting → the columns of an entry that names none. One that names some has no others."""
FOREIGN_COLUMNS = {"alpaca": ("messages",), "sharegpt": ("prompt", "query", "response", "history")}
"""Columns that records of the other shape have."""
TAGS = {f"{tag}_tag": tag for tag in get_args(Tag)}
PREFERENCES = "preferences, which sft and pt do not train on"
UNSUPPORTED_COLUMNS = {
    "chosen": PREFERENCES,
    "rejected": PREFERENCES,
    "kto_tag": PREFERENCES,
    "images": "images, and raysft trains on text",
    "videos": "videos, and raysft trains on text",
    "audios": "audios, and raysft trains on text",
}
"""Columns that cannot be read, and what they say of a dataset."""
LOCATION_KEYS = ("hf_hub_url", "script_url", "cloud_file_name", "file_name")
"""Where a dataset may be. There the first one counts; which one was meant is a guess."""
OTHER_HUB_KEYS = ("ms_hub_url", "om_hub_url")
"""Where the dataset of an ``hf_hub_url`` may be found as well."""
HUB_KEYS = ("subset", "split", "folder")
ENTRY_KEYS = (*LOCATION_KEYS, *OTHER_HUB_KEYS, *HUB_KEYS, "formatting", "ranking", "columns", "tags", "num_samples")


def resolve_source(config: Config, source: Source) -> Source:
    """A source with its path and its shape: as it is where it names a path, else as the registry describes it.

    What the config says of the source goes before what the registry says, of columns and tags each by itself.

    Raises:
        RequestError: the registry cannot be read, does not know the name, or describes what cannot be used.
    """
    if source.path is not None or config.data.registry is None:
        return source
    path = Path(config.data.registry)
    path = path / "dataset_info.json" if path.is_dir() else path
    entries = _read(path)
    if source.name not in entries:
        raise RequestError(f"{path}: has no dataset {source.name!r}; {_hint(source.name, entries)}")
    where = f"{path}: dataset {source.name!r}"
    described = _describe(entries[source.name], config.stage, where, path.parent)
    refuse_secrets(described, lambda place: where)
    # Not exclude_unset: a config that was loaded again, or changed, says all that it does not ask for as well.
    given = source.model_dump(exclude_defaults=True, exclude={"name"})
    for key in ("columns", "tags"):
        given[key] = {**described.get(key, {}), **given.get(key, {})}
    try:
        return Source.model_validate({"name": source.name, **described, **given})
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(map(str, problem["loc"]))
        raise RequestError(
            f"{where}: {place}={problem['input']!r:.40}: {problem['msg'].lower()}; mend the registry"
        ) from None


def _read(path: Path) -> dict[str, Any]:
    try:
        entries = JSON.decode(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise RequestError(f"data.registry: {path} cannot be read ({error.strerror}); give the path of one") from None
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{path}: no valid JSON ({first_line(error)}); mend the file") from None
    if not isinstance(entries, dict):
        raise RequestError(f"{path}: a registry is a mapping of names to datasets")
    return entries


def _describe(entry: Any, stage: str, where: str, folder: Path) -> dict[str, Any]:
    if not isinstance(entry, Mapping):
        raise RequestError(f"{where} is {entry!r:.40}; a mapping with file_name belongs there")
    entry = {key: value for key, value in entry.items() if value is not None}
    _refuse_unknown(entry, ENTRY_KEYS, where, "")
    columns, tags = (_mapping(entry, key, where) for key in ("columns", "tags"))
    _refuse_unknown(columns, (*FIELDS, *UNSUPPORTED_COLUMNS), where, "columns.")
    _refuse_unknown(tags, TAGS, where, "tags.")
    if entry.get("ranking"):
        raise RequestError(f"{where} holds {PREFERENCES} (ranking); choose another")
    for column, holds in UNSUPPORTED_COLUMNS.items():
        if column in columns:
            raise RequestError(f"{where} holds {holds} (columns.{column}); choose another")
    form = entry.get("formatting", "alpaca")
    if form not in COLUMNS:
        raise RequestError(f"{where} has the formatting {form!r}; known: {', '.join(COLUMNS)}")
    columns = columns if "columns" in entry else COLUMNS[form]
    _refuse_other_shape(form, columns, tags, where)
    if stage == "pt" and form == "alpaca":
        # There a text to continue is what stands in the place of the prompt.
        shape = {"format": "text", "columns": {"text": _only_prompt(columns, where)}}
    else:
        fields = {**FIELDS, "messages": "messages"} if form == "openai" else FIELDS
        shape = {
            "format": form,
            "columns": {fields[name]: column for name, column in columns.items()},
            "tags": {TAGS[name]: value for name, value in tags.items()},
        }
    # What no column is named for is not read, whatever columns there are.
    shape["columns"] = {**dict.fromkeys(get_args(Column)), **shape["columns"]}
    return {**shape, "path": _path(entry, where, folder), "num_samples": entry.get("num_samples")}


def _only_prompt(columns: Mapping[str, Any], where: str) -> Any:
    more = [name for name in columns if name != "prompt"]
    if more or not columns:
        raise RequestError(
            f"{where} has {', '.join(f'columns.{name}' for name in more) or 'no columns'}, and stage: pt trains on one text; "
            'name that one alone, columns: {"prompt": …}'
        )
    return columns["prompt"]


def _refuse_unknown(given: Iterable[str], known: Iterable[str], where: str, prefix: str) -> None:
    known = list(known)
    for key in given:
        if key not in known:
            raise RequestError(f"{where}: unknown key {prefix}{key}; {_hint(key, known, prefix)}")


def _hint(name: str, known: Iterable[str], prefix: str = "") -> str:
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1)
    if near:
        return f"did you mean {prefix}{near[0]}?" if prefix else f"did you mean {near[0]!r}?"
    return f"known: {', '.join(known[:20])}{' …' if len(known) > 20 else ''}"


def _refuse_other_shape(form: str, columns: Mapping[str, Any], tags: Mapping[str, Any], where: str) -> None:
    """What belongs to records of another shape is not read there, and hints at a formatting that was forgotten."""
    shape = "alpaca" if form == "alpaca" else "sharegpt"
    other = [f"columns.{name}" for name in columns if name in FOREIGN_COLUMNS[shape]]
    other += ["tags"] if tags and form == "alpaca" else []
    if other:
        remedy = "set formatting to sharegpt or openai" if form == "alpaca" else "set formatting to alpaca"
        raise RequestError(f"{where} has {other[0]}, which formatting {form} does not read; {remedy}, or take it out")


def _mapping(entry: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
    """A mapping of names inside an entry; one that is null or empty is as if it were not there."""
    value = entry.get(key, {})
    if not isinstance(value, Mapping):
        raise RequestError(f"{where}: {key} is {value!r:.40}; a mapping of names belongs there")
    return {name: inner for name, inner in value.items() if inner not in (None, "")}


def _path(entry: Mapping[str, Any], where: str, folder: Path) -> str:
    places = [key for key in LOCATION_KEYS if key in entry]
    for key in (*places, *(key for key in HUB_KEYS if key in entry)):
        if not isinstance(entry[key], str) or not entry[key]:
            raise RequestError(f"{where}: {key} is {entry[key]!r:.40}; a name belongs there")
    if len(places) > 1:
        raise RequestError(f"{where} names {' and '.join(places)}; leave one of them")
    if not places or places == ["script_url"]:
        kinds = ", ".join(key for key in (*places, *OTHER_HUB_KEYS) if key in entry) or "no file"
        raise RequestError(f"{where} names {kinds}; raysft reads file_name, cloud_file_name and hf_hub_url")
    if places == ["hf_hub_url"]:
        return _in_hub(entry, where)
    for key in HUB_KEYS:
        if key in entry and (key, entry[key]) != ("split", "train"):
            raise RequestError(f"{where} has the {key} {entry[key]!r}, and a file has none; name the file of it alone")
    return str(folder / entry["file_name"]) if places == ["file_name"] else entry["cloud_file_name"]


def _in_hub(entry: Mapping[str, Any], where: str) -> str:
    subset, split, folder = (entry.get(key) for key in HUB_KEYS)
    if split and set("[]+") & set(split):
        raise RequestError(f"{where} has the split {split!r}; name a whole one, and num_samples for a part of it")
    if not folder:
        # The hub keeps every dataset as Parquet in a branch of that name, by subset and split.
        return f"hf://datasets/{entry['hf_hub_url']}@~parquet/{subset or 'default'}/{split or 'train'}"
    if subset or split:
        raise RequestError(
            f"{where} has a folder and a {'subset' if subset else 'split'}, and a folder is read as a whole; leave one of them"
        )
    return f"hf://datasets/{entry['hf_hub_url']}/{folder}"
