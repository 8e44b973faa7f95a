"""Selective scan on a GPU: autograd around the Triton kernels of triton_scan_kernels.py.

Signature, shapes and semantics: reference.py. The stream is cut into chunks of equal length wherever documents start or
end: a document's first token replaces the state by its initial one. One program scans a block of channels token by
token, so every (token, channel, state) costs one exp2, which bounds the time, and no state leaves the registers.
Blocks of channels alone are too few programs for one long document on a large GPU (100 at 3,200 channels), so the scan
has two levels: the state that each chunk adds, a short serial pass that carries them over, then the outputs. The first
level skips what no carry needs, so that documents shorter than a chunk pay for it about half. The backward pass has the
same two levels from the right. Only the states that enter the chunks are kept for it; the others are computed again, in
two steps: those before every TILE-th token, into a buffer of T / TILE states that lives during the call, and those
between, in registers.

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
# Tokens whose states and decays the backward kernel holds in registers: with 8 it spills (Triton 3.7, sm_90).
TILE = 4
WARPS = 4
# Enough chunks to fill the GPU beside the blocks of channels, few enough for the serial pass over them.
CHUNKS, SHORTEST_CHUNK, LONGEST_CHUNK = 64, 16, 256
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
    x, dt, B, C, gate = (rows_of(t) for t in (x, dt.to(wide), B, C, gate))
    return _SelectiveScan.apply(
        x, dt, rates, B, C, D.to(wide).contiguous(), gate, state, cu_seqlens.to(x.device, torch.long).contiguous()
    )


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
    return max(SHORTEST_CHUNK, min(LONGEST_CHUNK, triton.next_power_of_2(triton.cdiv(tokens, CHUNKS))))


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
    ) -> tuple[Tensor, Tensor]:
        launch = _Launch(x, dt, rates, B, initial, cu_seqlens)
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        # The kernel writes the final states of segments with tokens; an empty one hands on its initial state.
        final = rates.new_zeros(len(cu_seqlens) - 1, *rates.shape)
        if initial is not None:
            final.copy_(initial.expand_as(final))
        # What enters the only chunk does not matter: its first token starts a segment.
        ends = torch.zeros(launch.chunks, *rates.shape, dtype=rates.dtype, device=x.device)
        steps = rates.new_empty(launch.chunks, x.shape[1])
        if launch.chunks > 1:
            launch(kernels.chunk_ends, **launch.driven, cu_seqlens=cu_seqlens, ends=ends, steps=steps)
            launch.carry(ends, steps, reverse=False)
        launch(kernels.outputs, **launch.driven, **launch.read_out(C, gate), D=D, ends=ends, y=y, final=final)
        ctx.save_for_backward(x, dt, rates, B, C, D, gate, initial, cu_seqlens, ends, steps)
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, dt, rates, B, C, D, gate, initial, cu_seqlens, ends, steps = ctx.saved_tensors
        dy, dfinal = (g.contiguous() for g in upstream)
        launch = _Launch(x, dt, rates, B, initial, cu_seqlens)
        read_out = launch.read_out(C, gate)
        kept = rates.new_empty(triton.cdiv(len(x), TILE), *rates.shape)
        launch(kernels.tile_starts, **launch.driven, ends=ends, kept=kept, TILE=TILE)
        entering = torch.zeros_like(ends)
        if launch.chunks > 1:
            launch(kernels.chunk_gradients, **launch.timed, **read_out, dy=dy, dfinal=dfinal, cu_seqlens=cu_seqlens,
                   entering=entering)  # fmt: skip
            launch.carry(entering, steps, reverse=True)
        dx, ddt, dgate = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, dt, gate))
        # An empty segment's initial state is its final one; the kernel writes the others'.
        dinitial = dfinal.clone()
        dB, dC = (rates.new_empty(launch.blocks, *B.shape) for _ in range(2))
        drates, dD = rates.new_empty(ends.shape), rates.new_empty(steps.shape)
        wanted = {"dx": dx, "ddt": ddt, "dgate": dgate, "dinitial": dinitial, "dB": dB, "dC": dC, "drates": drates}
        launch(kernels.gradients, **launch.driven, **read_out, **wanted, D=D, dD=dD, dy=dy, dfinal=dfinal, kept=kept,
               entering=entering, TILE=TILE)  # fmt: skip
        of_initial = None if initial is None else dinitial.sum_to_size(initial.shape)
        # The kernel's is the gradient of A, and rates are A * log2(e).
        of_rates = drates.sum(0) / math.log2(math.e)
        return dx, ddt, of_rates, dB.sum(0).to(B.dtype), dC.sum(0).to(C.dtype), dD.sum(0), dgate, of_initial, None


class _Launch:
    """What the kernels of one call share, by the names of their parameters."""

    def __init__(
        self, x: Tensor, dt: Tensor, rates: Tensor, B: Tensor, initial: Tensor | None, cu_seqlens: Tensor
    ) -> None:
        self.tokens, (self.channels, self.states) = len(x), rates.shape
        self.chunk, self.rates, self.cu_seqlens = chunk_length(self.tokens), rates, cu_seqlens
        self.chunks, self.blocks = triton.cdiv(self.tokens, self.chunk), triton.cdiv(self.channels, BLOCK)
        self.marks = marks_of(cu_seqlens, self.tokens)
        self.timed = {"dt": dt, "dt_row": dt.stride(0), "TERMS": TERMS[rates.dtype]}
        separate = initial is not None and len(initial) > 1
        states = {"initial": initial, "initial_row": int(separate), "GIVEN": initial is not None}
        self.driven = {**self.timed, "x": x, "x_row": x.stride(0), "B": B, "B_row": B.stride(0), **states}

    def read_out(self, C: Tensor, gate: Tensor) -> dict[str, Any]:
        return {"C": C, "C_row": C.stride(0), "gate": gate, "gate_row": gate.stride(0)}

    def __call__(self, kernel: Any, **arguments: Any) -> None:
        if self.tokens:
            kernel[(self.chunks, self.blocks)](**arguments, **self._common())

    def carry(self, ends: Tensor, steps: Tensor, reverse: bool) -> None:
        common = self._common()
        kernels.carry[(self.blocks,)](
            ends=ends, steps=steps, cu_seqlens=self.cu_seqlens, chunks=self.chunks, REVERSE=reverse, **common
        )

    def _common(self) -> dict[str, Any]:
        sizes = {"tokens": self.tokens, "channels": self.channels, "states": self.states}
        constants = {"CHUNK": self.chunk, "BLOCK": BLOCK, "N": triton.next_power_of_2(self.states), "num_warps": WARPS}
        return {"rates": self.rates, "marks": self.marks, **sizes, **constants}
