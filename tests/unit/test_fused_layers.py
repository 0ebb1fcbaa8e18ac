"""Fused layers against finite differences, and against the layers of transformers and peft that they replace."""

import copy

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    LlamaConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

from raysft.models import fused_layers
from raysft.models.fused_functions import LoraLinear, RmsNorm, Rotary, SwiGlu
from raysft.models.fused_layers import fuse_layers

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def checked(function, *inputs) -> None:
    """Compare a function's gradients with finite differences."""
    torch.manual_seed(1)
    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("bias", [False, True])
def test_gradients_of_lora(bias):
    weight, offset = numbers(5, 7).detach(), numbers(5).detach() if bias else None
    x, a, b = numbers(2, 3, 7), numbers(2, 7), numbers(5, 2)
    torch.testing.assert_close(
        LoraLinear.apply(x, weight, offset, a, b, 0.7),
        F.linear(x, weight + 0.7 * b @ a, offset),
        rtol=1e-12,
        atol=1e-12,
    )
    checked(lambda *trained: LoraLinear.apply(trained[0], weight, offset, *trained[1:], 0.7), x, a, b)
    checked(lambda *trained: LoraLinear.apply(x.detach(), weight, offset, *trained, 0.7), a, b)


def test_gradients_of_rms_norm():
    x, weight = numbers(2, 3, 6), numbers(6)
    checked(lambda *both: RmsNorm.apply(*both, 1e-3), x, weight)
    checked(lambda x: RmsNorm.apply(x, weight.detach(), 1e-3), x)
    checked(lambda weight: RmsNorm.apply(x.detach(), weight, 1e-3), weight)


def test_gradients_of_the_rotary_embedding():
    angles = torch.randn(2, 1, 3, 4, dtype=torch.float64)
    cos, sin = torch.cat([angles.cos()] * 2, -1), torch.cat([angles.sin()] * 2, -1)
    x = numbers(2, 3, 2, 8)
    checked(lambda x: Rotary.apply(x.transpose(1, 2), cos, sin), x)
    # A pair of elements is a complex number, which the angle turns.
    pairs = torch.complex(*x.transpose(1, 2).chunk(2, -1)) * torch.polar(torch.ones_like(angles), angles)
    turned = torch.cat([pairs.real, pairs.imag], -1)
    torch.testing.assert_close(Rotary.apply(x.transpose(1, 2), cos, sin), turned, rtol=1e-12, atol=1e-12)


def test_gradients_of_swiglu():
    checked(SwiGlu.apply, numbers(2, 5), numbers(2, 5))
    checked(lambda each: SwiGlu.apply(each, each), numbers(2, 5))


def built(kind, lora=None, **more):
    """A model with random weights, and with LoRA that has been trained a little."""
    torch.manual_seed(2)
    model = AutoModelForCausalLM.from_config(kind(**SIZES, **more), dtype=torch.float32)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.add_(torch.randn_like(weight) / 4)
    if lora is None:
        return model.train()
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", **lora))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1)
    return model.train()


