"""The model and the data of a run: found, checked and prepared before anything starts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from raysft.config import Config, with_overrides
from raysft.data.prepare import PreparedData, prepare, prepare_evaluation, prepare_prompts
from raysft.data.shards.manifest import Manifest
from raysft.data.tokenization.tokenizer import load_once
from raysft.errors import RequestError
from raysft.models.reference_model import ReferenceFiles, find_reference
from raysft.models.weight_files import check_weights, embedding_rows
from raysft.run.source_plan import plan_sources
from raysft.run.trained_parts import check_images, refuse_shared_images
from raysft.run.warnings import beyond_lines
from raysft.storage import hub_snapshots
from raysft.storage.local_cache import local_copy, model_copy, on_hub


@dataclass(frozen=True)
class ModelFiles:
    """A model that can be trained as the config asks."""

    model: str
    """Folder, URI or Hub id of the model to start from, with earlier adapters merged."""
    adapter: str | None
    """Folder of the adapter to continue from."""
    embedding_rows: int | None
    """Number of tokens that it has embeddings for; None if it does not say."""
    hf_config: Any = None
    """The model's own config."""
    commit: str | None = None
    """Commit of a model on the Hub."""
    reference: ReferenceFiles | None = None
    """``train.reference_model``."""

    @property
    def positions(self) -> int | None:
        """Positions of the model, scaled ones included; None if it has no limit, or its config was not read."""
        from raysft.models.rope_scaling import positions_of

        return positions_of(self.hf_config) if self.hf_config is not None else None


@dataclass(frozen=True)
class PromptInputs:
    """Prompts for an arbitrary model, ``generate.model``."""

    model: str
    """Folder, URI or Hub id."""
    manifests: list[Manifest]
    tokenizer: Any
    embedding_rows: int | None
    """Number of tokens that the model has embeddings for; None if it does not say."""


def read_inputs(config: Config, notify: Callable[[str], None]) -> tuple[Config, str, str | None, PreparedData]:
    """Return the config with what the data determined, the model, the adapter to continue from, and the data.

    Raises:
        RequestError: they cannot be used as asked.
    """
    files = check_model_files(config, notify)
    config, prepared = prepare_data(config, files, notify)
    return config, files.model, files.adapter, prepared


def check_model_files(
    config: Config, notify: Callable[[str], None], commit: str | None = None, reference_commit: str | None = None
) -> ModelFiles:
    """Find the model, add tokens and layers to it, merge adapters into it, and refuse what cannot be trained or generated with.

    Args:
        config: the run's config.
        notify: receives lines for the user.
        commit: the commit on the Hub that the run began with, in place of ``model.revision``.
        reference_commit: the same for ``train.reference_model``.
    """
    from raysft.models.adapters import find_adapter
    from raysft.models.architecture import read_hf_config
    from raysft.models.dequantized import with_exact_weights
    from raysft.models.model_class import loaded_config
    from raysft.models.new_layers import with_new_layers
    from raysft.models.new_tokens import with_new_tokens
    from raysft.models.resolve import find_model
    from raysft.models.rope_scaling import with_rope_scaling
    from raysft.train.check_model import check_model

    model = find_model(config.model.path, config.cache_directory, notify, revision=commit or config.model.revision)
    commit = hub_snapshots.split(model)[1] if on_hub(model) else None
    model = with_exact_weights(config, model, notify)
    hf_config = check_model(config, model, notify)
    given, model = model, with_new_layers(config, with_new_tokens(config, model, hf_config, notify), notify)
    model = with_rope_scaling(config, model, hf_config, notify)
    if model != given:
        named = config.model.path
        hf_config = loaded_config(read_hf_config(config, local_copy(model), named, notify))
    check_generation(config, model)
    model, adapter = find_adapter(config, model, notify)
    rows = embedding_rows(Path(local_copy(model)), hf_config, f"model.path={config.model.path}")
    reference = find_reference(config, model, rows, notify, reference_commit)
    return ModelFiles(model, adapter, rows, hf_config, commit, reference)


def check_generation(config: Config, model: str) -> None:
    """Refuse settings of ``generate`` that the model does not support."""
    if config.generates:
        from raysft.generate.engines import check_suitable

        check_suitable(config, model)


