"""RMSNorm with a backward of its own: half the passes over memory that autograd makes of the same formula.

It computes where ops has no kernels: in the reference backend, and on a CPU without a compiler.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hymba_tune.model import ops


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, computed in float32 at least; the input's dtype comes back."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        kernels = ops.elementwise(x.device)
        compute = _RMSNorm.apply if kernels is None else kernels.rms_norm
        y: Tensor = compute(x, self.weight, self.eps)
        return y


def mean_of_norms(norm_a: RMSNorm, a: Tensor, norm_b: RMSNorm, b: Tensor) -> Tensor:
    """(norm_a(a) + norm_b(b)) / 2 for norms of one size and eps."""
    kernels = ops.elementwise(a.device)
    if kernels is None:
        return (norm_a(a) + norm_b(b)) / 2
    mean: Tensor = kernels.mean_of_norms(a, norm_a.weight, b, norm_b.weight, norm_a.eps)
    return mean


class _RMSNorm(torch.autograd.Function):
    """x (.., C), weight (C,) -> (.., C)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True).add_(eps))
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).mul_(weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        normed = x.to(scale.dtype) * scale
        dy = dy.to(scale.dtype)
        d_weight = (dy * normed).flatten(0, -2).sum(0)
        d_normed = dy * weight
        mean = (d_normed * normed).mean(-1, keepdim=True)
        dx = d_normed.sub_(normed.mul_(mean)).mul_(scale)
        return dx.to(x.dtype), d_weight.to(weight.dtype), None
