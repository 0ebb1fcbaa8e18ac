"""``train.reference_model``: found and checked before training starts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from raysft.config import Config
from raysft.errors import RequestError
from raysft.models.tokenizer import load_tokenizer, tokenizer_folder
from raysft.models.weight_files import check_weights, embedding_rows
from raysft.storage import hub_snapshots
from raysft.storage.local_cache import model_copy, on_hub

KEY = "train.reference_model"


@dataclass(frozen=True)
class ReferenceFiles:
    """A model or adapter that training can stay close to."""

    model: str
    """Folder, URI or Hub id."""
    hf_config: Any
    """The model's own config."""
    commit: str | None
    """Commit of a model on the Hub."""


def find_reference(
    config: Config, model: str, rows: int | None, notify: Callable[[str], None], commit: str | None = None
) -> ReferenceFiles | None:
    """Find the reference model; None if the config names none.

    Args:
        config: the run's config.
        model: folder or Hub id of the model that training starts from, with new tokens.
        rows: number of tokens that it has embeddings for; None if it does not say.
        notify: receives a line for the user before something that takes long.
        commit: the commit on the Hub that the run began with.

    Raises:
        RequestError: there is no such model, or it has other tokens.
    """
    from raysft.models.adapter_files import adapter_base
    from raysft.models.architecture import read_hf_config
    from raysft.models.dequantized import with_exact_weights
    from raysft.models.quantization import check_method, method_of
    from raysft.models.remote_code import code_name, reference_runs_code
    from raysft.models.resolve import find_model
    from raysft.models.rope_scaling import with_rope_scaling

    path = config.train.reference_model
    if path is None:
        return None
    pinned = f"{hub_snapshots.split(path)[0]}@{commit}" if commit else path
    found = find_model(pinned, config.cache_directory, notify, KEY, accept_adapter=True)
    folder, named = model_copy(found), f"{KEY}={hub_snapshots.split(found)[0] if on_hub(found) else found}"
    check_weights(folder, named)
    commit = hub_snapshots.split(found)[1] if on_hub(found) else None
    found = with_exact_weights(config, found, notify, KEY, path)
    folder = model_copy(found)
    base = adapter_base(folder)
    trusted = path if base is None else code_name(config, folder)
    hf_config = read_hf_config(config, str(base or folder), trusted, notify, KEY)
    if method := method_of(hf_config):
        check_method(named, method, config)
    if (scaled := with_rope_scaling(config, found, hf_config, notify, KEY, path if base else "")) != found:
        found, folder = scaled, model_copy(scaled)
        hf_config = read_hf_config(config, str(folder), trusted, notify, KEY)
    _check_vocabulary(
        named,
        load_tokenizer(str(tokenizer_folder(folder)), reference_runs_code(config, folder)).get_vocab(),
        load_tokenizer(model, config.model.runs_code).get_vocab(),
    )
    theirs = embedding_rows(base or folder, hf_config, named)
    if rows is not None and theirs is not None and rows != theirs:
        raise RequestError(
            f"{named}: has embeddings for {theirs} tokens, but model.path={config.model.path} has them for {rows}; use a "
            "reference model with as many, or remove train.reference_model"
        )
    return ReferenceFiles(found, hf_config, commit)


def _check_vocabulary(named: str, theirs: dict[str, int], ours: dict[str, int]) -> None:
    """Refuse a reference whose tokens have other ids: the two predictions would be for different texts."""
    differing = theirs.items() ^ ours.items()
    if not differing:
        return
    token = min(differing, key=lambda entry: (entry[1], entry[0]))[0]
    there, here = (f"token {of[token]}" if token in of else "no token" for of in (theirs, ours))
    raise RequestError(
        f"{named}: has a different vocabulary ({token!r} is {there}, but in the trained model it is {here}); use a reference "
        "model with the same tokens, or remove train.reference_model"
    )
