"""Which model, and in which form: found, converted once where needed, loaded, and fitted with adapters."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

from raysft.config import Config, RequestError, locate


def find_model(path: str, cache: Path, say: Callable[[str], None]) -> str:
    """A folder (or hub id) that every later stage can load from.

    A GGUF file is de-quantized to safetensors once, in the cache; whoever comes second waits for the first one's.

    Args:
        path: ``model.path``.
        cache: folder for converted models.
        say: takes a line for people where it takes a while.

    Raises:
        RequestError: there is no such model.
    """
    path = locate(path, "model.path")
    if path.endswith(".gguf"):
        if not Path(path).is_file():
            raise RequestError(f"model.path={path}: there is no such GGUF file")
        return _converted(Path(path), cache, say)
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").exists():
            raise RequestError(
                f"model.path={path}: the folder holds no config.json; give a folder in Hugging Face's form"
            )
        return str(folder.absolute())
    if path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise RequestError(f"model.path={path}: there is no such folder")
    return _on_hub(path)


def check_model(config: Config, model: str) -> None:
    """Find out before anything is started what the workers could only find out later.

    Raises:
        RequestError: weights are missing, adapters have no place in the model, or rows are longer than its positions.
    """
    from transformers import AutoConfig

    try:
        described: Any = AutoConfig.from_pretrained(model).get_text_config()
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise RequestError(f"model.path={model}: its config.json is of no use ({reason:.120})") from None
    folder = Path(model)
    if folder.is_dir() and not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        raise RequestError(f"model.path={model}: the folder holds no weights (*.safetensors); give a whole model")
    positions = getattr(described, "max_position_embeddings", None)
    if positions and config.data.sequence_length > positions:
        raise RequestError(
            f"data.sequence_length={config.data.sequence_length} and the model has {positions} positions; use at most {positions}"
        )
    if config.model.finetuning == "lora" and config.model.lora.target != "all":
        import torch
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            _check_target(AutoModelForCausalLM.from_config(described), config)


def _check_target(model: Any, config: Config) -> None:
    for name in config.model.lora.target:
        if not any(module == name or module.endswith(f".{name}") for module, _ in model.named_modules()):
            raise RequestError(f"model.lora.target names {name!r} and the model has no such module; try 'all'")


def model_identity(model: str) -> str:
    """Hash of a model folder's config and of the names and sizes of its weights; the id of a model on the hub."""
    folder = Path(model)
    if not folder.is_dir():
        return model
    weights = sorted((path.name, path.stat().st_size) for path in folder.glob("*.safetensors"))
    return hashlib.sha256((folder / "config.json").read_bytes() + repr(weights).encode()).hexdigest()[:16]


def _on_hub(path: str) -> str:
    """Check that the hub (or its local cache) has the model; the id itself is what each node loads."""
    from transformers import AutoConfig

    # It would report each of its attempts.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        AutoConfig.from_pretrained(path)
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise RequestError(f"model.path={path}: no folder here, and the hub does not give it ({reason:.120})") from None
    return path


def _converted(file: Path, cache: Path, say: Callable[[str], None]) -> str:
    with file.open("rb") as stream:
        key = hashlib.file_digest(stream, "sha256").hexdigest()[:16]
    target = cache / "models" / f"{file.stem}-{key}"
    if (target / "config.json").exists():
        return str(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with (target.parent / f".{target.name}.lock").open("w") as lock:
        # Only convertings of this one file wait here, and only while one of them works on it.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (target / "config.json").exists():
            draft = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
            try:
                say(f"model: {file.name} is converted to safetensors, once, in {target}")
                with _quiet():
                    _convert(file, draft)
                draft.replace(target)
            finally:
                shutil.rmtree(draft, ignore_errors=True)
    return str(target)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the bars of transformers, and without DeepSpeed's word, when saving imports it, that there is no GPU."""
    logging.disable(logging.WARNING)
    try:
        with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):
            yield
    finally:
        logging.disable(logging.NOTSET)


def _convert(file: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        model: Any = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except (OSError, ValueError, KeyError) as error:
        raise RequestError(
            f"model.path={file}: transformers cannot read this GGUF file ({str(error).splitlines()[0]})"
        ) from None
    # It is a plain float32 model now; with the mark of its origin left on, transformers refuses to save it.
    del model.config.quantization_config
    model.hf_quantizer = None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def load_model(config: Config, path: str) -> Any:
    """The model to train, in its dtype, with adapters where the config asks for them.

    Its cache is off: with one, packed rows would silently see each other.
    """
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, config.dtype), attn_implementation="sdpa")
    model.config.use_cache = False
    if config.model.finetuning == "full":
        return model
    return _with_adapters(model, config, path)


def _with_adapters(model: Any, config: Config, path: str) -> Any:
    import torch
    from peft import LoraConfig, get_peft_model

    lora = config.model.lora
    torch.manual_seed(config.run.seed)
    model = get_peft_model(
        model,
        LoraConfig(
            task_type="CAUSAL_LM",
            r=lora.rank,
            lora_alpha=config.lora_alpha,  # type: ignore[arg-type]  # peft takes any number
            lora_dropout=lora.dropout,
            target_modules="all-linear" if lora.target == "all" else lora.target,
            base_model_name_or_path=path,
        ),
    )
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def load_trained(config: Config, folder: Path) -> Any:
    """A trained model or adapter with its base, to evaluate."""
    import torch
    from transformers import AutoModelForCausalLM

    dtype = getattr(torch, config.dtype)
    if (folder / "adapter_config.json").exists():
        from peft import AutoPeftModelForCausalLM

        return AutoPeftModelForCausalLM.from_pretrained(str(folder), dtype=dtype)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def merge(adapter: Path, output: Path) -> None:
    """Write the full model that an adapter and its base make, with the tokenizer; a full model is copied.

    Raises:
        RequestError: the folder holds neither.
    """
    import torch
    from transformers import AutoTokenizer

    if adapter.is_dir() and not any(adapter.glob("*.safetensors")):
        raise RequestError(
            f"{adapter}: holds no weights (*.safetensors); the model is not whole, copy or train it again"
        )
    if (adapter / "adapter_config.json").exists():
        from peft import AutoPeftModelForCausalLM

        model = AutoPeftModelForCausalLM.from_pretrained(str(adapter), torch_dtype=torch.float32).merge_and_unload()
        model.config.use_cache = True
        model.save_pretrained(output)
        AutoTokenizer.from_pretrained(adapter).save_pretrained(output)
    elif (adapter / "config.json").exists():
        shutil.copytree(adapter, output, dirs_exist_ok=True)
    else:
        raise RequestError(f"{adapter}: holds no trained model; train first (raysft train CONFIG)")
