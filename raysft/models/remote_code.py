"""Trust in code that comes with a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from raysft.config import Config, locate
from raysft.errors import RequestError
from raysft.models.adapter_files import adapter_base, named_base
from raysft.models.transformers_internals import tokenizer_config
from raysft.storage import hub_snapshots
from raysft.storage.path import StoragePath


def check_code(
    config: Config, model: str, notify: Callable[[str], None], path: str | None = None, key: str = "model.path"
) -> None:
    """Refuse a model that transformers can load only with code that the config does not trust.

    If transformers has its own classes for a model, as for many that still bring code, raysft uses those.

    Args:
        config: names the models whose code may run.
        model: folder or Hub id.
        notify: receives a line if code is not run.
        path: the model's name, by which its code is trusted. Default: ``model.path``.
        key: the setting that names the model.

    Raises:
        RequestError: the model needs code that ``model.trust_remote_code`` does not name.
    """
    from transformers import PreTrainedConfig

    hf_config, tokenizer = PreTrainedConfig.get_config_dict(model)[0], tokenizer_config(model)
    references = _references(hf_config, tokenizer)
    path, named = path or config.model.path, config.model.trust_remote_code
    if not references:
        return
    if path in named:
        others = sorted(
            {origin for each in references if "--" in each and (origin := each.split("--")[0]) not in named}
        )
        if others:
            raise RequestError(
                f"{key}={path} takes its code from {others[0]}, but model.trust_remote_code={named} does not name that; "
                f"read the code, then add {others[0]}"
            )
        return
    if _needed(model, bool(tokenizer.get("auto_map"))):
        raise RequestError(
            f"{key}={path} needs its own code ({_files(references)}), but model.trust_remote_code={named} does not name it; read "
            f"the code, then set model.trust_remote_code=[{path}]"
        )
    notify(
        "model: not running its own code, because transformers has classes for it (to run it, use model.trust_remote_code)"
    )


def check_code_of(folder: Path, remedy: str) -> None:
    """Refuse a model or an adapter that transformers can load only with code that comes with it.

    Args:
        folder: of a whole model, or of an adapter, which may bring a tokenizer.
        remedy: what to do, for the message.
    """
    from transformers import PreTrainedConfig

    whole, tokenizer = (folder / "config.json").exists(), tokenizer_config(str(folder))
    hf_config = PreTrainedConfig.get_config_dict(folder)[0] if whole else {}
    references = _references(hf_config, tokenizer)
    if references and _needed(str(folder), bool(tokenizer.get("auto_map")), whole):
        raise RequestError(f"{folder}: needs its own code ({_files(references)}); read the code, then {remedy}")


def _references(hf_config: Mapping[str, Any], tokenizer: Mapping[str, Any]) -> list[str]:
    """Return the custom classes that the configs of a model and of its tokenizer name."""
    return [*_strings(hf_config.get("auto_map")), *_strings(tokenizer.get("auto_map"))]


def _files(references: Iterable[str]) -> str:
    """Name the files that references to classes name."""
    names = sorted({each.split("--")[-1].rpartition(".")[0] + ".py" for each in references})
    return f"{', '.join(names):.100}"


def _strings(value: Any) -> Iterator[str]:
    """Yield the classes of an ``auto_map``: MODULE.CLASS or REPOSITORY--MODULE.CLASS, in pairs for tokenizers."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list | tuple):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)


def _needed(model: str, tokenizer_too: bool, whole: bool = True) -> bool:
    """True if transformers has no class for the config, the model or the tokenizer; of an adapter, for the tokenizer alone."""
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        AutoConfig,
        AutoTokenizer,
    )

    try:
        hf_config = AutoConfig.from_pretrained(model, trust_remote_code=False) if whole else None
        if tokenizer_too:
            AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    except Exception as error:
        return "trust_remote_code" in str(error)  # other errors are reported when the model is loaded
    return whole and type(hf_config) not in {*MODEL_FOR_CAUSAL_LM_MAPPING, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING}


def code_name(config: Config, folder: Path, given: str | None = None) -> str:
    """Return the name under which ``model.trust_remote_code`` must list a model for its code to run.

    It is the name of the model, or, for an adapter, of its base model, because ``adapter_config.json`` may name any folder.

    Args:
        config: names the models whose code may run.
        folder: of the model or the adapter.
        given: the model's name in the config. Default: that of the model that generates.
    """
    if adapter_base(folder) is None:
        return given or config.generate.model or config.model.path
    base = hub_snapshots.split(named_base(folder) or "")[0]
    location, trained = StoragePath.of(base), StoragePath.of(locate(config.model.path, "model.path"))
    # A model with merged adapters is in the cache.
    ours = location == trained or location.parent == config.cache_directory / "models"
    return config.model.path if ours else base


def reference_runs_code(config: Config, folder: Path) -> bool:
    """True if the code of ``train.reference_model``, or of the base of such an adapter, may run."""
    named = config.train.reference_model if adapter_base(folder) is None else code_name(config, folder)
    return named in config.model.trust_remote_code


def runs_code(config: Config, folder: Path, given: str | None = None) -> bool:
    """True if a model's own code may run; arguments are those of ``code_name``."""
    named = config.model.trust_remote_code
    return bool(named) and code_name(config, folder, given) in named
