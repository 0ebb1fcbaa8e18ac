"""Plan a run before it starts: rows, steps, tokens, padding, and resources of the cluster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from raysft.cluster.placement import TASK_CPUS, Node, max_workers
from raysft.config import Config
from raysft.config.optimizer_settings import described
from raysft.data.prepare import PreparedData
from raysft.data.rows.mixture import mixture
from raysft.data.rows.row_plan import RowPlan
from raysft.data.tokenization.turn_ends import TurnStatistics, merge_counts
from raysft.models.adapter_files import read_adapter_config
from raysft.models.reference_model import ReferenceFiles
from raysft.run.generation_plan import GenerationPlan, plan_generation
from raysft.run.source_plan import SourcePlan, plan_sources
from raysft.run.warnings import warnings
from raysft.storage.local_cache import local_copy


@dataclass(frozen=True)
class Resolved:
    """The settings a training run uses, with every default that raysft chooses. The report reads them."""

    dtype: str
    """Type of the weights: ``float32``, ``bfloat16`` or ``float16``."""
    finetuning: str
    """``full``, ``freeze``, ``lora`` or ``oft``."""
    adapter: str
    """Kind of the adapter that the run writes: ``none``, ``lora`` or ``oft``."""
    lora_alpha: float | None
    """Scale of a LoRA adapter; None without one."""
    learning_rate: float
    """Peak learning rate."""
    global_batch_size: int
    """Rows in a step, even where the config has ``auto``."""
    micro_batch_size: int
    """Rows that a worker computes at once, even where the config has ``auto``, or more than the worker has in a step."""
    workers: int
    """Number of workers that the cluster has room for at the start."""
    attention: str
    """Attention kernel; ``auto`` where transformers chooses the best one that the model supports."""
    zero_stage: int
    optimizer: str
    """Its name, with those settings that it takes."""
    model_commit: str | None = None
    """Commit of a model on the Hub."""
    reference_commit: str | None = None
    """Commit of ``train.reference_model`` on the Hub."""


@dataclass(frozen=True)
class Plan:
    """The plan of a whole run."""

    stage: str
    examples: int
    """Training examples in one epoch, from all sources."""
    rows: int
    """Rows with examples, over all epochs."""
    rows_of_epochs: tuple[int, ...]
    """Rows of each epoch."""
    steps: int
    epochs: float
    """As configured; with ``train.max_steps``, as many as those steps cover."""
    global_batch_size: int
    global_batch_size_chosen: bool
    """True if the data determined it (``train.global_batch_size: auto``)."""
    sequence_length: int
    tokens: int
    """Tokens without padding over all epochs."""
    loss_tokens: int
    packing_efficiency: float
    """Share of the positions in rows that hold tokens."""
    empty_rows: int
    """Empty rows in the last steps of epochs, which may not be full."""
    filler_rows: int
    """Rows without labels in each full step, if ``global_batch_size`` is not a multiple of the workers."""
    workers: int
    """Number that the cluster currently has room for; an elastic run may change it."""
    fewest_workers: int
    most_workers: int
    rows_per_worker: int
    """Of each step; the workers of a group have the same."""
    accumulation: int
    """Microbatches in a step."""
    cpus: float
    gpus: float
    cluster_cpus: float
    cluster_gpus: float
    sources: dict[str, SourcePlan]
    evaluation: dict[str, SourcePlan]
    resolved: Resolved
    turns: TurnStatistics = field(default_factory=TurnStatistics)
    """How the trained turns begin and end."""
    untrained_ends: tuple[str, ...] = ()
    """Tokens that end turns and whose embeddings the model was never trained on and the run does not train."""
    shared_files: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Evaluation sets that share a file with a training source: name → that source and the file."""
    missing_tokens: tuple[str, ...] = ()
    """Special tokens of the named chat template that are not tokens of the tokenizer."""
    warnings: tuple[str, ...] = ()
    """One line for each problem that would otherwise only show up in the results."""
    positions: int | None = None
    """Positions of the model, scaled ones included; None if it has no limit."""
    can_be_scaled: bool = True
    """False if rows are longer than these and the model does not support ``model.rope_scaling``."""
    generation: GenerationPlan | None = None
    """Predictions during the training; None if there are none."""
    sequence_parallel: int = 1
    """Workers of each group, which have the same rows."""
    groups_cross_nodes: bool = False
    """True if workers of a group may run on several nodes."""
    memory: dict[str, Any] | None = None
    """What a worker needs at its peak (``estimate.memory.Memory.as_dict``); None if it is not estimated."""
    needs: tuple[str, ...] = ()
    """Memory, storage and time as lines for the terminal."""

    @property
    def examples_of_sources(self) -> int:
        """Training examples of all sources, however many of them an epoch uses."""
        return sum(source.examples for source in self.sources.values())

    @property
    def duplicates(self) -> str:
        """How many examples duplicate others, in words."""
        left_out = _total(self.sources, "left_out")
        repeated = _total(self.sources, "repeated") + _total(self.sources, "repeated_elsewhere")
        trained_on, evaluated = (
            _total(self.evaluation, "trained_on"),
            sum(each.examples for each in self.evaluation.values()),
        )
        examples = self.examples_of_sources
        if left_out:
            return (
                f"{left_out:,} of {examples:,} training examples are dropped as duplicates of another one ({repeated:,}) or "
                f"are evaluated on ({_total(self.sources, 'evaluated'):,})"
            )
        found = [f"{repeated:,} of {examples:,} training examples are duplicates of another one"] if repeated else []
        found += [f"{trained_on:,} of {evaluated:,} evaluation examples are trained on"] if trained_on else []
        return ", ".join(found) or "none"

    def as_dict(self) -> dict[str, object]:
        """The content of ``plan.json``; ``resolved`` has the keys of ``Resolved``."""
        content = asdict(self)
        del content["needs"]
        return content

    @property
    def _shares(self) -> str:
        """Which workers have their own rows, in words."""
        if self.sequence_parallel == 1:
            return _count(self.workers, "worker")
        return f"{_count(self.workers // self.sequence_parallel, 'group')} of {self.sequence_parallel} workers"

    def lines(self) -> list[str]:
        """Return the plan as lines for the terminal."""
        lines = []
        for name, source in self.sources.items():
            lines.append(f"train {name}: {source.line()}")
        for name, source in self.evaluation.items():
            lines.append(f"eval {name}: {source.line()}")
        lines.append(f"duplicates: {self.duplicates}")
        if self.stage == "sft" and self.turns.end_tokens:
            ends = ", ".join(f"{text} ({count:,})" for text, count in self.turns.end_tokens.items())
            lines.append(f"turns: {self.turns.total:,}, ended by {ends}")
        lines.append(
            f"rows: {self.rows:,} of {self.sequence_length} tokens over {_count(self.epochs, 'epoch')}, "
            f"{100 * self.packing_efficiency:.1f}% packed, {self.tokens:,} tokens, {self.loss_tokens:,} trained"
        )
        lines.append(
            f"steps: {self.steps:,} of {_count(self.global_batch_size, 'row')}"
            + (" (auto: chosen from the data)" if self.global_batch_size_chosen else "")
            + f" = {self._shares} × {_count(self.rows_per_worker, 'row')} in {_count(self.accumulation, 'microbatch', 'es')}"
            + (f", {self.filler_rows} of them empty in each step" if self.filler_rows else "")
            + (f"; {_count(self.empty_rows, 'row')} at the ends of epochs stay empty" if self.empty_rows else "")
        )
        if self.most_workers > self.fewest_workers:
            lines.append(f"workers: {self.fewest_workers} to {self.most_workers}, as nodes join and leave")
        lines.append(
            f"resources: needs {self.cpus:g} CPUs and {self.gpus:g} GPUs, the cluster has "
            f"{self.cluster_cpus:g} CPUs and {self.cluster_gpus:g} GPUs"
        )
        if self.generation is not None:
            lines.append(self.generation.line())
        return [*lines, *self.needs, *(f"warning: {warning}" for warning in self.warnings)]


