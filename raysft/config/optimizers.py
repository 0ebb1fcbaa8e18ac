"""The optimizers that ``train.optimizer`` names: where each comes from, and what it can be combined with. Pure.

``tests/unit/test_optimizer_table.py`` derives what the table says from the optimizers themselves.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

EXTRAS = {"bitsandbytes": "quant", "pytorch_optimizer": "optim", "apollo_torch": "optim", "badam": "optim"}
"""Package → the extra that installs it."""
WHOLE_OPTIONS = ("adanorm", "cautious", "max_grad_norm", "stable_adamw", "use_gc")
"""Options with which an optimizer that treats each weight by itself needs whole matrices, or all weights, too."""

DIVIDES = ("asgd",)
"""Optimizers that divide by the learning rate, which is 0 in the first step of a warm-up."""


@dataclass(frozen=True)
class OptimizerKind:
    """One row of the table."""

    library: str
    name: str
    """The class in its library."""
    elementwise: bool = False
    """True if it treats each weight by itself, or a block of 256 with one scale. The others need whole matrices, or sums over all
    weights, while ZeRO flattens and splits them."""
    copies: float = 2.0
    """Tensors of a matrix's size in float32 that are its state."""
    squares: float = 0.0
    """Pairs of square matrices of its two sides that it keeps as well."""
    workers: bool = True
    """False if each worker would draw its own random numbers, so that their weights would differ."""
    resumes: bool = True
    adapters: bool = True
    """False if it has something to save only in full matrices."""
    averages: bool = False
    """True if the model to evaluate is an average of the weights that are trained; its ``eval`` and ``train`` switch."""
    flag: str = ""
    """Setting of its parameter groups that is true for the matrices inside the layers, and false for all others."""


