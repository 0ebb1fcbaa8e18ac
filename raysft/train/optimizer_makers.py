"""Make each kind of optimizer. Most are made the same way, from the class that the table names; the others have a function here."""

from __future__ import annotations

import difflib
import importlib
import inspect
import warnings
from collections.abc import Callable, Mapping
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from raysft.config import TrainSection
from raysft.config.optimizers import OPTIMIZERS, OptimizerKind, kind_of, whole_option
from raysft.errors import RequestError
from raysft.train.deepspeed_internals import dimensions
from raysft.train.operators import CPU_ADAM, has_compiler, load_operator
from raysft.train.parameter_groups import Parameters, by_decay, by_place, by_rate, by_target

PROJECTED: dict[str, dict[str, Any]] = {
    "galore": {"rank": 16, "update_proj_gap": 200, "scale": 2.0, "proj_type": "std"},
    "fira": {"rank": 16, "update_proj_gap": 200, "scale": 2.0, "projection_type": "std"},
    "apollo": {
        "rank": 16, "update_proj_gap": 200, "scale": 32.0, "proj": "random", "proj_type": "std", "scale_type": "channel",
    },
}  # fmt: skip
"""Settings of projected matrices, with defaults as in LLaMA-Factory."""
FURTHER = {"adam_debias", "adanorm", "adanorm_r", "cautious", "stable_adamw", "use_gc", "use_palm"}
"""Options that some constructors of pytorch_optimizer read from their ``**kwargs``, which accept any other name silently."""
UNREAD = {"bitsandbytes": {"amsgrad", "args", "is_paged", "optim_bits"}}
"""Library → options that its constructors ignore, or that a name in the table stands for."""

RATES = ("lr", "adamw_lr", "lr_1d")
"""Learning rates: of all parameters, or of matrices; of those outside the layers; and of vectors."""


def make_by_name(
    model: nn.Module, parameters: Parameters, train: TrainSection, ratio: float | None
) -> torch.optim.Optimizer:
    """Make the optimizer of the table's class, with those of the config's settings that its constructor takes."""
    kind = kind_of(train.optimizer)
    made = class_of(kind)
    _check_options(train.optimizer, train.optimizer_options, options_of(made) - UNREAD.get(kind.library, set()))
    if kind.flag:
        inner, others = by_place(model, parameters)
        groups = [
            {**group, kind.flag: inside}
            for inside, part in ((True, inner), (False, others))
            for group in by_decay(part, train.weight_decay)
        ]
    else:
        groups = by_rate(by_decay(parameters, train.weight_decay), parameters, train.learning_rate, ratio)
    if "weight_decay" not in _arguments(made):
        groups = [{key: value for key, value in group.items() if key != "weight_decay"} for group in groups]
    warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
    optimizer = made(groups, **{**settings_of(made, train), **train.optimizer_options})
    if kind.library == "torch" and kind.elementwise:
        return optimizer
    return _stepping_only_filled_groups(optimizer)


def is_elementwise(optimizer: Any) -> bool:
    """Return True if an optimizer treats each weight by itself, by the table and its options."""
    settings = {**optimizer.defaults, **vars(optimizer)}  # libraries keep options in either
    if whole_option(settings):
        return False
    kind = (type(optimizer).__module__.partition(".")[0], type(optimizer).__name__)
    return kind in {(row.library, row.name) for row in OPTIMIZERS.values() if row.elementwise}


def class_of(kind: OptimizerKind) -> Any:
    """Return an optimizer's class."""
    package = {"torch": "torch.optim", "bitsandbytes": "bitsandbytes.optim"}.get(kind.library, kind.library)
    return getattr(importlib.import_module(package), kind.name)


