"""Keys of LLaMA-Factory that take effect together: model, adapters, new tokens."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import yaml

from raysft.config.llamafactory.settings import Entry, Refusal, Settings
from raysft.config.llamafactory.table import TABLE
from raysft.config.llamafactory.translation import Derived
from raysft.errors import as_yaml, one_line
from raysft.storage.modelscope import prefers_modelscope


def model(given: Settings) -> Derived:
    """Model, adapters, data types."""
    if given["model_name_or_path"] is None:
        yield Refusal("model_name_or_path", "model_name_or_path is required, but missing; add it")
        return
    path, revision = located(given)
    path = _trained(path)
    yield Entry("model.path", path, "model_name_or_path")
    if given["trust_remote_code"]:
        yield Entry("model.trust_remote_code", [path], "trust_remote_code", "allows this model to run its own code")
    folder = given["adapter_folder"]
    adapters = [
        f"{_trained(adapter)}/{folder}" if folder else _trained(adapter) for adapter in given["adapter_name_or_path"]
    ]
    if given.trains and adapters:
        yield Entry("model.adapters", adapters, "adapter_name_or_path")
        yield Entry("model.new_adapter", given["create_new_adapter"], "create_new_adapter")
    if not given.trains and (given.predicts or given.evaluates_alone):
        what, key = ("predictions", "generate.model") if given.predicts else ("evaluations", "evaluate.model")
        asked = "do_predict" if given["do_predict"] else "do_eval"
        if len(adapters) > 1:
            yield Refusal(
                "adapter_name_or_path",
                f"adapter_name_or_path: {what} accept only one adapter; merge them first",
            )
        whole = f"{path}@{revision}" if revision else path
        yield Entry(key, (adapters or [whole])[-1], "adapter_name_or_path" if adapters else asked)
    if revision:
        yield Entry("model.revision", revision, "model_revision")
    yield from _dtype(given)
    yield from _quantization(given)
    kind = given["finetuning_type"]
    if kind in ("lora", "oft"):
        yield Entry(f"model.{kind}.extra_modules", given["additional_target"], "additional_target")
    if kind == "lora":
        yield Entry(
            "model.lora.pissa",
            given["pissa_init"],
            "pissa_init",
            "" if given["pissa_convert"] else "saved as an ordinary adapter, as with pissa_convert: true",
        )
        if given["pissa_init"]:
            yield Entry("model.lora.pissa_iterations", max(0, given["pissa_iter"]), "pissa_iter")
        if given["loraplus_lr_ratio"] is not None and given["loraplus_lr_embedding"] != 1e-6:
            yield Refusal(
                "loraplus_lr_embedding",
                "loraplus_lr_embedding is not supported; remove it: embeddings use the same learning rate as the other "
                "adapters",
            )
    yield from _layers(given)
    if given.trains:
        yield from _parts(given)
    yield from _experts(given)
    liger = "use_liger_kernel" if given["use_liger_kernel"] else "enable_liger_kernel"
    yield Entry("model.liger", given[liger], liger)


def _experts(given: Settings) -> Derived:
    """Experts in KTransformers' kernel; without ``use_kt`` nothing reads the keys about them."""
    if not given["use_kt"]:
        return
    yield Entry("model.experts", "kt", "use_kt")
    for key, remedy in (
        ("kt_weight_path", "remove it: the experts' weights come from the model itself, in bfloat16"),
        (
            "kt_expert_checkpoint_path",
            "remove it, and point model_name_or_path to the model including all of its experts",
        ),
        ("kt_use_lora_experts", "remove it: the model's own experts get LoRA"),
    ):
        if given[key]:
            yield Refusal(key, f"{key}={as_yaml(given[key])} is not supported; {remedy}")


def _layers(given: Settings) -> Derived:
    """Layers to train: the last, the first, or those that a model was expanded by (LLaMA Pro)."""
    number, expanded, kind = given["freeze_trainable_layers"], given["use_llama_pro"], given["finetuning_type"]
    if expanded and kind != "freeze":
        # The number of layers, which says which ones are new, is in a file that may still be on the hub.
        instead = {
            "full": "to train all layers",
            "lora": "and name the modules of the new layers in lora_target, for example 3.self_attn.q_proj,3.mlp.down_proj",
            "oft": "and name the modules of the new layers in oft_target, for example 3.self_attn.q_proj,3.mlp.down_proj",
        }
        yield Refusal(
            "use_llama_pro",
            f"use_llama_pro=true with finetuning_type={kind} is not supported; set finetuning_type to freeze, or remove it, "
            f"{instead[kind]}",
        )
    elif expanded and number < 1:
        yield Refusal(
            "freeze_trainable_layers",
            f"freeze_trainable_layers={number} does not select any layers that use_llama_pro=true could train; set it to the "
            "number of layers by which the model was expanded",
        )
    elif kind == "freeze":
        yield Entry("model.freeze.layers", number if expanded or number != 2 else "auto", "freeze_trainable_layers")
        yield Entry("model.freeze.spread", expanded, "use_llama_pro")


