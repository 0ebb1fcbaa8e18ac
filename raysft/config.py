"""Typed configuration: defaults < YAML file < ``key.path=value`` overrides.

Unknown keys are refused with the nearest known one named, everything is frozen, and each field is documented by the
docstring under it, from which ``raysft COMMAND --help`` is generated.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", coerce_numbers_to_str=True)]
Text = Annotated[str, Field(min_length=1)]
# Strict: `save_every_steps: yes` must not become 1.
Positive = Annotated[int, Field(gt=0, strict=True)]
Count = Annotated[int, Field(ge=0, strict=True)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Column = Literal["messages", "conversations", "instruction", "input", "output", "system", "history", "turns", "text"]


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
    seed: Count = 0
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
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the weights in training and generation. ``auto``: bfloat16 on GPU, float32 on CPU."""
    finetuning: Literal["full", "lora"] = "lora"
    """What is trained: all weights, or low-rank adapters."""
    lora: LoraSection = LoraSection()
    """Adapter settings, used when ``finetuning`` is lora."""


class Source(Section):
    """One dataset."""

    name: Name
    """Name of the source in logs, metrics and rejected.jsonl."""
    path: Text | Annotated[list[Text], Field(min_length=1)]
    """File, folder or glob, or a list of them; local, or on a filesystem that pyarrow reads (``s3://``, ``gs://``,
    ``hdfs://``), or ``package:NAME/GLOB`` inside an installed Python package."""
    format: Literal["alpaca", "sharegpt", "openai", "turns", "text"] | None = None
    """Shape of a record: ``alpaca`` (instruction, input, output), ``sharegpt`` (conversations of from/value), ``openai``
    (messages of role/content), ``turns`` (a list of texts, the user's and the assistant's by turns), ``text``.
    Default: found from the first record."""
    columns: dict[Column, Text] = {}
    """Where a field has another name in the file: field → column, for example ``{output: answer}``."""
    max_examples: Positive | None = None
    """Take only the first N examples."""


class DataSection(Section):
    train: Annotated[list[Source], Field(min_length=1)]
    """Sources to train on."""
    eval: list[Source] = []
    """Sources to evaluate and generate on."""
    holdout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of each training source that is kept out of training and evaluated under the source's name. A stable hash
    of an example's opening decides, so that examples that open alike stay on one side, in this and any other run."""
    sequence_length: Annotated[int, Field(ge=8, strict=True)] = 2048
    """Tokens that one row holds."""
    packing: bool = True
    """Put several examples into one row; they do not see each other."""
    mask_history: bool = False
    """Train only on the last assistant turn of each conversation."""
    train_on_prompt: bool = False
    """Train on every token of a conversation, not only on what the assistant wrote."""
    overlong: Literal["error", "drop"] = "error"
    """A conversation longer than a row stops the run, or is dropped and counted. Raw text is always split instead."""
    max_rejected: Fraction = 0.0
    """Share of records that may be unusable before the run stops; each one is kept in rejected.jsonl."""
    cache: Text | None = None
    """Folder of tokenized shards and converted models, shared by runs. Default: ``{run.storage}/cache``."""

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
        return Path(self.run.storage).absolute() / self.run.name

    @property
    def cache_directory(self) -> Path:
        """Absolute path of the cache of tokenized shards and converted models."""
        return Path(self.data.cache).absolute() if self.data.cache else Path(self.run.storage).absolute() / "cache"

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
        raw = self.model_dump(mode="json")
        for key, value in overrides.items():
            _assign(raw, key, value, where="an override")
        return _validate(raw, lambda path: "override")