def settings_of(made: Any, train: TrainSection) -> dict[str, Any]:
    """Return those of the config's settings that a constructor takes. Betas and epsilon are Adam's: others keep their own."""
    arguments = _arguments(made)
    settings = {name: train.learning_rate for name in RATES if name in arguments}
    if "weight_decay_1d" in arguments:
        settings["weight_decay_1d"] = 0.0  # of vectors
    adams = {"betas": (train.betas, (0.9, 0.999)), "eps": (train.epsilon, 1e-8)}
    return settings | {
        name: value for name, (value, usual) in adams.items() if name in arguments and arguments[name].default == usual
    }


def _arguments(made: Any) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(made.__init__).parameters


def options_of(made: Any) -> set[str]:
    """Return the names that a constructor takes, and those that the class reads from its ``**kwargs``."""
    functions = [inspect.unwrap(getattr(made, name)) for name in vars(made) if inspect.isroutine(getattr(made, name))]
    codes = [function.__code__ for function in functions if isinstance(function, FunctionType)]
    read = {constant for code in codes for constant in code.co_consts if isinstance(constant, str)}
    return {*_arguments(made), *(FURTHER & read)}


def _check_options(optimizer: str, given: Mapping[str, Any], arguments: set[str]) -> None:
    """Refuse options that a constructor would accept silently and never read."""
    known = arguments - {"self", "params", "kwargs"}
    for option in given:
        if option not in known:
            close = difflib.get_close_matches(option, known, 1)
            hint = f"did you mean {close[0]}?" if close else f"its options are {', '.join(sorted(known))}"
            raise RequestError(f"train.optimizer={optimizer} has no option {option!r}; {hint}")


