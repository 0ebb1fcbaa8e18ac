"""Tokens that a config adds to a model: a copy of the model in the cache has them, with embeddings to start from."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from raysft.config import Config
from raysft.config.model import NewTokensSection
from raysft.errors import RequestError
from raysft.models.fingerprint import model_fingerprint, tokenizer_fingerprint
from raysft.models.loading import load_weights
from raysft.models.processor_files import save_tokenizer
from raysft.models.quantization import method_of
from raysft.models.tokenizer import load_tokenizer
from raysft.storage.local_cache import model_copy
from raysft.storage.model_cache import in_cache

ALIGNMENT = 64
"""Largest power of two that the rows of an embedding stay divisible by, for the tiles of GPUs."""


def with_new_tokens(config: Config, model: str, hf_config: Any, notify: Callable[[str], None]) -> str:
    """Return a copy of the model, in the cache, that has the tokens of ``model.new_tokens``; the model itself if it has them all.

    Args:
        config: the run's config.
        model: folder, URI or Hub id.
        hf_config: the model's own config.
        notify: receives a line for the user before something that takes long.

    Raises:
        RequestError: the model cannot get new tokens.
    """
    section, runs_code = config.model.new_tokens, config.model.runs_code
    if not section.tokens:
        return model
    tokenizer = load_tokenizer(model, runs_code)
    known, whole = tokenizer.get_vocab(), tokenizer.get_added_vocab()
    lacking = [token for token in section.tokens if token not in whole]
    if existing := [token for token in section.tokens if token in known]:
        notify(
            f"model: already has {' '.join(existing):.200} of model.new_tokens; their embeddings are kept and trained"
        )
    if not lacking:
        return model
    for token in lacking:
        # Byte-level vocabularies spell a byte as é, and others a blank as ▁: no text that is written so has that piece.
        if token in known and (text := tokenizer.decode([known[token]])) != token:
            raise RequestError(
                f"model.new_tokens names {token!r}, but in the tokenizer's vocabulary that stands for {text!r}; name "
                "the text itself, or remove it"
            )
    if method := method_of(hf_config):
        raise RequestError(
            f"model.new_tokens adds {lacking[0]!r}, but model.path={config.model.path} is quantized ({method}) and cannot be "
            "rewritten; use the model that it was quantized from, with model.quantization"
        )
    content = (model_fingerprint(model), tokenizer_fingerprint(model), section.model_dump_json())
    key = hashlib.sha256(repr(content).encode()).hexdigest()[:16]

    def write(folder: Path) -> None:
        notify(
            f"model: gets {len(lacking)} tokens ({' '.join(lacking):.200}), once, in {config.cache_directory / 'models'}"
        )
        add_tokens(model, folder, section, runs_code)

    return in_cache(config.cache_directory / "models" / f"extended-{key}", write, notify).location


def add_tokens(model: str, folder: Path, section: NewTokensSection, runs_code: bool = False) -> None:
    """Write a copy of a model that has new tokens; all other weights stay as they are.

    A new row of the embedding, and of an output head that is not the embedding, is the mean of the rows of the token's
    description, or of all tokens that the tokenizer had. Rows that only pad the matrix also get the mean of all.

    Args:
        model: folder, URI or Hub id.
        folder: where to write it.
        section: the tokens.
        runs_code: the model's own code may run.

    Raises:
        RequestError: the model's embeddings cannot grow.
    """
    import torch

    whole = load_weights(model_copy(model), dtype="auto", trust_remote_code=runs_code)
    tokenizer = load_tokenizer(model, runs_code)
    known = tokenizer.get_vocab()
    described = {
        token: tokenizer(text, add_special_tokens=False).input_ids for token, text in section.descriptions.items()
    }
    _extend(tokenizer, section)
    new = {token: tokenizer.convert_tokens_to_ids(token) for token in section.tokens if token not in known}
    _check_ids(new, known)
    former, last = whole.get_input_embeddings().weight.shape[0], max(new.values(), default=0)
    if last >= former:
        whole.resize_token_embeddings(rows_for(last + 1, former), mean_resizing=False)
    head, embedding = whole.get_output_embeddings(), whole.get_input_embeddings()
    if head is None:
        raise RequestError(
            f"model.new_tokens: {type(whole).__name__} has no output head that could be extended; remove them"
        )
    ids = torch.tensor(sorted(index for index in known.values() if index < former))
    matrices = {"embedding": embedding.weight}
    if head.weight is not embedding.weight:
        matrices["head"] = head.weight
    if getattr(head, "bias", None) is not None:
        matrices["bias"] = head.bias
    with torch.no_grad():
        for name, matrix in matrices.items():
            mean = matrix[ids].float().mean(0)
            matrix[former:] = mean
            for token, index in new.items():
                start = matrix[described[token]].float().mean(0) if token in described else mean
                matrix[index] = start if name == "bias" else start + section.noise * _noise(f"{token} {name}", start)
    whole.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)


def rows_for(tokens: int, former: int) -> int:
    """Return how many rows an embedding gets: the fewest that the power of two, up to 64, divides which divided the former rows.

    >>> rows_for(32003, former=32000), rows_for(50260, former=50257)
    (32064, 50260)
    """
    multiple = math.gcd(former, ALIGNMENT)
    return -(-tokens // multiple) * multiple


def _check_ids(new: Mapping[str, int], known: Mapping[str, int]) -> None:
    """Refuse new tokens that would share an id: the tokenizer counts up from the number of tokens, and may have skipped an id."""
    taken = {index: token for token, index in known.items()}
    for token, index in new.items():
        if index in taken:
            raise RequestError(
                f"model.new_tokens: {token!r} would be token {index}, but that is {taken[index]!r}, because the tokenizer has "
                f"{len(known)} tokens and skips ids; give the tokens ids without gaps in tokenizer.json"
            )


def _extend(tokenizer: Any, section: NewTokensSection) -> None:
    """Make each token one that is found in any text; pieces of words in the vocabulary keep their ids."""
    from transformers import AddedToken

    known = tokenizer.get_added_vocab()

    def added(tokens: Sequence[str], special: bool) -> list[Any]:
        # As it is written: a normalizer would change some tokens, which then occur in no text.
        return [AddedToken(token, special=special, normalized=False) for token in tokens if token not in known]

    tokenizer.add_tokens(added(section.plain, False))
    if special := added(section.special, True):
        tokenizer.add_special_tokens({"extra_special_tokens": special}, replace_extra_special_tokens=False)


def _noise(name: str, like: Any) -> Any:
    """Draw noise for a row, the same for the same name, with a standard deviation of 1 / √size."""
    import torch

    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") >> 1
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed)) / math.sqrt(max(1, like.numel()))


def vocabulary_modules(model: Any, config: Config) -> dict[str, Any]:
    """Embedding and output head by name, which new tokens need trained; nothing without new tokens."""
    if not config.model.new_tokens.tokens:
        return {}
    modules = (model.get_input_embeddings(), model.get_output_embeddings())
    return {name: module for name, module in model.named_modules() if any(module is one for one in modules)}
