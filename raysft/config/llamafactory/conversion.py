"""Convert a flat file of LLaMA-Factory into a config of raysft. Pure."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raysft.config.config import Config
from raysft.config.data import OF_CONVERSATIONS
from raysft.config.llamafactory import export
from raysft.config.llamafactory.settings import Entry, Refusal, Settings
from raysft.config.llamafactory.table import TABLE
from raysft.config.llamafactory.translation import GENERAL
from raysft.config.llamafactory.translation_data import DATA
from raysft.config.llamafactory.translation_model import MODEL
from raysft.config.llamafactory.translation_optimizer import OPTIMIZER
from raysft.config.section import Section

STAGES = ("sft", "pt")
PARTITIONING = ("zero_stage", "offload.parameters", "offload.folder", "deepspeed")
"""Keys of ``train`` that an evaluation without a training has, too."""
UNSET = object()
DEFAULT = "has its default"
"""Why a key needs nothing whose value, or null, means what it means without the key."""


@dataclass(frozen=True)
class Conversion:
    """What a file of LLaMA-Factory becomes."""

    config: dict[str, Any]
    """The config of raysft, as nested mappings."""
    origins: dict[str, str]
    """Key path → key of the file that it comes from."""
    notes: dict[str, str]
    """Key path → how its meaning differs."""
    harmless: dict[str, str]
    """Key of the file that needs nothing → why."""
    refusals: list[Refusal]
    """Keys that cannot be taken; without them the config is incomplete."""
    command: str = ""
    """Command that does what the file asks for, if that is an export, which has no config."""
    arguments: Sequence[str] = ()
    """Arguments of ``raysft export`` in that command."""

    @property
    def verb(self) -> str:
        """The verb of raysft that does what the file asks for."""
        if self.command:
            return "export"
        return next((verb for verb in ("evaluate", "generate") if self.config.get(verb, {}).get("model")), "run")


def convert(raw: Mapping[Any, Any]) -> Conversion:
    """Convert the keys of a file of LLaMA-Factory."""
    given = Settings(raw)
    refusals = [*_stage(given), *given.refusals, *export.unsupported(given)]
    if given.exports and not given["do_train"] and any(refusal.key != "export_dir" for refusal in refusals):
        # The command would leave out what the others ask for.
        refusals = [refusal for refusal in refusals if refusal.key != "export_dir"]
    found: dict[str, Entry] = {}
    if not _stage(given):
        for step in (_alone, *GENERAL, *MODEL, *DATA, *OPTIMIZER):
            for result in step(given):
                if isinstance(result, Refusal):
                    refusals.append(result)
                elif result.path not in schema():
                    refusals += _missing(result, given)
                elif _is_needed(result, given):
                    found[result.path] = result
    ordered = sorted(found.values(), key=lambda entry: _places()[entry.path])
    used = {entry.key for entry in ordered} | ({*export.READ} if given.exports else set())
    refused = {refusal.key for refusal in refusals}
    exports = {refusal.key for refusal in refusals} == {"export_dir"}
    return Conversion(
        config=_nested(ordered),
        origins={entry.path: entry.key for entry in ordered},
        notes={entry.path: entry.note for entry in ordered if entry.note},
        harmless={
            name: _reason(name, given)
            for name, value in raw.items()
            if name in TABLE and name not in used | refused and (value is None or not _has_effect(name, given, ordered))
        },
        command=export.export_command(given) if exports else "",
        arguments=export.export_arguments(given) if exports else (),
        refusals=list({(refusal.key, refusal.message): refusal for refusal in refusals}.values()),
    )


def _stage(given: Settings) -> list[Refusal]:
    stage = given["stage"]
    if stage not in STAGES:
        return [
            Refusal(
                "stage",
                f"stage={stage} is not supported: raysft supports the stages sft and pt; use LLaMA-Factory for others",
            )
        ]
    if given.exports and not given["do_train"]:
        command = export.export_command(given)
        asked = Refusal("export_dir", f"this is an export config, not a training config; run {command}")
        return [*export.export_refusals(given), asked]
    if not (given.trains or given.predicts or given.evaluates_alone):
        remedy = "set do_train: true, do_eval: true, or do_predict and predict_with_generate: true"
        return [Refusal("do_train", f"do_train=false leaves nothing to do; {remedy}")]
    return []


def _missing(entry: Entry, given: Settings) -> list[Refusal]:
    """Refuse a key whose counterpart this version of raysft lacks, unless it has its default."""
    default = TABLE[entry.key].default if entry.key else entry.value
    if not entry.key or not given.given(entry.key) or given[entry.key] == default:
        return []
    return [Refusal(entry.key, f"{entry.key} is not supported by this version of raysft; remove it")]


def _alone(given: Settings) -> Iterator[Entry]:
    yield Entry("stage", given["stage"], "stage")
    for name, key in TABLE.items():
        if key.path and key.alone:
            yield Entry(key.path, given[name], name, key.note)


def _is_needed(entry: Entry, given: Settings) -> bool:
    """True for a value that the file sets or whose default differs from raysft's, if the run uses it at all."""
    section, _, rest = entry.path.partition(".")
    if section == "model" and rest.split(".")[0] in ("lora", "oft", "freeze"):
        if rest.split(".")[0] != given["finetuning_type"]:
            return False
    elif rest in ("quantization_type", "double_quantization"):
        if given["quantization_bit"] is None:
            return False
    elif section == "generate" and rest != "enabled":
        if not (given.predicts or given["predict_with_generate"]):
            return False
    elif (section == "train" and not given.trains and not (given.partitions and rest in PARTITIONING)) or (
        section == "data" and rest in OF_CONVERSATIONS and given["stage"] == "pt"
    ):
        return False
    return entry.value != default_of(entry.path) or given.given(entry.key)


def _places() -> dict[str, int]:
    return {path: place for place, path in enumerate(schema())}


@functools.cache
def schema(section: type[Section] = Config, prefix: str = "") -> dict[str, Any]:
    """Key paths of the config in their order → defaults."""
    found: dict[str, Any] = {}
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            found |= schema(field.annotation, f"{prefix}{name}.")
        else:
            found[prefix + name] = UNSET if field.is_required() else field.get_default(call_default_factory=True)
    return found


def default_of(path: str) -> Any:
    """Default of a key, as YAML has it."""
    value = schema()[path]
    return list(value) if isinstance(value, tuple) else value


def _nested(entries: list[Entry]) -> dict[str, Any]:
    config: dict[str, Any] = {}
    for entry in entries:
        *parents, last = entry.path.split(".")
        node = config
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = entry.value
    return config


def _has_effect(name: str, given: Settings, entries: list[Entry]) -> bool:
    """True for a key whose counterpart is in the config, though another key of the file decided it."""
    path = TABLE[name].path
    return bool(path) and any(entry.path == path and given.given(name) for entry in entries)


def _reason(name: str, given: Settings) -> str:
    key = TABLE[name]
    if not given.given(name) or (key.default is not None and given[name] == key.default):
        return DEFAULT
    if name == "do_eval" and not given.trains:
        return "predictions are scored instead"
    if key.reason:
        return key.reason
    if given.exports:
        return "a model is exported with its own template and settings, and an adapter with those it was trained with"
    if given["use_badam"] and key.path in ("train.save_every_steps", "train.keep_last"):
        return "training with BAdam cannot resume, so it writes no checkpoints"
    if key.path.startswith("train.") and not given.trains:
        return "only used for training"
    if given[name] == key.default:
        return DEFAULT
    return "has no effect in combination with the other keys"
