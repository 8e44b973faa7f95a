"""RMSNorm with a backward of its own: half the passes over memory that autograd makes of the same formula."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, computed in float32 at least; the input's dtype comes back."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _RMSNorm.apply(x, self.weight, self.eps)
        return y


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
