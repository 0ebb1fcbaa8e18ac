"""Files → tokenized shards → packed rows in a known order: the data stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from raysft.config import Config, RequestError
from raysft.data.manifest import Manifest
from raysft.data.schedule import Layout
from raysft.data.shards import ShardSet, Tell, shard_set, write
from raysft.data.stream import Rows


@dataclass(frozen=True)
class Prepared:
    """What the data stage hands on."""

    train: tuple[Manifest, ...]
    eval: tuple[Manifest, ...]
    train_rows: Rows
    eval_rows: dict[str, Rows]
    """Rows of each evaluation set by its name."""


def prepare(config: Config, model: str, tell: Tell = lambda line: None) -> Prepared:
    """Tokenize all sources into the cache, or find them there, and schedule their rows.

    Args:
        config: the run's config.
        model: folder or hub id that holds the tokenizer.
        tell: takes lines that say how far it is.

    Raises:
        RequestError: the data cannot be used as asked.
    """
    train = [
        shard_set(config, source, "train" if config.data.holdout else "all", model, with_prompts=False)
        for source in config.data.train
    ]
    with_prompts = config.stage == "sft"
    held_out = [
        shard_set(config, source, "holdout", model, with_prompts) for source in config.data.train if config.data.holdout
    ]
    evaluation = held_out + [shard_set(config, source, "all", model, with_prompts) for source in config.data.eval]
    most, trusted = config.data.max_rejected, config.model.runs_code
    manifests = write([*train, *evaluation], model, most, config.chat_template, tell, trusted)
    return _schedule(config, train, evaluation, manifests)


def _schedule(
    config: Config, train: Sequence[ShardSet], evaluation: Sequence[ShardSet], manifests: Sequence[Manifest]
) -> Prepared:
    data = config.data
    layout: Layout = "single" if not data.packing else "joined" if config.stage == "pt" else "packed"
    train_rows = Rows(
        manifests=tuple(each.manifest.location for each in train),
        capacity=data.sequence_length,
        rows_per_step=config.train.rows_per_step,
        seed=config.run.seed,
        epochs=config.train.epochs,
        max_steps=config.train.max_steps,
        layout=layout,
        mixing=data.mixing,
        shares=tuple(source.weight or 1.0 for source in data.train),
        document_mask=data.document_mask,
    )
    eval_rows = {
        each.source.name: Rows(
            manifests=(each.manifest.location,),
            capacity=data.sequence_length,
            rows_per_step=config.train.rows_per_device * config.scaling.most_workers,
            layout=layout,
            document_mask=data.document_mask,
            shuffle=False,
        )
        for each in evaluation
    }
    if not train_rows.schedule.step_trained.all():
        step = int((train_rows.schedule.step_trained == 0).argmax())
        raise RequestError(f"step {step} has no trained token; raise train.rows_per_step={config.train.rows_per_step}")
    return Prepared(tuple(manifests[: len(train)]), tuple(manifests[len(train) :]), train_rows, eval_rows)
