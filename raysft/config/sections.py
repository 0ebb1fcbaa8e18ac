"""The sections of a config: frozen, no unknown keys, each field documented by the docstring under it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", coerce_numbers_to_str=True)]
Text = Annotated[str, Field(min_length=1)]


# Strict: `save_every_steps: yes` must not become 1.
Positive = Annotated[int, Field(gt=0, strict=True)]

Count = Annotated[int, Field(ge=0, strict=True)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Format = Literal["alpaca", "sharegpt", "openai", "prompt_completion", "turns", "text", "tokenized"]
Column = Literal[
    "messages", "conversations", "instruction", "input", "output", "system", "history", "tools", "prompt", "completion",
    "turns", "text", "input_ids", "labels", "weight",
]  # fmt: skip
Tag = Literal["role", "content", "user", "assistant", "observation", "function", "system"]


class RequestError(ValueError):
    """The request is wrong: one line with the fact, the value and the remedy. The command exits with code 2."""


class Section(BaseModel):
    """What every section shares: frozen, no unknown keys, docstrings under the fields."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True, protected_namespaces=()
    )

    @model_validator(mode="before")
    @classmethod
    def _empty_is_default(cls, value: Any) -> Any:
        # In YAML a section whose keys are all commented out is null.
        return {} if value is None else value


class RunSection(Section):
    name: Name = "run"
    """Name of the run directory inside ``run.storage``. Default: the config file's name without its ending."""
    storage: Text = "runs"
    """Folder that holds run directories and the cache; every node of the cluster must see it under this path."""
    seed: Annotated[int, Field(ge=0, lt=2**32, strict=True)] = 0
    """Seed of the data order, adapter initialisation, dropout and sampling. The same seed gives the same numbers."""

    @field_validator("storage")
    @classmethod
    def _storage_is_a_path(cls, value: str) -> str:
        if "://" in value:
            raise ValueError(
                "object stores cannot hold run directories yet; use a path that all nodes see (NFS, a shared volume)"
            )
        return value


class LoraSection(Section):
    rank: Positive = 8
    """Rank of the adapter matrices."""
    alpha: Annotated[float, Field(gt=0)] | None = None
    """Scale of the adapter; the update is multiplied by alpha / rank. Default: 2 · rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapter's input."""
    target: Literal["all"] | list[str] = "all"
    """``all``: every linear layer but the output head; or a list of module names."""


class ModelSection(Section):
    path: Text
    """Model folder, Hugging Face hub id, ``*.gguf`` file, or ``package:NAME/FILE`` inside an installed Python package."""
    chat_template: Text | None = None
    """Chat template to use instead of the tokenizer's own, and to save with the model: a name (``chatml``, ``llama3``,
    ``gemma``, ``alpaca``, ``vicuna``) or a ``*.jinja`` file."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the weights in training and generation. ``auto``: bfloat16 on GPU, float32 on CPU."""
    finetuning: Literal["full", "lora"] = "lora"
    """What is trained: all weights, or low-rank adapters."""
    lora: LoraSection = LoraSection()
    """Adapter settings, used when ``finetuning`` is lora."""


class Source(Section):
    """One dataset."""

    name: Name
    """Name of the source in logs, metrics and rejected.jsonl; with ``data.registry``, its name there."""
    path: Text | Annotated[list[Text], Field(min_length=1)] | None = None
    """File, folder or glob, or a list of them; local, or on a filesystem that pyarrow reads (``s3://``, ``gs://``,
    ``hdfs://``, ``hf://datasets/``), or ``package:NAME/GLOB`` inside an installed Python package. Not needed for a
    source of ``data.registry``."""
    format: Format | None = None
    """Shape of a record: ``alpaca`` (instruction, input, output), ``sharegpt`` (conversations of from/value), ``openai``
    (messages of role/content), ``prompt_completion`` (two texts, or two lists of messages), ``turns`` (a list of texts,
    the user's and the assistant's by turns), ``text``, ``tokenized`` (input_ids, labels). Default: found from the columns."""
    columns: dict[Column, Text] = {}
    """Where a field has another name in the file: field → column, for example ``{output: answer}``."""
    tags: dict[Tag, Text] = {}
    """Where a conversation uses other words: ``role`` and ``content`` name the keys of a turn; ``user``, ``assistant``,
    ``observation``, ``function`` and ``system`` are its roles."""
    weight: Annotated[float, Field(gt=0)] | None = None
    """Share of this source in the mixture, relative to the others (``data.mixing``). Default: 1."""
    max_examples: Positive | None = None
    """Read only the first N records."""


