"""Existing adapters: merge them into the model, or continue training them."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from raysft.config import Config
from raysft.config.model import LoraSection
from raysft.errors import RequestError, one_line
from raysft.models.adapter_embeddings import fit_embeddings
from raysft.models.adapter_files import named_base, read_adapter_config
from raysft.models.fingerprint import model_fingerprint, tokenizer_fingerprint
from raysft.models.loading import generation_config, load_weights
from raysft.models.processor_files import save_tokenizer
from raysft.models.resolve import find_on_hub
from raysft.models.tokenizer import load_tokenizer
from raysft.models.weight_files import check_weights, holds_embeddings
from raysft.storage.local_cache import local_copy, may_be_on_hub, model_copy, on_hub
from raysft.storage.model_cache import in_cache
from raysft.storage.path import StoragePath


def find_adapter(config: Config, model: str, notify: Callable[[str], None]) -> tuple[str, str | None]:
    """Return the model to start from, with earlier adapters merged into it, and the adapter to continue with.

    Args:
        config: the run's config.
        model: folder or Hub id of the model without adapters.
        notify: receives a line for the user before something that takes long.

    Raises:
        RequestError: an adapter is missing, or is not of the kind that the config trains.
    """
    places = [_place(path, notify) for path in config.model.adapters]
    folders = [_folder(path, place) for path, place in zip(config.model.adapters, places, strict=True)]
    for path, folder in zip(config.model.adapters, folders, strict=True):
        _check_kind(folder, config)
        _check_tokens(folder, path, model, config.model.runs_code)
    goes_on = bool(folders) and not config.model.new_adapter
    if goes_on and config.model.new_tokens.tokens and not holds_embeddings(folders[-1]):
        raise RequestError(
            f"model.new_tokens requires trained embeddings, but the adapter {config.model.adapters[-1]} does not train them; "
            "set model.new_adapter=true, or remove model.new_tokens"
        )
    merged = folders[:-1] if goes_on else folders
    if merged:
        model = _merged(model, merged, config.cache_directory, notify, config.model.runs_code)
    return model, places[-1] if goes_on else None


def _place(path: str, notify: Callable[[str], None]) -> str:
    """Return an adapter's folder or URI, or its Hub id with the commit."""
    if "/" in path and may_be_on_hub(path) and not Path(path).exists():  # adapters on the Hub have an owner
        return find_on_hub(path, "model.adapters", notify, marks=("adapter_config.json",))
    return StoragePath.of(path).location


def _folder(path: str, place: str) -> Path:
    try:
        folder = model_copy(place) if on_hub(place) else Path(local_copy(place))
    except FileNotFoundError:
        raise RequestError(
            f"model.adapters: {StoragePath.of(place)} does not exist; give a folder written by peft"
        ) from None
    if not (folder / "adapter_config.json").exists():
        raise RequestError(f"model.adapters: {path} has no adapter_config.json; give a folder written by peft")
    if not (folder / "adapter_model.safetensors").exists():
        raise RequestError(f"model.adapters: {path} has no weights (adapter_model.safetensors); copy or train it again")
    check_weights(folder, f"model.adapters: {path}")
    return folder


def _check_kind(folder: Path, config: Config) -> None:
    hf_config = read_adapter_config(folder)
    kind = str(hf_config.get("peft_type")).lower()
    if not config.model.new_adapter and kind != config.model.finetuning:
        raise RequestError(
            f"model.adapters: {folder} is {kind} and model.finetuning={config.model.finetuning} would continue training it; "
            f"set model.finetuning={kind}, or model.new_adapter=true"
        )
    if not config.model.new_adapter and kind == "lora":
        _check_form(folder, hf_config, config)


