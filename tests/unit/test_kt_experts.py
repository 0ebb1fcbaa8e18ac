"""Experts in KTransformers' kernel, against transformers' experts with peft's adapters."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from raysft.config import Config, parse, with_overrides
from raysft.errors import RequestError, RunFailed
from raysft.models import kt_internals
from raysft.models.kt_experts import (
    ARCHITECTURES,
    Kept,
    LayerExperts,
    check_architecture,
    elements_of_experts,
    move_experts,
    numa_nodes,
)
from raysft.models.kt_factors import Given, products
from raysft.models.kt_internals import Factors, check_kernel
from raysft.models.peft_internals import TRAINED, parameter_adapters, using_adapter
from raysft.models.transformers_internals import expert_modules, is_swiglu
from raysft.train.check_model import check_model
from raysft.train.finetuning import load_model
from raysft.train.flops import model_flops, trainer_flops
from raysft.train.nonfinite import NonFinite
from raysft.train.reference import START, _keep_start
from raysft.train.step import StepResult
from tests.kt import QWEN, SIZES, needs_kernel
from tests.messages import refusal
from tests.tiny import tiny_mixture, tiny_model

TOKENS = 50
DEEPSEEK = {
    **SIZES, "n_routed_experts": 8, "moe_intermediate_size": 64, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1,
    "topk_group": 1, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
    "head_dim": 4,
}  # fmt: skip
MIXTURES: dict[str, dict[str, Any]] = {
    "qwen3_moe": QWEN,
    "qwen2_moe": {**QWEN, "shared_expert_intermediate_size": 64},
    "mixtral": {**SIZES, "intermediate_size": 96, "num_local_experts": 8},
    "deepseek_v2": {**DEEPSEEK, "topk_method": "greedy"},
    "deepseek_v3": DEEPSEEK,
    "glm4_moe": {**DEEPSEEK, "head_dim": 16},
}


def config(experts: str = "kt", **settings: Any) -> Config:
    train = {"micro_batch_size": 1, **settings.pop("train", {})}
    return parse(
        {
            "model": {"path": "m", "dtype": "bfloat16", "experts": experts, "lora": settings},
            "data": {"train": [{"name": "a", "path": "a.jsonl"}], "sequence_length": 64},
            "train": train,
        }
    )


def made(folder: Path, experts: str = "kt", **settings: Any) -> Any:
    """Load a model with an adapter that does something; its experts are in the kernel with ``kt``."""
    given = config(experts, **settings)
    model = load_model(given, str(folder))
    draw = torch.Generator().manual_seed(1)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data = torch.randn(weight.shape, generator=draw) * 0.1
    if experts == "kt":
        move_experts(model, given)
    return model.train()


def outermost(model: Any) -> Any:
    """The last layer's experts, with their adapters."""
    return next(module for name, module in reversed(list(model.named_modules())) if name.endswith(".experts"))


def inputs(seed: int = 0, tokens: int = TOKENS, experts: int = 8) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, 64, generator=draw).bfloat16()
    index = torch.rand(tokens, experts, generator=draw).topk(2).indices
    return hidden, index, torch.rand(tokens, 2, generator=draw)


def weighted(result: torch.Tensor) -> torch.Tensor:
    """A loss whose gradient differs from number to number."""
    return (result.float() * torch.arange(result.numel()).view(result.shape).cos()).sum()


def computed(experts: Any, seeds: tuple[int, ...] = (0,), tokens: int = TOKENS) -> dict[str, torch.Tensor]:
    """Outputs and all gradients of a pass for each seed, one after the other."""
    found: dict[str, torch.Tensor] = {}
    experts.zero_grad()
    for seed in seeds:
        hidden, index, weights = inputs(seed, tokens)
        hidden, weights = hidden.requires_grad_(), weights.requires_grad_()
        result = experts(hidden, index, weights)
        weighted(result).backward()
        found |= {f"output {seed}": result.detach(), f"input {seed}": hidden.grad, f"router {seed}": weights.grad}  # type: ignore[dict-item]
    return found | {name: weight.grad for name, weight in experts.named_parameters() if weight.grad is not None}


def far(one: torch.Tensor, other: torch.Tensor) -> float:
    """Distance, as a share of the second."""
    return float((one.detach().float() - other.float()).norm() / other.float().norm())


