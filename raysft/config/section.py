"""Base class of the config sections, and the types of their fields."""

from __future__ import annotations

import re
from typing import Annotated, Any, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationInfo,
    field_validator,
    model_validator,
)

from raysft.storage.path import SCHEMES

# File systems allow 255 bytes; the names of shard sets and trials add to it.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=150, coerce_numbers_to_str=True)]
Text = Annotated[str, Field(min_length=1)]
LARGEST = 2**31 - 1
"""Largest number of anything, so that a product of two is a 64-bit integer."""
# Strict, because `save_every_steps: yes` must not become 1.
Positive = Annotated[int, Field(gt=0, le=LARGEST, strict=True)]
Count = Annotated[int, Field(ge=0, le=LARGEST, strict=True)]
Fraction = Annotated[float, Field(ge=0, le=1)]


def _whole(value: float) -> float:
    """Keep a whole number an integer, which a config shows and compares as it was written."""
    return int(value) if value == int(value) else value


Epochs = Annotated[
    float, Field(gt=0, le=LARGEST, strict=True), AfterValidator(_whole), PlainSerializer(_whole, return_type=Any)
]
Beta = Annotated[float, Field(ge=0, lt=1)]
NAME_BYTES, PATH_BYTES = 255, 4095
"""Longest name in a path, and longest path, that Linux takes."""


def _possible_path(value: str) -> str:
    if "\0" in value:
        raise ValueError("a path cannot contain a NUL character; remove it")
    long = next((part for part in value.split("/") if len(part.encode()) > NAME_BYTES), None)
    if long or len(value.encode()) > PATH_BYTES:
        raise ValueError(
            f"a path has at most {PATH_BYTES} bytes, and each name in it at most {NAME_BYTES}, but this one has "
            f"{len(value.encode())}; shorten it"
        )
    return value


PathOrHubId = Annotated[str, Field(min_length=1), AfterValidator(_possible_path)]
POWER_OF_TEN = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")
"""A number that YAML 1.2 takes as one, and YAML 1.1, which PyYAML reads, as text unless it has a point and a sign."""


def with_numbers(value: Any) -> Any:
    """A value in which texts such as 1e-7 are numbers.

    >>> with_numbers({"lr_end": "1e-7", "steps": ["5e8", "e8"]})
    {'lr_end': 1e-07, 'steps': [500000000.0, 'e8']}
    """
    if isinstance(value, dict):
        return {key: with_numbers(part) for key, part in value.items()}
    if isinstance(value, list):
        return [with_numbers(part) for part in value]
    return float(value) if isinstance(value, str) and POWER_OF_TEN.fullmatch(value) else value


Options = Annotated[dict[str, Any], AfterValidator(with_numbers)]
"""Arguments that a library gets. A field with a type of its own makes numbers of such texts by itself."""


def known_scheme(value: str) -> str:
    """Return the path or URI unchanged if raysft supports its scheme; raise ValueError otherwise."""
    scheme, found, rest = _possible_path(value).partition("://")
    if found and not rest:
        raise ValueError(f"{value} does not name a bucket or folder; add one")
    if found and scheme not in (*SCHEMES, "file"):
        raise ValueError(f"{scheme}:// is not supported; use a path, or one of {', '.join(SCHEMES)}")
    return value


class Section(BaseModel):
    """Base class of all sections: frozen, without unknown keys, with a docstring under each field."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True, protected_namespaces=()
    )

    @model_validator(mode="before")
    @classmethod
    def _empty_is_default(cls, value: Any) -> Any:
        # A YAML section whose keys are all commented out is null.
        return {} if value is None else value

    @field_validator("*", mode="before")
    @classmethod
    def _truth_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        # As with integers: `learning_rate: yes` must not become 1. Floats are not strict, as `1e-4` is a text in YAML 1.1.
        found = any(isinstance(part, bool) for part in (value if isinstance(value, list | tuple) else (value,)))
        types = set(_types(cls.model_fields[str(info.field_name)].annotation)) if found else set()
        if float in types and not {bool, int, Any} & types:  # of such numbers, the field itself says what they are
            raise ValueError("must be a valid number")
        return value


def _types(annotation: Any) -> list[Any]:
    """Return the types inside of an annotation, and itself."""
    return [annotation, *(inner for each in get_args(annotation) for inner in _types(each))]
