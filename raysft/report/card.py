"""The model card: ``README.md`` with Hugging Face front matter."""

from __future__ import annotations

import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from raysft.report.comparison import INTERVALS, compare, compare_predictions, unfinished
from raysft.report.read_run import RunLog
from raysft.report.run_facts import planned, went

_PACKAGES = ("raysft", "ray", "torch", "transformers", "peft", "deepspeed")

_LOAD_ADAPTER = """\
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

model = AutoPeftModelForCausalLM.from_pretrained("model", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("model")
"""
_LOAD_MODEL = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("model", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("model")
"""
_ASK = """\
messages = [{"role": "user", "content": "Hello!"}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
"""
_CONTINUE = """\
inputs = tokenizer("Once upon a time", return_tensors="pt")
"""
_GENERATE = """\
output = model.generate(**inputs, max_new_tokens=256)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
"""


def model_card(log: RunLog, plots: list[Path]) -> str:
    """The card as Markdown.

    Args:
        plots: plots of this run; the training curve is shown if it is among them.
    """
    sections = [
        _front_matter(log),
        f"# {log.name}",
        _opening(log),
        _results(log),
        "![Training loss](training_loss.png)" if "training_loss.png" in {plot.name for plot in plots} else "",
        _use(log),
        _data(log),
        _table("Training", ("setting", "value"), _settings(log)),
        _table("Plan", ("", ""), planned(log)),
        _table("How it went", ("", ""), went(log)),
        _table("Versions", ("package", "installed where this card was written"), versions()),
        "[`report.html`](report.html) shows curves, predictions beside their references and the data of this run.",
        "`raysft run config.yaml run.storage=FOLDER` with the config beside this card trains it again.",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def masked(location: Any) -> str:
    """A path without what may be secret: credentials and the query of a URI.

    >>> masked("s3://key:secret@bucket/chats.jsonl?endpoint_override=host")
    's3://***@bucket/chats.jsonl?***'
    >>> masked("data/part-?.jsonl")
    'data/part-?.jsonl'
    """
    text = str(location)
    if "://" not in text:
        return text
    # A secret may hold slashes and @ that should have been escaped: with a colon all up to the last @ is masked.
    text = re.sub(r"://(?:[^@/]*:.*@|[^@/]*@)", "://***@", text)
    return re.sub(r"[?#].*", "?***", text)


def _front_matter(log: RunLog) -> str:
    base = str(log.option("model.path", ""))
    front: dict[str, Any] = {}
    # The Hub refuses a card whose base_model is no id of its own; another base is named in the text.
    if re.fullmatch(r"[\w.-]+/[\w.-]+", base) and not Path(base).exists() and not base.endswith(".gguf"):
        front["base_model"] = base
    front |= {
        "library_name": "peft" if _is_adapter(log) else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["raysft", str(log.option("stage", "sft")), str(log.option("model.finetuning", "full"))],
    }
    return f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---"


def _opening(log: RunLog) -> str:
    what = "A LoRA adapter of" if _is_adapter(log) else "All weights of"
    how = "continued in pre-training on" if log.option("stage") == "pt" else "fine-tuned on"
    names = ", ".join(_code(source.get("name", "?")) for source in log.sources("train")) or "unnamed data"
    base = _code(masked(log.option("model.path", "?")))
    last = log.steps[-1] if log.steps else {}
    done, total = last.get("current_steps", 0), last.get("total_steps", 0)
    partly = f" The run stands at step {done:,} of {total:,}." if isinstance(total, int) and done < total else ""
    text = f"{what} {base}, {how} {names} with [Ray](https://www.ray.io) by raysft.{partly}"
    return text if log.steps else f"{text} No step of training is logged yet."


def _results(log: RunLog) -> str:
    """The before/after table, and how the text was generated that was scored."""
    rows = compare(log)
    table = [(row.label, row.shown_before, row.shown_after, row.change) for row in rows]
    text = _table("Results", ("measure", "before", "after", "change"), table)
    if unfinished(log) and rows:
        text += f"\n\n{unfinished(log)}"
    if any(row.after_interval for row in rows):
        text += f"\n\nIn brackets: {INTERVALS}."
    signatures = [
        f"{match[1]} {_code(str(value))}"
        for key, value in log.predicted.items()
        if (match := re.fullmatch(r"predict_(\w+)_signature", key))
    ]
    if signatures:
        text += f"\n\nSettings, as sacreBLEU writes them: {', '.join(signatures)}."
    if compare_predictions(log):
        option = log.option
        sampling = (
            f"temperature {option('generate.temperature')}, top-p {option('generate.top_p')}, "
            f"top-k {option('generate.top_k')}"
            if option("generate.do_sample")
            else "the most probable token each time"
        )
        text += f"\n\nText was generated with {sampling}, at most {option('generate.max_new_tokens')} new tokens."
    return text


def _use(log: RunLog) -> str:
    """How to load the model, for this case."""
    load = _LOAD_ADAPTER if _is_adapter(log) else _LOAD_MODEL
    if log.option("model.path") in log.option("model.trust_remote_code", []):
        load = load.replace('"model"', '"model", trust_remote_code=True')
    ask = _CONTINUE if log.option("stage") == "pt" else _ASK
    text = f"## Use\n\n`model` is the folder beside this card.\n\n```python\n{load}\n{ask}{_GENERATE}```"
    if _is_adapter(log):
        text += (
            "\n\nThe base model is the one that `model/adapter_config.json` names as `base_model_name_or_path`. If it "
            'lies elsewhere, load it first and put the adapter on it: `PeftModel.from_pretrained(base, "model")`.'
        )
    return text


def _data(log: RunLog) -> str:
    """Which sources were trained and evaluated on."""
    rows = []
    for use, part, planned_as in (("train", "train", "sources"), ("evaluation", "eval", "evaluation")):
        counts = log.plan.get(planned_as)
        for source in log.sources(part):
            paths = source.get("path", "")
            path = ", ".join(masked(each) for each in (paths if isinstance(paths, list) else [paths]))
            first, drawn = source.get("max_examples"), source.get("num_samples")
            of = counts.get(source.get("name")) if isinstance(counts, dict) else None
            examples = of.get("examples") if isinstance(of, dict) else None
            chosen = f"the first {first:,}" if first else f"{drawn:,} drawn at random" if drawn else ""
            size = f"{examples:,}" if isinstance(examples, int) else chosen
            rows.append((str(source.get("name", "")), use, _code(path), size))
    text = _table("Data", ("source", "used for", "path", "examples"), rows)
    holdout = log.option("data.holdout", 0)
    if text and holdout:
        text += f"\n\n{100 * holdout:g}% of each training source was kept out of training and evaluated on."
    return text


def _settings(log: RunLog) -> list[tuple[str, str]]:
    """The settings that decide what was learned."""
    option = log.option
    rows: list[tuple[str, Any]] = [("finetuning", option("model.finetuning"))]
    if _is_adapter(log):
        rank = option("model.lora.rank")
        alpha = option("model.lora.alpha", 2 * rank if isinstance(rank, int) else None)
        target = option("model.lora.target", "all")
        modules = "all linear layers but the head" if target == "all" else target
        rows += [("LoRA rank", rank), ("LoRA alpha", alpha), ("LoRA dropout", option("model.lora.dropout"))]
        rows += [("LoRA modules", ", ".join(modules) if isinstance(modules, list) else modules)]
    rows += [
        ("learning rate", option("train.learning_rate")),
        (
            "schedule",
            f"{option('train.schedule')}, warm-up over {100 * option('train.warmup_ratio', 0):g}% of the steps",
        ),
        ("optimizer", f"{option('train.optimizer')}, betas {option('train.betas')}, epsilon {option('train.epsilon')}"),
        ("weight decay", option("train.weight_decay")),
        ("gradient clipping", option("train.max_grad_norm")),
        ("loss", option("train.loss")),
        ("rows per step", option("train.global_batch_size")),
        ("tokens per row", option("data.sequence_length")),
        ("packing", option("data.packing")),
        ("epochs", option("train.epochs")),
        ("most steps", option("train.max_steps")),
        ("type of the weights", _dtype(log)),
        ("workers", _workers(option("scaling.num_workers"))),
        ("ZeRO stage", option("train.zero_stage")),
        ("seed", option("run.seed")),
    ]
    return [(label, str(value)) for label, value in rows if value is not None]


def _workers(asked: Any) -> Any:
    return " to ".join(map(str, asked)) if isinstance(asked, list) else asked


def _dtype(log: RunLog) -> Any:
    if log.option("model.dtype", "auto") != "auto":
        return log.option("model.dtype")
    return "bfloat16" if log.option("scaling.use_gpu") else "float32"


def versions() -> list[tuple[str, str]]:
    """Packages and their versions, here and now."""
    rows = [("Python", platform.python_version())]
    for package in _PACKAGES:
        try:
            rows.append((package, version(package)))
        except PackageNotFoundError:
            continue
    return rows


def _is_adapter(log: RunLog) -> bool:
    return log.option("model.finetuning") == "lora"


def _table(title: str, head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A section that is one table; empty without rows."""
    if not rows:
        return ""
    lines = [head, ("---",) * len(head), *rows]
    cells = ("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |" for line in lines)
    return f"## {title}\n\n" + "\n".join(cells)


def _code(text: str) -> str:
    return f"`{text.replace('`', '')}`"