CODE = (1 + 4 / 256) / 4
"""A state in 8 bits, with a scale for each block of 256, as part of one in float32."""
_TORCH = {
    "adamw": OptimizerKind("torch", "AdamW", True),
    "adam": OptimizerKind("torch", "Adam", True),
    "nadam": OptimizerKind("torch", "NAdam", True),
    "rmsprop": OptimizerKind("torch", "RMSprop", True, 1),
    "sgd": OptimizerKind("torch", "SGD", True, 0),
    # DeepSpeed makes it anew without its parameter groups under ZeRO.
    "adagrad": OptimizerKind("torch", "Adagrad", False, 1),
    "muon": OptimizerKind("torch", "Muon", False, 1),
}
_BITS = {
    "adamw_8bit": OptimizerKind("bitsandbytes", "AdamW8bit", True, 2 * CODE),
    "paged_adamw": OptimizerKind("bitsandbytes", "PagedAdamW32bit", True),
    "paged_adamw_8bit": OptimizerKind("bitsandbytes", "PagedAdamW8bit", True, 2 * CODE),
    "lion_8bit": OptimizerKind("bitsandbytes", "Lion8bit", True, CODE),
    "paged_lion": OptimizerKind("bitsandbytes", "PagedLion32bit", True, 1),
    "paged_lion_8bit": OptimizerKind("bitsandbytes", "PagedLion8bit", True, CODE),
    "rmsprop_8bit": OptimizerKind("bitsandbytes", "RMSprop8bit", True, CODE),
}
_OTHERS = {
    "adafactor": OptimizerKind("transformers", "Adafactor", False, 0),
    "adam_mini": OptimizerKind("pytorch_optimizer", "AdamMini", False, 1),
    "galore": OptimizerKind("apollo_torch", "GaLoreAdamW", adapters=False),
    "fira": OptimizerKind("pytorch_optimizer", "Fira", adapters=False),
    "apollo": OptimizerKind("apollo_torch", "APOLLOAdamW", adapters=False),
    "badam": OptimizerKind("badam", "BlockOptimizer", workers=False, resumes=False, adapters=False),
}
_BY_WEIGHT: dict[str, tuple[str, float]] = {
    "acc_sgd": ("AccSGD", 1),
    "ada_smooth": ("AdaSmooth", 4),
    "adabelief": ("AdaBelief", 2),
    "adabound": ("AdaBound", 2),
    "adadelta": ("AdaDelta", 2),
    "adam_c": ("AdamC", 2),
    "adam_g": ("AdamG", 3),
    "adamax": ("AdaMax", 2),
    "adamod": ("AdaMod", 3),
    "adan": ("Adan", 4),
    "adapnm": ("AdaPNM", 4),
    "ademamix": ("AdEMAMix", 3),
    "adopt": ("ADOPT", 2),
    "ano": ("Ano", 2),
    "bcos": ("BCOS", 1),
    "diffgrad": ("DiffGrad", 3),
    "ex_adam": ("EXAdam", 2),
    "focus": ("FOCUS", 2),
    "grams": ("Grams", 2),
    "grokfast_adamw": ("GrokFastAdamW", 3),
    "kate": ("Kate", 2),
    "laprop": ("LaProp", 2),
    "lion": ("Lion", 1),
    "msvag": ("MSVAG", 2),
    "padam": ("PAdam", 2),
    "pid": ("PID", 3),
    "pnm": ("PNM", 2),
    "qhadam": ("QHAdam", 2),
    "qhm": ("QHM", 1),
    "radam": ("RAdam", 2),
    "sgdw": ("SGDW", 0),
    "sign_sgd": ("SignSGD", 1),
    "simplified_ademamix": ("SimplifiedAdEMAMix", 2),
    "tiger": ("Tiger", 1),
    "vsgd": ("VSGD", 3),
    "yogi": ("Yogi", 2),
}
"""pytorch_optimizer's that treat each weight by itself: name → (class, copies)."""
_AVERAGING: dict[str, tuple[str, float]] = {
    "schedulefree_adamw": ("ScheduleFreeAdamW", 2),
    "schedulefree_radam": ("ScheduleFreeRAdam", 2),
    "schedulefree_sgd": ("ScheduleFreeSGD", 1),
}
_WHOLE: dict[str, tuple[str, float, float]] = {
    "adagc": ("AdaGC", 2, 0),
    "adai": ("Adai", 3, 0),
    "adalite": ("Adalite", 0, 0),
    "adam_p": ("AdamP", 2, 0),
    "adam_s": ("AdamS", 2, 0),
    "adanorm": ("AdaNorm", 2, 0),
    "adatam": ("AdaTAM", 3, 0),
    "aggmo": ("AggMo", 3, 0),
    "aida": ("Aida", 2, 0),
    "amos": ("Amos", 0, 0),
    "asgd": ("ASGD", 0, 0),
    "avagrad": ("AvaGrad", 2, 0),
    "came": ("CAME", 1, 0),
    "conda": ("Conda", 2, 0.25),
    "dadapt_adagrad": ("DAdaptAdaGrad", 3, 0),
    "dadapt_adam": ("DAdaptAdam", 3, 0),
    "dadapt_adan": ("DAdaptAdan", 5, 0),
    "dadapt_lion": ("DAdaptLion", 2, 0),
    "dadapt_sgd": ("DAdaptSGD", 3, 0),
    "fadam": ("FAdam", 2, 0),
    "flash_adamw": ("FlashAdamW", 0.55, 0),
    "fromage": ("Fromage", 0, 0),
    "lamb": ("Lamb", 2, 0),
    "lars": ("LARS", 1, 0),
    "madgrad": ("MADGRAD", 3, 0),
    "mars": ("MARS", 3, 0),
    "novograd": ("NovoGrad", 1, 0),
    "prodigy": ("Prodigy", 4, 0),
    "racs": ("RACS", 0, 0),
    "ranger": ("Ranger", 3, 0),
    "rose": ("ROSE", 0, 0),
    "scalable_shampoo": ("ScalableShampoo", 2, 2),
    "scion": ("SCION", 1, 0),
    "scion_light": ("SCIONLight", 0, 0),
    "sgdp": ("SGDP", 1, 0),
    "sgdsai": ("SGDSaI", 1, 0),
    "shampoo": ("Shampoo", 1, 2),
    "sm3": ("SM3", 1, 0),
    "soap": ("SOAP", 2, 2),
    "stable_adamw": ("StableAdamW", 2, 0),
    "stable_spam": ("StableSPAM", 2, 0),
    "swats": ("SWATS", 2, 0),
    "tam": ("TAM", 2, 0),
}
"""Those that need whole matrices, or sums over all weights: name → (class, copies, squares)."""
_RANDOM: dict[str, tuple[str, float, float]] = {
    "alice": ("Alice", 1, 1),
    "dash": ("DASH", 2, 2),
    "sara": ("SaRA", 0.25, 0),
    "spam": ("SPAM", 2.25, 0),
}
"""The same, and they draw random numbers."""
_FLAGGED: dict[str, tuple[str, float, str]] = {
    "adamuon": ("AdaMuon", 2, "use_muon"),
    "adamw_sn": ("AdamWSN", 1, "sn"),
    "normuon": ("NorMuon", 1, "use_muon"),
}
"""Those that treat the matrices inside the layers in another way: name → (class, copies of these, flag)."""

