"""Causal conv on a GPU: autograd around the Triton kernels of triton_conv_kernels.py.

Signature, shapes and semantics: reference.py. Deterministic: sums over tokens are partial sums that torch.sum adds up.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from hymba_tune.model.ops import segments
from hymba_tune.model.ops import triton_conv_kernels as kernels
from hymba_tune.model.ops.triton_scan import rows_of

# Tokens and channels of a program.
TOKENS, BLOCK = 32, 64


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor, cu_seqlens: Tensor, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Triton; see reference.causal_conv1d."""
    wide = torch.promote_types(x.dtype, torch.float32)
    state = None if initial_state is None else initial_state.to(x.dtype).contiguous()
    parameters = (weight.to(wide).contiguous(), bias.to(wide).contiguous())
    ends = segments.boundaries(cu_seqlens, x.device)
    return _CausalConv1d.apply(rows_of(x), *parameters, state, ends, *segments.owners(ends, len(x)))


class _CausalConv1d(torch.autograd.Function):
    """As reference.causal_conv1d; weight and bias in float32 at least, rows of x may be strided."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        initial: Tensor | None,
        cu_seqlens: Tensor,
        segments: Tensor,
        firsts: Tensor,
    ) -> tuple[Tensor, Tensor]:
        launch = _Launch(x, weight, initial, len(cu_seqlens) - 1)
        owners = {"segments": segments, "firsts": firsts}
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        final = x.new_empty(launch.segments_in_all, *weight.shape)
        launch.tokens(kernels.forward, **launch.read, **owners, weight=weight, bias=bias, y=y)
        launch.states(kernels.final_states, **launch.read, cu_seqlens=cu_seqlens, final=final)
        ctx.save_for_backward(x, weight, bias, initial, cu_seqlens, segments, firsts)
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, initial, cu_seqlens, segments, firsts = ctx.saved_tensors
        dy, dfinal = (g.contiguous() for g in upstream)
        launch = _Launch(x, weight, initial, len(cu_seqlens) - 1)
        owners = {"segments": segments, "firsts": firsts}
        dz, dx = weight.new_empty(x.shape), torch.empty(x.shape, dtype=x.dtype, device=x.device)
        dweight, dbias = (weight.new_empty(launch.programs, *t.shape) for t in (weight, bias))
        launch.tokens(kernels.before_silu, **launch.read, **owners, weight=weight, bias=bias, dy=dy, dz=dz,
                      dweight=dweight, dbias=dbias)  # fmt: skip
        after = {"dz": dz, "dfinal": dfinal, "weight": weight, "cu_seqlens": cu_seqlens}
        launch.tokens(kernels.inputs_gradient, **after, segments=segments, dx=dx)
        of_initial = None
        if initial is not None:
            dinitial = weight.new_empty(dfinal.shape)
            launch.states(kernels.initial_gradient, **after, dinitial=dinitial)
            of_initial = dinitial.sum_to_size(initial.shape).to(initial.dtype)
        return dx, dweight.sum(0), dbias.sum(0), of_initial, None, None, None


class _Launch:
    """What the kernels of one call share, by the names of their parameters."""

    def __init__(self, x: Tensor, weight: Tensor, initial: Tensor | None, segments_in_all: int) -> None:
        self.total, self.channels = x.shape
        self.segments_in_all = segments_in_all
        self.taps = weight.shape[1]
        row = int(initial is not None and len(initial) > 1)
        self.read = {"x": x, "x_row": x.stride(0), "initial": initial, "initial_row": row, "GIVEN": initial is not None}
        self.programs = triton.cdiv(self.total, TOKENS)

    def tokens(self, kernel: Any, **arguments: Any) -> None:
        """Over blocks of tokens."""
        if self.total:
            self._run(kernel, self.programs, tokens=self.total, **arguments)

    def states(self, kernel: Any, **arguments: Any) -> None:
        """Over blocks of (segment, slot of its state)."""
        if self.segments_in_all:
            programs = triton.cdiv(self.segments_in_all * self.taps, TOKENS)
            self._run(kernel, programs, segments_in_all=self.segments_in_all, **arguments)

    def _run(self, kernel: Any, programs: int, **arguments: Any) -> None:
        grid = (programs, triton.cdiv(self.channels, BLOCK))
        kernel[grid](**arguments, channels=self.channels, K=self.taps, TOKENS=TOKENS, BLOCK=BLOCK)
