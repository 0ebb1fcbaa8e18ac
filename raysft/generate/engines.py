"""Engines: what completes a batch of tokenized prompts. One small interface, one engine behind it so far."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.utils import logging as transformers_logging

from raysft.config import Config, RequestError, locate
from raysft.copies import local_copy
from raysft.matmul import use_onednn
from raysft.storage import Place


@dataclass(frozen=True)
class Completion:
    """What an engine wrote after one prompt."""

    text: str
    tokens: int
    """Tokens generated, the one that ended the turn included."""
    cut: int = 0
    """Tokens taken off the front of the prompt because the model has no more positions."""
    stop: str = "length"
    """Why it ended: ``eos`` at a token that ends a turn, ``length`` at the most tokens, ``time`` after
    ``generate.max_seconds``, ``error`` where it could not be made."""
    error: str = ""
    """What went wrong."""


class Engine(Protocol):
    """Completes prompts; made once in its process, then called batch by batch."""

    def complete(self, ids: Sequence[str], prompts: Sequence[Sequence[int]]) -> list[Completion]:
        """Complete a batch.

        Args:
            ids: names of the prompts; with the seed of the run they decide what is sampled.
            prompts: token ids of each.

        Returns:
            One completion for each prompt, in their order.
        """
        ...


class TransformersEngine:
    """Static batches through ``model.generate``, padded on the left.

    Greedy: in float32 the text is that of ``model.generate`` on the prompt alone, token for token.
    Sampling: each prompt draws from random numbers of its own, made from ``run.seed`` and its id, so a prediction does
    not depend on the other prompts, their order, the number of engines or a restart. What remains is rounding: the
    logits of a batch of another shape differ in their last digits, and a draw that falls just between two tokens (or a
    greedy tie in bfloat16) can turn on that.
    """

    def __init__(self, config: Config, model: str, threads: int | None = None) -> None:
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        if threads:
            torch.set_num_threads(threads)
        model = local_copy(model)
        self._settings = config.generate
        self._seed = config.run.seed
        self._device = torch.device("cuda" if config.scaling.use_gpu else "cpu")
        if self._device.type == "cpu":
            use_onednn()
        self._tokenizer = AutoTokenizer.from_pretrained(
            model, local_files_only=True, trust_remote_code=runs_code(config, Path(model))
        )
        self._model = _load_model(config, Path(model)).to(self._device).eval()
        self._stops = _stop_tokens(self._tokenizer, self._model, config.generate.stop_tokens)
        padding = self._tokenizer.pad_token_id
        self._padding = padding if padding is not None else (self._stops or [0])[0]
        positions = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        self._positions = positions if isinstance(positions, int) and positions > 1 else None

    @torch.inference_mode()
    def complete(self, ids: Sequence[str], prompts: Sequence[Sequence[int]]) -> list[Completion]:
        """Complete a batch, as the interface says."""
        if any(len(prompt) == 0 for prompt in prompts):
            prompts = [prompt if len(prompt) else [self._padding] for prompt in prompts]
        kept = [self._fit(prompt) for prompt in prompts]
        longest = max(len(prompt) for prompt in kept)
        pads = torch.tensor([longest - len(prompt) for prompt in kept])
        rows = torch.tensor([[self._padding] * (longest - len(prompt)) + list(prompt) for prompt in kept])
        mask = (torch.arange(longest)[None, :] >= pads[:, None]).long()
        limits = torch.tensor([self._limit(prompt) for prompt in kept])
        output = self._model.generate(
            input_ids=rows.to(self._device),
            attention_mask=mask.to(self._device),
            generation_config=self._generation(int(limits.max())),
            logits_processor=self._processors(ids, pads, longest),
            stopping_criteria=StoppingCriteriaList([_RowLimits(limits.to(self._device), longest)]),
        )
        written = output[:, longest:].tolist()
        return [
            self._completion(tokens[:limit], limit, cut=len(prompt) - len(short))
            for tokens, limit, prompt, short in zip(written, limits.tolist(), prompts, kept, strict=True)
        ]

    def _fit(self, prompt: Sequence[int]) -> Sequence[int]:
        """The prompt, or its tail where prompt and answer are more than the model has positions for."""
        if self._positions is None:
            return prompt
        # At most half of the positions are given to the answer at the cost of the prompt.
        room = self._positions - min(self._settings.max_new_tokens, self._positions // 2)
        return prompt[-room:] if len(prompt) > room else prompt

    def _limit(self, prompt: Sequence[int]) -> int:
        """Tokens that may follow a prompt."""
        if self._positions is None:
            return self._settings.max_new_tokens
        return min(self._settings.max_new_tokens, self._positions - len(prompt))

    def _by_beam(self, of_rows: torch.Tensor) -> torch.Tensor:
        """[rows] → [rows · beams], as a beam search holds them."""
        return of_rows.repeat_interleave(self._settings.num_beams).to(self._device)

    def _generation(self, new_tokens: int) -> GenerationConfig:
        # Always "greedy" for transformers: sampling is the last processor, which leaves one token to choose.
        return GenerationConfig(
            max_new_tokens=new_tokens,
            do_sample=False,
            num_beams=self._settings.num_beams,
            length_penalty=self._settings.length_penalty,
            max_time=self._settings.max_seconds,
            eos_token_id=self._stops or None,
            pad_token_id=self._padding,
            use_cache=True,
        )

    def _processors(self, ids: Sequence[str], pads: torch.Tensor, longest: int) -> LogitsProcessorList:
        processors = LogitsProcessorList()
        if self._settings.repetition_penalty != 1.0:
            # Padding is no token that was used; often it is the stop token, which a penalty would keep from coming.
            penalty = self._settings.repetition_penalty
            processors.append(RepetitionPenaltyLogitsProcessor(penalty, prompt_ignore_length=self._by_beam(pads)))
        if self._settings.do_sample:
            uniforms = torch.stack([uniform_numbers(self._seed, id, self._settings.max_new_tokens) for id in ids])
            processors.append(_RowSampling(self._settings, uniforms.to(self._device), longest))
        return processors

    def _completion(self, tokens: list[int], limit: int, cut: int) -> Completion:
        end = next((at for at, token in enumerate(tokens) if token in self._stops), None)
        text = str(self._tokenizer.decode(tokens[:end], skip_special_tokens=self._settings.skip_special_tokens))
        if end is not None:
            return Completion(text, tokens=end + 1, cut=cut, stop="eos")
        return Completion(text, tokens=len(tokens), cut=cut, stop="length" if len(tokens) >= limit else "time")


def create_engine(config: Config, model: str, threads: int | None = None) -> Engine:
    """The engine that ``generate.engine`` names, with the model loaded.

    Args:
        model: folder of a Hugging Face model, or of a peft adapter.
        threads: threads to compute with; default: torch's own choice.
    """
    engines = {"transformers": TransformersEngine}
    return engines[config.generate.engine](config, model, threads)


def adapter_base(model: Path) -> Path | None:
    """Folder of the model that an adapter sits on; None where the folder is a whole model.

    Raises:
        RequestError: the folder or the adapter's base is not there.
    """
    if not model.is_dir():
        raise RequestError(f"{model} is no model folder; give a folder with a config.json or an adapter_config.json")
    description = model / "adapter_config.json"
    if not description.exists():
        if not (model / "config.json").exists():
            raise RequestError(f"{model} holds neither config.json nor adapter_config.json; give a model's folder")
        return None
    base = _named_base(model)
    base = local_copy(base) if base else None
    if not base or not Path(base).is_dir():
        raise RequestError(
            f"{description}: base_model_name_or_path={base!r} is no folder here; put the base model there or correct it"
        )
    return Path(base)


def _named_base(adapter: Path) -> str | None:
    """The model that an adapter's description names."""
    named = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path")
    return str(named) if named else None