def parse(raw: Mapping[str, Any]) -> Config:
    """A config from nested mappings.

    Raises:
        RequestError: a key or value is not what the schema says.
    """
    return _validate(dict(raw), lambda path: "config")


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file and apply ``key.path=value`` overrides.

    Raises:
        RequestError: the file is missing or no YAML, or a key or value is not what the schema says.
    """
    path = Path(path)
    raw, lines = _parse_yaml(_read(path), path)
    from_command_line = [_override(raw, override) for override in overrides]

    def where(location: tuple[str, ...]) -> str:
        if any(location[: len(key)] == key for key in from_command_line):
            return "command line"
        if location not in lines and any(key[: len(location)] == location for key in from_command_line):
            return "command line"  # a section that an override made
        for end in range(len(location), 0, -1):
            if location[:end] in lines:
                return f"{path}:{lines[location[:end]]}"
        return str(path)

    run = raw.setdefault("run", {})
    if run is None:
        run = raw["run"] = {}
    if isinstance(run, dict):
        run.setdefault("name", re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).lstrip("._-") or "run")
    return _validate(raw, where)


def _read(path: Path) -> str:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise RequestError(f"{path}: there is no such config file; give the path of a YAML file") from None
    except OSError as error:
        raise RequestError(f"{path}: the config file cannot be read ({error.strerror})") from None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise RequestError(
            f"{path}:{line}: is not UTF-8 text (byte {content[error.start]:#x}); mend this line"
        ) from None


def _override(raw: dict[str, Any], override: str) -> tuple[str, ...]:
    """Set what one ``key.path=value`` says; gives the key's parts."""
    key, equals, value = override.partition("=")
    parts = tuple(key.split("."))
    if not equals or not all(parts):
        raise RequestError(f"{override!r} is no override; write key.path=value, for example train.epochs=2")
    try:
        _assign(raw, key, yaml.safe_load(value), where=f"{override!r}")
    except yaml.YAMLError:
        raise RequestError(f"{override!r}: the value is no YAML scalar, list or mapping") from None
    return parts