def _total(sources: Mapping[str, SourcePlan], count: str) -> int:
    return sum(source.counts.get(count, 0) for source in sources.values())


def _count(number: float, noun: str, plural: str = "s") -> str:
    return f"{number:,} {noun}{'' if number == 1 else plural}"


def make_plan(
    config: Config,
    prepared: PreparedData,
    nodes: Sequence[Node],
    adapter: str | None = None,
    untrained_ends: Sequence[str] = (),
    model_commit: str | None = None,
    reference: ReferenceFiles | None = None,
    positions: int | None = None,
    hf_config: Any = None,
) -> Plan:
    """Put the plan together from the manifests and the row plan.

    Args:
        config: as given; with ``train.global_batch_size: auto``, the row plan has the number.
        prepared: training and evaluation data.
        nodes: the cluster's nodes.
        adapter: folder of the adapter that training continues from.
        untrained_ends: as ``Plan`` has them.
        model_commit: commit of a model on the hub.
        reference: ``train.reference_model``.
        positions: of the model; None if it has no limit.
        hf_config: the model's own config; None if it was not read.
    """
    row_plan = prepared.train_rows.row_plan
    scaling, per_step = config.scaling, row_plan.global_batch_size
    room = scaling.whole_groups(max_workers(nodes, scaling.cpus_per_worker, scaling.use_gpu))
    workers = min(scaling.most_workers, max(scaling.sequence_parallel, room))
    groups = workers // scaling.sequence_parallel
    rows_per_worker = -(-per_step // groups)
    rows = row_plan.consumed(row_plan.steps)
    plan = Plan(
        stage=config.stage,
        examples=sum(mixture(prepared.usable, prepared.train_rows.mixing_weights, config.data.mixing)),
        rows=rows,
        rows_of_epochs=tuple(row_plan.rows_of_epochs),
        steps=row_plan.steps,
        epochs=config.train.epochs if config.train.max_steps is None else _epochs(row_plan),
        global_batch_size=per_step,
        global_batch_size_chosen=config.train.global_batch_size == "auto",
        sequence_length=config.data.sequence_length,
        tokens=int(row_plan.step_tokens.sum()),
        loss_tokens=int(row_plan.step_loss_tokens.sum()),
        packing_efficiency=round(row_plan.packing_efficiency, 6),
        empty_rows=row_plan.steps * per_step - rows,
        filler_rows=rows_per_worker * groups - per_step,
        workers=workers,
        fewest_workers=scaling.fewest_workers,
        most_workers=scaling.most_workers,
        rows_per_worker=rows_per_worker,
        accumulation=-(-rows_per_worker // config.micro_batch_size),
        cpus=workers * config.scaling.cpus_per_worker + TASK_CPUS,
        gpus=float(workers) if config.scaling.use_gpu else 0.0,
        cluster_cpus=sum(node.cpus for node in nodes),
        cluster_gpus=sum(node.gpus for node in nodes),
        sources=plan_sources(prepared.train, prepared.duplicates.train, positions),
        evaluation=plan_sources(prepared.eval, prepared.duplicates.evaluation, positions),
        resolved=replace(
            _resolved(config, per_step, workers, adapter, hf_config),
            model_commit=model_commit,
            reference_commit=reference.commit if reference else None,
        ),
        turns=TurnStatistics.of(merge_counts(manifest.turns for manifest in prepared.train)),
        untrained_ends=tuple(untrained_ends),
        shared_files=prepared.shared_files,
        missing_tokens=prepared.missing_tokens,
        positions=positions,
        can_be_scaled=_can_be_scaled(config, positions, hf_config),
        generation=plan_generation(config, nodes, row_plan.steps),
        sequence_parallel=scaling.sequence_parallel,
        groups_cross_nodes=_cross_nodes(config, nodes, workers),
    )
    return replace(plan, warnings=tuple(warnings(config, plan)))


def _can_be_scaled(config: Config, positions: int | None, hf_config: Any) -> bool:
    from raysft.models.rope_scaling import can_be_scaled

    if hf_config is None or positions is None or config.data.sequence_length <= positions:
        return True
    return can_be_scaled(config, hf_config)


def _cross_nodes(config: Config, nodes: Sequence[Node], workers: int) -> bool:
    """Return True if some node gets only part of a group of workers that share rows."""
    scaling = config.scaling
    size, asked = scaling.sequence_parallel, (scaling.cpus_per_worker, float(scaling.use_gpu))
    room = sorted((node.capacity(*asked) for node in nodes if node.takes_workers), reverse=True)
    room = [count for count in room if count]
    if size == 1 or not room:
        return False
    if scaling.placement == "spread":
        return bool(-(-workers // len(room)) % size)
    left = workers
    for count in room:
        if left <= count:
            return False
        if count % size:
            return True
        left -= count
    return False


def _epochs(row_plan: RowPlan) -> float:
    """The epochs of a plan; a whole number becomes an integer, as in the config."""
    epochs = round(row_plan.epochs_after(row_plan.steps), 4)
    return int(epochs) if epochs == int(epochs) else epochs


def _resolved(config: Config, global_batch_size: int, workers: int, adapter: str | None, hf_config: Any) -> Resolved:
    from raysft.models.attention import kernel

    finetuning, alpha = config.model.finetuning, config.lora_alpha
    if adapter is not None:
        # The config may leave it to the adapter.
        alpha = read_adapter_config(Path(local_copy(adapter))).get("lora_alpha")
    return Resolved(
        dtype=config.dtype,
        finetuning=finetuning,
        adapter=finetuning if config.model.adapter else "none",
        lora_alpha=alpha if finetuning == "lora" else None,
        learning_rate=config.train.learning_rate,
        global_batch_size=global_batch_size,
        micro_batch_size=min(
            config.micro_batch_size, -(-global_batch_size // (workers // config.scaling.sequence_parallel))
        ),
        workers=workers,
        attention=kernel(config, hf_config) or "auto",
        zero_stage=config.train.zero_stage,
        optimizer=described(config.train),
    )