class DataSection(Section):
    train: Annotated[list[Source], Field(min_length=1)]
    """Sources to train on."""
    eval: list[Source] = []
    """Sources to evaluate and generate on."""
    registry: Text | None = None
    """A ``dataset_info.json`` as LLaMA-Factory has it, or its folder: a source without a path is looked up there by name."""
    mixing: Literal["concat", "first_exhausted", "all_exhausted"] = "concat"
    """``concat``: every example once an epoch. Otherwise examples are drawn in the proportion of the sources' weights, anew
    in each epoch, until the first source is used up, or until each one was (smaller ones come again)."""
    holdout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of each training source that is kept out of training and evaluated under the source's name. A stable hash
    of an example's opening decides, so that examples that open alike stay on one side, in this and any other run."""
    sequence_length: Annotated[int, Field(ge=8, strict=True)] = 2048
    """Tokens that one row holds."""
    packing: bool = True
    """Put several examples into one row; they do not see each other. With ``stage: pt``: join documents and cut full rows."""
    document_mask: bool = True
    """With ``stage: pt``: documents in one row do not see each other."""
    mask_history: bool = False
    """Train only on the last assistant turn of each conversation."""
    train_on_prompt: bool = False
    """Train on every token of a conversation, not only on what the assistant wrote."""
    overlong: Literal["truncate", "split", "drop", "error"] = "error"
    """A conversation longer than a row is shortened, cut into several examples, dropped, or stops the run; always counted.
    Raw text is never shortened."""
    keep_prompt: Literal["head", "tail"] = "head"
    """With ``overlong: truncate``: which end of a prompt is kept."""
    control_tokens_in_text: Literal["keep", "escape", "reject"] = "keep"
    """A special token of the tokenizer that is written out in a text (``<|im_end|>``): it acts as one, as in
    ``apply_chat_template``; is encoded as plain characters; or the record is rejected. Always counted."""
    template_options: dict[str, Any] = {}
    """Variables for the chat template, for example ``{enable_thinking: false}``."""
    max_rejected: Fraction = 0.0
    """Share of records that may be unusable before the run stops; each one is kept in rejected.jsonl."""
    cache: Text | None = None
    """Folder of tokenized shards and converted models, shared by runs. Default: ``{run.storage}/cache``."""

    @field_validator("template_options")
    @classmethod
    def _options_are_plain(cls, value: dict[str, Any]) -> dict[str, Any]:
        taken = {
            "messages",
            "conversations",
            "tools",
            "documents",
            "chat_template",
            "add_generation_prompt",
        } & value.keys()
        if taken:
            raise ValueError(f"{sorted(taken)[0]} is what the template is given anyway; take it out")
        # YAML makes a date of 2024-07-26, where templates want the text.
        plain = {key: each.isoformat() if isinstance(each, date) else each for key, each in value.items()}
        try:
            json.dumps(plain)
        except TypeError as error:
            raise ValueError(f"texts, numbers, booleans, lists and mappings belong there ({error})") from None
        return plain

    @model_validator(mode="after")
    def _masks_agree(self) -> DataSection:
        if self.mask_history and self.train_on_prompt:
            raise ValueError("mask_history and train_on_prompt contradict each other; set one of them")
        return self

    @model_validator(mode="after")
    def _names_are_unique(self) -> DataSection:
        for sources in (self.train, self.eval):
            names = [source.name for source in sources]
            twice = {name for name in names if names.count(name) > 1}
            if twice:
                raise ValueError(f"two sources are named {sorted(twice)[0]!r}; give each its own name")
        if self.holdout:
            clash = {s.name for s in self.train} & {s.name for s in self.eval}
            if clash:
                raise ValueError(
                    f"{sorted(clash)[0]!r} is in data.train and data.eval; with data.holdout > 0 names must differ"
                )
        return self

    @model_validator(mode="after")
    def _sources_are_complete(self) -> DataSection:
        for source in (*self.train, *self.eval):
            if source.path is None and self.registry is None:
                raise ValueError(f"source {source.name!r} has no path; give it one, or name data.registry")
        weighted = [source.name for source in self.train if source.weight is not None]
        if weighted and self.mixing == "concat":
            raise ValueError(
                f"source {weighted[0]!r} has a weight, which data.mixing=concat does not use; "
                "set data.mixing to first_exhausted or all_exhausted"
            )
        return self


