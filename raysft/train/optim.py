"""Optimizer and course of the learning rate."""

from __future__ import annotations

import importlib.util
import math
import shutil
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from raysft.config import TrainSection
from raysft.errors import RequestError

EXTRA = {
    "adam_mini": "pytorch_optimizer",
    "galore": "pytorch_optimizer",
    "apollo": "pytorch_optimizer",
    "badam": "badam",
}
"""Optimizers that the extra ``optim`` brings, and the package of each."""
GALORE = {"rank": 16, "update_proj_gap": 200, "scale": 2.0, "projection_type": "std"}
APOLLO = {"rank": 16, "update_proj_gap": 200, "scale": 32.0, "projection_type": "random"}
"""What LLaMA-Factory begins with."""


def make_optimizer(model: nn.Module, train: TrainSection, loraplus_ratio: float | None = None) -> torch.optim.Optimizer:
    """The optimizer over the trained parameters; weight decay spares vectors (biases and norms).

    Args:
        model: holds them.
        train: names the optimizer and its settings.
        loraplus_ratio: how many times higher the learning rate of LoRA's B matrices is.

    Raises:
        RequestError: its library is not installed, or knows no such option.
    """
    check_installed(train.optimizer)
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    try:
        return MAKERS[train.optimizer](model, parameters, train, loraplus_ratio)
    except (TypeError, ValueError, RuntimeError) as error:
        raise RequestError(
            f"train.optimizer={train.optimizer} refuses train.optimizer_options={train.optimizer_options} ({error}); mend them"
        ) from None


def check_installed(optimizer: str) -> None:
    """Find out before anything starts whether an optimizer's library is there."""
    package = EXTRA.get(optimizer)
    if package and importlib.util.find_spec(package) is None:
        raise RequestError(
            f"train.optimizer={optimizer} needs the Python package {package}; pip install 'raysft[optim]' on every node"
        )


def make_lr_scheduler(optimizer: torch.optim.Optimizer, train: TrainSection, steps: int) -> Any:
    """Warm-up, then the named course over the exact number of steps.

    Raises:
        RequestError: the course knows no such option.
    """
    # The first step of a warm-up has rate 0: a run of one step would train nothing.
    warmup = min(math.ceil(train.warmup_ratio * steps), steps - 1)
    options = dict(train.schedule_options)
    if train.schedule == "warmup_stable_decay":
        options.setdefault("num_decay_steps", max(1, steps // 10))
    if train.schedule == "cosine_with_min_lr" and not {"min_lr", "min_lr_rate"} & options.keys():
        options["min_lr_rate"] = 0.1
    # Its import takes three seconds, and the driver, which asks this module for names, needs none of it.
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
            f"train.schedule={train.schedule} refuses train.schedule_options={train.schedule_options} ({error}); mend them"
        ) from None


def go_to_step(lr_scheduler: Any, steps: int) -> None:
    """Let the learning rate be that of the step after so many."""
    # It counts one on when it sets the rate; it also counts its calls, to complain about one before the optimizer's first step.
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
    if train.offload.optimizer != "none" and has_compiler():
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, adamw_mode=True, **shared, **train.optimizer_options)
    return torch.optim.AdamW(groups, **shared, **{"fused": True, **train.optimizer_options})


def has_compiler() -> bool:
    """Whether DeepSpeed can compile its CPU-Adam here; torch's own does the same, a little slower."""
    return any(shutil.which(name) for name in ("c++", "g++", "clang++"))


def _by_rate(
    chosen: Iterable[nn.Parameter], parameters: Parameters, ratio: float
) -> Iterable[tuple[list[nn.Parameter], float]]:
    """LoRA+ (Hayou et al. 2024): B matrices, and what is an embedding's adapter, learn faster."""
    fast = {id(each) for name, each in parameters.items() if "lora_B" in name or "lora_embedding_B" in name}
    members = list(chosen)
    yield [each for each in members if id(each) not in fast], 1.0
    yield [each for each in members if id(each) in fast], ratio


