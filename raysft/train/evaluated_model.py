"""The model of an evaluation without training: no optimizer, no gradients, and under ZeRO-3 a part of its weights per worker."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoConfig
from transformers.integrations.deepspeed import HfDeepSpeedConfig

from raysft.config import Config, with_overrides
from raysft.models.adapter_files import adapter_base
from raysft.models.kt_experts import move_experts
from raysft.models.onednn import use_onednn
from raysft.models.quantization import exact_parameters, method_of
from raysft.storage.local_cache import model_copy
from raysft.train.deepspeed_config import deepspeed_settings
from raysft.train.deepspeed_import import deepspeed
from raysft.train.deepspeed_internals import use_gloo_allreduce
from raysft.train.engine import check_model, gather_whole
from raysft.train.finetuning import load_trained
from raysft.train.job import EvaluationJob
from raysft.train.loss import TokenLoss
from raysft.train.sequence_group import ALONE, SequenceGroup
from raysft.train.towers import Towers


def evaluated_model(
    job: EvaluationJob, workers: int, device: torch.device, processor: Any = None, group: SequenceGroup = ALONE
) -> Any:
    """Load the model with its loss, and check that the loss is right for it. All workers call this together.

    Args:
        job: names the model.
        workers: size of the process group, which must exist.
        device: where the model goes.
        processor: of the model; None if no data has images.
        group: the workers that have the same rows.

    Returns:
        ``TokenLoss``, or with ZeRO-3 the DeepSpeed engine around it, which is called the same way.

    Raises:
        RequestError: weights are missing.
        RunFailed: the loss would be wrong.
    """
    if device.type == "cpu":
        use_onednn()
    folder = model_copy(job.model)
    hf_config = AutoConfig.from_pretrained(adapter_base(folder) or folder, trust_remote_code=job.runs_code)
    # Quantized weights cannot be partitioned; each worker has all of them.
    partitions = job.config.train.zero_stage == 3 and not (job.config.model.quantization or method_of(hf_config))
    model: Any = _partitioned(job, folder, workers, group) if partitions else _whole(job, folder, device)
    model.eval()
    loss = model.module if partitions else model
    if processor is not None:
        loss.towers = Towers(loss.model, processor, device, partitions)
    check_model(loss, job.config, device, processor, group)
    return model


def _whole(job: EvaluationJob, folder: Any, device: torch.device) -> TokenLoss:
    loaded = load_trained(job.config, folder, job.runs_code)
    if job.config.model.experts == "kt":
        move_experts(loaded, job.config)
    model = TokenLoss(loaded).to(device)
    if not job.config.autocast:
        # Adapters are loaded in float32 regardless of their base; an engine trains them in the data type of the other weights.
        for parameter in exact_parameters(model):
            parameter.data = parameter.data.to(getattr(torch, job.config.dtype))
    return model.requires_grad_(False)


def _partitioned(job: EvaluationJob, folder: Any, workers: int, group: SequenceGroup) -> Any:
    use_gloo_allreduce()
    # DeepSpeed must adopt the existing process group before weights are partitioned over it.
    deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)
    config = _without_training(job.config, workers)
    settings = deepspeed_settings(config, workers)
    # While this object exists, from_pretrained partitions weights as it loads them.
    partitioning = HfDeepSpeedConfig(settings)
    loaded = load_trained(config, folder, job.runs_code)
    most = group.slice_tokens(config.micro_batch_size * config.data.sequence_length)
    model = TokenLoss(loaded, max_tokens=most).requires_grad_(False)
    gather_whole(model)
    engine, *_ = deepspeed.initialize(model=model, config=settings, dist_init_required=False)
    del partitioning
    return engine


def _without_training(config: Config, workers: int) -> Config:
    """Replace what only training has: its batch size, and an optimizer to offload."""
    rows = config.micro_batch_size * workers // config.scaling.sequence_parallel
    return with_overrides(config, {"train.global_batch_size": rows, "train.offload.optimizer": "none"})