@needs_kernel
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_the_kernel_computes_what_transformers_and_peft_compute(tmp_path, kind):
    folder = tiny_mixture(tmp_path, kind, **MIXTURES[kind])
    # Of Qwen 2's mixtures, peft does not count experts among all layers.
    target = {"target": ["experts"]} if kind == "qwen2_moe" else {}
    ours, theirs = (computed(outermost(made(folder, experts, rank=4, **target)), (0, 1)) for experts in ("kt", "auto"))
    assert ours.keys() == theirs.keys()
    assert len([name for name in ours if "lora_" in name]) == 4
    assert {name: far(ours[name], theirs[name]) for name in ours if far(ours[name], theirs[name]) > 0.02} == {}


@pytest.fixture
def qwen(tmp_path):
    return tiny_mixture(tmp_path / "qwen", **QWEN)


@needs_kernel
@pytest.mark.parametrize("settings", [{"rslora": True, "rank": 5}, {"target": ["q_proj", "v_proj"]}])
def test_scales_odd_ranks_and_experts_without_an_adapter_are_right_too(qwen, settings):
    ours, theirs = (computed(outermost(made(qwen, experts, **settings))) for experts in ("kt", "auto"))
    assert ours.keys() == theirs.keys()
    assert max(far(ours[name], theirs[name]) for name in ours) < 0.02


@needs_kernel
def test_gradients_of_several_passes_add_up_whatever_their_order(qwen):
    experts = outermost(made(qwen))
    alone = [computed(experts, (seed,)) for seed in (0, 1)]
    together = computed(experts, (0, 1))
    experts.zero_grad()
    passes = []
    for seed in (0, 1):
        hidden, index, weights = inputs(seed)
        passes.append((hidden.requires_grad_(), experts(hidden, index, weights)))
    with torch.no_grad():
        experts(*inputs(2))
    for _, result in passes:
        weighted(result).backward()
    for name, weight in experts.named_parameters():
        if weight.requires_grad:
            assert torch.equal(weight.grad, together[name])
            torch.testing.assert_close(weight.grad, alone[0][name] + alone[1][name])
    assert torch.equal(passes[0][0].grad, alone[0]["input 0"])


@needs_kernel
def test_a_gate_that_the_kernel_cannot_differentiate_makes_all_gradients_of_its_layer_nan(qwen):
    """So that the step is not applied, also if nothing before the layer is trained."""
    experts = outermost(made(qwen))
    hidden, index, weights = inputs()
    hidden[3] *= 100
    result = experts(hidden, index, weights)
    assert torch.isfinite(result).all()
    weighted(result).backward()
    found = {name: weight.grad for name, weight in experts.named_parameters() if weight.requires_grad}
    assert len(found) == 4
    assert not any(torch.isfinite(gradient).any() for gradient in found.values())  # type: ignore[union-attr]


@needs_kernel
def test_more_tokens_than_a_call_takes_are_computed_in_several(qwen):
    ours, theirs = (computed(outermost(made(qwen, experts)), tokens=150) for experts in ("kt", "auto"))
    assert max(far(ours[name], theirs[name]) for name in ours) < 0.02


@needs_kernel
def test_an_adapter_on_routers_stays_peft_s(qwen):
    def routed(experts: str) -> torch.Tensor:
        model = made(qwen, experts, target=["gate", "experts"], rank=4)
        router = next(module for name, module in model.named_modules() if name.endswith("mlp.gate"))
        with torch.no_grad():
            assert far(router.base_layer(inputs()[0])[0], router(inputs()[0])[0]) > 0.01
            return router(inputs()[0])[0]

    assert torch.equal(routed("kt"), routed("auto"))


@needs_kernel
def test_an_adapter_that_is_switched_off_adds_nothing(qwen):
    model, plain = made(qwen), made(qwen, "auto")
    with torch.no_grad(), model.disable_adapter(), plain.disable_adapter():
        off, expected = (outermost(each)(*inputs()) for each in (model, plain))
    assert far(off, expected) < 0.01
    assert far(outermost(model)(*inputs()), expected) > 0.1


