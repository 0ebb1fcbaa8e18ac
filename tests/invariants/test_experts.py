"""Mixtures of experts train the same however a step is cut, with the loss that balances their experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from raysft.data.rows.packed_dataset import PackedDataset
from raysft.data.types import IGNORE_INDEX
from raysft.errors import RequestError
from raysft.train.check_model import check_model
from tests.shards import the_set, written
from tests.tiny import FAMILIES, tiny_mixture, tiny_model
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


def test_a_loss_of_routers_needs_routers(rows):
    settings = {"train.router_aux_loss_coef": 0.1}
    model = tiny_model(rows[0] / "llama")
    with pytest.raises(
        RequestError, match=r"train.router_aux_loss_coef=0.1 is for routers .* LlamaForCausalLM has none"
    ):
        check_model(make_config(rows[0], model, settings), str(model))
    check_model(make_config(rows[0], rows[0] / "glm4_moe", settings), str(rows[0] / "glm4_moe"))
