"""Layers that a config adds to a model: a copy of the model in the cache has them, and computes what the model does (LLaMA Pro)."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from raysft.config import Config
from raysft.errors import RequestError
from raysft.models.decoder_layers import check_expanded, decoder_layers, expand_config, origins, spread_layers
from raysft.models.fingerprint import model_fingerprint, tokenizer_fingerprint
from raysft.models.loading import load_weights
from raysft.models.processor_files import save_tokenizer
from raysft.models.quantization import method_of
from raysft.models.tokenizer import load_tokenizer
from raysft.storage.local_cache import local_copy, model_copy
from raysft.storage.model_cache import in_cache

OUTPUTS = frozenset({
    "o_proj", "down_proj", "out_proj", "c_proj", "dense", "dense_4h_to_h", "fc2", "fc_out", "wo", "w2", "output_linear",
})  # fmt: skip
"""Names of the projections that end a branch of a layer, in the models of transformers."""
SCALES = ("layer_scalar",)
"""Names of factors on a layer's whole output."""
DESCRIPTION = "new_layers.json"
"""File next to a model with new layers that says which layers are new, and which of their weights are zeroed."""
SAMPLE = (2, 24)
"""Rows and tokens of the sample that shows whether a model computes the same."""


def with_new_layers(config: Config, model: str, notify: Callable[[str], None]) -> str:
    """Return a copy of the model, in the cache, that has ``model.new_layers`` more layers; the model itself without them.

    Args:
        config: the run's config.
        model: folder, URI or Hub id.
        notify: receives a line for the user before something that takes long.

    Raises:
        RequestError: the model cannot get new layers.
    """
    new, runs_code = config.model.new_layers, config.model.runs_code
    if not new:
        return model
    content = (model_fingerprint(model), tokenizer_fingerprint(model), new)
    key = hashlib.sha256(repr(content).encode()).hexdigest()[:16]

    def write(folder: Path) -> None:
        notify(f"model: adding {new} layers, once, in {config.cache_directory / 'models'}")
        add_layers(model, folder, new, runs_code)

    expanded = in_cache(config.cache_directory / "models" / f"expanded-{key}", write, notify).location
    _check_trained(config, expanded)
    return expanded


def expanded_config(config: Config, hf_config: Any) -> Any:
    """Return the config of the model with ``model.new_layers``, and check that its layers are what they copy.

    Raises:
        RequestError: the model cannot get new layers.
    """
    import torch

    from raysft.models.model_class import auto_class

    new = config.model.new_layers
    if not new:
        return hf_config
    if method := method_of(hf_config):
        raise RequestError(
            f"model.new_layers={new} adds layers, but model.path={config.model.path} is quantized ({method}) and cannot be "
            "rewritten; use the model that it was quantized from, with model.quantization"
        )
    expanded = expand_config(hf_config, new)
    with torch.device("meta"):
        former, later = (
            auto_class(each).from_config(copy.deepcopy(each), trust_remote_code=config.model.runs_code)
            for each in (hf_config, expanded)
        )
    check_expanded(former, later, new)
    return expanded


def add_layers(model: str, folder: Path, new: int, runs_code: bool = False) -> None:
    """Write a copy of a model that has new layers and gives the same logits; all other weights stay as they are.

    Args:
        model: folder, URI or Hub id.
        folder: where to write it.
        new: number of new layers.
        runs_code: the model's own code may run.

    Raises:
        RequestError: the logits would not be the same.
    """
    import torch
    from torch import nn

    options: dict[str, Any] = {"dtype": "auto", "trust_remote_code": runs_code, "attn_implementation": "eager"}
    whole = load_weights(model_copy(model), **options).eval()
    prefix, count = decoder_layers(whole)
    layers, added = whole.get_submodule(prefix), spread_layers(count + new, new)
    origin = origins(count, new)
    before, calls = _sampled(whole, {origin[index]: layers[origin[index]] for index in added})
    zeroed: list[str] = []
    expanded = []
    for index, source in enumerate(origin):
        layer = layers[source]
        if index in added:
            layer = copy.deepcopy(layer)
            zeroed = _make_identity(layer, calls[source], f"{type(whole).__name__}, layer {source}", new)
        expanded.append(layer)
    parent, _, name = prefix.rpartition(".")
    setattr(whole.get_submodule(parent), name, nn.ModuleList(expanded))
    whole.config = expand_config(whole.config, new)
    whole.save_pretrained(folder)
    save_tokenizer(load_tokenizer(model, runs_code), folder)
    (folder / DESCRIPTION).write_text(json.dumps({"layers": added, "zeroed": zeroed}), encoding="utf-8")
    del whole, layers, expanded
    after, _ = _sampled(load_weights(folder, **options).eval(), {})
    # Matrices at other addresses may round differently, by a few units in the last place.
    allowed = 1e-4 if before.dtype == torch.float32 else 5e-2
    difference = (after.float() - before.float()).abs().max() / before.float().std().clamp(min=1e-12)
    if not difference <= allowed:
        raise RequestError(
            f"model.new_layers={new} would change the logits of {model} (by {float(difference):.2g} of their standard "
            "deviation): its output depends on the number of its layers; remove model.new_layers"
        )


