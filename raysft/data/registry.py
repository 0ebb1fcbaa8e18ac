"""Datasets by name from a ``dataset_info.json``, the registry that LLaMA-Factory's users have."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from raysft.config import Config, RequestError, Source, refuse_secrets

COLUMNS = {
    "prompt": "instruction",
    "query": "input",
    "response": "output",
    "history": "history",
    "messages": "conversations",
    "system": "system",
    "tools": "tools",
}
"""Names of columns there → fields here."""
NO_TEXT = ("images", "videos", "audios")


def find_source(config: Config, source: Source) -> Source:
    """A source with its path and its shape: as it is where it names a path, else as the registry describes it.

    What the config says of the source goes before what the registry says.

    Raises:
        RequestError: the registry cannot be read, does not know the name, or describes what cannot be used.
    """
    if source.path is not None or config.data.registry is None:
        return source
    path = Path(config.data.registry)
    path = path / "dataset_info.json" if path.is_dir() else path
    entries = _read(path)
    if source.name not in entries:
        near = difflib.get_close_matches(source.name, entries, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(list(entries)[:5])} …"
        raise RequestError(f"{path}: has no dataset {source.name!r}; {hint}")
    where = f"{path}: dataset {source.name!r}"
    described = _describe(entries[source.name], config.stage, where, path.parent)
    refuse_secrets(described, lambda place: where)
    given = source.model_dump(exclude_unset=True, exclude={"name"})
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
        entries = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise RequestError(f"data.registry: {path} cannot be read ({error.strerror}); give the path of one") from None
    except ValueError as error:
        raise RequestError(f"{path}: no valid JSON ({error}); mend the file") from None
    if not isinstance(entries, dict):
        raise RequestError(f"{path}: a registry is a mapping of names to datasets")
    return entries


def _describe(entry: Any, stage: str, where: str, folder: Path) -> dict[str, Any]:
    if not isinstance(entry, Mapping):
        raise RequestError(f"{where} is {entry!r:.40}; a mapping with file_name belongs there")
    columns, tags = (_mapping(entry, key, where) for key in ("columns", "tags"))
    if entry.get("ranking"):
        raise RequestError(f"{where} holds preferences (ranking), which sft and pt do not train on; choose another")
    unusable = [column for column in NO_TEXT if column in columns]
    if unusable:
        raise RequestError(f"{where} holds {unusable[0]}, and raysft trains on text; choose another")
    form = entry.get("formatting", "alpaca")
    if form not in ("alpaca", "sharegpt", "openai"):
        raise RequestError(f"{where} has the formatting {form!r}; known: alpaca, sharegpt, openai")
    fields = {**COLUMNS, "messages": "messages" if form == "openai" else "conversations"}
    mapped = {fields[name]: column for name, column in columns.items() if name in fields}
    if stage == "pt" and form == "alpaca":
        # There a text to continue is what stands in the place of the prompt.
        form, mapped = "text", {"text": mapped.get("instruction", "instruction")}
    described: dict[str, Any] = {"path": _path(entry, where, folder), "format": form, "columns": mapped}
    if form in ("sharegpt", "openai"):
        described["tags"] = {name.removesuffix("_tag"): value for name, value in tags.items()}
    if entry.get("num_samples"):
        described["max_examples"] = entry["num_samples"]
    return described


def _mapping(entry: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
    """A mapping of names inside an entry; what is null there is as if it were not there."""
    value = entry.get(key) or {}
    if not isinstance(value, Mapping):
        raise RequestError(f"{where}: {key} is {value!r:.40}; a mapping of names belongs there")
    return {name: inner for name, inner in value.items() if inner is not None}


def _path(entry: Mapping[str, Any], where: str, folder: Path) -> str:
    if entry.get("hf_hub_url"):
        # The hub keeps every dataset as Parquet in a branch of that name, by subset and split.
        subset, split = entry.get("subset") or "default", entry.get("split") or "train"
        inner = entry.get("folder") or f"{subset}/{split}"
        branch = "" if entry.get("folder") else "@~parquet"
        return f"hf://datasets/{entry['hf_hub_url']}{branch}/{inner}"
    if entry.get("cloud_file_name"):
        return str(entry["cloud_file_name"])
    if entry.get("file_name"):
        if not isinstance(entry["file_name"], str):
            raise RequestError(
                f"{where}: file_name is {entry['file_name']!r:.40}; the name of a file or folder belongs there"
            )
        return str(folder / entry["file_name"])
    kinds = ", ".join(key for key in entry if key.endswith(("_url", "_name"))) or "no file"
    raise RequestError(f"{where} names {kinds}; raysft reads file_name, cloud_file_name and hf_hub_url")