def _check_form(folder: Path, hf_config: Mapping[str, Any], config: Config) -> None:
    """Refuse settings that would have no effect: an adapter that is trained further keeps its form."""
    lora, usual = config.model.lora, LoraSection()
    for key, theirs in (("rank", "r"), ("alpha", "lora_alpha"), ("dropout", "lora_dropout"), ("dora", "use_dora"),
                        ("rslora", "use_rslora")):  # fmt: skip
        wanted = getattr(lora, key)
        if wanted not in (getattr(usual, key), hf_config.get(theirs)):
            raise RequestError(
                f"model.adapters: {folder} has {key} {hf_config.get(theirs)!r}, which cannot change, but "
                f"model.lora.{key}={wanted!r}; remove that key, or set model.new_adapter=true"
            )


def _check_tokens(folder: Path, path: str, model: str, runs_code: bool) -> None:
    """Refuse an adapter with embeddings whose tokens have ids other than the model's: each would mean a different token."""
    has_tokenizer = any((folder / name).exists() for name in ("tokenizer_config.json", "tokenizer.json"))
    if not has_tokenizer or not holds_embeddings(folder):
        return
    there, here = (load_tokenizer(each, runs_code).get_vocab() for each in (str(folder), model))
    if other := sorted({**there, **here}.items() - (there.items() & here.items()), key=lambda entry: entry[1])[:1]:
        token = other[0][0]
        ids = [f"token {of[token]}" if token in of else "no token" for of in (there, here)]
        raise RequestError(
            f"model.adapters: {path} holds embeddings in which {token!r} is {ids[0]}, but in the model it is {ids[1]}; set "
            "model.new_tokens as it was when the adapter was trained, or export the adapter (raysft export) and start from "
            "that"
        )


def _merged(
    model: str, adapters: Sequence[Path], cache: StoragePath, notify: Callable[[str], None], runs_code: bool
) -> str:
    """Return a copy of the model in the cache, with the adapters merged into it in order."""
    names = [
        model_fingerprint(model),
        tokenizer_fingerprint(model),
        *(model_fingerprint(str(each)) for each in adapters),
    ]
    key = hashlib.sha256(repr(names).encode()).hexdigest()[:16]

    def write(folder: Path) -> None:
        notify(f"model: {len(adapters)} adapters are being merged into {model}, once, in {cache / 'models'}")
        merge_adapters(model, adapters, folder, runs_code)

    return in_cache(cache / "models" / f"merged-{key}", write, notify).location


def merge_adapters(model: str, adapters: Sequence[Path], output: Path, runs_code: bool = False) -> None:
    """Merge adapters into a model and write it with its tokenizer; ``runs_code``: the model's own code may run."""
    import torch

    whole = load_weights(model_copy(model), dtype=torch.float32, trust_remote_code=runs_code)
    for adapter in adapters:
        whole = merge_adapter(mergeable(load_adapter(whole, adapter), adapter, "remove it from model.adapters"))
    whole.config.use_cache = True
    whole.save_pretrained(output)
    save_tokenizer(load_tokenizer(model, runs_code), output)


def load_adapter(model: Any, folder: str | Path, **options: Any) -> Any:
    """Put the adapter of a folder on a model, with all of its weights.

    Raises:
        RequestError: the folder lacks weights, or the adapter belongs to another model.
    """
    import torch
    from peft import PeftModel

    # Otherwise peft reads the weights through a GPU wherever the process sees one, even for a model on the CPU.
    device = next(model.parameters()).device
    options.setdefault("torch_device", "cpu" if device.type == "meta" else str(device))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Found missing adapter keys")
        warnings.filterwarnings("ignore", ".*a tied layer is part of the adapter")  # merge_adapter unties them
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)  # peft reads its former name
        # It looks among modules for the ranks of parameters, which it has applied.
        warnings.filterwarnings("ignore", ".*pattern keys did not match.*gate_up_proj", RuntimeWarning)
        try:
            adapted = PeftModel.from_pretrained(model, str(folder), **options)
        except UserWarning as warning:
            lacking = str(warning).partition(": ")[2] or str(warning)
            raise RequestError(
                f"{folder}: is missing some of the adapter's weights ({lacking:.120}); copy or train it again"
            ) from None
        except torch.OutOfMemoryError:
            raise
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            reason = f"{type(error).__name__}: {one_line(error, 160)}"
            raise RequestError(
                f"{folder}: is not an adapter of this model ({reason}); use the model that it belongs to, or copy it again"
            ) from None
    if generation := generation_config(Path(folder)):
        model.generation_config = generation  # the adapter may have learned where turns end
    return adapted


