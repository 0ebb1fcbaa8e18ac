"""The keys of a file of LLaMA-Factory, read and with defaults; and what is derived from them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from raysft.config.llamafactory.table import TABLE, suggest_key
from raysft.errors import as_yaml

SYNONYMS = {"evaluation_strategy": "eval_strategy", "no_cuda": "use_cpu"}
"""Earlier name of a key → its name now."""
SECRET = ("token", "secret", "api_key")
"""Ends of keys whose values are never shown."""


@dataclass(frozen=True)
class Entry:
    """A value for a key of raysft."""

    path: str
    value: Any
    key: str
    """LLaMA-Factory key that it comes from, whether set or by default; empty if it comes from none."""
    note: str = ""
    """How the meaning differs."""


@dataclass(frozen=True)
class Refusal:
    """Why a key of LLaMA-Factory cannot be taken, and what to do."""

    key: str
    message: str


class Settings:
    """The keys of a file, read; a key that is missing or null has its default."""

    def __init__(self, raw: Mapping[Any, Any]) -> None:
        self.raw = raw
        self.refusals: list[Refusal] = []
        self._values: dict[str, Any] = {}
        for name, value in raw.items():
            known = TABLE.get(name)
            if known is None:
                self.refusals.append(Refusal(str(name), f"unknown key {name}; {suggest_key(name)}"))
            elif value is not None:
                try:
                    self._values[SYNONYMS.get(str(name), str(name))] = known.read(value)
                except ValueError as error:
                    self.refusals.append(Refusal(name, f"{shown(name, value)}: {error}"))

    def __getitem__(self, name: str) -> Any:
        return self._values.get(name, TABLE[name].default)

    def given(self, name: str) -> bool:
        """True if the file sets the key."""
        return name in self._values

    @property
    def trains(self) -> bool:
        """True for a training: ``do_train``, or nothing else to do."""
        asked = self.given("do_train") or self["do_eval"] or self["do_predict"] or self.exports
        return self["do_train"] or not asked

    @property
    def predicts(self) -> bool:
        """True if predictions are asked for at the end, which an evaluation with ``predict_with_generate`` makes, too."""
        generates = self["do_eval"] and self["predict_with_generate"] and not self["do_train"]
        return (self["do_predict"] or generates) and self["stage"] == "sft"

    @property
    def evaluates_alone(self) -> bool:
        """True if nothing but the loss of a model is asked for."""
        return self["do_eval"] and not self["do_train"] and not self.predicts

    @property
    def partitions(self) -> bool:
        """True for an evaluation without a training that DeepSpeed may partition."""
        return self.evaluates_alone and self.given("deepspeed")

    @property
    def exports(self) -> bool:
        """True for a file for ``llamafactory-cli export``."""
        return self.given("export_dir") and not self.given("dataset")

    @property
    def evaluates(self) -> bool:
        """True if LLaMA-Factory reads evaluation data."""
        return self["eval_strategy"] != "no" or self["do_eval"] or self["do_predict"] or self["predict_with_generate"]

    def unsupported(self) -> Iterator[Refusal]:
        """Yield the keys whose values raysft does not take."""
        for name in self._values:
            key = TABLE[name]
            if key.remedy and self[name] != key.default:
                yield Refusal(name, f"{shown(name, self.raw.get(name))} is not supported; {key.remedy}")


def shown(name: str, value: Any) -> str:
    """A key with its value, unless that is a secret.

    >>> shown("fp8", True), shown("hf_hub_token", "hf_123")
    ('fp8=true', 'hf_hub_token')
    """
    return name if name.endswith(SECRET) else f"{name}={as_yaml(value):.80}"