def _stepping_only_filled_groups(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Hide groups without parameters from each step.

    ZeRO-3 updates the weights part by part, and empties the groups of all other parts. Many optimizers count the steps per
    group, even in empty ones.
    """
    step = optimizer.step

    def step_filled(self: torch.optim.Optimizer, *arguments: Any, **options: Any) -> Any:
        groups = self.param_groups
        self.param_groups = [group for group in groups if group["params"]]
        try:
            return step(*arguments, **options)
        finally:
            self.param_groups = groups

    optimizer.step = MethodType(step_filled, optimizer)  # type: ignore[method-assign]
    return optimizer


def _adamw(model: nn.Module, parameters: Parameters, train: TrainSection, ratio: float | None) -> torch.optim.Optimizer:
    groups = by_rate(by_decay(parameters, train.weight_decay), parameters, train.learning_rate, ratio)
    shared = {"lr": train.learning_rate, "betas": train.betas, "eps": train.epsilon}
    if train.offload.optimizer != "none" and has_compiler():  # torch's own AdamW does the same, slightly slower
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        load_operator(CPU_ADAM)
        return DeepSpeedCPUAdam(groups, adamw_mode=True, **shared, **train.optimizer_options)
    return torch.optim.AdamW(groups, **shared, **{"fused": True, **train.optimizer_options})


def _adafactor(
    model: nn.Module, parameters: Parameters, train: TrainSection, ratio: float | None
) -> torch.optim.Optimizer:
    # PyTorch's Adafactor multiplies each update by the size of the weights: at a rate for AdamW it hardly moves a matrix, and
    # LoRA's B, which begins at 0, not at all. The learning rate is that of the schedule, as in transformers' own trainer.
    from transformers import Adafactor

    options = {"scale_parameter": False, "relative_step": False, **train.optimizer_options}
    return Adafactor(by_decay(parameters, train.weight_decay), lr=train.learning_rate, **options)


def _muon(model: nn.Module, parameters: Parameters, train: TrainSection, ratio: float | None) -> torch.optim.Optimizer:
    inner, others = by_place(model, parameters)
    # Scales updates to the size of AdamW's, so that both can have the same learning rate (Liu et al. 2025).
    options = {"adjust_lr_fn": "match_rms_adamw", **train.optimizer_options}
    muon = torch.optim.Muon(list(inner.values()), lr=train.learning_rate, weight_decay=train.weight_decay, **options)
    if not others:
        return muon
    adamw = torch.optim.AdamW(
        by_decay(others, train.weight_decay), lr=train.learning_rate, betas=train.betas, eps=train.epsilon
    )
    return CombinedOptimizer(muon, adamw)


def _adam_mini(
    model: nn.Module, parameters: Parameters, train: TrainSection, ratio: float | None
) -> torch.optim.Optimizer:
    from pytorch_optimizer import AdamMini

    _check_options(train.optimizer, train.optimizer_options, options_of(AdamMini))
    hf_config = model.model.config.get_text_config()  # type: ignore[union-attr]
    optimizer = AdamMini(
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
    for group in optimizer.param_groups:  # one for each parameter; the library decays biases
        if all(dimensions(parameter) < 2 for parameter in group["params"]):
            group["weight_decay"] = 0.0
    return optimizer


def _low_rank(
    model: nn.Module, parameters: Parameters, train: TrainSection, ratio: float | None
) -> torch.optim.Optimizer:
    """Make an optimizer that projects the matrices inside the layers, or some of them, and updates all other parameters in full."""
    made = class_of(kind_of(train.optimizer))
    given = dict(train.optimizer_options)
    projected = {key: given.pop(key, value) for key, value in PROJECTED[train.optimizer].items()}
    _check_options(train.optimizer, given, {*options_of(made), *projected})
    for key in ("rank", "update_proj_gap"):
        if not isinstance(projected[key], int) or projected[key] < 1:
            raise RequestError(
                f"train.optimizer_options.{key} must be a whole number above 0, but it is {projected[key]!r}; correct it"
            )
    chosen, others = by_target(model, parameters, train.optimizer_target)
    groups = [{**group, **projected} for group in by_decay(chosen, train.weight_decay)]
    projecting = made(
        [*groups, *by_decay(others, train.weight_decay)], **{**settings_of(made, train), "eps": train.epsilon, **given}
    )
    return _keeping_projections_alone(projecting)


def _keeping_projections_alone(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Free the other singular vectors after each step: a projection is a view of some of them, which keeps them all in memory."""
    step = optimizer.step

    def step_and_free(self: torch.optim.Optimizer, *arguments: Any, **options: Any) -> Any:
        result = step(*arguments, **options)
        for state in self.state.values():
            if (projector := state.get("projector")) is not None:
                projector.ortho_matrix = _alone(projector.ortho_matrix)
        return result

    optimizer.step = MethodType(step_and_free, optimizer)  # type: ignore[method-assign]
    return optimizer


def _alone(value: Any) -> Any:
    if isinstance(value, list):
        return [_alone(each) for each in value]
    if value is None or value.untyped_storage().nbytes() == value.numel() * value.element_size():
        return value
    return value.clone(memory_format=torch.contiguous_format)


def _badam(model: nn.Module, parameters: Parameters, train: TrainSection, ratio: float | None) -> torch.optim.Optimizer:
    from badam import BlockOptimizer

    class Blocks(BlockOptimizer):
        """BAdam also decays vectors, and prints each switch regardless of ``verbose``."""

        def switch_trainable_params(self, verbose: int | None = None) -> None:
            super().switch_trainable_params(self.verbose)
            settings = self.base_optimizer.param_groups[0]
            weights = [weight for group in self.base_optimizer.param_groups for weight in group["params"]]
            self.base_optimizer.param_groups = [
                {**settings, **group} for group in by_decay(dict(enumerate(weights)), train.weight_decay)
            ]

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
        return Blocks(base_optimizer=base, named_parameters_list=list(parameters.items()), **options)


MAKERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "adafactor": _adafactor,
    "muon": _muon,
    "adam_mini": _adam_mini,
    "galore": _low_rank,
    "fira": _low_rank,
    "apollo": _low_rank,
    "badam": _badam,
}
"""Optimizers that need more than their class; all others are made by ``make_by_name``."""


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