def choose_tokens(
    scores: torch.Tensor, uniforms: torch.Tensor, temperature: float, top_k: int, top_p: float
) -> torch.Tensor:
    """Sample a token for each row with a given random number, over what temperature, top-k and top-p leave.

    Args:
        scores: [rows, vocabulary] logits.
        uniforms: [rows] numbers in [0, 1).
        top_k: most probable tokens to keep; 0 keeps all.
        top_p: of these, the most probable that together have this probability; the first one always.

    Returns:
        [rows] token ids.

    >>> choose_tokens(torch.tensor([[0.0, 9.0, 8.9]]), torch.tensor([0.99]), temperature=1.0, top_k=2, top_p=1.0)
    tensor([2])
    """
    count = min(top_k, scores.shape[-1]) if top_k else scores.shape[-1]
    best, tokens = torch.topk(scores.float() / temperature, count, dim=-1)
    probability = torch.softmax(best.double(), dim=-1)
    before = probability.cumsum(-1) - probability
    probability = probability.masked_fill(before >= top_p, 0.0)
    # In the order of the vocabulary, so that two tokens whose logits are nearly one change places in no draw.
    tokens, order = tokens.sort(dim=-1)
    reached = probability.gather(-1, order).cumsum(-1)
    point = uniforms.double()[:, None] * reached[:, -1:]
    chosen = torch.searchsorted(reached, point, right=True).clamp(max=count - 1)
    return tokens.gather(-1, chosen)[:, 0]


