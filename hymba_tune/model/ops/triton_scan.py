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
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from hymba_tune.model.ops import segments
from hymba_tune.model.ops import triton_scan_kernels as kernels

# Channels of a program of one warp, so many a thread: all states of a channel lie in one thread's registers. The kernel
# that holds gradients too has no room for a second channel.
BLOCK, GRADIENT_BLOCK, WARPS = 64, 32, 1
# Tokens that are loaded together. The backward kernel holds their decays and states in registers: with 8 it spills.
TILE = 4
# Elements of a program that takes softplus; of one that carries a state over the chunks, loaded GROUP at a time.
STEPS, CARRIED, GROUP = 1024, 32, 8
# Enough chunks to fill the GPU beside the blocks of channels, few enough for the serial pass over them.
CHUNKS, SHORTEST_CHUNK, LONGEST_CHUNK = 64, 16, 256
# Terms of the series in softplus and its derivative that reach the precision of the type.
TERMS = {torch.float32: (8, 7), torch.float64: (18, 13)}


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
    rates = A.to(wide) * math.log2(math.e)
    state = None if initial_state is None else initial_state.to(wide)
    ends = segments.boundaries(cu_seqlens, x.device)
    marks = marks_of(ends, len(x))
    return _SelectiveScan.apply(rows_of(x), dt.to(wide), rates, B, C, D.to(wide), rows_of(gate), state, ends, marks)


def rows_of(t: Tensor) -> Tensor:
    """Rows without gaps inside; between rows there may be some."""
    return t if t.stride(-1) == 1 else t.contiguous()


def marks_of(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """(T, to whole tiles) int32: segment * 4 + 2 at a segment's last token + 1 at its first; zeros behind them."""

    def derive() -> Tensor:
        segment, firsts = segments.owners(cu_seqlens, tokens)
        position = torch.arange(tokens, device=segment.device)
        first, last = position == firsts, position + 1 == cu_seqlens[segment + 1]
        return F.pad((segment * 4 + last * 2 + first.long()).int(), (0, whole_tiles(tokens) - tokens))

    return segments.kept(cu_seqlens, ("marks", tokens, TILE), derive)


def whole_tiles(tokens: int) -> int:
    """Tokens up to the end of the last tile."""
    return triton.cdiv(tokens, TILE) * TILE


def chunk_length(tokens: int) -> int:
    """A power of two and a multiple of TILE."""
    return max(SHORTEST_CHUNK, min(LONGEST_CHUNK, triton.next_power_of_2(triton.cdiv(tokens, CHUNKS))))


class _SelectiveScan(torch.autograd.Function):
    """Rates are A * log2(e), (Dn, N); the rest as in reference.selective_scan, rows may be strided.

    The kernels have channels last: states (.., N, Dn).
    """

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
        marks: Tensor,
    ) -> tuple[Tensor, Tensor]:
        rates, initial = channels_last(rates), None if initial is None else channels_last(initial)
        delta = torch.empty(dt.shape, dtype=dt.dtype, device=dt.device)
        if dt.numel():
            kernels.time_steps[(triton.cdiv(dt.numel(), STEPS),)](
                dt=dt.contiguous(), delta=delta, elements=dt.numel(), TERMS=TERMS[dt.dtype][0], SIZE=STEPS
            )
        launch = _Launch(x, delta, rates, B, C, initial, marks)
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        # The kernel writes the final states of segments with tokens; an empty one hands on its initial state.
        final = rates.new_zeros(len(cu_seqlens) - 1, *rates.shape)
        if initial is not None:
            final.copy_(initial.expand_as(final))
        # What enters the only chunk does not matter: its first token starts a segment.
        ends = rates.new_zeros(launch.chunks, *rates.shape)
        steps = rates.new_empty(launch.chunks, x.shape[1])
        through = torch.empty(launch.chunks, dtype=torch.int32, device=x.device)
        D = D.contiguous()
        if launch.chunks > 1:
            launch(kernels.chunk_ends, **launch.driven, cu_seqlens=cu_seqlens, ends=ends, steps=steps, through=through)
            launch.carry(ends, steps, through, reverse=False)
        launch(kernels.outputs, **launch.driven, **launch.gated(gate), D=D, ends=ends, y=y, final=final)
        ctx.save_for_backward(x, delta, rates, B, C, D, gate, initial, cu_seqlens, marks, ends, steps, through)
        return y, final.mT

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, delta, rates, B, C, D, gate, initial, cu_seqlens, marks, ends, steps, through = ctx.saved_tensors
        dy, dfinal = upstream[0].contiguous(), channels_last(upstream[1])
        launch = _Launch(x, delta, rates, B, C, initial, marks)
        kept = rates.new_empty(triton.cdiv(len(x), TILE), *rates.shape)
        launch(kernels.tile_starts, **launch.driven, ends=ends, kept=kept)
        entering = torch.zeros_like(ends)
        if launch.chunks > 1:
            launch(kernels.chunk_gradients, **launch.timed, **launch.gated(gate), dy=dy, dfinal=dfinal,
                   cu_seqlens=cu_seqlens, entering=entering)  # fmt: skip
            launch.carry(entering, steps, through, reverse=True)
        dx, ddt, dgate = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, delta, gate))
        # An empty segment's initial state is its final one; the kernel writes the others'.
        dinitial = dfinal.clone()
        blocks = triton.cdiv(launch.channels, GRADIENT_BLOCK)
        dB, dC = (rates.new_empty(blocks, *B.shape) for _ in range(2))
        drates, dD = rates.new_empty(ends.shape), rates.new_empty(steps.shape)
        wanted = {"dx": dx, "ddt": ddt, "dgate": dgate, "dinitial": dinitial, "dB": dB, "dC": dC, "drates": drates}
        launch(kernels.gradients, **launch.driven, **launch.gated(gate), **launch.summed(), **wanted, D=D, dD=dD, dy=dy,
               dfinal=dfinal, kept=kept, entering=entering, TERMS=TERMS[rates.dtype][1],
               block=GRADIENT_BLOCK)  # fmt: skip
        of_initial = None if initial is None else dinitial.sum_to_size(initial.shape).mT
        # The kernel's is the gradient of A, and rates are A * log2(e).
        of_rates = drates.sum(0).mT / math.log2(math.e)
        return dx, ddt, of_rates, dB.sum(0).to(B.dtype), dC.sum(0).to(C.dtype), dD.sum(0), dgate, of_initial, None, None


