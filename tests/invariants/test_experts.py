"""Mixtures of experts train the same however a step is cut, with the loss that balances their experts."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from raysft.data.rows.packed_dataset import PackedDataset
from raysft.data.types import IGNORE_INDEX
from raysft.errors import RequestError
from raysft.models.adapters import load_with_base
from raysft.models.loading import load_weights
from raysft.models.merging import merge
from raysft.models.routers import watchable_routers
from raysft.train.check_model import check_model
from tests.messages import holds, refusal
from tests.shards import the_set, written
from tests.tiny import FAMILIES, tiny_mixture, tiny_model, with_code
from tests.training import (
    Case,
    Result,
    adamw,
    assert_same,
    examples_of,
    make_config,
    rows_of,
    train_all,
    write_conversations,
)

COEFFICIENT = 0.3
BALANCED = {"train.router_aux_loss_coef": COEFFICIENT}
CHOSEN = 2
"""Experts of a token."""
STAGES = dict(zip(FAMILIES, (1, 2, 3, 3, 3, 2, 3), strict=True))
"""ZeRO stage of two workers."""


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> tuple[Path, PackedDataset]:
    folder = tmp_path_factory.mktemp("experts")
    for family, settings in FAMILIES.items():
        tiny_mixture(folder / family, family, **settings)
    write_conversations(folder / "data.jsonl", 60)
    model = str(folder / "mixtral")
    return folder, rows_of(written(the_set(make_config(folder, folder / "mixtral"), model), model))


def case(rows: tuple[Path, PackedDataset], family: str, settings: dict[str, Any], **train: Any) -> Case:
    folder, dataset = rows
    return Case(make_config(folder, folder / family, {**BALANCED, **settings}, **train), dataset)


ADAPTERS: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "experts": ("mixtral", ["experts"], {"gradient_checkpointing": True}),
    "all": ("qwen3_moe", "all", {"micro_batch_size": 1}),
    "attention": ("glm4_moe", ["q_proj", "o_proj"], {}),
    "gate": ("qwen2_moe", ["q_proj", "mlp.gate"], {"micro_batch_size": 1}),
    "router": ("gpt_oss", ["experts", "router"], {"gradient_checkpointing": True}),
    "both": ("gpt_oss", ["q_proj", "o_proj", "experts"], {"gradient_checkpointing": True, "micro_batch_size": 1}),
}
"""What is trained → family, ``model.lora.target``, and how two workers with ZeRO-3 compute."""
ROUTERS = ("gate", "router")
"""Those that train routers, too."""
OFFLOADED = {"zero_stage": 3, "offload": {"parameters": "cpu", "optimizer": "cpu"}, "micro_batch_size": 1}


@pytest.fixture(scope="module")
def trained(rows) -> dict[str, dict[str, Result]]:
    """Family → way → result."""
    alone = {
        "at once": {"micro_batch_size": 4},
        "in four parts": {"micro_batch_size": 1, "gradient_checkpointing": True},
    }
    one = train_all([case(rows, family, {}, zero_stage=0, **way) for family in FAMILIES for way in alone.values()])
    two = train_all([case(rows, family, {}, zero_stage=STAGES[family]) for family in FAMILIES], world=2)
    results: dict[str, dict[str, Result]] = {}
    for number, family in enumerate(FAMILIES):
        results[family] = dict(zip(alone, one[2 * number : 2 * number + 2], strict=True)) | {"two workers": two[number]}
    return results


def balance_of(model: nn.Module, logits: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The load balancing loss of one example."""
    experts = logits[0].shape[-1]
    if model.config.model_type not in ("deepseek_v3", "glm4_moe"):  # type: ignore[union-attr]
        return load_balancing_loss_func(logits, experts, CHOSEN)  # type: ignore[return-value]
    scores = torch.stack(logits).sigmoid()  # their bias for choices is 0 here
    uses = F.one_hot(scores.topk(CHOSEN, -1).indices, experts).sum(2).float().mean((0, 1))
    return experts * (uses * (scores / scores.sum(-1, keepdim=True)).mean((0, 1))).sum()


