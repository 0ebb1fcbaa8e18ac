"""Code that comes with a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from raysft.config import Config, locate
from raysft.errors import RequestError
from raysft.models.adapter_files import adapter_base, named_base
from raysft.models.transformers_internals import tokenizer_config
from raysft.storage.path import StoragePath


def check_code(
    config: Config, model: str, notify: Callable[[str], None], path: str | None = None, key: str = "model.path"
) -> None:
    """Refuse a model that transformers can load only with code that nobody has named.

    Where transformers has classes of its own for a model, as it has by now for many that still bring code, these are used and the
    code is not run.

    Args:
        config: names the models whose code may run.
        model: folder or hub id.
        notify: takes a line where code is left alone.
        path: the model's name, by which its code is trusted. Default: ``model.path``.
        key: where it is named.

    Raises:
        RequestError: code would have to run that ``model.trust_remote_code`` does not name.
    """
    from transformers import PreTrainedConfig

    hf_config, tokenizer = PreTrainedConfig.get_config_dict(model)[0], tokenizer_config(model)
    references = [*_strings(hf_config.get("auto_map")), *_strings(tokenizer.get("auto_map"))]
    path, named = path or config.model.path, config.model.trust_remote_code
    if not references:
        return
    if path in named:
        others = sorted(
            {origin for each in references if "--" in each and (origin := each.split("--")[0]) not in named}
        )
        if others:
            raise RequestError(
                f"{key}={path}: takes its code from {others[0]}, which model.trust_remote_code={named} does not name; "
                f"read it, then add {others[0]}"
            )
        return
    if _needed(model, bool(tokenizer.get("auto_map"))):
        files = ", ".join(sorted({each.split("--")[-1].rpartition(".")[0] + ".py" for each in references}))
        raise RequestError(
            f"{key}={path}: is loaded by code that comes with it ({files:.100}), and model.trust_remote_code={named} does "
            f"not name it; read the code, then set model.trust_remote_code=[{path}]"
        )
    notify("model: the code that comes with it is not run (model.trust_remote_code); transformers has its own for it")


def _strings(value: Any) -> Iterator[str]:
    """``auto_map`` holds classes as MODULE.CLASS or REPOSITORY--MODULE.CLASS, for tokenizers in pairs."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list | tuple):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)


def _needed(model: str, tokenizer_too: bool) -> bool:
    """Whether transformers has no class of its own for the config, the model or the tokenizer."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoTokenizer

    try:
        hf_config = AutoConfig.from_pretrained(model, trust_remote_code=False)
        if tokenizer_too:
            AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    except Exception as error:
        return "trust_remote_code" in str(error)  # whatever else is wrong is said where it is loaded
    return type(hf_config) not in MODEL_FOR_CAUSAL_LM_MAPPING


def code_name(config: Config, folder: Path) -> str:
    """The name that ``model.trust_remote_code`` holds where the code of a model may run.

    It is that of the model which is generated with. Of an adapter it is that of its base, for ``adapter_config.json`` may name
    any folder.
    """
    if adapter_base(folder) is None:
        return config.generate.model or config.model.path
    base = named_base(folder) or ""
    there, trained = StoragePath.of(base), StoragePath.of(locate(config.model.path, "model.path"))
    # With adapters merged it lies in the cache.
    ours = there == trained or there.parent == config.cache_directory / "models"
    return config.model.path if ours else base


def runs_code(config: Config, folder: Path) -> bool:
    """Whether code that comes with a model may run."""
    return bool(config.model.trust_remote_code) and code_name(config, folder) in config.model.trust_remote_code