def channels_last(states: Tensor) -> Tensor:
    """(.., Dn, N) -> (.., N, Dn), contiguous."""
    return states.mT.contiguous()


class _Launch:
    """What the kernels of one call share, by the names of their parameters."""

    def __init__(
        self,
        x: Tensor,
        delta: Tensor,
        rates: Tensor,
        B: Tensor,
        C: Tensor,
        initial: Tensor | None,
        marks: Tensor,
    ) -> None:
        self.tokens, (self.states, self.channels) = len(x), rates.shape
        self.chunk, self.rates, self.marks = chunk_length(self.tokens), rates, marks
        self.chunks = triton.cdiv(self.tokens, self.chunk)
        filled = whole_tiles(self.tokens) - self.tokens
        columns = triton.next_power_of_2(2 * self.states) - 2 * self.states
        bc = F.pad(torch.cat([B, C], 1).to(rates.dtype), (0, columns, 0, filled))
        self.timed = {"delta": delta, "bc": bc}
        states = {"initial": initial, "GIVEN": initial is not None}
        states["initial_row"] = int(initial is not None and len(initial) > 1)
        self.driven = {**self.timed, "x": x, "x_row": x.stride(0), **states}

    def gated(self, gate: Tensor) -> dict[str, Any]:
        return {"gate": gate, "gate_row": gate.stride(0)}

    def summed(self) -> dict[str, int]:
        """How the sums over a program's channels are laid out over its threads; see kernels.store_sums."""
        width = min(GRADIENT_BLOCK, triton.next_power_of_2(self.states))
        return {
            "WIDTH": width,
            "HALVINGS": width.bit_length() - 1,
            "EXCHANGES": (GRADIENT_BLOCK // width).bit_length() - 1,
        }

    def __call__(self, kernel: Any, block: int | None = None, **arguments: Any) -> None:
        if self.tokens:
            block = block or BLOCK
            grid = (triton.cdiv(self.channels, block), self.chunks)
            kernel[grid](**arguments, **self._common(), TILE=TILE, BLOCK=block)

    def carry(self, ends: Tensor, steps: Tensor, through: Tensor, reverse: bool) -> None:
        grid = (triton.cdiv(self.channels, CARRIED), self.states)
        kernels.carry[grid](
            ends=ends, steps=steps, through=through, rates=self.rates, chunks=self.chunks, channels=self.channels,
            GROUP=GROUP, BLOCK=CARRIED, STATES=self.states, REVERSE=reverse, num_warps=WARPS,
        )  # fmt: skip

    def _common(self) -> dict[str, Any]:
        sizes = {"tokens": self.tokens, "channels": self.channels}
        constants = {"CHUNK": self.chunk, "STATES": self.states, "num_warps": WARPS}
        return {"rates": self.rates, "marks": self.marks, **sizes, **constants}