def prepare_data(
    config: Config, files: ModelFiles, notify: Callable[[str], None], shown: Collection[str] = ("train", "eval")
) -> tuple[Config, PreparedData]:
    """Tokenize the data, and return the config with the batch size that it determines; ``shown`` is that of ``prepare``."""
    from raysft.train.deepspeed_config import deepspeed_settings

    prepared = prepare(config, files.model, notify, shown)
    check_images(config, prepared.train)
    refuse_shared_images(config, (*prepared.train, *prepared.eval))
    manifests = (*prepared.train, *prepared.eval, *prepared.prompts)
    tokenizer = load_once(files.model, config.model.runs_code)
    largest = (manifest.largest_token for manifest in manifests)
    check_tokens(largest, files.embedding_rows, tokenizer, f"model.path={config.model.path}")
    if config.train.global_batch_size == "auto":
        config = with_overrides(config, {"train.global_batch_size": prepared.train_rows.row_plan.global_batch_size})
        deepspeed_settings(config, config.scaling.most_workers)
    return config, prepared


def check_tokens(used: Iterable[tuple[int, str]], rows: int | None, tokenizer: Any, named: str) -> None:
    """Refuse text whose tokens the model has no embeddings for: somebody may have added tokens to the tokenizer alone.

    Args:
        used: token ids, and where each of them occurs.
        rows: number of tokens that the model has embeddings for; None if it does not say.
        tokenizer: the tokenizer that made them.
        named: the model as messages name it, ``model.path=PATH``.
    """
    for token, where in used:
        if rows is not None and token >= rows:
            raise RequestError(
                f"{named}: its tokenizer has {len(tokenizer)} tokens, but the model embeddings for {rows}; {where} holds token "
                f"{token} ({tokenizer.convert_ids_to_tokens(token)!r}); put the tokenizer that belongs to the model into its "
                f"folder, or resize the model's embeddings to {len(tokenizer)} (resize_token_embeddings) and save it"
            )


def untrained_ends(config: Config, files: ModelFiles, prepared: PreparedData) -> tuple[str, ...]:
    """Return the tokens that end turns and whose embeddings are neither trained already nor trained by this run."""
    from raysft.models.untrained_tokens import untrained_tokens
    from raysft.models.weight_files import EMBEDDINGS, holds_embeddings

    model = config.model
    whole = model.finetuning == "full" and "language" in model.train_parts
    if config.stage != "sft" or whole or model.new_tokens.tokens:
        return ()
    section = model.adapter or model.freeze
    chosen = model.adapter.target if model.adapter else ()
    named = [*section.extra_modules, *(() if chosen == "all" else chosen)]
    if any(f".{name}.weight".endswith(EMBEDDINGS) for name in named):
        return ()
    if files.adapter and holds_embeddings(Path(local_copy(files.adapter))):
        return ()
    tokenizer = load_once(files.model, model.runs_code)
    ends = untrained_tokens(files.model, prepared.end_tokens, tokenizer.all_special_ids)
    return tuple(tokenizer.convert_ids_to_tokens(ends))


def training_identity(config: Config, files: ModelFiles, prepared: PreparedData) -> dict[str, str]:
    """Hashes of what a run trains and what it trains on, by name, as ``Cursor`` keeps them."""
    from raysft.models.fingerprint import model_fingerprint
    from raysft.train.checkpoint.cursor import EVALUATION, PREDICTION

    identity = {"the model": model_fingerprint(files.model)}
    if files.adapter:
        identity["the adapter"] = model_fingerprint(files.adapter)
    if files.reference:
        identity["the reference"] = model_fingerprint(files.reference.model)
    # With data.duplicates=drop, the evaluation sets decide which examples are trained on.
    sets = prepared.eval if prepared.train_rows.apart_from is not None else ()
    for manifest in prepared.train:
        identity[f"the data of source {manifest.name!r}"] = " ".join([manifest.key, *(each.key for each in sets)])
    if prepared.prompts:
        from raysft.generate.prediction_store import prediction_identity

        identity[PREDICTION] = prediction_identity(config, [manifest.key for manifest in prepared.prompts])
    return identity | {EVALUATION: " ".join(manifest.key for manifest in prepared.eval)}


@dataclass(frozen=True)
class OtherModel:
    """A model or an adapter that is not trained here, with its files checked."""

    location: str
    """Folder, URI or Hub id."""
    named: str
    """As messages name it, ``generate.model=PATH``."""
    folder: Path
    """Its own folder on this node."""
    weights: Path
    """Folder of the whole model: its own, or that of an adapter's base."""
    tokenizer_path: str
    runs_code: bool
    """True if code that comes with it may run."""
    hf_config: Any
    """The model's own config."""
    method: str | None
    """How it is quantized."""

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return load_once(self.tokenizer_path, self.runs_code)

    @cached_property
    def embedding_rows(self) -> int | None:
        """Number of tokens that the model has embeddings for; None if it does not say."""
        return embedding_rows(self.weights, self.hf_config, self.named)