def _sampled(model: Any, layers: dict[int, Any]) -> tuple[Any, dict[int, tuple[Any, Any]]]:
    """Compute the logits of a sample, and record how it calls some layers."""
    import torch

    vocabulary = model.get_input_embeddings().weight.shape[0]
    tokens = torch.randint(vocabulary, SAMPLE, generator=torch.Generator().manual_seed(0))
    calls: dict[int, tuple[Any, Any]] = {}

    def record(index: int) -> Callable[..., None]:
        def hook(_module: Any, args: Any, kwargs: Any) -> None:
            calls[index] = (
                tuple(value.clone() if isinstance(value, torch.Tensor) else value for value in args),
                {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in kwargs.items()},
            )

        return hook

    with torch.no_grad(), ExitStack() as stack:
        for index, layer in layers.items():
            stack.callback(layer.register_forward_pre_hook(record(index), with_kwargs=True).remove)
        return model(tokens, use_cache=False).logits, calls


def _make_identity(layer: Any, call: tuple[Any, Any], named: str, new: int) -> list[str]:
    """Zero the outputs of a layer's branches, so that it returns what it gets; return the names of the zeroed modules.

    Where a norm follows the projection that ends a branch, the norm's weight is zeroed instead: after a projection of zeros it
    would blow up the first update to its full size.
    """
    import torch

    outputs = {name: weight for name, weight in layer.named_parameters() if _is_output(name)}
    trained = {name: weight.detach().clone() for name, weight in outputs.items()}
    with torch.no_grad():
        for name, value in (*layer.named_parameters(), *layer.named_buffers()):
            if name.rpartition(".")[2] in SCALES:
                value.fill_(1.0)
        for weight in outputs.values():
            weight.zero_()
        norms = _norms_of_nothing(layer, call)
        kept = {name: copy.deepcopy(norm.state_dict()) for name, norm in norms.items()}
        if norms and all(_silence(norm) for norm in norms.values()):
            for name, weight in outputs.items():
                weight.copy_(trained[name])
            if _is_identity(layer, call):
                return sorted(norms)
            for weight in outputs.values():
                weight.zero_()
        for name, norm in norms.items():
            norm.load_state_dict(kept[name])
        if not outputs or not _is_identity(layer, call):
            raise RequestError(
                f"model.new_layers={new} needs residual layers, but {named} still changes its input when its output "
                "projections are zero; remove model.new_layers"
            )
    return sorted({name.rpartition(".")[0] if name.endswith((".weight", ".bias")) else name for name in outputs})


def _is_output(name: str) -> bool:
    return any(part.removesuffix("_bias") in OUTPUTS for part in name.split("."))


def _called(layer: Any, call: tuple[Any, Any]) -> tuple[Any, Any]:
    """Call a layer as the model did; return the hidden states that it got, and those that it gave."""
    args, kwargs = copy.deepcopy(call)
    given = (args[0] if args else kwargs["hidden_states"]).clone()
    result = layer(*args, **kwargs)
    return given, result[0] if isinstance(result, tuple) else result


def _is_identity(layer: Any, call: tuple[Any, Any]) -> bool:
    import torch

    given, result = _called(layer, call)
    return torch.equal(given, result)


def _norms_of_nothing(layer: Any, call: tuple[Any, Any]) -> dict[str, Any]:
    """Return the norms that get nothing but zeros: they follow a projection that is zeroed."""
    import torch

    found: dict[str, Any] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(module: Any, args: Any) -> None:
            if args and isinstance(args[0], torch.Tensor) and not args[0].any():
                found[name] = module

        return hook

    with ExitStack() as stack:
        for name, module in layer.named_modules():
            weight = getattr(module, "weight", None)
            if "Norm" in type(module).__name__ and isinstance(weight, torch.Tensor) and weight.dim() == 1:
                stack.callback(module.register_forward_pre_hook(watch(name)).remove)
        _called(layer, call)
    return found


def _silence(norm: Any) -> bool:
    """Set a norm's weight so that it returns zeros for any input; False if none does. Gemma's adds 1 to its weight."""
    import torch

    if getattr(norm, "bias", None) is not None:
        norm.bias.zero_()
    something = torch.linspace(-1.0, 1.0, norm.weight.shape[0], dtype=norm.weight.dtype)[None]
    for value in (0.0, -1.0):
        norm.weight.fill_(value)
        if not norm(something).any():
            return True
    return False


def _check_trained(config: Config, model: str) -> None:
    """Refuse adapters that would leave the new layers as they are: they train no norms, and nothing passes norms of zeros."""
    section = config.model.adapter
    zeroed = json.loads((Path(local_copy(model)) / DESCRIPTION).read_text(encoding="utf-8"))["zeroed"]
    norms = [name for name in zeroed if name.rpartition(".")[2] not in OUTPUTS and "norm" in name.lower()]
    if (
        section is None
        or not norms
        or any(f".{name}".endswith(f".{extra}") for name in norms for extra in section.extra_modules)
    ):
        return
    kind = config.model.finetuning
    raise RequestError(
        f"model.finetuning={kind} does not train norms, but the new layers of this model start with zeroed norms "
        f"({', '.join(norms):.100}), which block all signal; set model.finetuning to freeze or full, or name them in "
        f"model.{kind}.extra_modules"
    )