def _adafactor(
    model: nn.Module, parameters: Parameters, train: TrainSection, ratio: float | None
) -> torch.optim.Optimizer:
    return torch.optim.Adafactor(
        _groups(parameters, train.weight_decay), lr=train.learning_rate, **train.optimizer_options
    )


def _muon(model: nn.Module, parameters: Parameters, train: TrainSection, ratio: float | None) -> torch.optim.Optimizer:
    inside = {name: each for name, each in parameters.items() if _is_inner_matrix(name, each)}
    beside = {name: each for name, each in parameters.items() if name not in inside}
    # Scaled to the size of AdamW's updates, so that both take the same learning rate (Liu et al. 2025).
    options = {"adjust_lr_fn": "match_rms_adamw", **train.optimizer_options}
    muon = torch.optim.Muon(list(inside.values()), lr=train.learning_rate, weight_decay=train.weight_decay, **options)
    if not beside:
        return muon
    rest = torch.optim.AdamW(
        _groups(beside, train.weight_decay), lr=train.learning_rate, betas=train.betas, eps=train.epsilon
    )
    return Together(muon, rest)


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
    """Matrices inside the layers by their projections, all else whole."""
    projected = {**defaults, **{key: value for key, value in train.optimizer_options.items() if key in defaults}}
    options = {key: value for key, value in train.optimizer_options.items() if key not in defaults}
    inside = {name: each for name, each in parameters.items() if _is_inner_matrix(name, each)}
    beside = {name: each for name, each in parameters.items() if name not in inside}
    groups = [{**group, **projected} for group in _groups(inside, train.weight_decay)]
    return optimizer(
        [*groups, *_groups(beside, train.weight_decay)],
        lr=train.learning_rate,
        betas=train.betas,
        eps=train.epsilon,
        **options,
    )


def _badam(model: nn.Module, parameters: Parameters, train: TrainSection, ratio: float | None) -> torch.optim.Optimizer:
    from badam import BlockOptimizer

    # It makes groups of its own for each block, from the optimizer's defaults: decay is among them.
    base = torch.optim.AdamW(
        list(parameters.values()),
        lr=train.learning_rate,
        betas=train.betas,
        eps=train.epsilon,
        weight_decay=train.weight_decay,
    )
    options = {"switch_mode": "ascending", "verbose": 0, **train.optimizer_options}
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="BAdam expect model"
        )  # it keeps float32 copies, also of float32 weights
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


class Together(torch.optim.Optimizer):
    """Two optimizers, each with parameters of its own, as one."""

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self.optimizers = optimizers
        super().__init__([group for each in optimizers for group in each.param_groups], {})
        # The very groups of the two: who sets a learning rate here sets it there.
        self.param_groups = [group for each in optimizers for group in each.param_groups]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        """One step of each."""
        loss = closure() if closure is not None else None
        for each in self.optimizers:
            each.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The states of each."""
        return {"optimizers": [each.state_dict() for each in self.optimizers]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put the states back."""
        for each, state in zip(self.optimizers, state_dict["optimizers"], strict=True):
            each.load_state_dict(state)
        self.param_groups = [group for each in self.optimizers for group in each.param_groups]


def _groups(parameters: Parameters, weight_decay: float) -> list[dict[str, Any]]:
    groups = [
        {"params": [p for p in parameters.values() if _dimensions(p) >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters.values() if _dimensions(p) < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _is_inner_matrix(name: str, parameter: Any) -> bool:
    """Whether it is a matrix inside a layer, and neither embedding nor output head."""
    return _dimensions(parameter) == 2 and "embed" not in name and "lm_head" not in name


def _dimensions(parameter: Any) -> int:
    # ZeRO-3 leaves an empty vector in place of the weight and keeps its shape aside.
    return len(getattr(parameter, "ds_shape", parameter.shape))
