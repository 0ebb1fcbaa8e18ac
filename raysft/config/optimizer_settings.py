"""Which settings of the ``train`` section each optimizer takes. Pure.

``tests/unit/test_optimizer_table.py`` derives it from the optimizers' constructors.
"""

from __future__ import annotations

from collections.abc import Iterator

from raysft.config.train import TrainSection
from raysft.errors import as_yaml

_OWN_BETAS = """
    rmsprop sgd adagrad lion_8bit paged_lion paged_lion_8bit rmsprop_8bit adafactor acc_sgd ada_smooth adadelta adam_g adamod adan
    adapnm ademamix adopt ano bcos grokfast_adamw kate lion msvag pid pnm qhm sgdw sign_sgd simplified_ademamix tiger vsgd
    schedulefree_sgd adai adanorm aggmo amos asgd came dadapt_adagrad dadapt_adan dadapt_sgd fromage lars madgrad mars novograd
    racs ranger rose scion scion_light sgdp sgdsai shampoo sm3 soap stable_adamw tam alice dash adamuon normuon
    """
OWN_BETAS = frozenset(_OWN_BETAS.split())
"""Optimizers without Adam's betas, or with others by default, which ``train.betas`` does not set."""
_OWN_EPSILON = """
    sgd adagrad lion_8bit paged_lion paged_lion_8bit adafactor acc_sgd ada_smooth adabelief adadelta adopt bcos focus grams laprop
    lion msvag pid qhm sgdw sign_sgd tiger yogi adai adalite aggmo amos asgd avagrad came dadapt_adagrad dadapt_lion dadapt_sgd
    fromage lamb lars madgrad ranger rose scalable_shampoo scion scion_light shampoo sm3 swats spam adamuon normuon splus
    """
OWN_EPSILON = frozenset(_OWN_EPSILON.split())
"""The same for Adam's epsilon."""
UNDECAYED = ("amos", "fromage", "msvag", "sm3")
"""Optimizers without weight decay."""
SELF_SCALED = (
    "adadelta", "adam_g", "dadapt_adagrad", "dadapt_adam", "dadapt_adan", "dadapt_lion", "dadapt_sgd", "prodigy",
)  # fmt: skip
"""Optimizers that find the size of their steps. The learning rate multiplies it, and is 1 in their libraries."""
SMALLEST_FACTOR = 0.01
"""Below it, a self-scaled optimizer hardly moves any weight."""
_DEFAULTS = TrainSection()


def described(train: TrainSection) -> str:
    """Name an optimizer with those settings that it takes, and its options.

    >>> described(TrainSection()), described(TrainSection(optimizer="lion", optimizer_options={"betas": [0.9, 0.95]}))
    ('adamw, betas (0.9, 0.999), epsilon 1e-08', 'lion, betas [0.9, 0.95]')
    """
    parts = [train.optimizer]
    if train.optimizer not in OWN_BETAS:
        parts.append(f"betas {train.betas}")
    if train.optimizer not in OWN_EPSILON:
        parts.append(f"epsilon {train.epsilon:g}")
    return ", ".join(parts + [f"{option} {as_yaml(value)}" for option, value in train.optimizer_options.items()])


def setting_conflicts(train: TrainSection) -> Iterator[str]:
    """Yield which settings an optimizer does not take, or would get twice."""
    name, options = train.optimizer, train.optimizer_options
    named = f"train.optimizer={name}"
    keys = {"lr": "learning_rate", "weight_decay": "weight_decay"}
    for option, key, own in (("betas", "betas", OWN_BETAS), ("eps", "epsilon", OWN_EPSILON)):
        if name not in own:
            keys[option] = key
        elif (value := getattr(train, key)) != getattr(_DEFAULTS, key):
            shown = list(value) if isinstance(value, tuple) else f"{value:g}"
            yield (
                f"train.{key}={shown} applies to optimizers with Adam's {key}, but {named} has its own; remove it, and set "
                "train.optimizer_options"
            )
    for option, key in keys.items():
        if option in options:
            yield f"train.optimizer_options contains {option}, but the config has its own key for it; set train.{key}"
    if name in UNDECAYED and train.weight_decay:
        yield f"{named} has no weight decay, but train.weight_decay={train.weight_decay:g}; set it to 0 or use adamw"
    if name in SELF_SCALED and train.learning_rate < SMALLEST_FACTOR:
        yield (
            f"{named} finds its own step size and multiplies it by train.learning_rate, but at {train.learning_rate:g} the "
            "weights hardly change; set train.learning_rate=1"
        )
