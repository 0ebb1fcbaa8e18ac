"""Fused layers against finite differences, and against the layers of transformers and peft that they replace."""

import copy
from functools import wraps
from types import SimpleNamespace

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
    SeedOssConfig,
)
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4MLP
from transformers.models.glm5_next.modeling_glm5_next import Glm5NextTextMLP
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.step3p7.modeling_step3p7 import Step3p7MLP

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


def test_no_rows_get_a_result_and_no_gradient():
    """As those of an expert that no token chose."""
    x, weight, norm = torch.empty(0, 7, requires_grad=True), torch.randn(5, 7), torch.ones(7, requires_grad=True)
    a, b = torch.randn(2, 7, requires_grad=True), torch.randn(5, 2, requires_grad=True)
    y = LoraLinear.apply(RmsNorm.apply(x, norm, 1e-3), weight, None, a, b, 0.7)
    y = SwiGlu.apply(y, y)
    assert y.shape == (0, 5)
    y.sum().backward()
    assert x.grad.shape == (0, 7)
    for trained in (a, b, norm):
        assert torch.equal(trained.grad, torch.zeros_like(trained))


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
    from transformers.models.seed_oss import modeling_seed_oss

    llamas = (modeling_llama, modeling_qwen2, modeling_qwen3, modeling_seed_oss)
    for module in (modeling_cohere, modeling_gemma2, modeling_phi3, *llamas):
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
        (SeedOssConfig, {"residual_dropout": 0.5}, ALL - {"SwiGlu"}),  # drops out after its SwiGLU
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


@pytest.mark.parametrize(
    ("kind", "bias", "more"),
    [(Qwen2Config, "all", {}), (Qwen2Config, "lora_only", {}), (LlamaConfig, "all", {"mlp_bias": True})],
)
def test_a_trained_bias_gets_its_gradient(kind, bias, more):
    plain = built(kind, {"bias": bias}, **more)
    model = copy.deepcopy(plain)
    _, gradients = computed(plain)
    fuse_layers(model)
    assert "LoraLinear" in functions(model)  # of the layers without a bias
    _, fused_gradients = computed(model)
    biases = {name for name in gradients if name.endswith("bias")}
    assert biases
    assert fused_gradients.keys() == gradients.keys()
    for name in biases:
        torch.testing.assert_close(
            fused_gradients[name], gradients[name], rtol=1e-5, atol=1e-5 * float(gradients[name].abs().max()), msg=name
        )


def test_a_bias_that_is_trained_later_gets_its_gradient():
    model = built(Qwen2Config, {})
    fuse_layers(model)
    layer = model.base_model.model.model.layers[1].self_attn.q_proj
    layer.base_layer.bias.requires_grad_(True)
    x = torch.randn(2, 3, 32)
    layer(x).sum().backward()
    torch.testing.assert_close(layer.base_layer.bias.grad, torch.full((32,), 6.0))  # once for each row


SETTINGS = SimpleNamespace(
    hidden_size=8,
    intermediate_size=12,
    mlp_bias=False,
    hidden_act="silu",
    swiglu_limit=2.0,
    swiglu_limits_shared=[0.0, 2.0],
    share_expert_dim=12,
)


def is_fused(module) -> bool:
    fuse_layers(torch.nn.ModuleList([module]))
    return "forward" in vars(module)


@pytest.mark.parametrize(
    ("make", "after"),
    [
        (lambda: DeepseekV4MLP(SETTINGS), False),
        (lambda: Glm5NextTextMLP(SETTINGS), False),
        (lambda: Step3p7MLP(SETTINGS, 0), None),
        (lambda: Step3p7MLP(SETTINGS, 1), True),
    ],
)
def test_a_swiglu_with_limits_keeps_them(make, after):
    mlp = make()
    assert not is_fused(mlp)
    x = 100 * torch.randn(4, 8, requires_grad=True)
    gate, up = mlp.gate_proj(x), mlp.up_proj(x)
    if after is not None:
        up = up.clamp(-2, 2)
        gate = F.silu(gate).clamp(max=2) if after else F.silu(gate.clamp(max=2))
    else:
        gate = F.silu(gate)
    torch.testing.assert_close(mlp(x), mlp.down_proj(gate * up))