def find_other_model(config: Config, given: str, key: str, notify: Callable[[str], None]) -> OtherModel:
    """Find the model that a key names instead of a trained one, and check its files.

    Raises:
        RequestError: there is none, or it cannot be loaded.
    """
    from raysft.models.adapter_files import adapter_base
    from raysft.models.architecture import read_hf_config
    from raysft.models.dequantized import with_exact_weights
    from raysft.models.quantization import check_method, method_of, quantization_config
    from raysft.models.remote_code import code_name, runs_code
    from raysft.models.resolve import find_model
    from raysft.models.rope_scaling import scaled_config, with_rope_scaling
    from raysft.models.tokenizer import tokenizer_folder

    model = find_model(given, config.cache_directory, notify, key, accept_adapter=True)
    folder, named = model_copy(model), f"{key}={hub_snapshots.split(model)[0] if on_hub(model) else model}"
    check_weights(folder, named)
    if key != "generate.model" or config.generate.engine != "vllm":  # which computes with FP8 and MXFP4 directly
        model = with_exact_weights(config, model, notify, key, given)
        folder = model_copy(model)
    base = adapter_base(folder)
    hf_config = read_hf_config(config, str(base or folder), code_name(config, folder, given), notify, key)
    method = method_of(hf_config)
    if method:
        check_method(named, method, config)
    quantization_config(config)
    scaled_config(config, hf_config, notify, key)
    if (scaled := with_rope_scaling(config, model, hf_config, notify, key, given if base else "")) != model:
        model, folder = scaled, model_copy(scaled)
        hf_config = read_hf_config(config, str(folder), code_name(config, folder, given), notify, key)
    trusted = runs_code(config, folder, given)
    return OtherModel(model, named, folder, base or folder, str(tokenizer_folder(folder)), trusted, hf_config, method)


def read_prompts(config: Config, notify: Callable[[str], None]) -> PromptInputs:
    """Check ``generate.model``, and tokenize the prompts with its tokenizer."""
    model = find_other_model(config, config.generate.model or "", "generate.model", notify)
    check_generation(config, model.location)
    rows = model.embedding_rows
    manifests = prepare_prompts(config, model.tokenizer_path, model.runs_code, notify)
    return PromptInputs(model.location, manifests, model.tokenizer, rows)


@dataclass(frozen=True)
class EvaluationInputs:
    """What ``evaluate.model`` is evaluated on."""

    model: OtherModel
    manifests: list[Manifest]
    """Of all evaluation sets."""
    rows: dict[str, Any]
    """Name of a set that has something to evaluate → its rows (``PackedDataset``)."""


def read_evaluation(config: Config, notify: Callable[[str], None]) -> EvaluationInputs:
    """Check ``evaluate.model``, and tokenize the evaluation sets with its tokenizer.

    Raises:
        RequestError: the model or the data cannot be used, or there is nothing to evaluate on.
    """
    from raysft.models.adapter_files import check_packable
    from raysft.models.attention import kernel
    from raysft.models.rope_scaling import can_be_scaled, positions_of
    from raysft.train.check_model import check_positions, check_shared_rows
    from raysft.train.deepspeed_config import deepspeed_settings

    model = find_other_model(config, config.evaluate.model or "", "evaluate.model", notify)
    if model.weights != model.folder:
        check_packable(model.folder, model.named)
    check_positions(config, model.hf_config.get_text_config())
    check_shared_rows(config, model.hf_config)
    kernel(config, model.hf_config)
    deepspeed_settings(config, config.scaling.most_workers)
    rows = model.embedding_rows
    manifests, eval_rows = prepare_evaluation(config, model.tokenizer_path, model.runs_code, notify)
    refuse_shared_images(config, manifests)
    check_tokens((manifest.largest_token for manifest in manifests), rows, model.tokenizer, model.named)
    check_evaluable(manifests, eval_rows, notify)
    positions = positions_of(model.hf_config)
    scales = not positions or config.data.sequence_length <= positions or can_be_scaled(config, model.hf_config)
    for line in beyond_lines(config, plan_sources(manifests, positions=positions), positions, scales):
        notify(f"warning: {line}")
    return EvaluationInputs(model, manifests, eval_rows)


def check_evaluable(manifests: Iterable[Manifest], rows: Collection[str], notify: Callable[[str], None]) -> None:
    """Refuse evaluation sets if none has a loss token; if only some have none, say which are left out.

    Args:
        manifests: of all sets.
        rows: names of those that have loss tokens.
        notify: receives a line for each that has none.
    """
    without = [manifest.name for manifest in manifests if manifest.name not in rows]
    if not rows:
        raise RequestError(
            f"no example of {', '.join(without)} has an answer to evaluate; name other sources in data.eval, or use raysft "
            "generate"
        )
    for name in without:
        notify(f"evaluation: {name} is skipped, because none of its examples has an answer")
