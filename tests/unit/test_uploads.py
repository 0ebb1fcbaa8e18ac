"""What the loss knows before the rows are on the device, so that a GPU is asked for nothing on the way."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, modeling_flash_attention_utils

from raysft.config import parse
from raysft.data.types import IGNORE_INDEX
from raysft.models import sequence_attention
from raysft.models.attention import EXAMPLEWISE, WITH_SINKS, use_examplewise
from raysft.models.dynamic_rope import scale_each_example
from raysft.models.examples import Examples, Slice, begin
from raysft.models.sequence_attention import use_sequence
from raysft.models.transformers_internals import attention_implementation, known_examples
from raysft.train.loss import TokenLoss
from raysft.train.router_loss import RouterLoss
from raysft.train.step import microbatches
from raysft.train.step_rows import cut
from raysft.train.uploads import predicting, uploaded
from tests import tiny

ASKS = {"_local_scalar_dense", "nonzero", "bincount", "masked_select", "equal", "is_nonzero", "unique_dim", "_unique2"}
"""Operators whose result, or its size, depends on numbers that a GPU must have computed first."""
CPU = torch.device("cpu")
NEEDED = {"model": {"path": "m"}, "data": {"train": [{"name": "a", "path": "a"}]}}


class Questions(TorchDispatchMode):
    """Notes the operators for which the processor would wait for a GPU.

    Copies, for which it waits unless they come from pinned memory, are not seen on a CPU; ``tests/gpu/test_uploads.py`` sees them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().partition("::")[2].partition(".")[0]
        masks = name.startswith("index") and any(
            each.dtype == torch.bool for each in tree_leaves(args[1:]) if isinstance(each, torch.Tensor)
        )
        if name in ASKS or masks:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def rows() -> dict[str, np.ndarray]:
    """Two rows of several examples, with padding in the first and no loss in the first example of the second."""
    positions = np.array([[*range(5), *range(7), *range(4)], [*range(9), *range(7)]], np.int32)
    labels = np.arange(32, dtype=np.int32).reshape(2, 16) % 29 + 4
    labels[positions == 0] = labels[0, 12:] = labels[1, :9] = IGNORE_INDEX
    return {
        "row": np.arange(2),
        "tokens": np.array([12, 16]),
        "input_ids": np.arange(32, dtype=np.int32).reshape(2, 16) % 29 + 4,
        "labels": labels,
        "position_ids": positions,
        "weights": np.linspace(0.5, 1.5, 32, dtype=np.float32).reshape(2, 16),
        "sources": (positions > 3).astype(np.int32),
    }


def model(attention: str = "sdpa") -> Any:
    torch.manual_seed(3)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    made = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=2, initializer_range=0.3, **sizes)).eval()
    made.config.use_cache = False
    made.config._attn_implementation = attention
    return made


def recomputing() -> Any:
    made = model()
    made.gradient_checkpointing_enable({"use_reentrant": False})
    return made


def with_dynamic_positions() -> Any:
    """A model for whose own positions all examples of ``rows`` but one are too long."""
    config = model().config
    config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    config.max_position_embeddings = 4
    made = LlamaForCausalLM(config).eval()
    scale_each_example(made)
    return made


def with_sinks(folder: Path) -> Any:
    """gpt-oss: experts, and an attention of raysft's own."""
    made = AutoModelForCausalLM.from_pretrained(tiny.tiny_mixture(folder, "gpt_oss", **tiny.FAMILIES["gpt_oss"]))
    made.config.use_cache = False
    use_examplewise(made, parse(NEEDED))
    assert attention_implementation(made) == WITH_SINKS
    return made


def asked_for(loss: TokenLoss, inputs: dict[str, Any]) -> tuple[list[str], tuple[torch.Tensor, ...]]:
    with Questions() as questions:
        found = loss(**inputs, number_of_sources=2)
        found[0].backward()
    return questions.found, found