def plain(model: nn.Module, rows: PackedDataset) -> tuple[list[float], list[float], list[float]]:
    """Train example by example, with transformers alone: losses, norms, and load balancing losses."""
    from transformers import get_scheduler

    model.train()
    optimizer = adamw(model)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=0, num_training_steps=rows.row_plan.steps)
    losses, norms, balances = [], [], []
    for step in range(rows.row_plan.steps):
        batch = rows.batch(rows.rows_for_rank(step, 0, 1))
        loss, balance, labelled, tokens = torch.zeros(()), torch.zeros(()), 0, 0
        for ids, labels in (example for row in range(4) for example in examples_of(batch, row)):
            output = model(input_ids=ids[None], use_cache=False, output_router_logits=True)
            targets = labels[1:]
            loss = loss + F.cross_entropy(output.logits[0, :-1], targets, ignore_index=IGNORE_INDEX, reduction="sum")
            labelled += int((targets != IGNORE_INDEX).sum())
            balance = balance + len(ids) * balance_of(model, output.router_logits)
            tokens += len(ids)
        loss, balance = loss / labelled, balance / tokens
        (loss + COEFFICIENT * balance).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        balances.append(balance.item())
    return losses, norms, balances


def balances(result: Result) -> list[float]:
    return [event.router_aux_loss for event in result.events if hasattr(event, "router_aux_loss")]


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows_train_as_single_examples_do_however_a_step_is_cut(rows, trained, family):
    # Experts one after the other; raysft's training has transformers' default, a grouped product.
    model: Any = AutoModelForCausalLM.from_pretrained(
        rows[0] / family, dtype=torch.float32, experts_implementation="eager"
    )
    losses, norms, expected = plain(model, rows[1])
    model.save_pretrained(rows[0] / f"plain-{family}")
    weights = {name: each.numpy() for name, each in load_file(rows[0] / f"plain-{family}/model.safetensors").items()}
    assert len(losses) == 4
    for way, result in trained[family].items():
        assert not result.failure, way
        assert_same((losses, norms, weights, {}), result[:4])
        np.testing.assert_allclose(balances(result), expected, rtol=1e-5, err_msg=way)


def test_a_worker_whose_rows_are_empty_adds_nothing_to_the_balance(rows):
    """In the last step of an epoch, in which one of two workers has no examples."""
    dataset = PackedDataset(rows[1].manifests, rows[1].capacity, 8, seed=3, layout="single")
    assert dataset.row_plan.rows % 8 == 4
    ways = [{"zero_stage": 0, "micro_batch_size": 8}, {"zero_stage": 3, "micro_batch_size": 2}]
    settings = {**BALANCED, "data.packing": False, "train.max_steps": None}
    one, two = (
        train_all(
            [Case(make_config(rows[0], rows[0] / "mixtral", settings, global_batch_size=8, **way), dataset)], world
        )[0]
        for way, world in zip(ways, (1, 2), strict=True)
    )
    assert not one.failure
    assert len(balances(one)) == dataset.row_plan.steps
    assert_same(one[:4], two[:4])
    np.testing.assert_allclose(balances(one), balances(two), rtol=1e-5)


def test_a_loss_of_routers_needs_routers(rows):
    settings = {"train.router_aux_loss_coef": 0.1}
    model = tiny_model(rows[0] / "llama")
    with pytest.raises(
        RequestError, match=r"train.router_aux_loss_coef=0.1 is for routers .* LlamaForCausalLM has none"
    ):
        check_model(make_config(rows[0], model, settings), str(model))
    check_model(make_config(rows[0], rows[0] / "glm4_moe", settings), str(rows[0] / "glm4_moe"))


def test_a_loss_of_routers_that_cannot_be_read_is_refused(rows, tmp_path):
    model = tiny_mixture(tmp_path / "phimoe", "phimoe", num_local_experts=4)
    with pytest.raises(RequestError, match=r"supports the routers of deepseek_v2, .* has model_type=phimoe; remove it"):
        check_model(make_config(rows[0], model, {"train.router_aux_loss_coef": 0.1}), str(model))


