"""Memory and time of training in pods that do not exist yet: ``raysft submit --to kubernetes`` asks before they cost money."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from raysft.cluster.placement import Node, max_workers
from raysft.config import Config, with_overrides
from raysft.config.kubernetes_values import bytes_of
from raysft.config.scaling import slice_tokens
from raysft.errors import RequestError, one_line
from raysft.estimate.duration import given_speed
from raysft.estimate.estimate import Training, estimate, place_of
from raysft.estimate.evaluation import Evaluation, estimate_evaluation
from raysft.estimate.hardware import NodeMemory, gpu_memory
from raysft.estimate.measure import Microbatch
from raysft.models.adapter_files import named_base
from raysft.run.evaluation_plan import weight_bytes
from raysft.storage import hub_snapshots
from raysft.storage.local_cache import cache_home, may_be_on_hub
from raysft.telemetry.terminal import duration

USUAL_BATCH = 32
"""Rows of a step if the data determines them and is not known: the most that ``train.global_batch_size: auto`` uses."""


def check_pods(config: Config, nodes: Sequence[Node], notify: Callable[[str], None]) -> None:
    """Estimate a training in the pods of ``cluster.workers``, if this machine has the model's config.

    The data is not read: rows count as full, and only what does not depend on them can be refused.

    Args:
        config: with the section ``cluster``.
        nodes: the pods, as Ray will see them.
        notify: receives lines and warnings.

    Raises:
        RequestError: it certainly does not fit.
    """
    batch, scaling = config.train.global_batch_size, config.scaling
    # Elastic runs begin with as many workers as fit at the start: with ZeRO, the fewer they are, the more each needs.
    room = scaling.whole_groups(max_workers(nodes, scaling.cpus_per_worker, scaling.use_gpu))
    workers = max(scaling.fewest_workers, min(scaling.most_workers, room))
    rows = USUAL_BATCH if batch == "auto" else batch
    speed, steps = given_speed(config), config.train.max_steps
    if speed and steps:
        seconds = speed.seconds(steps * rows * config.data.sequence_length, workers)
        notify(f"time: at most {duration(seconds)} for {steps:,} steps, at {speed}")
    folder = _folder_here(config.model.path, config.model.revision)
    if folder is None:
        return
    from transformers import AutoConfig

    from raysft.models.decoder_layers import expand_config
    from raysft.models.model_class import loaded_config

    try:
        hf_config = loaded_config(AutoConfig.from_pretrained(folder, trust_remote_code=False))
    except Exception as error:  # of any type: transformers validates the config
        notify(f"memory: not estimated ({one_line(error, 120)})")
        return
    if config.model.new_layers:
        hf_config = expand_config(hf_config, config.model.new_layers)
    # The pods' folders are not on this machine.
    local = with_overrides(config, {"data.cache": str(cache_home())})
    parts = scaling.sequence_parallel
    microbatch = Microbatch(slice_tokens(config.data.sequence_length, parts), 1.0)
    training = Training(local, hf_config, None, workers, -(-rows // (workers // parts)), microbatch, filled=0.0)
    try:
        found = estimate(training, place_of(training, nodes, (nodes[0], pod_memory(config))))
    except RequestError:
        raise
    except Exception as error:  # a model whose code transformers cannot run without weights
        notify(f"memory: not estimated ({one_line(error, 120)})")
        return
    for line in (*found.lines(table=True), *(f"warning: {warning}" for warning in found.warnings)):
        notify(line)


def check_evaluation_pods(config: Config, nodes: Sequence[Node], notify: Callable[[str], None]) -> None:
    """Estimate the evaluation of ``evaluate.model`` in the pods of ``cluster.workers``; arguments and errors as ``check_pods``."""
    given = config.evaluate.model or ""
    if (Path(given) / "adapter_config.json").is_file():
        given = named_base(Path(given)) or ""
    folder = _folder_here(*hub_snapshots.split(given)) if may_be_on_hub(given) else _folder_here(given, None)
    if folder is None:
        return
    from transformers import AutoConfig

    from raysft.models.quantization import method_of

    try:
        hf_config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        workers = config.scaling.most_workers
        named = f"evaluate.model={config.evaluate.model}"
        asked = Evaluation(config, named, hf_config, workers, bool(method_of(hf_config)), weight_bytes(folder))
        notify(estimate_evaluation(asked, nodes, (nodes[0], pod_memory(config))))
    except RequestError:
        raise
    except Exception as error:  # a model whose code transformers cannot run without weights
        notify(f"memory: not estimated ({one_line(error, 120)})")


def _folder_here(path: str, revision: str | None) -> Path | None:
    """Return the folder on this machine that has a model's config; None if only the image, the volume or the Hub has it."""
    if may_be_on_hub(path):
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(path, "config.json", revision=revision)
        return Path(found).parent if isinstance(found, str) else None
    return Path(path) if (Path(path) / "config.json").is_file() else None


def pod_memory(config: Config) -> NodeMemory:
    """Return the memory of a worker's pod, and of its GPUs if a node selector names their type."""
    pod = config.cluster.workers
    kinds = (gpu_memory(value) for value in pod.node_selector.values())
    return NodeMemory(float(bytes_of(pod.memory)), 0.0, next((found for found in kinds if found), None))
