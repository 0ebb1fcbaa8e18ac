"""Traces of activations against real forward and backward passes, and over many architectures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.models.llama import modeling_llama

from raysft.config import Config, with_overrides
from raysft.estimate import fake_attention
from raysft.estimate.fake_model import model_without_weights, sizes_of
from raysft.estimate.images_of_rows import ImagesOfRows
from raysft.estimate.measure import Microbatch, measure, surely_small
from raysft.estimate.memory import ADAPTER_WIDTH, EXPERT_WIDTH, Hardware, memory
from raysft.estimate.sizes import Activations
from raysft.estimate.states import Setup
from raysft.estimate.trace import forget_gradient, trace
from raysft.estimate.traced_experts import kernel_bytes
from raysft.models.fused_layers import ROTARY, fuse_layers
from raysft.models.media_inputs import media_inputs
from raysft.models.model_parts import part_of
from raysft.models.processor import ProcessorFiles
from raysft.models.torch_internals import LiveBytes
from raysft.train.finetuning import load_model
from raysft.train.loss import TokenLoss
from raysft.train.towers import features_of
from tests.measured_memory import config_of, model_of, most_allocated
from tests.tiny import FAMILIES as EXPERTS
from tests.tiny import tiny_mixture, tiny_model
from tests.tiny_vision import FAMILIES, TILED, tiny_vision_model

SIZES = {
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
CHECKPOINTED = {"train.gradient_checkpointing": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trace")
    tiny_model(folder / "model")
    return folder


@pytest.fixture(scope="module")
def vision(tmp_path_factory) -> dict[str, Path]:
    return {
        family: tiny_vision_model(tmp_path_factory.mktemp(family) / "model", family) for family in (*FAMILIES, *TILED)
    }


def needed(activations: Activations, rows: int) -> float:
    """Most bytes of a forward and backward pass whose gradients are dropped at once."""
    saved, loss = activations.saved(rows), activations.loss_at(rows)
    return max(saved + loss.peak, saved + loss.left + activations.backward(rows), activations.tail.at(rows))


def really_needed(config: Config, rows: int) -> int:
    """The same, in torch's allocator."""
    model = TokenLoss(load_model(config, config.model.path, torch.device("cpu")))
    fuse_layers(model.model)
    model.train()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
    tokens = config.data.sequence_length
    ids = torch.arange(rows * tokens).reshape(rows, tokens) % 300
    positions = torch.arange(tokens).repeat(rows, 1)

    def step() -> None:
        model(ids, positions, ids)[0].backward()

    step()  # makes what models keep from one step to the next
    return most_allocated(step)


@pytest.mark.parametrize("recompute", [{}, CHECKPOINTED], ids=["stored", "recomputed"])
@pytest.mark.parametrize(
    ("settings", "rows", "tokens"),
    [
        ({}, 1, 96),
        ({}, 4, 96),
        ({}, 4, 400),  # two chunks of logits
        ({"model.finetuning": "lora"}, 4, 96),
        ({"model.finetuning": "lora"}, 4, 400),
        ({"model.finetuning": "lora", "model.lora.target": ["q_proj"], "model.lora.dropout": 0.1}, 2, 96),
        ({"model.finetuning": "freeze", "model.freeze.layers": 1}, 2, 96),
        ({"model.attention": "eager"}, 2, 96),
    ],
)
def test_a_trace_needs_what_a_real_pass_needs(folder, settings, rows, tokens, recompute):
    sizes = {"data.sequence_length": tokens, "train.micro_batch_size": rows}
    config = config_of(folder, folder / "model", {**settings, **recompute, **sizes})
    _, activations = model_of(config)
    assert activations.traced
    assert needed(activations, rows) == pytest.approx(really_needed(config, rows), rel=0.05)


