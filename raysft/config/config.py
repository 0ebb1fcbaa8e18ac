"""A whole config: frozen, no unknown keys, each field documented by the docstring under it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import yaml

from raysft.config.data import DataSection
from raysft.config.generate import GenerateSection
from raysft.config.model import ModelSection
from raysft.config.resume_effects import Effect, effect_of
from raysft.config.run import RunSection
from raysft.config.scaling import ScalingSection
from raysft.config.section import Section
from raysft.config.train import ZERO_OPTIMIZERS, TrainSection
from raysft.config.tune import TuneSection
from raysft.errors import RequestError
from raysft.storage.local_cache import working_copy
from raysft.storage.path import StoragePath


class Config(Section):
    """A whole run."""

    stage: Literal["sft", "pt"] = "sft"
    """``sft``: supervised fine-tuning on conversations; ``pt``: continued pre-training on raw text."""
    run: RunSection = RunSection()
    model: ModelSection
    data: DataSection
    train: TrainSection = TrainSection()
    scaling: ScalingSection = ScalingSection()
    generate: GenerateSection = GenerateSection()
    tune: TuneSection = TuneSection()

    @property
    def run_place(self) -> StoragePath:
        """The run's directory, wherever it is."""
        return StoragePath.of(self.run.storage) / self.run.name

    @property
    def run_directory(self) -> Path:
        """Absolute path of the run's directory; of one in an object store that of the working copy."""
        return self.run_place.local or working_copy(self.run_place)

    @property
    def cache_directory(self) -> StoragePath:
        """The cache of tokenized shards and converted models."""
        return StoragePath.of(self.data.cache) if self.data.cache else StoragePath.of(self.run.storage) / "cache"

    @property
    def dtype(self) -> str:
        """The type of the weights, with ``auto`` decided."""
        if self.model.dtype != "auto":
            return self.model.dtype
        return "bfloat16" if self.scaling.use_gpu else "float32"

    @property
    def autocast(self) -> bool:
        """Whether weights stay float32 and only the computation is bfloat16: for optimizers that ZeRO, which keeps float32
        copies of bfloat16 weights, does not know."""
        return self.dtype == "bfloat16" and self.train.optimizer not in ZERO_OPTIMIZERS

    @property
    def lora_alpha(self) -> float:
        """The scale of the adapter, with its default decided."""
        return self.model.lora.alpha if self.model.lora.alpha is not None else 2.0 * self.model.lora.rank

    @property
    def generates(self) -> bool:
        """True if a run generates predictions after training: enabled, for conversations, with at least one source."""
        sources = self.generate.sources or self.data.eval or self.data.holdout
        return self.stage == "sft" and self.generate.enabled and bool(sources)

    @property
    def chat_template(self) -> str | None:
        """The Jinja text of ``model.chat_template``; None where the tokenizer's own is used.

        Raises:
            RequestError: there is no template of that name, and no such file.
        """
        name = self.model.chat_template
        if name is None:
            return None
        ours = {path.stem: path for path in (Path(__file__).parent.parent / "chat_templates").glob("*.jinja")}
        path = ours.get(name, Path(name))
        try:
            text = path.read_text(encoding="utf-8-sig")
            if not text.strip():
                raise RequestError(f"model.chat_template={name}: the file is empty; give a Jinja template")
            return text.rstrip("\n") if path in ours.values() else text
        except (OSError, UnicodeDecodeError) as error:
            raise RequestError(
                f"model.chat_template={name}: is no template's name ({', '.join(sorted(ours))}) and cannot be read as a file "
                f"({getattr(error, 'strerror', None) or error}); give one of them"
            ) from None

    def numerics_keys(self) -> dict[str, Any]:
        """The keys that decide which numbers a training gives, flat: a run directory belongs to exactly these."""
        whole = self.model_dump(mode="json")
        whole["model"]["trust_remote_code"] = self.model.runs_code  # other names decide nothing
        return {key: value for key, value in _flatten(whole) if effect_of(key) is not Effect.ALWAYS}

    def to_yaml(self) -> str:
        """The resolved config as a file that ``load`` reads back."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def _flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested mappings as (dotted key, value), as overrides name them; lists count as leaves, but for sources."""
    if isinstance(value, list) and value and all(isinstance(each, dict) for each in value):
        value = {str(index): each for index, each in enumerate(value)}
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flatten(inner, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value