OPTIMIZERS: dict[str, OptimizerKind] = {
    **_TORCH,
    **_BITS,
    **_OTHERS,
    **{name: OptimizerKind("pytorch_optimizer", cls, True, copies) for name, (cls, copies) in _BY_WEIGHT.items()},
    **{
        name: OptimizerKind("pytorch_optimizer", cls, True, copies, averages=True)
        for name, (cls, copies) in _AVERAGING.items()
    },
    **{
        name: OptimizerKind("pytorch_optimizer", cls, False, copies, squares, workers=name not in _RANDOM)
        for name, (cls, copies, squares) in {**_WHOLE, **_RANDOM}.items()
    },
    **{
        name: OptimizerKind("pytorch_optimizer", cls, False, copies, flag=flag)
        for name, (cls, copies, flag) in _FLAGGED.items()
    },
    "splus": OptimizerKind("pytorch_optimizer", "SPlus", False, 2, 2, averages=True),
}
"""Name → kind."""

_CLOSURE = "needs the loss of the same rows several times per step, but raysft computes it once"
_SECOND = "needs second derivatives, which are not available in a backward pass under DeepSpeed"
_FUSED = "updates weights during the backward pass, which rules out gradient accumulation and clipping"
_LOSS = "needs the value of each step's loss, which is not passed to optimizers here"
_WRAPS = "wraps another optimizer"
_SCHEDULE = "has a learning-rate schedule of its own"
REFUSED: dict[str, str] = {
    "a2grad": "has no learning rate",
    "adago": "takes steps of at least 0.0005, however small the learning rate",
    "adahessian": _SECOND,
    "adalomo": _FUSED,
    "adashift": "keeps a queue of gradients, which cannot be saved in checkpoints",
    "alig": _CLOSURE,
    "apollo_dqn": _SCHEDULE,
    "bsam": _CLOSURE,
    "demo": "communicates between workers itself, which DeepSpeed already does",
    "distributed_muon": "communicates between workers itself, which DeepSpeed already does",
    "dual_adam": "diverges at ordinary learning rates",
    "emo_fact": _LOSS,
    "emo_lynx": _LOSS,
    "emo_navi": _LOSS,
    "friendly_sam": _CLOSURE,
    "ftrl": "zeroes weights that have no gradient, such as LoRA's A in the first step",
    "gravity": "starts with random updates that are as large as a pretrained model's weights",
    "gsam": _CLOSURE,
    "kron": "is too slow for large matrices: its time grows with the fourth power of their dimensions",
    "lbfgs": _CLOSURE,
    "lomo": _FUSED,
    "look_sam": _CLOSURE,
    "lookahead": _WRAPS,
    "lora_rite": "needs the two matrices of a LoRA adapter together",
    "magma": _WRAPS,
    "muon_clip": "needs the largest attention logits of each step, which models do not return",
    "nero": "normalizes the weights of each neuron to length 1, unlike those of pretrained models",
    "orthograd": _WRAPS,
    "pcgrad": _WRAPS,
    "ranger21": _SCHEDULE,
    "rotograd": "changes the model",
    "safe_fp16_optimizer": _WRAPS,
    "sam": _CLOSURE,
    "schedulefree_wrapper": _WRAPS,
    "sophia_h": _SECOND,
    "spectral_sphere": "updates only matrices, but models also have vectors",
    "srmm": "averages the weights with 0 in the first step, which ruins a pretrained model",
    "trac": _WRAPS,
    "wsam": _CLOSURE,
}
"""Optimizers that cannot be used → why. The names of AdaFactor, APOLLO, GaLore and Muon mean those of other libraries."""
SIMILAR = {"adahessian": "shampoo", "sophia_h": "shampoo", "lomo": "adafactor", "adalomo": "adafactor"}
"""What to use in their place; otherwise adamw."""
ALIASES = {
    "adamwtorch": "adamw",
    "adamwtorchfused": "adamw",
    "adamwhf": "adamw",
    "adamwbnb8bit": "adamw_8bit",
    "adamw8bitbnb": "adamw_8bit",
    "pagedadamw32bit": "paged_adamw",
    "lion32bit": "lion",
    "pagedlion32bit": "paged_lion",
    "rmspropbnb": "rmsprop",
    "rmspropbnb32bit": "rmsprop",
    "rmspropbnb8bit": "rmsprop_8bit",
    "grokadamw": "grokfast_adamw",
    "grokfast": "grokfast_adamw",
}
"""Names elsewhere, as ``_plain`` gives them."""


