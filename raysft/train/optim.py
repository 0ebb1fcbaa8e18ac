"""Optimizers and learning-rate schedules."""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from raysft.config import TrainSection
from raysft.errors import RequestError, one_line
from raysft.train.deepspeed_internals import dimensions
from raysft.train.operators import CPU_ADAM, has_compiler, load_operator

EXTRA = {
    "adam_mini": "pytorch_optimizer",
    "galore": "pytorch_optimizer",
    "apollo": "pytorch_optimizer",
    "badam": "badam",
}
"""Optimizer → the package that it needs; the extra ``optim`` installs them."""
GALORE = {"rank": 16, "update_proj_gap": 200, "scale": 2.0, "projection_type": "std"}
APOLLO = {"rank": 16, "update_proj_gap": 200, "scale": 32.0, "projection_type": "random"}
"""Defaults, as in LLaMA-Factory."""


def make_optimizer(model: nn.Module, train: TrainSection, loraplus_ratio: float | None = None) -> torch.optim.Optimizer:
    """Make the optimizer of the trained parameters. Weight decay does not apply to vectors (biases and norms).

    Args:
        model: has the parameters.
        train: the section of the config.
        loraplus_ratio: factor on the learning rate of LoRA's B matrices.

    Raises:
        RequestError: the optimizer's package is not installed, it refuses an option, or its operator cannot be compiled.
    """
    check_installed(train.optimizer)
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    try:
        return MAKERS[train.optimizer](model, parameters, train, loraplus_ratio)
    except RequestError:  # of an operator
        raise
    except (TypeError, ValueError, RuntimeError) as error:
        raise RequestError(
            f"train.optimizer={train.optimizer} refuses train.optimizer_options={train.optimizer_options} ({one_line(error)}); "
            "fix the options"
        ) from None


def check_installed(optimizer: str) -> None:
    """Check that the optimizer's package is installed.

    Raises:
        RequestError: it is not.
    """
    package = EXTRA.get(optimizer)
    if package and importlib.util.find_spec(package) is None:
        raise RequestError(
            f"train.optimizer={optimizer} needs the package {package}, which is not installed; "
            "run pip install 'raysft[optim]' on every node"
        )