@needs_kernel
def test_another_adapter_of_the_same_model_has_its_own_weights(qwen):
    """As ASFT keeps the start of an adapter that is trained further."""
    ours, theirs = (made(qwen, experts) for experts in ("kt", "auto"))
    for model in (ours, theirs):
        _keep_start(model)
    hidden = inputs()
    trained = outermost(ours)(*hidden)
    for model in (ours, theirs):
        for name, weight in model.named_parameters():
            if "lora_B" in name and TRAINED in name:
                weight.data *= -1
    with torch.no_grad():
        with using_adapter(ours, START), using_adapter(theirs, START):
            start, expected = (outermost(model)(*hidden) for model in (ours, theirs))
        changed = outermost(ours)(*hidden)
    assert torch.equal(start, trained)
    assert far(start, expected) < 0.02
    assert far(changed, start) > 0.1


def forwards(model: Any) -> list[bool]:
    """A list that grows with each pass through a kernel: True for those that keep what a backward pass needs."""
    found: list[bool] = []
    for module in expert_modules(model):
        kernel = module.experts_of_layer._kernel

        def counting(*arguments: Any, forward: Callable[..., Any] = kernel.forward, keep: bool) -> Any:
            found.append(keep)
            return forward(*arguments, keep=keep)

        kernel.forward = counting
    return found


@needs_kernel
def test_layers_that_are_computed_again_have_the_same_gradients_and_compute_their_experts_twice(qwen):
    ids = torch.randint(3, 300, (1, TOKENS), generator=torch.Generator().manual_seed(3))
    ways: list[dict[str, Any]] = [
        {},
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "recompute_layers": 1},
    ]
    found = []
    for train in ways:
        model = made(qwen, train=train)
        passes = forwards(model)
        weighted(model(input_ids=ids, use_cache=False).logits).backward()
        found.append(({name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}, passes))
    assert [passes for _, passes in found] == [[True, True], [False, False, True, True], [False, True, True]]
    for gradients, _ in found[1:]:
        assert all(torch.equal(gradients[name], gradient) for name, gradient in found[0][0].items())


@needs_kernel
def test_the_weights_of_the_experts_are_no_longer_in_the_model(qwen):
    before, after = made(qwen, "auto"), made(qwen)
    experts = 2 * 8 * 3 * 64 * 64
    sizes = [sum(weight.numel() for weight in model.parameters()) for model in (before, after)]
    assert sizes[0] - sizes[1] == experts == elements_of_experts(after)[0]
    assert model_flops(after, 10, 0, 0) == pytest.approx(model_flops(before, 10, 0, 0))
    assert trainer_flops(after, 10) == trainer_flops(before, 10)


def factors(experts: int, rank: int, inputs: int, inner: int) -> Factors:
    a, b, down = (experts, rank, inputs), (experts, inner, rank), (experts, rank, inner)
    return Factors(*(torch.full(shape, 7.0) for shape in (a, b, a, b, down, (experts, inputs, rank))))


@pytest.mark.parametrize("settings", [{"rank": 4}, {"rank": 3, "alpha": 5.0, "rslora": True}])
def test_the_kernel_gets_the_weights_that_peft_would_add(qwen, settings):
    experts = outermost(made(qwen, "auto", **settings))
    adapters = {each.parameter_name: each for each in parameter_adapters(experts)}
    layer = LayerExperts(None, list(adapters.values()), Kept(), 0)
    scales, given = layer.adapter()
    target = factors(8, 16, 64, 64)
    Given(scales, given).fill(target)
    for name, matrices in zip(("gate_up_proj", "down_proj"), products(target), strict=True):
        delta = torch.cat([b @ a for a, b in matrices], dim=1)
        expected = adapters[name].get_delta_weight("default")
        torch.testing.assert_close(delta, expected.float(), atol=1e-2 * float(expected.abs().max()), rtol=0.0)


