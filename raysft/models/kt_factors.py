"""LoRA of experts, exchanged between peft's weights and those of KTransformers' kernel."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from raysft.models.kt_internals import Factors


class Given:
    """An adapter's weights as peft stores them, exchanged with the kernel's.

    peft stacks the experts' A vertically [experts · rank, inputs], and their B side by side [outputs, rank · experts].
    """

    def __init__(self, scales: tuple[float, float], factors: Sequence[torch.Tensor | None]) -> None:
        self.scales, self.factors = scales, tuple(factors)

    def same(self, other: Given) -> bool:
        """Return True for the same tensors."""
        return self.scales == other.scales and same_memory(self.factors, other.factors)

    def fill(self, target: Factors) -> None:
        """Copy the weights to the kernel's, and zeros where there is no adapter."""
        for (a, b), scale, matrices in zip(self._pairs(), self.scales, products(target), strict=True):
            for number, (to_a, to_b) in enumerate(matrices):
                if a is None or b is None:
                    to_b.zero_()  # then A has no effect
                    continue
                experts, outputs = to_b.shape[:2]
                rank = len(a) // experts
                to_a[:, :rank].copy_(a.detach().view(experts, rank, -1))
                part = b.detach()[number * outputs : (number + 1) * outputs]
                to_b[:, :, :rank].copy_(part.view(outputs, rank, experts).permute(2, 0, 1) * scale)
                to_a[:, rank:].zero_()
                to_b[:, :, rank:].zero_()

    def add(self, sums: Sequence[torch.Tensor | None], source: Factors) -> None:
        """Add the kernel's gradients to sums in peft's form."""
        pairs = zip(sums[::2], sums[1::2], self.scales, products(source), strict=True)
        for of_a, of_b, scale, matrices in pairs:
            if of_a is None or of_b is None:
                continue
            for number, (from_a, from_b) in enumerate(matrices):
                experts, outputs = from_b.shape[:2]
                rank = len(of_a) // experts
                of_a.view(experts, rank, -1).add_(from_a[:, :rank].to(of_a.device))
                part = of_b[number * outputs : (number + 1) * outputs].view(outputs, rank, experts)
                part.add_(from_b[:, :, :rank].permute(1, 2, 0).to(of_b.device), alpha=scale)

    def _pairs(self) -> Iterator[tuple[torch.Tensor | None, torch.Tensor | None]]:
        return zip(self.factors[::2], self.factors[1::2], strict=True)


def products(factors: Factors) -> tuple[tuple[tuple[torch.Tensor, torch.Tensor], ...], ...]:
    """A and B of the kernel's products, by the weights of transformers that hold them."""
    gate_a, gate_b, up_a, up_b, down_a, down_b = factors
    return ((gate_a, gate_b), (up_a, up_b)), ((down_a, down_b),)


def same_memory(ones: Sequence[torch.Tensor | None], others: Sequence[torch.Tensor | None]) -> bool:
    """Return True if tensors have the same memory: what is computed again is handed over under new names."""
    return all(
        one is other or (one is not None and other is not None and one.data_ptr() == other.data_ptr()
                         and one.shape == other.shape)
        for one, other in zip(ones, others, strict=True)
    )  # fmt: skip
