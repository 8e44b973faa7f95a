"""Norms, RoPE and SwiGLU on a GPU: autograd around the Triton kernels of triton_elementwise_kernels.py.

The plain formulas are RMSNorm in norm.py, and `_rotate` and `MLP` in modeling.py; here each is one pass over memory,
forward and backward, in float32 at least and rounded once. Deterministic: gradients of norm weights are partial sums
that torch.sum adds up, in an order that depends on the shapes only.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from hymba_tune.model.ops import triton_elementwise_kernels as kernels
from hymba_tune.model.ops.triton_scan import rows_of

# Elements of a program where rows are narrow; wide rows have a program each.
ELEMENTS = 2048
# Elements of a row that one warp holds: 3,200 of three tensors fit the registers twice on a multiprocessor.
OF_A_WARP = 512
# Programs of a norm's backward pass: four for each multiprocessor of an H100 or H200.
PROGRAMS = 528


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (.., C), weight (C,) -> x / rms(x) * weight in x's dtype."""
    return _RMSNorm.apply(_rows(x), weight.contiguous(), eps).view(x.shape)


def mean_of_norms(a: Tensor, weight_a: Tensor, b: Tensor, weight_b: Tensor, eps: float) -> Tensor:
    """(rms_norm(a) + rms_norm(b)) / 2 of a, b (.., C) in one pass."""
    weights = (weight_a.contiguous(), weight_b.contiguous())
    return _MeanOfNorms.apply(_rows(a), _rows(b), *weights, eps).view(a.shape)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on x (T, heads, d), which may be strided; the table's cos and sin (T, 1, d) hold each angle twice."""
    return _Rotate.apply(rows_of(x), cos.contiguous(), sin.contiguous())


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, of one shape."""
    return _SwiGLU.apply(gate.contiguous(), up.contiguous())


def _rows(x: Tensor) -> Tensor:
    """(.., C) -> (rows, C)."""
    return rows_of(x.reshape(-1, x.shape[-1]))


def _wide(*tensors: Tensor) -> torch.dtype:
    """What is computed in."""
    dtype = torch.float32
    for t in tensors:
        dtype = torch.promote_types(dtype, t.dtype)
    return dtype


class _RMSNorm(torch.autograd.Function):
    """x (T, C), rows may be strided; weight (C,)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, scales = _empty(x), x.new_empty(len(x), dtype=_wide(x))
        _by_rows(kernels.norm, x.shape, x=x, weight=weight, y=y, scales=scales, x_row=x.stride(0), EPS=eps)
        ctx.save_for_backward(x, weight, scales)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scales = ctx.saved_tensors
        dx, dy, dweight = _empty(x), rows_of(dy), _parts(x, scales)
        _by_rows(kernels.norm_gradient, x.shape, len(dweight), x=x, weight=weight, scales=scales, dy=dy, dx=dx,
                 dweight=dweight, x_row=x.stride(0), dy_row=dy.stride(0))  # fmt: skip
        return dx, dweight.sum(0).to(weight.dtype), None


class _MeanOfNorms(torch.autograd.Function):
    """a, b (T, C), rows may be strided; weights (C,)."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, weight_a: Tensor, weight_b: Tensor, eps: float) -> Tensor:
        y = _empty(a, torch.promote_types(a.dtype, b.dtype))
        scales_a, scales_b = (a.new_empty(len(a), dtype=_wide(y)) for _ in range(2))
        _by_rows(kernels.mean_of_norms, a.shape, a=a, b=b, weight_a=weight_a, weight_b=weight_b, y=y,
                 scales_a=scales_a, scales_b=scales_b, a_row=a.stride(0), b_row=b.stride(0), EPS=eps)  # fmt: skip
        ctx.save_for_backward(a, b, weight_a, weight_b, scales_a, scales_b)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        a, b, weight_a, weight_b, scales_a, scales_b = ctx.saved_tensors
        da, db, dy = _empty(a), _empty(b), rows_of(dy)
        dweight_a, dweight_b = _parts(a, scales_a), _parts(b, scales_b)
        _by_rows(kernels.mean_of_norms_gradient, a.shape, len(dweight_a), a=a, b=b, weight_a=weight_a,
                 weight_b=weight_b, scales_a=scales_a, scales_b=scales_b, dy=dy, da=da, db=db, dweight_a=dweight_a,
                 dweight_b=dweight_b, a_row=a.stride(0), b_row=b.stride(0), dy_row=dy.stride(0))  # fmt: skip
        return da, db, dweight_a.sum(0).to(weight_a.dtype), dweight_b.sum(0).to(weight_b.dtype), None


class _Rotate(torch.autograd.Function):
    """x (T, heads, d), heads and tokens may be strided; cos, sin (T, 1, d)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(rows_of(dy), cos, sin, -1), None, None


class _SwiGLU(torch.autograd.Function):
    """gate, up without gaps."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        y = _empty(gate, torch.promote_types(gate.dtype, up.dtype))
        _by_elements(kernels.swiglu, gate=gate, up=up, y=y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        dgate, dup = _empty(gate), _empty(up)
        _by_elements(kernels.swiglu_gradient, gate=gate, up=up, dy=dy.contiguous(), dgate=dgate, dup=dup)
        return dgate, dup


def _empty(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Without the gaps that `like` may have."""
    return torch.empty(like.shape, dtype=dtype or like.dtype, device=like.device)


def _tile(columns: int) -> tuple[int, int]:
    """Rows and padded columns of a program."""
    padded = triton.next_power_of_2(columns)
    return max(1, min(32, ELEMENTS // padded)), padded


def _parts(x: Tensor, scales: Tensor) -> Tensor:
    """Room for the weight's gradient from each program of the backward pass."""
    programs = min(PROGRAMS, triton.cdiv(len(x), _tile(x.shape[1])[0]))
    return scales.new_empty(programs, x.shape[1])


def _by_rows(kernel: Any, shape: torch.Size, programs: int | None = None, **arguments: Any) -> None:
    """Over rows (T, C); a program for each tile of rows unless told otherwise."""
    tokens, size = shape
    rows, padded = _tile(size)
    grid = triton.cdiv(tokens, rows) if programs is None else programs
    warps = max(4, rows * padded // OF_A_WARP)
    if tokens:
        kernel[(grid,)](**arguments, tokens=tokens, size=size, ROWS=rows, COLS=padded, num_warps=warps)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    y = _empty(x)
    tokens, heads, dim = x.shape
    rows, padded = _tile(dim // 2)
    strides = {"x_token": x.stride(0), "x_head": x.stride(1)}
    constants = {"SIGN": sign, "HEADS": heads, "HALF": dim // 2, "ROWS": rows, "COLS": padded}
    if tokens:
        grid = (triton.cdiv(tokens * heads, rows),)
        kernels.rotate[grid](x=x, cos=cos, sin=sin, y=y, rows=tokens * heads, **strides, **constants)
    return y


def _by_elements(kernel: Any, gate: Tensor, up: Tensor, **arguments: Any) -> None:
    wide = tl.float64 if _wide(gate, up) == torch.float64 else tl.float32
    if gate.numel():
        grid = (triton.cdiv(gate.numel(), ELEMENTS),)
        kernel[grid](gate=gate, up=up, **arguments, elements=gate.numel(), WIDE=wide, BLOCK=ELEMENTS)
