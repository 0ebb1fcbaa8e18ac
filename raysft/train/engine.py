"""Config → DeepSpeed engine."""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from transformers.integrations.deepspeed import HfDeepSpeedConfig

from raysft.config import Config
from raysft.train.loss import TokenLoss
from raysft.train.model import load_model
from raysft.train.optim import make_optimizer, make_schedule


def deepspeed_config(config: Config, workers: int) -> dict[str, Any]:
    """The DeepSpeed configuration that the config asks for, at a number of workers."""
    rows = -(-config.train.rows_per_step // workers)
    micro = min(config.train.rows_per_device, rows)
    accumulation = -(-rows // micro)
    # Without ZeRO DeepSpeed would update bfloat16 weights in bfloat16, where small steps are lost; stage 1 keeps float32 ones.
    stage = max(config.train.zero_stage, 1) if config.dtype == "bfloat16" else config.train.zero_stage
    return {
        "train_batch_size": micro * accumulation * workers,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.train.max_grad_norm,
        "bf16": {"enabled": config.dtype == "bfloat16"},
        "zero_optimization": {"stage": stage},
        # Our own step line says all that its print-outs say.
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }


def make_engine(config: Config, model_path: str, workers: int, steps: int, device: torch.device) -> tuple[Any, Any]:
    """Load the model and wrap it.

    Args:
        config: the run's config.
        model_path: what to load.
        workers: size of the process group, which exists already.
        steps: optimizer steps of the whole run.
        device: where the model goes.

    Returns:
        The engine, and the learning-rate schedule.
    """
    # Without this DeepSpeed compiles an all-reduce of its own on CPU nodes: most of a minute, and a compiler, for what gloo does.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # DeepSpeed takes over the process group that is there, before ZeRO-3 shares weights out over it.
    deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)
    settings = deepspeed_config(config, workers)
    zero3 = config.train.zero_stage == 3
    # While this lives, from_pretrained shares the weights out as it loads them, instead of loading all of them on each worker.
    keep = HfDeepSpeedConfig(settings) if zero3 else None
    model = TokenLoss(load_model(config, model_path), chunks_follow_shape=zero3)
    if not zero3:
        model.to(device)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = make_optimizer(parameters, config.train)
    schedule = make_schedule(optimizer, config.train, steps)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, lr_scheduler=schedule, config=settings, dist_init_required=False
    )
    del keep
    engine.eval()
    model.check_head(device)
    engine.train()
    return engine, schedule