def computed(model) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    torch.manual_seed(3)
    ids = torch.randint(1, 64, (2, 24))
    positions = torch.cat([torch.arange(14), torch.arange(10)]).expand(2, -1)
    loss = model(input_ids=ids, position_ids=positions, labels=ids, use_cache=False).loss
    loss.backward()
    return loss.detach(), {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def functions(model) -> set[str]:
    """The fused functions in the graph of a model's loss."""
    seen, waiting = set(), [model(input_ids=torch.ones(1, 5, dtype=torch.long), use_cache=False).logits.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting.extend(parent for parent, _ in node.next_functions)
    names = {type(node).__name__.removesuffix("Backward") for node in seen}
    return names & {"LoraLinear", "RmsNorm", "Rotary", "SwiGlu"}


@pytest.fixture(autouse=True)
def _original_functions(monkeypatch):
    """Give the modules of transformers their functions back."""
    from transformers.models.cohere import modeling_cohere
    from transformers.models.gemma2 import modeling_gemma2
    from transformers.models.llama import modeling_llama
    from transformers.models.phi3 import modeling_phi3
    from transformers.models.qwen2 import modeling_qwen2
    from transformers.models.qwen3 import modeling_qwen3

    for module in (modeling_cohere, modeling_gemma2, modeling_llama, modeling_phi3, modeling_qwen2, modeling_qwen3):
        function = module.apply_rotary_pos_emb
        monkeypatch.setattr(module, fused_layers.ROTARY, getattr(function, "__wrapped__", function))


ALL = {"RmsNorm", "Rotary", "SwiGlu"}


@pytest.mark.parametrize(
    ("kind", "more", "fused"),
    [
        (LlamaConfig, {}, ALL),
        (LlamaConfig, {"attention_bias": True, "mlp_bias": True}, ALL),
        (LlamaConfig, {"hidden_act": "gelu"}, ALL - {"SwiGlu"}),
        (Qwen2Config, {}, ALL),
        (Qwen3Config, {"head_dim": 12}, ALL),
        (
            Phi3Config,
            {"partial_rotary_factor": 0.5},
            {"RmsNorm"},
        ),  # one product for both halves, half of a head rotated
        (Gemma2Config, {"head_dim": 8}, {"Rotary"}),  # multiplies by 1 + weight, and has GELU
        (CohereConfig, {}, {"SwiGlu"}),  # rotates neighbors
    ],
)
@pytest.mark.parametrize("lora", [None, {}])
def test_a_model_computes_the_same(kind, more, fused, lora):
    plain = built(kind, lora, **more)
    model = copy.deepcopy(plain)
    loss, gradients = computed(plain)
    fuse_layers(model)
    assert functions(model) == (fused if lora is None else fused | {"LoraLinear"})
    fused_loss, fused_gradients = computed(model)
    torch.testing.assert_close(fused_loss, loss, rtol=1e-5, atol=0)
    assert fused_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            fused_gradients[name], gradient, rtol=1e-5, atol=1e-5 * float(gradient.abs().max()), msg=name
        )


def test_without_gradients_nothing_changes():
    plain = built(LlamaConfig, {})
    model = copy.deepcopy(plain)
    fuse_layers(model)
    ids = torch.arange(1, 25)[None]
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)
    assert model.state_dict().keys() == plain.state_dict().keys()
    merged = model.merge_and_unload()
    with torch.no_grad():
        assert torch.equal(merged(input_ids=ids).logits, plain.merge_and_unload()(input_ids=ids).logits)


@pytest.mark.parametrize("lora", [{"lora_dropout": 0.1}, {"use_dora": True}, {"lora_bias": True}])
def test_other_forms_of_lora_stay_as_they_are(lora):
    model = built(LlamaConfig, lora, attention_bias=True, mlp_bias=True)
    state = torch.get_rng_state()
    fuse_layers(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert functions(model) == ALL


def test_a_disabled_adapter_computes_nothing():
    model = built(LlamaConfig, {})
    fuse_layers(model)
    model.enable_input_require_grads()
    with model.disable_adapter():
        assert functions(model) == ALL


def test_recomputed_activations_give_the_same_gradients():
    plain = built(LlamaConfig, {})
    model = copy.deepcopy(plain)
    fuse_layers(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    loss, gradients = computed(plain)
    fused_loss, fused_gradients = computed(model)
    torch.testing.assert_close(fused_loss, loss, rtol=1e-5, atol=0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            fused_gradients[name], gradient, rtol=1e-5, atol=1e-5 * float(gradient.abs().max()), msg=name
        )


def test_16_bit_models_and_autocast_compute_as_before():
    model = built(LlamaConfig, {}).to(torch.bfloat16)
    fuse_layers(model)
    assert functions(model) == set()
    model = built(LlamaConfig, {})
    fuse_layers(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert functions(model) == set()
