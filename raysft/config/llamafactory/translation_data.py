"""Keys of LLaMA-Factory that take effect together: data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from raysft.config.llamafactory.settings import Entry, Refusal, Settings
from raysft.config.llamafactory.translation import Derived
from raysft.config.named_templates import template_names, template_words
from raysft.storage.modelscope import prefers_modelscope

ONLINE, REMOTE = "ONLINE", "REMOTE:"
"""Values of ``dataset_dir`` that name no folder: datasets of the hub, and a registry there."""


def sources(given: Settings) -> Derived:
    """Data sets, and where they are."""
    tokenized = given["tokenized_path"]
    if tokenized and Path(tokenized).is_dir():
        yield Refusal(
            "tokenized_path",
            f"tokenized_path={tokenized} exists, so LLaMA-Factory would ignore dataset and train on its tokens, which raysft "
            "cannot read; remove tokenized_path to train on dataset",
        )
    registry = given["dataset_dir"]
    if registry.startswith(REMOTE):
        name = registry.removeprefix(REMOTE)
        yield Refusal(
            "dataset_dir",
            f"dataset_dir={registry} is not supported; run hf download {name} --repo-type dataset --local-dir DIR, and set "
            "dataset_dir to DIR",
        )
    elif registry == ONLINE and prefers_modelscope():
        yield Refusal(
            "dataset_dir",
            "dataset_dir=ONLINE is not supported with USE_MODELSCOPE_HUB=1; write a dataset_info.json whose entries have "
            "ms_hub_url, and set dataset_dir to its folder",
        )
    elif registry != ONLINE:
        yield Entry("data.registry", registry, "dataset_dir")
    online = registry == ONLINE
    train, evaluated = given["dataset"], given["eval_dataset"]
    if not train and not given.trains and evaluated:
        yield Entry("data.train", _sources(evaluated, online), "eval_dataset", "not trained on, but required")
    elif not train and (given.trains or given["val_size"]):
        purpose = "train on" if given.trains else "hold a part out of"
        yield Refusal("dataset", f"dataset is required, but missing; add the names of the data to {purpose}")
    elif train:
        yield from _weighted(given, _sources(train, online))
    asked = next((name for name in ("do_eval", "do_predict", "predict_with_generate") if given[name]), "")
    if asked and not evaluated and not given["val_size"]:
        remedy = (
            "set one of them"
            if given.trains or not train
            else f"rename dataset to eval_dataset to use {', '.join(train)}"
        )
        yield Refusal(asked, f"{asked}=true needs data, but eval_dataset and val_size are missing; {remedy}")
    if evaluated and given.evaluates:
        yield Entry("data.eval", _sources(evaluated, online), "eval_dataset")
    size = given["val_size"]
    if size and evaluated:
        yield Refusal(
            "val_size",
            f"val_size={size:g} holds out part of dataset, but eval_dataset is set, and LLaMA-Factory accepts only one of "
            "them; remove one",
        )
    elif size == 1:
        yield Refusal(
            "val_size", "val_size=1 is neither a fraction nor a number that LLaMA-Factory accepts; use 2 or more"
        )
    elif size:
        yield Entry(
            "data.holdout",
            int(size) if size > 1 else size,
            "val_size",
            "chosen by a hash of the content, not by the seed",
        )


def _sources(names: list[str], online: bool) -> list[dict[str, Any]]:
    if not online:
        return [{"name": name} for name in names]
    return [
        {
            "name": name.rpartition("/")[2],
            "path": f"hf://datasets/{name}@~parquet/default/train",
            "format": "alpaca",
            # Without an entry, LLaMA-Factory reads instruction, input and output alone.
            "columns": dict.fromkeys(("system", "history", "tools", "weight")),
        }
        for name in names
    ]


def _weighted(given: Settings, train: list[dict[str, Any]]) -> Derived:
    mixing, shares = given["mix_strategy"], given["interleave_probs"]
    note = ""
    if mixing == "once":
        mixing, shares = "concat", []
        note = "interleave_once: each example once per epoch, in a random order"
    elif shares and mixing == "concat":
        yield Refusal(
            "interleave_probs", "interleave_probs needs a mix_strategy that interleaves, but it is concat; remove it"
        )
        return
    elif shares:
        if len(shares) != len(train):
            yield Refusal(
                "interleave_probs",
                f"interleave_probs has {len(shares)} values, but dataset has {len(train)} names; add one each",
            )
            return
        try:
            train = [{**source, "weight": float(share)} for source, share in zip(train, shares, strict=True)]
        except ValueError:
            yield Refusal("interleave_probs", f"interleave_probs={','.join(shares)}: must be numbers")
            return
    yield Entry("data.train", train, "dataset")
    yield Entry("data.mixing", mixing, "mix_strategy", note)


def rows(given: Settings) -> Derived:
    """Rows: packing, length, order, and what is left out."""
    packs = given["packing"] if given.given("packing") else given["stage"] == "pt"
    neat = given["neat_packing"]
    key = "neat_packing" if neat else "packing"
    if given["stage"] == "pt":
        yield Entry("data.packing", packs, key, "" if packs else "longer documents are split, not truncated")
        if packs:
            yield Entry(
                "data.document_mask", False, "", "in LLaMA-Factory, documents in the same row attend to each other"
            )
    else:
        notes = ["LLaMA-Factory's rows are a token shorter"] if packs or neat else []
        if packs and not neat:
            notes.append("examples in a row do not attend to each other, as with neat_packing: true")
        note = "; ".join(notes)
        yield Entry("data.packing", packs or neat, key, note)
        yield Entry("data.on_overflow", "truncate", "", "LLaMA-Factory truncates")
    yield Entry("data.max_rejected", 1.0, "", "LLaMA-Factory skips records that it cannot use")
    if given["split_special_tokens"]:
        yield Entry("data.control_tokens_in_text", "escape", "split_special_tokens")
    ordered = "disable_shuffling" if given["disable_shuffling"] else "train_sampling_strategy"
    if given["disable_shuffling"] or given["train_sampling_strategy"] == "sequential":
        yield Entry("data.shuffle", False, ordered)
    if given["data_seed"] not in (None, given["seed"]):
        yield Refusal("data_seed", f"data_seed={given['data_seed']}, but seed={given['seed']}; remove data_seed")


def thoughts(given: Settings) -> Derived:
    """``enable_thinking`` and ``preserve_thinking``, which templates of reasoning models alone heed.

    Without ``mask_history`` such a template keeps all thoughts and writes empty ones, as the one of that name here does.
    """
    key = "preserve_thinking"
    thinking = given.raw.get("enable_thinking", True)
    if thinking is None or not given["enable_thinking"]:  # null is a third value here, and not the default
        options = {"enable_thinking": None if thinking is None else False}
        yield Entry("data.template_options", options, "enable_thinking")
    name = given["template"]
    thinks = name is None or (name in template_names() and bool(template_words(name).get("thinks")))
    if not given[key]:
        if name and thinks and given["mask_history"]:
            yield Entry("data.thinking", "last", key, "with mask_history, earlier turns have no reasoning")
    elif not thinks:
        yield Entry("data.thinking", "template", key, "no effect: only templates of reasoning models use it")
    elif thinking is None or given["enable_thinking"]:
        yield Entry("data.thinking", "keep", key)
    else:
        yield Entry("data.thinking", "empty", key, "without thinking, all reasoning blocks are empty")


DATA: tuple[Callable[[Settings], Derived], ...] = (sources, rows, thoughts)
