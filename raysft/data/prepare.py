"""The data stage: from files to tokenized shards to a plan of packed rows."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

from raysft.config import Config, Source, with_overrides
from raysft.config.named_templates import special_tokens, template_names
from raysft.config.result_names import evaluation_names
from raysft.data.duplicates import Duplicates, count_duplicates
from raysft.data.rows.packed_dataset import PackedDataset
from raysft.data.rows.row_plan import MAX_PLANNED, Layout
from raysft.data.shards.build import build_shards
from raysft.data.shards.manifest import Manifest
from raysft.data.shards.media_files import check_media_files
from raysft.data.shards.openings import HeldOut
from raysft.data.shards.ray_pipeline import Notify
from raysft.data.shards.shard_set import ShardSet, Split, resolve_shard_set
from raysft.data.tokenization.tokenizer import load_once, own_chat_template
from raysft.data.tokenization.turn_ends import merge_counts, stop_token_ids
from raysft.errors import RequestError


def prepare(
    config: Config, model: str, notify: Notify = lambda line: None, shown: Collection[str] = ("train", "eval")
) -> PreparedData:
    """Tokenize the data of a run and plan its rows.

    1. Name the shard set of each source and split: its files, the tokenizer and all options, hashed to one cache key.
    2. Tokenize the sets that are not in the cache, in one pass (of Ray Data, unless they are small); each set gets a manifest.
    3. Plan from the manifests alone, without reading tokens, which examples make up which row of which step.

    Args:
        config: the run's config.
        model: folder or Hub id of the model whose tokenizer is used.
        notify: called with lines about the progress.
        shown: ``train``, ``eval``: the sets whose images will be read, and must be there. A prompt whose image is gone fails alone.

    Raises:
        RequestError: the data cannot be used as requested.
    """
    held_out = HeldOut.of(config, model, notify)

    def resolve(source: Source, split: Split, with_prompts: bool) -> ShardSet:
        return resolve_shard_set(config, source, split, model, with_prompts, held_out.limit)

    train_split: Split = "train" if config.data.holdout else "all"
    train = [resolve(source, train_split, with_prompts=False) for source in config.data.train]
    evaluation = {
        (source.name, split): resolve(source, split, with_prompts=config.stage == "sft")
        for source, split in evaluation_sets(config, held_out)
    }
    generation = generation_sets(config, held_out) if config.generates else []
    prompts = [
        evaluation.get((source.name, split)) or resolve(source, split, with_prompts=True)
        for source, split in generation
    ]
    sets = [*train, *evaluation.values(), *prompts]
    manifests = _build(config, sets, model, config.model.runs_code, notify)
    prepared = _plan_rows(config, train, list(evaluation.values()), manifests)
    prompts = tuple(manifests[len(train) + len(evaluation) :])
    of_kind: dict[str, tuple[Manifest, ...]] = {"train": prepared.train, "eval": prepared.eval}
    check_media_files([manifest for kind in shown for manifest in of_kind[kind]])
    return replace(prepared, prompts=prompts, missing_tokens=_missing_tokens(config, model))


@dataclass(frozen=True)
class PreparedData:
    """Everything that training and generation need to know about the data."""

    train: tuple[Manifest, ...]
    """One manifest for each training source."""
    eval: tuple[Manifest, ...]
    """One manifest for each evaluation set."""
    train_rows: PackedDataset
    eval_rows: dict[str, PackedDataset]
    """Name of an evaluation set → its rows."""
    prompts: tuple[Manifest, ...] = ()
    """One manifest for each source that predictions are generated for."""
    duplicates: Duplicates = field(default_factory=lambda: Duplicates({}, {}))
    """How many examples say the same as others."""
    shared_files: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Evaluation source → (training source, file), where both read the same file."""
    missing_tokens: tuple[str, ...] = ()
    """Special tokens of the named chat template that are not tokens of the tokenizer."""

    @property
    def usable(self) -> list[int]:
        """Examples of each training source that may be trained on."""
        return [len(each) - self.duplicates.train.get(each.name, {}).get("left_out", 0) for each in self.train]

    @property
    def end_tokens(self) -> tuple[int, ...]:
        """IDs of the tokens that end an assistant turn, in the training data and in the references."""
        return stop_token_ids(merge_counts(manifest.turns for manifest in (*self.train, *self.prompts)))