def test_gradients_go_back_to_the_weights_that_they_are_of(qwen):
    adapters = parameter_adapters(outermost(made(qwen, "auto", rank=3, alpha=5.0)))
    scales, given = LayerExperts(None, adapters, Kept(), 0).adapter()
    target, draw = factors(8, 16, 64, 64), torch.Generator().manual_seed(2)
    leaves = [weight.detach().double().requires_grad_() for weight in given if weight is not None]
    gradients = Factors(*(torch.randn(each.shape, generator=draw) for each in target))
    total = torch.zeros((), dtype=torch.double)
    for (a, b), scale, matrices in zip(
        zip(leaves[::2], leaves[1::2], strict=True), scales, products(gradients), strict=True
    ):
        rank = len(a) // 8
        for part, (of_a, of_b) in zip(b.chunk(len(matrices)), matrices, strict=True):
            total = total + (a.view(8, rank, -1) * of_a[:, :rank]).sum()
            total = total + (scale * part.view(-1, rank, 8).permute(2, 0, 1) * of_b[:, :, :rank]).sum()
    total.backward()
    sums: list[torch.Tensor | None] = [torch.zeros(leaf.shape) for leaf in leaves]
    Given(scales, given).add(sums, gradients)
    for found, leaf in zip(sums, leaves, strict=True):
        torch.testing.assert_close(found, leaf.grad, check_dtype=False)


def test_without_the_package_the_message_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(kt_internals.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        RequestError, match=r"^model\.experts=kt needs .* pip install --no-deps kt-kernel==[\d.]+ .*torch$"
    ):
        check_kernel()


def test_a_cpu_without_the_instructions_is_refused(monkeypatch):
    package = SimpleNamespace(__cpu_variant__="avx2", kt_kernel_ext=SimpleNamespace(moe=SimpleNamespace()))
    monkeypatch.setattr(kt_internals.importlib.util, "find_spec", lambda name: package)
    monkeypatch.setattr(kt_internals, "version", lambda name: "0.7.3")
    monkeypatch.setitem(sys.modules, "kt_kernel", package)
    check_kernel(on_this_machine=False)
    with pytest.raises(RequestError, match=r"AVX-512 BF16 .* found avx2 .* model\.experts=auto"):
        check_kernel()


def test_another_version_is_refused(monkeypatch):
    monkeypatch.setattr(kt_internals.importlib.util, "find_spec", lambda name: SimpleNamespace())
    monkeypatch.setattr(kt_internals, "version", lambda name: "0.8.0")
    with pytest.raises(
        RequestError, match=r"works with kt-kernel 0\.7\..*, but 0\.8\.0 is installed; run pip install --no-deps"
    ):
        check_kernel(on_this_machine=False)


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("raise ImportError('no .so:\\n  libhwloc.so.15')", "(no .so: libhwloc.so.15)"),
        ("raise RuntimeError('needs a newer CPU: avx2\\nmore')", "(needs a newer CPU: avx2)"),
        ("", "(module 'kt_kernel' has no attribute 'kt_kernel_ext')"),
    ],
)
def test_a_package_that_does_not_load_is_told_in_one_line(tmp_path, monkeypatch, code, told):
    (tmp_path / "kt_kernel").mkdir()
    (tmp_path / "kt_kernel" / "__init__.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(kt_internals, "version", lambda name: kt_internals.VERSION)
    monkeypatch.delitem(sys.modules, "kt_kernel", raising=False)
    assert f"cannot be loaded on this node {told}; run pip install --no-deps kt-kernel==" in refusal(check_kernel)
    sys.modules.pop("kt_kernel", None)


def hf_config(kind: str, **settings: Any) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(kind, **settings)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("llama", {}, "but the model is llama; set model.experts=auto"),
        ("gpt_oss", {}, "but the model is gpt_oss"),
        ("qwen3_moe", {"moe_intermediate_size": 50}, "multiples of 32, but the model's moe_intermediate_size is 50"),
        ("mixtral", {"intermediate_size": 50}, "moe_intermediate_size is 50"),
        ("qwen3_moe", {"hidden_size": 48}, "hidden_size is 48"),
    ],
)
def test_other_experts_are_refused(kind, settings, message):
    with pytest.raises(RequestError, match=message):
        check_architecture(hf_config(kind, **settings))


def test_another_activation_is_refused(tmp_path):
    folder = tiny_mixture(tmp_path, **QWEN, hidden_act="gelu")
    model = made(folder, "auto")
    with pytest.raises(RequestError, match="supports only SwiGLU without biases, but Qwen3MoeExperts is different"):
        move_experts(model, config(), lambda *arguments: pytest.fail("was taken over"))


