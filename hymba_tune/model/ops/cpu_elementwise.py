"""Norms, RoPE and SwiGLU on the CPU: autograd around the compiled kernels of cpu_kernels/elementwise.h.

The plain formulas are RMSNorm in norm.py, and `_rotate` and `MLP` in modeling.py; here each is one pass over memory,
computed in float32 at least and rounded once. The same bits come from any number of threads. Decoding calls these with
few rows, where Python's part of a call counts: it is kept short, and skips autograd where no gradient is wanted.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hymba_tune.model.ops import cpu_library

# Of each C function, what it takes after the threads: a whole number, a float64 or a pointer, which may be NULL.
_TAKES = {
    "norms": "ii d pip pip p",
    "norms_gradient": "ii d pip pip pi pppp",
    "rotate": "iii pii pp i p",
    "swiglu": "i ppp",
    "swiglu_gradient": "i ppppp",
}
_C_TYPES = {"i": ctypes.c_int64, "d": ctypes.c_double, "p": ctypes.c_void_p}
# Elements from which more threads than one are worth their start: what torch takes for its own operations.
_ELEMENTS_OF_A_THREAD = 32_768


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (.., C), weight (C,) -> x / rms(x) * weight in x's dtype."""
    io, wide = _computed_in(x.dtype)
    y = _apply(_MeanOfNorms, _rows(x, io), _whole(weight, wide), None, None, eps)
    return _as(y if x.dim() == 2 else y.view(x.shape), x.dtype)