def make_lr_scheduler(optimizer: torch.optim.Optimizer, train: TrainSection, steps: int) -> Any:
    """Make the learning-rate schedule: warm-up, then ``train.schedule`` over exactly ``steps`` steps.

    Raises:
        RequestError: the schedule refuses an option.
    """
    warmup = warmup_steps(train, steps)
    options = dict(train.schedule_options)
    if train.schedule == "warmup_stable_decay":
        options.setdefault("num_decay_steps", max(1, steps // 10))
    if train.schedule == "cosine_with_min_lr" and not {"min_lr", "min_lr_rate"} & options.keys():
        options["min_lr_rate"] = 0.1
    # The import takes three seconds, and the driver, which imports this module, does not need it.
    from transformers import get_scheduler

    try:
        return get_scheduler(
            train.schedule,
            optimizer,
            num_warmup_steps=warmup,
            num_training_steps=steps,
            scheduler_specific_kwargs=options or None,
        )
    except (TypeError, ValueError) as error:
        raise RequestError(
            f"train.schedule={train.schedule} refuses train.schedule_options={train.schedule_options} ({one_line(error)}); "
            "fix the options"
        ) from None


def warmup_steps(train: TrainSection, steps: int) -> int:
    """Return the steps of the warm-up: ``train.warmup_steps``, or a fraction of all steps, rounded up."""
    if train.warmup_steps is not None:
        return train.warmup_steps
    # The first step of a warm-up has learning rate 0, so a run of one step must have no warm-up.
    return min(math.ceil(train.warmup_ratio * steps), steps - 1)


def go_to_step(lr_scheduler: Any, steps: int) -> None:
    """Set the learning rate to that of the step after the first ``steps``."""
    # ``step`` increments ``last_epoch``; ``_step_count`` suppresses a warning about a call before the optimizer's first step.
    lr_scheduler.load_state_dict({**lr_scheduler.state_dict(), "last_epoch": steps - 1, "_step_count": steps + 2})
    lr_scheduler.step()


Parameters = Mapping[str, nn.Parameter]


def _adamw(model: nn.Module, parameters: Parameters, train: TrainSection, ratio: float | None) -> torch.optim.Optimizer:
    groups = _groups(parameters, train.weight_decay)
    if ratio is not None:
        groups = [
            {**group, "params": chosen, "lr": train.learning_rate * factor}
            for group in groups
            for chosen, factor in _by_rate(group["params"], parameters, ratio)
            if chosen
        ]
    shared = {"lr": train.learning_rate, "betas": train.betas, "eps": train.epsilon}
    if train.offload.optimizer != "none" and has_compiler():  # torch's own AdamW does the same, a little slower
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        load_operator(CPU_ADAM)
        return DeepSpeedCPUAdam(groups, adamw_mode=True, **shared, **train.optimizer_options)
    return torch.optim.AdamW(groups, **shared, **{"fused": True, **train.optimizer_options})


def _by_rate(
    chosen: Iterable[nn.Parameter], parameters: Parameters, ratio: float
) -> Iterable[tuple[list[nn.Parameter], float]]:
    """Split parameters for LoRA+ (Hayou et al. 2024): (parameters, factor on the learning rate), higher for B matrices."""
    fast = {id(weight) for name, weight in parameters.items() if "lora_B" in name or "lora_embedding_B" in name}
    group = list(chosen)
    yield [weight for weight in group if id(weight) not in fast], 1.0
    yield [weight for weight in group if id(weight) in fast], ratio


def _adafactor(
    model: nn.Module, parameters: Parameters, train: TrainSection, ratio: float | None
) -> torch.optim.Optimizer:
    # PyTorch's Adafactor multiplies each update by the size of the weights: at a rate for AdamW it hardly moves a matrix, and
    # LoRA's B, which begins at 0, not at all. The learning rate is that of the schedule, as in transformers' own trainer.
    from transformers import Adafactor

    options = {"scale_parameter": False, "relative_step": False, **train.optimizer_options}
    return Adafactor(_groups(parameters, train.weight_decay), lr=train.learning_rate, **options)


def _muon(model: nn.Module, parameters: Parameters, train: TrainSection, ratio: float | None) -> torch.optim.Optimizer:
    inner, others = _by_place(parameters)
    # Scales updates to the size of AdamW's, so that both can have the same learning rate (Liu et al. 2025).
    options = {"adjust_lr_fn": "match_rms_adamw", **train.optimizer_options}
    muon = torch.optim.Muon(list(inner.values()), lr=train.learning_rate, weight_decay=train.weight_decay, **options)
    if not others:
        return muon
    adamw = torch.optim.AdamW(
        _groups(others, train.weight_decay), lr=train.learning_rate, betas=train.betas, eps=train.epsilon
    )
    return CombinedOptimizer(muon, adamw)


def _adam_mini(
    model: nn.Module, parameters: Parameters, train: TrainSection, ratio: float | None
) -> torch.optim.Optimizer:
    from pytorch_optimizer import AdamMini

    hf_config = model.model.config.get_text_config()  # type: ignore[union-attr]
    return AdamMini(
        model,
        lr=train.learning_rate,
        betas=train.betas,
        eps=train.epsilon,
        weight_decay=train.weight_decay,
        num_embeds=hf_config.hidden_size,
        num_heads=hf_config.num_attention_heads,
        num_query_groups=getattr(hf_config, "num_key_value_heads", None),
        **train.optimizer_options,
    )


def _galore(
    model: nn.Module, parameters: Parameters, train: TrainSection, ratio: float | None
) -> torch.optim.Optimizer:
    from pytorch_optimizer import GaLore

    return _low_rank(GaLore, parameters, train, GALORE)


def _apollo(
    model: nn.Module, parameters: Parameters, train: TrainSection, ratio: float | None
) -> torch.optim.Optimizer:
    from pytorch_optimizer import APOLLO as Apollo

    return _low_rank(Apollo, parameters, train, APOLLO)


def _low_rank(
    optimizer: Callable[..., torch.optim.Optimizer],
    parameters: Parameters,
    train: TrainSection,
    defaults: dict[str, Any],
) -> torch.optim.Optimizer:
    """Make an optimizer that projects the matrices inside the layers, and updates all other parameters in full."""
    projected = {**defaults, **{key: value for key, value in train.optimizer_options.items() if key in defaults}}
    options = {key: value for key, value in train.optimizer_options.items() if key not in defaults}
    inner, others = _by_place(parameters)
    groups = [{**group, **projected} for group in _groups(inner, train.weight_decay)]
    return optimizer(
        [*groups, *_groups(others, train.weight_decay)],
        lr=train.learning_rate,
        betas=train.betas,
        eps=train.epsilon,
        **options,
    )


def _badam(model: nn.Module, parameters: Parameters, train: TrainSection, ratio: float | None) -> torch.optim.Optimizer:
    from badam import BlockOptimizer

    # BAdam makes its own groups for each block, from the optimizer's defaults, including weight decay.
    base = torch.optim.AdamW(
        list(parameters.values()),
        lr=train.learning_rate,
        betas=train.betas,
        eps=train.epsilon,
        weight_decay=train.weight_decay,
    )
    options = {"switch_mode": "ascending", "verbose": 0, **train.optimizer_options}
    with warnings.catch_warnings():
        # BAdam keeps float32 copies, even of float32 weights.
        warnings.filterwarnings("ignore", message="BAdam expect model")
        return BlockOptimizer(base_optimizer=base, named_parameters_list=list(parameters.items()), **options)


MAKERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "adafactor": _adafactor,
    "muon": _muon,
    "adam_mini": _adam_mini,
    "galore": _galore,
    "apollo": _apollo,
    "badam": _badam,
}


class CombinedOptimizer(torch.optim.Optimizer):
    """Several optimizers, each with its own parameters, as one."""

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self.optimizers = optimizers
        super().__init__([group for optimizer in optimizers for group in optimizer.param_groups], {})
        # The optimizers' own groups, so that a learning rate set here is set there.
        self.param_groups = [group for optimizer in optimizers for group in optimizer.param_groups]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        """Step all optimizers."""
        loss = closure() if closure is not None else None
        for optimizer in self.optimizers:
            optimizer.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return the states of all optimizers."""
        return {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the states."""
        for optimizer, state in zip(self.optimizers, state_dict["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self.param_groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]


def _groups(parameters: Parameters, weight_decay: float) -> list[dict[str, Any]]:
    groups = [
        {"params": [p for p in parameters.values() if dimensions(p) >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters.values() if dimensions(p) < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _by_place(parameters: Parameters) -> tuple[Parameters, Parameters]:
    """Split parameters into the matrices inside the layers and all others."""
    inner = {name: weight for name, weight in parameters.items() if _is_inner_matrix(name, weight)}
    return inner, {name: weight for name, weight in parameters.items() if name not in inner}


def _is_inner_matrix(name: str, parameter: Any) -> bool:
    """Return True for a matrix inside a layer: neither an embedding nor the output head."""
    return dimensions(parameter) == 2 and "embed" not in name and "lm_head" not in name
