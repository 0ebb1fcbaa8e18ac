"""A whole config: frozen, no unknown keys, each field documented by the docstring under it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, field_validator

from raysft.config.data import DataSection
from raysft.config.resuming import Effect, effect_of
from raysft.config.section import Count, Name, Positive, RequestError, Section, Text, known_scheme
from raysft.config.training import ZERO_OPTIMIZERS, ModelSection, TrainSection
from raysft.copies import working_copy
from raysft.storage import Place


class RunSection(Section):
    name: Name = "run"
    """Name of the run directory inside ``run.storage``. Default: the config file's name without its ending."""
    storage: Text = "runs"
    """Folder that holds run directories and the cache: a path that every node of the cluster sees, or a URI (``s3://``,
    ``gs://``, ``hdfs://``, ``abfs://``; options as ``?region=…``). Of a run in an object store this machine keeps the small
    files in ``~/.cache/raysft/runs`` while it works on it."""
    seed: Annotated[int, Field(ge=0, lt=2**32, strict=True)] = 0
    """Seed of the data order, adapter initialisation, dropout and sampling. The same seed gives the same numbers."""

    @field_validator("storage")
    @classmethod
    def _storage_is_known(cls, value: str) -> str:
        return known_scheme(value)


class ScalingSection(Section):
    num_workers: Positive | tuple[Positive, Positive] = 1
    """Training workers; one GPU each, with ``use_gpu``. ``[fewest, most]``: as many as the cluster has room for at the moment;
    training goes on with fewer when a node leaves, and with more again, from its next checkpoint on, when one comes. The
    mathematics stays the same: a step always has ``train.rows_per_step`` rows."""
    wait_minutes: Annotated[float, Field(gt=0)] = 30
    """How long to wait for nodes, once training has begun, while the cluster has room for fewer workers than are wanted."""
    use_gpu: bool = False
    """Train and generate on GPUs."""
    cpus_per_worker: Annotated[float, Field(gt=0)] = 1.0
    """CPUs that Ray reserves for a worker. Leave at least half a CPU of the cluster to the data tasks."""
    threads_per_worker: Positive | None = None
    """Threads of a worker's computation without GPU. Default: the node's cores divided by its workers."""
    address: str | None = None
    """Ray cluster to join. Default: the one this process is started in or that runs on this machine, else a new one of
    this machine alone. ``local`` asks for a new one in any case. Give HOST:PORT of the cluster's head; addresses of Ray Client
    (``ray://``) cannot be used."""

    @field_validator("num_workers", mode="before")
    @classmethod
    def _is_a_number_or_two(cls, value: Any) -> Any:
        numbers = list(value) if isinstance(value, list | tuple) else [value, value]
        whole = all(isinstance(each, int) and not isinstance(each, bool) and each > 0 for each in numbers)
        if not whole or len(numbers) != 2 or numbers[0] > numbers[1]:
            raise ValueError("is neither a positive number nor [fewest, most]; use 2, or [1, 4]")
        return value

    @property
    def fewest_workers(self) -> int:
        """Workers below which a training waits."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def most_workers(self) -> int:
        """Workers that a training never has more of."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]

    @property
    def is_elastic(self) -> bool:
        """Whether the number of workers may change while a training goes on."""
        return self.fewest_workers < self.most_workers