@pytest.mark.parametrize("family", ["llava", "idefics3", "qwen3-vl"])
def test_models_for_images_are_traced(folder, tmp_path, family):
    """Features of images pass on a gradient through the whole language model, also where it is frozen."""
    model = tiny_vision_model(tmp_path / "model", family)
    settings = {"data.sequence_length": 96, "train.micro_batch_size": 2, "model.finetuning": "full"}
    config = config_of(folder, model, settings)
    _, text = model_of(config)
    assert text.traced
    assert needed(text, 2) == pytest.approx(really_needed(config, 2), rel=0.1)
    sizes, frozen = model_of(with_overrides(config, {"model.train_parts": ["projector"]}))
    assert frozen.traced
    assert frozen.saved(2) > 0.5 * text.saved(2)
    whole: Any = AutoModelForImageTextToText.from_pretrained(model)
    part = part_of(whole)
    assert sizes.total == sum(weight.numel() for weight in whole.parameters())
    of_projector = [weight.numel() for name, weight in whole.named_parameters() if part(name) == "projector"]
    assert sum(weight.elements for weight in sizes.trained) == sum(of_projector)


PARTS = ["language"], ["projector"], ["projector", "vision"]
PLACES = [
    *((family, parts, {}) for family in FAMILIES for parts in PARTS),
    *((family, PARTS[-1], {}) for family in TILED),
    # The convolution of CLIP's patches has buffers that are larger than a tiny layer.
    *((family, parts, CHECKPOINTED) for family in ("idefics3", "qwen2.5-vl") for parts in PARTS),
]


@pytest.mark.parametrize(("family", "parts", "recompute"), PLACES)
def test_images_need_what_a_real_pass_needs(folder, vision, family, parts, recompute):
    """In the forward pass, and in the backward pass if something that encodes them is trained."""
    config = config_of(folder, vision[family], {"model.train_parts": parts, **recompute})
    images = ImagesOfRows(ProcessorFiles.of(vision[family]), width=120, height=90, per_row=12.5)
    hf_config = AutoConfig.from_pretrained(vision[family])
    _, activations = measure(config, hf_config, None, Microbatch(96, 1.0, images))
    assert activations.traced
    found = activations.images_at(2)
    model = load_model(config, str(vision[family]), torch.device("cpu")).train()
    inputs = media_inputs(images.processor.load(), [[Image.new("RGB", (120, 90))]] * 25)
    assert found.pixels == sum(values.nbytes for values in inputs.values())
    for weight in model.parameters():
        if weight.requires_grad:
            weight.register_post_accumulate_grad_hook(forget_gradient)

    def encode() -> None:
        features = [each for each in features_of(model.base_model, inputs) if each.requires_grad]
        torch.autograd.backward(features, [torch.ones_like(each) for each in features])

    encode()
    assert max(found.forward, found.backward) == pytest.approx(most_allocated(encode), rel=0.1)
    assert (found.saved > 0) == (found.backward > 0) == (parts != ["language"])


@pytest.mark.parametrize(
    "model_type",
    ["qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt2", "gpt_neox", "opt", "falcon", "granite", "olmo2"],
)
def test_other_architectures_are_traced(folder, model_type):
    config = config_of(folder, folder / "model", {"model.finetuning": "lora"})
    model = model_without_weights(config, AutoConfig.for_model(model_type, **SIZES))
    expected = sum(weight.numel() for weight in model.parameters())
    sizes = sizes_of(model)
    assert sizes.total == expected
    found = trace(config, model, tokens=96, loss_share=0.5)
    assert sum(layers.count for layers in found.layers) == model.get_base_model().config.num_hidden_layers
    assert found.saved(2) > found.saved(1) > 96 * SIZES["hidden_size"] * 4


@pytest.mark.parametrize("family", EXPERTS)
def test_mixtures_of_experts_need_what_a_real_pass_needs(folder, tmp_path, family):
    """Whichever experts are chosen."""
    model = tiny_mixture(tmp_path / "model", family, **EXPERTS[family])
    changes = CHECKPOINTED if family == "deepseek_v3" else {}
    lora = {"model.finetuning": "lora", "model.lora.target": ["o_proj", "experts"]} if family == "qwen2_moe" else {}
    config = config_of(folder, model, {"data.sequence_length": 96, "train.micro_batch_size": 2, **changes, **lora})
    sizes, activations = model_of(config)
    assert activations.traced
    whole = load_model(config, str(model))
    assert sizes.total == sum(weight.numel() for weight in whole.parameters()), "all experts, not those of a token"
    assert needed(activations, 2) == pytest.approx(really_needed(config, 2), rel=0.1)


