"""Readers of values as LLaMA-Factory's YAML has them: each returns the value, or raises ValueError that says what it must be."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

import yaml

from raysft.config.optimizers import optimizer_name
from raysft.config.section import with_numbers
from raysft.metric_names import METRIC_KEYS

Reader = Callable[[Any], Any]


def anything(value: Any) -> Any:
    """Any value."""
    return value


def boolean(value: Any) -> bool:
    """True or false; text is neither, since LLaMA-Factory reads ``"false"`` as true."""
    if not isinstance(value, bool):
        raise ValueError("must be true or false")
    return value


def number(value: Any) -> float:
    """A number, also one that YAML 1.1 reads as text.

    >>> number("1e-4"), number(3)
    (0.0001, 3.0)
    """
    try:
        read = float("no" if isinstance(value, bool) else value)
    except (TypeError, ValueError):
        read = float("nan")
    if not abs(read) < float("inf"):
        raise ValueError("must be a number")
    return read


def whole(value: Any) -> int:
    """A whole number.

    >>> whole(8), whole(1000.0), whole("2e3")
    (8, 1000, 2000)
    """
    try:
        read = number(value)
    except ValueError:
        read = 0.5
    if read != int(read):
        raise ValueError("must be a whole number")
    return int(read)


def positive(value: Any) -> int:
    """A whole number above 0."""
    if (read := whole(value)) <= 0:
        raise ValueError("must be a whole number above 0")
    return read


def text(value: Any) -> str:
    """Text that is not empty; a number is text, too."""
    if isinstance(value, bool | dict | list) or not str(value).strip():
        raise ValueError("must be text")
    return str(value).strip()


def names(value: Any) -> list[str]:
    """Names as a list, or as text with commas.

    >>> names("q_proj, v_proj"), names(["q_proj", "v_proj"])
    (['q_proj', 'v_proj'], ['q_proj', 'v_proj'])
    """
    parts = value if isinstance(value, list) else str(value).split(",")
    if isinstance(value, bool | dict) or any(isinstance(part, bool | dict | list) or part is None for part in parts):
        raise ValueError("must be names, as a list or separated by commas")
    found = [str(part).strip() for part in parts]
    if not found or not all(found):
        raise ValueError("must be names, as a list or separated by commas, none of them empty")
    return found


def result(value: Any) -> str:
    """The metric by which transformers chooses the best model, with the prefix that raysft gives it.

    >>> result("loss"), result("eval_a_accuracy"), result("rouge-l"), result("eval_a_bleu-4")
    ('eval_loss', 'eval_a_accuracy', 'predict_rouge-l', 'predict_a_bleu-4')
    """
    name = text(value).removeprefix("eval_")
    scores = METRIC_KEYS["similarity"]
    return f"predict_{name}" if name.endswith(scores) else f"eval_{name}"


def targets(value: Any) -> str | list[str]:
    """``all``, or names of modules."""
    found = names(value)
    return "all" if "all" in found else found


def matched(value: Any) -> str | list[str]:
    """``all``, names of modules, or the regular expression that a text is to transformers, which the whole name matches.

    >>> matched("all-linear"), matched(["mlp"]), matched(".*q_proj")
    ('all', ['mlp'], ['^(?:.*q_proj)$'])
    """
    if isinstance(value, str) and value.replace("_", "-") not in ("all", "all-linear"):
        if re.fullmatch(r"[\w\s,-]+", value):
            raise ValueError(
                f"is a regular expression, which does not match any complete module name; write a list: [{value.strip()}]"
            )
        return [f"^(?:{text(value)})$"]
    return targets("all" if isinstance(value, str) else value)


def mapping(value: Any) -> dict[str, Any]:
    """A mapping, also as the text of a JSON object."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            value = None
    if not isinstance(value, dict):
        raise ValueError("must be a mapping, or the text of a JSON object")
    return with_numbers(value)


def choice(meanings: Mapping[str, Any]) -> Reader:
    """One of some words, read as what each of them means.

    >>> choice({"fa2": "flash_attention_2"})("fa2")
    'flash_attention_2'
    """

    def read(value: Any) -> Any:
        # YAML 1.1 reads the words no and off as false.
        word = "no" if value is False and "no" in meanings else value
        if not isinstance(word, str) or word not in meanings:
            raise ValueError(f"must be one of {', '.join(meanings)}")
        return meanings[word]

    return read


def word(*words: str) -> Reader:
    """One of some words, read as it is."""
    return choice({each: each for each in words})


def weight(value: Any) -> float | None:
    """The weight of a part of the loss, which LLaMA-Factory leaves out at 0, read as None.

    >>> weight("1e-3"), weight(0)
    (0.001, None)
    """
    found = number(value)
    if found < 0:
        raise ValueError("must be 0 or more: a negative weight would reward what this loss is meant to penalize")
    return found or None


def option(read: Reader) -> Reader:
    """A value that LLaMA-Factory turns off with 0 or a negative number, read as None."""

    def read_option(value: Any) -> Any:
        found = read(value)
        return found if found > 0 else None

    return read_option


SAME_OPTIMIZERS = {
    "adamw_torch_xla": "adamw",
    "adamw_torch_npu_fused": "adamw",
    "galore_adamw": "galore",
    "apollo_adamw": "apollo",
}
"""Optimizers of transformers with other names here, beside those that ``raysft.config.optimizers`` knows."""
OTHER_OPTIMIZERS = {
    "layerwise": "updates weights during the backward pass, which rules out gradient accumulation and clipping; use {0}",
    "adamw_torch_4bit": "is torchao's; use adamw_8bit",
    "adamw_torch_8bit": "is torchao's; use adamw_8bit",
    "galore_adamw_8bit": "is not compatible with bitsandbytes 0.50; use galore_adamw",
    "galore_adafactor": "is not supported; use galore_adamw or adafactor",
    "ademamix_8bit": "is not supported; use ademamix",
    "paged_ademamix_8bit": "is not supported; use ademamix",
    "paged_ademamix_32bit": "is not supported; use ademamix",
}
"""Optimizers of transformers that raysft does not have, by the end of their names → why."""


def optimizer(value: Any) -> str:
    """The name of an optimizer of transformers, or of one that raysft has.

    >>> optimizer("adamw_torch"), optimizer("lion_32bit"), optimizer("galore_adamw")
    ('adamw', 'lion', 'galore')
    """
    if not isinstance(value, str):
        raise ValueError("must be the name of an optimizer")
    for end, reason in OTHER_OPTIMIZERS.items():
        if value == end or (end == "layerwise" and value.endswith("_layerwise")):
            raise ValueError(reason.format(value.removesuffix("_layerwise")))
    return SAME_OPTIMIZERS.get(value) or optimizer_name(value)


def arguments(value: Any) -> dict[str, Any]:
    """Settings as transformers' ``optim_args`` has them.

    >>> arguments("rank=64, scale=0.1,proj_type=std")
    {'rank': 64, 'scale': 0.1, 'proj_type': 'std'}
    """
    pairs = [part.partition("=") for part in value.split(",")] if isinstance(value, str) else []
    if not pairs or not all(name.strip() and given.strip() for name, _, given in pairs):
        raise ValueError("must be settings such as rank=64,scale=0.1")
    return {name.strip(): yaml.safe_load(given) for name, _, given in pairs}
