"""The sizes and activations of a config's model: from the cache, from a trace, or by formula."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from raysft.config import Config
from raysft.errors import StorageFailed
from raysft.estimate.formula import Decoder, by_formula
from raysft.estimate.images_of_rows import ImagesOfRows
from raysft.estimate.memory import PROCESS
from raysft.estimate.sizes import Activations, ModelSizes, Weight
from raysft.storage.local_cache import local_copy
from raysft.storage.retry import retry_for

METHOD = 8
"""Counts up when the trace changes, so that older results in a cache are not used."""
SHARES = 20
"""The share of loss tokens is rounded up to a multiple of 1 / SHARES, so that other data finds the same result."""


@dataclass(frozen=True)
class Microbatch:
    """The shape of a microbatch's rows."""

    tokens: int
    """Tokens of a row."""
    loss_share: float
    """Share of them with a loss."""
    images: ImagesOfRows | None = None
    """None without images."""

    def rounded(self) -> Microbatch:
        """Return it with the share rounded up.

        >>> Microbatch(512, 0.31).rounded()
        Microbatch(tokens=512, loss_share=0.35, images=None)
        """
        return replace(self, loss_share=max(1, math.ceil(self.loss_share * SHARES - 1e-9)) / SHARES)


def measure(
    config: Config, hf_config: Any, adapter: str | None, microbatch: Microbatch
) -> tuple[ModelSizes, Activations]:
    """Return the sizes of a model and what its activations need.

    Args:
        config: the run's config.
        hf_config: the model's own.
        adapter: folder of the adapter that training continues from.
        microbatch: shape of its rows.

    Raises:
        Exception: of any type; transformers cannot make the model without its weights.
    """
    microbatch = microbatch.rounded()
    file = config.cache_directory / "estimates" / f"{_key(config, hf_config, adapter, microbatch)}.json"
    with suppress(OSError, StorageFailed, ValueError, KeyError, TypeError), retry_for(0):
        found = json.loads(file.read_text())
        return _sizes(found["sizes"]), _with_images(Activations.from_dict(found["activations"]), microbatch)
    with _quiet():
        sizes, activations = _measured(config, hf_config, adapter, microbatch)
    with suppress(OSError, StorageFailed), retry_for(0):
        file.write_text(json.dumps({"sizes": asdict(sizes), "activations": activations.to_dict()}))
    return sizes, _with_images(activations, microbatch)


def _with_images(activations: Activations, microbatch: Microbatch) -> Activations:
    """Return the activations for the number of images of a row, on which the trace does not depend."""
    if activations.images is None or microbatch.images is None:
        return activations
    return replace(activations, images=replace(activations.images, per_row=microbatch.images.per_row))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what libraries say about a model that will not be trained here."""
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def _measured(
    config: Config, hf_config: Any, adapter: str | None, microbatch: Microbatch
) -> tuple[ModelSizes, Activations]:
    from raysft.estimate.fake_model import model_without_weights, sizes_of
    from raysft.estimate.trace import LOSS_ROWS, trace
    from raysft.estimate.trace_images import trace_images
    from raysft.train.loss import CHUNK_TOKENS

    plain = copy.deepcopy(hf_config)
    for each in {id(part): part for part in (plain, plain.get_text_config())}.values():
        if getattr(each, "quantization_config", None) is not None:
            del each.quantization_config  # frozen weights keep nothing for the backward pass, quantized or not
        rope = getattr(each, "rope_parameters", None)
        if isinstance(rope, dict) and rope.get("rope_type") == "dynamic":
            rope["rope_type"] = "linear"  # of the same sizes, and without a look at values
    model = model_without_weights(config, plain, adapter)
    sizes, images = sizes_of(model), None
    if microbatch.images is not None:
        with suppress(Exception):  # of any model whose code looks at values
            images = trace_images(config, model, microbatch.images)
    try:
        activations = trace(config, model, microbatch.tokens, microbatch.loss_share)
    except Exception:  # likewise
        activations = by_formula(
            Decoder.of(plain),
            width=4 if config.dtype == "float32" else 2,
            tokens=microbatch.tokens,
            loss_share=microbatch.loss_share,
            recomputed=_recomputed(config, plain),
            chunk=CHUNK_TOKENS,
            rows=tuple(sorted({config.micro_batch_size, *LOSS_ROWS})),
        )
    return sizes, replace(activations, images=images)


def _recomputed(config: Config, hf_config: Any) -> int:
    """Number of layers that are computed again."""
    train, layers = config.train, Decoder.of(hf_config).layers
    asked = layers if train.recompute_layers is None else min(layers, train.recompute_layers)
    return asked if train.gradient_checkpointing else 0


def _key(config: Config, hf_config: Any, adapter: str | None, microbatch: Microbatch) -> str:
    train, model = config.train, config.model
    content = {
        "method": METHOD,
        "versions": [version(name) for name in ("torch", "transformers", "peft")],
        "model": {key: value for key, value in hf_config.to_dict().items() if key != "_name_or_path"},
        "adapter": (Path(local_copy(adapter)) / "adapter_config.json").read_text() if adapter else None,
        "microbatch": [microbatch.tokens, microbatch.loss_share],
        "images": microbatch.images
        and [microbatch.images.processor.digest, microbatch.images.width, microbatch.images.height],
        "rows": config.micro_batch_size,
        "types": [config.dtype, config.autocast, config.scaling.use_gpu],
        "trained": [
            model.finetuning,
            model.train_parts,
            model.freeze.model_dump(),
            model.lora.model_dump(),
            model.oft.model_dump(),
        ],
        "experts": model.experts,
        "attention": [
            model.attention,
            config.data.packing,
            config.data.sequence_length,
            config.scaling.sequence_parallel,
        ],
        "train": [train.gradient_checkpointing, train.zero_stage == 3, train.loss, train.label_smoothing, train.z_loss],
        "recomputed": train.recompute_layers,
        "routers": train.router_aux_loss_coef is not None,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _sizes(content: Mapping[str, Any]) -> ModelSizes:
    trained = tuple(Weight(tuple(each["shape"]), each["inner"], each["count"]) for each in content["trained"])
    return ModelSizes(**{**content, "trained": trained})


def surely_small(hf_config: Any, weight_bytes: int, tokens: int, rows: int, limit: float, eager: bool = False) -> bool:
    """Return True if training on CPUs stays below half of the memory, regardless of its other settings; cheap, and often False.

    Args:
        hf_config: the model's own config.
        weight_bytes: size of its weight files.
        tokens: tokens of a row.
        rows: rows of a microbatch.
        limit: bytes that a worker has.
        eager: True with ``model.attention: eager``, which keeps matrices of tokens × tokens, as dropout of attention does.
    """
    try:
        text = hf_config.get_text_config()
        drops = any(
            getattr(text, name, None) for name in ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")
        )
        decoder = Decoder.of(hf_config)
    except (AttributeError, TypeError, ZeroDivisionError):
        return False
    activations = by_formula(decoder, 4, tokens, 1.0, 0, 1024, (rows,))
    # Two bytes for each weight in the files; 28 with gradients, float32 copies, moments and what the step needs.
    needed = 14 * weight_bytes + 2 * activations.saved(rows) + 2 * activations.loss_at(rows).peak + PROCESS
    if eager or drops:
        needed += 2 * 3 * 4 * rows * decoder.heads * tokens**2 * decoder.layers  # weights, with dropout, and its mask
    return needed < limit / 2
