"""What every section of a config is made of."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from raysft.storage.path import SCHEMES

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", coerce_numbers_to_str=True)]
Text = Annotated[str, Field(min_length=1)]


# Strict: `save_every_steps: yes` must not become 1.
Positive = Annotated[int, Field(gt=0, strict=True)]

Count = Annotated[int, Field(ge=0, strict=True)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]


def known_scheme(value: str) -> str:
    """A path or URI, when there is a filesystem for it."""
    scheme, found, _ = value.partition("://")
    if found and scheme not in (*SCHEMES, "file"):
        raise ValueError(f"there is no filesystem for {scheme}://; use a path, or one of {', '.join(SCHEMES)}")
    return value


class Section(BaseModel):
    """What every section shares: frozen, no unknown keys, docstrings under the fields."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True, protected_namespaces=()
    )

    @model_validator(mode="before")
    @classmethod
    def _empty_is_default(cls, value: Any) -> Any:
        # In YAML a section whose keys are all commented out is null.
        return {} if value is None else value
