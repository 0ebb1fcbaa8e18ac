"""What ``all`` means for an adapter: linear layers and experts, and never what sends a token to an expert."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from raysft.config import Config, parse
from raysft.errors import RequestError
from raysft.models.adapters import load_adapter, merge_adapter
from raysft.models.loading import load_weights
from raysft.models.routers import routers
from raysft.train.check_model import check_model
from raysft.train.finetuning import load_model
from tests.tiny import tiny_mixture, tiny_model

EXPERTS = {"num_experts": 4, "moe_intermediate_size": 16}
LOCAL = {"num_local_experts": 4}
IDS = torch.arange(3, 40)[None]
DEEPSEEK = {
    "n_routed_experts": 4, "moe_intermediate_size": 16, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1,
    "topk_group": 1, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
    "head_dim": 4,
}  # fmt: skip
MIXTURES: list[tuple[str, dict[str, Any], set[str], set[str]]] = [
    ("qwen3_moe", EXPERTS, {"mlp.gate"}, {"mlp.experts"}),
    ("qwen2_moe", {**EXPERTS, "shared_expert_intermediate_size": 16}, {"mlp.gate", "mlp.shared_expert_gate"},
     {"mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj", "mlp.shared_expert.down_proj"}),
    ("mixtral", LOCAL, {"mlp.gate"}, {"mlp.experts"}),
    ("deepseek_v3", DEEPSEEK, {"mlp.gate"}, {"mlp.experts"}),
    ("gpt_oss", {**LOCAL, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, {"mlp.router"}, set()),
    ("phimoe", LOCAL, {"mlp.router"}, set()),
    ("llama4_text", {**LOCAL, "num_experts_per_tok": 1}, {"feed_forward.router"},
     {f"feed_forward.shared_expert.{name}" for name in ("gate_proj", "up_proj", "down_proj")}),
    ("granitemoe", LOCAL, {"block_sparse_moe.router"}, set()),
    ("afmoe", {**EXPERTS, "num_dense_layers": 1}, {"mlp.router"}, {"mlp.experts"}),
    ("doge", {"is_moe": True, "num_experts": 4}, {"mlp.router_gate"},
     {f"mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")}),
    ("jetmoe", {**LOCAL, "kv_channels": 8}, {"mlp.router", "self_attention.experts.router"}, set()),
]  # fmt: skip
"""Model, settings, its routers, and what else outside of the attention is trained, in the last layer."""
KINDS = [kind for kind, *_ in MIXTURES]
LAYER = "model.layers.1."


def config(finetuning: str = "lora", **section: Any) -> Config:
    return parse(
        {
            "model": {"path": "m", "finetuning": finetuning, finetuning: section},
            "data": {"train": [{"name": "a", "path": "a.jsonl"}], "sequence_length": 64},
        }
    )


def adapted(model: Any) -> set[str]:
    """Names of the modules that have something to be trained, without peft's additions."""
    names = {
        name.partition(".lora_")[0].partition(".oft_")[0] for name, p in model.named_parameters() if p.requires_grad
    }
    return {name.removeprefix("base_model.model.").replace(".base_layer", "") for name in names}


@pytest.fixture(scope="module")
def qwen(tmp_path_factory) -> Path:
    return tiny_mixture(tmp_path_factory.mktemp("qwen"), **EXPERTS, mlp_only_layers=[0])


@pytest.mark.parametrize(("kind", "settings", "theirs", "trained"), MIXTURES, ids=KINDS)
def test_routers_are_left_as_they_are(tmp_path, kind, settings, theirs, trained):
    folder = tiny_mixture(tmp_path, kind, **settings)
    model = load_model(config(rank=4), str(folder))
    found = {name.removeprefix(LAYER) for name in adapted(model) if name.startswith(LAYER)}
    assert {name for name in found if "attn" not in name and "attention" not in name} == trained
    assert {name for name in found if "attn" in name or "attention" in name}
    base = model.get_base_model()
    assert {name.removeprefix(LAYER) for name in routers(base) if name.startswith(LAYER)} == theirs
    by_oft = adapted(load_model(config("oft", block_size=4), str(folder)))
    assert not any(f"{name}.".startswith(f"{router}.") for name in by_oft for router in routers(base))


def test_a_model_that_transformers_does_not_know_is_known_by_its_names():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.ModuleDict({"gate_proj": nn.Linear(4, 4)}) for _ in range(2))
            self.gate, self.shared_expert_gate = nn.Linear(4, 2), nn.Linear(4, 1)

    assert routers(nn.ModuleDict({"mlp": Block()})) == {"mlp.gate", "mlp.shared_expert_gate"}
    assert not routers(nn.ModuleDict({"mlp": nn.ModuleDict({"gate": nn.Linear(4, 4), "gate_proj": nn.Linear(4, 4)})}))


def test_a_router_is_trained_where_it_is_named(qwen):
    named = adapted(load_model(config(rank=4, target=["q_proj", "gate"]), str(qwen)))
    assert {name for name in named if name.startswith(LAYER)} == {f"{LAYER}mlp.gate", f"{LAYER}self_attn.q_proj"}
    whole = adapted(load_model(config(rank=4, extra_modules=["gate"]), str(qwen)))
    assert f"{LAYER}mlp.gate.modules_to_save.default.weight" in whole


