"""Selective scan on a GPU: autograd around the Triton kernels of triton_scan_kernels.py.

Signature, shapes and semantics: reference.py. The stream is cut into chunks of equal length wherever documents start or
end: a document's first token replaces the state by its initial one. One program scans a block of channels token by
token, so every (token, channel, state) costs one exp2, which bounds the time, and no state leaves the registers.
Blocks of channels alone are too few programs for one long document on a large GPU (100 at 3,200 channels), so the scan
has two levels: the state that each chunk adds, a short serial pass that carries them over, then the outputs. The first
level skips what no carry needs, so that documents shorter than a chunk pay for it about half. The backward pass has the
same two levels from the right and computes states again from those that the forward pass kept at every TILE-th token.

Deterministic: no atomics. Sums over channels (gradients of B and C) and over tokens (of A and D) are written as one
partial sum a program and added up by torch.sum, in an order that depends on the shapes only.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from hymba_tune.model.ops import triton_scan_kernels as kernels

# Channels of a program. Wider blocks spill registers, narrower ones make more partial sums for B and C.
BLOCK = 32
# Tokens between kept states: a tile's states and decays fit the registers of the backward kernel.
TILE = 16
WARPS = 4
# Enough chunks to fill the GPU beside the blocks of channels, few enough for the serial pass over them.
CHUNKS, LONGEST_CHUNK = 64, 256
# Terms of the series in softplus that reach the precision of the type.
TERMS = {torch.float32: 8, torch.float64: 18}


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
) -> tuple[Tensor, Tensor]:
    """Triton; see reference.selective_scan."""
    wide = torch.promote_types(x.dtype, torch.float32)
    rates = (A.to(wide) * math.log2(math.e)).contiguous()
    state = None if initial_state is None else initial_state.to(wide).contiguous()
    rows = [rows_of(t) for t in (x, dt.to(wide), B, C, gate)]
    x, dt, B, C, gate = rows
    inputs = (x, dt, rates, B, C, D.to(wide).contiguous(), gate, state)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    return _SelectiveScan.apply(*inputs, cu_seqlens.to(x.device, torch.long), keep)


def rows_of(t: Tensor) -> Tensor:
    """Rows without gaps inside; between rows there may be some."""
    return t if t.stride(-1) == 1 else t.contiguous()


def marks_of(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """(T,) int32: segment * 4 + 2 at a segment's last token + 1 at its first."""
    position = torch.arange(tokens, device=cu_seqlens.device)
    segment = torch.bucketize(position, cu_seqlens[1:], right=True)
    first, last = position == cu_seqlens[segment], position + 1 == cu_seqlens[segment + 1]
    return (segment * 4 + last * 2 + first.long()).int()


def chunk_length(tokens: int) -> int:
    """A power of two and a multiple of TILE."""
    return max(TILE, min(LONGEST_CHUNK, triton.next_power_of_2(triton.cdiv(tokens, CHUNKS))))