class TrainSection(Section):
    epochs: Positive = 1
    """Times that every example is trained on."""
    max_steps: Positive | None = None
    """Stop after this many optimizer steps, if that comes before the end of the epochs."""
    rows_per_step: Positive = 32
    """Rows in one optimizer step over all workers together, whatever their number."""
    rows_per_device: Positive = 1
    """Rows that one worker computes at once; more are accumulated."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    """Highest learning rate of the schedule."""
    optimizer: Literal["adamw"] = "adamw"
    """The optimizer."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """Adam's decay rates of the first and second moment."""
    epsilon: Annotated[float, Field(gt=0)] = 1e-8
    """Adam's term that keeps the division finite."""
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """Gradients are scaled down to this global norm; 0 switches clipping off."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Course of the learning rate after warm-up, over the exact number of steps."""
    warmup_ratio: Fraction = 0.03
    """Share of the steps in which the learning rate rises from 0."""
    loss: Literal["cross_entropy"] = "cross_entropy"
    """Loss of a trained token; a step's loss is the sum over its trained tokens divided by their number."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """DeepSpeed ZeRO stage: what the workers share out: nothing, optimizer states, gradients too, weights too."""
    eval_at_start: bool = True
    """Evaluate before the first step as well, so that a run shows what it changed."""
    eval_every_steps: Positive | None = None
    """Evaluate every N steps; always at the end."""
    save_every_steps: Positive | None = None
    """Write a checkpoint to resume from every N steps, and at the end. Default: only the trained model is written."""
    max_failures: Count = 3
    """How often the workers are started again from the newest checkpoint after one of them died."""


class ScalingSection(Section):
    num_workers: Positive = 1
    """Training workers. One GPU each, with ``use_gpu``."""
    use_gpu: bool = False
    """Train and generate on GPUs."""
    cpus_per_worker: Annotated[float, Field(gt=0)] = 1.0
    """CPUs that Ray reserves for a worker. Leave at least half a CPU of the cluster to the data tasks."""
    threads_per_worker: Positive | None = None
    """Threads of a worker's computation without GPU. Default: the node's cores divided by its workers."""
    address: str | None = None
    """Ray cluster to join. Default: the one this process is started in or that runs on this machine, else a new one of
    this machine alone. ``local`` asks for a new one in any case."""


class GenerateSection(Section):
    enabled: bool = True
    """Generate predictions for the evaluation sets after training, and score them (``stage: sft``)."""
    compare_base: bool = True
    """Generate with the untrained model too, and show both side by side."""
    engine: Literal["transformers"] = "transformers"
    """What generates."""
    num_actors: Positive | None = None
    """Engines that work in parallel. Default: one per GPU, or one per node without GPU."""
    max_examples: Positive | None = None
    """Generate for N examples only, spread evenly over each evaluation set."""
    batch_size: Positive = 32
    """Prompts that an engine completes at once."""
    max_new_tokens: Positive = 1024
    """Longest prediction, in tokens."""
    do_sample: bool = True
    """Sample; otherwise take the most probable token."""
    temperature: Annotated[float, Field(gt=0)] = 0.95
    """Softmax temperature in sampling."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.7
    """Sample from the most probable tokens that together have this probability."""
    top_k: Count = 50
    """Sample from the K most probable tokens; 0: from all."""
    repetition_penalty: Annotated[float, Field(gt=0)] = 1.0
    """Above 1, tokens that were used become less probable."""
    metrics: list[str] = ["similarity"]
    """Metrics of the predictions: modules of the package ``evaluate``; ``similarity`` (ROUGE and BLEU-4) comes with raysft,
    others are named by path or id."""


class TuneSection(Section):
    space: dict[str, Annotated[list[Any], Field(min_length=1)]] = {}
    """Dotted config key → values to try; every combination is one trial."""
    metric: str = "eval_loss"
    """Result to compare trials by: a key of ``all_results.json``."""
    mode: Literal["min", "max"] = "min"
    """Whether the smallest or the largest value is best."""
    max_concurrent: Positive | None = None
    """Trials at the same time. Default: as many as the cluster can place."""


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
    def run_directory(self) -> Path:
        """Absolute path of the run's directory."""
        return Path(self.run.storage).expanduser().absolute() / self.run.name

    @property
    def cache_directory(self) -> Path:
        """Absolute path of the cache of tokenized shards and converted models."""
        return Path(self.data.cache).expanduser().absolute() if self.data.cache else self.run_directory.parent / "cache"

    @property
    def dtype(self) -> str:
        """The type of the weights, with ``auto`` decided."""
        if self.model.dtype != "auto":
            return self.model.dtype
        return "bfloat16" if self.scaling.use_gpu else "float32"

    @property
    def lora_alpha(self) -> float:
        """The scale of the adapter, with its default decided."""
        return self.model.lora.alpha if self.model.lora.alpha is not None else 2.0 * self.model.lora.rank

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
            text = path.read_text(encoding="utf-8")
            if not text.strip():
                raise RequestError(f"model.chat_template={name}: the file is empty; give a Jinja template")
            return text.rstrip("\n") if path in ours.values() else text
        except (OSError, UnicodeDecodeError) as error:
            raise RequestError(
                f"model.chat_template={name}: is no template's name ({', '.join(sorted(ours))}) and cannot be read as a file "
                f"({getattr(error, 'strerror', None) or error}); give one of them"
            ) from None

    def mathematics(self) -> dict[str, Any]:
        """The keys that decide which numbers a training gives, flat: a run directory belongs to exactly these."""
        whole = self.model_dump(mode="json", include={"stage", "run", "model", "data", "train"})
        left_out = ("run.name", "run.storage", "data.cache", "train.max_failures", "train.save_every_steps")
        return {key: value for key, value in _flatten(whole) if key not in left_out}

    def fingerprint(self) -> str:
        """A hash of ``mathematics()``."""
        return hashlib.sha256(json.dumps(self.mathematics(), sort_keys=True).encode()).hexdigest()[:16]

    def to_yaml(self) -> str:
        """The resolved config as a file that ``load`` reads back."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)

    def with_overrides(self, overrides: Mapping[str, Any]) -> Config:
        """A copy with dotted keys set to new values, validated."""
        from raysft.config.load import override  # it builds on this module

        return override(self, overrides)


def _flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested mappings as (dotted key, value); lists count as leaves."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flatten(inner, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value
