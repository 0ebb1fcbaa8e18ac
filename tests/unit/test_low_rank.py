"""GaLore and APOLLO against their update rules, written out in float64 (Zhao et al. 2024, Zhu et al. 2025)."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from raysft.config import TrainSection
from raysft.config.train import Targets
from raysft.errors import RequestError
from raysft.train.optim import make_optimizer
from raysft.train.parameter_groups import by_target
from tests.messages import holds

RATE, BETAS, EPSILON, DECAY = 1e-2, (0.8, 0.9), 1e-6, 0.1
OPTIONS = {"rank": 3, "update_proj_gap": 4, "scale": 0.25}
STEPS = 10


class Layer(nn.Module):
    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__()
        self.q_proj = nn.Linear(shape[1], shape[0], dtype=torch.float64)
        self.o_proj = nn.Linear(shape[1], shape[0], bias=False, dtype=torch.float64)


def gradients(shape: tuple[int, ...], step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(10 * step + len(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def trained(optimizer: str, shape: tuple[int, int], target: Targets = "all", **options) -> Layer:
    torch.manual_seed(0)
    layer = Layer(shape)
    train = TrainSection(
        optimizer=optimizer, zero_stage=0, learning_rate=RATE, betas=BETAS, epsilon=EPSILON, weight_decay=DECAY,
        optimizer_options={**OPTIONS, **options}, optimizer_target=target,
    )  # fmt: skip
    made = make_optimizer(layer, train)
    for step in range(STEPS):
        for parameter in layer.parameters():
            parameter.grad = gradients(tuple(parameter.shape), step)
        made.step()
    return layer


class Adam:
    """Moments and the normalized update of Adam."""

    def __init__(self) -> None:
        self.first, self.second, self.steps = 0.0, 0.0, 0

    def update(self, gradient):
        self.steps += 1
        self.first = BETAS[0] * self.first + (1 - BETAS[0]) * gradient
        self.second = BETAS[1] * self.second + (1 - BETAS[1]) * gradient**2
        return self.first / (self.second.sqrt() + EPSILON)

    @property
    def rate(self) -> float:
        return RATE * math.sqrt(1 - BETAS[1] ** self.steps) / (1 - BETAS[0] ** self.steps)


def start(shape: tuple[int, int]) -> torch.Tensor:
    torch.manual_seed(0)
    return Layer(shape).q_proj.weight.detach().clone()


@pytest.mark.parametrize("shape", [(6, 10), (10, 6)])
def test_galore_steps_in_the_space_of_the_largest_singular_vectors_of_each_interval(shape):
    weight, adam = start(shape), Adam()
    for step in range(STEPS):
        gradient = gradients(shape, step)
        if step % OPTIONS["update_proj_gap"] == 0:
            left, _, right = torch.linalg.svd(
                gradient.float(), full_matrices=False
            )  # the library decomposes in float32
            left, right = left.double()[:, : OPTIONS["rank"]], right.double()[: OPTIONS["rank"]]
        tall = shape[0] >= shape[1]
        update = adam.update(gradient @ right.T if tall else left.T @ gradient)
        weight -= adam.rate * OPTIONS["scale"] * (update @ right if tall else left @ update)
        weight *= 1 - RATE * DECAY
    torch.testing.assert_close(trained("galore", shape).q_proj.weight.detach(), weight, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("front", [False, True])
@pytest.mark.parametrize("scale_type", ["channel", "tensor"])
@pytest.mark.parametrize("shape", [(6, 10), (10, 6)])
def test_apollo_scales_the_gradient_by_what_adam_does_to_its_projection(shape, scale_type, front):
    weight, adam = start(shape), Adam()
    dim, limit = (0 if shape[0] < shape[1] else 1), None
    for step in range(STEPS):
        gradient = gradients(shape, step)
        if step % OPTIONS["update_proj_gap"] == 0:
            left, _, right = torch.linalg.svd(gradient.float(), full_matrices=False)
            left, right = left.double()[:, : OPTIONS["rank"]], right.double()[: OPTIONS["rank"]]
        projected = gradient @ right.T if dim else left.T @ gradient
        update = adam.update(projected)
        norms = {"dim": dim, "keepdim": True} if scale_type == "channel" else {}
        scaled = gradient * update.norm(**norms) / (projected.norm(**norms) + 1e-8)
        scaled *= math.sqrt(OPTIONS["scale"]) if front else 1.0
        # The norm grows by at most 1 % in a step (Chen et al. 2024).
        factor = 1.0 if limit is None else max(float(scaled.norm()) / (limit + 1e-8), 1.01) / 1.01
        scaled, limit = scaled / factor, float(scaled.norm()) / factor
        weight -= adam.rate * scaled * (1.0 if front else math.sqrt(OPTIONS["scale"]))
        weight *= 1 - RATE * DECAY
    found = trained("apollo", shape, proj="svd", scale_type=scale_type, scale_front=front)
    torch.testing.assert_close(found.q_proj.weight.detach(), weight, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("optimizer", ["galore", "apollo", "fira"])
def test_a_target_decides_which_matrices_are_projected(optimizer):
    shape = (6, 10)
    every = trained(optimizer, shape)
    some = trained(optimizer, shape, target=["q_pro.$"])
    assert torch.equal(some.q_proj.weight, every.q_proj.weight)
    adamw = torch.zeros(shape, dtype=torch.float64)
    torch.manual_seed(0)
    adamw = nn.Parameter(Layer(shape).o_proj.weight.detach().clone())
    reference = torch.optim.AdamW([adamw], lr=RATE, betas=BETAS, eps=EPSILON, weight_decay=DECAY)
    for step in range(STEPS):
        adamw.grad = gradients(shape, step)
        reference.step()
    torch.testing.assert_close(some.o_proj.weight, adamw, rtol=5e-3, atol=5e-4)
    assert not torch.allclose(every.o_proj.weight, adamw, rtol=5e-3, atol=5e-4)


def test_a_target_means_the_models_own_names():
    """The loss that is trained holds the model of transformers, whose names begin with ``model.layers``."""
    parameters = {f"model.model.layers.{index}.q_proj.weight": nn.Parameter(torch.zeros(2, 2)) for index in range(11)}
    chosen, others = by_target(nn.Module(), parameters, [r"^model\.layers\.1\.q_proj$"])
    assert list(chosen) == ["model.model.layers.1.q_proj.weight"]
    assert len(others) == 10


def test_a_target_that_is_nowhere_is_refused():
    with pytest.raises(RequestError) as caught:
        trained("galore", (6, 10), target=["q_proj", "w_proj"])
    assert holds(str(caught.value), "train.optimizer_target … 'w_proj' … o_proj, q_proj, or all")