class GenerateSection(Section):
    enabled: bool = True
    """Generate predictions for the evaluation sets after training, and score them (``stage: sft``)."""
    compare_base: bool = True
    """Generate with the untrained model too, and show both side by side. Not with ``model``."""
    model: Text | None = None
    """Model or adapter that ``raysft generate`` generates with instead of the trained one: a folder, a hub id, a ``*.gguf``
    file, or a URI of an object store. Nothing needs to be trained; ``run.name`` must be that of no training. Prompts are made
    with its own tokenizer and chat template (``model.chat_template``, where it has none); an adapter without a tokenizer has
    that of its base. ``model.quantization`` and ``model.dtype`` say how it is loaded."""
    sources: list[Text] = []
    """Names of the sources to generate for, of ``data.eval`` and ``data.train``; with ``data.holdout`` a training source is its
    held-out part, else all of it. Default: those of ``data.eval``, and held-out parts."""
    engine: Literal["transformers", "vllm"] = "transformers"
    """What generates: ``transformers``, on CPUs and GPUs; or ``vllm``, on GPUs, with ``pip install 'raysft[vllm]'`` on every
    node, which itself finds out how many prompts it completes at once."""
    num_actors: Positive | None = None
    """Engines that work in parallel. Default: one per GPU, or one per node without GPU."""
    gpus_per_engine: Positive = 1
    """GPUs of one node that hold an engine's model together, for a model larger than one of them (``scaling.use_gpu``)."""
    max_examples: Positive | None = None
    """Generate for N examples only, spread evenly over each evaluation set."""
    batching: Literal["auto", "continuous", "static"] = "auto"
    """``continuous``: where a prediction ends another prompt takes its place; one GPU, no beams, no ``max_seconds``.
    ``static``: batch by batch, each until its last prediction ends. ``auto``: continuous on GPUs, where the model and the
    settings allow it."""
    batch_size: Positive = 64
    """Prompts that an engine completes at once; where memory runs out, half as many. With vLLM: that it is given,
    and that come back, together."""
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
    num_beams: Positive = 1
    """Beams of a beam search, with ``do_sample: false``; 1: none."""
    length_penalty: float = 1.0
    """In a beam search: above 0 longer predictions are preferred, below 0 shorter ones."""
    stop_tokens: list[Text] = []
    """Tokens that end a prediction, besides those that end the assistant's turns in the data, the tokenizer's eos token, and those
    in the model's generation config."""
    skip_special_tokens: bool = True
    """Leave special tokens out of the predicted text."""
    max_seconds: Annotated[float, Field(gt=0)] | None = None
    """Longest time for a batch of prompts; what was written until then is the prediction."""
    metrics: list[str] = ["similarity"]
    """Metrics of the predictions: modules of the package ``evaluate``. These come with raysft and need no network:
    ``similarity`` (ROUGE over jieba's words and BLEU-4 over characters, as LLaMA-Factory), ``rouge`` (rouge_score), ``bleu``
    (sacreBLEU of the corpus; ``bleu_zh`` for Chinese), ``chrf`` (sacreBLEU), ``exact_match`` (0 to 1; all others 0 to 100).
    Others are Python code, which runs because it is named here: a file, a folder, or an id on the hub, from where it is fetched
    (``NAME`` alone is ``evaluate-metric/NAME`` there, unless there is a ``NAME/NAME.py`` here)."""


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
    def run_place(self) -> Place:
        """The run's directory, wherever it is."""
        return Place.of(self.run.storage) / self.run.name

    @property
    def run_directory(self) -> Path:
        """Absolute path of the run's directory; of one in an object store that of the working copy."""
        return self.run_place.local or working_copy(self.run_place)

    @property
    def cache_directory(self) -> Place:
        """The cache of tokenized shards and converted models."""
        return Place.of(self.data.cache) if self.data.cache else Place.of(self.run.storage) / "cache"

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

    def mathematics(self) -> dict[str, Any]:
        """The keys that decide which numbers a training gives, flat: a run directory belongs to exactly these."""
        whole = self.model_dump(mode="json")
        whole["model"]["trust_remote_code"] = self.model.runs_code  # other names decide nothing
        return {key: value for key, value in _flatten(whole) if effect_of(key) is not Effect.ALWAYS}

    def to_yaml(self) -> str:
        """The resolved config as a file that ``load`` reads back."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)

    def with_overrides(self, overrides: Mapping[str, Any]) -> Config:
        """A copy with dotted keys set to new values, validated."""
        from raysft.config.load import override  # it builds on this module

        return override(self, overrides)


def _flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested mappings as (dotted key, value), as overrides name them; lists count as leaves, but for sources."""
    if isinstance(value, list) and value and all(isinstance(each, dict) for each in value):
        value = {str(index): each for index, each in enumerate(value)}
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flatten(inner, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value