@pytest.fixture(scope="module")
def adapted(rows) -> dict[str, tuple[Result, Result]]:
    """What is trained → by one worker without ZeRO, and by two with ZeRO-3."""

    def lora(what: str, **way: Any) -> Case:
        family, target, _ = ADAPTERS[what]
        balance = COEFFICIENT if what in ROUTERS else None
        settings = {"model.lora.target": target, "model.lora.rank": 4, "train.router_aux_loss_coef": balance}
        return case(rows, family, settings, finetuning="lora", **way)

    one = train_all([lora(what, zero_stage=0, micro_batch_size=4) for what in ADAPTERS])
    two = train_all([lora(what, **{"zero_stage": 3, **way}) for what, (_, _, way) in ADAPTERS.items()], world=2)
    return {what: (one[index], two[index]) for index, what in enumerate(ADAPTERS)}


@pytest.mark.parametrize("what", ADAPTERS)
def test_adapters_of_experts_train_alike_and_are_merged_to_what_was_trained(rows, adapted, tmp_path, what):
    one, two = adapted[what]
    assert not one.failure
    assert not two.failure
    assert_same(one[:4], two[:4])
    names = {name.split(".lora_")[0].rpartition("layers.1.")[2] for name in one.weights}
    assert any("experts" in name for name in names) == (what not in ("attention", "gate"))
    assert any(name.endswith((".gate", "router")) for name in names) == (what in ROUTERS)
    if what in ROUTERS:
        np.testing.assert_allclose(balances(one), balances(two), rtol=1e-5)
    merge(two.model, tmp_path)
    base, merged = (load_file(folder / "model.safetensors") for folder in (rows[0] / ADAPTERS[what][0], tmp_path))
    assert base.keys() == merged.keys()
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    assert changed
    assert any(".gate.weight" in name or "router" in name for name in changed) == (what in ROUTERS)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        trained = load_with_base(two.model, dtype=torch.float32).eval()(input_ids=ids).logits
        whole = load_weights(tmp_path, dtype=torch.float32).eval()(input_ids=ids).logits
    torch.testing.assert_close(whole, trained, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "target", "told"),
    [
        ("gpt_oss", ["router"], "the router (router) of GptOssForCausalLM"),
        ("mixtral", ["experts", "mlp.gate"], "the experts and the router (mlp.gate) of MixtralForCausalLM"),
        ("qwen3_moe", ["experts"], "the experts of Qwen3MoeForCausalLM"),
    ],
)
def test_dropout_of_adapters_on_parameters_is_refused_by_their_names(rows, family, target, told):
    model = rows[0] / family
    settings = {"model.lora.target": target, "model.lora.dropout": 0.1}
    said = refusal(check_model, make_config(rows[0], model, settings, finetuning="lora"), str(model))
    assert holds(said, f"model.lora.dropout=0.1 … {told}; remove it … model.lora.target")


def test_single_experts_are_named_as_experts(rows):
    for target in ("w1", "mlp.experts.0.gate_proj"):
        config = make_config(rows[0], rows[0] / "mixtral", {"model.lora.target": [target]}, finetuning="lora")
        said = refusal(check_model, config, str(rows[0] / "mixtral"))
        assert holds(said, f"model.lora.target names '{target}' … no such module; … (experts for all expert weights)")


class OfOneKind(PackedDataset):
    """The first worker's rows hold even tokens only, the last worker's odd ones."""

    def batch(self, rows: Any) -> Any:
        made = super().batch(rows)
        odd = np.isin(made["row"] % 4, (2, 3))[:, None]
        made["input_ids"] = np.where(odd, made["input_ids"] | 1, made["input_ids"] & ~1)
        made["labels"] = np.where(made["labels"] >= 0, made["input_ids"], IGNORE_INDEX).astype(np.int32)
        return made


LISTED = """\
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "own"


class Block(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.gate = nn.Linear(size, 4, bias=False)
        self.experts = nn.ModuleList(nn.Linear(size, size, bias=False) for _ in range(4))

    def forward(self, hidden):
        shares, chosen = self.gate(hidden).softmax(-1).topk(2)
        out = torch.zeros_like(hidden)
        for number in chosen.unique().tolist():
            share = (shares * (chosen == number)).sum(-1, keepdim=True)
            out = out + share * self.experts[number](hidden)
        return out


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp = Block(config.hidden_size)
        self.post_init()
"""
"""A model whose layers call some of a list of experts."""


