"""Selective scan and causal conv on the CPU: autograd around the compiled kernels of cpu_kernels/.

Signatures and shapes: reference.py; meta tokens as in meta_first.py. States go in and come out as (S, Dn, n) views of
(S, n, Dn) memory, the layout that the kernels vectorise over; a state that is fed back therefore costs no copy. To the
kernels meta tokens are a segment more, the first; the state that it leaves is the initial state of the others.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hymba_tune.model.ops import cpu_library, segments
from hymba_tune.model.ops.cpu_library import io_dtype, kernel, rows_of, structure

# Bytes of the widest vector: the kept states are padded to a multiple of that.
VECTOR_BYTES = 64


_Scan = structure(
    "threads segments channels states meta cu_seqlens x gate x_stride gate_stride dt_stride"
    " dt A B C D initial initial_stride checkpoints",
    integers="threads segments channels states meta x_stride gate_stride dt_stride initial_stride",
)
_ScanGradients = structure("y final x gate dt A B C D initial", integers="")
_Conv = structure(
    "threads segments channels taps meta cu_seqlens x x_stride weight bias initial initial_stride",
    integers="threads segments channels taps meta x_stride initial_stride",
)
_ConvGradients = structure("y final x weight bias initial", integers="")


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    gate: Tensor,
    cu_seqlens: Tensor,
    initial_state: Tensor | None = None,
    num_meta: int = 0,
) -> tuple[Tensor, Tensor]:
    """Compiled; see reference.selective_scan and meta_first.selective_scan.

    Raises:
        ValueError: an initial_state beside meta tokens.
    """
    segments.refuse_two_beginnings(num_meta, initial_state)
    io = io_dtype(torch.promote_types(x.dtype, gate.dtype))
    wide = torch.promote_types(io, torch.float32)
    rates, B, C, D = A.to(wide).t().contiguous(), B.to(wide).contiguous(), C.to(wide).contiguous(), D.to(wide)
    dt, state = rows_of(dt.to(wide)), _state_in(initial_state, wide)
    inputs = (rows_of(x.to(io)), dt, rates, B, C, D.contiguous(), rows_of(gate.to(io)), state)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    y, final = _SelectiveScan.apply(*inputs, _boundaries(cu_seqlens, num_meta), num_meta > 0, keep)
    return y.to(x.dtype), final.transpose(1, 2)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    cu_seqlens: Tensor,
    initial_state: Tensor | None = None,
    num_meta: int = 0,
) -> tuple[Tensor, Tensor]:
    """Compiled; see reference.causal_conv1d and meta_first.causal_conv1d.

    Raises:
        ValueError: an initial_state beside meta tokens.
    """
    segments.refuse_two_beginnings(num_meta, initial_state)
    io = io_dtype(x.dtype)
    wide = torch.promote_types(io, torch.float32)
    y, final = _CausalConv1d.apply(
        rows_of(x.to(io)),
        weight.to(wide).t().contiguous(),
        bias.to(wide).contiguous(),
        _state_in(initial_state, io),
        _boundaries(cu_seqlens, num_meta),
        num_meta > 0,
    )
    return y.to(x.dtype), final.transpose(1, 2).to(x.dtype)


class _SelectiveScan(torch.autograd.Function):
    """Rates (N, Dn), states (S or 1, N, Dn), the rest as in reference.selective_scan; rows may be strided."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dt: Tensor,
        rates: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor,
        gate: Tensor,
        initial: Tensor | None,
        cu_seqlens: Tensor,
        meta: bool,
        keep: bool,
    ) -> tuple[Tensor, Tensor]:
        tokens, channels = x.shape
        lanes = VECTOR_BYTES // dt.element_size()
        chunk = ctypes.c_int64.in_dll(cpu_library.load(), "scan_chunk").value
        kept = dt.new_empty(tokens // chunk if keep else 0, len(rates), -(-channels // lanes) * lanes)
        y = x.new_empty(tokens, channels)
        final = dt.new_empty(len(cu_seqlens) - 1 - meta, *rates.shape)
        initial = dt.new_empty(1, *rates.shape) if meta else initial
        inputs = (x, dt, rates, B, C, D, gate, initial, cu_seqlens, kept)
        kernel("scan_forward", x.dtype)(ctypes.byref(_scan(meta, *inputs)), _pointer(y), _pointer(final))
        ctx.save_for_backward(*inputs)
        ctx.meta = meta
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        dy, dfinal = (g.contiguous() for g in upstream)
        grads = [torch.empty(t.shape, dtype=t.dtype) for t in inputs[:7]]
        dx, ddt, drates, dB, dC, dD, dgate = grads
        dinitial = torch.zeros_like(inputs[7]) if ctx.needs_input_grad[7] else None
        pointers = map(_pointer, (dy, dfinal, dx, dgate, ddt, drates, dB, dC, dD, dinitial))
        kernel("scan_backward", dx.dtype)(
            ctypes.byref(_scan(ctx.meta, *inputs)), ctypes.byref(_ScanGradients(*pointers))
        )
        return (*grads, dinitial, None, None, None)


class _CausalConv1d(torch.autograd.Function):
    """Weight (K, Dn), states (S or 1, K, Dn), the rest as in reference.causal_conv1d; rows of x may be strided."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, initial: Tensor | None, cu_seqlens: Tensor, meta: bool
    ) -> tuple[Tensor, Tensor]:
        y = x.new_empty(x.shape)
        final = x.new_empty(len(cu_seqlens) - 1 - meta, *weight.shape)
        initial = x.new_empty(1, *weight.shape) if meta else initial
        inputs = (x, weight, bias, initial, cu_seqlens)
        kernel("conv_forward", x.dtype)(ctypes.byref(_conv(meta, *inputs)), _pointer(y), _pointer(final))
        ctx.save_for_backward(*inputs)
        ctx.meta = meta
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        x, weight, bias, initial, _ = inputs
        dy, dfinal = (g.contiguous() for g in upstream)
        dx, dweight, dbias = (torch.empty(t.shape, dtype=t.dtype) for t in (x, weight, bias))
        dinitial = torch.zeros(initial.shape, dtype=weight.dtype) if ctx.needs_input_grad[3] else None
        pointers = map(_pointer, (dy, dfinal, dx, dweight, dbias, dinitial))
        kernel("conv_backward", x.dtype)(
            ctypes.byref(_conv(ctx.meta, *inputs)), ctypes.byref(_ConvGradients(*pointers))
        )
        return dx, dweight, dbias, dinitial, None, None


def _scan(
    meta: bool,
    x: Tensor,
    dt: Tensor,
    rates: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    gate: Tensor,
    initial: Tensor | None,
    cu_seqlens: Tensor,
    kept: Tensor,
) -> ctypes.Structure:
    states, channels = rates.shape
    shape = (torch.get_num_threads(), len(cu_seqlens) - 1, channels, states, meta)
    rows = (*map(_pointer, (cu_seqlens, x, gate)), x.stride(0), gate.stride(0), dt.stride(0))
    rest = (*map(_pointer, (dt, rates, B, C, D, initial)), _segment_stride(initial), _pointer(kept))
    return _Scan(*shape, *rows, *rest)


def _conv(
    meta: bool, x: Tensor, weight: Tensor, bias: Tensor, initial: Tensor | None, cu_seqlens: Tensor
) -> ctypes.Structure:
    taps, channels = weight.shape
    shape = (torch.get_num_threads(), len(cu_seqlens) - 1, channels, taps, meta, _pointer(cu_seqlens))
    rest = (_pointer(x), x.stride(0), *map(_pointer, (weight, bias, initial)), _segment_stride(initial))
    return _Conv(*shape, *rest)


def _pointer(t: Tensor | None) -> ctypes.c_void_p:
    """NULL for None and for tensors without elements."""
    return ctypes.c_void_p(t.data_ptr() if t is not None and t.numel() else None)


def _boundaries(cu_seqlens: Tensor, num_meta: int) -> Tensor:
    """(S + 1,) -> the same without gaps, or with the meta tokens as one more segment in front."""
    ends = segments.boundaries(cu_seqlens, cu_seqlens.device)
    if not num_meta:
        return ends
    return segments.kept(ends, ("behind", num_meta), lambda: torch.cat([ends.new_zeros(1), ends + num_meta]))


def _segment_stride(state: Tensor | None) -> int:
    """0 for a state that all segments share."""
    return 0 if state is None or len(state) == 1 else state.stride(0)


def _state_in(state: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """(S, Dn, n) -> (S, n, Dn), contiguous."""
    return None if state is None else state.to(dtype).transpose(1, 2).contiguous()