def _plain(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")


_KNOWN = {
    **{_plain(kind.name): name for name, kind in OPTIMIZERS.items()},
    **{_plain(name): name for name in (*OPTIMIZERS, *REFUSED)},
    **ALIASES,
}


def optimizer_name(value: str) -> str:
    """Return the name of the table for a name, without regard to case and underscores.

    >>> optimizer_name("StableAdamW"), optimizer_name("adamw-8bit"), optimizer_name("GaLoreAdamW")
    ('stable_adamw', 'adamw_8bit', 'galore')

    Raises:
        ValueError: the optimizer is unknown or cannot be used; the message has the remedy.
    """
    name = _KNOWN.get(_plain(value))
    if name is None:
        close = difflib.get_close_matches(
            _plain(value), [key for key, known in _KNOWN.items() if known in OPTIMIZERS], 1
        )
        hint = f"did you mean {_KNOWN[close[0]]}?" if close else "configs/README.md lists all, such as adamw"
        raise ValueError(f"no optimizer has this name; {hint}")
    if name in REFUSED:
        raise ValueError(f"this optimizer cannot be used, because it {REFUSED[name]}; use {SIMILAR.get(name, 'adamw')}")
    return name


def kind_of(name: str) -> OptimizerKind:
    """Return the row of an optimizer."""
    return OPTIMIZERS[name]


def whole_option(options: Mapping[str, Any]) -> str | None:
    """Return the first of ``train.optimizer_options`` that needs whole matrices, or all weights."""
    return next((option for option in WHOLE_OPTIONS if options.get(option)), None)


def optimizer_table() -> Iterator[str]:
    """Yield the lines of a table in Markdown: what optimizers can be combined with, those that are alike in one row."""
    yield "| `train.optimizer` | library | ZeRO 1–3, offload | float16 | LoRA, OFT | workers | resumes | bytes per weight |"
    yield "|---|---|---|---|---|---|---|---|"
    rows: dict[str, list[str]] = {}
    for name, kind in OPTIMIZERS.items():
        columns = (
            f"{kind.library} | {_offload(name, kind)} | {_yes(kind.elementwise)} | {_yes(kind.adapters)} "
            f"| {'any' if kind.workers else '1'} | {_yes(kind.resumes)} | {_bytes(name, kind)} |"
        )
        rows.setdefault(columns, []).append(f"`{name}`")
    for columns, names in rows.items():
        yield f"| {', '.join(names)} | {columns}"


def refused_table() -> Iterator[str]:
    """Yield the lines of a table in Markdown: why optimizers cannot be used."""
    yield "| refused, because it … | optimizers |"
    yield "|---|---|"
    for reason in dict.fromkeys(REFUSED.values()):
        yield f"| {reason} | {', '.join(f'`{name}`' for name, why in REFUSED.items() if why == reason)} |"


def _yes(value: bool) -> str:
    return "yes" if value else "–"


def _offload(name: str, kind: OptimizerKind) -> str:
    if not kind.elementwise:
        return "–"
    return "yes" if name == "adamw" else "yes, not to NVMe" if not name.startswith("paged") else "ZeRO only"


def _bytes(name: str, kind: OptimizerKind) -> str:
    if name in ("galore", "fira", "apollo"):
        return "by rank"
    if name == "badam":
        return "8, of one block"
    inside = " inside layers, else 8" if (kind.flag or name == "muon") and kind.copies != 2 else ""
    return f"{4 * kind.copies:.3g}{inside}" + (", and squares of the sides" if kind.squares else "")
