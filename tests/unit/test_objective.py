"""Losses and their gradients against straightforward formulas in float64."""

from __future__ import annotations

import math

import pytest
import torch

from raysft.data.types import IGNORE_INDEX
from raysft.train.objective import Objective, embedding_noise

VOCABULARY = 50


@pytest.fixture
def logits() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(7, VOCABULARY, generator=generator) * 3).requires_grad_()


TARGETS = torch.tensor([3, 0, 49, 7, IGNORE_INDEX, 7, 20])


def cross_entropy(row: list[float], target: int) -> float:
    largest = max(row)
    return largest + math.log(sum(math.exp(value - largest) for value in row)) - row[target]


def probabilities(row: list[float]) -> list[float]:
    return [math.exp(-cross_entropy(row, index)) for index in range(len(row))]


def smoothed(row, target):
    return 0.9 * cross_entropy(row, target) + 0.1 * sum(cross_entropy(row, i) for i in range(len(row))) / len(row)


def dft(row, target):
    return probabilities(row)[target] * cross_entropy(row, target)


def eaft(row, target):
    top = sorted(row, reverse=True)[:20]
    entropy = -sum(p * math.log(p) for p in probabilities(top))
    return (entropy / 3) ** 2 * cross_entropy(row, target)


def with_z(row, target):
    whole = cross_entropy(row, target) + row[target]
    return cross_entropy(row, target) + 0.01 * whole**2


def other_logits() -> torch.Tensor:
    """Those of a frozen model."""
    return torch.randn(7, VOCABULARY, generator=torch.Generator().manual_seed(2)) * 2


def divergence(row: list[float], other: list[float]) -> float:
    """KL(other ‖ row)."""
    pairs = zip(probabilities(other), probabilities(row), strict=True)
    return sum(q * (math.log(q) - math.log(p)) for q, p in pairs)


CASES = {
    "cross_entropy": (Objective(), cross_entropy),
    "label_smoothing": (Objective(label_smoothing=0.1), smoothed),
    "dft": (Objective("dft"), dft),
    "eaft": (Objective("eaft", eaft_alpha=2.0), eaft),
    "z_loss": (Objective(z_loss=0.01), with_z),
}


@pytest.mark.parametrize("name", CASES)
def test_a_loss_is_its_formula(logits, name):
    objective, formula = CASES[name]
    losses = objective(logits, TARGETS)
    expected = [0.0 if t < 0 else formula(row, t) for row, t in zip(logits.tolist(), TARGETS.tolist(), strict=True)]
    torch.testing.assert_close(losses.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_a_gradient_is_that_of_its_formula(logits, name):
    """Against finite differences in float64; the weights of DFT and EAFT are constants by definition."""
    objective, formula = CASES[name]
    objective(logits, TARGETS).sum().backward()
    assert logits.grad is not None
    values = logits.detach().double()
    step = 1e-6
    for row, target in ((0, 3), (2, 49), (5, 7)):
        base = values[row].tolist()
        constant = formula(base, target) / cross_entropy(base, target) if name in ("dft", "eaft") else None
        for column in (0, 3, 7, 33, 49):
            found = []
            for sign in (1, -1):
                moved = list(base)
                moved[column] += sign * step
                found.append(formula(moved, target) if constant is None else constant * cross_entropy(moved, target))
            expected = (found[0] - found[1]) / (2 * step)
            assert logits.grad[row, column].item() == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert not logits.grad[4].any()


def test_asft_is_dft_and_the_divergence_from_the_reference(logits):
    others = other_logits()
    losses = Objective("asft", z_loss=0.01, asft_alpha=0.3)(logits, TARGETS, others)
    expected = [
        0.0 if t < 0 else dft(row, t) + 0.3 * divergence(row, other) + 0.01 * (cross_entropy(row, t) + row[t]) ** 2
        for row, other, t in zip(logits.tolist(), others.tolist(), TARGETS.tolist(), strict=True)
    ]
    torch.testing.assert_close(losses.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-6)


def test_the_gradient_of_asft_is_that_of_its_formula(logits):
    """w (p − 1[target]) + α (p − q): the gradients of the two terms, w being the target's probability."""
    others = other_logits()
    Objective("asft", asft_alpha=0.3)(logits, TARGETS, others).sum().backward()
    assert logits.grad is not None
    for index, target in enumerate(TARGETS.tolist()):
        row, other = probabilities(logits[index].double().tolist()), probabilities(others[index].double().tolist())
        expected = [
            0.0 if target < 0 else row[target] * (p - (column == target)) + 0.3 * (p - q)
            for column, (p, q) in enumerate(zip(row, other, strict=True))
        ]
        assert logits.grad[index].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_asft_without_a_divergence_is_dft(logits):
    assert torch.equal(Objective("asft")(logits, TARGETS, logits.detach()), Objective("dft")(logits, TARGETS))


def test_noise_on_embeddings_is_bounded_by_the_length_of_each_example():
    noise = embedding_noise(torch.tensor([[4, 4, 4, 4, 1], [9] * 5]), 16, 5.0)
    limit = torch.tensor([[0.625] * 4 + [1.25], [5 / 12] * 5])
    assert (noise.abs() <= limit[..., None]).all()
    assert (noise.abs().amax(-1) > 0.6 * limit).all()
    assert abs(noise.mean().item()) < 0.1
