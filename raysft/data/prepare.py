"""Files → tokenized shards → packed rows in a known order: the data stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from raysft.config import Config, Source, with_overrides
from raysft.data.rows.packed_dataset import PackedDataset
from raysft.data.rows.row_plan import Layout
from raysft.data.shards.build import Notify, ShardSet, build_shards, shard_set
from raysft.data.shards.manifest import Manifest
from raysft.data.shards.shard_writer import Split
from raysft.data.tokenization.tokenizer import load_once
from raysft.data.tokenization.turn_ends import merge_counts, stop_token_ids
from raysft.errors import RequestError


@dataclass(frozen=True)
class PreparedData:
    """What the data stage hands on."""

    train: tuple[Manifest, ...]
    eval: tuple[Manifest, ...]
    train_rows: PackedDataset
    eval_rows: dict[str, PackedDataset]
    """Rows of each evaluation set by its name."""
    prompts: tuple[Manifest, ...] = ()
    """What is generated for."""
    shared_files: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Evaluation sets that read a file which a training source reads too: name → that source, and the file."""

    @property
    def end_tokens(self) -> tuple[int, ...]:
        """Tokens that end the assistant's turns, as they are trained on and as the references have them."""
        return stop_token_ids(merge_counts(each.turns for each in (*self.train, *self.prompts)))


def prepare(config: Config, model: str, notify: Notify = lambda line: None) -> PreparedData:
    """Tokenize all sources into the cache, or find them there, and row_plan their rows.

    Args:
        config: the run's config.
        model: folder or hub id that holds the tokenizer.
        notify: takes lines that say how far it is.

    Raises:
        RequestError: the data cannot be used as asked.
    """
    train = [
        shard_set(config, source, "train" if config.data.holdout else "all", model, with_prompts=False)
        for source in config.data.train
    ]
    with_prompts = config.stage == "sft"
    by_part = {
        (source.name, split): shard_set(config, source, split, model, with_prompts)
        for source, split in evaluation_sets(config)
    }
    evaluation = list(by_part.values())
    asked = generation_sets(config) if config.generates else []
    prompts = [
        by_part.get((source.name, split)) or shard_set(config, source, split, model, with_prompts=True)
        for source, split in asked
    ]
    most, trusted = config.data.max_rejected, config.model.runs_code
    manifests = build_shards([*train, *evaluation, *prompts], model, most, config.chat_template, notify, trusted)
    prepared = _plan_rows(config, train, evaluation, manifests)
    return replace(prepared, prompts=tuple(manifests[len(train) + len(evaluation) :]))


def prepare_prompts(config: Config, model: str, runs_code: bool, notify: Notify = lambda line: None) -> list[Manifest]:
    """Tokenize what is generated for with the tokenizer of any model, or find it in the cache.

    No prompt is left out for the length of its conversation: there are no rows that it would have to fit into.

    Args:
        config: the run's config.
        model: folder that holds the tokenizer.
        runs_code: code that comes with the tokenizer may run.
        notify: takes lines that say how far it is.

    Raises:
        RequestError: the data cannot be used as asked.
    """
    settings: dict[str, Any] = {"data.on_overflow": "truncate"}
    if load_once(model, runs_code).chat_template:
        settings["model.chat_template"] = None
    config = with_overrides(config, settings)
    sets = [shard_set(config, source, split, model, with_prompts=True) for source, split in generation_sets(config)]
    return build_shards(sets, model, config.data.max_rejected, config.chat_template, notify, runs_code)


def evaluation_sets(config: Config) -> list[tuple[Source, Split]]:
    """The evaluation sets: what is held out of the training sources, and the sources for evaluation."""
    held_out: list[tuple[Source, Split]] = [(source, "holdout") for source in config.data.train if config.data.holdout]
    return [*held_out, *((source, "all") for source in config.data.eval)]


def generation_sets(config: Config) -> list[tuple[Source, Split]]:
    """What ``generate.sources`` names, or the evaluation sets."""
    evaluated, names = evaluation_sets(config), config.generate.sources
    by_name: dict[str, tuple[Source, Split]] = {source.name: (source, "all") for source in config.data.train}
    by_name |= {source.name: (source, split) for source, split in evaluated}
    return [by_name[name] for name in dict.fromkeys(names)] or evaluated


def _plan_rows(
    config: Config, train: Sequence[ShardSet], evaluation: Sequence[ShardSet], manifests: Sequence[Manifest]
) -> PreparedData:
    data = config.data
    layout: Layout = "single" if not data.packing else "joined" if config.stage == "pt" else "packed"
    train_rows = PackedDataset(
        manifests=tuple(each.manifest.location for each in train),
        capacity=data.sequence_length,
        global_batch_size=None if config.train.global_batch_size == "auto" else config.train.global_batch_size,
        seed=config.run.seed,
        epochs=config.train.epochs,
        max_steps=config.train.max_steps,
        layout=layout,
        mixing=data.mixing,
        mixing_weights=tuple(source.weight or 1.0 for source in data.train),
        document_mask=data.document_mask,
    )
    eval_rows = {
        each.source.name: PackedDataset(
            manifests=(each.manifest.location,),
            capacity=data.sequence_length,
            global_batch_size=config.train.micro_batch_size * config.scaling.most_workers,
            layout=layout,
            document_mask=data.document_mask,
            shuffle=False,
        )
        for each in evaluation
    }
    row_plan = train_rows.row_plan
    if not row_plan.step_loss_tokens.all():
        step = int((row_plan.step_loss_tokens == 0).argmax()) + 1
        raise RequestError(
            f"step {step} has no trained token; raise train.global_batch_size={row_plan.global_batch_size}"
        )
    return PreparedData(
        tuple(manifests[: len(train)]),
        tuple(manifests[len(train) : len(train) + len(evaluation)]),
        train_rows,
        eval_rows,
        shared_files=_shared_files(train, evaluation),
    )


def _shared_files(train: Sequence[ShardSet], evaluation: Sequence[ShardSet]) -> dict[str, tuple[str, str]]:
    """By what files hold: a registry, a glob or a copy may name one otherwise."""
    sources = {file.identity: each.source.name for each in train for file in each.files if file.size}
    return {
        each.source.name: (sources[file.identity], file.path)
        for each in evaluation
        if each.split == "all"
        for file in each.files
        if file.identity in sources
    }
