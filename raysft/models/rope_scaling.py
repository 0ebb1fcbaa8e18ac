"""Rotary positions that a config scales (``model.rope_scaling``): a copy of the model in the cache has them in its config.json."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raysft.config import Config, with_overrides
from raysft.config.rope_scaling import OWN, rope_settings
from raysft.errors import RequestError, as_yaml, one_line
from raysft.models.fingerprint import model_fingerprint, tokenizer_fingerprint
from raysft.models.model_files import model_files
from raysft.storage.local_cache import model_copy
from raysft.storage.model_cache import in_cache

KEPT = ("rope_theta", "partial_rotary_factor")
"""Parameters of a model's positions that do not concern scaling."""
WITH_ORIGINAL = ("yarn", "llama3", "longrope")
"""Kinds of scaling whose parameters name the positions that the model had before."""
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
"""The values of Llama 3.1, which LLaMA-Factory uses."""


@dataclass(frozen=True)
class Scaling:
    """What a model's config says about its positions."""

    parameters: dict[str, Any]
    """``rope_parameters`` of transformers."""
    positions: int
    """``max_position_embeddings``; with ``dynamic`` those before the scaling, which its frequencies are computed from."""
    original: int
    """Positions before the scaling."""


def positions_of(hf_config: Any) -> int | None:
    """Number of positions of a model, from its transformers config, scaled ones included; None if there is no limit."""
    text = hf_config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions <= 1:
        return None
    rope = getattr(text, "rope_parameters", None) or {}
    return int(positions * rope.get("factor", 1.0)) if rope.get("rope_type") == "dynamic" else positions


def is_rotary(hf_config: Any) -> bool:
    """Return True if a model computes its positions, so that it has as many as it is given; others learn a table of them."""
    return bool(getattr(hf_config.get_text_config(), "rope_parameters", None))


def scaled_config(config: Config, hf_config: Any, notify: Callable[[str], None], key: str = "model.path") -> Any:
    """Return a model's config with ``model.rope_scaling``; the config itself if nothing changes.

    Args:
        config: the run's config.
        hf_config: the model's own, as a whole or of its decoder.
        notify: receives a line if the model has enough positions.
        key: the setting that names the model.

    Raises:
        RequestError: the model's positions cannot be scaled so.
    """
    scaling = _scaling(config, hf_config, notify, key)
    if scaling is None:
        return hf_config
    scaled = copy.deepcopy(hf_config)
    text = scaled.get_text_config()
    for name, value in _entries(scaling, text).items():
        setattr(text, name, value)
    try:
        # Some configs look at the kind of scaling when they are read, others when the model is made.
        type(scaled).from_dict(scaled.to_dict())
        _check_effect(config, scaled, scaling, key)
    except RequestError:
        raise
    except Exception as error:  # of any type
        raise RequestError(
            f"model.rope_scaling={as_yaml(config.model.rope_scaling)}, but {key} is a model with model_type={text.model_type}, "
            f"for which transformers does not take it ({_reason(error)}); remove it, or use another model"
        ) from None
    return scaled


def can_be_scaled(config: Config, hf_config: Any) -> bool:
    """Return True if ``model.rope_scaling`` has scaled a model's positions, or ``yarn`` would."""
    if config.model.rope_scaling is not None:
        return True
    try:
        scaled_config(with_overrides(config, {"model.rope_scaling": "yarn"}), hf_config, lambda line: None)
    except RequestError:
        return False
    return True


def with_rope_scaling(
    config: Config, model: str, hf_config: Any, notify: Callable[[str], None], key: str = "model.path", named: str = ""
) -> str:
    """Return a copy of the model, in the cache, that has ``model.rope_scaling``; the model itself if nothing changes.

    Its weights are links to those of the model where the file system can have them.

    Args:
        config: the run's config.
        model: folder, URI or Hub id of a whole model.
        hf_config: its own config.
        notify: receives a line for the user.
        key: the setting that names the model.
        named: an adapter that belongs to the model; it stays with the model that it was trained on.

    Raises:
        RequestError: the model's positions cannot be scaled so.
    """
    scaling = _scaling(config, hf_config, lambda line: None, key)
    if scaling is None:
        return model
    if named:
        raise RequestError(
            f"{key}={named} is an adapter of a model without model.rope_scaling={as_yaml(config.model.rope_scaling)}; remove "
            "that, or export the adapter (raysft export) and give the whole model"
        )
    content = (model_fingerprint(model), tokenizer_fingerprint(model), scaling)
    digest = hashlib.sha256(repr(content).encode()).hexdigest()[:16]

    def write(folder: Path) -> None:
        notify(
            f"model: gets {scaling.parameters['rope_type']} positions ({scaling.original:,} × "
            f"{scaling.parameters['factor']:g}), once, in {config.cache_directory / 'models'}"
        )
        _write(model_copy(model), folder, scaling, config.model.runs_code)
        _check_written(folder, scaling, config.model.runs_code)

    return in_cache(config.cache_directory / "models" / f"scaled-{digest}", write, notify).location