def mergeable(model: Any, folder: Path, remedy: str) -> Any:
    """Return a model from ``load_adapter`` if the adapter, which is from a folder, can be merged into its weights.

    Raises:
        RequestError: it cannot; ``remedy`` says what to do.
    """
    if reason := unmergeable(model):
        raise RequestError(f"{folder}: cannot be merged into a model, because {reason}; {remedy}")
    return model


def unmergeable(model: Any) -> str | None:
    """Say why the adapter on a model cannot be merged into its weights; None if it can."""
    adapter = model.active_peft_config
    if not hasattr(model, "merge_and_unload"):
        kind = str(getattr(adapter.peft_type, "value", adapter.peft_type)).lower()
        return f"its kind ({kind}) changes no weights of the model"
    if getattr(adapter, "alora_invocation_tokens", None):
        return "it takes effect only after its invocation tokens (alora_invocation_tokens)"
    if getattr(adapter, "layer_replication", None):
        return "layers of its base stand for several layers (layer_replication)"
    return None


def merge_adapter(model: Any, each_layer: Callable[[Any], None] | None = None) -> Any:
    """Merge the adapter on a model into its weights and return the plain model.

    If the embedding is also the output head, and the adapter changes only one of them, they are untied.

    Args:
        model: from ``load_adapter``, and not ``unmergeable``.
        each_layer: merge in float32, and call this with each layer that the adapter has changed, which is in float32 then.
    """
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer

    base = model.get_base_model()
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    if any(isinstance(each, BaseTunerLayer) for each in (embedding, head)):
        inner: Any = head.get_base_layer() if isinstance(head, BaseTunerLayer) else head
        inner.weight = torch.nn.Parameter(inner.weight.detach().clone(), requires_grad=False)
    if each_layer is not None:
        _merge_layers(model, each_layer)
    _unwrap(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*no longer tied after merging")
        warnings.filterwarnings("ignore", ".*already merged")
        whole = model.merge_and_unload()
    embedding, head = whole.get_input_embeddings(), whole.get_output_embeddings()
    if head is not None and head.weight is not embedding.weight:
        for hf_config in (whole.config, whole.config.get_text_config()):
            hf_config.tie_word_embeddings = False
    return whole


def _unwrap(model: Any) -> None:
    """Replace the original modules by trained ones that hold others, such as projectors: peft does so only for LoRA."""
    from peft.utils import ModulesToSaveWrapper

    for name, module in list(model.named_modules()):
        if isinstance(module, ModulesToSaveWrapper) and not hasattr(module.original_module, "weight"):
            trained = module.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
            model.set_submodule(name, trained)


def _merge_layers(model: Any, each_layer: Callable[[Any], None]) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    done: set[Any] = set()
    layers: list[Any] = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        if layer in done:
            continue
        # Experts have an adapter around an adapter, one for each of their matrices.
        inside = [each for each in layer.modules() if isinstance(each, BaseTunerLayer)]
        done.update(inside)
        layer.float()
        for each in inside:
            each.merge()
        each_layer(layer.get_base_layer())


def load_with_base(folder: Path, **options: Any) -> Any:
    """Load a model, or an adapter on its base."""
    if not (folder / "adapter_config.json").exists():
        return load_weights(folder, **options)
    base = load_weights(model_copy(named_base(folder) or "None"), **options)
    fit_embeddings(base, folder)
    return load_adapter(base, folder)
