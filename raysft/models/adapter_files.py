"""The files of an adapter: its configuration, and the model to which it belongs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from raysft.errors import RequestError
from raysft.storage import hub_snapshots
from raysft.storage.local_cache import may_be_on_hub, model_copy, on_hub

MADE = re.compile(r"(dequantized|expanded|extended|merged|scaled)-[0-9a-f]{16}")
"""Names of models that raysft makes in its cache: of quantized ones, or with new layers, new tokens, scaled positions, or adapters
merged into them."""
PROMPTS = ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "ADAPTION_PROMPT")
"""Kinds of adapters that change no weights, but put their own states before a text."""


def check_packable(adapter: Path, named: str) -> None:
    """Refuse an adapter that has no correct effect on packed rows.

    Args:
        adapter: its folder.
        named: the folder as messages name it, ``evaluate.model=PATH``.

    Raises:
        RequestError: with the reason.
    """
    description = read_adapter_config(adapter)
    kind, invoked = description.get("peft_type"), description.get("alora_invocation_tokens")
    if kind in PROMPTS or invoked:
        why = (
            "takes effect only after its invocation tokens (aLoRA)"
            if invoked
            else f"prepends its own states to each text ({str(kind).lower()})"
        )
        raise RequestError(
            f"{named}: {why}, which does not work in rows with several examples; use another adapter, or raysft generate"
        )


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """Read an adapter's ``adapter_config.json``.

    Raises:
        RequestError: the file cannot be read, or does not hold a mapping.
    """
    path = folder / "adapter_config.json"
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(description, dict):
            raise ValueError("no mapping")
    except (OSError, ValueError) as error:
        raise RequestError(f"{path}: is not an adapter's configuration ({error}); copy or train it again") from None
    return description


def adapter_base(model: Path) -> Path | None:
    """Return the folder of an adapter's base model; None if the folder holds a whole model.

    Raises:
        RequestError: the folder or the adapter's base does not exist.
    """
    if not model.is_dir():
        raise RequestError(f"{model} is not a model folder; give a folder with a config.json or an adapter_config.json")
    description = model / "adapter_config.json"
    if not description.exists():
        if not (model / "config.json").exists():
            raise RequestError(f"{model} has neither config.json nor adapter_config.json; give a model's folder")
        return None
    named = named_base(model)
    base = model_copy(named) if named else None
    if base is None or not base.is_dir():
        if named and MADE.fullmatch(Path(named).name):
            raise RequestError(
                f"{description}: its base {named} was created in the cache by the run that trained the adapter, and no longer "
                "exists; run raysft check with that run's config to create it again"
            )
        raise RequestError(
            f"{description}: base_model_name_or_path={named!r} is not a folder here; put the base model there, or correct the name"
        )
    return base


def base_name(path: str) -> tuple[str, str | None]:
    """Return the name by which an adapter's configuration knows its base, and the commit of one on the Hub."""
    return hub_snapshots.split(path) if on_hub(path) else (path, None)


def named_base(adapter: Path) -> str | None:
    """Return the name of the base model in an adapter's configuration; for one on the Hub with its revision, if there is one."""
    description = read_adapter_config(adapter)
    named, revision = description.get("base_model_name_or_path"), description.get("revision")
    if named and revision and may_be_on_hub(str(named)) and not Path(str(named)).exists():
        return f"{named}@{revision}"
    return str(named) if named else None