def documented_fields(section: type[Section] = Config, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Every key path of the config with its default and its docstring, in the order of the schema."""
    for name, field in section.model_fields.items():
        nested = field.annotation
        if isinstance(nested, type) and issubclass(nested, Section):
            yield from documented_fields(nested, f"{prefix}{name}.")
            continue
        default = "required" if field.is_required() else json.dumps(field.get_default())
        yield f"{prefix}{name}", default, " ".join((field.description or "").split())
        if prefix + name == "data.train":
            yield from documented_fields(Source, "data.train[].")


class _LineLoader(yaml.SafeLoader):
    """Safe YAML; a key that stands twice is an error, not the silent loss of the first."""


def _parse_yaml(text: str, path: Path) -> tuple[dict[str, Any], dict[tuple[str, ...], int]]:
    """The file's mapping, and the line on which each key path stands (from 1)."""
    try:
        root = yaml.compose(text, Loader=_LineLoader)
        raw = yaml.load(text, Loader=_LineLoader)
    except yaml.YAMLError as error:
        mark, position = getattr(error, "problem_mark", None), getattr(error, "position", 0)
        line = min(mark.line, text.rstrip().count("\n")) if mark else text.count("\n", 0, position)
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise RequestError(f"{path}:{line + 1}: no valid YAML ({reason}); mend this line") from None
    if raw is None:
        raise RequestError(f"{path}: the config is empty; it needs at least model.path and data.train")
    if not isinstance(raw, dict):
        raise RequestError(f"{path}: a config is a mapping of sections (model, data, …), this is {raw!r:.60}")
    lines: dict[tuple[str, ...], int] = {}

    def walk(node: yaml.Node, at: tuple[str, ...]) -> None:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                inner = (*at, str(key.value))
                if inner in lines:
                    raise RequestError(
                        f"{path}:{key.start_mark.line + 1}: {'.'.join(inner)} stands twice (first on line {lines[inner]}); "
                        "keep one"
                    )
                lines[inner] = key.start_mark.line + 1
                walk(value, inner)
        elif isinstance(node, yaml.SequenceNode):
            for index, value in enumerate(node.value):
                lines[(*at, str(index))] = value.start_mark.line + 1
                walk(value, (*at, str(index)))

    if root is not None:
        walk(root, ())
    return raw, lines


def _assign(raw: dict[str, Any], key: str, value: Any, where: str) -> None:
    """Set a dotted key inside nested mappings and lists, making mappings on the way."""
    at: Any = raw
    parts = key.split(".")
    for position, part in enumerate(parts):
        last = position == len(parts) - 1
        if isinstance(at, list):
            if not part.isdigit() or int(part) >= len(at):
                raise RequestError(
                    f"{where}: {'.'.join(parts[:position])} is a list of {len(at)}; {part!r} is none of them"
                )
            if last:
                at[int(part)] = value
            else:
                at = at[int(part)]
        elif isinstance(at, dict):
            if last:
                at[part] = value
            else:
                if at.get(part) is None:
                    at[part] = {}
                at = at[part]
        else:
            raise RequestError(f"{where}: {'.'.join(parts[:position])} holds {at!r} and has no keys inside")


def _validate(raw: dict[str, Any], where: Callable[[tuple[str, ...]], str]) -> Config:
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        problems: dict[tuple[str, ...], list[Any]] = {}
        for problem in sorted(error.errors(), key=lambda problem: problem["type"] not in UNKNOWN):
            problems.setdefault(_place(problem, raw), []).append(problem)
        # Where a list of names holds a wrong one, the other member of a union complains about the list as a whole.
        exact = [
            place for place in problems if not any(place == other[: len(place)] for other in problems.keys() - {place})
        ]
        more = f" (and {len(exact) - 1} more)" if len(exact) > 1 else ""
        raise RequestError(f"{where(exact[0])}: {_describe(exact[0], problems[exact[0]])}{more}") from None


UNKNOWN = ("extra_forbidden", "invalid_key")
WORDING = {
    "model_type": "a section with keys of its own belongs here",
    "string_pattern_mismatch": "use letters, digits, '.', '_' and '-', with a letter or digit first",
    "string_too_short": "should not be empty",
    "too_short": "should not be empty",
}
"""What pydantic says in words of its own, said in ours."""


def _place(problem: Any, raw: Any) -> tuple[str, ...]:
    """The key that a problem is about. Pydantic adds names of types to it, which are no keys of the file."""
    place = []
    at = raw
    for part in problem["loc"]:
        if part in at if isinstance(at, dict) else isinstance(at, list) and isinstance(part, int) and part < len(at):
            at = at[part]
        elif problem["type"] != "missing":
            continue
        place.append(str(part))
    return tuple(place)


def _describe(place: tuple[str, ...], problems: Sequence[Any]) -> str:
    """What is wrong with one key, and what to write instead; members of a union each have a problem with it."""
    # A member of a union whose type fits says more than the others do.
    problem, *others = [each for each in problems if not each["type"].endswith(("_type", "_error"))] or problems
    key = ".".join(place)
    if problem["type"] in UNKNOWN or problem["loc"][-1:] == ("[key]",):
        return f"unknown key {key}; {_suggest(place)}"
    if problem["type"] == "missing":
        return f"{key} is required and is not there; add it"
    value = "" if isinstance(problem["input"], dict | Section) else f"={problem['input']!r:.80}"
    message = WORDING.get(problem["type"]) or problem["msg"].removeprefix("Value error, ")
    for other in others:
        message += f" or {other['msg'].removeprefix('Input should be ')}"
    return f"{key or 'config'}{value}: {message[0].lower()}{message[1:]}"


def _suggest(place: tuple[str, ...]) -> str:
    """The known key that an unknown one probably stands for: one of this section, or one of the same name elsewhere."""
    *section, name = place
    known = _known_keys(section)
    elsewhere: dict[str, list[str]] = {}
    for path, _, _ in documented_fields():
        parts = path.split(".")
        for end in range(1, len(parts) + 1):
            elsewhere.setdefault(parts[end - 1], []).append(".".join(parts[:end]))
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    if not near and name in elsewhere:
        return f"did you mean {' or '.join(dict.fromkeys(elsewhere[name]))}?"
    near = near or difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if near:
        return f"did you mean {'.'.join((*section, near[0]))}?"
    far = difflib.get_close_matches(name, elsewhere, n=1, cutoff=0.75)
    return f"did you mean {elsewhere[far[0]][0]}?" if far else f"known here: {', '.join(known)}"


def _known_keys(location: Sequence[str]) -> list[str]:
    """The fields of the section at a location, for suggestions."""
    section: Any = Config
    for part in location:
        if part.isdigit():
            section = Source
        elif section is Source and part == "columns":
            return list(get_args(Column))
        else:
            section = section.model_fields[part].annotation if hasattr(section, "model_fields") else None
    return list(section.model_fields) if hasattr(section, "model_fields") else []


def _flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested mappings as (dotted key, value); lists count as leaves."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flatten(inner, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value