@pytest.fixture(scope="module")
def listed(rows) -> Path:
    """A model with code of its own that sends even tokens to the first two experts, and odd ones to the others."""
    folder = with_code(tiny_model(rows[0] / "listed"), rows[0] / "ran")
    (folder / "modeling_own.py").write_text(LISTED)
    made: dict[str, Any] = {}
    exec(LISTED, made)
    config = made["OwnConfig"](**json.loads((folder / "config.json").read_text()))
    torch.manual_seed(0)
    model = made["OwnForCausalLM"](config)
    with torch.no_grad():
        model.model.embed_tokens.weight[::2, 0], model.model.embed_tokens.weight[1::2, 0] = 3.0, -3.0
        for layer in model.model.layers:
            layer.mlp.gate.weight[:2, 0], layer.mlp.gate.weight[2:, 0] = 3.0, -3.0
    save_file(
        {name: each.contiguous() for name, each in model.state_dict().items() if name != "lm_head.weight"},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    return folder


@pytest.mark.parametrize("finetuning", ["full", "lora"])
def test_experts_in_a_list_are_gathered_together(rows, listed, finetuning):
    """Else each worker would gather those that its own tokens need, and wait for the other for ever."""
    dataset = OfOneKind(**{each.name: getattr(rows[1], each.name) for each in fields(rows[1]) if each.init})
    settings = {
        "model.trust_remote_code": [str(listed)],
        "train.deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0}},
    }
    one, two = (
        train_all([Case(make_config(rows[0], listed, settings, finetuning=finetuning, **way), dataset)], world)[0]
        for way, world in (({"zero_stage": 0, "micro_batch_size": 4}, 1), ({"zero_stage": 3}, 2))
    )
    assert not one.failure
    assert_same(one[:4], two[:4])


@pytest.fixture(scope="module")
def apart(rows) -> Path:
    """A model that sends even tokens to the first two experts, and odd ones to the others."""
    folder = tiny_mixture(rows[0] / "apart", "qwen3_moe", **FAMILIES["mixtral"], **FAMILIES["qwen3_moe"])
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][::2, 0], weights["model.embed_tokens.weight"][1::2, 0] = 3.0, -3.0
    for name, weight in weights.items():
        if name.endswith("mlp.gate.weight"):
            weight[:2, 0], weight[2:, 0] = 3.0, -3.0
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_workers_whose_tokens_go_to_different_experts_train_as_one_does(rows, apart):
    """With all weights in the nodes' memory, and layers computed again."""
    dataset = OfOneKind(**{each.name: getattr(rows[1], each.name) for each in fields(rows[1]) if each.init})
    model, chosen = load_weights(apart, dtype=torch.float32), []
    hook = watchable_routers(model)[0].register_forward_hook(lambda module, inputs, output: chosen.append(output[2]))
    for ids in (torch.arange(4, 60, 2), torch.arange(5, 60, 2)):
        model(input_ids=ids[None])
    hook.remove()
    assert [set(each.flatten().tolist()) for each in chosen] == [{0, 1}, {2, 3}]
    ways = [{"zero_stage": 0, "micro_batch_size": 4}, {**OFFLOADED, "gradient_checkpointing": True}]
    one, two = (
        train_all([Case(make_config(rows[0], apart, BALANCED, **way), dataset)], world)[0]
        for way, world in zip(ways, (1, 2), strict=True)
    )
    assert not one.failure
    assert_same(one[:4], two[:4])
    np.testing.assert_allclose(balances(one), balances(two), rtol=1e-5)


def test_experts_alone_are_trained_with_zero_3(rows):
    """Nothing before the first of them has gradients, and DeepSpeed gathers their blocks whole without being asked."""
    settings = {"model.freeze.modules": ["experts"], "train.router_aux_loss_coef": None}
    one, parted = train_all([case(rows, "mixtral", settings, finetuning="freeze", zero_stage=each) for each in (0, 3)])
    assert (one.failure, parted.failure) == ("", "")
    assert len(one.losses) > 1
    assert_same(one[:4], parted[:4])