def _missing_tokens(config: Config, model: str) -> tuple[str, ...]:
    """Find the special tokens of the template that ``model.chat_template`` names which the tokenizer splits."""
    name = config.model.chat_template
    if config.stage != "sft" or name not in template_names():
        return ()
    backend = load_once(model, config.model.runs_code).backend_tokenizer
    return tuple(
        token for token in special_tokens(name) if len(backend.encode(token, add_special_tokens=False).ids) != 1
    )


def prepare_prompts(config: Config, model: str, runs_code: bool, notify: Notify = lambda line: None) -> list[Manifest]:
    """Tokenize the prompts of ``generate.sources`` with the tokenizer of any model, which need not be the trained one.

    Long conversations are kept: nothing is packed into rows, so there is no length limit.

    Args:
        config: the run's config.
        model: folder of the model whose tokenizer is used.
        runs_code: allow code that comes with the tokenizer to run.
        notify: called with lines about the progress.

    Raises:
        RequestError: the data cannot be used as requested.
    """
    config = _with_own_template(with_overrides(config, {"data.on_overflow": "truncate"}), model, runs_code, notify)
    held_out = HeldOut.of(config, model, notify)
    sets = [
        resolve_shard_set(config, source, split, model, with_prompts=True, limit=held_out.limit)
        for source, split in generation_sets(config, held_out)
    ]
    return _build(config, sets, model, runs_code, notify)


def prepare_evaluation(
    config: Config, model: str, runs_code: bool, notify: Notify = lambda line: None
) -> tuple[list[Manifest], dict[str, PackedDataset]]:
    """Tokenize the evaluation sets with the tokenizer of any model, and plan their rows; nothing to train on is read.

    Arguments and errors are those of ``prepare_prompts``.

    Returns:
        The manifests of all sets, and the rows of those that have something to evaluate, by name.
    """
    config = _with_own_template(config, model, runs_code, notify)
    held_out = HeldOut.of(config, model, notify)
    # As a training has them, which then finds them in the cache.
    sets = [
        resolve_shard_set(config, source, split, model, config.stage == "sft", held_out.limit)
        for source, split in evaluation_sets(config, held_out)
    ]
    manifests = _build(config, sets, model, runs_code, notify)
    check_media_files(manifests)
    return manifests, _evaluation_rows(config, sets, manifests)


def _build(config: Config, sets: Sequence[ShardSet], model: str, runs_code: bool, notify: Notify) -> list[Manifest]:
    """Tokenize the sets that are not in the cache, as the config asks."""
    label = config.scaling.data_label
    return build_shards(sets, model, config.data.max_rejected, config.chat_template, notify, runs_code, label)


def _with_own_template(config: Config, model: str, runs_code: bool, notify: Notify) -> Config:
    """Leave ``model.chat_template`` to a model that has no chat template."""
    own, named = own_chat_template(model, runs_code), config.model.chat_template
    if not own:
        return config
    if named and config.stage == "sft" and config.chat_template != own:
        notify(f"model: its own chat template is used; model.chat_template={named} is for models that have none")
    return with_overrides(config, {"model.chat_template": None})


def evaluation_sets(config: Config, held_out: HeldOut) -> list[tuple[Source, Split]]:
    """Sources to evaluate: the held-out split of each training source that has one, then ``data.eval``."""
    splits: list[tuple[Source, Split]] = [
        (source, "holdout") for source in config.data.train if source.name in held_out.sources
    ]
    return [*splits, *((source, "all") for source in config.data.eval)]


def generation_sets(config: Config, held_out: HeldOut) -> list[tuple[Source, Split]]:
    """Sources to generate for: ``generate.sources``, by default the evaluation sets."""
    evaluation = evaluation_sets(config, held_out)
    by_name: dict[str, tuple[Source, Split]] = {source.name: (source, "all") for source in config.data.train}
    by_name |= {source.name: (source, split) for source, split in evaluation}
    return [by_name[name] for name in dict.fromkeys(config.generate.sources)] or evaluation