def _parts(given: Settings) -> Derived:
    """Parts of a model for images that are trained."""
    names = {
        "freeze_language_model": "language",
        "freeze_multi_modal_projector": "projector",
        "freeze_vision_tower": "vision",
    }
    kind, parts = given["finetuning_type"], [part for key, part in names.items() if not given[key]]
    if kind == "freeze" and ("vision" in parts or "language" not in parts):
        key = "freeze_vision_tower" if "vision" in parts else "freeze_language_model"
        yield Refusal(
            key,
            f"{key}={as_yaml(given[key])} with finetuning_type=freeze is not supported; remove it, or set finetuning_type to full, "
            "which trains whole parts",
        )
        return
    note = ""
    if kind in ("lora", "oft") and "projector" in parts:
        parts.remove("projector")
        note = f"with {kind}, LLaMA-Factory does not train the projector; add it to train it in full"
    if not parts:
        yield Refusal(
            "freeze_language_model", "freeze_language_model=true leaves nothing to train; unfreeze another part"
        )
        return
    changed = next((key for key in names if given[key] != TABLE[key].default), "freeze_vision_tower")
    yield Entry("model.train_parts", parts, changed, note)


def located(given: Settings) -> tuple[str, str | None]:
    """Return the path of the model, and its revision on the Hugging Face hub."""
    path = given["model_name_or_path"] or "MODEL"
    revision = None if given["model_revision"] == "main" else given["model_revision"]
    if prefers_modelscope() and re.fullmatch(r"[\w.-]+/[\w.-]+", path) and not Path(path).exists():
        return f"ms://{path}" + (f"@{revision}" if revision else ""), None
    return path, revision


def _trained(path: str) -> str:
    """Folder of a model. A run directory of raysft has it in ``model/``, that of LLaMA-Factory in the folder itself."""
    inner = Path(path) / "model"
    return f"{path.rstrip('/')}/model" if inner.is_dir() and (Path(path) / "config.yaml").is_file() else path


def _dtype(given: Settings) -> Derived:
    if given["bf16"] and given["fp16"]:
        yield Refusal("fp16", "fp16=true, but bf16=true; set only one of them")
    elif given["pure_bf16"]:
        yield Entry("model.dtype", "bfloat16", "pure_bf16")
        if given["use_badam"]:
            yield Entry("train.pure_bf16", False, "pure_bf16", "BAdam keeps float32 copies of the block that it trains")
        else:
            yield Entry("train.pure_bf16", True, "pure_bf16")
    elif given["bf16"] or given["fp16"]:
        key = "bf16" if given["bf16"] else "fp16"
        yield Entry("model.dtype", {"bf16": "bfloat16", "fp16": "float16"}[key], key)
    elif not given.trains and given["infer_dtype"] != "auto":
        yield Entry("model.dtype", given["infer_dtype"], "infer_dtype")
    elif given.trains:
        yield Entry(
            "model.dtype", "auto", "bf16", "without bf16 and fp16, LLaMA-Factory uses the dtype in the model's config"
        )


def _quantization(given: Settings) -> Derived:
    bits, method = given["quantization_bit"], given["quantization_method"]
    if bits is None:
        return
    if method != "bnb" or bits not in (4, 8):
        yield Refusal(
            "quantization_bit",
            f"quantization_bit={bits} with quantization_method={method} is not supported; use 4 or 8 bits with bnb",
        )
    yield Entry("model.quantization", f"{bits}bit", "quantization_bit")


def new_tokens(given: Settings) -> Derived:
    """Tokens to add, and how their embeddings begin."""
    plain, special, file = given["add_tokens"], given["add_special_tokens"], given["new_special_tokens_config"]
    described = _descriptions(file) if file else {}
    if isinstance(described, Refusal):
        yield described
        return
    special = list(described) or special
    if not plain and not special:
        return
    yield Entry("model.new_tokens.plain", plain, "add_tokens")
    yield Entry("model.new_tokens.special", special, "new_special_tokens_config" if file else "add_special_tokens")
    way = given["init_special_tokens"] if described else "noise_init"
    if way != "noise_init":
        yield Entry("model.new_tokens.descriptions", described, "new_special_tokens_config")
    yield Entry("model.new_tokens.noise", 0.0 if way == "desc_init" else 1.0, "init_special_tokens")


def _descriptions(file: str) -> dict[str, str] | Refusal:
    where = f"new_special_tokens_config={file}"
    try:
        found = yaml.safe_load(Path(file).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        return Refusal("new_special_tokens_config", f"{where} cannot be read as YAML ({reason}); correct it")
    if not isinstance(found, dict) or not all(isinstance(part, str) for pair in found.items() for part in pair):
        return Refusal("new_special_tokens_config", f"{where} must map each token to its description, both as text")
    return found


MODEL: tuple[Callable[[Settings], Derived], ...] = (model, new_tokens)
