"""The evaluation of ``evaluate.model`` as planned: model, rows, workers, and what they need."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from raysft.cluster.placement import TASK_CPUS, Node, max_workers
from raysft.config import Config
from raysft.errors import RequestError, one_line
from raysft.estimate.evaluation import Evaluation, estimate_evaluation
from raysft.estimate.hardware import smallest_node
from raysft.estimate.storage import check_shared
from raysft.run.inputs import EvaluationInputs, OtherModel, read_evaluation
from raysft.run.source_plan import SourcePlan, plan_sources


@dataclass(frozen=True)
class PlannedEvaluation:
    """An evaluation that passed all checks."""

    inputs: EvaluationInputs
    sources: dict[str, SourcePlan]
    """The evaluation sets, by name."""
    workers: int
    """Number that the cluster currently has room for."""
    cpus: float
    """Of the cluster."""
    gpus: float
    resolved: dict[str, Any]
    """Settings, with every default that raysft chooses."""
    memory: str
    """What a worker needs, as a line for the terminal."""

    def as_dict(self) -> dict[str, Any]:
        """The content of ``plan.json``."""
        return {
            "evaluation": {name: asdict(source) for name, source in self.sources.items()},
            "workers": self.workers,
            "cluster_cpus": self.cpus,
            "cluster_gpus": self.gpus,
            "resolved": self.resolved,
        }

    def lines(self, config: Config) -> list[str]:
        """The plan in lines for the terminal."""
        cpus = self.workers * config.scaling.cpus_per_worker + TASK_CPUS
        gpus = self.workers if config.scaling.use_gpu else 0
        count = sum(int(rows.row_plan.rows) for rows in self.inputs.rows.values())
        rows = f"{count:,} row{'' if count == 1 else 's'} of {config.data.sequence_length:,} tokens"
        return [
            f"evaluate: {self.inputs.model.named} on {rows}",
            *(f"evaluation {name}: {source.line()}" for name, source in self.sources.items()),
            f"resources: needs {cpus:g} CPUs and {gpus:g} GPUs, the cluster has {self.cpus:g} CPUs and {self.gpus:g} GPUs",
            self.memory,
        ]


def plan_evaluation(config: Config, nodes: Sequence[Node], notify: Callable[[str], None]) -> PlannedEvaluation:
    """Check the model, tokenize the evaluation sets, and estimate what the workers need.

    Raises:
        RequestError: it cannot be done.
    """
    check_shared(config, nodes)
    inputs = read_evaluation(config, notify)
    scaling = config.scaling
    room = scaling.whole_groups(max_workers(nodes, scaling.cpus_per_worker, scaling.use_gpu))
    workers = min(scaling.most_workers, max(scaling.sequence_parallel, room))
    return PlannedEvaluation(
        inputs=inputs,
        sources=plan_sources(inputs.manifests),
        workers=workers,
        cpus=sum(node.cpus for node in nodes),
        gpus=sum(node.gpus for node in nodes),
        resolved=_resolved(config, inputs.model, workers),
        memory=_memory(config, inputs.model, workers, nodes),
    )


def _resolved(config: Config, model: OtherModel, workers: int) -> dict[str, Any]:
    from raysft.models.attention import kernel

    return {
        "dtype": config.dtype,
        "quantization": config.model.quantization or model.method,
        "micro_batch_size": config.micro_batch_size,
        "workers": workers,
        "attention": kernel(config, model.hf_config) or "auto",
        "zero_stage": 3 if config.train.zero_stage == 3 and not (config.model.quantization or model.method) else 0,
    }


def _memory(config: Config, model: OtherModel, workers: int, nodes: Sequence[Node]) -> str:
    asked = Evaluation(
        config=config,
        named=model.named,
        hf_config=model.hf_config,
        workers=workers,
        quantized=bool(model.method),
        weight_bytes=weight_bytes(model.weights),
        adapter_bytes=weight_bytes(model.folder) if model.folder != model.weights else 0,
    )
    try:
        return estimate_evaluation(asked, nodes, smallest_node(nodes, config.scaling.use_gpu))
    except RequestError:
        raise
    except Exception as error:  # a model whose code transformers cannot run without weights
        return f"memory: not estimated ({one_line(error, 120)})"


def weight_bytes(folder: Path) -> int:
    """Return the size of the weight files in a folder on this machine."""
    return sum(file.stat().st_size for file in folder.iterdir() if file.suffix in (".safetensors", ".bin"))
