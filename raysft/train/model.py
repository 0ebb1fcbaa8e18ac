"""Which model, and in which form: found, converted once where needed, loaded, and fitted with adapters."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

from pyarrow import ArrowException

from raysft import hub
from raysft.config import Config, RequestError, locate
from raysft.copies import cache_home, local_copy, may_be_on_hub, model_copy
from raysft.pretrained import check_weights, load_weights
from raysft.quantized import check_method, method_of, quantization_config
from raysft.records import MODEL_MARKS
from raysft.storage import FIRST_SECONDS, Place, StorageFailed, patience, reason_of


def find_model(path: str, cache: Place, say: Callable[[str], None], key: str = "model.path") -> str:
    """A folder, URI or hub id that every later stage can load from, on each node through ``local_copy``.

    A GGUF file is de-quantized to safetensors once, in the cache; whoever comes second waits for the first one's.

    Args:
        path: what stands under ``key``.
        cache: folder for converted models.
        say: takes a line for people where it takes a while.
        key: where it is named; under ``generate.model`` it may be an adapter.

    Raises:
        RequestError: there is no such model.
    """
    path, marks = locate(path, key), MODEL_MARKS if key == "generate.model" else ("config.json",)
    if "://" in path:
        return _elsewhere(Place.of(path), cache, say, key, marks)
    if path.endswith(".gguf"):
        if not Path(path).is_file():
            raise RequestError(f"{key}={path}: there is no such GGUF file")
        return _converted(Path(path), cache, say, key)
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not any((folder / mark).exists() for mark in marks):
            raise RequestError(
                f"{key}={path}: the folder holds no {' or '.join(marks)}; give a folder in Hugging Face's form"
            )
        return str(folder.absolute())
    if folder.exists():
        raise RequestError(f"{key}={path}: is a file; give the folder that it lies in, or a GGUF file (*.gguf)")
    if not may_be_on_hub(path):
        raise RequestError(f"{key}={path}: there is no such folder")
    return _on_hub(path, key, marks)


def _elsewhere(place: Place, cache: Place, say: Callable[[str], None], key: str, marks: Sequence[str]) -> str:
    """A model in an object store."""
    try:
        with patience(FIRST_SECONDS, say):
            copy = Path(local_copy(place.location))
    except FileNotFoundError:
        raise RequestError(f"{key}={place}: there is nothing; check the path") from None
    except (StorageFailed, OSError, ArrowException) as error:
        raise RequestError(
            f"{key}={place}: cannot be read ({reason_of(error)}); check it and its credentials"
        ) from None
    if copy.suffix == ".gguf":
        return _converted(copy, cache, say, key)
    if not any((copy / mark).exists() for mark in marks):
        raise RequestError(f"{key}={place}: holds no {' or '.join(marks)}; give a folder in Hugging Face's form")
    return place.location


def check_model(config: Config, model: str, say: Callable[[str], None] = lambda line: None) -> Any:
    """Find out before anything is started what the workers could only find out later.

    Args:
        config: the run's config.
        model: folder or hub id.
        say: takes a line where something is left alone.

    Returns:
        The model's configuration.

    Raises:
        RequestError: code would have to run that nobody has named, weights are missing, adapters have no place in the model,
            or rows are longer than its positions.
    """
    from raysft.train.attention import kernel
    from raysft.train.finetuning import check_names
    from raysft.train.optim import check_installed
    from raysft.train.zero import deepspeed_settings

    model = local_copy(model)
    described = describe(config, model, config.model.path, say).get_text_config()
    positions = getattr(described, "max_position_embeddings", None)
    if positions and config.data.sequence_length > positions:
        raise RequestError(
            f"data.sequence_length={config.data.sequence_length} and the model has {positions} positions; use at most {positions}"
        )
    if layerdrop := getattr(described, "layerdrop", 0):
        say(f"model: layerdrop={layerdrop} of its config.json is not applied; all layers are trained in every step")
    _check_quantized(model, described, config)
    check_installed(config.train.optimizer)
    quantization_config(config)
    kernel(config)
    deepspeed_settings(config, config.scaling.most_workers)
    if _names_modules(config):
        import torch
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            check_names(AutoModelForCausalLM.from_config(described, trust_remote_code=config.model.runs_code), config)
    return described


def describe(config: Config, model: str, path: str, say: Callable[[str], None], key: str = "model.path") -> Any:
    """A model's configuration, when its files are of use.

    Args:
        config: names the models whose code may run.
        model: folder or hub id.
        path: its name, for the trust in its code and for messages.
        say: takes a line where something is left alone.
        key: where it is named.

    Raises:
        RequestError: code would have to run that nobody has named, its config cannot be read, or weights are missing.
    """
    from transformers import AutoConfig

    from raysft.train.code import check_code

    try:
        check_code(config, model, say, path, key)
        described = AutoConfig.from_pretrained(model, trust_remote_code=path in config.model.trust_remote_code)
    except RequestError:
        raise
    except Exception as error:
        fault = hub.reason_of(error)
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise RequestError(f"{key}={model}: {fault or f'its config.json is of no use ({reason:.120})'}") from None
    _check_causal(described, f"{key}={model}", path in config.model.trust_remote_code)
    check_weights(Path(model), f"{key}={model}")
    return described


def _check_causal(described: Any, named: str, trusted: bool) -> None:
    """The model must be one that continues texts, from left to right."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    if trusted and "AutoModelForCausalLM" in (getattr(described, "auto_map", None) or {}):
        return
    if type(described) not in MODEL_FOR_CAUSAL_LM_MAPPING or described.is_encoder_decoder:
        kind = "encoder and decoder" if described.is_encoder_decoder else "no causal language model of transformers"
        raise RequestError(f"{named}: model_type={described.model_type} is {kind}; give a model that continues text")


