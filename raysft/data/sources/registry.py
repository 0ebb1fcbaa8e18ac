"""Look up datasets by name in a ``dataset_info.json``, the registry of LLaMA-Factory.

Each key of an entry means what it means there, or is refused by name; none is ignored.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from raysft.config import Config, Source, refuse_secrets
from raysft.config.data import Column, Tag
from raysft.data.sources.json_stream import JSON
from raysft.data.sources.registry_location import (
    HUB_KEYS,
    LOCATION_KEYS,
    MODELSCOPE_KEY,
    OTHER_HUB_KEYS,
    location,
    without_slice,
)
from raysft.errors import RequestError, one_line

FIELDS = {
    "prompt": "instruction",
    "query": "input",
    "response": "output",
    "history": "history",
    "messages": "conversations",
    "system": "system",
    "tools": "tools",
    "images": "images",
    "videos": "videos",
    "audios": "audios",
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
UNSUPPORTED_COLUMNS = {"chosen": PREFERENCES, "rejected": PREFERENCES, "kto_tag": PREFERENCES}
"""Column that is not supported → what a dataset with it contains."""
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
    if "://" in config.data.registry:
        raise RequestError(
            f"data.registry={config.data.registry} must be a file or folder on this machine; copy it here"
        )
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
        raise RequestError(f"{where}: {_described(error, entries[source.name])}; correct the entry") from None


def _described(error: ValidationError, entry: Mapping[str, Any]) -> str:
    """Describe what is wrong with a value of an entry, under the entry's name for it."""
    problem = error.errors()[0]
    field = str(problem["loc"][0])
    names = {"path": [key for key in (*LOCATION_KEYS, MODELSCOPE_KEY) if entry.get(key)], "slice": ["split"]}
    key = names.get(field, [field])[0]
    reason = problem["msg"].removeprefix("Value error, ").replace("Input should", "must")
    return f"{key}={entry.get(key)!r:.60}: {reason[0].lower()}{reason[1:]}"


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
    _refuse_unknown(entry, ENTRY_KEYS, where, "")
    entry = {key: value for key, value in entry.items() if value is not None}
    columns = _mapping(entry, "columns", (*FIELDS, *UNSUPPORTED_COLUMNS), where)
    tags = _mapping(entry, "tags", TAGS, where)
    if not isinstance(ranking := entry.get("ranking", False), bool):
        raise RequestError(f"{where}: ranking must be true or false, but is {ranking!r:.40}; correct the entry")
    if ranking:
        raise RequestError(f"{where} contains {PREFERENCES} (ranking), which raysft does not support; choose another")
    for column, content in UNSUPPORTED_COLUMNS.items():
        if column in columns:
            raise RequestError(
                f"{where} contains {content} (columns.{column}), which raysft does not support; choose another"
            )
    form = entry.get("formatting", "alpaca")
    if not isinstance(form, str) or form not in COLUMNS:
        raise RequestError(f"{where} has the unknown formatting {form!r:.40}; use one of {', '.join(COLUMNS)}")
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
    entry, part = without_slice(entry, where)
    return {**shape, "path": location(entry, where, folder), "slice": part, "num_samples": entry.get("num_samples")}


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


def _mapping(entry: Mapping[str, Any], key: str, known: Iterable[str], where: str) -> dict[str, Any]:
    """A mapping of names inside an entry, without names that are null or empty."""
    value = entry.get(key, {})
    if not isinstance(value, Mapping):
        raise RequestError(f"{where}: {key} must be a mapping of names, but is {value!r:.40}; correct the entry")
    _refuse_unknown(value, known, where, f"{key}.")
    for name, inner in value.items():
        if inner is not None and not isinstance(inner, str):
            raise RequestError(f"{where}: {key}.{name} must be a name, but is {inner!r:.40}; correct the entry")
    return {name: inner for name, inner in value.items() if inner}