def _plan_rows(
    config: Config, train: Sequence[ShardSet], evaluation: Sequence[ShardSet], manifests: Sequence[Manifest]
) -> PreparedData:
    """Plan the rows of training and evaluation; ``manifests`` starts with those of ``train``, then of ``evaluation``."""
    data = config.data
    planned = math.ceil(config.train.epochs) * sum(map(len, manifests[: len(train)]))
    if planned > MAX_PLANNED and not config.train.max_steps:
        raise RequestError(
            f"train.epochs={config.train.epochs} needs {planned:,} examples, but a row plan holds at most {MAX_PLANNED:,}; "
            "lower it, or set train.max_steps"
        )
    evaluated = manifests[len(train) : len(train) + len(evaluation)]
    duplicates = count_duplicates(manifests[: len(train)], evaluated, data.duplicates == "drop", data.mixing)
    train_rows = PackedDataset(
        manifests=tuple(shards.manifest.location for shards in train),
        capacity=data.sequence_length,
        global_batch_size=None if config.train.global_batch_size == "auto" else config.train.global_batch_size,
        seed=config.run.seed,
        epochs=config.train.epochs,
        max_steps=config.train.max_steps,
        repeat=config.train.max_steps is not None,
        layout=_layout(config),
        mixing=data.mixing,
        mixing_weights=tuple(source.weight or 1.0 for source in data.train),
        document_mask=data.document_mask,
        shuffle=data.shuffle,
        apart_from=tuple(each.manifest.location for each in evaluation) if data.duplicates == "drop" else None,
    )
    eval_rows = _evaluation_rows(config, evaluation, evaluated)
    _refuse_nothing_compared(config, eval_rows)
    _refuse_empty_steps(train_rows)
    return PreparedData(
        train=tuple(manifests[: len(train)]),
        eval=tuple(evaluated),
        train_rows=train_rows,
        eval_rows=eval_rows,
        duplicates=duplicates,
        shared_files=_shared_files(train, evaluation),
    )


def _layout(config: Config) -> Layout:
    return "single" if not config.data.packing else "joined" if config.stage == "pt" else "packed"


def _evaluation_rows(
    config: Config, evaluation: Sequence[ShardSet], evaluated: Sequence[Manifest]
) -> dict[str, PackedDataset]:
    """Plan the rows of the evaluation sets that have loss tokens, by name."""
    found = {
        shards.source.name: PackedDataset(
            manifests=(shards.manifest.location,),
            capacity=config.data.sequence_length,
            global_batch_size=config.micro_batch_size * config.scaling.most_workers,
            layout=_layout(config),
            document_mask=config.data.document_mask,
            shuffle=False,
        )
        for shards, manifest in zip(evaluation, evaluated, strict=True)
        if manifest.loss_tokens.any()  # not for prompts alone
    }
    for rows in found.values():
        _ = rows.row_plan  # or each worker would plan them
    return found


def _refuse_nothing_compared(config: Config, eval_rows: dict[str, PackedDataset]) -> None:
    named, metric = config.train.comparing_key, config.train.best_metric
    if not named or metric.startswith("predict_"):
        return
    if not eval_rows:
        raise RequestError(
            f"{named} compares evaluations, but no example of data.eval has an answer; add answers, or use data.holdout"
        )
    if metric not in (known := evaluation_names(list(eval_rows))):
        raise RequestError(
            f"train.best_metric={metric} is not a result of this run: of its evaluation sets, only {', '.join(eval_rows)} has "
            f"examples with answers; add answers, or use one of {', '.join(known)}"
        )


def _refuse_empty_steps(rows: PackedDataset) -> None:
    plan = rows.row_plan
    if not plan.step_loss_tokens.all():
        step = int((plan.step_loss_tokens == 0).argmax()) + 1
        raise RequestError(
            f"every step needs at least one loss token, but step {step} has none; "
            f"raise train.global_batch_size={plan.global_batch_size}"
        )


def _shared_files(train: Sequence[ShardSet], evaluation: Sequence[ShardSet]) -> dict[str, tuple[str, str]]:
    """Find files of evaluation sources that a training source reads too.

    Files are compared by content: a registry, a glob or a copy may give the same data another name.
    """
    training_files = {file.identity: shards.source.name for shards in train for file in shards.files if file.size}
    return {
        shards.source.name: (training_files[file.identity], file.path)
        for shards in evaluation
        if shards.split == "all"
        for file in shards.files
        if file.identity in training_files
    }