class Doubled(LlamaMLP):
    def forward(self, x):
        return 2 * super().forward(x)


class Wrapped(LlamaMLP):
    pass


@wraps(LlamaMLP.forward)
def _tripled(self, x):
    return 3 * LlamaMLP.forward(self, x)


Wrapped.forward = _tripled


class Unsourced(LlamaMLP):
    exec("def forward(self, x):\n    return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))")


def with_hook(module, part="", register="register_forward_hook"):
    getattr(module.get_submodule(part), register)(lambda *_: None)
    return module


def with_forward(module, part=""):
    part = module.get_submodule(part)
    part.forward = forward = lambda x: x
    part.kept = forward
    return module


def with_layer(module, name, layer):
    setattr(module, name, layer)
    return module


class OwnLinear(torch.nn.Linear):
    pass


@pytest.mark.parametrize(
    "make",
    [
        lambda: Doubled(SETTINGS),
        lambda: Wrapped(SETTINGS),
        lambda: Unsourced(SETTINGS),
        lambda: with_hook(LlamaMLP(SETTINGS)),
        lambda: with_hook(LlamaMLP(SETTINGS), "act_fn"),
        lambda: with_hook(LlamaMLP(SETTINGS), register="register_forward_pre_hook"),
        lambda: with_hook(LlamaMLP(SETTINGS), register="register_full_backward_hook"),
        lambda: with_hook(LlamaRMSNorm(8)),
        lambda: with_forward(LlamaMLP(SETTINGS), "act_fn"),
        lambda: with_layer(LlamaMLP(SETTINGS), "act_fn", torch.nn.GELU()),
        lambda: with_layer(LlamaMLP(SETTINGS), "up_proj", OwnLinear(8, 12)),
    ],
)
def test_a_layer_that_is_not_quite_llamas_is_left_alone(make):
    module = make()
    usual = LlamaRMSNorm(8) if isinstance(module, LlamaRMSNorm) else LlamaMLP(SETTINGS)
    fuse_layers(torch.nn.ModuleList([usual, module]))  # each is judged by itself
    assert "forward" in vars(usual)
    assert "forward" not in vars(module)


def test_a_forward_that_somebody_replaced_is_left_alone():
    for module in (LlamaMLP(SETTINGS), LlamaRMSNorm(8)):
        with_forward(module)
        fuse_layers(torch.nn.ModuleList([module]))
        assert module.forward is module.kept


@pytest.mark.parametrize("part", ["", "base_layer", "lora_A.default", "lora_B.default", "lora_dropout.default"])
def test_lora_with_a_hook_is_left_alone(part):
    model = built(LlamaConfig, {})
    first, second = (layer.mlp.down_proj for layer in model.base_model.model.model.layers)
    with_hook(second, part)
    fuse_layers(model)
    assert "forward" in vars(first)
    assert "forward" not in vars(second)


def test_a_rotation_with_another_half_is_left_alone(monkeypatch):
    """The function's source is Llama's, but not that of the function that it calls."""
    from transformers.models.qwen2 import modeling_qwen2

    def rotate_half(x):
        return torch.cat(x.chunk(2, -1)[::-1], -1)

    monkeypatch.setattr(modeling_qwen2, "rotate_half", rotate_half)
    model = built(Qwen2Config)
    fuse_layers(model)
    assert functions(model) == ALL - {"Rotary"}


def test_evaluations_do_not_reach_the_fused_functions(monkeypatch):
    """Not even on tensors that have a gradient from before."""
    model = built(LlamaConfig, {})
    fuse_layers(model)
    for function in (LoraLinear, RmsNorm, Rotary, SwiGlu):
        monkeypatch.setattr(function, "apply", None)
    embedded = torch.randn(1, 5, 32, requires_grad=True)
    for no_gradient in (torch.no_grad(), torch.inference_mode()):
        with no_gradient:
            assert model(inputs_embeds=embedded).logits.isfinite().all()


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
    model.activation_checkpointing_enable({"use_reentrant": False})
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
