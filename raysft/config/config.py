"""The root of the config schema, with the values that follow from several sections."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from raysft.config.cluster import ClusterSection
from raysft.config.data import DataSection
from raysft.config.evaluate import EvaluateSection
from raysft.config.evaluation_effects import Bearing, bearing_of
from raysft.config.generate import GenerateSection
from raysft.config.model import ModelSection
from raysft.config.named_templates import named_template, similar_name, template_names
from raysft.config.optimizers import kind_of, whole_option
from raysft.config.resume_effects import Effect, effect_of
from raysft.config.run import RunSection
from raysft.config.scaling import ScalingSection
from raysft.config.section import Section
from raysft.config.train import TrainSection
from raysft.config.tune import TuneSection
from raysft.config.yaml_text import dump
from raysft.errors import RequestError, one_line
from raysft.storage.local_cache import working_copy
from raysft.storage.path import StoragePath

MICRO_BATCH_TOKENS = 1024
"""Tokens of a microbatch with ``train.micro_batch_size: auto``. Two rows of 512 tokens train 1.1 times as fast at once as one after
the other (SmolLM2-135M on two cores); four at once are no faster than two."""


class Config(Section):
    """Settings of a run."""

    stage: Literal["sft", "pt"] = "sft"
    """``sft``: supervised fine-tuning on conversations; ``pt``: continued pre-training on raw text."""
    run: RunSection = RunSection()
    model: ModelSection
    data: DataSection
    train: TrainSection = TrainSection()
    scaling: ScalingSection = ScalingSection()
    evaluate: EvaluateSection = EvaluateSection()
    generate: GenerateSection = GenerateSection()
    tune: TuneSection = TuneSection()
    cluster: ClusterSection = ClusterSection()

    @property
    def run_place(self) -> StoragePath:
        """The run directory, local or in object storage."""
        return StoragePath.of(self.run.storage) / self.run.name

    @property
    def run_directory(self) -> Path:
        """Absolute path of the run directory, or of its working copy if the run is in object storage."""
        return self.run_place.local or working_copy(self.run_place)

    @property
    def cache_directory(self) -> StoragePath:
        """The cache for tokenized shards and converted models."""
        return StoragePath.of(self.data.cache) if self.data.cache else StoragePath.of(self.run.storage) / "cache"

    @property
    def dtype(self) -> str:
        """Data type of the weights, with ``auto`` resolved."""
        if self.model.dtype != "auto":
            return self.model.dtype
        return "bfloat16" if self.scaling.use_gpu else "float32"

    @property
    def autocast(self) -> bool:
        """True if weights stay in float32 and only the computation uses bfloat16.

        ZeRO keeps float32 copies of bfloat16 weights, but only for optimizers that treat each weight by itself; others need this.
        """
        train = self.train
        by_weight = kind_of(train.optimizer).elementwise and whole_option(train.optimizer_options) is None
        return self.dtype == "bfloat16" and not train.pure_bf16 and not by_weight

    @property
    def weight_dtype(self) -> str:
        """Name of the type that weights which are not quantized have in training."""
        return "float32" if self.autocast else self.dtype

    @property
    def micro_batch_size(self) -> int:
        """``train.micro_batch_size``, with ``auto`` resolved."""
        if self.train.micro_batch_size != "auto":
            return self.train.micro_batch_size
        return max(1, MICRO_BATCH_TOKENS // self.data.sequence_length)

    @property
    def lora_alpha(self) -> float:
        """``model.lora.alpha``, with its default resolved."""
        return self.model.lora.alpha if self.model.lora.alpha is not None else 2.0 * self.model.lora.rank

    @property
    def generates(self) -> bool:
        """True if a run generates predictions after training: enabled, for conversations, with at least one source."""
        sources = self.generate.sources or self.data.eval or self.data.holdout
        return self.stage == "sft" and self.generate.enabled and bool(sources)

    @property
    def chat_template(self) -> str | None:
        """Jinja source of ``model.chat_template``; None if the tokenizer's own template is used.

        Raises:
            RequestError: no built-in template and no readable file has this name, or the file is empty.
        """
        name = self.model.chat_template
        if name is None:
            return None
        if name in template_names():
            return named_template(name)
        try:
            text = Path(name).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            similar = similar_name(name)
            raise RequestError(
                f"model.chat_template={name} is neither a template's name nor a readable file "
                f"({getattr(error, 'strerror', None) or one_line(error)}); "
                + (f"did you mean {similar}? " if similar else "")
                + "use a name that configs/README.md lists, or the path of a Jinja template"
            ) from None
        if not text.strip():
            raise RequestError(f"model.chat_template={name}: the file is empty; use a Jinja template")
        return text

    def numerics_keys(self) -> dict[str, Any]:
        """Flat mapping of the keys that affect the numbers of a training. A run directory belongs to exactly these values."""
        settings = self.model_dump(mode="json")
        settings["model"]["trust_remote_code"] = self.model.runs_code  # the names of other models affect nothing
        settings["model"]["freeze"]["layers"] = self.model.trained_layers
        settings["train"]["micro_batch_size"] = self.micro_batch_size
        return {key: value for key, value in _flatten(settings) if effect_of(key) is not Effect.ALWAYS}

    def evaluation_keys(self) -> dict[str, Any]:
        """Flat mapping of the keys that may change the evaluation of the model before it is trained."""
        excluded = {Bearing.CONTENT, Bearing.NONE} | ({Bearing.ADAPTER} if self.starts_as_base else set())
        settings = _flatten(self.model_dump(mode="json"))
        return {key: value for key, value in settings if bearing_of(key) not in excluded}

    @property
    def starts_as_base(self) -> bool:
        """True if the model certainly computes what it computes without its adapter, until the first step."""
        lora, continues = self.model.lora, bool(self.model.adapters) and not self.model.new_adapter
        if self.model.finetuning == "lora":
            # B is zero in a new adapter, so that it adds exactly zero, unless float16 overflows before the product with B.
            return not (lora.dora or lora.pissa or continues or self.dtype == "float16")
        return self.model.adapter is None

    @property
    def copies_start(self) -> bool:
        """True if training holds a frozen copy of the trained weights as they are at its start, which ASFT stays close to.

        A new adapter needs none: switched off, it leaves the model that training starts from. PiSSA takes its start out of the
        model's weights.
        """
        lora, continues = self.model.lora, bool(self.model.adapters) and not self.model.new_adapter
        switched = self.model.adapter is not None and not continues
        if self.model.finetuning == "lora" and lora.pissa:
            switched = False
        return self.train.loss == "asft" and self.train.reference_model is None and not switched

    def to_yaml(self) -> str:
        """The resolved config as YAML that ``load`` can read back."""
        return dump(self.model_dump(mode="json"))


def _flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested mappings as (dotted key, value), with the keys of overrides. A list of mappings is not a leaf."""
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        value = {str(index): item for index, item in enumerate(value)}
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flatten(inner, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value