def _scaling(config: Config, hf_config: Any, notify: Callable[[str], None], key: str) -> Scaling | None:
    """Return what the model's config should say about its positions; None if it stays unchanged."""
    asked = config.model.rope_scaling
    if asked is None:
        return None
    text, length, said = hf_config.get_text_config(), config.data.sequence_length, as_yaml(asked)
    existing: dict[str, Any] = dict(getattr(text, "rope_parameters", None) or {})
    _check_kind(existing, text, said, key)
    settings, positions, before = (
        rope_settings(asked),
        positions_of(hf_config) or 0,
        existing.get("rope_type", "default"),
    )
    if "factor" not in settings and positions >= length:
        notify(
            f"model: model.rope_scaling={said} changes nothing, as data.sequence_length={length} fits the model's {positions:,} "
            "positions"
        )
        return None
    kind = settings["rope_type"]
    if before == kind == "linear" and existing.get("factor") == settings.get("factor"):
        return None
    original = settings.pop("original_max_position_embeddings", None) or _original(existing, text, kind)
    if original is None:
        raise RequestError(
            f"model.rope_scaling={said}, but the model of {key} scales its positions already (rope_type={before}, to "
            f"{positions:,}); set original_max_position_embeddings in model.rope_scaling to those before, or lower "
            f"data.sequence_length to {positions}"
        )
    factor = settings.get("factor") or float(math.ceil(length / original))
    parameters = {**(LLAMA3 if kind == "llama3" else {}), **_kept(existing, kind, factor), **settings, "factor": factor}
    if kind in WITH_ORIGINAL:
        parameters["original_max_position_embeddings"] = original
    scaling = Scaling(parameters, original if kind == "dynamic" else int(original * factor), original)
    unchanged = existing == parameters and text.max_position_embeddings == scaling.positions
    return None if unchanged else scaling


def _kept(existing: Mapping[str, Any], kind: str, factor: float) -> dict[str, Any]:
    """What stays of a model's own parameters: those of another kind of scaling go, and so does what belongs to another factor."""
    names = {*KEPT, *(OWN[kind] if existing.get("rope_type") == kind else ())}
    if existing.get("factor") != factor:
        names -= {"attention_factor"}
    return {name: value for name, value in existing.items() if name in names and value is not None}


def _original(existing: Mapping[str, Any], text: Any, kind: str) -> int | None:
    """Positions before the scaling; None of a model that is scaled in another way, or whose config does not say."""
    before = existing.get("rope_type", "default")
    if before == "default" or before == kind == "dynamic":
        return text.max_position_embeddings
    return existing.get("original_max_position_embeddings") if before == kind else None


def _check_kind(existing: Mapping[str, Any], text: Any, said: str, key: str) -> None:
    kind = f"{key} is a model with model_type={text.model_type}"
    if not existing or not positions_of(text):
        raise RequestError(f"model.rope_scaling={said} scales rotary positions, but {kind}, which has none; remove it")
    if any(isinstance(value, dict) for value in existing.values()):
        raise RequestError(
            f"model.rope_scaling={said} scales all layers alike, but {kind}, whose layers have positions of several kinds "
            f"({', '.join(existing)}); remove it, and write rope_parameters into the config.json of a copy of the model"
        )
    if "mrope_section" in existing:
        raise RequestError(
            f"model.rope_scaling={said} scales one position a token, but {kind}, which has three (mrope); remove it, and write "
            "rope_parameters into the config.json of a copy of the model"
        )


def _reason(error: Exception) -> str:
    """The last line of an error: those of configs begin with the name of what checked them."""
    return one_line(str(error).strip().rpartition("\n")[2].strip().removeprefix("ValueError: "), 160)


def _check_effect(config: Config, scaled: Any, scaling: Scaling, key: str) -> None:
    """Refuse a model whose code does not read the parameters."""
    import torch

    from raysft.models.model_class import auto_class

    kind = scaling.parameters["rope_type"]
    with torch.device("meta"):
        model = auto_class(scaled).from_config(copy.deepcopy(scaled), trust_remote_code=config.model.runs_code)
    if not any(getattr(module, "rope_type", None) == kind for module in model.modules()):
        raise RequestError(
            f"model.rope_scaling={as_yaml(config.model.rope_scaling)} has no effect on {type(model).__name__} ({key}), which "
            "computes its positions in its own way; remove it"
        )


def _entries(scaling: Scaling, text: Any) -> dict[str, Any]:
    """The entries of a config by name."""
    entries = {"rope_parameters": dict(scaling.parameters), "max_position_embeddings": scaling.positions}
    if hasattr(text, "original_max_position_embeddings"):  # Phi 3 takes this one instead of that of the parameters
        entries["original_max_position_embeddings"] = scaling.original
    return entries


def _write(model: Path, folder: Path, scaling: Scaling, runs_code: bool) -> None:
    """Write a copy of a model's folder; the files other than the config are links where they can be."""
    from transformers import AutoConfig

    folder.mkdir(parents=True)
    for path in model_files(model):
        target = folder / path.relative_to(model)
        target.parent.mkdir(parents=True, exist_ok=True)
        if target != folder / "config.json":
            _link(path.resolve(), target)
    # transformers' own writing of a config would also change what it has under other names than it writes today.
    content = json.loads((model / "config.json").read_text(encoding="utf-8"))
    whole = AutoConfig.from_pretrained(model, trust_remote_code=runs_code)
    text, section = whole.get_text_config(), content
    if text is not whole:
        section = content[next(name for name in whole.sub_configs if getattr(whole, name) is text)]
    section.pop("rope_scaling", None)
    section |= _entries(scaling, text)
    (folder / "config.json").write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _link(path: Path, target: Path) -> None:
    try:
        os.link(path, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(path, target)


def _check_written(folder: Path, scaling: Scaling, runs_code: bool) -> None:
    """Make sure that transformers reads what was written: a key elsewhere in the config may override it."""
    from transformers import AutoConfig

    text = AutoConfig.from_pretrained(folder, trust_remote_code=runs_code).get_text_config()
    if dict(text.rope_parameters) != scaling.parameters or text.max_position_embeddings != scaling.positions:
        raise RequestError(
            f"model.rope_scaling: transformers reads {text.rope_parameters} and max_position_embeddings="
            f"{text.max_position_embeddings} from the config of this model, not {scaling.parameters} and {scaling.positions}; "
            "remove model.rope_scaling"
        )
