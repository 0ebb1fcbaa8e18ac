"""Adapters that were trained before: merged into the model, or gone on with."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from raysft.config import Config, RequestError
from raysft.config.training import LoraSection
from raysft.copies import local_copy
from raysft.pretrained import adapter_description, check_weights, load_adapter, load_weights, merge_adapter
from raysft.storage import Place
from raysft.train.model import in_cache, model_identity


def find_adapter(config: Config, model: str, say: Callable[[str], None]) -> tuple[str, str | None]:
    """The model to begin with, earlier adapters merged into it, and the adapter to go on with.

    Args:
        config: the run's config.
        model: folder or hub id of the model without adapters.
        say: takes a line for people where it takes a while.

    Raises:
        RequestError: there is no such adapter, or it is of another kind than what is to be trained.
    """
    places = [Place.of(path) for path in config.model.adapters]
    folders = [_folder(path, place) for path, place in zip(config.model.adapters, places, strict=True)]
    for folder in folders:
        _check_kind(folder, config)
    goes_on = bool(folders) and not config.model.new_adapter
    merged = folders[:-1] if goes_on else folders
    if merged:
        model = _merged(model, merged, config.cache_directory, say, config.model.runs_code)
    return model, places[-1].location if goes_on else None


def _folder(path: str, place: Place) -> Path:
    try:
        folder = Path(local_copy(place.location))
    except FileNotFoundError:
        raise RequestError(f"model.adapters: {place} is not there; give a folder that peft has written") from None
    if not (folder / "adapter_config.json").exists():
        raise RequestError(f"model.adapters: {path} holds no adapter_config.json; give a folder that peft has written")
    if not (folder / "adapter_model.safetensors").exists():
        raise RequestError(
            f"model.adapters: {path} holds no weights (adapter_model.safetensors); copy or train it again"
        )
    check_weights(folder, f"model.adapters: {path}")
    return folder


def _check_kind(folder: Path, config: Config) -> None:
    described = adapter_description(folder)
    kind = str(described.get("peft_type")).lower()
    if not config.model.new_adapter and kind != config.model.finetuning:
        raise RequestError(
            f"model.adapters: {folder} is {kind} and model.finetuning={config.model.finetuning} is to go on with it; "
            f"set model.finetuning={kind}, or model.new_adapter=true"
        )
    if not config.model.new_adapter and kind == "lora":
        _check_form(folder, described, config)


def _check_form(folder: Path, described: Mapping[str, Any], config: Config) -> None:
    """An adapter that is gone on with keeps its form; what a config says otherwise would have no effect."""
    lora, usual = config.model.lora, LoraSection()
    for key, theirs in (("rank", "r"), ("alpha", "lora_alpha"), ("dropout", "lora_dropout"), ("dora", "use_dora"),
                        ("rslora", "use_rslora")):  # fmt: skip
        wanted = getattr(lora, key)
        if wanted not in (getattr(usual, key), described.get(theirs)):
            raise RequestError(
                f"model.adapters: {folder} has {key} {described.get(theirs)!r}, which stays as it is, and "
                f"model.lora.{key}={wanted!r}; take it out, or set model.new_adapter=true"
            )


def _merged(model: str, adapters: Sequence[Path], cache: Place, say: Callable[[str], None], runs_code: bool) -> str:
    """A copy of the model in the cache, with adapters merged into it in their order."""
    names = [model_identity(model), *(model_identity(str(each)) for each in adapters)]
    key = hashlib.sha256(repr(names).encode()).hexdigest()[:16]

    def write(folder: Path) -> None:
        say(f"model: {len(adapters)} adapters are merged into {model}, once, in {cache / 'models'}")
        merge_adapters(model, adapters, folder, runs_code)

    return in_cache(cache / "models" / f"merged-{key}", write).location


def merge_adapters(model: str, adapters: Sequence[Path], output: Path, runs_code: bool = False) -> None:
    """Write the full model that a model and its adapters make, with the tokenizer; ``runs_code``: its own code may run."""
    import torch
    from transformers import AutoTokenizer

    near = local_copy(model)
    whole = load_weights(near, dtype=torch.float32, trust_remote_code=runs_code)
    for adapter in adapters:
        whole = merge_adapter(load_adapter(whole, adapter))
    whole.config.use_cache = True
    whole.save_pretrained(output)
    AutoTokenizer.from_pretrained(near, trust_remote_code=runs_code).save_pretrained(output)


def merge(adapter: Path, output: Path, runs_code: bool = False) -> None:
    """Write the full model that an adapter and its base make, with the tokenizer; a full model is copied.

    Args:
        adapter: folder of either.
        output: folder to write.
        runs_code: code that comes with the base may run.

    Raises:
        RequestError: the folder holds neither.
    """
    import torch
    from transformers import AutoTokenizer

    check_weights(adapter, str(adapter))
    if (adapter / "adapter_config.json").exists():
        from raysft.train.finetuning import load_with_base

        trusted: dict[str, Any] = {"trust_remote_code": runs_code}
        model = merge_adapter(load_with_base(adapter, dtype=torch.float32, **trusted))
        model.config.use_cache = True
        model.save_pretrained(output)
        AutoTokenizer.from_pretrained(adapter, **trusted).save_pretrained(output)
    elif (adapter / "config.json").exists():
        shutil.copytree(adapter, output, dirs_exist_ok=True)
    else:
        raise RequestError(f"{adapter}: holds no trained model; train first (raysft train CONFIG)")