def test_experts_of_some_layers_are_named_by_more_of_their_names(tmp_path):
    folder = tiny_mixture(tmp_path / "base", "mixtral", **LOCAL, num_hidden_layers=12)
    model = load_model(config(rank=4, target=["layers.1.mlp.experts", "q_proj"]), str(folder))
    named = adapted(model)
    assert {name for name in named if "mlp" in name} == {"model.layers.1.mlp.experts"}
    assert len([name for name in named if "q_proj" in name]) == 12
    assert {
        module.r["default"] for name, module in model.named_modules() if "mlp" in name and hasattr(module, "lora_A")
    } == {4, 8}
    check_model(config(target=["layers.1.mlp.experts"]), str(folder))


def test_an_adapter_that_trained_a_router_goes_on_with_it(qwen, tmp_path):
    """As it was made, here by peft alone."""
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(r=4, task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False)
    old = get_peft_model(load_weights(qwen, dtype=torch.float32), settings)
    old.save_pretrained(tmp_path)
    gone_on = load_model(config(rank=4), str(qwen), adapter=str(tmp_path))
    assert f"{LAYER}mlp.gate" in adapted(gone_on)
    with torch.no_grad():
        torch.testing.assert_close(gone_on(input_ids=IDS).logits, old(input_ids=IDS).logits)


@pytest.mark.parametrize("target", ["all", ["experts"], ["o_proj", "experts"]], ids=str)
@pytest.mark.parametrize("kind", ["qwen3_moe", "qwen2_moe", "mixtral", "deepseek_v3", "gpt_oss", "llama4_text"])
def test_an_adapter_on_experts_is_written_loaded_and_merged(tmp_path, kind, target):
    settings = next(settings for name, settings, *_ in MIXTURES if name == kind)
    folder = tiny_mixture(tmp_path / "base", kind, **settings)
    model = load_model(config(rank=4, target=target), str(folder))
    if target != "all":
        layer = {name.removeprefix(LAYER) for name in adapted(model) if name.startswith(LAYER)}
        experts = "feed_forward.experts" if kind == "llama4_text" else "mlp.experts"
        assert layer == {experts, *(["self_attn.o_proj"] if "o_proj" in target else [])}
    draw = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=draw) * 0.1
    model.save_pretrained(tmp_path / "adapter")
    before = load_weights(folder, dtype=torch.float32).eval()
    again = load_adapter(load_weights(folder, dtype=torch.float32), tmp_path / "adapter").eval()
    with torch.no_grad():
        wanted = model.eval()(input_ids=IDS).logits
        assert (wanted - before(input_ids=IDS).logits).abs().max() > 1e-2
        torch.testing.assert_close(again(input_ids=IDS).logits, wanted)
        torch.testing.assert_close(merge_adapter(again)(input_ids=IDS).logits, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("target", ["all", ["o_proj", "experts"]], ids=str)
def test_what_has_twice_the_rank_has_the_scale_of_the_others(tmp_path, target, rslora):
    folder = tiny_mixture(tmp_path, "mixtral", **LOCAL)
    model = load_model(config(rank=4, alpha=8, target=target, rslora=rslora), str(folder))
    layers = [module for module in model.modules() if hasattr(module, "lora_A")]
    assert {module.r["default"] for module in layers} == {4, 8}
    assert {round(module.scaling["default"], 6) for module in layers} == {4.0 if rslora else 2.0}


@pytest.mark.parametrize(
    ("section", "told"),
    [
        ({"dropout": 0.1}, "model.lora.dropout=0.1 does not work with adapters on the experts of Qwen3MoeForCausalLM"),
        ({"dora": True}, "model.lora.dora=true does not work"),
        ({"pissa": True, "rank": 4}, "model.lora.pissa=true does not work"),
        ({"target": ["gate_proj"]}, "model.lora.target=['gate_proj'] is rejected by peft"),
        ({"target": ["experts"], "dropout": 0.1}, "model.lora.dropout=0.1 does not work with adapters on the experts"),
        ({"extra_modules": ["experts"]}, "model.lora.extra_modules=['experts'] is rejected by peft"),
    ],
)
def test_what_experts_cannot_have_is_told_before_anything_starts(qwen, section, told):
    with pytest.raises(RequestError) as caught:
        check_model(config(**section), str(qwen))
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)
    check_model(config(**{**section, "target": ["q_proj", "v_proj"]}), str(qwen))


@pytest.mark.parametrize(("beside", "told"), [([], ""), (["experts"], "the experts and ")], ids=str)
def test_of_many_routers_that_cannot_have_it_the_first_is_told(tmp_path, beside, told):
    folder = tiny_mixture(tmp_path, "mixtral", **LOCAL)
    named = [f"model.layers.{layer}.mlp.gate" for layer in range(2)]
    with pytest.raises(RequestError) as caught:
        check_model(config(target=[*named, *beside], dropout=0.1), str(folder))
    told = f"with adapters on {told}the router (model.layers.0.mlp.gate) and 1 more of MixtralForCausalLM; remove"
    assert told in str(caught.value)


def test_other_models_take_all_of_these(tmp_path):
    folder = tiny_model(tmp_path)
    for section in ({"dropout": 0.1}, {"dora": True}, {"pissa": True}):
        check_model(config(**section), str(folder))
    assert {name for name in adapted(load_model(config(), str(folder))) if name.startswith(LAYER)} == {
        f"{LAYER}self_attn.{name}_proj" for name in "qkvo"
    } | {f"{LAYER}mlp.{name}_proj" for name in ("gate", "up", "down")}