def uniform_numbers(seed: int, id: str, count: int) -> torch.Tensor:
    """[count] numbers in [0, 1) that belong to a seed and a prompt, and to nothing else."""
    digest = hashlib.sha256(f"{seed}/{id}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.rand(count, generator=generator)


class _RowSampling(LogitsProcessor):
    """Leaves each row the one token that its random number of this step chooses."""

    def __init__(self, settings: Any, uniforms: torch.Tensor, prompt_length: int) -> None:
        self._settings, self._uniforms, self._prompt_length = settings, uniforms, prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        numbers = self._uniforms[:, input_ids.shape[1] - self._prompt_length]
        settings = self._settings
        tokens = choose_tokens(scores, numbers, settings.temperature, settings.top_k, settings.top_p)
        return torch.full_like(scores, float("-inf")).scatter_(1, tokens[:, None], 0.0)


class _RowLimits(StoppingCriteria):
    """Ends a row at its own number of new tokens."""

    def __init__(self, limits: torch.Tensor, prompt_length: int) -> None:
        self._limits, self._prompt_length = limits, prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:  # pyright: ignore
        # A beam search holds several beams of each row.
        limits = self._limits.repeat_interleave(input_ids.shape[0] // len(self._limits))
        return input_ids.shape[1] - self._prompt_length >= limits


def runs_code(config: Config, folder: Path) -> bool:
    """Whether code that comes with a model may run; with an adapter's base only where that is the model whose code was named, for
    ``adapter_config.json`` may name any folder."""
    if not config.model.runs_code or adapter_base(folder) is None:
        return config.model.runs_code
    base, named = Place.of(_named_base(folder) or ""), Place.of(locate(config.model.path, "model.path"))
    # With adapters merged it lies in the cache.
    return base == named or base.parent == config.cache_directory / "models"


def _load_model(config: Config, folder: Path) -> Any:
    base, dtype = adapter_base(folder), getattr(torch, config.dtype)
    model: Any = AutoModelForCausalLM.from_pretrained(
        base or folder, dtype=dtype, local_files_only=True, trust_remote_code=runs_code(config, folder)
    )
    if base is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(folder))
        # Merged, each layer is one product in place of three. In bfloat16 the sum would round small updates away, and
        # so the adapter stays beside the weights there.
        if dtype == torch.float32:
            model = model.merge_and_unload()
    # What the file says of sampling must not mix with the config's; its stop tokens are kept.
    inner = model.get_base_model() if base is not None and dtype != torch.float32 else model
    inner.generation_config = GenerationConfig(eos_token_id=inner.generation_config.eos_token_id)
    return model


def _stop_tokens(tokenizer: Any, model: Any, more: Sequence[str]) -> list[int]:
    """Tokens that end a turn: the tokenizer's, those of the model's generation config, and those that the config names."""
    stops = model.generation_config.eos_token_id
    stops = list(stops) if isinstance(stops, list | tuple) else [stops]
    stops += named_tokens(tokenizer, more)
    return sorted({int(stop) for stop in (tokenizer.eos_token_id, *stops) if stop is not None})


def named_tokens(tokenizer: Any, names: Sequence[str]) -> list[int]:
    """The numbers of tokens.

    Raises:
        RequestError: the tokenizer has no such token.
    """
    known = tokenizer.get_vocab()
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, [str(token) for token in tokenizer.all_special_tokens], n=1)
            remedy = f"did you mean {near[0]!r}?" if near else "name one as the tokenizer writes it"
            raise RequestError(f"generate.stop_tokens: the tokenizer has no token {name!r}; {remedy}")
    return [known[name] for name in names]