class _SelectiveScan(torch.autograd.Function):
    """Rates are A * log2(e), (Dn, N); the rest as in reference.selective_scan, rows may be strided."""

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
        keep: bool,
    ) -> tuple[Tensor, Tensor]:
        (tokens, channels), segments = x.shape, len(cu_seqlens) - 1
        launch = _Launch(tokens, rates, initial)
        marks = marks_of(cu_seqlens, tokens)
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        # The kernel writes the final states of segments with tokens; an empty one hands on its initial state.
        final = rates.new_zeros(segments, *rates.shape)
        if initial is not None:
            final.copy_(initial.expand_as(final))
        kept = rates.new_empty(triton.cdiv(tokens, TILE) if keep else 0, *rates.shape)
        ends, steps = rates.new_empty(launch.chunks, *rates.shape), rates.new_empty(launch.chunks, channels)
        strides = (x.stride(0), dt.stride(0), B.stride(0))
        if launch.chunks > 1:
            launch(kernels.chunk_ends, x, dt, rates, B, marks, cu_seqlens, initial, ends, steps, *launch.shape,
                   *strides, launch.initial_row, GIVEN=launch.given, TERMS=launch.terms)  # fmt: skip
            launch.carry(ends, steps, rates, marks, cu_seqlens, reverse=False)
        if tokens:
            launch(kernels.outputs, x, dt, rates, B, C, D, gate, marks, cu_seqlens, initial, ends, y, final, kept,
                   *launch.shape, *strides, C.stride(0), gate.stride(0), launch.initial_row, TILE=TILE,
                   GIVEN=launch.given, ENTERED=launch.chunks > 1, KEEP=keep, TERMS=launch.terms)  # fmt: skip
        ctx.save_for_backward(x, dt, rates, B, C, D, gate, initial, cu_seqlens, marks, kept, steps)
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, dt, rates, B, C, D, gate, initial, cu_seqlens, marks, kept, steps = ctx.saved_tensors
        dy, dfinal = (g.contiguous() for g in upstream)
        (tokens, channels), states = x.shape, rates.shape[1]
        launch = _Launch(tokens, rates, initial)
        dx, ddt, dgate = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, dt, gate))
        # An empty segment's initial state is its final one; the kernel writes the others'.
        dinitial = dfinal.clone()
        dB, dC = (rates.new_empty(launch.blocks, tokens, states) for _ in range(2))
        drates, dD = rates.new_empty(launch.chunks, *rates.shape), rates.new_empty(launch.chunks, channels)
        entering = rates.new_empty(launch.chunks, *rates.shape)
        if launch.chunks > 1:
            launch(kernels.chunk_gradients, dt, rates, C, gate, dy, dfinal, marks, cu_seqlens, entering, *launch.shape,
                   dt.stride(0), C.stride(0), gate.stride(0), TERMS=launch.terms)  # fmt: skip
            launch.carry(entering, steps, rates, marks, cu_seqlens, reverse=True)
        if tokens:
            launch(kernels.gradients, x, dt, rates, B, C, D, gate, dy, dfinal, marks, initial, kept, entering,
                   dx, ddt, dgate, dinitial, dB, dC, drates, dD, *launch.shape, x.stride(0), dt.stride(0), B.stride(0),
                   C.stride(0), gate.stride(0), launch.initial_row, TILE=TILE, GIVEN=launch.given,
                   ENTERED=launch.chunks > 1, TERMS=launch.terms)  # fmt: skip
        shared = initial is not None and len(initial) == 1
        of_initial = None if initial is None else dinitial.sum(0, keepdim=True) if shared else dinitial
        # d loss / d A is drates; rates are A * log2(e).
        of_rates = drates.sum(0) / math.log2(math.e)
        return dx, ddt, of_rates, dB.sum(0).to(B.dtype), dC.sum(0).to(C.dtype), dD.sum(0), dgate, of_initial, None, None


class _Launch:
    """Sizes that all kernels of one call share, and how they are launched."""

    def __init__(self, tokens: int, rates: Tensor, initial: Tensor | None) -> None:
        channels, states = rates.shape
        self.shape = (tokens, channels, states)
        self.chunk = chunk_length(tokens)
        self.chunks, self.blocks = triton.cdiv(tokens, self.chunk), triton.cdiv(channels, BLOCK)
        self.given, self.initial_row = initial is not None, int(initial is not None and len(initial) > 1)
        self.padded_states = triton.next_power_of_2(states)
        self.terms = TERMS[rates.dtype]

    def __call__(self, kernel: Any, *arguments: Any, **constants: Any) -> None:
        kernel[(self.chunks, self.blocks)](*arguments, **constants, **self._constants())

    def carry(
        self, ends: Tensor, steps: Tensor, rates: Tensor, marks: Tensor, cu_seqlens: Tensor, reverse: bool
    ) -> None:
        tokens, channels, states = self.shape
        kernels.carry[(self.blocks,)](ends, steps, rates, marks, cu_seqlens, tokens, self.chunks, channels, states,
                                      REVERSE=reverse, **self._constants())  # fmt: skip

    def _constants(self) -> dict[str, int]:
        return {"CHUNK": self.chunk, "BLOCK": BLOCK, "N": self.padded_states, "num_warps": WARPS}