def test_the_loss_of_routers_keeps_probabilities_and_choices_of_all_layers(folder, tmp_path):
    model = tiny_mixture(tmp_path / "model", "qwen3_moe", **EXPERTS["qwen3_moe"])
    text = AutoConfig.from_pretrained(model)
    config = config_of(folder, model, CHECKPOINTED)
    plain, kept = (
        model_of(with_overrides(config, {"train.router_aux_loss_coef": coefficient}))[1].saved(2)
        for coefficient in (None, 0.01)
    )
    of_token = 4 * text.num_experts + 8 * text.num_experts_per_tok
    layers = text.num_hidden_layers - len(text.mlp_only_layers)
    assert kept - plain == layers * 2 * 96 * of_token


def test_a_model_that_cannot_be_traced_gets_a_formula(folder, monkeypatch):
    config = config_of(folder, folder / "model")

    def fail(*_: object) -> None:
        raise ValueError("which experts compute is decided by values")

    monkeypatch.setattr("raysft.estimate.trace.fake_experts", fail)
    mixture = AutoConfig.for_model("mixtral", **SIZES, num_experts_per_tok=2)
    sizes, found = measure(config, mixture, None, Microbatch(96, 1.0))
    assert not found.traced
    assert sizes.total > 4 * 8 * 3 * 64 * 128, "four layers of eight experts"
    assert found.saved(1) > 4 * 96 * 64 * 4


@pytest.mark.parametrize(
    "settings",
    [{}, {"train.zero_stage": 3}, {"model.finetuning": "lora", "train.loss": "asft"}],
)
def test_few_chunks_of_logits_need_what_many_need(folder, monkeypatch, settings):
    """A call of each takes time: 64 rows of 131,072 tokens would be 8,192 of them."""
    config = config_of(folder, folder / "model", {"data.sequence_length": 9_900, **settings})
    hf_config = AutoConfig.from_pretrained(config.model.path)
    monkeypatch.setattr("raysft.estimate.trace.LOSS_ROWS", (1, 2))

    def traced() -> list[float]:
        found = trace(config, model_without_weights(config, hf_config), 9_900, 1.0).loss
        return [number for rows in (1, 2) for number in (found[rows].peak, found[rows].left)]

    few = traced()
    monkeypatch.setattr("raysft.estimate.trace.LAST", 1_000)
    assert few == pytest.approx(traced(), rel=1e-4)  # but for a few numbers of each chunk


def test_a_second_estimate_is_read_from_the_cache(folder, monkeypatch):
    config = config_of(folder, folder / "model", {"data.sequence_length": 88})
    first = model_of(config)
    monkeypatch.setattr("raysft.estimate.trace.trace", None)
    assert model_of(config) == first


def test_a_trace_leaves_transformers_as_it_was(folder):
    before = getattr(modeling_llama, ROTARY)
    config = config_of(folder, folder / "model")
    trace(config, model_without_weights(config, AutoConfig.from_pretrained(config.model.path)), 96, 1.0)
    assert getattr(modeling_llama, ROTARY) is before


@pytest.mark.parametrize(
    ("masked", "saved"), [(False, 4 * 8 + 2 * 2 * 8 + 4 * 8), (True, 4 * 8 + 2 * 4 * 8 + 4 * 8 + 5)]
)
def test_attention_keeps_its_inputs_its_output_and_a_number_for_each_head(masked, saved):
    # 5 tokens, 4 heads and 2 of keys, of size 8, in 16 bits.
    query, key, value = (torch.zeros(1, heads, 5, 8, dtype=torch.bfloat16, requires_grad=True) for heads in (4, 2, 2))
    live, attention = LiveBytes(), fake_attention.fake_attention(masked, copies=False, drops=False)
    with live:
        inputs = [each + 0 for each in (query, key, value)]
        out, _ = attention(torch.nn.Identity(), *inputs, None)
        del inputs
    assert out.shape == (1, 5, 4, 8)
    assert live.now == 5 * (2 * saved + 4 * 4)