def _names_modules(config: Config) -> bool:
    model = config.model
    section = {"lora": model.lora, "oft": model.oft}.get(model.finetuning)
    special = section is not None and (section.target != "all" or section.extra_modules or section.dropout)
    return model.finetuning == "freeze" or bool(special) or model.lora.pissa or model.lora.dora


def _check_quantized(model: str, described: Any, config: Config) -> None:
    """Quantized weights are frozen, and a library must know them."""
    method = method_of(described)
    if method is None:
        return
    if config.model.finetuning not in ("lora", "oft"):
        raise RequestError(
            f"model.path={model}: is quantized ({method}), which freezes its weights; set model.finetuning to lora or oft"
        )
    check_method(f"model.path={model}", method, config)


DECISIVE = (".safetensors", ".bin", ".py")
"""Endings of the files that decide what a model computes, besides its config."""


def model_identity(model: str) -> str:
    """Hash of a model's or adapter's config, weights and code (of large files samples); the id of a model on the hub."""
    folder = Path(local_copy(model))
    if not folder.is_dir():
        return model
    decisive = (path for ending in DECISIVE for path in folder.glob(f"*{ending}"))
    weights = sorted((path.name, path.stat().st_size, _sampled(path)) for path in decisive)
    described = next(path for name in ("adapter_config.json", "config.json") if (path := folder / name).exists())
    return hashlib.sha256(described.read_bytes() + repr(weights).encode()).hexdigest()[:16]


SAMPLES, SAMPLE_BYTES = 256, 1 << 16
"""Of a large file, so that a model of many GiB is known in a second; a training changes all of its weights, or whole layers."""


def _sampled(file: Path) -> str:
    size, digest = file.stat().st_size, hashlib.sha256()
    with file.open("rb") as stream:
        if size <= SAMPLES * SAMPLE_BYTES:
            return hashlib.file_digest(stream, "sha256").hexdigest()
        for index in range(SAMPLES):
            stream.seek(index * (size - SAMPLE_BYTES) // (SAMPLES - 1))
            digest.update(stream.read(SAMPLE_BYTES))
    return digest.hexdigest()


def _on_hub(path: str, key: str, marks: Sequence[str]) -> str:
    """Check that the hub (or its local cache) has the model; the id itself is what each node loads."""
    from transformers import PreTrainedConfig

    try:
        if "adapter_config.json" in marks:
            model_copy(path)  # an adapter has no config to ask for
        else:
            described, _ = PreTrainedConfig.get_config_dict(local_copy(path))  # without the model's own code
            if not isinstance(described, dict):
                raise ValueError("config.json holds no mapping")
    except Exception as error:
        raise RequestError(f"{key}={path}: is no folder here, and {hub.reason_of(error) or hub.NONSENSE}") from None
    return path


def _converted(file: Path, cache: Place, say: Callable[[str], None], key: str) -> str:
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()[:16]

    def write(folder: Path) -> None:
        say(f"model: {file.name} is converted to safetensors, once, in {target}")
        with _quiet():
            _convert(file, folder, key)

    target = cache / "models" / f"{file.stem}-{digest}"
    return in_cache(target, write).location


def in_cache(target: Place, write: Callable[[Path], None]) -> Place:
    """A model folder in the cache, written by whoever comes first; others wait for it."""
    if (target / "config.json").exists():
        return target
    # For an object store it is made here; machines that make the same one at once put the same files there.
    beside = target.local.parent if target.local else cache_home() / "models"
    beside.mkdir(parents=True, exist_ok=True)
    with (beside / f".{target.name}.lock").open("w") as lock:
        # Only those who want this one model wait here, and only while one of them works on it.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (target / "config.json").exists():
            draft = beside / f".{target.name}.{uuid.uuid4().hex}"
            try:
                write(draft)
                if target.local:
                    draft.replace(target.local)
                else:
                    target.upload(draft, last="config.json")
            finally:
                shutil.rmtree(draft, ignore_errors=True)
    return target


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the bars of transformers, and without DeepSpeed's word, when saving imports it, that there is no GPU."""
    logging.disable(logging.WARNING)
    try:
        with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):
            yield
    finally:
        logging.disable(logging.NOTSET)


def _convert(file: Path, folder: Path, key: str) -> None:
    import torch
    from transformers import AutoTokenizer

    # Files beside it might name code; a GGUF needs none.
    what: dict[str, Any] = {"gguf_file": file.name, "trust_remote_code": False}
    try:
        model = load_weights(file.parent, dtype=torch.float32, **what)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **what)
    except (OSError, ValueError, KeyError) as error:
        raise RequestError(
            f"{key}={file}: transformers cannot read this GGUF file ({str(error).splitlines()[0]})"
        ) from None
    # It is a plain float32 model now; with the mark of its origin left on, transformers refuses to save it.
    del model.config.quantization_config
    model.hf_quantizer = None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