@pytest.mark.parametrize("kind", ["gpt_oss", "phimoe"])
def test_biases_and_other_layouts_are_seen(tmp_path, kind):
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}} if kind == "gpt_oss" else {}
    folder = tiny_mixture(tmp_path, kind, num_local_experts=4, **rope)
    from raysft.models.loading import load_weights

    (first, *_) = expert_modules(load_weights(folder))
    assert is_swiglu(first) == (kind == "phimoe")


def test_experts_are_spread_over_the_numa_nodes_that_their_width_can_be_divided_by(tmp_path, monkeypatch):
    for node, cpus in enumerate(("0-1,8", "2-3")):
        (tmp_path / f"node{node}").mkdir()
        (tmp_path / f"node{node}" / "cpulist").write_text(f"{cpus}\n")
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {1, 2})
    assert [numa_nodes(inner, tmp_path) for inner in (64, 96)] == [2, 1]
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0, 8})
    assert numa_nodes(64, tmp_path) == 1
    assert numa_nodes(64, tmp_path / "none") == 1


@pytest.mark.parametrize(
    ("kind", "quantized", "message"),
    [
        ("llama", False, "but the model is llama"),
        ("qwen3_moe", True, "is quantized (gptq); use the model that it was quantized from, or set model.experts=auto"),
    ],
)
def test_a_model_that_the_kernel_cannot_compute_is_refused_before_anything_starts(
    tmp_path, monkeypatch, kind, quantized, message
):
    if kind == "llama":
        tiny_model(tmp_path)
    else:
        tiny_mixture(tmp_path, **QWEN)
    given = with_overrides(config(), {"model.path": str(tmp_path)})
    monkeypatch.setattr(kt_internals.importlib.util, "find_spec", lambda name: None)
    # The package would not help a Llama.
    missing = "but the model is llama" if kind == "llama" else "pip install --no-deps kt-kernel"
    assert missing in refusal(check_model, given, str(tmp_path))
    monkeypatch.undo()
    monkeypatch.setattr(kt_internals, "check_kernel", lambda on_this_machine: None)
    if quantized:
        content = json.loads((tmp_path / "config.json").read_text())
        content["quantization_config"] = {"quant_method": "gptq", "bits": 4}
        (tmp_path / "config.json").write_text(json.dumps(content))
        monkeypatch.setattr("raysft.train.check_model.check_method", lambda *arguments: None)
    assert message in refusal(check_model, given, str(tmp_path))


def test_experts_that_are_trained_in_full_are_refused_before_anything_starts(qwen, monkeypatch):
    monkeypatch.setattr(kt_internals, "check_kernel", lambda on_this_machine: None)
    given = with_overrides(config(target=["q_proj"]), {"model.path": str(qwen)})
    for module, name in (("mlp", "model.layers.0.mlp"), ("experts", "model.layers.0.mlp.experts")):
        told = refusal(check_model, with_overrides(given, {"model.lora.extra_modules": [module]}), str(qwen))
        assert f"trains their LoRA, but {name} is trained in full (model.lora.extra_modules, " in told
    check_model(with_overrides(given, {"model.lora.extra_modules": ["norm", "gate"]}), str(qwen))


def test_experts_that_an_adapter_trains_in_full_are_refused(qwen):
    given = with_overrides(config(target=["q_proj"]), {"model.lora.extra_modules": ["mlp"]})
    told = refusal(move_experts, load_model(given, str(qwen)), given, lambda *arguments: pytest.fail("was taken over"))
    assert "modules_to_save of an adapter" in told


@pytest.mark.parametrize(("experts", "ending"), [("kt", " is below -88"), ("auto", "train.nonfinite=skip")])
def test_a_gradient_that_is_not_finite_may_be_the_kernel_s(monkeypatch, experts, ending):
    monkeypatch.setattr("raysft.train.nonfinite.named_records", lambda *rows: "a: a.jsonl:1")
    rows = SimpleNamespace(row_plan=SimpleNamespace(global_batch_size=1, rows=8))
    check = NonFinite(SimpleNamespace(config=config(experts), train_rows=rows))
    with pytest.raises(RunFailed) as caught:
        check.check(0, StepResult(1.0, math.nan, np.zeros(1), False))
    assert str(caught.value).endswith(ending)