@pytest.mark.parametrize("noise", [None, 5.0])
def test_the_loss_asks_a_gpu_for_nothing(noise):
    (inputs,) = microbatches(rows(), 2, CPU)
    loss = TokenLoss(model(), neftune_alpha=noise)
    loss.train(noise is not None)
    asked, found = asked_for(loss, inputs)
    assert not asked
    if noise is None:
        found_out = loss(
            **{name: value for name, value in inputs.items() if name not in ("predicting", "examples")},
            number_of_sources=2,
        )
        for one, other in zip(found, found_out, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("shared", [False, True])
def test_neither_layers_that_are_recomputed_nor_noise_on_slices_ask_it(monkeypatch, shared):
    (inputs,) = microbatches(rows(), 2, CPU)
    plain = recomputing()
    if shared:
        use_sequence(plain, parse({**NEEDED, "scaling": {"sequence_parallel": 2, "num_workers": 2}}))
        monkeypatch.setattr(sequence_attention, "_exchanged", lambda parts, processes: parts)
        flat = {name: value.reshape(1, -1) for name, value in inputs.items() if getattr(value, "ndim", 0) == 2}
        inputs |= flat | {"examples": Examples.of_part(inputs["examples"].lengths, Slice(None, 1, 0, 32))}
    try:
        asked, _ = asked_for(TokenLoss(plain, neftune_alpha=5.0).train(), inputs)
    finally:
        begin(None)
    assert not asked


def test_dynamic_positions_ask_a_gpu_for_nothing():
    """Examples of 4 to 9 tokens, of which all but one are longer than the model's own positions."""
    (inputs,) = microbatches(rows(), 2, CPU)
    made = with_dynamic_positions()
    try:
        asked, found = asked_for(TokenLoss(made), inputs)
        assert not asked
        told = {name: value for name, value in inputs.items() if name != "examples"}
        found_out, (derived, *_) = asked_for(TokenLoss(made), told)
    finally:
        begin(None)
    assert "_unique2" in found_out
    assert torch.equal(found[0], derived)


@pytest.mark.parametrize("recomputed", [False, True])
def test_neither_attention_with_sinks_nor_the_loss_of_routers_asks_it(tmp_path, recomputed):
    (part,), (inputs,) = cut(rows(), 2), microbatches(rows(), 2, CPU)
    made = with_sinks(tmp_path)
    if recomputed:
        made.gradient_checkpointing_enable({"use_reentrant": False})
    loss, routers = TokenLoss(made).train(), RouterLoss(made, 0.01)

    def compute(told: dict[str, Any]) -> tuple[list[str], torch.Tensor, torch.Tensor]:
        made.zero_grad()
        with Questions() as questions:
            with routers:
                found = loss(**told, number_of_sources=2)[0]
            (found + routers(part)).backward()
        return questions.found, found, made.model.layers[0].self_attn.sinks.grad.clone()

    try:
        asked, *found = compute(inputs)
        assert not asked
        found_out, *derived = compute({name: value for name, value in inputs.items() if name != "examples"})
    finally:
        begin(None)
    assert found_out == ["nonzero"] * (4 if recomputed else 2), "in each layer"
    for one, other in zip(found, derived, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("sinks", [False, True])
def test_lengths_of_other_rows_are_never_taken(tmp_path, sinks):
    """Of as many examples and tokens, in the pass before."""
    made = with_sinks(tmp_path) if sinks else model()
    if not sinks:
        use_examplewise(made, parse(NEEDED))
        assert attention_implementation(made) == EXAMPLEWISE
    loss, ids = TokenLoss(made), torch.arange(16)[None] % 29 + 4
    before, after = (torch.tensor([[*range(n), *range(16 - n)]]) for n in (5, 9))
    with torch.no_grad():
        try:
            expected = made.base_model(input_ids=ids, position_ids=after).last_hidden_state
            told = Examples.of_rows(before.numpy())
            first = loss.hidden_states(made.base_model, ids, before, examples=told)
            found = made.base_model(input_ids=ids, position_ids=after).last_hidden_state
            again = made.base_model(input_ids=ids, position_ids=before.clone()).last_hidden_state
        finally:
            begin(None)
    assert torch.equal(found, expected)
    assert torch.equal(first, again)
    assert not torch.allclose(first, expected)


@pytest.mark.parametrize("version", [2, 3])
def test_flash_attention_is_told_where_examples_begin(monkeypatch, version):
    """Through transformers' own code, on kernels in place of those that need a GPU."""
    calls: list[tuple[list[int], int]] = []

    def varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None, causal=False, **_):
        bounds = cu_seqlens_q.tolist()
        assert cu_seqlens_k.tolist() == bounds
        assert causal
        assert max_seqlen_q == max_seqlen_k
        calls.append((bounds, int(max_seqlen_q)))
        outputs = []
        for first, end in pairwise(bounds):
            query, key, value = (each[first:end].transpose(0, 1) for each in (q, k, v))
            key, value = (each.repeat_interleave(query.shape[0] // each.shape[0], 0) for each in (key, value))
            scores = query @ key.transpose(1, 2) * softmax_scale
            hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
            outputs.append((scores.masked_fill(hidden, -torch.inf).softmax(-1) @ value).transpose(0, 1))
        return torch.cat(outputs)

    def whole(*_: Any, **__: Any) -> Any:
        raise AssertionError("rows of several examples are not one")

    kernels = (whole, varlen, None, None, None)
    monkeypatch.setattr(modeling_flash_attention_utils, "_lazy_imports", lambda *_, **__: kernels)
    monkeypatch.setattr(modeling_flash_attention_utils, "_loaded_implementation", None)
    (inputs,) = microbatches(rows(), 2, CPU)
    expected = asked_for(TokenLoss(model()), inputs)[1]
    with torch.no_grad():
        plain = TokenLoss(model(f"flash_attention_{version}"))
        found_out = plain(**{name: value for name, value in inputs.items() if name != "examples"}, number_of_sources=2)
    derived, calls[:] = list(calls), []
    flash = TokenLoss(model(f"flash_attention_{version}"))
    asked, found = asked_for(flash, inputs)
    assert not asked
    assert calls == [([0, 5, 12, 16, 25, 32], 9)] * 2 == derived, (
        "as transformers derives it from positions, in each layer"
    )
    for one, other, derived_one in zip(found, expected, found_out, strict=True):
        torch.testing.assert_close(one, other)
        torch.testing.assert_close(one, derived_one)
    sharing, calls[:] = model(f"flash_attention_{version}"), []
    use_sequence(sharing, parse({**NEEDED, "scaling": {"use_gpu": True, "sequence_parallel": 2, "num_workers": 2}}))
    with torch.no_grad():
        exchanging = TokenLoss(sharing)(
            **{name: value for name, value in inputs.items() if name != "examples"}, number_of_sources=2
        )
    assert calls == derived, "as the workers that share rows call it"
    for one, other in zip(exchanging, expected, strict=True):
        torch.testing.assert_close(one, other)
    monkeypatch.setattr(sequence_attention, "_exchanged", lambda parts, processes: parts)
    lengths, calls[:] = (5, 7, 4, 9, 7), []
    sliced = {name: value.reshape(1, -1) for name, value in inputs.items() if getattr(value, "ndim", 0) == 2}
    sliced["examples"] = Examples.of_part(lengths, Slice(None, 1, 0, 32))
    try:
        asked, found = asked_for(TokenLoss(sharing), sliced | {"predicting": inputs["predicting"]})
    finally:
        begin(None)
    assert not asked
    assert calls == derived
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    "positions",
    [
        [[*range(8)], [*range(8)]],
        [[0, 1, 2, 0, 1, 2, 3, 4], [*range(8)]],
        [[0, 0, 0, 1, 2, 0, 0, 0], [0, 1, 2, 3, 4, 5, 6, 0]],
    ],
)
def test_transformers_is_told_what_it_would_find_out(positions):
    from transformers import masking_utils

    places, before = np.array(positions), masking_utils.find_packed_sequence_indices
    expected = before(torch.as_tensor(places))
    with known_examples(Examples.of_rows(places).several):
        found = masking_utils.find_packed_sequence_indices(torch.as_tensor(places))
    assert masking_utils.find_packed_sequence_indices is before
    assert found is expected is None or torch.equal(found, expected)


def test_rows_without_a_loss_predict_the_first_token():
    assert predicting(np.full((2, 8), IGNORE_INDEX)).tolist() == [0]
    assert predicting(np.array([[2, IGNORE_INDEX, 3, IGNORE_INDEX]])).tolist() == [0, 2]


def test_a_row_begins_an_example_whatever_its_positions_are():
    assert Examples.of_rows(np.array([[3, 4, 5], [0, 1, 2]])).bounds.tolist() == [0, 3, 6]


def test_inputs_without_tensors_stay():
    numbers = torch.arange(3)
    found = uploaded({"a": {"b": numbers, "longest": 7}}, CPU)
    assert found["a"]["longest"] == 7
    assert torch.equal(found["a"]["b"], numbers)