@pytest.mark.parametrize(
    ("settings", "eager", "small"), [({}, False, True), ({"attention_dropout": 0.1}, False, False), ({}, True, False)]
)
def test_matrices_of_attention_are_not_small(folder, settings, eager, small):
    """32,768 tokens and 4 heads: 16 GiB for one matrix of one layer."""
    hf_config = AutoConfig.from_pretrained(folder / "model", **settings)
    assert surely_small(hf_config, 10**6, 32768, 1, 24 * 2**30, eager) == small


@pytest.mark.parametrize("use_gpu", [False, True])
def test_experts_in_the_kernel_need_the_memory_of_the_node_and_none_of_the_gpu(tmp_path, use_gpu):
    tiny_mixture(tmp_path / "m", hidden_size=64, num_experts=8, moe_intermediate_size=64)
    hf_config = AutoConfig.from_pretrained(tmp_path / "m")
    experts = 2 * 8 * 3 * 64 * 64
    found = {}
    for name in ("auto", "kt"):
        settings = {
            "model.finetuning": "lora",
            "model.dtype": "bfloat16",
            "scaling.use_gpu": use_gpu,
            "model.experts": name,
        }
        config = config_of(tmp_path, tmp_path / "m", settings)
        sizes, activations = measure(config, hf_config, None, Microbatch(32, 1.0))
        found[name] = sizes, activations, memory(sizes, activations, Setup(width=2), 1, Hardware(gpu=use_gpu))
    (plain, _, before), (sizes, activations, after) = found["auto"], found["kt"]
    assert (plain.total - sizes.total, sizes.experts, sizes.experts_of_layer) == (experts, experts, experts // 2)
    assert sizes.trained_elements == plain.trained_elements
    assert activations.traced
    assert sizes.adapters_in_kernel == 2 * 8 * 3 * 16 * (64 + 64), "gates and ups, which are one, have twice the rank"
    kernel, in_passes = 2 * (experts + experts // 2) + 7.5 * sizes.adapters_in_kernel, 32 * sizes.bytes_in_kernel
    weights = before.parts["weights"] - after.parts["weights"]
    expected = (2 * experts, kernel + in_passes) if use_gpu else (2 * experts - kernel, 0)
    assert (weights, after.host - before.host) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("experts", "hidden", "inner", "rank", "grown"),
    [(32, 1024, 768, 8, 156), (32, 1024, 768, 64, 213), (32, 1024, 768, 128, 280), (32, 512, 1536, 64, 256)],
)
def test_adapters_in_the_kernel_need_what_was_measured(experts, hidden, inner, rank, grown):
    """MiB by which a process grew with another layer of kt-kernel 0.7.2 that computed 64 tokens."""
    weights, adapters = 3 * experts * hidden * inner, 3 * experts * rank * (hidden + inner)
    assert (EXPERT_WIDTH * weights + ADAPTER_WIDTH * adapters) / (1 << 20) == pytest.approx(grown, rel=0.1)


@pytest.mark.parametrize(
    ("hidden", "inner", "count", "buffers", "kept"),
    [
        (1024, 768, 8 * 4096, 721 + 700, 229),
        (1024, 768, 8 * 2048, 367 + 433, 116),
        (512, 1536, 4 * 4096, 432 + 396, 167),
        (512, 256, 8 * 4096, 290 + 286, 88),
    ],
)
def test_the_kernel_needs_what_was_measured(hidden, inner, count, buffers, kept):
    """MiB by which a process grew in its first forward and backward pass with kt-kernel 0.7.2, and in the forward pass of another
    layer, with a number of tokens times experts of each."""
    found = [value * count / (1 << 20) for value in kernel_bytes(hidden, inner)]
    assert found == pytest.approx([buffers, kept], rel=0.15)