def mean_of_norms(a: Tensor, weight_a: Tensor, b: Tensor, weight_b: Tensor, eps: float) -> Tensor:
    """(rms_norm(a) + rms_norm(b)) / 2 of a, b (.., C) in one pass."""
    dtype = torch.promote_types(a.dtype, b.dtype)
    io, wide = _computed_in(dtype)
    y = _apply(_MeanOfNorms, _rows(a, io), _whole(weight_a, wide), _rows(b, io), _whole(weight_b, wide), eps)
    return _as(y if a.dim() == 2 else y.view(a.shape), dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on x (T, heads, d), which may be strided; the table's cos and sin (T, 1, d) hold each angle twice."""
    io, wide = _computed_in(x.dtype)
    y = _apply(_Rotate, cpu_library.rows_of(_as(x, io)), _whole(cos, wide), _whole(sin, wide))
    return _as(y, x.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, of one shape."""
    dtype = torch.promote_types(gate.dtype, up.dtype)
    io, _ = _computed_in(dtype)
    return _as(_apply(_SwiGLU, _whole(gate, io), _whole(up, io)), dtype)


class _MeanOfNorms(torch.autograd.Function):
    """a, b (T, C), rows may be strided; weights (C,). Without b and its weight a's norm alone."""

    @staticmethod
    def compute(a: Tensor, weight_a: Tensor, b: Tensor | None, weight_b: Tensor | None, eps: float) -> Tensor:
        _fits(b is None or a.shape == b.shape, a, b)
        y = _empty(a)
        _call("norms", a, *a.shape, eps, *_norm(a, weight_a), *_norm(b, weight_b), y.data_ptr())
        return y

    @staticmethod
    def forward(ctx: Any, a: Tensor, weight_a: Tensor, b: Tensor | None, weight_b: Tensor | None, eps: float) -> Tensor:
        ctx.save_for_backward(a, weight_a, b, weight_b)
        ctx.eps = eps
        return _MeanOfNorms.compute(a, weight_a, b, weight_b, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        a, weight_a, b, weight_b = inputs = ctx.saved_tensors
        dy = cpu_library.rows_of(dy)
        wanted = (True, ctx.needs_input_grad[1], b is not None, ctx.needs_input_grad[3])
        grads = [_empty(t) if want else None for t, want in zip(inputs, wanted, strict=True)]
        da, dweight_a, db, dweight_b = map(_pointer, grads)
        _call("norms_gradient", a, *a.shape, ctx.eps, *_norm(a, weight_a), *_norm(b, weight_b),
              dy.data_ptr(), dy.stride(0), da, db, dweight_a, dweight_b)  # fmt: skip
        return *grads, None


class _Rotate(torch.autograd.Function):
    """x (T, heads, d), heads and tokens may be strided; cos, sin (T, 1, d)."""

    @staticmethod
    def compute(x: Tensor, cos: Tensor, sin: Tensor, sign: int = 1) -> Tensor:
        tokens, heads, size = x.shape
        _fits(size % 2 == 0 and cos.numel() == sin.numel() == tokens * size, x, cos, sin)
        y = _empty(x)
        strides, table = x.stride(), (cos.data_ptr(), sin.data_ptr())
        _call("rotate", x, tokens, heads, size // 2, x.data_ptr(), strides[0], strides[1], *table, sign, y.data_ptr())
        return y

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _Rotate.compute(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _Rotate.compute(cpu_library.rows_of(dy), cos, sin, sign=-1), None, None


class _SwiGLU(torch.autograd.Function):
    """gate, up without gaps."""

    @staticmethod
    def compute(gate: Tensor, up: Tensor) -> Tensor:
        _fits(gate.shape == up.shape, gate, up)
        y = _empty(gate)
        _call("swiglu", gate, gate.numel(), gate.data_ptr(), up.data_ptr(), y.data_ptr())
        return y

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _SwiGLU.compute(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        dy, dgate, dup = dy.contiguous(), _empty(gate), _empty(up)
        _call("swiglu_gradient", gate, gate.numel(), *map(_pointer, (gate, up, dy, dgate, dup)))
        return dgate, dup


def _apply(function: Any, *inputs: Any) -> Tensor:
    """Recorded by autograd only where that has gradients to give."""
    wanted = torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in inputs)
    y: Tensor = function.apply(*inputs) if wanted else function.compute(*inputs)
    return y


def _norm(x: Tensor | None, weight: Tensor | None) -> tuple[int | None, int, int | None]:
    """A norm's x, the elements between its rows, and weight for the C function."""
    if x is None or weight is None:
        return None, 0, None
    _fits(weight.numel() == x.shape[1], x, weight)
    return x.data_ptr(), x.stride(0), weight.data_ptr()


def _fits(so: bool, *tensors: Tensor | None) -> None:
    """C reads what the pointers point at, whatever the shapes: they are held against each other before."""
    if not so:
        raise ValueError(f"shapes do not fit: {', '.join(str(tuple(t.shape)) for t in tensors if t is not None)}")


def _call(name: str, like: Tensor, *arguments: float | None) -> None:
    """The C function for the dtype of `like`, with the threads that are worth their start for its size."""
    threads = 1 if like.numel() < _ELEMENTS_OF_A_THREAD else torch.get_num_threads()
    _kernel(name, like.dtype)(threads, *arguments)


@functools.cache
def _kernel(name: str, dtype: torch.dtype) -> Any:
    kernel = cpu_library.kernel(name, dtype)
    kernel.argtypes = [ctypes.c_int64, *(_C_TYPES[letter] for letter in _TAKES[name].replace(" ", ""))]
    kernel.restype = None
    return kernel


@functools.cache
def _computed_in(dtype: torch.dtype) -> tuple[torch.dtype, torch.dtype]:
    """What the kernels read and write, and what they compute in."""
    io = cpu_library.io_dtype(dtype)
    return io, torch.promote_types(io, torch.float32)


def _pointer(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


def _empty(like: Tensor) -> Tensor:
    """Without the gaps that `like` may have."""
    return torch.empty_like(like, memory_format=torch.contiguous_format)


def _rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(.., C) -> (rows, C)."""
    return cpu_library.rows_of(_as(x if x.dim() == 2 else x.reshape(-1, x.shape[-1]), dtype))


def _whole(t: Tensor, dtype: torch.dtype) -> Tensor:
    return _as(t, dtype).contiguous()


def _as(t: Tensor, dtype: torch.dtype) -> Tensor:
    """t.to(dtype), which takes longer to find that there is nothing to do."""
    return t if t.dtype == dtype else t.to(dtype)
