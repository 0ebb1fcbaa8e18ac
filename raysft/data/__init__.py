"""Files → tokenized shards → packed rows in a known order: the data stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from raysft.config import Config, RequestError
from raysft.data.manifest import Manifest
from raysft.data.shards import ShardSet, shard_set, write
from raysft.data.stream import Rows


@dataclass(frozen=True)
class Prepared:
    """What the data stage hands on."""

    train: tuple[Manifest, ...]
    eval: tuple[Manifest, ...]
    train_rows: Rows
    eval_rows: dict[str, Rows]
    """Rows of each evaluation set by its name."""


def prepare(config: Config, model: str) -> Prepared:
    """Tokenize all sources into the cache, or find them there, and schedule their rows.

    Args:
        config: the run's config.
        model: folder or hub id that holds the tokenizer.

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
    manifests = write([*train, *evaluation], config.data.max_rejected)
    return _schedule(config, train, evaluation, manifests)


def _schedule(
    config: Config, train: Sequence[ShardSet], evaluation: Sequence[ShardSet], manifests: Sequence[Manifest]
) -> Prepared:
    train_rows = Rows(
        manifests=tuple(str(each.manifest) for each in train),
        capacity=config.data.sequence_length,
        rows_per_step=config.train.rows_per_step,
        seed=config.run.seed,
        epochs=config.train.epochs,
        max_steps=config.train.max_steps,
        packing=config.data.packing,
    )
    eval_rows = {
        each.source.name: Rows(
            manifests=(str(each.manifest),),
            capacity=config.data.sequence_length,
            rows_per_step=config.train.rows_per_device * config.scaling.num_workers,
            packing=config.data.packing,
            shuffle=False,
        )
        for each in evaluation
    }
    if not train_rows.schedule.step_trained.all():
        step = int((train_rows.schedule.step_trained == 0).argmax())
        raise RequestError(f"step {step} has no trained token; raise train.rows_per_step={config.train.rows_per_step}")
    return Prepared(tuple(manifests[: len(train)]), tuple(manifests[len(train) :]), train_rows, eval_rows)
