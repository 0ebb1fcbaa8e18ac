"""The model card: ``README.md`` with Hugging Face front matter."""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from raysft.models.processor import FILES as PROCESSOR_FILES
from raysft.report.comparison import INTERVALS, compare, compare_predictions, unfinished
from raysft.report.loading_code import loading_code, prompt_code
from raysft.report.read_run import RunLog
from raysft.report.run_facts import plan_facts, training_facts
from raysft.report.text import held_out, masked

_PACKAGES = ("raysft", "ray", "torch", "transformers", "peft", "deepspeed")


@dataclass(frozen=True)
class Published:
    """A repository of the hub with the trained model, and nothing else of the run's directory."""

    name: str
    """``ORG/NAME``."""
    adapter: bool
    """True if it holds the adapter alone, False for a whole model."""
    step: int | None = None
    """The step whose checkpoint it holds; None for the trained model."""
    adapters: tuple[str, ...] = ()
    """Further adapters that were merged into it."""
    images: bool = False
    """True if it comes with a processor."""


def model_card(log: RunLog, plots: list[Path], published: Published | None = None) -> str:
    """The card as Markdown.

    Args:
        log: what the run wrote.
        plots: plots of this run; the card shows the training loss if it is among them.
        published: where the card stands. Default: in the run's directory.
    """
    adapter = log.adapter if published is None or published.adapter else ""
    images = published.images if published else any((log.directory.model / name).exists() for name in PROCESSOR_FILES)
    beside = () if published else (
        "[`report.html`](report.html) shows the curves, predictions next to their references, and the data.",
        "To reproduce this run, use the `config.yaml` next to this card: `raysft run config.yaml run.storage=FOLDER`.",
    )  # fmt: skip
    sections = [
        _front_matter(log, adapter, images),
        f"# {log.name}",
        _introduction(log, adapter, published),
        _results(log) if published is None or published.step is None else "",
        "![Training loss](training_loss.png)" if "training_loss.png" in {plot.name for plot in plots} else "",
        _usage(log, adapter, published, images),
        _data(log, published),
        _table("Training settings", ("setting", "value"), _settings(log)),
        _table("Planned", ("", ""), plan_facts(log)),
        _table("Measured", ("", ""), training_facts(log)),
        _table("Versions", ("package", "version"), versions()),
        *beside,
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def adapter_name(adapter: str) -> str:
    """Name of an adapter as papers write it.

    >>> adapter_name("lora"), adapter_name("oft")
    ('LoRA', 'OFT')
    """
    return {"lora": "LoRA"}.get(adapter, adapter.upper())


@cache
def versions() -> list[tuple[str, str]]:
    """Packages and their versions in the environment that writes the report."""
    rows = [("Python", platform.python_version())]
    for package in _PACKAGES:
        try:
            rows.append((package, version(package)))
        except PackageNotFoundError:
            continue
    return rows


def _front_matter(log: RunLog, adapter: str, images: bool) -> str:
    base = str(log.option("model.path", ""))
    front: dict[str, Any] = {}
    # The Hub refuses a card whose base_model is not a Hub id. The text names any other base.
    if re.fullmatch(r"[\w.-]+/[\w.-]+", base) and not Path(base).exists() and not base.endswith(".gguf"):
        front |= {"base_model": base, "base_model_relation": "adapter" if adapter else "finetune"}
    front |= {
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "image-text-to-text" if images else "text-generation",
        "tags": ["raysft", str(log.option("stage", "sft")), log.finetuning],
    }
    return f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---"


def _introduction(log: RunLog, adapter: str, published: Published | None) -> str:
    base = _code(_place(log.option("model.path", "?"), published))
    data = ", ".join(_code(source.get("name", "?")) for source in log.sources("train")) or "unnamed data"
    method = "continued pre-training" if log.option("stage") == "pt" else "supervised fine-tuning"
    article = "a" if log.adapter == "lora" else "an"
    if adapter:
        model = f"This is {article} {adapter_name(adapter)} adapter for {base}, trained by {method} on {data}"
    elif log.adapter:
        merged = f"with {article} {adapter_name(log.adapter)} adapter merged into it, which was trained by {method}"
        model = f"This model is {base} {merged} on {data}"
    elif log.finetuning == "freeze":
        model = f"This model is {base} after {method} of some of its layers on {data}"
    else:
        model = f"This model is {base} after {method} of all its weights on {data}"
    text = f"{model}, with raysft on [Ray](https://www.ray.io)."
    if published and published.adapters:
        text += (
            f" Merged into it afterwards: {', '.join(_code(_place(each, published)) for each in published.adapters)}."
        )
    if published and published.step is not None:
        return f"{text} It is the checkpoint after step {published.step:,}; the results of the run are those of later steps."
    if log.best and log.option("train.keep_best"):
        step, metric, value = log.best
        text += f" It is the model after step {step:,}, which has the best `{metric}` ({value:.4g})."
    if not log.steps:
        return f"{text} No training step has been logged yet."
    done, total = log.steps[-1]["current_steps"], log.steps[-1].get("total_steps")
    unfinished = isinstance(total, int) and done < total
    return f"{text} Training has reached step {done:,} of {total:,}." if unfinished else text


def _results(log: RunLog) -> str:
    """The before/after table, and how the scored text was generated."""
    rows = compare(log)
    table = [(row.label, row.shown_before, row.shown_after, row.change) for row in rows]
    text = _table("Results", ("metric", "before", "after", "change"), table)
    if unfinished(log) and rows:
        text += f"\n\n{unfinished(log)}"
    if any(row.after_interval for row in rows):
        text += f"\n\nValues in brackets are {INTERVALS}."
    signatures = {str(row.get("metric")): _code(str(row["signature"])) for row in log.metrics if row.get("signature")}
    if signatures:
        listed = ", ".join(f"{metric} {signature}" for metric, signature in signatures.items())
        text += f"\n\nsacreBLEU signatures: {listed}."
    if compare_predictions(log):
        option = log.option
        sampling = (
            f"sampling (temperature {option('generate.temperature')}, top-p {option('generate.top_p')}, "
            f"top-k {option('generate.top_k')})"
            if option("generate.do_sample")
            else "greedy decoding"
            if option("generate.num_beams", 1) == 1
            else f"beam search ({option('generate.num_beams')} beams)"
        )
        text += f"\n\nPredictions were generated by {sampling}, with at most {option('generate.max_new_tokens')} new tokens."
    return text


def _usage(log: RunLog, adapter: str, published: Published | None, images: bool) -> str:
    """How to load this model and generate with it."""
    folder = published.name if published else "model"
    trusted = log.option("model.path") in log.option("model.trust_remote_code", [])
    load = loading_code(folder, bool(adapter), images, trusted)
    beside = "" if published else "`model` is the folder next to this card.\n\n"
    text = f"## Usage\n\n{beside}```python\n{load}\n{prompt_code(log.option('stage') != 'pt', images)}```"
    if adapter:
        description = "adapter_config.json" if published else "model/adapter_config.json"
        text += (
            f"\n\nThe base model is `base_model_name_or_path` in `{description}`. If it is stored elsewhere, load it "
            f'first and add the adapter: `PeftModel.from_pretrained(base, "{folder}")`.'
        )
    return text


def _data(log: RunLog, published: Published | None) -> str:
    """The sources of the training and the evaluation."""
    rows = []
    for use, part, plan_key in (("training", "train", "sources"), ("evaluation", "eval", "evaluation")):
        planned = log.plan.get(plan_key)
        for source in log.sources(part):
            paths = source.get("path", "")
            path = ", ".join(_place(path, published) for path in (paths if isinstance(paths, list) else [paths]))
            first, sampled = source.get("max_examples") or log.option("data.max_examples"), source.get("num_samples")
            plan = planned.get(source.get("name")) if isinstance(planned, dict) else None
            examples = _used(plan) if isinstance(plan, dict) else None
            limit = f"the first {first:,}" if first else f"{sampled:,} at random" if sampled else ""
            size = f"{examples:,}" if isinstance(examples, int) else limit
            rows.append((str(source.get("name", "")), use, _code(path), size))
    text = _table("Data", ("source", "used for", "path", "examples"), rows)
    holdout = log.option("data.holdout", 0)
    if text and holdout:
        text += f"\n\n{held_out(holdout)} held out for evaluation."
    return text


def _used(plan: dict[str, Any]) -> int | None:
    """Examples of a source without those that are left out as duplicates."""
    examples, counts = plan.get("examples"), plan.get("counts")
    left_out = counts.get("left_out", 0) if isinstance(counts, dict) else 0
    return examples - left_out if isinstance(examples, int) and isinstance(left_out, int) else None


def _settings(log: RunLog) -> list[tuple[str, str]]:
    """The settings that decide what the model learns. Those that raysft resolves come from the plan."""
    option, resolved = log.option, log.resolved.get
    warm_up = option("train.warmup_steps")
    rows: list[tuple[str, Any]] = [
        ("fine-tuning", log.finetuning),
        *_method_settings(log),
        ("learning rate", resolved("learning_rate")),
        (
            "LR schedule",
            f"{option('train.schedule')}, warm-up over "
            + (f"{100 * option('train.warmup_ratio', 0):g}% of the steps" if warm_up is None else f"{warm_up} steps"),
        ),
        ("optimizer", resolved("optimizer") or option("train.optimizer")),
        ("weight decay", option("train.weight_decay")),
        ("gradient clipping", option("train.max_grad_norm")),
        ("loss", option("train.loss")),
        ("rows per step", resolved("global_batch_size")),
        ("tokens per row", option("data.sequence_length")),
        ("packing", option("data.packing")),
        ("epochs", log.plan.get("epochs", option("train.epochs"))),
        ("max. steps", option("train.max_steps")),
        ("dtype of the weights", resolved("dtype")),
        ("attention", resolved("attention")),
        ("workers", resolved("workers")),
        ("ZeRO stage", resolved("zero_stage")),
        ("seed", option("run.seed")),
    ]
    return [(label, str(value)) for label, value in rows if value is not None]


def _method_settings(log: RunLog) -> list[tuple[str, Any]]:
    """Settings of the adapter, or of the layers that are trained."""
    option = log.option
    if log.adapter:
        name, section = adapter_name(log.adapter), f"model.{log.adapter}"
        target = option(f"{section}.target", "all")
        modules = "all linear layers except the output head" if target == "all" else target
        return [
            (f"{name} rank", option(f"{section}.rank")),
            (f"{name} alpha", log.resolved.get("lora_alpha")),
            (f"{name} block size", option(f"{section}.block_size")),
            (f"{name} dropout", option(f"{section}.dropout")),
            (f"{name} modules", ", ".join(modules) if isinstance(modules, list) else modules),
        ]
    if log.finetuning == "freeze":
        modules = option("model.freeze.modules", "all")
        return [
            ("trained layers", _trained_layers(log)),
            ("trained modules", ", ".join(modules) if isinstance(modules, list) else modules),
        ]
    return []


def _trained_layers(log: RunLog) -> str:
    """The layers that were trained, in words."""
    layers, new = log.option("model.freeze.layers", "auto"), log.option("model.new_layers", 0)
    if layers == "auto" and new:
        return f"the {new} new one{'s' * (new > 1)}"
    if isinstance(layers, list):
        return ", ".join(str(index) for index in layers)
    number = 2 if layers == "auto" else int(layers)
    if log.option("model.freeze.spread", False):
        return f"{number}, evenly spread"
    return f"the {'last' if number > 0 else 'first'} {abs(number)}"


def _table(title: str, head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A section that is one table; empty without rows."""
    if not rows:
        return ""
    lines = [head, ("---",) * len(head), *rows]
    cells = ("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |" for line in lines)
    return f"## {title}\n\n" + "\n".join(cells)


def _place(location: Any, published: Published | None) -> str:
    """A path or URI without secrets; for the public, of an absolute path only the last part, without the folders of a machine."""
    text = masked(location)
    return Path(text).name if published and text.startswith(("/", "~", "file:")) else text


def _code(text: str) -> str:
    return f"`{text.replace('`', '')}`"
