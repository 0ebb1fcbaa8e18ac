"""The functions that ``fused_layers`` puts into a decoder's layers, with their gradients; float32 on CPUs.

Each says what it computes; ``g`` is the gradient of the output. Intermediate results that nothing else needs are overwritten,
since memory takes longer than arithmetic. None has a second derivative.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd import Function
from torch.autograd.function import once_differentiable


class LoraLinear(Function):
    """x Wᵀ + bias + scaling · x Aᵀ Bᵀ, W and the bias being frozen: they get no gradient (Hu et al. 2021).

    The product with B is added where the product with W lies, so that neither it nor its scaling nor the sum is a separate
    tensor; the same in the gradient of x.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        """
        Args:
            x: […, inputs].
            weight: [outputs, inputs].
            bias: [outputs].
            a: [rank, inputs].
            b: [outputs, rank].
            scaling: factor of the adapter.

        Returns:
            […, outputs].
        """
        rows = x.reshape(-1, x.shape[-1])
        low = (rows @ a.t()).mul_(scaling)
        y = F.linear(rows, weight, bias).addmm_(low, b.t())
        ctx.save_for_backward(rows, low, weight, a, b)
        ctx.scaling, ctx.shape, ctx.has_bias = scaling, x.shape, bias is not None
        return y.view(*x.shape[:-1], weight.shape[0])  # -1 is undefined for no rows, as of an expert without tokens

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        rows, low, weight, a, b = ctx.saved_tensors
        g = gradients[0].reshape(-1, gradients[0].shape[-1])
        g_low = (g @ b).mul_(ctx.scaling)
        g_x = (g @ weight).addmm_(g_low, a).view(ctx.shape) if ctx.needs_input_grad[0] else None
        # As (lowᵀ g)ᵀ: the product is faster with the long side last.
        return g_x, None, None, g_low.t() @ rows, (low.t() @ g).t(), None


class RmsNorm(Function):
    """weight · x · r with r = 1 / √(mean(x²) + ε) over the last dimension (Zhang and Sennrich 2019)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        """
        Args:
            x: […, size].
            weight: [size].
            epsilon: ε.
        """
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        r = norm.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight, r)
        return (x * r).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        """The gradient of x is r · (g w) − x · r³ · mean(g w x)."""
        x, weight, r = ctx.saved_tensors
        g = gradients[0]
        g_weight = None
        if ctx.needs_input_grad[1]:
            g_weight = (x * r).mul_(g).reshape(-1, x.shape[-1]).sum(0)
        if not ctx.needs_input_grad[0]:
            return None, g_weight, None
        g_x = g * weight
        mean = (g_x * x).mean(-1, keepdim=True)
        return g_x.mul_(r).addcmul_(x, mean.mul_(r.pow(3)), value=-1), g_weight, None


class Rotary(Function):
    """Rotate pairs of elements, half a head apart, by angles that grow with the position (Su et al. 2021)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """
        Args:
            x: [rows, heads, tokens, size].
            cos: [rows, 1, tokens, size], cosine of the angle of each element; no gradient.
            sin: sine, as ``cos``.
        """
        ctx.save_for_backward(cos, sin)
        half, y = x.shape[-1] // 2, x * cos
        y[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
        y[..., half:].addcmul_(x[..., :half], sin[..., half:])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        cos, sin = ctx.saved_tensors
        g = gradients[0]
        half, g_x = g.shape[-1] // 2, g * cos
        g_x[..., :half].addcmul_(g[..., half:], sin[..., half:])
        g_x[..., half:].addcmul_(g[..., :half], sin[..., :half], value=-1)
        return g_x, None, None


class SwiGlu(Function):
    """silu(gate) · up (Shazeer 2020); silu(gate) is computed again for the gradient rather than kept."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """Both and the result: […, size]."""
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        gate, up = ctx.saved_tensors
        g = gradients[0]
        return torch.ops.aten.silu_backward(g * up, gate), F.silu(gate).mul_(g)
